"""The InF-IR record: its columns, reading and checking it, and the columns that the losses train on.

A record is three aligned rows, (q+, I+, d+), (q+, I-, d1) and (q-, I+, d2), each the hard negative of the others
(Zhuang et al. 2025, arXiv:2505.21439, §3). Column names are those of the published dataset, ``InF-IR/InF-IR``.
"""

import functools
import hashlib
import importlib.resources
import json
import re
import shlex
import zlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow
import yaml
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    Value,
    get_dataset_split_names,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from sentence_transformers_inf.compat import HTTPError
from sentence_transformers_inf.generated import Versions, generated, sound
from sentence_transformers_inf.reading import COMPRESSIONS, FORMATS, RecordError, find_file, format_of, is_table, read_table

QUERY_COLUMNS = ("query_positive", "query_negative")
INSTRUCTION_COLUMNS = ("instruction_positive", "instruction_negative")
PASSAGE_COLUMNS = ("document", "hard_negative_document_1", "hard_negative_document_2")
REQUIRED_COLUMNS = (*QUERY_COLUMNS, *INSTRUCTION_COLUMNS, *PASSAGE_COLUMNS)
OPTIONAL_COLUMNS = ("id", "topic", "instruction_type")

FEATURES = Features({name: Value("string") for name in (*OPTIONAL_COLUMNS, *REQUIRED_COLUMNS)})
"""The ``datasets`` features of a record with all its columns."""

INSTRUCTION_TYPES = {
    "audience": "for whom the text is written: age, profession, knowledge, situation",
    "format": "the shape of the text: steps, a list, a table in words, a story, questions and answers",
    "length": "how long or how detailed the text is",
    "source": "what kind of source it comes from or rests on: studies, official bodies, first-hand reports, makers",
    "temporal": "the period it speaks of, or how recent it is",
    "geographic": "the country, region or place it applies to",
    "perspective": "the point of view or side that it takes",
    "exclusion": "what the text must leave out or must not recommend",
    "specificity": "whether it is general or goes into one particular case or mechanism",
    "entity": "the person, product, organisation, species or work that it must be about",
    "numeric": "figures, amounts, limits or units that it must give or keep to",
    "purpose": "what the reader will use it for",
}
"""The 12 types of instructions, and what each requires, as the builder's prompts say it."""

TRIPLES = (
    ("query_positive", "instruction_positive", "document"),
    ("query_positive", "instruction_negative", "hard_negative_document_1"),
    ("query_negative", "instruction_positive", "hard_negative_document_2"),
)
"""The three aligned rows of a record, each as the columns of its query, instruction and passage."""

TWIN_QUERY_COLUMNS = ("query_negative", "hard_negative_document_2")
"""The columns of the third row. Both are null in a record that has no twin query: it has the first two rows alone."""

TRAINING_COLUMNS = ("instructed_query", "poisoned_instruction", "poisoned_query")
"""The instructed queries of :func:`training_dataset`, in the order of :data:`TRIPLES`."""

ROW_COLUMNS = ("instruction", "query", "passage", "negative")
"""The columns of the rows of other corpora; see :mod:`~sentence_transformers_inf.corpora`."""

_ANEW = "reuse_cache_if_exists"  # for datasets: make a dataset again, of the files that were downloaded
_AT = " @ "
"""Between a source and its revision."""

_QUERY_NAMES, _PASSAGE_NAMES = ("query", "question", "anchor"), ("passage", "document", "positive", "answer", "text")
"""What the columns of pairs are called, here and there."""

_A_PAIR = {"query": "", "passage": ""}

Rows: TypeAlias = Iterator[tuple[str, dict[str, Any]]]
"""Rows with their places."""


