"""What a user can mend is one line on stderr; shared with ``inf-ir``."""

import importlib.metadata
import io
import os
import sys
from typing import Annotated

import typer

from sentence_transformers_inf.cli.checks import pip_line
from sentence_transformers_inf.cli.display import print_line, print_text

CANNOT = 2
"""Exit status of a command that cannot do what it was asked to do."""

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # of Click, or of Typer, which has taken Click in


def application(help: str, name: str) -> typer.Typer:
    """Commands under one name, with ``--version``."""
    app = typer.Typer(help=help, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    def show_version(wanted: bool) -> None:
        if wanted:
            print_line(f"{name} {importlib.metadata.version('sentence-transformers-inf')}")
            raise typer.Exit

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", help="Show the version.", callback=show_version, is_eager=True)
        ] = False,
    ) -> None:
        pass

    return app


def run(app: typer.Typer, program: str) -> None:
    """Run a command line; what the user can mend is one line on stderr and exit status 2.

    Args:
        app: The commands.
        program: Its name. With ``INF_EMBED_TRACEBACK`` or ``INF_IR_TRACEBACK`` in the environment, the traceback is shown.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where its encoding lacks a character
    try:
        _check_words(sys.argv[1:])
        status = app(standalone_mode=False)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print_text(str(error))
        else:
            context = getattr(error, "ctx", None)
            hint = f" ({context.command_path} --help lists the options)" if context is not None else ""
            error_line(f"{error.format_message()}{hint}")  # type: ignore[attr-defined]
        status = CANNOT
    except (KeyboardInterrupt, typer.Abort) as error:
        if isinstance(error.__cause__, EOFError):
            raise error.__cause__ from None
        status = INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get(f"{program.replace('-', '_').upper()}_TRACEBACK"):
            raise
        module = getattr(error, "name", None)  # of an ImportError
        install = pip_line(module, program) if module else None
        error_line(_in_words(error) if install is None else f"this needs {module}: {install}")
        status = CANNOT
    except Exception as error:  # what nobody foresaw is one line as well
        variable = f"{program.replace('-', '_').upper()}_TRACEBACK"
        if os.environ.get(variable):
            raise
        error_line(f"{type(error).__name__}: {error}; this is a bug: please report it with what {variable}=1 shows")
        status = CANNOT
    if status == INTERRUPTED:
        print_line("interrupted", stderr=True)
    sys.exit(status if isinstance(status, int) else 0)


def _check_words(words: list[str]) -> None:
    """Refuse what is no text: it could be neither shown nor noted in a file."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{word!r} is not UTF-8 text: write it in UTF-8; rename a file that is called so") from error


def _in_words(error: Exception) -> str:
    """What an error says; of one from the system, which file, what is wrong with it, and a remedy."""
    from sentence_transformers_inf.recipe import FULL

    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        why = error.strerror.lower()
        if error.errno in FULL:
            return f"{error.filename}: {why}: make room, or name another place"
        return f"{error.filename}: {why}: check the path and its permissions"
    return str(error)


def error_line(text: str) -> None:
    """Print ``error: `` and a text, in one line, on stderr."""
    message_line(f"error: {text}")


def message_line(text: str) -> None:
    """Print a text in one line on stderr."""
    print_line(" ".join(text.split()), stderr=True)
