"""The tables that commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sentence_transformers_inf.cli.display import Cell, Table
from sentence_transformers_inf.escaping import shortened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sentence_transformers_inf.evaluation import Result
    from sentence_transformers_inf.evaluation.mteb import BenchmarkScore
    from sentence_transformers_inf.search import Hit

SHORT_NAMES = {
    "p_mrr": "p-MRR",
    "pair_accuracy": "pairs",
    "triple_accuracy": "triples",
    "ndcg_at_10": "nDCG",
    "recall_at_1": "recall",
    "robustness_at_10": "robust",
    "plain_ndcg_at_10": "plain",
}
"""The metrics' names where many stand beside each other."""


def obedience(result: Result, before: Result | None = None) -> str:
    """In a sentence: how many pairs of instructions a model obeys, and how many one before it did."""
    obeyed, *earlier = (int((each.values["pair_accuracy"] > 0).sum()) for each in (result, before) if each is not None)
    did = f", {earlier[0]} did before" if earlier else ""
    total = len(result.values["pair_accuracy"])
    return f"{obeyed} of {total} pairs obey{did}: each of the two instructions puts its own passage first."


def metrics_table(means: dict[str, float], per_type: dict[str, dict[str, float]], records: int) -> Table:
    """The metrics of one model, by instruction type and over all records."""
    table = Table("instruction type", ">records", *(f">{SHORT_NAMES[metric]}" for metric in means))
    for name, values in per_type.items():
        table.add(name, str(values["records"]), *(f"{values[metric]:.1f}" for metric in means))
    table.add("all", str(records), *(f"{value:.1f}" for value in means.values()), style="bold")
    return table


def trained_table(before: Result, after: Result) -> Table:
    """The base model against the trained one, in the measures that say most."""
    from sentence_transformers_inf.evaluation import METRIC_NAMES

    table = Table("validation, values times 100", ">base", ">trained")
    old, new = before.means(), after.means()
    for metric in ("p_mrr", "pair_accuracy", "plain_ndcg_at_10"):
        table.add(METRIC_NAMES[metric], f"{old[metric]:.1f}", f"{new[metric]:.1f}")
    return table


def comparison_table(before: Result, after: Result, measured_on: str = "Test split") -> Table:
    """What training gained in each metric, with bootstrap intervals of the values and of the paired differences."""
    from sentence_transformers_inf.evaluation import METRIC_NAMES, METRICS
    from sentence_transformers_inf.evaluation.metrics import bootstrap_interval

    title = f"{measured_on}, all values times 100, with 95% bootstrap intervals"
    table = Table("", ">base model", ">trained", ">gain", title=title)
    old, new = before.means(), after.means()
    for metric in METRICS:
        cells = [f"{old[metric]:.1f}", f"{new[metric]:.1f}", f"{new[metric] - old[metric]:+.1f}"]
        if metric in before.values:  # Robustness is a mean over queries, not over records
            differences = after.values[metric] - before.values[metric]
            for index, values in enumerate((before.values[metric], after.values[metric], differences)):
                low, high = bootstrap_interval(values)
                cells[index] += f" [{low:+.1f}, {high:+.1f}]" if index == 2 else f" [{low:.1f}, {high:.1f}]"
        table.add(METRIC_NAMES[metric], *cells)
    return table


def gain_table(before: Result, after: Result) -> Table:
    """p-MRR and pair accuracy by instruction type, before training and after it."""
    columns = (">records", ">p-MRR before", ">after", ">pair accuracy before", ">after")
    table = Table("instruction type", *columns, title="By instruction type")
    old, new = before.per_type(), after.per_type()
    for name, values in new.items():
        cells = [f"{scores[metric]:.1f}" for metric in ("p_mrr", "pair_accuracy") for scores in (old[name], values)]
        table.add(name, str(values["records"]), *cells)
    return table


def flips_table(records: Any, before: Result, after: Result, count: int = 3) -> Table:
    """Records whose two instructions put different passages first after training, and the same one before."""
    same_before = (before.ranks[:, 0, 0] < before.ranks[:, 0, 1]) == (before.ranks[:, 1, 0] < before.ranks[:, 1, 1])
    flips = (after.ranks[:, 0, 0] == 1) & (after.ranks[:, 1, 1] == 1) & same_before
    passages = ("document", "hard_negative_document_1")
    preferences = [f"the {model} model prefers" for model in ("base", "trained")]
    table = Table("query and instruction", *preferences, title="Rankings that flip with the instruction")
    for row in flips.nonzero()[0][:count].tolist():
        record = records[row]
        table.add((shortened(record["query_positive"], 1000), "bold"), "", "")
        for right, instruction in enumerate(("instruction_positive", "instruction_negative")):
            cells: list[Cell] = []
            for result in (before, after):
                preferred = int(result.ranks[row, right, 1] < result.ranks[row, right, 0])
                mark = ("✓ ", "green") if preferred == right else ("✗ ", "red")
                cells.append([mark, shortened(record[passages[preferred]], 120)])
            table.add((shortened(record[instruction], 1000), "cyan"), *cells, end_section=right == 1)
    return table


def benchmark_table(benchmark: str, models: list[str], scores: list[BenchmarkScore], controls: bool) -> Table:
    """The scores of a benchmark, a column for each model; with ``controls``, another without instructions beside it."""
    columns = [f">{name}" for model in models for name in (model, *(["no instruction"] if controls else []))]
    table = Table("task, metric", *columns, title=f"{benchmark}, values times 100")
    values = {(score.task, score.metric, score.model, score.instructed): score.score for score in scores}
    kinds = (True, False) if controls else (True,)
    for task, metric in dict.fromkeys((score.task, score.metric) for score in scores):
        cells = [f"{values[task, metric, model, instructed]:.1f}" for model in models for instructed in kinds]
        table.add(f"{task}, {metric}", *cells)
    return table


def hits_table(hits: list[Hit], ids: Sequence[str], instructed: bool, top: int) -> Table:
    """What a search found, with a line under the first ``top``; under an instruction, how far it moved each passage."""
    table = Table(">rank", *([">without", ">moved"] if instructed else []), ">score", "id", "passage")
    for hit in hits:
        moved = hit.plain_rank - hit.rank
        mark = (f"▲ {moved}", "green") if moved > 0 else (f"▼ {-moved}", "red") if moved else "="
        ranks: list[Cell] = [str(hit.rank), str(hit.plain_rank), mark] if instructed else [str(hit.rank)]
        table.add(*ranks, f"{hit.score:.3f}", ids[hit.row], shortened(hit.passage, 240), end_section=hit.rank == top)
    return table
