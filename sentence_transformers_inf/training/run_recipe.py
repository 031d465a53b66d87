"""What goes into the recipe of a run: all that decides its weights, and where it came from."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf.corpora import BUNDLED_BASE
from sentence_transformers_inf.recipe import read_recipe
from sentence_transformers_inf.records import records_digest, source_of
from sentence_transformers_inf.training.arguments import InstructionTrainingArguments

IN_MEMORY = "a model in memory"
"""The base's name in a recipe where it has none."""

OF_SOURCE = ("data", "data_on_hub", "data_revision", "records", "records_sha256")
"""What a recipe says of each source of its data."""


def base_name(model: str | Path | SentenceTransformer | None) -> str:
    """What a recipe calls the base model."""
    if model is None:
        return BUNDLED_BASE
    if isinstance(model, SentenceTransformer):
        return model.model_card_data.base_model or IN_MEMORY
    return str(model)


def run_recipe(base: str, records: dict[str | None, Dataset], args: InstructionTrainingArguments) -> dict[str, Any]:
    """What decides the weights of a run, and where it came from.

    Args:
        base: From :func:`base_name`.
        records: The training data by name. Of several, the recipe has the names, the sum and one digest of all, and under
            ``sources`` what it has of a single one.
        args: Resolved.
    """
    return {
        "base": base,
        "base_on_hub": not Path(base).exists() and base != IN_MEMORY,
        "license": _license(base),
        **of_sources([_source(name, data) for name, data in records.items()]),
        "settings": args.recipe(),
    }


def of_sources(sources: list[dict[str, Any]]) -> dict[str, Any]:
    """What a recipe says of its data: of a single source all, of several the names, the sum and one digest beside them."""
    if len(sources) == 1:
        return sources[0]
    digests = "".join(source["records_sha256"] for source in sources)
    return {
        "data": [source["data"] for source in sources],
        "records": sum(source["records"] for source in sources),
        "records_sha256": hashlib.sha256(digests.encode()).hexdigest()[:16],
        "sources": sources,
    }


def _source(name: str | None, records: Dataset) -> dict[str, Any]:
    """The entries :data:`OF_SOURCE`."""
    source = source_of(records)
    return {
        "data": name if source is None else source.name,
        "data_on_hub": source is not None and source.on_hub,
        "data_revision": None if source is None else source.revision,
        "records": len(records),
        "records_sha256": records_digest(records),
    }


def _license(base: str) -> str | None:
    """The licence that the base model's own card states, which is that of what is made from it."""
    if base == BUNDLED_BASE:
        return "apache-2.0"
    with contextlib.suppress(ValueError):  # somebody else's recipe.json
        if Path(base).is_dir() and (known := (read_recipe(base) or {}).get("license")):
            return str(known)
    with contextlib.suppress(Exception):  # whatever is wrong with somebody else's card, it states no licence
        licence: str | None = ModelCard.load(Path(base) / "README.md" if Path(base).is_dir() else base).data.license
        return licence
    return None
