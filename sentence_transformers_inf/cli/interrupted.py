"""Ctrl-C: what is kept, said at once."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from sentence_transformers_inf.cli.errors import message_line

if TYPE_CHECKING:
    from sentence_transformers_inf.training import RunFolder

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


@contextlib.contextmanager
def interrupted(left: Callable[[], str]) -> Iterator[None]:
    """End a command on Ctrl-C with one line on stderr.

    Args:
        left: What is kept.
    """
    try:
        yield
    except KeyboardInterrupt:
        message_line(f"stopped: {left()}")
        sys.exit(INTERRUPTED)


def left_of(folder: RunFolder) -> str:
    """What is kept of a training."""
    kept = folder.checkpoints()
    return f"{kept[0]} is kept, and the same command goes on from there" if kept else "the same command starts it again"
