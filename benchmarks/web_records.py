"""Are instructions obeyed on real web passages? 66 records on passages of MS MARCO, to choose recipes by.

    python benchmarks/web_records.py FOLDER MODEL [MODEL ...]

FOLDER holds a part of MS MARCO's passages in BEIR's layout (`queries.jsonl`, `corpus.jsonl`), as published with InstructIR.
Their licence keeps them out of this repository, so `web_records.jsonl` names query and document by their ids. The
instructions, the other query and the hard negatives were written for this project by a large language model, one record at
a time (CC0-1.0); the passages among them are invented.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.evaluation import METRIC_NAMES, measure

METRICS = ("p_mrr", "pair_accuracy", "ndcg_at_10", "plain_ndcg_at_10")


def read_records(folder: Path) -> Dataset:
    """The records, with the texts that the folder has under their ids."""
    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    queries, passages = (
        {row["_id"]: row["text"] for row in map(json.loads, (folder / name).read_text(encoding="utf-8").splitlines())}
        for name in ("queries.jsonl", "corpus.jsonl")
    )
    rows = []
    for row in map(json.loads, lines):
        row["query_positive"], row["document"] = queries[row.pop("query_id")], passages[row.pop("document_id")]
        rows.append(row)
    return Dataset.from_list(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    options = parser.parse_args()
    records = read_records(options.folder)
    table = Table(title=f"{len(records)} records; times 100", title_justify="left")
    table.add_column("model")
    for metric in METRICS:
        table.add_column(METRIC_NAMES[metric], justify="right")
    for name in options.models:
        means = measure(load_instruction_model(name), records).means()
        table.add_row(name, *(f"{means[metric]:.1f}" for metric in METRICS))
    Console().print(table)


if __name__ == "__main__":
    main()
