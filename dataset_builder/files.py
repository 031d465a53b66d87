"""Files that are whole or not there: what is written takes its place when the writing has ended."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

ROW_GROUP = 500
"""Rows that are in memory at a time."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; the file moves to ``path`` when the block ends without an error."""
    part = path.with_name(path.name + ".part")
    yield part
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, as a whole."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_parquet(path: Path, features: Features, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows into a Parquet file, as a whole; columns that a row lacks are null, others are left out."""
    schema, iterator = features.arrow_schema.remove_metadata(), iter(rows)
    with replacing(path) as part, pq.ParquetWriter(part, schema, compression="zstd") as writer:
        while True:
            group = [{name: row.get(name) for name in features} for row in islice(iterator, ROW_GROUP)]
            writer.write_table(pa.Table.from_pylist(group, schema))
            if len(group) < ROW_GROUP:
                break
