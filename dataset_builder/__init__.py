"""From query-passage pairs to InF-IR: the stages, the pipeline that runs them (``inf-ir``), and the bundled mini corpus."""
