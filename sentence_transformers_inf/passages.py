"""Passages that are encoded once: the corpus of a training run whose passage side stays as it is."""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from filelock import FileLock
from huggingface_hub import cached_assets_path
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from sentence_transformers_inf.modules import check_embeddings, read_array
from sentence_transformers_inf.modules.fingerprint import embedding_settings, fingerprint
from sentence_transformers_inf.reading import text_in
from sentence_transformers_inf.records import PASSAGE_COLUMNS, read_rows, record_splits

_BLOCK = 1024
"""Passages encoded and written at a time."""


def distinct_passages(splits: Sequence[Dataset]) -> list[str]:
    """The distinct passages of some splits of records or of their training views, in the order in which they occur."""
    return list(dict.fromkeys(passage for records in splits for passage in _passages(records)))


def passage_rows(records: Dataset, passages: Sequence[str]) -> NDArray[np.int64]:
    """Where the passages d+, d1, d2 of N records or rows of a training view stand among ``passages`` (N×3, or N×2).

    A record without a twin query has d+ once more in the place of d2.
    """
    row_of = {passage: row for row, passage in enumerate(passages)}
    return np.array([row_of[passage] for passage in _passages(records)], dtype=np.int64).reshape(len(records), -1)


def _passages(records: Dataset) -> list[str]:
    columns = [records[name] for name in PASSAGE_COLUMNS if name in records.column_names]
    return [record[0] if passage is None else passage for record in zip(*columns) for passage in record]


def encode_passages(
    model: SentenceTransformer, passages: Sequence[str], batch_size: int = 32, show_progress: bool = False
) -> NDArray[np.float32]:
    """The embeddings (N×d, memory-mapped) of passages, kept in the Hub's cache for the same model and passages.

    An interrupted call leaves what it has encoded, and the next goes on from there.

    Args:
        model: The model that the passages' index was made with.
        passages: N texts, of which ``batch_size`` are encoded at a time.
    """
    settings = {**embedding_settings(model), "prompts": model.prompts, "max_seq_length": model.max_seq_length}
    digest = hashlib.sha256(f"{fingerprint(model)} {json.dumps(settings, sort_keys=True)}".encode())
    for passage in passages:
        digest.update(passage.encode() + b"\0")
    folder = cached_assets_path("sentence-transformers-inf", namespace="passages")
    path = folder / f"{digest.hexdigest()[:24]}.npy"
    partial, shape = path.with_suffix(".partial"), (len(passages), int(model.get_embedding_dimension() or 0))
    with FileLock(path.with_suffix(".lock")):  # the processes of one run want the same passages
        if not _holds(path, shape):
            _encode_into(partial, shape, model, passages, batch_size, show_progress)
            check_embeddings(np.load(partial, mmap_mode="c"), passages, "passages")
            partial.replace(path)
    return np.load(path, mmap_mode="c")  # writable for PyTorch; the file stays as it is


def _holds(path: Path, shape: tuple[int, int]) -> bool:
    """Whether a file holds vectors of a shape: it is there, and not damaged."""
    try:
        vectors = read_array(path)
    except (FileNotFoundError, ValueError):
        return False
    return vectors.shape == shape and vectors.dtype == np.float32


def _encode_into(
    path: Path,
    shape: tuple[int, int],
    model: SentenceTransformer,
    passages: Sequence[str],
    batch_size: int,
    show_progress: bool,
) -> None:
    """Write the vectors of passages as a ``.npy`` file, after the blocks of them that are in it already."""
    header = io.BytesIO()
    write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    start, row = len(header.getvalue()), 4 * shape[1]
    with path.open("r+b" if path.exists() else "w+b") as file:
        blocks = (path.stat().st_size - start) // (row * _BLOCK) if file.read(start) == header.getvalue() else 0
        done = blocks * _BLOCK
        file.seek(0)
        file.write(header.getvalue())
        file.seek(start + done * row)
        file.truncate()
        with tqdm(total=len(passages), initial=done, desc="Passages", disable=not show_progress) as bar:
            for first in range(done, len(passages), _BLOCK):
                block = list(passages[first : first + _BLOCK])
                vectors = model.encode_document(block, batch_size=batch_size, show_progress_bar=False)
                file.write(np.asarray(vectors, dtype="<f4").tobytes())
                file.flush()
                os.fsync(file.fileno())
                bar.update(len(block))


def read_passage_embeddings(source: str | Path, passages: Sequence[str]) -> NDArray[np.float32]:
    """Embeddings (N×d) of passages that were made elsewhere.

    Args:
        source: A ``.npy`` file with one row for each of ``passages``, in their order; or a Parquet file or a dataset on the
            Hub (its first split) with the columns ``text`` and ``embedding``, in any order.
        passages: N texts.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, the rows are not as many as the passages, a column or a passage is missing, or a value is
            not finite.
    """
    if Path(source).suffix == ".npy":
        vectors = read_array(source)
        if vectors.ndim != 2 or len(vectors) != len(passages) or not vectors.size:
            raise ValueError(
                f"{source}: expected a row for each of the {len(passages)} passages, in the order of `inf-embed passages`, "
                f"got the shape {vectors.shape}"
            )
    else:
        vectors = _read_embeddings(source, passages)
    for start in range(0, len(vectors), 65_536):
        if not np.isfinite(vectors[start : start + 65_536]).all():
            raise ValueError(f"{source}: there are values that are not finite numbers")
    return vectors


def check_dimension(source: str | Path, vectors: NDArray[np.float32], model: SentenceTransformer) -> None:
    """Refuse passages' vectors (N×d) that cannot be compared with a model's queries.

    Raises:
        ValueError: d is not the model's dimension; the message names the source.
    """
    if vectors.shape[1] != (dimension := model.get_embedding_dimension()):
        raise ValueError(
            f"{source}: the vectors have {vectors.shape[1]} dimensions, and the model's have {dimension}: make them with "
            "its base"
        )


def _read_embeddings(source: str | Path, passages: Sequence[str]) -> NDArray[np.float32]:
    """The embeddings (N×d) of passages in a table with the columns ``text`` and ``embedding``."""
    missing = {passage: row for row, passage in enumerate(passages)}
    vectors = np.empty((len(passages), 0), np.float32)
    for where, row in read_rows(source, record_splits(source)[0], stream=True)[1]:
        for column in ("text", "embedding"):
            if column not in row:
                raise ValueError(f"{source}: the column {column!r} is missing; it has {', '.join(row)}")
        if (text := text_in(row, "text", where)) not in missing:
            continue
        try:
            vector = np.asarray(row["embedding"])
        except ValueError:  # lists of several lengths
            vector = np.empty((0, 0))
        if (
            vector.ndim != 1
            or not len(vector)
            or vector.dtype.kind not in "fiu"
            or (vectors.shape[1] and len(vector) != vectors.shape[1])
        ):
            raise ValueError(f"{where}, column 'embedding': expected as many numbers as in the other rows: embed it again")
        if not vectors.shape[1]:
            vectors = np.empty((len(passages), len(vector)), np.float32)
        vectors[missing.pop(text)] = vector
    if missing:
        raise ValueError(f"{source}: there is no embedding of the passage {next(iter(missing))[:60]!r}")
    return vectors