def triples_of(record: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """The rows that a record has: :data:`TRIPLES`, or the first two of them where there is no twin query."""
    return TRIPLES if record[TWIN_QUERY_COLUMNS[0]] is not None else TRIPLES[:2]


def load_records(source: str | Path, split: str | None = None) -> Dataset:
    """Read InF-IR records and check every one.

    Args:
        source: ``"mini"`` (the bundled corpus); a file (:func:`~sentence_transformers_inf.reading.read_table`); a folder of
            such files named after their splits (``train.jsonl``, ``train-00000-of-00002.parquet``), laid out as on the Hub,
            or written by ``save_to_disk``; or the id of a dataset on the Hub.
        split: Which split (``"train"``, ``"validation"``, ``"test"`` ...). ``None``: the only split there is.

    Returns:
        A memory-mapped dataset with the required columns and those optional ones (``id``, ``topic``,
        ``instruction_type``) that have a value; numbers there become text. Further columns are left out.

    Raises:
        RecordError: A column is missing, a value is null or blank (both :data:`TWIN_QUERY_COLUMNS` may be null), a record
            has the same query or instruction on both sides, there is no such split, or none was named and there are
            several. Nothing is dropped silently.
        FileNotFoundError: No such file, folder or Hub dataset.
    """
    name, part = _find(source, split)
    where, first = next(_rows(name, part, FEATURES), (name, None))
    if first is not None and not set(REQUIRED_COLUMNS) <= set(first):
        where, first = next(_rows(name, part))  # all its columns, for the message
    if first is None:
        raise RecordError(f"{name}: there are no records in it; name other data")
    to_record(first, where)
    data = generated(_read_records, part, FEATURES) if isinstance(part, list) else _checked(part, name)
    unused = [column for column in OPTIONAL_COLUMNS if column in data.column_names and _is_null(data, column)]
    return with_source(data.remove_columns(unused), source)


def is_on_hub(source: str | Path) -> bool:
    """Whether a source of records is a dataset on the Hub, and not the bundled corpus, a file or a folder."""
    return _locate(source)[1] is None


@dataclass(frozen=True)
class Source:
    """Where records came from."""

    name: str
    """As it was given: ``"mini"``, a path, or an id on the Hub."""
    on_hub: bool
    revision: str | None
    """The commit of a dataset on the Hub."""


def source_of(data: Dataset) -> Source | None:
    """Where records or rows were read from, also of a part of them; ``None`` for data that were made otherwise."""
    name, at, revision = str(data.info.dataset_name or "").partition(_AT)
    return Source(name, bool(revision), revision.strip("?") or None) if at else None


def with_source(data: Dataset, source: str | Path) -> Dataset:
    """Note in data where they were read from, for :func:`source_of`."""
    revision = ""
    if is_on_hub(source):
        try:
            revision = HfApi().dataset_info(str(source)).sha or "?"
        except (HTTPError, OfflineModeIsEnabled):
            revision = "?"  # read from the cache
    data.info.dataset_name = f"{source}{_AT}{revision}"
    return data


def record_splits(source: str | Path) -> list[str]:
    """The names of the splits of a source of records; see :func:`load_records`.

    Raises:
        FileNotFoundError: No such file, folder or Hub dataset.
    """
    name, parts = _locate(source)
    if parts is not None:
        return list(parts)
    try:
        return list(get_dataset_split_names(name))
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source}: no such file or folder, and no such dataset could be read from the Hugging Face Hub (pass 'mini' "
            f"for the bundled corpus): {error}"
        ) from error
    except ValueError as error:
        raise RecordError(f"{source}: {error}") from error


def training_dataset(records: Dataset, instructions: bool = True) -> Dataset:
    """The columns that the losses train on.

    Args:
        records: Records as :func:`load_records` returns them, or rows as :func:`load_rows` does.
        instructions: With ``False``, all instructions are blank: the bare queries, with the same passages.

    Returns:
        One row per record with the columns ``instructed_query``, ``poisoned_instruction``, ``poisoned_query`` (each
        ``{"instruction": str, "query": str}``), ``document``, ``hard_negative_document_1`` and
        ``hard_negative_document_2``. A batch of B rows is a batch of 3·B aligned triples. Of rows: ``instructed_query``,
        ``document`` and ``hard_negative_document_1``, which is the document itself, and so no negative, where there is none.
        A record without a twin query repeats one of its two rows in the third place; the document decides which.
    """
    of_rows = set(ROW_COLUMNS) <= set(records.column_names)
    pairs, passages = TRAINING_COLUMNS[: 1 if of_rows else 3], PASSAGE_COLUMNS[: 2 if of_rows else 3]

    def view(row: dict[str, str]) -> dict[str, Any]:
        if of_rows:
            triples, texts = [("query", "instruction", "passage")], [row["passage"], row["negative"] or row["passage"]]
        else:
            triples = list(triples_of(row))
            if len(triples) < len(TRIPLES):
                triples.append(triples[zlib.crc32(row["document"].encode()) % len(triples)])
            texts = [row[passage] for *_, passage in triples]
        instructed = [
            {"instruction": row[instruction] if instructions else "", "query": row[query]}
            for query, instruction, _ in triples
        ]
        return dict(zip((*pairs, *passages), (*instructed, *texts)))

    pair = {"instruction": Value("string"), "query": Value("string")}
    features = Features({**dict.fromkeys(pairs, pair), **dict.fromkeys(passages, Value("string"))})
    return records.map(view, remove_columns=records.column_names, features=features, desc="Training view")


