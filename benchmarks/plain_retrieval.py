"""MRR@10 and nDCG@10 of bare queries on a corpus in BEIR layout: is plain retrieval intact?

    python benchmarks/plain_retrieval.py FOLDER MODEL [MODEL ...]

FOLDER holds `queries.jsonl`, `corpus.jsonl` and `qrels*.tsv` (or `qrels/*.tsv`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.evaluation.elsewhere import measure_plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    options = parser.parse_args()
    table = Table(title=f"Bare queries of {options.folder.name}; times 100", title_justify="left")
    for name in ("model", "MRR@10", "nDCG@10"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name in options.models:
        measured = measure_plain(load_instruction_model(name), options.folder)
        table.add_row(name, f"{measured['mrr_at_10']:.2f}", f"{measured['ndcg_at_10']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
