"""The recipe of a run: what it trained on and how, in a file beside the model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RECIPE_FILE = "recipe.json"
"""The recipe's file in the output folder of a run; ``"finished": true`` once the model is saved beside it."""


def read_recipe(folder: str | Path) -> dict[str, Any] | None:
    """The recipe of the model in a folder; ``None`` for one that no run left there."""
    path = Path(folder) / RECIPE_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_recipe(folder: str | Path, recipe: dict[str, Any]) -> None:
    """Write the recipe beside the model in a folder, whole or not at all."""
    path = Path(folder) / RECIPE_FILE
    part = path.with_suffix(".part")
    part.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)
