"""Files beside a model: its own, and the recipe of its run. And settings in YAML."""

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from sentence_transformers_inf.reading import RecordError, read_text

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


def model_files(folder: Path, pattern: str) -> list[Path]:
    """The files of the model in a folder, by their names, without those of the run's checkpoints."""
    paths = folder.rglob(pattern)
    return [path for path in paths if not path.relative_to(folder).parts[0].startswith("checkpoint-")]


class _Loader(yaml.SafeLoader):
    """With YAML 1.2's numbers: 3e-4 is one."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It holds no YAML, or no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        settings = yaml.load(read_text(path), _Loader)
    except RecordError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected names and their values, as num_train_epochs: 2")
    return settings
