"""Rows of a ledger that can be checked, and found in a damaged file without the tables around them.

A row is a head (a mark, its lengths and a hash of all that is in it), a value in JSON, and in the next column a key.
"""

import hashlib
import re
import struct
from pathlib import Path

PAGE = 4096
"""Bytes of a page of the file."""

Row = tuple[int, int, str, bytes]
"""Table, number, key and value."""

_MARK = b"\xffInF-IR\x02"
"""No text in UTF-8 has its first byte, so none can imitate a row."""
_HEAD = struct.Struct(">8sBQHI16s")
"""Mark, table, number, bytes of the key and of the value, hash."""


def pack(table: int, number: int, key: str, value: bytes) -> bytes:
    """What the column ``row`` holds: head and value."""
    shape = (_MARK, table, number, len(key.encode()), len(value))
    digest = hashlib.sha256(_HEAD.pack(*shape, bytes(16)) + key.encode() + value).digest()[:16]
    return _HEAD.pack(*shape, digest) + value


def unpack(table: int, number: int, key: str, row: bytes) -> bytes | None:
    """The value in the column ``row``, ``None`` if it is not as it was written, or another row's."""
    value = row[_HEAD.size :]
    try:
        return value if row == pack(table, number, key, value) else None
    except struct.error:  # a number or length that no row has
        return None


def find_rows(path: Path) -> list[Row]:
    """All whole rows of a database file and of its write-ahead log, in order, whatever became of what is around them."""
    file, log = (part.read_bytes() if part.exists() else b"" for part in (path, path.with_name(f"{path.name}-wal")))
    pages = [(number, file[start : start + PAGE]) for number, start in enumerate(range(0, len(file), PAGE), start=1)]
    starts = range(32, len(log), 24 + PAGE)  # a frame's header begins with the number of its page
    frames = [(int.from_bytes(log[start : start + 4], "big"), log[start + 24 : start + 24 + PAGE]) for start in starts]
    newest, oldest = dict(pages + frames), dict(pages)
    rows = set()
    for _, page in pages + frames:
        for found in re.finditer(re.escape(_MARK), page):
            rows.add(_whole_row(page, found.start(), newest) or _whole_row(page, found.start(), oldest))
    return sorted(row for row in rows if row is not None)


def _whole_row(page: bytes, at: int, pages: dict[int, bytes]) -> Row | None:
    """The row whose mark is at a place of a page, if its hash is right; ``pages`` have what of a long one is elsewhere.

    See https://www.sqlite.org/fileformat2.html, sections 1.6 (b-tree pages and overflow) and 2.1 (records).
    """
    if at + _HEAD.size > len(page):
        return None
    _, table, number, key_length, value_length, _ = _HEAD.unpack_from(page, at)
    length = _HEAD.size + value_length
    types = (0, 12 + 2 * length, 13 + 2 * key_length)  # NULL for the number, a blob, a text: seven bits in a byte
    start = at - 1 - sum(max(1, -(-kind.bit_length() // 7)) for kind in types)
    total = at - start + length + key_length
    least, most = (PAGE - 12) * 32 // 255 - 23, PAGE - 35
    here = total if total <= most else least + (total - least) % (PAGE - 4)
    end = start + (here if here <= most else least)
    parts, left, following = [page[at:end]], start + total - end, page[end : end + 4]
    if left > PAGE * len(pages):
        return None
    while left > 0:
        page = pages.get(int.from_bytes(following, "big"), b"")
        following = page[:4]
        parts.append(page[4 : 4 + left])
        left -= PAGE - 4
    content = b"".join(parts)
    row, key = content[:length], content[length:].decode(errors="replace")
    value = unpack(table, number, key, row)
    return None if value is None else (table, number, key, value)
