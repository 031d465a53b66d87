"""Refuse embeddings of a broken model, or in a damaged file, before anything is measured or ranked on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

_ROWS = 65_536
"""Rows that are looked at in one go."""

_REMEDY = "the model that made them is broken, e.g. trained with too high a learning rate: train it again, or take another"


class BrokenModelError(ValueError):
    """Embeddings that mean nothing; the message says of how many texts, and what may be the cause."""


def check_embeddings(embeddings: torch.Tensor | NDArray, texts: Sequence[str], kind: str) -> None:
    """Refuse embeddings that are not finite, or that are all the same although their texts differ.

    Args:
        embeddings: N×d.
        texts: What was embedded, N.
        kind: What the texts are, in the plural, for the message: ``"passages"``.

    Raises:
        BrokenModelError: A value is NaN or infinite; or no embedding differs from the first by more than rounding, and two
            texts differ in more than case and white space.
    """
    check_parts(torch.as_tensor(embeddings).split(_ROWS), texts, kind)


def check_parts(parts: Iterable[torch.Tensor], texts: Sequence[str], kind: str) -> None:
    """As :func:`check_embeddings`, of embeddings that come a part at a time: n×d each, N rows in all, or none at all."""
    broken: list[int] = []
    first, spread, start = torch.zeros(0), 0.0, 0
    for part in filter(len, parts):
        numbers = part.float()
        broken += ((~torch.isfinite(numbers).all(dim=1)).nonzero().ravel() + start).tolist()
        first, start = (first if start else numbers[0]), start + len(numbers)
        spread = max(spread, float((numbers - first).abs().max()))
    if broken:
        raise BrokenModelError(
            f"{len(broken)} of {len(texts)} {kind} have embeddings that are not finite: the first is "
            f"{texts[broken[0]][:60]!r}; {_REMEDY}"
        )
    if len(texts) < 2 or not start:
        return
    differ = spread > 1e-6 * float(first.abs().max())
    if not differ and len({" ".join(text.lower().split()) for text in texts}) > 1:
        raise BrokenModelError(f"all {len(texts)} {kind} have the same embedding although their texts differ; {_REMEDY}")


def read_array(path: str | Path, mmap_mode: Literal["r", "c"] = "r") -> NDArray[Any]:
    """The numbers in a ``.npy`` file, memory-mapped, or the first array of a ``.npz`` file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is damaged, or holds no array of numbers.
    """
    try:
        loaded = np.load(path, mmap_mode=mmap_mode)
        array: NDArray[Any] = np.asanyarray(loaded if isinstance(loaded, np.ndarray) else loaded[loaded.files[0]])
    except FileNotFoundError:
        raise
    except Exception as error:  # the parsers of NumPy and zipfile raise a dozen kinds
        raise ValueError(f"{path}: damaged, it cannot be read as {Path(path).suffix} ({error}): make it again") from error
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path}: expected numbers, it holds {array.dtype}: make it again")
    if array.dtype.itemsize > 8:  # a machine's own long double
        array = array.astype(np.float64)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
