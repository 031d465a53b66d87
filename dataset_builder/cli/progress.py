"""Where a build stands: a live table on a terminal, else a line each ten seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

from dataset_builder.cli.options import stderr

if TYPE_CHECKING:
    from dataset_builder.run import OnProgress, Progress

_LOG_SECONDS = 10


@contextlib.contextmanager
def show_progress() -> Iterator[OnProgress]:
    """A function that shows where the run stands."""
    if sys.stderr.isatty():
        with Live(console=Console(stderr=True), refresh_per_second=4, transient=True) as live:
            yield lambda progress: live.update(_table(progress))
        return
    last = time.monotonic()

    def log(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= _LOG_SECONDS:
            last = time.monotonic()
            stderr.print(", ".join(f"{name} {value}" for name, value in _cells(progress)), markup=False)

    yield log


def _cells(progress: Progress) -> list[tuple[str, str]]:
    usage, counts = progress.usage, progress.counts
    here = sum(usage.stages.values())
    rate = usage.requests / progress.seconds if progress.seconds else 0.0
    share = progress.done / progress.total if progress.total else 1.0
    left = f"{progress.seconds * (1 - share) / share / 60:.1f} min" if share and here else "?"
    stages = " ".join(f"{stage} {count}" for stage, count in usage.stages.items())
    return [
        ("records", f"{progress.done}/{progress.total}"),
        ("answers", stages or "0"),
        ("requests/s", f"{rate:.1f}"),
        ("tokens", f"{usage.tokens:,}"),
        ("cost", f"${usage.cost:.4f}"),
        ("kept", str(counts["kept"])),
        ("rejected", str(counts["rejected"])),
        ("failed", str(counts["failed"])),
        ("left", left),
    ]


def _table(progress: Progress) -> Table:
    table = Table(show_header=False)
    for name, value in _cells(progress):
        table.add_row(name, value)
    return table
