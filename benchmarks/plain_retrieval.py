"""MRR@10 and nDCG@10 of bare queries on a corpus in BEIR layout: is plain retrieval intact?

    python benchmarks/plain_retrieval.py FOLDER MODEL [MODEL ...]

FOLDER holds `queries.jsonl`, `corpus.jsonl` and `qrels*.tsv` (or `qrels/*.tsv`).
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.evaluation.metrics import ndcg_at_k, ranks_of
from sentence_transformers_inf.modules import check_embeddings


def read_texts(path: Path) -> dict[str, str]:
    """Text by id, the title before it if there is one, in ascending order of the ids."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        row["_id"]: f"{row.get('title') or ''} {row['text']}".strip() for row in sorted(rows, key=lambda row: row["_id"])
    }


def read_qrels(folder: Path) -> dict[str, list[str]]:
    """The relevant passages of each query."""
    qrels: dict[str, list[str]] = {}
    for path in sorted([*folder.glob("qrels*.tsv"), *folder.glob("qrels/*.tsv")]):
        with path.open(encoding="utf-8") as file:
            for query, passage, score in list(csv.reader(file, delimiter="\t"))[1:]:
                if int(score) > 0:
                    qrels.setdefault(query, []).append(passage)
    return qrels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    options = parser.parse_args()
    queries, corpus = read_texts(options.folder / "queries.jsonl"), read_texts(options.folder / "corpus.jsonl")
    qrels = read_qrels(options.folder)
    column = {passage: number for number, passage in enumerate(corpus)}
    widest = max(len(passages) for passages in qrels.values())
    relevant = np.array([[column[p] for p in ps] + [-1] * (widest - len(ps)) for ps in qrels.values()])

    table = Table(title=f"{len(qrels)} bare queries, {len(corpus)} passages; times 100", title_justify="left")
    for name in ("model", "MRR@10", "nDCG@10"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name in options.models:
        model = load_instruction_model(name)
        texts, asked = list(corpus.values()), [queries[query] for query in qrels]
        passages, embedded = model.encode_document(texts), model.encode_query(asked)
        check_embeddings(passages, texts, "passages")
        check_embeddings(embedded, asked, "queries")
        scores = embedded @ passages.T
        ranks = np.where(relevant >= 0, ranks_of(scores, np.maximum(relevant, 0)), 0)
        first = np.where(ranks > 0, ranks, np.inf).min(axis=1)
        mrr = np.where(first <= 10, 1 / first, 0).mean()
        table.add_row(name, f"{100 * mrr:.2f}", f"{100 * ndcg_at_k(ranks).mean():.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
