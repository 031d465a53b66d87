"""Reading the files that users bring: text and tables, plain or compressed.

Text is UTF-8, with or without a byte order mark. A line ends at a newline and nowhere else. What cannot be read is a
:class:`RecordError` that names the file, the row and the remedy.
"""

import codecs
import csv
import io
import json
import math
import os
from collections.abc import Container, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

FORMATS = (".jsonl", ".parquet", ".csv", ".tsv", ".json", ".arrow")
"""What :func:`read_table` reads."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""What may stand behind the name of a text file, and what Arrow calls it."""

_DELIMITERS = ",;\t|"

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of an Arrow stream that was written to its end."""


class RecordError(ValueError):
    """Data that cannot be read, or are not InF-IR records; the message names the source, the row and the column."""


def format_of(path: str | Path) -> str:
    """The ending of a file's name in lower case, without that of a compression: ``.jsonl`` of ``A.JSONL.gz``."""
    path = Path(str(path).lower())
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix


def endings_of(path: str | Path) -> str:
    """All of a file's name that says how it is read, in lower case: ``.jsonl.gz`` of ``A.B.JSONL.gz``."""
    ending = Path(path).suffix.lower()
    return format_of(path) + (ending if ending in COMPRESSIONS else "")


def is_table(path: str | Path) -> bool:
    """Whether :func:`read_table` reads files of this name."""
    return format_of(path) in FORMATS


def find_file(folder: Path, *names: str) -> Path | None:
    """The first of some files that there is in a folder, plain or compressed."""
    paths = (folder / f"{name}{ending}" for name in names for ending in ("", *COMPRESSIONS))
    return next((path for path in paths if path.is_file()), None)


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file without their ends, each with its place for messages: ``FILE, row 7``."""
    for number, line in enumerate(_raw_lines(path), start=1):
        where = f"{path}, row {number}"
        yield where, _decoded(line, where).removesuffix("\n").removesuffix("\r")


def read_text(path: Path) -> str:
    """A text file as a whole."""
    return _decoded(b"".join(_raw_lines(path)), str(path))


def read_json(path: Path) -> Any:
    """The JSON in a file."""
    return _parsed(read_text(path), str(path))


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON Lines file, each with its place; blank lines are passed over."""
    for where, line in read_lines(path):
        if line.strip():
            yield where, _object(_parsed(line, where), where)


