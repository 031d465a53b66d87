"""Commands in this process (:func:`call`), or several in one other process (:func:`run_commands`).

As a script it runs commands one after the other, a JSON list of them on stdin; after each, stderr has a line
``EXIT STATUS WORDS``.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock


def call(*words):
    """Call ``inf-embed`` or ``inf-ir`` in this process: its exit status, and what it printed to stdout and to stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        status = _call(list(map(str, words)))
    return status, out.getvalue(), err.getvalue()


def error_line(err):
    """The one line of an error, after whatever libraries log."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err[-3000:]
    assert err.rstrip().endswith(lines[0])
    assert "Traceback" not in err
    return lines[0]


def run_commands(environment, *commands, cwd=None):
    """Run commands in one process: (status, stderr) of each, and all that was printed."""
    done = subprocess.run(
        [sys.executable, Path(__file__).resolve()], input=json.dumps([list(map(str, words)) for words in commands]),
        capture_output=True, text=True, timeout=900, env=environment, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    parts = re.split(r"^EXIT (\d) .*$", done.stderr, flags=re.M)
    return [(int(status), err) for err, status in zip(parts[::2], parts[1::2], strict=False)], done.stdout + done.stderr


def _call(words):
    if words[0] == "inf-embed":
        from sentence_transformers_inf.cli import main as command
    else:
        from dataset_builder.cli import main as command
    with mock.patch.object(sys, "argv", words):
        try:
            command()
        except SystemExit as end:
            return end.code or 0
    return 0


def main() -> None:
    for words in json.load(sys.stdin):
        try:
            status = _call(words)
        except Exception:
            traceback.print_exc()
            status = 2
        sys.stdout.flush()
        print("\nEXIT", status, *words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
