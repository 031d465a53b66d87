"""The report of an ablation: a table, charts, and what the best cell gets wrong."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np

from sentence_transformers_inf.escaping import markdown, shortened
from sentence_transformers_inf.evaluation import METRIC_NAMES
from sentence_transformers_inf.recipe import write_whole
from sentence_transformers_inf.records import load_records
from sentence_transformers_inf.training.ablation import BASELINE, Ablation, CellResult


def write_report(ablation: Ablation, rows: list[CellResult], folder: Path) -> list[list[str]]:
    """Write ``report.json``, ``report.md``, ``ablation.png`` and, with instruction types, ``types.png``, both also as SVG.

    Returns:
        The table: its header, then its rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = _table(ablation, rows)
    best = max(rows[1:], key=lambda row: row.means["p_mrr"])
    write_whole(folder / "report.md", f"{_markdown(table)}\n{_failures(ablation, best)}")
    report = json.dumps([asdict(row) for row in rows], indent=2)
    write_whole(folder / "report.json", re.sub(r"\bNaN\b", "null", report) + "\n")
    with matplotlib.rc_context({"text.parse_math": False}):  # names are no formulas
        _draw_cells(ablation, rows, folder)
        if rows[0].per_type:
            _draw_types(rows[0], best, folder)
    return table


_ELSEWHERE = {
    "narratives_p_mrr": "narratives: p-MRR",
    "narratives_pairwise_gain": "gain",
    "narratives_ndcg_at_10_og": "nDCG@10",
    "help_centre_pair_accuracy": "help centre: pairs",
    "help_centre_exclusion": "exclusion",
    "plain_mrr_at_10": "plain corpus: MRR@10",
}
"""What is measured beside the records, and its name in the table."""


def _table(ablation: Ablation, rows: list[CellResult]) -> list[list[str]]:
    names = {metric: METRIC_NAMES[metric] for metric in ("p_mrr", "pair_accuracy", "ndcg_at_10", "plain_ndcg_at_10")}
    names |= {metric: name for metric, name in _ELSEWHERE.items() if metric in rows[0].means}
    costs = [name for name in ("minutes", "tokens", "dollars") if any(math.isfinite(getattr(row, name)) for row in rows)]
    lines = [["", *names.values(), f"p-MRR over {BASELINE}", *costs]]
    for row in rows:
        cells = [
            f"{row.means[metric]:.1f}"
            + (f" ± {row.errors[metric]:.1f}" if len(ablation.seeds) > 1 and row is not rows[0] else "")
            for metric in names
        ]
        gain, low, high = row.gains["p_mrr"]
        cells.append("" if row.name == BASELINE else f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]")
        for cost in costs:
            value = getattr(row, cost)
            cells.append("" if math.isnan(value) else f"{value:,.0f}" if cost == "tokens" else f"{value:.1f}")
        lines.append([row.name, *cells])
    return lines


def _markdown(table: list[list[str]]) -> str:
    header, *rows = table
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *([markdown(name), *cells] for name, *cells in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _failures(ablation: Ablation, row: CellResult) -> str:
    """Of each instruction type, the record that a cell obeys least, and in how many it obeys both instructions."""
    records = load_records(str(ablation.evaluate["data"]), ablation.evaluate["split"])
    types = records["instruction_type"] if "instruction_type" in records.column_names else [""] * len(records)
    lines = [f"## What {markdown(row.name)} gets wrong", ""]
    for kind in sorted(set(types), key=lambda kind: kind or ""):
        of_kind = [index for index, other in enumerate(types) if other == kind]
        obeyed = sum(row.values["pair_accuracy"][index] == 100 for index in of_kind)
        worst = min(of_kind, key=lambda index: (row.values["pair_accuracy"][index], row.values["p_mrr"][index]))
        lines.append(f"**{markdown(kind or 'all')}**: {obeyed} of {len(of_kind)} obeyed with every seed.")
        if row.values["pair_accuracy"][worst] < 100:
            record = records[worst]
            lines += ["", f"- query: {_quoted(record['query_positive'])}"]
            for instruction, passage in (("positive", "document"), ("negative", "hard_negative_document_1")):
                told = _quoted(record[f"instruction_{instruction}"])
                lines.append(f"- {told} should prefer: {_quoted(record[passage])}")
        lines.append("")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return markdown(shortened(text, 160))


def _draw_cells(ablation: Ablation, rows: list[CellResult], folder: Path) -> None:
    """A curve over the one numeric option that is varied, else a bar for every cell."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {"p_mrr": "tab:blue", "ndcg_at_10": "tab:orange", "plain_ndcg_at_10": "tab:green"}
    points = [
        (ablation.cells[row.name][ablation.axis], row)
        for row in rows
        if ablation.axis and row.name.startswith(f"{ablation.axis} ")
    ]
    figure = Figure(figsize=(7, 4.2 if points else 0.45 * len(rows) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    if points:
        axes, names = figure.subplots(), {**METRIC_NAMES, **_ELSEWHERE}
        for metric, colour in {**shown, "narratives_p_mrr": "tab:red"}.items():
            values = [row.means[metric] for _, row in points]
            spread = [row.errors[metric] for _, row in points]
            axes.errorbar([at for at, _ in points], values, spread, color=colour, marker="o", capsize=3, label=names[metric])
            axes.axhline(rows[0].means[metric], color=colour, linestyle=":", linewidth=1)
        axes.set_xlabel(f"{ablation.axis} (dotted: the base model)")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
    else:
        for axes, (metric, colour) in zip(figure.subplots(1, len(shown), sharey=True), shown.items()):
            values = [row.means[metric] for row in rows][::-1]
            spread = [row.errors[metric] for row in rows][::-1]
            axes.barh([row.name for row in rows][::-1], values, color=colour, xerr=np.nan_to_num(spread), capsize=2)
            axes.set_xlabel(METRIC_NAMES[metric])
            axes.set_xlim(left=min(0, min(values)) if metric == "p_mrr" else max(0, min(values) - 10))
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"ablation.{suffix}", dpi=150)


def _draw_types(base: CellResult, best: CellResult, folder: Path) -> None:
    """Pair accuracy of each instruction type: the base model and the cell with the highest p-MRR."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = sorted(best.per_type, key=lambda kind: best.per_type[kind]["pair_accuracy"])
    figure = Figure(figsize=(7, 0.4 * len(kinds) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for offset, row, colour in ((0.2, base, "0.7"), (-0.2, best, "tab:blue")):
        values = [row.per_type[kind]["pair_accuracy"] for kind in kinds]
        axes.barh(np.arange(len(kinds)) - offset, values, 0.4, color=colour, label=row.name)
    axes.set_yticks(np.arange(len(kinds)), [f"{kind} ({best.per_type[kind]['records']:.0f})" for kind in kinds])
    axes.set_xlabel("pair accuracy (in brackets: records)")
    axes.legend(frameon=False, loc="lower right")
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"types.{suffix}", dpi=150)
