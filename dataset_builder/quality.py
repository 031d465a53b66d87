"""Free checks: what rejects a tuple before a judge is paid, and what recognises a pair that was there before."""

import itertools
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Set
from typing import Any

import regex  # type: ignore[import-untyped]
from datasketch import MinHash

_PLAIN_WORD = re.compile(r"\w+")
_SCRIPTS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_CHARACTER = regex.compile(rf"(?V1)[[{_SCRIPTS}]&&[\p{{L}}\p{{N}}]]\p{{M}}*")
_WORD = regex.compile(rf"{_CHARACTER.pattern}|[[\p{{L}}\p{{N}}_]--[{_SCRIPTS}]][[\p{{L}}\p{{N}}\p{{M}}_]--[{_SCRIPTS}]]*")

CHARACTERS_PER_WORD = 3
"""So many characters of an unspaced script (Han, Hiragana, Katakana, Thai, Lao, Khmer, Myanmar) are as long as a word."""

_BANDS, _BAND_ROWS = 8, 8
"""Pairs with a Jaccard similarity of 0.8 share a band with probability 1 - (1 - 0.8^8)^8 = 0.77, at 0.9 with 0.99."""

NEAR = 0.8
"""Jaccard similarity of word pairs from which two texts count as near duplicates."""

CONTAINED = 0.9
"""Share of the word pairs of a passage from which it counts as contained in another one: under a title, for example."""

_BUCKET, _COMPARED = 128, 32
"""At most so many texts are noted of those that share a band, and so many compared with a new one, those with most bands in
common. Only in corpora made from templates are more texts so much alike."""

QUOTED_WORDS = 5
"""An instruction that has so many words in a row in common with a passage quotes it; see :func:`runs`."""

INSTRUCTION_WORDS = (5, 120)
"""Least and most words of an instruction; of an unspaced script, :data:`CHARACTERS_PER_WORD` times as many at most."""

_NAMING = re.compile(
    r"\b(?:the|this|your|given|following) (?:instructions?|search request|query)\b|\brequest [012]\b|\bpassage_?[ 012]?\d\b",
    re.IGNORECASE,
)


def words(text: str) -> list[str]:
    """The words of a text in lower case; of an unspaced script, each character with its marks is one."""
    pattern = _PLAIN_WORD if text.isascii() else _WORD  # the same for ASCII, and five times as fast
    return pattern.findall(text.lower())


def _lengths(found: list[str]) -> list[int]:
    """The lengths of words, in characters of an unspaced script."""
    return [CHARACTERS_PER_WORD if word.isascii() or not _CHARACTER.match(word) else 1 for word in found]


def runs(text: str, size: int) -> Iterator[tuple[str, ...]]:
    """All runs of ``size`` words in a row; :data:`CHARACTERS_PER_WORD` characters of an unspaced script are one."""
    found = words(text)
    lengths = _lengths(found)
    end = length = 0
    for start, first in enumerate(lengths):
        while length < size * CHARACTERS_PER_WORD:
            if end == len(found):
                return
            length += lengths[end]
            end += 1
        yield tuple(found[start:end])
        length -= first


def normalised(text: str) -> str:
    """A text without case, punctuation and spacing: equal for exact duplicates. The splits of a corpus rest on it."""
    return " ".join(_PLAIN_WORD.findall(text.lower()))


def word_pairs(text: str) -> set[str]:
    """All pairs of neighbouring words; of a one-word text, the word."""
    found = words(text)
    return {f"{first} {second}" for first, second in itertools.pairwise(found)} or set(found)


def jaccard(first: Set[Any], second: Set[Any]) -> float:
    """|A ∩ B| / |A ∪ B|, 0 for two empty sets."""
    common = len(first & second)
    return common / (len(first) + len(second) - common) if first or second else 0.0


def is_near_copy(first: Set[Any], second: Set[Any]) -> bool:
    """Whether two texts with such word pairs are nearly the same, or nearly all of the shorter one is in the longer one.
    Texts without words are copies of each other."""
    if not first or not second:
        return not first and not second
    common, shorter = len(first & second), min(len(first), len(second))
    return common >= CONTAINED * shorter or common >= NEAR * (len(first) + len(second) - common)


def passage_words(document: str) -> tuple[int, int]:
    """Least and most words of a passage written in the length of ``document``."""
    length = len(words(document))
    return max(5, int(0.4 * length)), max(20, int(2.5 * length))


