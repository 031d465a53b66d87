"""The tables that commands print."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from sentence_transformers_inf.evaluation import Result
    from sentence_transformers_inf.evaluation.mteb import BenchmarkScore
    from sentence_transformers_inf.search import Hit

console = Console(highlight=False)
"""Where commands print."""


def print_line(text: str) -> None:
    """Print a text as it is, however long."""
    console.print(text, markup=False, soft_wrap=True)


def metrics_table(title: str, means: dict[str, float], per_type: dict[str, dict[str, float]]) -> Table:
    """The metrics of one model, by instruction type and over all records."""
    from sentence_transformers_inf.evaluation import METRIC_NAMES

    table = Table(title=title, title_justify="left")
    table.add_column("instruction type")
    table.add_column("records", justify="right")
    for metric in means:
        table.add_column(METRIC_NAMES[metric], justify="right")
    for name, values in per_type.items():
        table.add_row(name, str(values["records"]), *(f"{values[metric]:.1f}" for metric in means))
    table.add_section()
    table.add_row("all", "", *(f"{value:.1f}" for value in means.values()), style="bold")
    return table


def comparison_table(before: Result, after: Result, measured_on: str = "Test split") -> Table:
    """What training gained in each metric, with bootstrap intervals of the values and of the paired differences."""
    from sentence_transformers_inf.evaluation import METRIC_NAMES, METRICS
    from sentence_transformers_inf.evaluation.metrics import bootstrap_interval

    table = Table(title=f"{measured_on}, all values times 100, with 95% bootstrap intervals", title_justify="left")
    for column in ("", "base model", "trained", "gain"):
        table.add_column(column, justify="left" if not column else "right")
    old, new = before.means(), after.means()
    for metric in METRICS:
        if metric == "plain_ndcg_at_10":
            table.add_section()
        cells = [f"{old[metric]:.1f}", f"{new[metric]:.1f}", f"{new[metric] - old[metric]:+.1f}"]
        if metric in before.values:  # Robustness is a mean over queries, not over records
            differences = after.values[metric] - before.values[metric]
            for index, values in enumerate((before.values[metric], after.values[metric], differences)):
                low, high = bootstrap_interval(values)
                cells[index] += f" [{low:+.1f}, {high:+.1f}]" if index == 2 else f" [{low:.1f}, {high:.1f}]"
        table.add_row(METRIC_NAMES[metric], *cells)
    return table


def gain_table(before: Result, after: Result) -> Table:
    """p-MRR and pair accuracy by instruction type, before training and after it."""
    table = Table(title="By instruction type", title_justify="left")
    for column in ("instruction type", "records", "p-MRR before", "after", "pair accuracy before", "after"):
        table.add_column(column, justify="left" if column == "instruction type" else "right")
    old, new = before.per_type(), after.per_type()
    for name, values in new.items():
        cells = [f"{scores[metric]:.1f}" for metric in ("p_mrr", "pair_accuracy") for scores in (old[name], values)]
        table.add_row(name, str(values["records"]), *cells)
    return table


def flips_table(records: Any, before: Result, after: Result, count: int = 3) -> Table:
    """Records whose two instructions put different passages first after training, and the same one before."""
    same_before = (before.ranks[:, 0, 0] < before.ranks[:, 0, 1]) == (before.ranks[:, 1, 0] < before.ranks[:, 1, 1])
    flips = (after.ranks[:, 0, 0] == 1) & (after.ranks[:, 1, 1] == 1) & same_before
    passages = ("document", "hard_negative_document_1")
    table = Table(title="Rankings that flip with the instruction", title_justify="left")
    table.add_column("query and instruction")
    for model in ("the base model", "the trained model"):
        table.add_column(f"{model} prefers", ratio=1)
    for row in flips.nonzero()[0][:count].tolist():
        record = records[row]
        table.add_row(f"[bold]{plain(record['query_positive'])}[/]")
        for right, instruction in enumerate(("instruction_positive", "instruction_negative")):
            cells = []
            for result in (before, after):
                preferred = int(result.ranks[row, right, 1] < result.ranks[row, right, 0])
                mark = "[green]✓[/]" if preferred == right else "[red]✗[/]"
                cells.append(f"{mark} {plain(record[passages[preferred]], 120)}")
            table.add_row(f"[cyan]{plain(record[instruction])}[/]", *cells, end_section=right == 1)
    return table


def save_picture(table: Table, path: Path) -> None:
    """Write a table as an SVG picture."""
    recorder = Console(record=True, width=120, file=io.StringIO())
    recorder.print(table)
    path.write_text(recorder.export_svg(title="inf-embed demo"), encoding="utf-8")


def plain(text: str, limit: int = 1000) -> str:
    """Text that Rich prints as it is, cut to ``limit`` characters."""
    return escape(text if len(text) <= limit else text[: limit - 1].rstrip() + "…")


def benchmark_table(benchmark: str, models: list[str], scores: list[BenchmarkScore], controls: bool) -> Table:
    """The scores of a benchmark, a column for each model; with ``controls``, another without instructions beside it."""
    table = Table(title=f"{benchmark}, values times 100", title_justify="left")
    for column in ("task", "metric", *models):
        table.add_column(column, justify="right" if column in models else "left")
        if column in models and controls:
            table.add_column("no instruction", justify="right")
    values = {(score.task, score.metric, score.model, score.instructed): score.score for score in scores}
    kinds = (True, False) if controls else (True,)
    for task, metric in dict.fromkeys((score.task, score.metric) for score in scores):
        cells = [f"{values[task, metric, model, instructed]:.1f}" for model in models for instructed in kinds]
        table.add_row(task, metric, *cells)
    return table


def hits_table(query: str, instruction: str | None, hits: list[Hit], top: int) -> Table:
    """What a search found, with a line under the first ``top``; under an instruction, how far it moved each passage."""
    table = Table(title=f"{query}\n{instruction or '(no instruction)'}", title_justify="left")
    table.add_column("rank", justify="right")
    if instruction:
        table.add_column("without", justify="right")
        table.add_column("moved", justify="right")
    table.add_column("score", justify="right")
    table.add_column("passage")
    for hit in hits:
        moved = hit.plain_rank - hit.rank
        mark = f"[green]▲ {moved}[/]" if moved > 0 else f"[red]▼ {-moved}[/]" if moved else "="
        ranks = [str(hit.rank), str(hit.plain_rank), mark] if instruction else [str(hit.rank)]
        table.add_row(*ranks, f"{hit.score:.3f}", plain(hit.passage, 240), end_section=hit.rank == top)
    return table
