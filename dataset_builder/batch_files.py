"""Questions and answers in files, in the format of OpenAI's Batch API: for offline models, other batch services, or people.

A run asks nobody: it writes the questions that are open into one file and ends. Whoever answers them puts files of answers
beside it, and the next run reads those, as often as it takes until nothing is open.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset_builder.batches import read_row
from dataset_builder.errors import Refused, Stop
from dataset_builder.ledger import Answer, Ledger
from dataset_builder.prices import Prices
from sentence_transformers_inf.recipe import replacing

REQUESTS = "requests.jsonl"
"""The file of open questions; every other ``.jsonl`` file of the folder is read for answers."""

_QUIET = 0.5
"""Seconds without a new question after which all records wait."""


@dataclass
class _File:
    """What a file of answers holds: lines, by what they are."""

    path: Path
    unreadable: int = 0
    repeated: int = 0
    known: int = 0
    """Answers that the ledger has."""
    accepted: int = 0
    others: int = 0
    """Answers that no question was open for."""

    def summary(self) -> str:
        """In a line."""
        if self.others and not (self.known or self.accepted):
            return f"{self.path}: refused, none of its {self.others} answers is to a question of this build"
        parts = [f"{self.accepted} answers accepted"]
        for count, what in (
            (self.known, "known before"),
            (self.repeated, "given twice, counted once"),
            (self.others, "to no open question"),
            (self.unreadable, "of its lines cannot be read: is the file whole?"),
        ):
            parts += [f"{count} {what}"] if count else []
        return f"{self.path}: {', '.join(parts)}"


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
    _places: dict[str, tuple[_File, int]] = field(default_factory=dict)
    _open: dict[str, tuple[bytes, asyncio.Future[Answer]]] = field(default_factory=dict)
    _timer: asyncio.TimerHandle | None = None

    def read_answers(self) -> None:
        """Find the answers that are in the folder, which is made if it is not there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*.jsonl")):
            if path.name != REQUESTS:
                self._files.append(found := _File(path))
                self._read(found)

    def _read(self, found: _File) -> None:
        place = 0
        with found.path.open("rb") as lines:
            for line in lines:
                start, place = place, place + len(line)
                if not line.strip():
                    continue
                try:  # whatever is wrong with a line is its writer's doing
                    row = json.loads(line)
                    key, answered = str(row["custom_id"]), row["response"]["status_code"] == 200
                except Exception:
                    found.unreadable += 1
                    continue
                if key in self._places:
                    self._places[key][0].repeated += 1
                    if not answered:  # an answer counts before a refusal
                        continue
                if self.ledger.answer(key) is not None:
                    found.known += 1
                else:
                    self._places[key] = found, start

    async def send(self, key: str, model: str, body: dict[str, Any], most: tuple[int, int]) -> Answer:
        """As :meth:`.LiveTransport.send`; a question without an answer waits for the end of the run.

        Raises:
            Stop: Questions are open.
        """
        if (place := self._places.pop(key, None)) is not None:
            file, start = place
            with file.path.open("rb") as lines:
                lines.seek(start)
                row = read_row(lines.readline(), {key: [model, *most]}, self.prices)
            result = row[1] if row is not None else None
            if isinstance(result, Answer):
                await self.ledger.keep_answer(key, model, result)
                file.accepted += 1
                return result
            file.others += 1
            if isinstance(result, Refused):
                raise result
        if key not in self._open:
            request = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
            line = json.dumps(request, ensure_ascii=False).encode() + b"\n"
            self._open[key] = line, asyncio.get_running_loop().create_future()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(_QUIET, self._flush)
        return await asyncio.shield(self._open[key][1])

    def _flush(self) -> None:
        """Write what is open, and end the run."""
        with replacing(self.folder / REQUESTS) as part, part.open("wb") as file:
            file.writelines(line for line, _ in self._open.values())
        count = len(self._open)
        remedy = "put files with the answers beside it and give the same command again"
        stop = Stop(f"{count} questions are open, they are in {self.folder / REQUESTS}: {remedy}", budget=True)
        for _, future in self._open.values():
            if not future.done():
                future.set_exception(stop)

    def end(self) -> None:
        """Tell of each file of answers; take away the questions if none is open."""
        waiting = Counter(id(file) for file, _ in self._places.values())
        for file in self._files:
            file.others += waiting[id(file)]
            self.log(file.summary())
        if not self._open:
            (self.folder / REQUESTS).unlink(missing_ok=True)
