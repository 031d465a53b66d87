"""Adapters: obedience for a model that is already deployed, shipped without the model.

An adapter is what encodes instructed queries beside a base model that stays as it is: a LoRA on the base's weights, a few
MiB, or a whole encoder of its own. Its folder is an ordinary Sentence Transformers folder of that encoder (with PEFT's files
where it is a LoRA), so that a machine without this package can load it and encode joined strings, and one more file,
``instruction_adapter.json``, which names the base model and its fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf.modules.instruction_router import (
    InstructionRouter,
    encoder_of,
    has_lora,
    name_base,
    with_settings,
)

ADAPTER_FILE = "instruction_adapter.json"


def fingerprint(model: SentenceTransformer) -> str:
    """What tells one model's weights from another's: a hash of the names, shapes and some values of all its weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.detach().flatten()
        some = torch.cat([values[:64], values[-64:]]).to("cpu", torch.float32)
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def save_adapter(model: SentenceTransformer, folder: str | Path, base: str, revision: str | None = None) -> None:
    """Save what a model has beside its base.

    Args:
        model: From :func:`~sentence_transformers_inf.modules.instructed_tower` or :func:`attach_adapter`.
        folder: Where to.
        base: The id of the base model on the Hub, or its folder.
        revision: The base's revision, where it is on the Hub.

    Raises:
        ValueError: The model has no adapter.
    """
    base_model = detach_adapter(model)
    tower: list[Any] = list(encoder_of(model))
    name_base(tower[0], base, revision)
    whole = with_settings(SentenceTransformer(modules=tower), model)
    whole.save_pretrained(str(folder), create_model_card=False)
    settings: dict[str, Any] = {"base": base, "revision": revision, "fingerprint": fingerprint(base_model)}
    settings |= {"dimension": base_model.get_embedding_dimension(), "lora": has_lora(tower[0])}
    Path(folder, ADAPTER_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def check_base(settings: dict[str, Any], base: SentenceTransformer) -> None:
    """Refuse a base model that an adapter was not made for.

    Args:
        settings: What ``instruction_adapter.json`` says.
        base: The model to attach the adapter to.

    Raises:
        ValueError: It is of another dimension, or its weights are others.
    """
    name = settings["base"] + (f" (revision {settings['revision']})" if settings["revision"] else "")
    if (dimension := base.get_embedding_dimension()) != settings["dimension"]:
        raise ValueError(
            f"the adapter was made for {name}, whose embeddings have {settings['dimension']} dimensions, and this base "
            f"model's have {dimension}"
        )
    if fingerprint(base) != settings["fingerprint"]:
        raise ValueError(f"the adapter was made for {name}, and this base model has other weights: take that revision")


def detach_adapter(model: SentenceTransformer) -> SentenceTransformer:
    """The base model of a model with an adapter: the very modules that the adapter stands beside.

    Raises:
        ValueError: The model has no adapter.
    """
    router = model[0]
    if not isinstance(router, InstructionRouter) or "base" not in router.sub_modules:
        raise ValueError("the model has no adapter")
    return with_settings(SentenceTransformer(modules=list(router.route("base"))), model)