def tuple_problem(record: dict[str, Any]) -> str | None:
    """Why a tuple is not worth judging, with the column: ``equal twins``, ``wrong length``, ``quotes a passage``,
    ``names the instruction`` or ``near copy``; ``None`` if nothing is found."""
    is_mined = record["query_negative"] is None  # then the passages were there before, and only the instructions are new
    twins = [("instruction_positive", "instruction_negative")]
    for positive, negative in twins if is_mined else [("query_positive", "query_negative"), *twins]:
        if normalised(record[positive]) == normalised(record[negative]):
            return f"equal twins: {negative}"
    if not is_mined and not normalised(record["query_negative"]):
        return "wrong length: query_negative"
    for column in ("instruction_positive", "instruction_negative"):
        low, high = INSTRUCTION_WORDS
        found = words(record[column])
        if len(found) < low or sum(_lengths(found)) > high * CHARACTERS_PER_WORD:
            return f"wrong length: {column}"
    low, high = passage_words(record["document"])
    others = ("hard_negative_document_1",) if is_mined else ("hard_negative_document_1", "hard_negative_document_2")
    written = () if is_mined else others
    for column in written:
        if not low <= len(words(record[column])) <= high:
            return f"wrong length: {column}"
    quotable = {run for passage in ("document", *others) for run in runs(record[passage], QUOTED_WORDS)}
    for column in ("instruction_positive", "instruction_negative"):
        if not quotable.isdisjoint(runs(record[column], QUOTED_WORDS)):
            return f"quotes a passage: {column}"
    for column in written:
        if _NAMING.search(record[column]):
            return f"names the instruction: {column}"
    shingles = {column: word_pairs(record[column]) for column in ("document", *others)}
    for first, second in itertools.combinations(shingles, 2):
        if is_near_copy(shingles[first], shingles[second]):
            return f"near copy: {second}"
    return None


class Duplicates:
    """Finds texts that were there before, exactly or nearly: MinHash (Broder 1997) with banding, exact Jaccard to confirm.

    The index is a temporary database on disk, so that memory does not grow with the number of texts, and the work for a text
    is bounded: where texts are alike by the thousand, a near duplicate may be missed, an exact one never.
    """

    def __init__(self) -> None:
        self._empty = MinHash(num_perm=_BANDS * _BAND_ROWS, seed=1)
        self._index = sqlite3.connect("")
        self._index.execute("PRAGMA cache_size = -8000")
        self._index.execute("CREATE TABLE texts (id TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID")
        self._index.execute("CREATE TABLE exact (text TEXT PRIMARY KEY, id TEXT) WITHOUT ROWID")
        self._index.execute("CREATE TABLE bands (band BLOB, id TEXT, PRIMARY KEY (band, id)) WITHOUT ROWID")

    def add(self, identifier: str, text: str) -> tuple[str, str] | None:
        """Add a text with a unique name, unless it is a ``"duplicate"`` or ``"near duplicate"`` of one added before: then
        that is returned, with the name of the earlier text."""
        plain = normalised(text)
        if row := self._index.execute("SELECT id FROM exact WHERE text = ?", (plain,)).fetchone():
            return "duplicate", row[0]
        shingles = word_pairs(text)
        sketch = self._empty.copy()
        sketch.update_batch([shingle.encode() for shingle in shingles])
        values = sketch.hashvalues.tobytes()
        size = len(values) // _BANDS
        bands = [bytes([band]) + values[band * size : (band + 1) * size] for band in range(_BANDS)]
        buckets = [
            [name for (name,) in self._index.execute("SELECT id FROM bands WHERE band = ?", (band,))] for band in bands
        ]
        shared = Counter(itertools.chain.from_iterable(buckets))
        for earlier in sorted(name for name, _ in shared.most_common(_COMPARED)):
            (other,) = self._index.execute("SELECT text FROM texts WHERE id = ?", (earlier,)).fetchone()
            if jaccard(shingles, word_pairs(other)) >= NEAR:
                return "near duplicate", earlier
        self._index.execute("INSERT INTO texts VALUES (?, ?)", (identifier, text))
        self._index.execute("INSERT INTO exact VALUES (?, ?)", (plain, identifier))
        noted = [(band, identifier) for band, bucket in zip(bands, buckets) if len(bucket) < _BUCKET]
        self._index.executemany("INSERT INTO bands VALUES (?, ?)", noted)
        return None
