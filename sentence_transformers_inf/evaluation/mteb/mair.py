"""MAIR (Sun et al. 2024, arXiv:2410.10127) as MTEB tasks: instructed retrieval over 126 tasks of six domains.

Queries with their instructions and labels are in the Hub dataset ``MAIR-Bench/MAIR-Queries``, passages in
``MAIR-Bench/MAIR-Docs``, a configuration for each task. A task is the split ``queries`` over ``docs``, or several parts,
``X_queries`` over ``X_docs`` each; its score is nDCG@10, the mean over the queries of all parts, as in the authors' code.
"""

from __future__ import annotations

from typing import Any

from datasets import load_dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from sentence_transformers_inf.evaluation.mteb.layout import as_test_split

QUERIES, DOCS = "MAIR-Bench/MAIR-Queries", "MAIR-Bench/MAIR-Docs"

MAIR_DOMAINS = {
    "Academic": (
        "Competition-Math FairRanking_2020 LitSearch ProofWiki_Proof ProofWiki_Reference SciDocs SciFact "
        "StackMathQA Stacks_Proof Stacks_Reference Stein_Proof Stein_Reference TAD TAS2 Trench_Proof "
        "Trench_Reference"
    ),
    "Code": (
        "APPS CodeEditSearch CodeSearchNet Conala FoodAPI HuggingfaceAPI HumanEval-X LeetCode MBPP PytorchAPI "
        "RepoBench SWE-Bench-Lite SpotifyAPI TLDR TMDB TensorAPI ToolBench WeatherAPI"
    ),
    "Finance": "Apple ConvFinQA FiQA FinQA FinanceBench HC3Finance TAT-DQA Trade-the-event",
    "Legal": (
        "AILA2019-Case AILA2019-Statutes BSARD BillSum CUAD GerDaLIR LeCaRDv2 LegalQuAD REGIR-EU2UK REGIR-UK2EU "
        "TREC-Legal_2011"
    ),
    "Medical": (
        "CARE CliniDS_2014 CliniDS_2015 CliniDS_2016 ClinicalTrials_2021 ClinicalTrials_2022 ClinicalTrials_2023 "
        "Genomics-AdHoc_2004 Genomics-AdHoc_2005 Genomics-AdHoc_2006 Genomics-AdHoc_2007 Monant NFCorpus "
        "PrecisionMedicine-Article_2019 PrecisionMedicine-Article_2020 PrecisionMedicine_2017 "
        "PrecisionMedicine_2018 PrecisionMedicine_2019 Trec-Covid"
    ),
    "Web": (
        "ACORDAR AY2 ArguAna CAsT_2019 CAsT_2020 CAsT_2021 CAsT_2022 CPCD CQADupStack ChroniclingAmericaQA Core17 "
        "Core_2017 DD_2015 DD_2016 DD_2017 ELI5 ExcluIR FairRanking_2021 FairRanking_2022 Fever IFEval InstructIR "
        "MISeD Microblog_2011 Microblog_2012 Microblog_2013 Microblog_2014 NTCIR NeuCLIR-Tech_2023 NeuCLIR_2022 "
        "NeuCLIR_2023 NevIR News21 PointRec ProCIS-Dialog ProCIS-Turn ProductSearch_2023 QuanTemp Quora Robust04 "
        "SParC SParC-SQL Spider Spider-SQL TREx ToT_2023 ToT_2024 TopiOCQA Touche WebTableSearch WnCw WnWi WoW "
        "zsRE"
    ),
}
"""MAIR's six domains with the names of their tasks."""

MAIR_TASKS = [task for tasks in MAIR_DOMAINS.values() for task in tasks.split()]
"""The 126 tasks, by the names of their configurations on the Hub."""

_LANGUAGES = {"GerDaLIR": "deu-Latn", "LegalQuAD": "deu-Latn", "BSARD": "fra-Latn", "LeCaRDv2": "zho-Hans"}


class MAIRRetrieval(AbsTaskRetrieval):
    """One of MAIR's tasks; see :func:`mair_task`."""

    configuration: str
    """Its name on the Hub."""

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Read the task's queries and passages from the Hub."""
        if self.data_loaded:
            return
        queries, docs = (load_dataset(path, self.configuration, revision="main") for path in (QUERIES, DOCS))
        corpus, asked, relevant, ranked = [], [], {}, {}
        for split, of_split in queries.items():
            part = "" if split == "queries" else f"{split.removesuffix('_queries')}/"
            passages = docs["docs" if split == "queries" else split.replace("_queries", "_docs")]
            corpus += [{"id": f"{part}{row['id']}", "title": "", "text": row["doc"]} for row in passages]
            names = [f"{part}{name}" for name in passages["id"]]
            for row in of_split:
                name = f"{part}{row['qid']}"
                asked.append({"id": name, "text": row["query"], "instruction": row["instruction"]})
                relevant[name] = {f"{part}{label['id']}": int(label["score"]) for label in row["labels"]}
                ranked[name] = names
        # The parts of a task are searched apart: a query ranks the passages of its own part.
        self.dataset = as_test_split(corpus, asked, relevant, ranked if len(queries) > 1 else None)
        self.data_loaded = True


def mair_task(name: str) -> MAIRRetrieval:
    """One of :data:`MAIR_TASKS` for MTEB, which calls it ``MAIR-NAME``."""
    metadata = TaskMetadata(
        name=f"MAIR-{name}",
        description=f"{name} of MAIR: retrieval under a detailed instruction.",
        reference="https://arxiv.org/abs/2410.10127",
        dataset={"path": QUERIES, "revision": "main"},
        type="InstructionRetrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=[_LANGUAGES.get(name, "eng-Latn")],
        main_score="ndcg_at_10",
    )
    return type("MAIRRetrieval", (MAIRRetrieval,), {"metadata": metadata, "configuration": name})()
