"""``inf-ir agreement``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.table import Table

from dataset_builder.cli.options import console


def agreement(
    labels: Annotated[Path, typer.Argument(help="CSV or JSONL file with the columns item, annotator and label.")],
    human: Annotated[list[str], typer.Option(help="A human annotator; may be repeated.")],
    chart: Annotated[Optional[Path], typer.Option(help="Draw a bar chart into this PNG or SVG file.")] = None,
) -> None:
    """Average pairwise Cohen's kappa of each annotator with the humans: which judge to trust."""
    from dataset_builder import agreement as measures

    entries = measures.agreement(measures.read_labels(labels), human)
    table = Table(title=f"Agreement with {', '.join(human)}", title_justify="left")
    table.add_column("annotator")
    for column in ("items", "κ", "95% interval"):
        table.add_column(column, justify="right")
    for entry in entries:
        name = f"{entry.annotator} (human)" if entry.annotator in human else entry.annotator
        table.add_row(name, str(entry.items), f"{entry.kappa:.3f}", f"[{entry.low:.3f}, {entry.high:.3f}]")
    console.print(table)
    if chart is not None:
        measures.draw_chart(entries, human, chart)
        console.print(f"The chart is in {chart}", markup=False)
