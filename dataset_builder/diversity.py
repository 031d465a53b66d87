"""How varied the texts of a corpus are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from dataset_builder.quality import words


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Distinct-n: the number of distinct n-grams of words over that of all (Li et al. 2016, arXiv:1510.03055, §5.2).

    Args:
        texts: Texts of one kind. The value falls with their number, so only samples of one size can be compared.
        n: Words in a gram.

    Returns:
        Between 0 and 1; 0 where no text has ``n`` words.
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        found = words(text)
        for gram in zip(*(itertools.islice(found, start, None) for start in range(n))):
            seen.add(gram)
            total += 1
    return len(seen) / total if total else 0.0
