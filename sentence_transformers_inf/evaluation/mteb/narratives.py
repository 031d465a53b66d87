"""The narratives as an MTEB task of FollowIR's kind: how a ranking changes when a narrative is narrowed.

Queries are ``X-og`` and ``X-changed``, as in MTEB's ``Core17InstructionRetrieval``. Instruction and query stand in columns
of their own, so any MTEB model can be measured: MTEB's own wrapper encodes them joined.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from numpy.typing import NDArray

from sentence_transformers_inf.evaluation import metrics
from sentence_transformers_inf.evaluation.mteb.layout import as_test_split
from sentence_transformers_inf.evaluation.narratives import BUNDLED_TOPICS, Topic, read_topics

NAME = "NarrativeInstructionRetrieval"
"""The name of the task on the bundled topics; those on other files add the file's name and a digest of it."""

_KINDS = ("og", "changed")


class NarrativeRetrieval(AbsTaskRetrieval):
    """Topics of :mod:`~sentence_transformers_inf.evaluation.narratives` as a task; see :func:`narrative_task`.

    The pool is all documents. Of a pool of more than 1,000, MTEB ranks the first 1,000; the others share the next rank.
    """

    further_metrics = ("ndcg_at_10_og", "ndcg_at_10_changed", "pairwise_gain")
    """What is reported beside p-MRR."""

    topics: list[Topic]

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Lay the topics out for MTEB; nothing is loaded from the Hub."""
        if self.data_loaded:
            return
        corpus = [{"id": doc.id, "title": "", "text": doc.text} for topic in self.topics for doc in topic.docs]
        queries, relevant = [], {}
        for topic in self.topics:
            for kind, instruction in zip(_KINDS, (topic.og_instruction, topic.changed_instruction)):
                query = f"{topic.id}-{kind}"
                queries.append({"id": query, "text": topic.query, "instruction": instruction})
                relevant[query] = {doc.id: int(doc.og if kind == "og" else doc.changed) for doc in topic.docs}
        pool = [document["id"] for document in corpus]
        self.dataset = as_test_split(corpus, queries, relevant, {query["id"]: pool for query in queries})
        self.data_loaded = True

    def task_specific_scores(
        self,
        scores: Mapping[str, Mapping[str, float]],
        qrels: Mapping[str, Mapping[str, int]],
        results: Mapping[str, Mapping[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> dict[str, float]:
        """p-MRR of the excluded documents, nDCG@10 and pair share under each narrative, and pairwise gain; not times 100."""
        measured: dict[str, float] = {}
        excluded = []
        for kind in _KINDS:
            runs = [results[f"{topic.id}-{kind}"] for topic in self.topics]
            kept = [_ranks(run, topic.kept) for run, topic in zip(runs, self.topics)]
            excluded.append([_ranks(run, topic.excluded) for run, topic in zip(runs, self.topics)])
            ndcg = [scores[f"{topic.id}-{kind}"]["ndcg_cut_10"] for topic in self.topics]
            measured[f"ndcg_at_10_{kind}"] = float(np.mean(ndcg))
            measured[f"pair_share_{kind}"] = metrics.pair_share(kept, excluded[-1])
        topic_of = [topic.id for topic in self.topics for _ in topic.excluded]
        before, after = map(np.concatenate, excluded)
        measured["p-MRR"] = metrics.p_mrr(before, after, topic_of)
        measured["pairwise_gain"] = measured["pair_share_changed"] - measured["pair_share_og"]
        return measured


def narrative_task(data: str | Path | None = None) -> NarrativeRetrieval:
    """The task on the bundled topics, or on a file of one's own.

    Args:
        data: A file for :func:`~sentence_transformers_inf.evaluation.narratives.read_topics`. MTEB files its results under
            the file's name and a digest of its content, so results of another file are never taken for its own.

    Raises:
        FileNotFoundError: No such file.
        NarrativeError: The file does not hold topics.
    """
    if data is None:
        return _task(NAME, "sentence-transformers-inf/narratives", "1", read_topics(BUNDLED_TOPICS))
    topics, path = read_topics(data), Path(data)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return _task(f"{NAME}-{path.stem}-{digest}", path.stem, digest, topics)


def filed_task(name: str) -> NarrativeRetrieval:
    """The task under whose name results were filed, for its metadata: of a file of one's own it has no topics."""
    if name == NAME:
        return narrative_task()
    stem, _, digest = name.removeprefix(f"{NAME}-").rpartition("-")
    return _task(name, stem, digest, [])


def _task(name: str, dataset: str, revision: str, topics: list[Topic]) -> NarrativeRetrieval:
    metadata = TaskMetadata(
        name=name,
        description="Narratives that were narrowed: documents that they now exclude must fall.",
        reference="https://arxiv.org/abs/2403.15246",
        dataset={"path": dataset, "revision": revision},
        type="InstructionReranking",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="p-MRR",
    )
    return type("NarrativeRetrieval", (NarrativeRetrieval,), {"metadata": metadata, "topics": topics})()


def _ranks(run: Mapping[str, float], documents: list[str]) -> NDArray[np.int64]:
    return np.array([metrics.rank_in_run(run, document) for document in documents])
