"""The SQLite store of all answers and outcomes: what is in it is never paid for again.

Answers that arrive together are committed together (write-ahead log, synchronous), by a thread of their own, and an answer
is used only after its commit. The ledger holds requests by their hash, answers, token counts and outcomes; keys of servers
never reach it.
"""

import asyncio
import contextlib
import itertools
import json
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    number INTEGER PRIMARY KEY, request TEXT UNIQUE NOT NULL, model TEXT NOT NULL, answer TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS outcomes (
    position INTEGER PRIMARY KEY, status TEXT NOT NULL, reason TEXT NOT NULL, record TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS batches (
    tag TEXT PRIMARY KEY, id TEXT, state TEXT NOT NULL, requests TEXT NOT NULL
);
"""
_COLUMNS = {
    "answers": ("request", "model", "answer", "prompt_tokens", "completion_tokens", "cost"),
    "outcomes": ("position", "status", "reason", "record"),
    "batches": ("tag", "id", "state", "requests"),
}


class LedgerError(OSError):
    """The ledger cannot be read or written; the message names the file and the remedy."""


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


def ledger_path(folder: Path, rank: int = 0, tasks: int = 1) -> Path:
    """Where a task of a build keeps its ledger."""
    return folder / "work" / ("" if tasks == 1 else f"task-{rank:05d}") / "ledger.sqlite"


class Ledger:
    """The ledger of one build (or of one task of it), an SQLite file that is made if it is not there.

    Raises:
        LedgerError: The file is not a ledger, is corrupt, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors():
            self._connection = sqlite3.connect(path, check_same_thread=False)
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "cache_size = -8000"):
                self._connection.execute(f"PRAGMA {pragma}")
            if (state := self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(state)
            self._connection.executescript(_SCHEMA)
            self._reader = sqlite3.connect(path)  # so that a question never waits for a commit of the other thread
        self._committing = threading.Lock()
        self._waiting: list[tuple[str, tuple[Any, ...], asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    def answer(self, request: str) -> Answer | None:
        """The answer to a request by its hash, if it was ever answered."""
        with self._errors():
            query = "SELECT answer, prompt_tokens, completion_tokens, cost FROM answers WHERE request = ?"
            row = self._reader.execute(query, (request,)).fetchone()
        return None if row is None else Answer(**json.loads(row[0]), **dict(zip(_COLUMNS["answers"][3:], row[1:])))

    async def keep_answer(self, request: str, model: str, answer: Answer) -> None:
        """Store an answer; returns when it is on disk."""
        stored = asdict(answer)
        counts = [stored.pop(name) for name in _COLUMNS["answers"][3:]]
        await self._write("answers", (request, model, json.dumps(stored, ensure_ascii=False), *counts))

    async def keep_outcome(self, outcome: Outcome) -> None:
        """Store how a record ended; returns when it is on disk."""
        record = json.dumps(outcome.record, ensure_ascii=False)
        await self._write("outcomes", (outcome.position, outcome.status, outcome.reason, record))

    def statuses(self) -> dict[int, str]:
        """How the records that ended did so, by position."""
        with self._errors():
            return dict(self._connection.execute("SELECT position, status FROM outcomes").fetchall())

    def outcomes(self) -> Iterator[Outcome]:
        """All outcomes in the order of the records."""
        with self._errors():
            rows = self._connection.execute("SELECT position, status, reason, record FROM outcomes ORDER BY position")
            for position, status, reason, record in rows:
                yield Outcome(position, status, reason, json.loads(record))

    def forget_failures(self) -> None:
        """Drop the answers that made records fail, so that they are asked for anew, and those records' outcomes."""
        with self._errors(), self._connection:
            for (record,) in self._connection.execute("SELECT record FROM outcomes WHERE status = 'failed'").fetchall():
                for request in json.loads(record).get("bad_requests", ()):
                    renamed = "UPDATE answers SET request = request || '#' || number WHERE request = ?"
                    self._connection.execute(renamed, (request,))
            self._connection.execute("DELETE FROM outcomes WHERE status = 'failed'")

    def totals(self) -> dict[str, dict[str, float]]:
        """By model: requests answered, tokens in and out, dollars; everything ever paid for from this ledger."""
        with self._errors():
            sums = "COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), SUM(cost)"
            rows = self._connection.execute(f"SELECT model, {sums} FROM answers GROUP BY model").fetchall()
        names = ("requests", "prompt_tokens", "completion_tokens", "cost")
        return {model: dict(zip(names, values)) for model, *values in rows}

    async def keep_batch(self, tag: str, identifier: str | None, state: str, models: dict[str, Any]) -> None:
        """Store the state of a job of the Batch API, with what is to be known of each of its requests."""
        await self._write("batches", (tag, identifier, state, json.dumps(models)))

    def batches(self) -> list[tuple[str, str | None, dict[str, Any]]]:
        """(tag, id, what is known by request) of the jobs that are not done."""
        with self._errors():
            query = "SELECT tag, id, requests FROM batches WHERE state != 'done' ORDER BY rowid"
            rows = self._connection.execute(query).fetchall()
        return [(tag, identifier, json.loads(requests)) for tag, identifier, requests in rows]

    def close(self) -> None:
        """Close the file; a commit that is under way ends first."""
        with self._committing, self._errors():
            self._reader.close()
            self._connection.close()

    async def _write(self, table: str, row: tuple[Any, ...]) -> None:
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((table, row, done))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_all())
        await done

    async def _write_all(self) -> None:
        """Commit what is waiting, all of it at once, until nothing is."""
        while self._waiting:
            group, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._commit, [(table, row) for table, row, _ in group])
                failure = None
            except Exception as error:  # handed to whoever waits for the row
                failure = error
            for done in (done for _, _, done in group if not done.done()):
                done.set_result(None) if failure is None else done.set_exception(failure)
        self._writer = None

    def _commit(self, rows: list[tuple[str, tuple[Any, ...]]]) -> None:
        with self._committing, self._errors(), self._connection:
            for table, row in rows:
                columns = _COLUMNS[table]
                marks = ", ".join("?" * len(columns))
                self._connection.execute(f"INSERT OR REPLACE INTO {table} ({', '.join(columns)}) VALUES ({marks})", row)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise LedgerError(f"{self.path}: {error}; everything answered so far is kept, mend it and run again") from error
        except sqlite3.DatabaseError as error:
            remedy = "`inf-ir repair` saves the answers that can still be read"
            raise LedgerError(f"{self.path}: the ledger is damaged ({error}); {remedy}") from error


def repair_ledger(path: Path) -> tuple[int, Path]:
    """Save what can be read of a damaged ledger into a new one: how many answers, and where the damaged file is now."""
    places = (path.with_suffix(f".damaged-{number}") for number in itertools.count(1))
    aside = next(place for place in places if not place.exists())
    for suffix in ("-wal", ""):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    saved = 0
    with contextlib.closing(Ledger(path)) as ledger, contextlib.closing(sqlite3.connect(aside)) as damaged:
        for table, columns in _COLUMNS.items():
            try:
                last = damaged.execute(f"SELECT MAX(rowid) FROM {table}").fetchone()[0] or 0
            except sqlite3.DatabaseError:  # a damaged tree may not tell its last row; a miss costs microseconds
                last = 200_000
            for number in range(last + 1):
                try:
                    row = damaged.execute(f"SELECT {', '.join(columns)} FROM {table} WHERE rowid = ?", (number,)).fetchone()
                    if row is not None and row[0] is not None:
                        ledger._commit([(table, row)])
                        saved += table == "answers"
                except (sqlite3.DatabaseError, UnicodeDecodeError, LedgerError):
                    continue
    return saved, aside
