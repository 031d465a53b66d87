"""Second passages that exist: for each pair, passages of a corpus that may answer its query as well as its own does.

Candidates come from embeddings and from BM25 (Robertson and Zaragoza 2009) together, by reciprocal rank fusion (Cormack et
al. 2009). Of those, the ones closest to the query and to the pair's own passage are kept, near copies aside: the pair that
only an instruction can tell apart (after Dual-View Training, arXiv:2604.18845).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path

import bm25s
import faiss
import numpy as np
from datasets import Features, List, Value
from numpy.typing import NDArray
from tqdm.auto import tqdm

from dataset_builder.files import write_parquet
from dataset_builder.quality import is_near_copy, words
from sentence_transformers_inf.reading import parquet_batches
from sentence_transformers_inf.recipe import write_whole

CANDIDATES = 3
"""Passages kept for a pair at most: so many are shown to the writing model, one after the other."""

_DEPTH = 50
"""Passages that each of the two searches finds."""
_DEEPER = 1000
"""As many, where too many of those are near copies."""
_FUSED = 20
"""Of them, so many at a time are ordered by how close they are."""
_FUSION = 60
"""The constant of reciprocal rank fusion."""
_FREQUENT = 0.1
"""A word in a larger share of the passages is left out of the search by words: it tells nothing apart, and costs most."""
_BLOCK = 512
"""Pairs that are searched at a time, and written into one file."""
_ADDED = 65_536
"""Vectors added to the index at a time."""
_FEATURES = Features({"candidates": List(Value("string"))})

Encode = Callable[[list[str]], NDArray[np.float32]]
"""Texts to their embeddings (N×d)."""


class Miner:
    """Searches a corpus by embeddings and by words.

    Args:
        passages: N distinct texts.
        vectors: N×d, their embeddings; may be memory-mapped. The index holds them once more, in memory.
    """

    def __init__(self, passages: Sequence[str], vectors: NDArray[np.float32]) -> None:
        self.passages = passages
        self.vectors = vectors
        self._row_of = {passage: row for row, passage in enumerate(passages)}
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        for start in range(0, len(vectors), _ADDED):
            self._index.add(_unit(vectors[start : start + _ADDED]))
        self._tokenizer = bm25s.tokenization.Tokenizer(lower=False, splitter=words, stopwords=None)
        tokens = self._tokenizer.tokenize(passages, return_as="tuple", show_progress=False)
        self._bm25 = bm25s.BM25()
        self._bm25.index(tokens, show_progress=False)
        counts = Counter(token for of_passage in tokens.ids for token in set(of_passage))
        self._frequent = {token for token, count in counts.items() if count > _FREQUENT * len(passages)}
        self._begins = np.cumsum([0, *map(len, tokens.ids)])
        self._tokens = np.fromiter(chain.from_iterable(tokens.ids), np.int32, self._begins[-1])

    def find(self, queries: list[str], query_vectors: NDArray[np.float32], known: Sequence[str]) -> list[list[str]]:
        """For each query, at most :data:`CANDIDATES` passages, the best first.

        Args:
            queries: Q queries.
            query_vectors: Q×d, their embeddings.
            known: The passage that is known to answer each; it is one of the corpus.
        """
        query_vectors = _unit(query_vectors)
        tokens = self._tokenizer.tokenize(queries, update_vocab=False, allow_empty=False, show_progress=False)
        rare = [[token for token in of_query if token not in self._frequent] for of_query in tokens]
        found = self._search(query_vectors, rare, known, _DEPTH)
        again = [n for n, texts in enumerate(found) if len(texts) < CANDIDATES and len(self.passages) > _DEPTH]
        if again:
            deeper = self._search(query_vectors[again], [rare[n] for n in again], [known[n] for n in again], _DEEPER)
            for n, texts in zip(again, deeper):
                found[n] = texts
        return found

    def _search(
        self, vectors: NDArray[np.float32], tokens: list[list[int]], known: Sequence[str], depth: int
    ) -> list[list[str]]:
        with ThreadPoolExecutor(1) as pool:  # FAISS lets Python go on
            searching = pool.submit(self._index.search, vectors, min(depth, len(self.passages)))
            by_words = [self._by_words(of_query, depth) for of_query in tokens]
            _, by_vectors = searching.result()
        return [self._closest(*of_query) for of_query in zip(vectors, by_vectors.tolist(), by_words, known)]

    def _by_words(self, tokens: list[int], depth: int) -> list[int]:
        """The best passages by BM25, of those that hold one of the words."""
        if not tokens:
            return []
        scores = self._bm25.get_scores(tokens)
        holding = np.flatnonzero(scores >= self._least(tokens, scores, depth))
        if len(holding) > depth:  # by score, then by row: ties must not depend on how the array is partitioned
            least = np.partition(scores[holding], -depth)[-depth]
            holding = holding[scores[holding] >= least]
        best = holding[np.argsort(-scores[holding], kind="stable")[:depth]]
        return [int(row) for row in best]

    def _least(self, tokens: list[int], scores: NDArray[np.float32], depth: int) -> float:
        """A score that the best passages have at least: what the best that hold the rarest word have, if they are enough.

        Few passages are left to sort by it.
        """
        begins, rows = self._bm25.scores["indptr"], self._bm25.scores["indices"]
        lengths = [(int(begins[token + 1] - begins[token]), token) for token in tokens]
        rarest = min((each for each in lengths if each[0] >= depth), default=None)
        above_nothing = float(np.finfo(np.float32).tiny)
        if rarest is None:
            return above_nothing
        holding = scores[rows[begins[rarest[1]] : begins[rarest[1] + 1]]]
        return max(above_nothing, float(np.partition(holding, -depth)[-depth]))

    def _closest(self, query: NDArray[np.float32], by_vectors: list[int], by_words: list[int], known: str) -> list[str]:
        scores: dict[int, float] = {}
        for ranking in (by_vectors, by_words):
            for rank, row in enumerate(ranking, start=1):
                scores[row] = scores.get(row, 0.0) + 1 / (_FUSION + rank)
        of_known = self._row_of[known]
        to_both = query + _unit(self.vectors[[of_known]])[0]
        seen = [self._word_pairs(of_known)]
        texts: list[str] = []
        ranked = sorted(scores, key=lambda row: (-scores[row], row))
        for start in range(0, len(ranked), _FUSED):  # the next ones where too many of the first are near copies
            block = ranked[start : start + _FUSED]
            near = _unit(self.vectors[block]) @ to_both
            for at in np.argsort(-near, kind="stable"):
                pairs = self._word_pairs(block[at])
                if any(is_near_copy(pairs, earlier) for earlier in seen):
                    continue
                seen.append(pairs)
                texts.append(self.passages[block[at]])
                if len(texts) == CANDIDATES:
                    return texts
        return texts

    def _word_pairs(self, row: int) -> set[int]:
        """As :func:`~dataset_builder.quality.word_pairs`, each pair (or single word) a number."""
        tokens = self._tokens[self._begins[row] : self._begins[row + 1]].astype(np.int64)
        return set((tokens[:-1] << 32 | tokens[1:]).tolist()) or set((~tokens).tolist())


def mine(
    folder: Path,
    pairs: Iterator[tuple[str, str]],
    total: int,
    passages: Sequence[str],
    embed_passages: Encode,
    embed_queries: Encode,
) -> Iterator[list[str]]:
    """Candidates for each pair, in order.

    What was found is kept in ``folder``, a file for every few hundred pairs, and not searched again by a later call with the
    same pairs and passages.

    Args:
        folder: Where to keep it.
        pairs: (query, passage) of each pair.
        total: How many they are.
        passages: The distinct passages of the corpus, those of the pairs among them.
        embed_passages: Called once, with ``passages``.
        embed_queries: Called with a few hundred queries at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    miner: Miner | None = None
    with tqdm(total=total, desc="Mining", unit="pair", disable=None) as bar:
        for number in range(0, total, _BLOCK):
            block = list(islice(pairs, _BLOCK))
            path = folder / f"{number:09d}.parquet"
            if not path.is_file():
                miner = miner or Miner(passages, embed_passages(list(passages)))
                queries = [query for query, _ in block]
                found = miner.find(queries, embed_queries(queries), [passage for _, passage in block])
                write_parquet(path, _FEATURES, ({"candidates": texts} for texts in found))
            try:
                yield from [texts for batch in parquet_batches(path) for texts in batch.column("candidates").to_pylist()]
            except (ValueError, OSError) as error:
                raise ValueError(f"{path} is damaged ({error}): delete it and give the same command again") from error
            bar.update(len(block))


def bind(folder: Path, passages: Sequence[str], settings: str) -> None:
    """Empty the folder of what was mined unless it is of these passages and settings."""
    digest = hashlib.sha256(settings.encode())
    for passage in passages:
        digest.update(hashlib.sha256(passage.encode()).digest())
    note = folder / "corpus.sha256"
    if not note.is_file() or note.read_text(encoding="utf-8") != digest.hexdigest():
        for path in folder.glob("[0-9]*.parquet"):
            path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(note, digest.hexdigest())


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows (N×d) of unit length; a row of zeros stays one."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    lengths: NDArray[np.float32] = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)
