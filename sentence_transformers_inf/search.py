"""Search a small corpus in memory, with and without an instruction, and see what the instruction moved."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import semantic_search

from sentence_transformers_inf.modules import check_embeddings, check_parts, read_array

DEPTH = 1000
"""So far down ranks are counted."""

_CHUNK = 65_536
"""Rows of an index that are compared with the queries at a time."""


@dataclass(frozen=True)
class Hit:
    """A passage and its ranks (from 1); ``rank`` is under the instruction if there is one, ``plain_rank`` without it.

    ``row`` is its place in the corpus, from 0.
    """

    row: int
    passage: str
    score: float
    rank: int
    plain_rank: int


def read_index(path: str | Path, size: int, dimension: int) -> Any:
    """The vectors of an existing index, for :func:`search`.

    Args:
        path: ``.npy`` (N×d, memory-mapped), ``.npz`` (its first array), or a FAISS index as ``faiss.write_index`` and the
            ``save_faiss_index`` of ``datasets`` write it.
        size: N, the passages that it should hold.
        dimension: d.

    Returns:
        An array, or a ``faiss.Index``.

    Raises:
        FileNotFoundError: No such file.
        ImportError: FAISS is not installed.
        ValueError: It cannot be read, or is of another size or dimension.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such index; check the path")
    if path.suffix in (".npy", ".npz"):
        index: Any = read_array(path, "c")  # PyTorch wants memory that may be written to
        shape = index.shape
    else:
        try:
            import faiss
        except ImportError as error:
            raise ImportError(f"{path}: reading a FAISS index needs FAISS: pip install faiss-cpu") from error
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise ValueError(f"{path}: expected a .npy or .npz file or a FAISS index: {error}") from error
        shape = (index.ntotal, index.d)
    if shape != (size, dimension):
        raise ValueError(
            f"{path}: expected an index of {size} passages in {dimension} dimensions, its shape is {tuple(shape)}; was it "
            "made from this corpus by this model's base?"
        )
    return index


def nearest(
    model: SentenceTransformer, index: Any, queries: NDArray[np.float32], depth: int
) -> list[list[tuple[int, float]]]:
    """The ``depth`` nearest rows of an index (from :func:`read_index`) to each query (Q×d), the nearest first, each with its
    score: the model's similarity, or that of a FAISS index, which may find fewer if it is approximate."""
    if isinstance(index, np.ndarray):
        vectors = torch.from_numpy(np.asarray(index, dtype=np.float32))
        found = semantic_search(
            torch.from_numpy(queries), vectors, corpus_chunk_size=_CHUNK, top_k=depth, score_function=model.similarity
        )
        return [[(int(hit["corpus_id"]), float(hit["score"])) for hit in hits] for hits in found]
    scores, rows = index.search(queries, depth)
    check_embeddings(np.where(rows < 0, 0, scores), [""] * len(scores), "queries compared with the index")
    hits_of = zip(rows.tolist(), scores.tolist())
    return [[(row, score) for row, score in zip(*hits) if row >= 0] for hits in hits_of]  # FAISS fills up with row -1


def _vectors_of(index: Any) -> Iterator[torch.Tensor]:
    """The vectors in a FAISS index, a part at a time; none of one that does not keep them."""
    with contextlib.suppress(RuntimeError):  # an index of cells keeps no list of its rows
        for start in range(0, index.ntotal, _CHUNK):
            yield torch.from_numpy(index.reconstruct_n(start, min(_CHUNK, index.ntotal - start)))


def search(
    model: SentenceTransformer,
    passages: list[str],
    query: str,
    instruction: str | None = None,
    top: int = 5,
    index: Any = None,
    show_progress: bool = False,
    exclude: str | Sequence[str] | None = None,
) -> list[Hit]:
    """Rank passages for a query under an instruction.

    Args:
        model: From :func:`~sentence_transformers_inf.load_instruction_model`.
        passages: The corpus.
        query: The query.
        instruction: What the passages should be like; ``None`` or blank: plain search.
        top: How many passages.
        index: The passages' vectors, from :func:`read_index`; ``None``: the model encodes the passages.
        show_progress: Show the encoding.
        exclude: What the passages should not be about, a string or several; ``None``: what the model finds in the
            instruction, if it was loaded to do so.

    Returns:
        The first ``top`` passages under the instruction and those that it pushed out of the first ``top``, by rank. Ranks
        are counted to :data:`DEPTH`; what is further down has the next number.

    Raises:
        ValueError: The query is blank.
        BrokenModelError: Embeddings are not finite, or all the same for different passages.
    """
    if not query.strip():
        raise ValueError("the query is empty")
    if index is None:
        index = np.asarray(model.encode_document(passages, show_progress_bar=show_progress))
    told: dict[str, Any] = {"instruction": instruction or "", "query": query}
    pairs = [told if exclude is None else told | {"exclude": exclude}, {"instruction": "", "query": query}]
    depth = min(DEPTH, len(passages))
    if isinstance(index, np.ndarray):
        check_embeddings(index, passages, "passages")
    else:
        check_parts(_vectors_of(index), passages, "passages")
    queries = np.asarray(model.encode_query(pairs))
    check_embeddings(queries, [query, query], "queries")
    instructed, plain = nearest(model, index, queries, depth)
    ranks, scores = {row: rank for rank, (row, _) in enumerate(instructed, start=1)}, dict(instructed)
    plain_ranks = {row: rank for rank, (row, _) in enumerate(plain, start=1)}
    shown = dict.fromkeys(row for row, _ in [*instructed[:top], *plain[:top]])
    hits = [
        Hit(row, passages[row], scores.get(row, float("nan")), ranks.get(row, depth + 1), plain_ranks.get(row, depth + 1))
        for row in shown
    ]
    return sorted(hits, key=lambda hit: hit.rank)
