"""The folder of a build: its lock, and its tables."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from filelock import FileLock, Timeout

from sentence_transformers_inf.recipe import replacing

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


def write_parquet(path: Path, features: Features, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows into a Parquet file, as a whole; columns that a row lacks are null, others are left out."""
    with parquet_writer(path, features) as write:
        for row in rows:
            write(row)


@contextlib.contextmanager
def parquet_writer(path: Path, features: Features) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one row after the other into a Parquet file, as :func:`write_parquet` does."""
    schema = features.arrow_schema.remove_metadata()
    group: list[dict[str, Any]] = []
    with replacing(path) as part, pq.ParquetWriter(part, schema, compression="zstd", write_page_checksum=True) as writer:

        def write(row: dict[str, Any]) -> None:
            group.append({name: row.get(name) for name in features})
            if len(group) == ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group.clear()

        yield write
        writer.write_table(pa.Table.from_pylist(group, schema))
