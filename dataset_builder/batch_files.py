"""Questions and answers in files, in the format of OpenAI's Batch API: for offline models, other batch services, or people.

A run asks nobody: it writes the questions that are open into one file and ends. Whoever answers them puts files of answers
beside it, and the next run reads those, as often as it takes until nothing is open.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dataset_builder.batches import is_refusal, question_line, read_row
from dataset_builder.chat import POSSIBLY_PAID
from dataset_builder.errors import Refused, Stop
from dataset_builder.ledger import Answer, Ledger
from dataset_builder.live import error_code
from dataset_builder.prices import Prices
from sentence_transformers_inf.recipe import replacing, write_whole

REQUESTS = "requests.jsonl"
"""The file of open questions; every other ``.jsonl`` file of the folder is read for answers."""

_OWN = "questions.sha256"
"""Beside the ledger: the hashes of the last two files of questions that this build wrote."""
_QUIET = 0.5
"""Seconds without a new question after which all records wait."""


@dataclass
class _File:
    """What a file of answers holds: lines, by what they are."""

    path: Path
    unreadable: int = 0
    repeated: int = 0
    contradicting: int = 0
    known: int = 0
    """Answers that the ledger has."""
    forgotten: int = 0
    """Answers that made a record fail which was tried anew."""
    accepted: int = 0
    refusals: int = 0
    others: int = 0
    """Answers that no question was open for."""
    errors: Counter[str] = field(default_factory=Counter)
    """By what they say. Their questions stay open."""

    def summary(self) -> str:
        """In a line."""
        parts = [
            f"{count} {what}"
            for count, what in (
                (self.known, "known before"),
                (self.forgotten, "forgotten by --retry-failed"),
                (self.repeated, "given twice, counted once"),
                (self.contradicting, "given twice, with different answers: the first counted"),
                (self.refusals, "refusals"),
                (self.errors.total(), f"errors: {', '.join(f'{what} ({count})' for what, count in self.errors.items())}"),
            )
            if count
        ]
        if self.others and not (parts or self.accepted):
            return f"{self.path}: refused, none of its {self.others} answers is to an open question of this build"
        parts += [f"{self.others} to no open question"] if self.others else []
        parts += [f"{self.unreadable} of its lines cannot be read: is the file whole?"] if self.unreadable else []
        return f"{self.path}: {', '.join([f'{self.accepted} answers accepted', *parts])}"


class _Line(NamedTuple):
    """Where an answer or a refusal is."""

    file: _File
    start: int
    digest: str
    answered: bool

    def read(self) -> bytes:
        """The line, or what stands there now."""
        with contextlib.suppress(OSError), self.file.path.open("rb") as lines:
            lines.seek(self.start)
            return lines.readline()
        return b""


@dataclass
class FileTransport:
    """A :class:`~dataset_builder.live.LiveTransport` over files of a folder.

    ``log`` is called with one line about each file of answers.
    """

    folder: Path
    ledger: Ledger
    prices: Prices
    log: Callable[[str], None]
    _files: list[_File] = field(default_factory=list)
    _lines: dict[str, _Line] = field(default_factory=dict)
    _open: dict[str, tuple[bytes, asyncio.Future[Answer]]] = field(default_factory=dict)
    _timer: asyncio.TimerHandle | None = None

    def read_answers(self) -> None:
        """Find the answers that are in the folder, which is made if it is not there.

        Raises:
            Stop: There is a ``requests.jsonl`` that this build did not write.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_questions()
        for path in sorted(self.folder.iterdir()):
            name = path.name.lower()
            if path.name == REQUESTS or name.startswith(".") or "json" not in name:
                continue
            if not (name.endswith(".jsonl") and path.is_file()):
                self.log(f"{path}: passed over, answers are read from plain files named .jsonl: unpack or rename it")
                continue
            found = _File(path)
            try:
                self._read(found)
            except OSError as error:
                self.log(f"{path}: cannot be read ({error.strerror})")
            self._files.append(found)

    def _read(self, found: _File) -> None:
        place = 0
        with found.path.open("rb") as lines:
            for line in lines:
                start, place = place, place + len(line)
                if not line.strip():
                    continue
                try:  # whatever is wrong with a line is its writer's doing
                    row = json.loads(line)
                    key, response, error = row["custom_id"], row.get("response") or {}, row.get("error")
                    status = response.get("status_code")
                    shape = json.dumps([key, status, response.get("body")], sort_keys=True)
                except Exception:
                    found.unreadable += 1
                    continue
                if status == 200 or is_refusal(status):
                    self._sort(key, _Line(found, start, hashlib.sha256(shape.encode()).hexdigest(), status == 200))
                elif response or error:
                    code = error_code(error.get("code")) if isinstance(error, dict) else ""
                    found.errors[f"status {status}" if type(status) is int else code or "no status"] += 1
                else:
                    found.unreadable += 1

    def _sort(self, key: Any, line: _Line) -> None:
        """Note an answer or a refusal, if it may be the one that counts."""
        file, before = line.file, self._lines.get(key) if isinstance(key, str) else None
        if not (isinstance(key, str) and re.fullmatch("[0-9a-f]{64}", key)):  # no question of any build
            file.others += 1
        elif self.ledger.is_forgotten(line.digest):
            file.forgotten += 1
        elif self.ledger.answer(key) is not None:
            file.known += 1
        elif before is None:
            self._lines[key] = line
        elif before.answered and line.answered and before.digest != line.digest:
            file.contradicting += 1
        elif line.answered and not before.answered:  # an answer counts before a refusal
            before.file.repeated += 1
            self._lines[key] = line
        else:
            file.repeated += 1

    async def send(self, key: str, model: str, content: bytes, most: tuple[int, int]) -> Answer:
        """As :meth:`.LiveTransport.send`; a question without an answer waits for the end of the run.

        Raises:
            Stop: Questions are open.
        """
        if (line := self._lines.pop(key, None)) is not None:
            match read_row(line.read(), {key: [model, *most]}, self.prices):
                case (_, Answer() as answer, certain):
                    await self.ledger.keep_answer(key, model if certain else model + POSSIBLY_PAID, answer, line.digest)
                    line.file.accepted += 1
                    return answer
                case (_, Refused() as refusal, _):
                    line.file.refusals += 1
                    refusal.line = line.digest
                    raise refusal
            line.file.unreadable += 1
        self._open[key] = question_line(key, content), asyncio.get_running_loop().create_future()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(_QUIET, self._flush)
        return await self._open[key][1]

    def _flush(self) -> None:
        """Write what is open, and end the run."""
        path, count = self.folder / REQUESTS, len(self._open)
        remedy = "put files with the answers beside it and give the same command again"
        failure: Exception = Stop(f"{count} questions are open, they are in {path}: {remedy}", budget=True)
        try:
            self._check_questions()
            content = b"".join(line for line, _ in self._open.values())
            own = [hashlib.sha256(path.read_bytes()).hexdigest()] if path.exists() else []
            write_whole(self._note(), "\n".join([*own, hashlib.sha256(content).hexdigest()]))
            with replacing(path) as part:
                part.write_bytes(content)
        except (Stop, OSError) as error:  # handed to all records that wait
            failure = error if isinstance(error, Stop) else Stop(f"{path}: {error.strerror}; mend it and run again")
        for _, future in self._open.values():
            if not future.done():
                future.set_exception(failure)

    def _note(self) -> Path:
        return self.ledger.path.with_name(_OWN)

    def _check_questions(self) -> None:
        """Raise :class:`Stop` if there is a file of questions that this build did not write, or that was changed."""
        path, note = self.folder / REQUESTS, self._note()
        if os.path.lexists(path):
            own = note.read_text(encoding="utf-8").split() if note.is_file() else []
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() not in own:
                remedy = "move it away, or give it another name if it holds answers, and give the same command again"
                raise Stop(f"{path}: this build writes its questions under this name, and did not write this file: {remedy}")

    def end(self) -> None:
        """Tell of each file of answers, and write nothing more."""
        if self._timer is not None:
            self._timer.cancel()
        waiting = Counter(id(line.file) for line in self._lines.values())
        for file in self._files:
            file.others += waiting[id(file)]
            self.log(file.summary())

    def remove_questions(self) -> None:
        """Take away the file of questions, if this build wrote it: none is open."""
        with contextlib.suppress(Stop):
            self._check_questions()
            (self.folder / REQUESTS).unlink(missing_ok=True)
            self._note().unlink(missing_ok=True)
