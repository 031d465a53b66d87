"""The InF-IR record: its columns, reading and checking it, and the columns that the losses train on.

A record is three aligned rows, (q+, I+, d+), (q+, I-, d1) and (q-, I+, d2), each the hard negative of the others
(Zhuang et al. 2025, arXiv:2505.21439, §3). Column names are those of the published dataset, ``InF-IR/InF-IR``.
"""

import importlib.resources
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, Features, IterableDataset, Value, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from sentence_transformers_inf.compat import HTTPError

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

_AT = " @ "
"""Between a source and its revision."""


def triples_of(record: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """The rows that a record has: :data:`TRIPLES`, or the first two of them where there is no twin query."""
    return TRIPLES if record[TWIN_QUERY_COLUMNS[0]] is not None else TRIPLES[:2]


class RecordError(ValueError):
    """Data that are not InF-IR records; the message names the source, the row and the column."""


def load_records(source: str | Path, split: str | None = None) -> Dataset:
    """Read InF-IR records and check every one.

    Args:
        source: ``"mini"`` (the bundled corpus), a ``.jsonl`` or ``.parquet`` file, a folder of such files named after
            their splits (``train.jsonl``, ``train-00000-of-00002.parquet``), or the id of a dataset on the Hub.
        split: Which split (``"train"``, ``"validation"``, ``"test"`` ...). ``None``: the only split there is.

    Returns:
        A memory-mapped dataset with the required columns and those optional ones (``id``, ``topic``,
        ``instruction_type``) that the source has. Further columns are left out.

    Raises:
        RecordError: A column is missing, a value is null or blank (both :data:`TWIN_QUERY_COLUMNS` may be null), a record
            has the same query or instruction on both sides, there is no such split, or none was named and there are
            several. Nothing is dropped silently.
        FileNotFoundError: No such file, folder or Hub dataset.
    """
    return with_source(checked(*read_source(source, split, REQUIRED_COLUMNS)), source)


def is_on_hub(source: str | Path) -> bool:
    """Whether a source of records is a dataset on the Hub, and not the bundled corpus, a file or a folder."""
    return _files_of(source)[1] is None


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
    name, files = _files_of(source)
    if files is not None:
        return list(files)
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


def read_source(
    source: str | Path, split: str | None, columns: tuple[str, ...], stream: bool = False
) -> tuple[Dataset | IterableDataset, str]:
    """A source as it is, with its name for messages; ``columns`` must be in every line of JSON Lines.

    A dataset on the Hub is not downloaded as a whole where ``stream`` is asked for.
    """
    name, files = _files_of(source)
    if files is None:
        data = load_dataset(name, split=_choose_split(name, record_splits(source), split), streaming=stream)
        return data, name if split is None else f"{name} ({split})"
    paths = files[_choose_split(name, list(files), split)]
    builder = "json" if paths[0].suffix == ".jsonl" else "parquet"
    for path in paths if builder == "json" else ():
        for number, record in enumerate(read_json_lines(path), start=1):
            if missing := [column for column in columns if column not in record]:
                raise RecordError(f"{path}, row {number}: the column {missing[0]!r} is missing")
    try:  # without files that have no rows: datasets fails on them
        sizes = [
            path.stat().st_size if builder == "json" else pyarrow.parquet.read_metadata(path).num_rows for path in paths
        ]
        filled = [str(path) for path, size in zip(paths, sizes) if size]
        data = load_dataset(builder, data_files=filled, split="train") if filled else None
    except Exception as error:  # datasets wraps whatever its readers raise in an error of its own
        raise RecordError(f"{paths[0]}: cannot be read as {builder}: {error.__cause__ or error}") from error
    if data is None:
        raise RecordError(f"{paths[0]}: there are no records in it")
    return data, str(paths[0]) if len(paths) == 1 else name


def columns_of(data: Dataset | IterableDataset) -> set[str]:
    return set(data.column_names or next(iter(data), ()))  # a stream may learn its columns only from its first example


def _files_of(source: str | Path) -> tuple[str, dict[str, list[Path]] | None]:
    """The name of a source for messages, and its files by split; ``None`` where it can only be a Hub dataset."""
    path = Path(str(importlib.resources.files("dataset_builder") / "data")) if source == "mini" else Path(source)
    if path.is_file():
        if path.suffix not in (".jsonl", ".parquet"):
            raise RecordError(f"{path}: expected a .jsonl or .parquet file")
        return str(path), {path.stem.split("-")[0]: [path]}
    if path.is_dir():
        files: dict[str, list[Path]] = {}
        for file in sorted([*path.glob("*.jsonl"), *path.glob("*.parquet")]):
            files.setdefault(file.stem.split("-")[0], []).append(file)
        if not files:
            raise RecordError(f"{path}: the folder holds no .jsonl or .parquet file")
        for split, of_split in files.items():
            if len({file.suffix for file in of_split}) > 1:
                raise RecordError(f"{path}: the split {split!r} is there both as .jsonl and as .parquet")
        return str(source), files
    if path.suffix in (".jsonl", ".parquet") or str(source).count("/") > 1 or path.is_absolute():
        raise FileNotFoundError(f"{source}: no such file or folder")
    return str(source), None


def _choose_split(name: str, splits: list[str], split: str | None) -> str:
    if len(splits) == 1 and split is None:
        return splits[0]
    if split is None:
        raise RecordError(f"{name}: name a split, one of {', '.join(splits)}")
    if split not in splits:
        raise RecordError(f"{name}: there is no split {split!r}; it has {', '.join(splits)}")
    return split


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file; a :class:`RecordError` names the line that is none."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise RecordError(f"{path}, row {number}: not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise RecordError(f"{path}, row {number}: expected a JSON object, got {type(row).__name__}")
            yield row


def checked(data: Dataset, name: str) -> Dataset:
    if missing := [column for column in REQUIRED_COLUMNS if column not in data.column_names]:
        raise RecordError(
            f"{name}: the column {missing[0]!r} is missing; it has {', '.join(data.column_names) or 'no columns'}"
        )
    data = data.select_columns([column for column in FEATURES if column in data.column_names])
    rows = (row for batch in data.with_format("arrow").iter(1000) for row in batch.to_pylist())
    for number, record in enumerate(rows, start=1):
        if problem := _problem(record):
            raise RecordError(f"{name}, row {number}, column {problem}")
    if not len(data):
        raise RecordError(f"{name}: there are no records in it")
    return data.cast(Features({column: FEATURES[column] for column in data.column_names}))


def _problem(record: dict[str, Any]) -> str | None:
    """The first column of a record that is wrong, and what is."""
    twins = [column for column in TWIN_QUERY_COLUMNS if record[column] is not None]
    if len(twins) == 1:
        other = next(column for column in TWIN_QUERY_COLUMNS if column not in twins)
        return f"{other!r}: the value is null, and {twins[0]!r} is not; a record has both or neither"
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
        if record[negative] is not None and record[positive].strip() == record[negative].strip():
            return f"{negative!r}: the text is the same as in {positive!r}"
    return None
