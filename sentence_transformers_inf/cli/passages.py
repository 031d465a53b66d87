"""``inf-embed passages``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sentence_transformers_inf.cli.options import DataOption
from sentence_transformers_inf.cli.tables import print_line


def passages(
    output: Annotated[Path, typer.Option(help="File for the passages, .jsonl.")],
    data: DataOption = "mini",
) -> None:
    """List the distinct passages of a corpus, for embeddings from elsewhere (train --passage-embeddings)."""
    from sentence_transformers_inf.passages import distinct_passages
    from sentence_transformers_inf.records import load_records, record_splits

    texts = distinct_passages([load_records(data, split) for split in record_splits(data)])
    with output.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    print_line(f"{len(texts)} passages are in {output}; embed them in this order.")
