"""Refuse a model whose files lack weights: transformers fills in random ones, with a warning that nobody need see."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from sentence_transformers.util import load_file_path
from torch import nn
from transformers import PreTrainedModel

from sentence_transformers_inf.recipe import read_json

_UNUSED = re.compile(r"(^|\.)pooler\.")
"""Weights that many models lack and no embedding depends on: those of BERT's own pooler."""


def check_weights(transformer: Any, name: str, folder: str, place: dict[str, Any]) -> None:
    """Refuse a transformer that has weights which its files lack, or lacks layers which they have.

    Args:
        transformer: A ``Transformer`` that was loaded.
        name: The model's folder or id.
        folder: That of the transformer in it.
        place: Where on the Hub.

    Raises:
        OSError: The message names the first weight.
    """
    model = getattr(transformer, "model", None)
    if not isinstance(model, PreTrainedModel):
        return
    _check_loras(model, name, folder, place)
    path, names = _saved(name, folder, "model", place)
    if not names:  # a LoRA alone
        return
    unused = _UNUSED if model.base_model is model else re.compile("(?!)")  # a head may be on it
    needed = {_without(model, key) for key in model.state_dict() if not unused.search(key)}
    there = {_without(model, key) for key in names}
    if needed <= there and not _further_layers(model, there - needed):
        return
    # Not by the names alone: transformers renames, ties and leaves out weights by rules of its own.
    where: dict[str, Any] = {
        "subfolder": folder,
        **{key: place[key] for key in ("token", "revision", "local_files_only") if key in place},
    }
    if place.get("cache_folder") is not None:
        where["cache_dir"] = place["cache_folder"]
    _, report = type(model).from_pretrained(
        name, config=model.config, dtype=model.dtype, use_safetensors=True, output_loading_info=True, **where
    )
    missing = sorted(key for key in report["missing_keys"] if not unused.search(key))
    further = _further_layers(model, {_without(model, key) for key in report["unexpected_keys"]})
    if missing:
        raise OSError(_message(name, f"{path} lacks weights that the model has", missing))
    if further:
        raise OSError(_message(name, f"{path} has layers that config.json does not count", further))


def _check_loras(model: PreTrainedModel, name: str, folder: str, place: dict[str, Any]) -> None:
    """The same for a LoRA."""
    for adapter in getattr(model, "peft_config", {}):
        path, names = _saved(name, folder, "adapter_model", place)
        there = {key.removeprefix("base_model.model.") for key in names}
        of_lora = (key for key in model.state_dict() if ".lora_" in key and f".{adapter}" in key)
        missing = sorted({key.replace(f".{adapter}", "") for key in of_lora} - there)
        if names and missing:
            raise OSError(_message(name, f"{path} lacks weights that the LoRA has", missing))


def _saved(name: str, folder: str, stem: str, place: dict[str, Any]) -> tuple[str, set[str]]:
    """A file of weights, or the index of several, and the names in it; empty where there is neither."""
    file = f"{folder}/{stem}.safetensors".lstrip("/")
    if (path := load_file_path(name, file, **place)) is not None:
        with safe_open(path, "pt") as weights:
            return file, set(weights.keys())
    file += ".index.json"
    if (path := load_file_path(name, file, **place)) is not None:
        return file, set(read_json(Path(path), dict, ("weight_map",))["weight_map"])
    return file, set()


def _without(model: PreTrainedModel, key: str) -> str:
    """A weight's name without the prefix that only some files have."""
    return key.removeprefix(f"{model.base_model_prefix}.") if model.base_model_prefix else key


def _further_layers(model: PreTrainedModel, keys: set[str]) -> list[str]:
    """Those of the weights that no layer has which belong to a list of layers of the model."""
    lists = {_without(model, name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return sorted(key for key in keys if any(key[: number.start()] in lists for number in re.finditer(r"\.\d+\.", key)))


def _message(name: str, what: str, keys: list[str]) -> str:
    shown = keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
    return f"{name}: {what}: {shown}; save or download the model again"