def read_table(path: Path, columns: Container[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table, one at a time, each with its place.

    Args:
        path: A file of one of :data:`FORMATS`: JSON Lines (``.json`` also one JSON array), Parquet, Arrow as ``datasets``
            writes it, or delimited text with a header, whose delimiter (comma, semicolon, tab, bar) is found there. Text may
            be compressed.
        columns: Columns that are wanted; of Parquet and Arrow no others are read.

    Raises:
        RecordError: Another format, another encoding, damage, a row that is no object or has not as many fields as the
            header.
        OSError: The file cannot be opened.
    """
    ending = format_of(path)
    if os.fsencode(path).decode(errors="replace") != str(path):
        raise RecordError(f"{str(path)!r}: the name is not UTF-8; rename the file")
    if ending not in FORMATS:
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise RecordError(f"{path}: expected a {kinds} file; text may be compressed as {' or '.join(COMPRESSIONS)}")
    if ending in (".parquet", ".arrow"):
        return _columnar_rows(path, columns)
    if ending in (".csv", ".tsv"):
        return _delimited_rows(path)
    return _json_rows(path) if ending == ".json" else read_json_lines(path)


def text_in(row: dict[str, Any], column: str, where: str) -> str:
    """The text in a column of a row; empty where there is none.

    Raises:
        RecordError: There is something else in it.
    """
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        found = f"{where}, column {column!r}: expected text, got {type(value).__name__}"
        raise RecordError(f"{found}; mend the row, or take it out")
    return value or ""


def read_beir_texts(path: Path) -> Iterator[tuple[str, str, str]]:
    """(place, id, text) of the queries or the corpus in BEIR's layout, the title before the text if there is one."""
    for where, row in read_json_lines(path):
        if row.get("_id") is None or not isinstance(row.get("text"), str):
            raise RecordError(f"{where}: expected the columns '_id' and 'text'")
        yield where, str(row["_id"]), f"{text_in(row, 'title', where)} {row['text']}".strip()


def read_qrels(path: Path) -> Iterator[tuple[str, str, str, float]]:
    """(place, query id, passage id, score) of relevance judgments.

    Three columns as BEIR has them, or TREC's four (query, iteration, passage, score), with or without a header. A line with
    tabs is split there, and ids may have blanks; another is split at blanks.
    """
    for number, (where, line) in enumerate(((place, line) for place, line in read_lines(path) if line.strip()), start=1):
        cells = line.rstrip("\t ").split("\t") if "\t" in line else [cell for cell in line.split(" ") if cell]
        if len(cells) not in (3, 4):
            raise RecordError(f"{where}: expected query id, passage id and score (TREC: query id, 0, passage id, score)")
        try:
            score = float(cells[-1])
        except ValueError:
            if number == 1:
                continue  # the header
            raise RecordError(f"{where}: the score {cells[-1]!r} is no number") from None
        if not math.isfinite(score):
            raise RecordError(f"{where}: the score {cells[-1]!r} is no finite number")
        yield where, cells[0], cells[-2], score


def _raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked, with their ends and without a byte order mark."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    with path.open("rb") as file:
        if compression is not None and not file.peek(1):
            raise RecordError(f"{path}: the file is empty; copy it again")
        stream: Any = file if compression is None else _unpacked(file, compression)
        number = 0
        try:
            for number, line in enumerate(stream, start=1):
                yield line if number > 1 else line.removeprefix(codecs.BOM_UTF8)
        except OSError as error:
            if compression is None:
                raise
            where = f"{path}, after line {number}"
            raise RecordError(f"{where}: cannot be unpacked as {compression} ({error}); copy it again") from error


def _unpacked(file: Any, compression: str) -> Iterator[bytes]:
    with io.BufferedReader(pyarrow.CompressedInputStream(file, compression)) as stream:
        yield from stream


def _decoded(line: bytes, where: str) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise RecordError(f"{where}: not UTF-8 text (byte 0x{line[error.start]:02x}); save the file in UTF-8") from error
    if "\0" in text:
        raise RecordError(f"{where}: there is a NUL byte, which no text has; save the file in UTF-8")
    return text


def _parsed(text: str, where: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse, parse_int=_whole_number, object_pairs_hook=_object_of)
        if "\\ud" in text.lower():  # only an escape can be half a character
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise RecordError(f"{where}: the JSON is nested too deep; flatten it") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise RecordError(f"{where}: {half} is half a character (a lone surrogate); take it out") from error
    except ValueError as error:
        raise RecordError(f"{where}: not valid JSON ({error}); mend it") from error
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON; write null")


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"there are two keys {next(key for key in keys if keys.count(key) > 1)!r}; rename one")
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > 4000:  # near Python's limit
        raise ValueError(f"a number of {len(digits)} digits; write it as text")
    return int(digits)


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RecordError(f"{where}: expected a JSON object, got {type(row).__name__}; write one a line")
    return row


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a ``.json`` file, which is an array of them or JSON Lines."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        yield from read_json_lines(path)
        return
    for number, row in enumerate(_parsed(text, str(path)), start=1):
        where = f"{path}, row {number}"
        yield where, _object(row, where)


def _delimited_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0  # of the row that is read; 0: the header

    def here() -> str:
        return f"{path}, row {number}" if number else f"{path}, header"

    csv.field_size_limit(2**31 - 1)  # a passage may be long
    lines = (_decoded(line, here()) for line in _raw_lines(path))
    first = next((line for line in lines if line.strip()), "")
    header: list[str] = []
    try:
        delimiter = "\t" if format_of(path) == ".tsv" else max(_DELIMITERS, key=lambda one: len(_cells(first, one)))
        for cells in csv.reader(chain([first], lines), delimiter=delimiter, strict=True):
            if any(cell.strip() for cell in cells) and not header:
                header = [cell.strip() for cell in cells]
                if repeated := next((name for name in header if header.count(name) > 1), None):
                    raise RecordError(f"{here()}: there are two columns {repeated!r}; rename one")
            elif any(cell.strip() for cell in cells):
                if len(cells) != len(header):
                    raise RecordError(
                        f"{here()}: {len(cells)} field(s), but the header has {len(header)}; put a text that holds "
                        f"{delimiter!r} or a line break in double quotes"
                    )
                yield here(), dict(zip(header, cells))
            number += bool(header)
    except csv.Error as error:
        raise RecordError(f"{here()}: {error}; put a text in double quotes, and double those inside it") from error


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])


