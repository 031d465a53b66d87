"""What an instruction did to a ranking, in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sentence_transformers_inf.playground.corpus import Example
from sentence_transformers_inf.playground.ranking import Ranking

TOP = 5
"""So many passages of a ranking are shown."""


def obeyed(ranking: Ranking, example: Example | None) -> bool | None:
    """Whether the first expected passage is before every unwanted one; ``None`` where there is nothing to compare."""
    if ranking.before is None or example is None or not example.unwanted:
        return None
    return bool(ranking.ranks[list(example.expected)].min() < ranking.ranks[list(example.unwanted)].min())


def in_words(ranking: Ranking, example: Example | None) -> str:
    """One sentence on a ranking with an instruction: how far the passages of the example moved, or the first ones."""
    assert ranking.before is not None
    if example is not None:
        parts = [f"{_expected(example)} {_moved(ranking, example.expected)}"]
        if example.unwanted:
            parts.append(f"{_unwanted(example)} {_moved(ranking, example.unwanted)}")
        return f"{parts[0][0].upper()}{'; '.join(parts)[1:]}."
    first, before = ranking.order[0], ranking.before
    new = int(np.sum(before[ranking.order[:TOP]] > TOP))
    if (before[ranking.order[:TOP]] == np.arange(1, len(ranking.order[:TOP]) + 1)).all():
        return f"Nothing moved among the first {TOP}."
    start = "The same passage is first" if before[first] == 1 else f"The first passage rose from {before[first]}"
    return f"{start}; {new} of the first {TOP} {'was' if new == 1 else 'were'} not among them before."


def _expected(example: Example) -> str:
    return _named(len(example.expected), "expected passage", "expected passages")


def _unwanted(example: Example) -> str:
    if example.kind in ("exclusion", "narrower"):
        return _named(len(example.unwanted), "passage you excluded", "passages you excluded")
    return _named(len(example.unwanted), "passage that does not fit", "passages that do not fit")


def _named(number: int, one: str, several: str) -> str:
    return f"the {one}" if number == 1 else f"the best of {number} {several}"


def _moved(ranking: Ranking, rows: Sequence[int]) -> str:
    """How the best of some passages moved."""
    assert ranking.before is not None
    before, after = _best(ranking.before, rows), _best(ranking.ranks, rows)
    if before == after:
        return f"stayed at {after}"
    return f"{'rose' if after < before else 'fell'} from {before} to {after}"


def _best(ranks: NDArray[np.int64], rows: Sequence[int]) -> int:
    return int(ranks[list(rows)].min())
