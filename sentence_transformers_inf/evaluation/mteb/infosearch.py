"""InfoSearch (Zhou et al. 2024, arXiv:2410.23841) as MTEB tasks: does a ranking obey an instruction, and its opposite?

Each of six dimensions is a Hub dataset of its authors, with the configurations ``corpus`` (``_id``, ``title``, ``text``),
``queries`` (``_id``, ``text``, ``instruction_og``, ``instruction_changed``, ``instruction_reversed``) and ``qrels_og``,
``qrels_changed``, ``qrels_reversed`` (``query-id``, ``corpus-id``, ``score``; split ``test``). A query is searched in the
whole corpus in three modes, original, instructed and reversely instructed. What is measured are the documents that are
relevant in the first two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from sentence_transformers_inf.evaluation import metrics
from sentence_transformers_inf.evaluation.mteb.layout import as_test_split

INFOSEARCH_DATASETS = {
    "Audience": "jianqunZ/Audience-v1",
    "Keyword": "jianqunZ/Clarity-v1",
    "Format": "jianqunZ/Format-v1",
    "Language": "jianqunZ/Language-v1",
    "Length": "jianqunZ/Length-v1",
    "Source": "jianqunZ/Source-v1",
}
"""The six dimensions and their datasets on the Hub, as the authors' repository links them."""

_MODES = ("og", "changed", "reversed")


class InfoSearchRetrieval(AbsTaskRetrieval):
    """One of InfoSearch's dimensions; see :func:`infosearch_task`."""

    further_metrics = ("SICR",)
    """What is reported beside WISE."""

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Read the dimension's queries, documents and judgements from the Hub."""
        if self.data_loaded:
            return
        corpus, asked = self._read("corpus"), self._read("queries")
        judged = {mode: self._read(f"qrels_{mode}") for mode in _MODES}
        queries = [
            {"id": f"{row['_id']}-{mode}", "text": row["text"], "instruction": row[f"instruction_{mode}"] or ""}
            for row in asked
            for mode in _MODES
        ]
        relevant: dict[str, dict[str, int]] = {query["id"]: {} for query in queries}
        for mode, rows in judged.items():
            for row in rows:
                relevant[f"{row['query-id']}-{mode}"][str(row["corpus-id"])] = int(row["score"])
        documents = [{"id": str(row["_id"]), "title": row["title"] or "", "text": row["text"]} for row in corpus]
        self.dataset = as_test_split(documents, queries, relevant)
        self.data_loaded = True

    def _read(self, configuration: str) -> Dataset:
        splits = load_dataset(self.metadata.dataset["path"], configuration, revision=self.metadata.dataset["revision"])
        return next(iter(splits.values()))

    def task_specific_scores(
        self,
        scores: Mapping[str, Mapping[str, float]],
        qrels: Mapping[str, Mapping[str, int]],
        results: Mapping[str, Mapping[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> dict[str, float]:
        """WISE and SICR, in [-1, 1] and [0, 1]."""
        ranks, similarities, relevant, query_of = [], [], [], []
        for name, labels in qrels.items():
            if not name.endswith("-og"):
                continue
            query = name.removesuffix("-og")
            runs = [results[f"{query}-{mode}"] for mode in _MODES]
            originally = [document for document, label in labels.items() if label > 0]
            for document in originally:
                if qrels[f"{query}-changed"].get(document, 0) > 0:
                    ranks.append([metrics.rank_in_run(run, document) for run in runs])
                    similarities.append([run.get(document, -np.inf) for run in runs])
                    relevant.append(len(originally))
                    query_of.append(query)
        return {
            "WISE": metrics.wise(np.array(ranks), np.array(relevant), query_of),
            "SICR": metrics.sicr(np.array(ranks), np.array(similarities), query_of),
        }


def infosearch_task(dimension: str) -> InfoSearchRetrieval:
    """One of :data:`INFOSEARCH_DATASETS` for MTEB, which calls it ``InfoSearch-DIMENSION``."""
    metadata = TaskMetadata(
        name=f"InfoSearch-{dimension}",
        description=f"InfoSearch's dimension {dimension}: rankings under an instruction and under its opposite.",
        reference="https://arxiv.org/abs/2410.23841",
        dataset={"path": INFOSEARCH_DATASETS[dimension], "revision": "main"},
        type="InstructionRetrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn", "zho-Hans"] if dimension == "Language" else ["eng-Latn"],
        main_score="WISE",
    )
    return type("InfoSearchRetrieval", (InfoSearchRetrieval,), {"metadata": metadata})()
