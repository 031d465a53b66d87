"""Measures on text unlike the bundled corpus, to choose a recipe by: narratives, a help centre, plain retrieval.

A recipe that is tuned on one style of text learns that style. So a change is adopted when it gains on these together.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf.evaluation import metrics
from sentence_transformers_inf.evaluation.narratives import BUNDLED_TOPICS, Topic, read_topics
from sentence_transformers_inf.modules import check_embeddings
from sentence_transformers_inf.reading import (
    COMPRESSIONS,
    RecordError,
    find_file,
    read_beir_texts,
    read_json_lines,
    read_qrels,
)

HELP_CENTRE = Path(str(importlib.resources.files("sentence_transformers_inf") / "evaluation/data/help_centre.jsonl"))
"""52 cases on the help centre of a made-up product (CC0); a data statement is beside them."""


def measure_narratives(model: SentenceTransformer, topics: Sequence[Topic] | None = None) -> dict[str, float]:
    """What ``inf-embed evaluate --benchmark narratives`` reports, without MTEB.

    Args:
        model: From :func:`~sentence_transformers_inf.load_instruction_model`.
        topics: ``None``: the bundled ones.

    Returns:
        ``p_mrr``, ``pairwise_gain``, ``ndcg_at_10_og`` and ``ndcg_at_10_changed``, times 100.
    """
    topics = read_topics(BUNDLED_TOPICS) if topics is None else topics
    documents = sorted((document for topic in topics for document in topic.docs), key=lambda document: document.id)
    column = {document.id: number for number, document in enumerate(documents)}
    vectors = _encoded(model.encode_document, [document.text for document in documents], "documents")
    asked = [
        {"query": topic.query, "instruction": text}
        for topic in topics
        for text in (topic.og_instruction, topic.changed_instruction)
    ]
    scores = _encoded(model.encode_query, asked, "instructed queries") @ vectors.T

    def ranks(kind: int, chosen: list[list[str]]) -> list[NDArray[np.int64]]:
        rows = zip(scores[kind::2], chosen)
        return [metrics.ranks_of(row[None], np.array([[column[name] for name in names]]))[0] for row, names in rows]

    kept, excluded = [topic.kept for topic in topics], [topic.excluded for topic in topics]
    before, after = ranks(0, excluded), ranks(1, excluded)
    share = [metrics.pair_share(ranks(0, kept), before), metrics.pair_share(ranks(1, kept), after)]
    relevant = ranks(0, [[document.id for document in topic.docs if document.og] for topic in topics])
    topic_of = [number for number, names in enumerate(excluded) for _ in names]
    measured = {
        "p_mrr": metrics.p_mrr(np.concatenate(before), np.concatenate(after), topic_of),
        "pairwise_gain": share[1] - share[0],
        "ndcg_at_10_og": float(np.mean([metrics.ndcg_at_k(of_topic[None])[0] for of_topic in relevant])),
        "ndcg_at_10_changed": float(np.mean([metrics.ndcg_at_k(of_topic[None])[0] for of_topic in ranks(1, kept)])),
    }
    return {name: 100 * value for name, value in measured.items()}


def measure_help_centre(model: SentenceTransformer) -> dict[str, float]:
    """In how many cases both instructions prefer their own passage of two.

    Args:
        model: From :func:`~sentence_transformers_inf.load_instruction_model`.

    Returns:
        ``pair_accuracy`` of all cases, and of those whose instructions exclude something ``exclusion``, times 100.
    """
    cases = [case for _, case in read_json_lines(HELP_CENTRE)]
    sides = ("positive", "negative")
    asked = [{"query": case["query"], "instruction": case[f"instruction_{side}"]} for case in cases for side in sides]
    passages = [case[name] for case in cases for name in ("document", "hard_negative_document")]
    queries = _encoded(model.encode_query, asked, "instructed queries").reshape(len(cases), 2, -1)
    vectors = _encoded(model.encode_document, passages, "passages").reshape(len(cases), 2, -1)
    scores = queries @ vectors.transpose(0, 2, 1)
    obeyed = (scores[:, 0, 0] > scores[:, 0, 1]) & (scores[:, 1, 1] > scores[:, 1, 0])
    excludes = np.array([case["instruction_type"] == "exclusion" for case in cases])
    return {"pair_accuracy": 100 * float(obeyed.mean()), "exclusion": 100 * float(obeyed[excludes].mean())}


def measure_plain(model: SentenceTransformer, folder: str | Path) -> dict[str, float]:
    """How plain queries are answered.

    Args:
        model: Any SentenceTransformer.
        folder: A corpus in BEIR's layout: ``queries.jsonl``, ``corpus.jsonl`` and ``qrels*.tsv`` (or ``qrels/*.tsv``).

    Returns:
        ``mrr_at_10`` and ``ndcg_at_10``, times 100.

    Raises:
        FileNotFoundError: One of these files is missing.
        RecordError: One cannot be read, or a text that was judged is missing.
    """
    folder = Path(folder)
    texts, asked = _read_texts(folder, "corpus.jsonl"), _read_texts(folder, "queries.jsonl")
    qrels: dict[str, list[str]] = {}
    patterns = [f"{name}{ending}" for name in ("qrels*.tsv", "qrels/*.tsv") for ending in ("", *COMPRESSIONS)]
    if not (paths := sorted(path for pattern in patterns for path in folder.glob(pattern))):
        raise FileNotFoundError(f"{folder}: there is no qrels*.tsv")
    for path in paths:
        for where, query, passage, score in read_qrels(path):
            if score > 0:
                for name, kind, known in ((query, "queries", asked), (passage, "corpus", texts)):
                    if name not in known:
                        raise RecordError(f"{where}: {kind}.jsonl has no text for {name!r}")
                qrels.setdefault(query, []).append(passage)
    if not qrels:
        raise RecordError(f"{paths[0]}: no passage has a score above 0")
    column = {passage: number for number, passage in enumerate(texts)}
    widest = max(len(passages) for passages in qrels.values())
    relevant = np.array([[column[name] for name in names] + [-1] * (widest - len(names)) for names in qrels.values()])
    passages = _encoded(model.encode_document, list(texts.values()), "passages")
    scores = _encoded(model.encode_query, [asked[query] for query in qrels], "queries") @ passages.T
    ranks = np.where(relevant >= 0, metrics.ranks_of(scores, np.maximum(relevant, 0)), 0)
    first = np.where(ranks > 0, ranks, np.inf).min(axis=1)
    mrr = np.where(first <= 10, 1 / first, 0).mean()
    return {"mrr_at_10": 100 * float(mrr), "ndcg_at_10": 100 * float(metrics.ndcg_at_k(ranks).mean())}


def _read_texts(folder: Path, name: str) -> dict[str, str]:
    """Text by id, in ascending order of the ids."""
    if (path := find_file(folder, name)) is None:
        raise FileNotFoundError(f"{folder}: there is no {name}")
    return dict(sorted((identifier, text) for _, identifier, text in read_beir_texts(path)))


def _encoded(encode: Any, inputs: list[Any], kind: str) -> NDArray[np.float32]:
    """Normalised embeddings (N×d) that are known to mean something."""
    embeddings = encode(inputs, normalize_embeddings=True)
    check_embeddings(embeddings, [item if isinstance(item, str) else item["query"] for item in inputs], kind)
    return embeddings
