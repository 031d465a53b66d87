"""Runs commands one after the other in one process, as their entry points would: a JSON list of them on stdin.

Importing the libraries takes ten seconds, so tests that need many commands share a process. After each, stderr has a line
``EXIT STATUS WORDS``.
"""

import json
import re
import subprocess
import sys
import traceback
from pathlib import Path


def run_commands(environment, *commands, cwd=None):
    """Run commands in one process: (status, stderr) of each, and all that was printed."""
    done = subprocess.run(
        [sys.executable, Path(__file__).resolve()], input=json.dumps([list(map(str, words)) for words in commands]),
        capture_output=True, text=True, timeout=400, env=environment, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    parts = re.split(r"^EXIT (\d) .*$", done.stderr, flags=re.M)
    return [(int(status), err) for err, status in zip(parts[::2], parts[1::2], strict=False)], done.stdout + done.stderr


def main() -> None:
    for words in json.load(sys.stdin):
        if words[0] == "inf-embed":
            from sentence_transformers_inf.cli import main as command
        else:
            from dataset_builder.cli import main as command
        sys.argv, status = words, 0
        try:
            command()
        except SystemExit as end:
            status = end.code or 0
        except Exception:
            traceback.print_exc()
            status = 2
        sys.stdout.flush()
        print("\nEXIT", status, *words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
