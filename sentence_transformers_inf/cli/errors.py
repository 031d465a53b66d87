"""What a user can mend is one line on stderr; shared with ``inf-ir``."""

import os
import sys

import typer
from rich.console import Console

CANNOT = 2
"""Exit status of a command that cannot do what it was asked to do."""


def run(app: typer.Typer, traceback_variable: str) -> None:
    """Run a command line; what the user can mend is one line on stderr and exit status 2.

    Args:
        app: The commands.
        traceback_variable: The environment variable that asks for the traceback instead.
    """
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get(traceback_variable):
            raise
        error_line(str(error))
        sys.exit(CANNOT)


def error_line(text: str) -> None:
    """Print ``error: `` and a text, in one line, on stderr."""
    message_line(f"error: {text}")


def message_line(text: str) -> None:
    """Print a text in one line on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(" ".join(text.split()), markup=False)
