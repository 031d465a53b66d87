"""Files beside a model: its own, and the recipe of its run; written whole, read with an error that names them. And settings
in YAML."""

import contextlib
import errno
import json
import os
import re
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from sentence_transformers_inf.reading import RecordError, read_text

RECIPE_FILE = "recipe.json"
"""The recipe's file in the output folder of a run; ``"finished": true`` once the model is saved beside it."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where there is no room for a file."""

LOCK_FILE = ".lock"
"""Locked in a folder while a command writes there. The file stays, the lock ends with the process."""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to. The file takes the place of ``path``, on disk, when the block ends without an error: it is there
    whole or not at all, whenever the process or the machine stops.

    Raises:
        OSError: The file cannot be written, or the disk is full; it names ``path``.
    """
    path = Path(path)
    part = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}.part")  # a name may have 255 bytes
    try:
        yield part
        _sync(part, os.O_RDWR)
        os.replace(part, path)
        with contextlib.suppress(PermissionError):  # Windows opens no folders
            _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        if error.errno in FULL or error.filename == str(part):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: str | Path, kind: type = dict, keys: Iterable[str] = ()) -> Any:
    """What a JSON file holds.

    Args:
        path: The file.
        kind: What it must be: ``dict`` or ``list``.
        keys: What it, or each entry of a list, must have.

    Raises:
        ValueError: It is damaged, something else, or lacks a key; the message names the file.
    """
    if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: this is no file: restore the file")
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, this is no JSON ({error}): restore the file") from error
    entries = content if isinstance(content, list) else [content]
    if not isinstance(content, kind) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: expected {'an object' if kind is dict else 'a list of objects'}: restore the file")
    if missing := next((key for entry in entries for key in keys if key not in entry), None):
        raise ValueError(f"{path}: there is no {missing!r} in it: restore the file")
    return content


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other processes that ask for it out of a folder, which is made if it is not there.

    Raises:
        BlockingIOError: Another process is writing there.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE, timeout=0, is_singleton=True)  # a command may lock what its parts lock again
    try:
        lock.acquire()
    except Timeout as error:
        why = "another command is writing here: wait until it ends, or name another folder"
        raise BlockingIOError(f"{folder}: {why}") from error
    try:
        yield
    finally:
        lock.release()


def read_recipe(folder: str | Path) -> dict[str, Any] | None:
    """The recipe of the model in a folder; ``None`` for one that no run left there.

    Raises:
        ValueError: A ``recipe.json`` that is damaged, or not of a run.
    """
    path = Path(folder) / RECIPE_FILE
    if not path.exists():
        return None
    try:
        recipe: dict[str, Any] = read_json(path, dict, ["base"])
        _check_recipe(path, recipe)
    except ValueError as error:
        raise ValueError(f"{error}, move it away, or name another folder") from error
    return recipe


def _check_recipe(path: Path, recipe: dict[str, Any]) -> None:
    sources = recipe.get("sources", [recipe])
    for source in sources if isinstance(sources, list) else [sources]:
        if not isinstance(source, dict) or type(source.get("records", 0)) is not int:
            raise ValueError(f"{path}: 'sources' or 'records' is of another kind: restore the file")
    texts = [recipe["base"], recipe.get("license")]
    if not all(isinstance(text, (str, type(None))) for text in texts) or not isinstance(recipe.get("settings", {}), dict):
        raise ValueError(f"{path}: 'base', 'license' or 'settings' is of another kind: restore the file")


def write_recipe(folder: str | Path, recipe: dict[str, Any]) -> None:
    """Write the recipe beside the model in a folder, whole or not at all."""
    write_whole(Path(folder) / RECIPE_FILE, json.dumps(recipe, indent=2) + "\n")


def is_finite(number: Any) -> bool:
    """Whether a number is one that a float can be: NaN, an infinity and a whole number of 400 digits are not."""
    return bool(abs(number) <= sys.float_info.max)


def is_checkpoint(path: Path) -> bool:
    """Whether this is the name of a run's checkpoint."""
    return re.fullmatch(r"checkpoint-\d+", path.name) is not None


def model_files(folder: Path, pattern: str) -> list[Path]:
    """The files of the model in a folder, by their names, without those of the run's checkpoints."""
    paths = folder.rglob(pattern)
    return [path for path in paths if not is_checkpoint(Path(path.relative_to(folder).parts[0]))]


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
        raise FileNotFoundError(f"{path}: no such file; check the path")
    try:
        settings = yaml.load(read_text(path), _Loader)
    except RecordError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML ({error}): mend it") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected names and their values, as num_train_epochs: 2")
    return settings
