"""Does what was exported embed as the model did? Every export ends with this check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf.modules import check_embeddings
from sentence_transformers_inf.passages import distinct_passages
from sentence_transformers_inf.records import load_records

DIFFERENCE = {"merged": 1e-5, "onnx": 1e-4, "openvino": 1e-4, "vllm": 1e-5}
"""The largest difference of two coordinates of an embedding of length 1 that may be, by the format."""

OVERLAP = 0.95
"""The least mean share of the same passages among the first ten that may be."""

Encode = Callable[[str, list[Any]], NDArray[np.float32]]
"""Embed inputs of one of the kinds ``"instructed_queries"``, ``"plain_queries"`` and ``"passages"``."""


def encode_with(model: SentenceTransformer) -> Encode:
    """Embed with a model of this package."""

    def encode(kind: str, inputs: list[Any]) -> NDArray[np.float32]:
        encode_kind = model.encode_document if kind == "passages" else model.encode_query
        return encode_kind(inputs, batch_size=16, show_progress_bar=False)

    return encode


def parity_inputs() -> tuple[dict[str, list[Any]], list[str]]:
    """64 texts, and the passages of the bundled test split.

    Returns:
        32 instructed queries, 12 plain ones and 20 passages, by their kind: of the bundled test split, and a few that are
        empty, long or in another script; and the passages.
    """
    records = load_records("mini", "test")
    texts = distinct_passages([records])
    odd = ["", " ".join(texts[:20]), "Почему небо голубое? 空はなぜ青いのか"]
    queries = [*records["query_positive"][:30], odd[0], odd[2]]
    instructions = [*records["instruction_positive"][:31], odd[2]]
    told = [{"query": query, "instruction": instruction} for query, instruction in zip(queries, instructions)]
    plain = [*records["query_positive"][30:39], *odd]
    return {"instructed_queries": told, "plain_queries": plain, "passages": [*texts[:17], *odd]}, texts


def measure_parity(reference: Encode, exported: Encode) -> dict[str, float]:
    """How far an export is from its model.

    Args:
        reference: How the model embeds.
        exported: How the export does, in the way in which others use it.

    Returns:
        ``texts``: how many were compared; ``largest_difference``: of two coordinates, as a share of the model's embedding's
        length; ``top_10_overlap``: the mean share of the same passages among the first ten of the bundled test split,
        over the queries.
    """
    inputs, passages = parity_inputs()
    kinds = ("instructed_queries", "plain_queries")
    pairs = {kind: (reference(kind, texts), exported(kind, texts)) for kind, texts in inputs.items()}
    for kind, (ours, _) in pairs.items():
        check_embeddings(ours, [str(text) for text in inputs[kind]], kind.replace("_", " "))
    differences = [np.abs(ours - theirs) / np.linalg.norm(ours, axis=1, keepdims=True) for ours, theirs in pairs.values()]
    firsts = [
        _first_ten(np.concatenate([pairs[kind][side] for kind in kinds]), encode("passages", passages))
        for side, encode in enumerate((reference, exported))
    ]
    shares = [len(set(ours) & set(theirs)) / len(ours) for ours, theirs in zip(*firsts)]
    return {
        "texts": sum(map(len, inputs.values())),
        "largest_difference": float(max(difference.max() for difference in differences)),
        "top_10_overlap": float(np.mean(shares)),
    }


def check_parity(parity: dict[str, float], format: str, quantized: bool) -> None:
    """Refuse an export that is too far from its model.

    Raises:
        ValueError: The message says how far, and what the bound is.
    """
    difference, overlap = parity["largest_difference"], parity["top_10_overlap"]
    if not quantized and not difference <= DIFFERENCE[format]:
        raise ValueError(
            f"the export differs from the model by {difference:.2g}, more than {DIFFERENCE[format]:.0e}: nothing was written"
        )
    if not overlap >= OVERLAP:
        remedy = "; leave --quantize out" if quantized else ""
        raise ValueError(
            f"the export finds {overlap:.3f} of the model's first ten passages, not {OVERLAP}: nothing was written{remedy}"
        )


def _first_ten(queries: NDArray[np.float32], passages: NDArray[np.float32]) -> list[list[int]]:
    scores = _unit(queries) @ _unit(passages).T
    rows: list[list[int]] = np.argsort(-scores, axis=1, kind="stable")[:, :10].tolist()
    return rows


def _unit(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
