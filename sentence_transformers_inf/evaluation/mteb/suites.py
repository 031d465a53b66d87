"""Benchmarks by name, and the bundled test split as an MTEB task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.abstasks import AbsTask, AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from sentence_transformers_inf.evaluation import metrics
from sentence_transformers_inf.evaluation.mteb.infosearch import INFOSEARCH_DATASETS, infosearch_task
from sentence_transformers_inf.evaluation.mteb.layout import as_test_split
from sentence_transformers_inf.evaluation.mteb.mair import MAIR_TASKS, mair_task
from sentence_transformers_inf.evaluation.mteb.narratives import NAME, filed_task, narrative_task
from sentence_transformers_inf.records import TRIPLES, load_records

SUITES = {
    "FollowIR": "p-MRR on Robust04, News21 and Core17 (Weller et al. 2024, arXiv:2403.15246)",
    "InstructIR": "Robustness@10 over instructions of 9,906 users (Oh et al. 2024, arXiv:2402.14334)",
    "IFIR": "seven expert-domain tasks (Song et al. 2025, arXiv:2503.04644)",
    "mFollowIR": "FollowIR in Persian, Russian and Chinese (Weller et al. 2025, arXiv:2501.19264)",
    "BRIGHT": "reasoning-intensive retrieval (Su et al. 2024, arXiv:2407.12883)",
    "MAIR": "126 tasks of six domains (Sun et al. 2024, arXiv:2410.10127)",
    "InfoSearch": "WISE and SICR on six dimensions (Zhou et al. 2024, arXiv:2410.23841)",
    "NanoBEIR": "plain retrieval: a loss there is the price of obedience",
    "mini": "the bundled test split",
    "narratives": "p-MRR and pairwise gain on bundled topics of FollowIR's kind, or on a file of your own",
}
"""The benchmarks that ``inf-embed evaluate --benchmark`` knows."""

_TASKS = {  # benchmarks that MTEB has no name for
    "InstructIR": ["InstructIR"],
    "mFollowIR": ["mFollowIR"],
    "IFIR": ["IFIRAila", "IFIRCds", "IFIRFiQA", "IFIRFire", "IFIRNFCorpus", "IFIRPm", "IFIRScifact"],
}

FOLLOW_IR_METRICS = {
    "Robust04InstructionRetrieval": "map_at_1000",
    "Core17InstructionRetrieval": "map_at_1000",
    "News21InstructionRetrieval": "ndcg_at_5",
}
"""What the FollowIR paper reports beside p-MRR, of the original instructions."""


def get_suite(name: str, tasks: list[str] | None = None, data: str | Path | None = None) -> list[AbsTask]:
    """The MTEB tasks of a benchmark.

    Args:
        name: One of :data:`SUITES`.
        tasks: Names of some of its tasks; ``None`` for all.
        data: Topics to measure instead of the bundled ones; for ``narratives`` only.

    Raises:
        ValueError: No such benchmark or task, or data for a benchmark that takes none.
        FileNotFoundError, NarrativeError: As :func:`narrative_task` says.
    """
    if name not in SUITES:
        raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(SUITES)}")
    if data is not None and name != "narratives":
        raise ValueError(f"the benchmark {name} brings its own data; only 'narratives' takes a file ({data})")
    if name == "narratives":
        return _chosen(name, [narrative_task(data)], tasks)
    if name == "mini":
        found: list[AbsTask] = [MiniInstructionRetrieval()]
    elif name == "MAIR":
        found = [mair_task(task) for task in MAIR_TASKS]
    elif name == "InfoSearch":
        found = [infosearch_task(dimension) for dimension in INFOSEARCH_DATASETS]
    elif name in _TASKS:
        found = [mteb.get_task(task) for task in _TASKS[name]]
    else:
        found = list(mteb.get_benchmark(name).tasks)
    return _chosen(name, found, tasks)


def _chosen(name: str, found: Sequence[AbsTask], tasks: list[str] | None) -> list[AbsTask]:
    names = [task.metadata.name for task in found]
    if tasks is None:
        return list(found)
    if unknown := [task for task in tasks if task not in names]:
        raise ValueError(f"{name} has no task {unknown[0]!r}; it has {', '.join(names)}")
    return [task for task in found if task.metadata.name in tasks]


def takes_instructions(task: AbsTask) -> bool:
    """Whether a task hands instructions to the model beside its queries. IFIR's are part of its queries' texts."""
    return task.metadata.type.startswith("Instruction") and task.metadata.name not in _TASKS["IFIR"]


def find_task(name: str) -> AbsTask:
    """The task of this name, of those in the suites.

    Raises:
        KeyError: No such task.
    """
    if name == MiniInstructionRetrieval.metadata.name:
        return MiniInstructionRetrieval()
    if name == NAME or name.startswith(f"{NAME}-"):
        return filed_task(name)
    if name.startswith("InfoSearch-"):
        return infosearch_task(name.removeprefix("InfoSearch-"))
    return mair_task(name.removeprefix("MAIR-")) if name.startswith("MAIR-") else mteb.get_task(name)


class MiniInstructionRetrieval(AbsTaskRetrieval):
    """The test split of the bundled corpus as an MTEB task of FollowIR's kind.

    The pool is all passages. Each record gives two changes of instruction for p-MRR, (q+, I+) -> (q+, I-) and back. The
    queries of a change are ``X-og`` and ``X-changed``, as in FollowIR. p-MRR is that of
    :class:`~sentence_transformers_inf.evaluation.InstructionFollowingEvaluator`.
    """

    metadata = TaskMetadata(
        name="MiniInstructionRetrieval",
        description="The test split of the InF-IR mini corpus: rankings must change when an instruction is turned round.",
        reference="https://arxiv.org/abs/2505.21439",
        dataset={"path": "sentence-transformers-inf/mini", "revision": "1"},
        type="InstructionReranking",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="p-MRR",
        date=("2025-01-01", "2026-11-21"),
        domains=["Web", "Written"],
        task_subtypes=[],
        license="cc0-1.0",
        annotations_creators="LM-generated",
        dialect=[],
        sample_creation="LM-generated and verified",
        bibtex_citation="",
    )

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Read the bundled records; nothing is loaded from the Hub."""
        if self.data_loaded:
            return
        records = load_records("mini", "test")
        corpus, queries, relevant, self.irrelevant = [], [], {}, {}
        for number, record in enumerate(records):
            names = [f"{number}-{place}" for place in range(3)]
            corpus += [{"id": name, "title": "", "text": record[row[2]]} for name, row in zip(names, TRIPLES)]
            for change, (before, after) in enumerate(((0, 1), (1, 0))):
                for kind, place in (("og", before), ("changed", after)):
                    query, instruction, _ = TRIPLES[place]
                    identifier = f"{number}-{change}-{kind}"
                    queries.append({"id": identifier, "text": record[query], "instruction": record[instruction]})
                    relevant[identifier] = {names[place]: 1}
                self.irrelevant[f"{number}-{change}"] = names[before]
        pool = [passage["id"] for passage in corpus]
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
        """p-MRR, in [-1, 1]: how far each passage fell that its change of instruction made irrelevant."""
        ranks = [
            [metrics.rank_in_run(results[f"{change}-{kind}"], passage) for kind in ("og", "changed")]
            for change, passage in self.irrelevant.items()
        ]
        original, changed = np.array(ranks).T
        return {"p-MRR": metrics.p_mrr(original, changed, list(self.irrelevant))}