def _columnar_rows(path: Path, columns: Container[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    number, batches = 0, parquet_batches if format_of(path) == ".parquet" else arrow_batches
    with path.open("rb") as opened:
        try:
            for batch in batches(opened, columns):
                for row in _batch_rows(batch):
                    number += 1
                    yield f"{path}, row {number}", row
        except RecordError:
            raise
        except Exception as error:  # pyarrow raises all kinds for damage
            place = f"{path}, row {number + 1}" if number or isinstance(error, UnicodeDecodeError) else str(path)
            raise RecordError(
                f"{place}: cannot be read as {format_of(path)[1:]} ({error}); write or copy it again"
            ) from error


def arrow_batches(file: BinaryIO, columns: Container[str] | None = None) -> Iterator[pyarrow.RecordBatch]:
    """The batches of an Arrow stream in order.

    Each is checked before it is given: from a damaged one, values would be read from anywhere in memory. For damage,
    pyarrow raises errors of all kinds.

    Args:
        file: It is open.
        columns: Columns that are wanted; those it lacks are passed over. ``None``: all.

    Raises:
        ValueError: The stream is cut, at the end of a batch too.
    """
    with pyarrow.ipc.open_stream(file) as stream:
        names = _wanted(file, stream.schema.names, columns)
        for batch in stream:
            part = batch.select(names)
            part.validate(full=True)
            yield part
    file.seek(max(0, file.tell() - len(_END_OF_STREAM)))
    if file.read() != _END_OF_STREAM:
        raise ValueError("it is cut: the end of the stream is missing")


def _wanted(file: Any, names: list[str], columns: Container[str] | None) -> list[str]:
    """The names of the columns that are wanted, in the order of the file."""
    wanted = [name for name in names if columns is None or name in columns]
    if repeated := next((name for name in wanted if wanted.count(name) > 1), None):
        raise RecordError(f"{getattr(file, 'name', file)}: there are two columns {repeated!r}; rename one")
    return wanted


def parquet_batches(file: Any, columns: Container[str] | None = None, rows: int = 1000) -> Iterator[pyarrow.RecordBatch]:
    """The rows of a Parquet file in order, a batch at a time.

    Args:
        file: Its path, or the open file.
        columns: Columns that are wanted; those it lacks are passed over. ``None``: all.
        rows: Of a batch, at most.

    Raises:
        ValueError: A page is not as it was written, or there are fewer rows than the file says: pyarrow passes over some
            damaged pages.
    """
    parquet = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
    names = _wanted(file, parquet.schema_arrow.names, columns)
    found = 0
    for batch in parquet.iter_batches(rows, columns=names):
        found += len(batch)
        yield batch
    if names and found != parquet.metadata.num_rows:
        name = file if isinstance(file, (str, Path)) else "the file"
        raise ValueError(f"{name} is damaged: it has {found:,} of {parquet.metadata.num_rows:,} rows")


def _batch_rows(batch: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # Arrow does not say in which row
        for row in range(len(batch)):
            yield from batch.slice(row, 1).to_pylist()
    except Exception:
        for name, column in zip(batch.schema.names, batch.columns):
            try:
                column.to_pylist()
            except Exception as error:
                raise ValueError(f"column {name!r}, {type(error).__name__}: {error}") from error
        raise
