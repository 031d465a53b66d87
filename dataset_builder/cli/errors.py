"""How a command line reports what the user can mend."""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console


def run(app: typer.Typer, traceback_variable: str) -> None:
    """Run a command line; what the user can mend is one line on stderr and exit status 2.

    Args:
        app: The commands.
        traceback_variable: Name of the environment variable that asks for tracebacks instead.
    """
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get(traceback_variable):
            raise
        error_line(str(error))
        sys.exit(2)


def error_line(text: str) -> None:
    """Print ``error:`` and a text, as one line on stderr."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"error: {' '.join(text.split())}", markup=False)
