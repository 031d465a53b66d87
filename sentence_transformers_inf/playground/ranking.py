"""Rankings of a corpus by a model and by the one it is compared with, with an instruction and without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf.modules import (
    check_embeddings,
    detach_adapter,
    encoder_of,
    is_adapter,
    load_instruction_model,
)
from sentence_transformers_inf.modules.exclusions import find_exclusions
from sentence_transformers_inf.passages import encode_passages
from sentence_transformers_inf.recipe import read_recipe

MOST_CHARACTERS = 4000
"""Of a query, and of an instruction."""


@dataclass(frozen=True)
class Ranking:
    """How a model ranks N passages.

    Attributes:
        models: Its name; the names of both models where they rank alike.
        order: The rows of the passages, best first. Of equal scores the later row is first, as in the evaluator.
        ranks: The rank of each row, from 1.
        scores: The score of each row.
        before: The ranks without the instruction; ``None``: this is the ranking without it.
    """

    models: tuple[str, ...]
    order: NDArray[np.int64]
    ranks: NDArray[np.int64]
    scores: NDArray[np.float32]
    before: NDArray[np.int64] | None = None


class Ranker:
    """A model with the vectors of a corpus.

    Args:
        name: What the page calls it.
        model: From :func:`~sentence_transformers_inf.load_instruction_model`.
        passages: The corpus.
        vectors: Its embeddings (N×d), perhaps memory-mapped (copied on write); ``None``: they are encoded, or read from
            the cache.
        show_progress: Show the encoding.

    Raises:
        BrokenModelError: The vectors are not finite, or all the same.
    """

    def __init__(
        self,
        name: str,
        model: SentenceTransformer,
        passages: Sequence[str],
        vectors: NDArray[np.float32] | None = None,
        show_progress: bool = False,
    ) -> None:
        self.name, self.model = name, model
        if vectors is None:
            encoder = detach_adapter(model) if is_adapter(model) else model  # one index for an adapter and its base
            vectors = encode_passages(encoder, passages, show_progress=show_progress)
            check_embeddings(np.array(vectors), passages, "passages")
        self.vectors = vectors
        self._lengths = None
        if model.similarity_fn_name == "cosine":
            self._lengths = np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)

    def scores(self, asked: Sequence[Any]) -> NDArray[np.float32]:
        """The similarities (Q×N) of Q queries, strings or dictionaries, to the passages."""
        if not asked:
            return np.empty((0, len(self.vectors)), dtype=np.float32)
        queries = self.model.encode_query(list(asked), show_progress_bar=False)
        if self._lengths is None:
            return np.asarray(self.model.similarity(queries, np.asarray(self.vectors)))
        # By PyTorch: NumPy's own threads wait busily after a product, and the next query takes six times as long to encode.
        similarities = F.normalize(torch.from_numpy(queries), dim=1) @ torch.from_numpy(self.vectors).T
        return np.asarray(similarities.numpy() / self._lengths, dtype=np.float32)

    def stands_beside(self, other: Ranker) -> bool:
        """Whether this is an adapter, and ``other`` its base: without an instruction they rank alike."""
        return is_adapter(self.model) and detach_adapter(self.model) is other.model

    def exclusions(self, instruction: str) -> list[str]:
        """What the model reads an instruction to exclude; nothing for a model that does not look for it."""
        return find_exclusions(instruction) if getattr(encoder_of(self.model)[0], "find_exclusions", False) else []


def problem(query: str, instruction: str) -> str | None:
    """What is wrong with a query and its instruction, and how to mend it; ``None``: nothing."""
    for kind, text in (("query", query), ("instruction", instruction)):
        if len(text) > MOST_CHARACTERS:
            return f"The {kind} has {len(text):,} characters. Shorten it to at most {MOST_CHARACTERS:,}."
    return None if query.strip() else "Type a query first."


def rank(rankers: Sequence[Ranker], asked: Sequence[tuple[str, str]]) -> list[list[Ranking]]:
    """Rank the corpus by each model, without the instruction and, unless it is blank, with it.

    Args:
        rankers: The models.
        asked: Queries and their instructions, without a :func:`problem`; they are encoded together, which takes less time.

    Returns:
        For each query, and of each model, the ranking without the instruction and the one with it. The former is there
        once for an adapter and its base.
    """
    plain = [query.strip() for query, _ in asked]
    told = [{"query": query.strip(), "instruction": text.strip()} for query, text in asked if text.strip()]
    found: list[list[Ranking]] = [[] for _ in asked]
    for ranker in rankers:
        beside = ranker is not rankers[0] and ranker.stands_beside(rankers[0])
        # Apart: in one batch the short queries would be padded to the length of the others.
        plain_rows = iter(() if beside else ranker.scores(plain))
        told_rows = iter(ranker.scores(told))
        for of_query, (_, instruction) in zip(found, asked):
            if beside:
                of_query[0] = replace(of_query[0], models=(*of_query[0].models, ranker.name))
            else:
                of_query.append(_ranking((ranker.name,), next(plain_rows)))
            if instruction.strip():
                before = of_query[0 if beside else -1].ranks
                of_query.append(_ranking((ranker.name,), next(told_rows), before))
    return found


def _ranking(models: tuple[str, ...], scores: NDArray[np.float32], before: NDArray[np.int64] | None = None) -> Ranking:
    order = np.argsort(scores, kind="stable")[::-1]
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(1, len(order) + 1)
    return Ranking(models, order, ranks, scores, before)


def load_rankers(
    model: str | None, compare: str | None, passages: Sequence[str], show_progress: bool = False
) -> list[Ranker]:
    """The model that a playground is about, after the one that it is compared with.

    Args:
        model: A Hub id or a folder; ``None``: the adapter that this package ships.
        compare: The same; ``None``: the model's base, if the model is an adapter or its recipe names it.
        passages: The corpus.
        show_progress: Show the encoding.

    Raises:
        OSError, ValueError: As :func:`~sentence_transformers_inf.load_instruction_model` says.
    """
    loaded = load_instruction_model(model)
    name = "the shipped adapter" if model is None else model.rstrip("/").rpartition("/")[2]
    if compare is None and is_adapter(loaded):
        compare, _ = loaded[0].origin  # type: ignore[misc]
        base: SentenceTransformer | None = load_instruction_model(detach_adapter(loaded))
    else:
        compare = _base_of(model) if compare is None and model is not None else compare
        base = None if compare is None else load_instruction_model(compare)
    ranker = Ranker(name, loaded, passages, show_progress=show_progress)
    if base is None or compare is None:
        return [ranker]
    return [Ranker(compare.rstrip("/").rpartition("/")[2], base, passages, show_progress=show_progress), ranker]


def _base_of(model: str) -> str | None:
    """What the recipe beside a model says that it was trained from, if that is still to be had."""
    recipe = read_recipe(model) or {}
    base = recipe.get("base")
    return base if base is not None and (recipe.get("base_on_hub") or Path(base).exists()) else None
