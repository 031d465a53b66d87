"""Adapters: obedience for a model that is already deployed, shipped without the model.

An adapter is what encodes instructed queries beside a base model that stays as it is: a LoRA on the base's weights, a few
MiB, or a whole encoder of its own. Its folder is an ordinary Sentence Transformers folder of that encoder (with PEFT's files
where it is a LoRA), so that a machine without this package can load it and encode joined strings, and one more file,
``instruction_adapter.json``, which names the base model and what its embeddings depend on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from sentence_transformers_inf.modules.fingerprint import embedding_settings, fingerprints, is_same
from sentence_transformers_inf.modules.instruction_router import InstructionRouter, encoder_of, with_settings
from sentence_transformers_inf.modules.lora import has_lora, name_base
from sentence_transformers_inf.recipe import write_whole

ADAPTER_FILE = "instruction_adapter.json"


def is_adapter(model: SentenceTransformer) -> bool:
    """Whether a model is a base model with an adapter beside it."""
    return isinstance(model[0], InstructionRouter) and bool(model[0].base_model)


def detach_adapter(model: SentenceTransformer) -> SentenceTransformer:
    """The base model of a model with an adapter: the very one that the adapter stands beside.

    Raises:
        ValueError: The model has no adapter.
    """
    if not is_adapter(model):
        raise ValueError("the model has no adapter")
    return model[0].base_model[0]  # type: ignore[index, return-value]


def save_adapter(model: SentenceTransformer, folder: str | Path, base: str, revision: str | None = None) -> None:
    """Save what a model has beside its base.

    Args:
        model: From :func:`~sentence_transformers_inf.modules.adapter_tower` or :func:`attach_adapter`.
        folder: Where to.
        base: The id of the base model on the Hub, or its folder.
        revision: The base's revision, where it is on the Hub.

    Raises:
        ValueError: The model has no adapter.
    """
    base_model = detach_adapter(model)
    tower: list[Any] = list(encoder_of(model))
    whole = with_settings(SentenceTransformer(modules=tower), model)
    whole.save_pretrained(str(folder), create_model_card=False)
    name_base(Path(folder), base, revision)
    settings: dict[str, Any] = {"base": base, "revision": revision, "dimension": base_model.get_embedding_dimension()}
    settings |= {"fingerprints": fingerprints(base_model), **embedding_settings(base_model), "lora": has_lora(tower[0])}
    write_whole(Path(folder, ADAPTER_FILE), json.dumps(settings, indent=2) + "\n")


def check_base(settings: dict[str, Any], base: SentenceTransformer) -> None:
    """Refuse a base model that an adapter was not made for.

    Args:
        settings: What ``instruction_adapter.json`` says.
        base: The model to attach the adapter to, in any precision.

    Raises:
        ValueError: It has other dimensions, other weights, another pooling or other modules after it.
    """
    name = settings["base"] + (f" (revision {settings['revision']})" if settings["revision"] else "")
    if not isinstance(settings.get("fingerprints"), dict):
        raise ValueError(f"the adapter for {name} was saved by an earlier version of this package: train it again")
    if (dimension := base.get_embedding_dimension()) != settings["dimension"]:
        raise ValueError(
            f"the adapter was made for {name}, whose embeddings have {settings['dimension']} dimensions, and this base "
            f"model's have {dimension}"
        )
    if not is_same(base, settings["fingerprints"]):
        raise ValueError(f"the adapter was made for {name}, and this base model has other weights: take that revision")
    for key, value in embedding_settings(base).items():
        if settings.get(key) != value:
            raise ValueError(
                f"the adapter was made for {name} with {key} {json.dumps(settings.get(key))}, and this base model has "
                f"{json.dumps(value)}"
            )
