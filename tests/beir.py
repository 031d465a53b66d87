"""A corpus in BEIR's layout: three passages, two queries without instructions."""

import json
from pathlib import Path

PASSAGES = {
    "p1": "Bread rises because yeast makes gas in the dough.",
    "p2": "The bicycle was invented in the nineteenth century.",
    "p3": "Volcanoes erupt when molten rock reaches the surface.",
}
QUERIES = {"q1": "when was the bicycle invented", "q2": "why does bread rise"}
RIGHT = {"q1": "p2", "q2": "p3"}


def write_beir(folder: Path) -> Path:
    """Write it; the passage that answers the second query is not the one that is judged to."""
    folder.mkdir(parents=True)
    for name, texts in (("corpus", PASSAGES), ("queries", QUERIES)):
        lines = [json.dumps({"_id": key, "text": text, "title": ""}) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [f"{query}\t{passage}\t1" for query, passage in RIGHT.items()]
    (folder / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n", encoding="utf-8")
    return folder
