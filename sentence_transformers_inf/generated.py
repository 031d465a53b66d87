"""Datasets that are made of files once and kept in the cache of ``datasets``, where a damaged one is made anew."""

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, Features, config
from datasets.exceptions import DatasetGenerationError

from sentence_transformers_inf.reading import arrow_batches

Versions: TypeAlias = tuple[tuple[str, int, int], ...]
"""Files, each with its path, size and time of change."""


def generated(rows_of: Callable[[Versions], Iterator[dict[str, Any]]], files: Sequence[Path], features: Features) -> Dataset:
    """The rows of files, memory-mapped.

    Args:
        rows_of: Reads them. What it raises is raised here.
        files: Where one of them changes, the rows are read again.
        features: Of the rows.
    """
    versions = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    cache = Path(config.HF_DATASETS_CACHE, "inf-ir", hashlib.sha256(repr(versions).encode()).hexdigest()[:16])
    while True:
        was_there = cache.exists()
        try:
            data = Dataset.from_generator(
                rows_of, features=features, gen_kwargs={"versions": versions}, cache_dir=str(cache)
            )
            for path in cache.rglob("*.arrow"):  # views of the rows are kept beside them
                with path.open("rb") as file:
                    deque(arrow_batches(file), maxlen=0)
            return data
        except DatasetGenerationError as error:
            raise (error.__cause__ or error) from None
        except Exception:  # a damaged file of the cache: datasets raises all kinds
            if not was_there:
                raise
            shutil.rmtree(cache)