def read_rows(source: str | Path, split: str | None = None, stream: bool = False) -> tuple[str, Rows]:
    """A source's name for messages, and its rows as they are, each with its place: ``FILE, row 7``.

    A dataset on the Hub is not downloaded as a whole where ``stream`` is asked for.

    Raises:
        RecordError, FileNotFoundError: As for :func:`load_records`.
    """
    name, part = _find(source, split, stream)
    return name, _rows(name, part)


def to_record(row: dict[str, Any], where: str) -> dict[str, str | None]:
    """The columns of a record in a row, all of them text; where an optional one is missing or blank, ``None``.

    Raises:
        RecordError: The row is no record.
    """
    if missing := [column for column in REQUIRED_COLUMNS if column not in row]:
        source = where.rpartition(", row ")[0]
        place = where if format_of(source) in (".jsonl", ".json") else source
        raise RecordError(f"{place}: the column {missing[0]!r} is missing; it has {', '.join(row)}{pairs_hint(row, source)}")
    if problem := _problem(row):
        raise RecordError(f"{where}, column {problem}; mend the row, or take it out")
    optional = {name: None if row.get(name) in (None, "") else str(row[name]) for name in OPTIONAL_COLUMNS}
    return optional | {name: row[name] or None for name in REQUIRED_COLUMNS}


def pairs_hint(row: dict[str, Any], source: str) -> str:
    """Where a row is a pair of query and passage: the command that builds records of them, as a sentence."""
    names = [next((name for name in known if name in row), None) for known in (_QUERY_NAMES, _PASSAGE_NAMES)]
    if None in names:
        return ""
    source = source if Path(source).exists() else source.partition(" (")[0]  # without a split on the Hub
    options = [f"--{kind}-column {name}" for kind, name in zip(("query", "passage"), names) if name != kind]
    command = " ".join(["inf-ir build --pairs", shlex.quote(source), *options, "--output my-data"])
    return f". These are pairs of query and passage; first build records of them: {command}"


