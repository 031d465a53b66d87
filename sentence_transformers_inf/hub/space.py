"""Push the playground to the Hugging Face Hub as a Space; its files are made from the templates in ``space/``."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import CommitOperationAdd, HfApi

from sentence_transformers_inf.hub.card import RESULTS_FILE
from sentence_transformers_inf.hub.errors import claim_repo, hub_errors
from sentence_transformers_inf.hub.push import check_saved, model_parts
from sentence_transformers_inf.modules.adapter import ADAPTER_FILE
from sentence_transformers_inf.reading import endings_of
from sentence_transformers_inf.recipe import RECIPE_FILE, read_json

TEMPLATES = Path(__file__).with_name("space")

FILES = ("README.md", "app.py", "requirements.txt")
"""What every Space has; a model from a folder is in ``model/``, and a corpus from a file is beside them."""


def space_files(model: str | None, compare: str | None, corpus: str, name: str | None = None) -> dict[str, str]:
    """The files of a Space by their names.

    Args:
        model: A Hub id or a folder in the Space; ``None``: the adapter that this package ships.
        compare: The model to compare with; ``None``: its base.
        corpus: A file in the Space, or a bundled corpus's name.
        name: What its page calls the model; ``None``: as it is loaded.
    """
    known = {
        "model": _literal(model),
        "compare": _literal(compare),
        "corpus": _literal(corpus),
        "name": name or model or "the adapter of all-MiniLM-L6-v2 that the package ships",
        "version": importlib.metadata.version("sentence-transformers-inf"),
    }
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), keep_trailing_newline=True, autoescape=False)
    return {file: environment.get_template(f"{file}.jinja").render(known) for file in FILES}


def _literal(text: str | None) -> str:
    """A text as Python has it, in double quotes."""
    return "None" if text is None else json.dumps(text)


def push_space(
    model: str | None,
    repo: str,
    *,
    compare: str | None = None,
    corpus: str = "mini",
    public: bool = False,
    token: str | None = None,
) -> str:
    """Push the playground of a model as a Space; repeating it ends in the same repository.

    Args:
        model: A folder, which is pushed with it, or a Hub id, which it loads; ``None``: the adapter that this package ships.
        repo: ``user/name``.
        compare: A Hub id; ``None``: the model's base.
        corpus: A file, which is pushed with it, or a bundled corpus's name.
        public: Make the Space public; else it is private (one that exists keeps its visibility, unless it is made public).
        token: ``None``: that of the login.

    Returns:
        The address of the Space.

    Raises:
        FileNotFoundError: There is no such folder with a saved model.
        ValueError: ``compare`` is a folder; the model's run is not finished, or it holds pickled weights; or it is an
            adapter to a base that is not on the Hub.
        HubError: The Hub refuses, or has no such model.
    """
    api = HfApi(token=token)
    if compare is not None and (compare.count("/") != 1 or Path(compare).exists()):
        raise ValueError(f"{compare}: a Space can compare only with a model on the Hub; push it, and give its id")
    added: dict[str, str | Path | bytes] = {}
    loaded, name, ranked = model, None, corpus
    if model is not None and (Path(model).exists() or model.count("/") != 1):
        check_saved(Path(model))
        added |= {f"model/{name}": content for name, content in _model_files(Path(model))}
        loaded, name = "model", Path(model).resolve().name
    elif model is not None:
        with hub_errors(model):
            api.model_info(model)
    if (path := Path(corpus)).is_file():
        ranked = f"corpus{endings_of(path)}"
        added[ranked] = path
    added |= {file: content.encode() for file, content in space_files(loaded, compare, ranked, name).items()}
    url = claim_repo(repo, "space", public=public, token=token)
    operations = [CommitOperationAdd(path, content) for path, content in added.items()]
    with hub_errors(repo):
        api.create_commit(repo, operations, repo_type="space", commit_message="Upload the playground")
    return url


def _model_files(folder: Path) -> Iterator[tuple[str, Path | bytes]]:
    """The files of a saved model by their names, and how it was trained and measured without the paths of this machine."""
    parts, _ = model_parts(folder)
    for name in [*parts, *(name for name in (RECIPE_FILE, RESULTS_FILE) if (folder / name).is_file())]:
        if name not in (ADAPTER_FILE, RECIPE_FILE, RESULTS_FILE):
            yield name, folder / name
            continue
        settings = read_json(folder / name)
        if name == ADAPTER_FILE and (settings["base"].count("/") != 1 or Path(settings["base"]).exists()):
            raise ValueError(
                f"{folder}: the adapter's base {settings['base']} is not on the Hub; push it, and train on that"
            )
        yield name, json.dumps(_without_paths(settings), indent=2).encode()


def _without_paths(value: Any) -> Any:
    """A value of JSON with the last names of absolute paths in their places."""
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
