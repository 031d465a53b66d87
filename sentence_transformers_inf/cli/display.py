"""How commands print. Nothing else imports Rich or prints: so no text is read as markup, and none steers the terminal."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from logging import LogRecord, setLogRecordFactory
from pathlib import Path

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from sentence_transformers_inf.escaping import visible

Part = str | tuple[str, str]
"""A text, or a text and its style."""

Cell = Part | list[Part]


def print_line(text: object = "", style: str = "", stderr: bool = False) -> None:
    """Print a text in one line, however long."""
    Console(stderr=stderr, highlight=False).print(Text(visible(text), style), soft_wrap=True)


def print_text(text: str) -> None:
    """Print a text line by line, as it is broken."""
    for line in text.splitlines():
        print_line(line)


def quiet(models: bool = True) -> None:
    """Keep libraries from telling of their work: no bars but those of downloads on a terminal, and no notes on loading.

    Args:
        models: Whether the command may load a model. Transformers takes a while to import, and none else needs it.
    """
    import datasets
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shows_downloads = sys.stderr.isatty() and not are_progress_bars_disabled()
    datasets.disable_progress_bars()
    if models:
        from transformers.utils import logging

        logging.disable_progress_bar()  # of huggingface_hub as well
        if "TRANSFORMERS_VERBOSITY" not in os.environ:
            logging.set_verbosity_error()
    (enable_progress_bars if shows_downloads else disable_progress_bars)()
    setLogRecordFactory(_VisibleRecord)


class _VisibleRecord(LogRecord):
    """What a library logs, which may quote a file, steers no terminal."""

    def getMessage(self) -> str:
        return "\n".join(map(visible, super().getMessage().splitlines()))


@contextlib.contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A line on a terminal that says what is being done; yields what changes it."""
    with Console(highlight=False).status(Text()) as shown:
        yield lambda text: shown.update(Text(visible(text)))


class Table:
    """A table that fits the terminal and cuts nothing: texts are wrapped, and where columns have no room beside each other,
    the others stand in another table below, after the first column again.

    Args:
        *columns: Their names; one that begins with ``>`` is of numbers, which are never broken.
        title: In a line of its own.
    """

    def __init__(self, *columns: str, title: str = "") -> None:
        self._title = title
        self._numbers = [name.startswith(">") for name in columns]
        self._names = [Text(visible(name.removeprefix(">"))) for name in columns]
        self._rows: list[tuple[list[Text], str, bool]] = []

    def add(self, *cells: Cell, style: str = "", end_section: bool = False) -> None:
        """Add a row; a cell is a text, a text with a style, or several of these in a list."""
        self._rows.append((list(map(_text, cells)), style, end_section))

    def print(self) -> None:
        """Print it in the width of the terminal."""
        if self._title:
            print_line(self._title, "italic")
        self._print(Console(highlight=False))

    def save_picture(self, path: Path, title: str) -> None:
        """Write it as an SVG picture."""
        from sentence_transformers_inf.recipe import write_whole

        recorder = Console(record=True, width=120, file=io.StringIO())
        recorder.print(Text(visible(self._title), "italic"))
        self._print(recorder)
        write_whole(path, recorder.export_svg(title=title))

    def _print(self, console: Console) -> None:
        cells = [[row[number] for row, _, _ in self._rows] for number in range(len(self._names))]
        widest = [max((cell_len(str(text)) for text in column), default=0) for column in cells]
        wanted = [max(width, cell_len(str(name))) for width, name in zip(widest, self._names)]
        least = [
            max(width, _longest_word(name)) if is_number else min(want, 12, max(6, console.width // 4))
            for width, name, want, is_number in zip(widest, self._names, wanted, self._numbers)
        ]
        for columns in _side_by_side(least, console.width):
            widths = {number: least[number] for number in columns}
            room = console.width - 1 - sum(width + 2 for width in widths.values())
            for _ in range(room):
                if short := [number for number in columns if widths[number] < wanted[number]]:
                    widths[min(short, key=lambda number: widths[number])] += 1
            table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
            for number, width in widths.items():
                table.add_column(
                    self._names[number], width=width, overflow="fold", justify="right" if self._numbers[number] else "left"
                )
            for row, style, end_section in self._rows:
                table.add_row(*(row[number] for number in columns), style=style, end_section=end_section)
            console.print(table, crop=False, width=max(console.width, 1 + sum(width + 2 for width in widths.values())))


def _text(cell: Cell) -> Text:
    parts = cell if isinstance(cell, list) else [cell]
    return Text.assemble(*(visible(part) if isinstance(part, str) else (visible(part[0]), part[1]) for part in parts))


def _longest_word(text: Text) -> int:
    return max(map(cell_len, str(text).split()), default=0)


def _side_by_side(widths: Sequence[int], room: int) -> list[list[int]]:
    """The numbers of the columns that fit beside each other, the first in every part."""
    parts: list[list[int]] = [[0]]
    for number in range(1, len(widths)):
        if 1 + sum(widths[other] + 2 for other in [*parts[-1], number]) > room and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(number)
    return parts
