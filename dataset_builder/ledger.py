"""The SQLite store of all answers and outcomes: what is in it is never paid for again.

Answers that arrive together are committed together (write-ahead log, synchronous), by a thread of their own, and an answer
is used only after its commit. The ledger holds requests by their hash, answers, token counts and outcomes; keys of servers
never reach it.

Rows are appended and never changed: of several with one key, the last one counts. Each carries a hash of itself, which is
checked when it is read; see :mod:`dataset_builder.rows`.
"""

import asyncio
import contextlib
import json
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from dataset_builder.rows import PAGE, Row, find_rows, pack, unpack
from sentence_transformers_inf.recipe import replacing

_TABLES = ("build", "answers", "outcomes", "batches")
_SCHEMA = {
    **{name: f"CREATE TABLE {name} (number INTEGER PRIMARY KEY, row BLOB NOT NULL, key TEXT NOT NULL)" for name in _TABLES},
    "answers_by_key": "CREATE INDEX answers_by_key ON answers (key)",
}
_ENVIRONMENT = ("unable to open", "disk I/O", "disk is full", "locked")
"""How SQLite complains of what is around the file and not in it."""


class LedgerError(OSError):
    """The ledger cannot be read or written; the message names the file and the remedy."""


class LedgerDamage(LedgerError):
    """What is in the file is not what was written; :func:`repair_ledger` saves what still is.

    Args:
        path: The file.
        problem: What is wrong with it.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"{path}: the ledger is damaged ({problem}); `inf-ir repair {path}` saves the answers that can still be read"
        )
        self.problem = problem


@dataclass(frozen=True)
class Answer:
    """What a server answered to one request."""

    content: str | None
    """The text, ``None`` where the server gave none."""
    finish_reason: str
    refusal: str | None
    prompt_tokens: int
    completion_tokens: int
    cost: float
    """US dollars."""


@dataclass(frozen=True)
class Outcome:
    """How one record ended: ``kept``, ``rejected`` or ``failed``, and why."""

    position: int
    status: str
    reason: str
    record: dict[str, Any]


class _Content:
    """What goes into a row."""

    def __init__(self, table: int, key: str, value: Any) -> None:
        self.table, self.key, self.value = table, key, value
        self.encoded = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def ledger_path(folder: Path, rank: int = 0, tasks: int = 1) -> Path:
    """Where a task of a build keeps its ledger."""
    return folder / "work" / ("" if tasks == 1 else f"task-{rank:05d}") / "ledger.sqlite"


def _create(path: Path, build: str, rows: Iterable[Row] = ()) -> None:
    """Make the ledger of a build with rows in it, as a whole."""
    with replacing(path) as part, contextlib.closing(sqlite3.connect(part)) as connection:
        connection.execute(f"PRAGMA page_size = {PAGE}")
        with connection:
            for statement in _SCHEMA.values():
                connection.execute(statement)
            _insert(connection, [(0, 1, build, b"null")])
            _insert(connection, rows)
        connection.execute("PRAGMA journal_mode = WAL")


def _insert(connection: sqlite3.Connection, rows: Iterable[Row]) -> None:
    for table, number, key, value in rows:
        stored = (number, pack(table, number, key, value), key)
        connection.execute(f"INSERT INTO {_TABLES[table]} VALUES (?, ?, ?)", stored)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Keep other processes from a ledger; wait ten seconds for one that is ending, as the tasks of a killed run are."""
    try:
        with FileLock(f"{path}.lock", timeout=10, thread_local=False):
            yield
    except Timeout as error:
        raise LedgerError(f"{path}: another run is at work on it; wait for it or stop it") from error


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.Error as error:
        if any(words in str(error) for words in _ENVIRONMENT):
            raise LedgerError(f"{path}: {error}; everything answered so far is kept, mend it and run again") from error
        raise LedgerDamage(path, str(error)) from error


