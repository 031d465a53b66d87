"""Runs commands one after the other in one process, as their entry points would: a JSON list of them on stdin.

Importing the libraries takes ten seconds, so tests that need many commands share a process. After each, stderr has a line
``EXIT STATUS WORDS``.
"""

import json
import sys
import traceback


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
