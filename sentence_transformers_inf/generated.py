"""Datasets that are kept in the cache of ``datasets``, where a damaged one is made anew."""

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


def sound(load: Callable[[bool], Dataset]) -> Dataset:
    """A dataset whose files in the cache were read as a whole.

    Args:
        load: Loads it, memory-mapped; given ``True``, it makes it anew in the place of what is in the cache.
    """
    try:
        data = load(False)
        for file in map(Path, [file["filename"] for file in data.cache_files]):
            for path in (file, *file.parent.glob("cache-*.arrow")):  # views of a dataset are kept beside it
                with path.open("rb") as opened:
                    deque(arrow_batches(opened), maxlen=0)
        return data
    except DatasetGenerationError:
        raise
    except Exception:  # datasets raises all kinds for a damaged file of the cache
        return load(True)


def generated(rows_of: Callable[[Versions], Iterator[dict[str, Any]]], files: Sequence[Path], features: Features) -> Dataset:
    """The rows of files, memory-mapped.

    Args:
        rows_of: Reads them. What it raises is raised here.
        files: Where one of them changes, the rows are read again.
        features: Of the rows.
    """
    versions = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    cache = Path(config.HF_DATASETS_CACHE, "inf-ir", hashlib.sha256(repr(versions).encode()).hexdigest()[:16])

    def load(anew: bool) -> Dataset:
        if anew:
            shutil.rmtree(cache, ignore_errors=True)
        return Dataset.from_generator(rows_of, features=features, gen_kwargs={"versions": versions}, cache_dir=str(cache))

    try:
        return sound(load)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
