"""Where query-passage pairs come from: MS MARCO, any Hub dataset, a BEIR folder, or a file. Everything streams."""

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sentence_transformers_inf.corpora import passage_of, read_passages
from sentence_transformers_inf.reading import find_file, is_table, read_beir_texts, read_qrels, read_table, text_in

MS_MARCO = "microsoft/ms_marco"
"""Hub id of MS MARCO; its configuration ``v2.1`` is read, and of each query the passages with ``is_selected``."""


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
            (``queries.jsonl``, ``corpus.jsonl`` and ``qrels.tsv`` or ``qrels/SPLIT.tsv``), or a table of pairs
            (:func:`~sentence_transformers_inf.reading.read_table`). A column ``id``, if there is one, names the pairs; else
            their row does.
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


def read_corpus(source: str | Path, split: str = "train") -> Iterator[str]:
    """Read the passages of a corpus, one at a time.

    Args:
        source: A BEIR folder (its ``corpus.jsonl``), a file as :func:`~sentence_transformers_inf.corpora.read_passages` has
            it, or the id of a Hub dataset with a column ``text``, ``passage`` or ``document``.
        split: Of a Hub dataset.

    Raises:
        ValueError: No such column, an empty passage, or a file with fewer than two.
        FileNotFoundError: No such file, folder or Hub dataset.
    """
    path = Path(source)
    if path.is_dir():
        if (corpus := find_file(path, "corpus.jsonl")) is None:
            raise ValueError(
                f"{path}: a BEIR folder has corpus.jsonl, and this one does not; name a file, or another folder"
            )
        yield from read_passages(corpus)
    elif path.is_file() or is_table(path) or path.is_absolute() or str(source).count("/") != 1:
        yield from read_passages(path)
    else:
        for number, row in enumerate(_hub_rows(str(source), None, split), start=1):
            yield passage_of(row, f"{source}, row {number}")


def _pairs(source: str | Path, query_column: str, passage_column: str, split: str) -> Iterator[Pair]:
    path = Path(source)
    if path.is_dir() and str(source):
        return _beir(path, split)
    if path.is_file():
        named = {query_column, passage_column}
        _, first = next(read_table(path, named), ("", {}))
        return _columns(read_table(path, {"id", *named} if named <= first.keys() else None), query_column, passage_column)
    if is_table(path) or path.is_absolute() or str(source).count("/") != 1:
        raise FileNotFoundError(f"{source}: no such file or folder; check the path")
    if str(source) == MS_MARCO:
        return _ms_marco(split)
    rows = _hub_rows(str(source), None, split)
    placed = ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))
    return _columns(placed, query_column, passage_column)


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


def _columns(rows: Iterator[tuple[str, dict[str, Any]]], query_column: str, passage_column: str) -> Iterator[Pair]:
    for number, (where, row) in enumerate(rows, start=1):
        for column, option in ((query_column, "--query-column"), (passage_column, "--passage-column")):
            if column not in row:
                others = ", ".join(map(str, row))
                raise ValueError(f"{where}: there is no column {column!r}; it has {others} (see {option})")
            if not text_in(row, column, where).strip():
                raise ValueError(f"{where}, column {column!r}: the text is missing or empty; mend the row, or take it out")
        identifier = number if row.get("id") is None else row["id"]
        yield Pair(str(identifier), row[query_column].strip(), row[passage_column].strip())


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
    names = [["queries.jsonl"], ["corpus.jsonl"], [f"qrels/{split}.tsv", "qrels.tsv", f"qrels.{split}.tsv"]]
    paths = [find_file(folder, *of_one) for of_one in names]
    if None in paths:
        raise ValueError(f"{folder}: a BEIR folder has {' or '.join(names[paths.index(None)][:2])}, and this one does not")
    queries, corpus, qrels = (path for path in paths if path is not None)
    with closing(sqlite3.connect("")) as texts:  # a temporary database on disk: a corpus may be larger than memory
        texts.execute("CREATE TABLE text (kind TEXT, id TEXT, text TEXT, PRIMARY KEY (kind, id)) WITHOUT ROWID")
        for kind, path in (("queries", queries), ("corpus", corpus)):
            rows = ((kind, identifier, text) for _, identifier, text in read_beir_texts(path))
            texts.executemany("INSERT OR REPLACE INTO text VALUES (?, ?, ?)", rows)
        for where, query, passage, score in read_qrels(qrels):
            if score <= 0:
                continue
            pair = []
            for kind, identifier in (("queries", query), ("corpus", passage)):
                row = texts.execute("SELECT text FROM text WHERE kind = ? AND id = ?", (kind, identifier)).fetchone()
                if row is None or not row[0]:
                    raise ValueError(f"{where}: {kind}.jsonl has no text for {identifier!r}")
                pair.append(row[0])
            yield Pair(f"{query}-{passage}", *pair)
