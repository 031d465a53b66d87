"""From query-passage pairs to InF-IR: the bundled mini corpus (``data/``)."""
