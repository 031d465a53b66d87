"""Where the cards' templates are."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def card_template(name: str) -> Path:
    """The path of ``model_card.md`` or ``dataset_card.md``: in an installed package, else in a checkout."""
    folders = (_PACKAGE / "model_cards", _PACKAGE.parent / "model_cards")
    return next(folder for folder in folders if folder.is_dir()) / name