def records_digest(records: Dataset) -> str:
    """A fingerprint of records or rows, for recipes."""
    digest = hashlib.sha256()
    for batch in records.iter(1000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _find(source: str | Path, split: str | None, stream: bool = False) -> tuple[str, list[Path] | Dataset | IterableDataset]:
    """A split of a source, with its name for messages."""
    name, parts = _locate(source)
    if parts is None:
        of_split = functools.partial(load_dataset, name, split=_choose_split(name, record_splits(source), split))
        try:
            data = (
                of_split(streaming=True) if stream else sound(lambda anew: of_split(download_mode=_ANEW if anew else None))
            )
        except DatasetGenerationError as error:
            raise RecordError(f"{name}: {error.__cause__ or error}") from error
        return name if split is None else f"{name} ({split})", data
    part = parts[_choose_split(name, list(parts), split)]
    return str(part[0]) if isinstance(part, list) and len(part) == 1 else name, part


def _rows(name: str, part: list[Path] | Dataset | IterableDataset, columns: Container[str] | None = None) -> Rows:
    if isinstance(part, list):
        return chain.from_iterable(read_table(path, columns) for path in part)
    return ((f"{name}, row {number}", row) for number, row in enumerate(part, start=1))


def _locate(source: str | Path) -> tuple[str, dict[str, list[Path]] | None]:
    """The name of a source for messages, and its splits; ``None`` where it can only be a Hub dataset."""
    path = Path(str(importlib.resources.files("dataset_builder") / "data")) if source == "mini" else Path(source)
    if path.is_file():
        if not is_table(path):
            next(read_table(path))  # says what it may be
        return str(path), {_split_of(path): [path]}
    if path.is_dir() and str(source):
        return str(source), _parts_of(path)
    if is_table(path) or str(source).count("/") > 1 or path.is_absolute() or not str(source).strip():
        raise FileNotFoundError(f"{source or repr('')}: no such file or folder; check the path")
    return str(source), None


def _parts_of(folder: Path) -> dict[str, list[Path]]:
    """The splits in a folder."""
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _saved(folder)
    if find_file(folder, "queries.jsonl") and find_file(folder, "corpus.jsonl"):
        raise RecordError(f"{folder}: a corpus in BEIR's layout, and no records{pairs_hint(_A_PAIR, str(folder))}")
    readme = folder / "README.md"
    if readme.is_file() and re.search("^configs:", readme.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
        return _snapshot(folder)
    tables = [path for path in sorted(folder.iterdir()) if path.is_file() and format_of(path) in FORMATS[:4]]
    if any(format_of(path) in FORMATS[:2] for path in tables):  # a build has a table of its outcomes beside the records
        tables = [path for path in tables if format_of(path) in FORMATS[:2]]
    files: dict[str, list[Path]] = {}
    for path in tables:
        of_split = files.setdefault(_split_of(path), [])
        of_split.append(path)
        if format_of(path) != format_of(of_split[0]):
            both = f"{format_of(of_split[0])} and as {format_of(path)}"
            raise RecordError(f"{folder}: the split {_split_of(path)!r} is there both as {both}")
    return files or _snapshot(folder)


def _split_of(path: Path) -> str:
    name = path.name[: -len(path.suffix)] if path.suffix.lower() in COMPRESSIONS else path.name
    return Path(name).stem.split("-")[0]


def _saved(folder: Path) -> dict[str, list[Path]]:
    """What ``save_to_disk`` wrote."""
    try:
        data = load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        raise RecordError(f"{folder}: cannot be read as save_to_disk writes it ({error!r}); save it again") from error
    splits = {str(data.split or "train"): data} if isinstance(data, Dataset) else data
    return {name: [Path(file["filename"]) for file in split.cache_files] for name, split in splits.items()}


def _snapshot(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by split, as ``load_dataset`` finds them."""
    try:
        found = load_dataset_builder(str(folder)).config.data_files
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError, DatasetsError) as error:
        line = f"{folder}: the folder holds no .jsonl or .parquet file (nor .csv or .tsv), and load_dataset reads none"
        raise RecordError(f"{line}: {error}") from error
    return {str(split): [Path(path) for path in paths] for split, paths in (found or {}).items()}


def _choose_split(name: str, splits: list[str], split: str | None) -> str:
    if len(splits) == 1 and split is None:
        return splits[0]
    if split is None:
        raise RecordError(f"{name}: name a split, one of {', '.join(splits)}")
    if split not in splits:
        raise RecordError(f"{name}: there is no split {split!r}; it has {', '.join(splits)}")
    return split


def _read_records(versions: Versions) -> Iterator[dict[str, str | None]]:
    for path, *_ in versions:
        for where, row in read_table(Path(path), FEATURES):
            yield to_record(row, where)


def _checked(data: Dataset, name: str) -> Dataset:
    data = data.select_columns([column for column in FEATURES if column in data.column_names])
    rows = (row for batch in data.with_format("arrow").iter(1000) for row in batch.to_pylist())
    for number, row in enumerate(rows, start=1):
        to_record(row, f"{name}, row {number}")
    return data.cast(Features({column: FEATURES[column] for column in data.column_names}))


def _is_null(data: Dataset, column: str) -> bool:
    return bool(data.data.column(column).null_count == len(data))


def _problem(record: dict[str, Any]) -> str | None:
    """The first column of a record that is wrong, and what is."""
    for column in OPTIONAL_COLUMNS:
        if not isinstance(value := record.get(column), str | int | float | None):
            return f"{column!r}: expected text or a number, got {type(value).__name__}"
    twins = [column for column in TWIN_QUERY_COLUMNS if record[column] not in (None, "")]
    if len(twins) == 1:
        other = next(column for column in TWIN_QUERY_COLUMNS if column not in twins)
        return f"{other!r}: the value is missing, and {twins[0]!r} is not; a record has both or neither"
    for column in REQUIRED_COLUMNS:
        if column in TWIN_QUERY_COLUMNS and not twins:
            continue
        value = record[column]
        if value is None:
            return f"{column!r}: the value is null"
        if not isinstance(value, str):
            return f"{column!r}: expected text, got {type(value).__name__}"
        if not value.strip():
            return f"{column!r}: the text is empty"
    for positive, negative in (QUERY_COLUMNS, INSTRUCTION_COLUMNS):
        if record[negative] and record[positive].strip() == record[negative].strip():
            return f"{negative!r}: the text is the same as in {positive!r}"
    return None
