"""Where query-passage pairs come from: MS MARCO, any Hub dataset, a BEIR folder, or a file. Everything streams."""

import csv
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sentence_transformers_inf.records import read_json_lines

MS_MARCO = "microsoft/ms_marco"
"""Hub id of MS MARCO; its configuration ``v2.1`` is read, and of each query the passages with ``is_selected``."""

_FILES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Pair:
    """A query and a passage that answers it."""

    id: str
    query: str
    passage: str


def read_pairs(
    source: str | Path,
    *,
    query_column: str = "query",
    passage_column: str = "passage",
    split: str = "train",
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> Iterator[Pair]:
    """Read query-passage pairs, one at a time.

    Args:
        source: ``microsoft/ms_marco``, the id of a Hub dataset with a query and a passage column, a BEIR folder
            (``queries.jsonl``, ``corpus.jsonl`` and ``qrels.tsv`` or ``qrels/SPLIT.tsv``), or a ``.jsonl``, ``.csv`` or
            ``.parquet`` file of pairs. A column ``id``, if there is one, names the pairs; else their row does.
        query_column, passage_column: Of a Hub dataset or a file.
        split: Of a Hub dataset or of a BEIR folder's qrels.
        limit: Read the first so many pairs only.
        sample: Take so many pairs at random from all that were read (reservoir sampling, order of the source kept).
        seed: Of the sample.

    Yields:
        The pairs, in the order of the source.

    Raises:
        ValueError: No such column, or a query or passage that is missing or empty.
        FileNotFoundError: No such file, folder or Hub dataset.
    """
    for name, value in (("limit", limit), ("sample", sample)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    pairs = islice(_pairs(source, query_column, passage_column, split), limit)
    return pairs if sample is None else _sampled(pairs, sample, seed)


def _pairs(source: str | Path, query_column: str, passage_column: str, split: str) -> Iterator[Pair]:
    path = Path(source)
    if path.is_dir():
        return _beir(path, split)
    if path.is_file():
        if path.suffix not in _FILES:
            raise ValueError(f"{path}: expected {', '.join(_FILES)}, a BEIR folder or a Hub dataset id")
        rows = {".jsonl": read_json_lines, ".csv": read_csv, ".parquet": _parquet_rows}[path.suffix](path)
        return _columns(rows, str(path), query_column, passage_column)
    if path.suffix in _FILES or path.is_absolute() or str(source).count("/") != 1:
        raise FileNotFoundError(f"{source}: no such file or folder")
    if str(source) == MS_MARCO:
        return _ms_marco(split)
    return _columns(_hub_rows(str(source), None, split), str(source), query_column, passage_column)


def _sampled(pairs: Iterator[Pair], size: int, seed: int) -> Iterator[Pair]:
    """Reservoir sampling (Vitter 1985, algorithm R); memory for the sample alone."""
    generator = random.Random(seed)
    reservoir: list[tuple[int, Pair]] = []
    for number, pair in enumerate(pairs):
        if number < size:
            reservoir.append((number, pair))
        elif (place := generator.randint(0, number)) < size:
            reservoir[place] = (number, pair)
    yield from (pair for _, pair in sorted(reservoir, key=lambda item: item[0]))


def _columns(rows: Iterator[dict[str, Any]], name: str, query_column: str, passage_column: str) -> Iterator[Pair]:
    for number, row in enumerate(rows, start=1):
        for column, option in ((query_column, "--query-column"), (passage_column, "--passage-column")):
            if column not in row:
                others = ", ".join(map(str, row))
                raise ValueError(f"{name}, row {number}: there is no column {column!r}; it has {others} (see {option})")
            if not isinstance(row[column], str) or not row[column].strip():
                raise ValueError(f"{name}, row {number}, column {column!r}: the text is missing or empty")
        identifier = number if row.get("id") is None else row["id"]
        yield Pair(str(identifier), row[query_column].strip(), row[passage_column].strip())


def read_csv(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file with a header."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error})") from error
    for batch in file.iter_batches(1000):
        yield from batch.to_pylist()


def _hub_rows(name: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        data = load_dataset(name, config, split=split, streaming=True)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        line = f"{name}: no such file or folder, and no such dataset on the Hub could be read: {error}"
        raise FileNotFoundError(line) from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    yield from data


def _ms_marco(split: str) -> Iterator[Pair]:
    for row in _hub_rows(MS_MARCO, "v2.1", split):
        passages = row["passages"]
        for number, (selected, text) in enumerate(zip(passages["is_selected"], passages["passage_text"])):
            if selected and text.strip() and row["query"].strip():
                yield Pair(f"{row['query_id']}-{number}", row["query"].strip(), text.strip())


def _beir(folder: Path, split: str) -> Iterator[Pair]:
    """Pairs of a BEIR folder (Thakur et al. 2021): qrels with a positive score. The corpus is kept on disk."""
    for name in ("queries.jsonl", "corpus.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: a BEIR folder has {name}, and this one does not")
    places = (folder / "qrels" / f"{split}.tsv", folder / "qrels.tsv", folder / f"qrels.{split}.tsv")
    qrels = next((path for path in places if path.is_file()), None)
    if qrels is None:
        raise ValueError(f"{folder}: a BEIR folder has qrels/{split}.tsv or qrels.tsv, and this one does not")
    with closing(sqlite3.connect("")) as texts:  # a temporary database on disk: a corpus may be larger than memory
        texts.execute("CREATE TABLE text (kind TEXT, id TEXT, text TEXT, PRIMARY KEY (kind, id)) WITHOUT ROWID")
        for kind in ("queries", "corpus"):
            path = folder / f"{kind}.jsonl"
            for number, row in enumerate(read_json_lines(path), start=1):
                if "_id" not in row or not isinstance(row.get("text"), str):
                    raise ValueError(f"{path}, row {number}: expected the columns '_id' and 'text'")
                text = f"{row.get('title') or ''} {row['text']}".strip()
                texts.execute("INSERT OR REPLACE INTO text VALUES (?, ?, ?)", (kind, str(row["_id"]), text))
        with qrels.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                cells = line.split()
                if len(cells) == 4:  # TREC: query, 0, passage, score
                    cells = [cells[0], cells[2], cells[3]]
                if len(cells) != 3:
                    raise ValueError(f"{qrels}, row {number}: expected query id, passage id and score")
                if number == 1 and not cells[2].lstrip("-").isdigit():
                    continue  # the header
                if int(cells[2]) <= 0:
                    continue
                found = []
                for kind, identifier in (("queries", cells[0]), ("corpus", cells[1])):
                    row = texts.execute("SELECT text FROM text WHERE kind = ? AND id = ?", (kind, identifier)).fetchone()
                    if row is None or not row[0]:
                        raise ValueError(f"{qrels}, row {number}: {kind}.jsonl has no text for {identifier!r}")
                    found.append(row[0])
                yield Pair(f"{cells[0]}-{cells[1]}", *found)
