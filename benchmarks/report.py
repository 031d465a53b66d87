"""Print and keep what a benchmark measured: a table here, and NAME.json, NAME.md and NAME.png in benchmarks/results/."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"


class Row(NamedTuple):
    """One line of a report."""

    measure: str
    value: str
    bound: str = ""
    used: float | None = None
    """How much of what the bound allows is used: above 1 it is missed. Drawn in the chart."""


def at_most(measure: str, value: float, bound: float, form: str = ".2f") -> Row:
    """A row whose value should not exceed its bound."""
    return Row(measure, f"{value:{form}}", f"at most {bound:g}", value / bound)


def at_least(measure: str, value: float, bound: float, form: str = ".2f") -> Row:
    """A row whose value should reach its bound."""
    return Row(measure, f"{value:{form}}", f"at least {bound:g}", bound / value)


def machine() -> str:
    """The processor, its cores and the versions that matter."""
    names = [line.split(":")[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def peak_mib() -> float:
    """Peak resident memory of this process; ``ru_maxrss`` would count that of the process which started it."""
    return next(int(line.split()[1]) / 1024 for line in _lines(Path("/proc/self/status")) if line.startswith("VmHWM"))


def report(name: str, title: str, rows: list[Row], **details: Any) -> None:
    """Print the rows and write them to ``benchmarks/results``; ``details`` go into the JSON."""
    RESULTS.mkdir(exist_ok=True)
    heading = f"{title}; {machine()}; {time.strftime('%Y-%m-%d')}"
    lines = ["| measure | value | bound |", "|---|---:|---|", *(f"| {' | '.join(row[:3])} |" for row in rows)]
    table = "\n".join([heading, "", *lines, ""])
    print(f"\n{table}")
    (RESULTS / f"{name}.md").write_text(table, encoding="utf-8")
    saved = {"title": heading, "rows": [row._asdict() for row in rows], **details}
    (RESULTS / f"{name}.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")

    bounded = [row for row in reversed(rows) if row.used is not None]
    if not bounded:
        return
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(bounded)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    used = [row.used or 0.0 for row in bounded]
    bars = axes.barh(
        [row.measure for row in bounded], used, color=["#4c78a8" if share <= 1 else "#e45756" for share in used]
    )
    axes.bar_label(bars, [f"{row.value} ({row.bound})" for row in bounded], padding=4, fontsize=8)
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set_xlim(0, max(1.6, 1.6 * max(used)))
    axes.set_xlabel("share of what the bound allows")
    axes.set_title(heading, fontsize=8, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / f"{name}.png", dpi=150)
