"""Files that are whole or not there: what is written takes its place when the writing has ended."""

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from filelock import FileLock, Timeout

ROW_GROUP = 500
"""Rows that are in memory at a time."""


_held: set[Path] = set()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from a build's folder, which is made if it is not there; a process may lock it again.

    Raises:
        BlockingIOError: Another process is at work in it.
        FileExistsError: It holds something else than a build.
    """
    work = folder.resolve() / "work"
    if work in _held:
        yield
        return
    if folder.is_dir() and any(folder.iterdir()) and not work.is_dir():
        raise FileExistsError(f"{folder} is not empty and holds no build: name another output folder")
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "lock", timeout=0):
            _held.add(work)
            try:
                for place in (folder, folder / "unfiltered", work):
                    for part in place.glob(".*.part"):  # of a process that was killed
                        part.unlink()
                yield
            finally:
                _held.remove(work)
    except Timeout as error:
        raise BlockingIOError(f"{folder}: another run is at work in this folder; wait for it or stop it") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; the file moves to ``path``, on disk, when the block ends without an error."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        _sync(part, os.O_RDWR)
        os.replace(part, path)
        with contextlib.suppress(PermissionError):  # Windows opens no folders
            _sync(path.parent, os.O_RDONLY)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, as a whole."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_parquet(path: Path, features: Features, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows into a Parquet file, as a whole; columns that a row lacks are null, others are left out."""
    schema, iterator = features.arrow_schema.remove_metadata(), iter(rows)
    with replacing(path) as part, pq.ParquetWriter(part, schema, compression="zstd", write_page_checksum=True) as writer:
        while True:
            group = [{name: row.get(name) for name in features} for row in islice(iterator, ROW_GROUP)]
            writer.write_table(pa.Table.from_pylist(group, schema))
            if len(group) < ROW_GROUP:
                break