class Ledger:
    """The ledger of one build (or of one task of it), an SQLite file that is made if it is not there.

    Args:
        path: The file.
        build: The build that it must belong to; ``None``: any.

    Raises:
        LedgerDamage: The file is not a ledger, is not this build's, or a row of it is not as it was written.
        LedgerError: It cannot be read or written, or another process is at work on it.
    """

    def __init__(self, path: Path, build: str | None = None) -> None:
        self.path = path
        self._totals: dict[str, Counter[str]] = {}
        self._ended: dict[int, tuple[int, str]] = {}  # by position: number of the row, status
        self._batches: dict[str, tuple[str | None, dict[str, Any]]] = {}
        self._last = [0] * len(_TABLES)
        self._committing = threading.Lock()
        self._waiting: list[tuple[_Content, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo, _errors(self.path):
            undo.enter_context(_held(path))
            if not path.exists():
                if _put_aside_before(path) or path.with_name(f"{path.name}-wal").exists():
                    raise sqlite3.DatabaseError("the file is missing")
                _create(path, build or "")
            if not os.access(path, os.R_OK | os.W_OK):
                raise LedgerError(f"{path}: no permission to read and write it")
            self._connection = undo.enter_context(contextlib.closing(sqlite3.connect(path, check_same_thread=False)))
            self._read_all(build)
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "cache_size = -8000"):
                self._connection.execute(f"PRAGMA {pragma}")
            # A second connection, so that a question never waits for a commit of the other thread.
            self._reader = undo.enter_context(contextlib.closing(sqlite3.connect(path)))
            self._close = undo.pop_all()

    def _read_all(self, build: str | None) -> None:
        """Check the file and every row, and learn what is in them."""
        if dict(self._connection.execute("SELECT name, sql FROM sqlite_master")) != _SCHEMA:
            raise sqlite3.DatabaseError("it is no ledger, or one of an earlier version")
        if (state := self._connection.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(state)
        for table, name in enumerate(_TABLES):
            for number, row, key in self._connection.execute(f"SELECT number, row, key FROM {name} ORDER BY number"):
                if number != self._last[table] + 1:
                    raise sqlite3.DatabaseError(f"row {self._last[table] + 1} of {name} is missing")
                self._learn(table, number, key, self._value(table, number, row, key))
        if self._last[0] != 1 or (build is not None and self._build != build):
            raise sqlite3.DatabaseError("it belongs to another build")

    def _value(self, table: int, number: int, row: Any, key: Any) -> Any:
        """The content of a row; an error if it is not as it was written."""
        if isinstance(row, bytes) and isinstance(key, str) and (value := unpack(table, number, key, row)) is not None:
            return json.loads(value.decode("utf-8", "surrogatepass"))
        raise sqlite3.DatabaseError(f"row {number} of {_TABLES[table]} is not as it was written")

    def _learn(self, table: int, number: int, key: str, value: Any) -> None:
        """Take in a row that is on disk."""
        self._last[table] = number
        name = _TABLES[table]
        if name == "build":
            self._build = key
        elif name == "answers" and value is not None:
            counts = {name: value[name] for name in ("prompt_tokens", "completion_tokens", "cost")}
            self._totals.setdefault(value["model"], Counter()).update({"requests": 1, **counts})
        elif name == "outcomes" and value is not None:
            self._ended[int(key)] = number, value[0]
        elif name == "outcomes":
            self._ended.pop(int(key), None)
        elif name == "batches" and value[1] == "done":
            self._batches.pop(key, None)
        elif name == "batches":
            self._batches[key] = value[0], value[2]

    def answer(self, request: str) -> Answer | None:
        """The answer to a request by its hash, if it was ever answered."""
        _, value = self._stored(request)
        return None if value is None else Answer(**{name: value[name] for name in value if name not in ("model", "line")})

    def is_forgotten(self, line: str) -> bool:
        """Whether an answer from a file was forgotten; ``line`` is the hash by which it was stored."""
        return self._stored(line)[0]

    def _stored(self, key: str) -> tuple[bool, Any]:
        """Whether there is a row of answers with a key, and what the last one holds."""
        with _errors(self.path):
            query = "SELECT number, row FROM answers WHERE key = ? ORDER BY number DESC LIMIT 1"
            if (found := self._reader.execute(query, (key,)).fetchone()) is None:
                return False, None
            return True, self._value(_TABLES.index("answers"), found[0], found[1], key)

    async def keep_answer(self, request: str, model: str, answer: Answer, line: str = "") -> None:
        """Store an answer; returns when it is on disk. ``line`` is the hash of its line, if it came in a file."""
        await self._write("answers", request, {"model": model, **asdict(answer)} | ({"line": line} if line else {}))

    async def keep_outcome(self, outcome: Outcome) -> None:
        """Store how a record ended; returns when it is on disk."""
        await self._write("outcomes", str(outcome.position), [outcome.status, outcome.reason, outcome.record])

    def statuses(self) -> dict[int, str]:
        """How the records that ended did so, by position."""
        return {position: status for position, (_, status) in self._ended.items()}

    def outcomes(self) -> Iterator[Outcome]:
        """All outcomes in the order of the records."""
        for position in sorted(self._ended):
            yield self._outcome(position)

    def _outcome(self, position: int) -> Outcome:
        number = self._ended[position][0]
        with _errors(self.path):
            (row,) = self._connection.execute("SELECT row FROM outcomes WHERE number = ?", (number,)).fetchone()
            return Outcome(position, *self._value(_TABLES.index("outcomes"), number, row, str(position)))

    def forget_failures(self) -> None:
        """Drop the answers that made records fail, so that they are asked for anew, and those records' outcomes. Lines of
        files in which they came are noted under their hashes: they do not count again."""
        failed = [self._outcome(position) for position, status in self.statuses().items() if status == "failed"]
        requests = [request for outcome in failed for request in outcome.record.get("bad_requests", ())]
        values = [value for request in requests if (value := self._stored(request)[1]) is not None]
        requests += [value["line"] for value in values if "line" in value]
        contents = [_Content(_TABLES.index("answers"), request, None) for request in dict.fromkeys(requests)]
        contents += [_Content(_TABLES.index("outcomes"), str(outcome.position), None) for outcome in failed]
        self._commit(contents)
        self._learn_all(contents)

    def totals(self) -> dict[str, dict[str, float]]:
        """By model: requests answered, tokens in and out, dollars; everything ever paid for from this ledger."""
        return {model: dict(total) for model, total in self._totals.items()}

    async def keep_batch(self, tag: str, identifier: str | None, state: str, models: dict[str, Any]) -> None:
        """Store the state of a job of the Batch API, with what is to be known of each of its requests."""
        await self._write("batches", tag, [identifier, state, models])

    def batches(self) -> list[tuple[str, str | None, dict[str, Any]]]:
        """(tag, id, what is known by request) of the jobs that are not done."""
        return [(tag, *batch) for tag, batch in self._batches.items()]

    def close(self) -> None:
        """Close the file; a commit that is under way ends first."""
        with self._committing, _errors(self.path):
            self._close.close()

    async def _write(self, table: str, key: str, value: Any) -> None:
        content = _Content(_TABLES.index(table), key, value)  # what cannot be stored is an error of its own row alone
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((content, done))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_all())
        await done

    async def _write_all(self) -> None:
        """Commit what is waiting, all of it at once, until nothing is."""
        while self._waiting:
            group, self._waiting = self._waiting, []
            contents = [content for content, _ in group]
            try:
                await asyncio.to_thread(self._commit, contents)
                self._learn_all(contents)
                failure = None
            except Exception as error:  # handed to whoever waits for the row
                failure = error
            for done in (done for _, done in group if not done.done()):
                done.set_result(None) if failure is None else done.set_exception(failure)
        self._writer = None

    def _commit(self, contents: list[_Content]) -> None:
        last = list(self._last)
        with self._committing, _errors(self.path), self._connection:
            for content in contents:
                last[content.table] += 1
                _insert(self._connection, [(content.table, last[content.table], content.key, content.encoded)])

    def _learn_all(self, contents: list[_Content]) -> None:
        for content in contents:
            self._learn(content.table, self._last[content.table] + 1, content.key, content.value)


class Repair(NamedTuple):
    """What became of a damaged ledger."""

    saved: int
    """Answers in the new one."""
    aside: Path | None
    """Where the damaged file is now; ``None`` if there was none."""
    lost: int
    """Answers that were there for certain and cannot be read; what stood after all others is not known."""


def repair_ledger(path: Path, build: str | None = None) -> Repair:
    """Put a ledger's file aside, and all rows of it that are as they were written into a new one.

    Rows are found by their marks, and nothing is asked of the file's header, its tables or SQLite. If it is killed, the next
    call goes on from there. The file is read into memory.

    Args:
        path: The file.
        build: Whose ledger it is; of another build's, answers alone are taken. ``None``: what the file says.
    """
    with _held(path):
        aside = _put_aside(path)
        rows = [] if aside is None else find_rows(aside)
        owners = [key for table, _, key, _ in rows if table == 0]
        foreign = build is not None and owners and build not in owners
        kept: list[Row] = []
        last = [0] * len(_TABLES)
        for table, _, key, value in rows:
            if table and (not foreign or _TABLES[table] == "answers"):
                last[table] += 1
                kept.append((table, last[table], key, value))
        _create(path, build if build is not None else owners[0] if owners else "", kept)
    answers = [number for table, number, _, value in rows if _TABLES[table] == "answers"]
    saved = sum(value != b"null" for table, _, _, value in kept if _TABLES[table] == "answers")
    return Repair(saved, aside, max(answers, default=0) - len(set(answers)))


def _put_aside_before(path: Path) -> list[Path]:
    """What earlier repairs of a ledger put aside, the latest last."""
    found = (place for place in path.parent.glob(f"{path.stem}.damaged-*") if place.suffix[9:].isdigit())
    return sorted(found, key=lambda place: int(place.suffix[9:]))


def _put_aside(path: Path) -> Path | None:
    before = _put_aside_before(path)
    log = path.with_name(f"{path.name}-wal")
    if not path.exists() and before:  # a repair was killed before the new ledger was there
        aside = before[-1]
    elif path.exists() or log.exists():
        aside = path.with_suffix(f".damaged-{int(before[-1].suffix[9:]) + 1 if before else 1}")
    else:
        return None
    for file, place in ((path, aside), (log, aside.with_name(f"{aside.name}-wal"))):
        if file.exists():
            file.rename(place)
    path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
    return aside
