"""What tells one model's embeddings from another's."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Precisions that a model of float32 weights is loaded in."""


def fingerprint(model: SentenceTransformer, dtype: torch.dtype | None = None) -> str:
    """A hash of the names, shapes and some values of all weights.

    Args:
        model: The model.
        dtype: Of the values as they would be in this precision; ``None``: in the model's own.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.detach().flatten()
        some = torch.cat([values[:64], values[-64:]])
        some = some.to(dtype) if dtype is not None and some.is_floating_point() else some
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + some.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprints(model: SentenceTransformer) -> dict[str, str]:
    """The fingerprint in the model's own precision and in those that it may be loaded in, by name (``"float32"``, ...)."""
    own = next(model.parameters()).dtype
    dtypes = DTYPES if own == torch.float32 else (own,)
    return {str(dtype).removeprefix("torch."): fingerprint(model, dtype) for dtype in dtypes}


def is_same(model: SentenceTransformer, known: dict[str, str]) -> bool:
    """Whether a model has the weights whose :func:`fingerprints` are known, by the finest precision that both have."""
    ours = fingerprints(model)
    common = next((dtype for dtype in ("float32", "bfloat16", "float16") if dtype in ours and dtype in known), None)
    return common is not None and ours[common] == known[common]


def embedding_settings(model: SentenceTransformer) -> dict[str, Any]:
    """What shapes an embedding beside the weights.

    Returns:
        ``modules``: those after the transformer with their settings; ``truncate_dim``: the dimensions that are kept.
    """
    described = [
        [type(module).__name__, module.get_config_dict()]
        for module in model.modules()
        if isinstance(module, Module) and not hasattr(module, "tokenizer")
    ]
    settings: dict[str, Any] = json.loads(json.dumps({"modules": described, "truncate_dim": model.truncate_dim}))
    return settings
