"""Requests through OpenAI's Batch API: half the price, answers within a day, nothing submitted twice.

    (1) Questions gather until no new one comes for a moment: then all records wait for answers.
    (2) They go into files of at most 50,000 lines and 150 MB, each a job. The ledger notes the job before it is
        submitted, by a tag that the job carries as metadata, and its id after.
    (3) The job is polled until it ends; its answers go into the ledger, then it is marked done.

A run that was killed looks at the jobs in its ledger first: one with an id is polled on, one without is looked for on the
server by its tag, and only if it never arrived are its questions asked anew.
"""

import asyncio
import io
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import openai

from dataset_builder.chat import read_completion
from dataset_builder.errors import BadAnswer, Stop
from dataset_builder.ledger import Answer, Ledger
from dataset_builder.prices import Prices

BATCH_RECORDS = 10_000
"""Records that wait for a job together."""

_MAX_LINES, _MAX_BYTES = 50_000, 150_000_000
_ENDED = ("completed", "failed", "expired", "cancelled")
_TRIES = 3
_QUIET = 2.0
"""Seconds without a new question after which those that wait are sent."""


@dataclass
class _Question:
    """A request that waits for its answer."""

    model: str
    body: dict[str, Any]
    future: asyncio.Future[Answer]
    tries: int = 0


class BatchTransport:
    """A :class:`~dataset_builder.language_model.LiveTransport` over the Batch API, whose prices have ``factor=0.5``.

    ``poll`` is the seconds between two looks at a job; ``log`` is called with one line about it.
    """

    def __init__(
        self, client: openai.AsyncOpenAI, ledger: Ledger, prices: Prices, poll: float, log: Callable[[str], None]
    ) -> None:
        self._client, self._ledger, self._prices = client, ledger, prices
        self._poll, self._log = poll, log
        self._waiting: dict[str, _Question] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._jobs: set[asyncio.Task[None]] = set()

    async def resume(self) -> None:
        """Fetch the answers of jobs that an earlier run submitted.

        Raises:
            Stop: A job failed as a whole.
        """
        for tag, identifier, models in self._ledger.batches():
            if identifier is None:
                async for batch in self._client.batches.list(limit=100):
                    if (batch.metadata or {}).get("inf_ir") == tag:
                        identifier = batch.id
                        break
            if identifier is not None:
                self._log(f"batch {identifier}: submitted by an earlier run, fetching its answers")
                await self._ledger.keep_batch(tag, identifier, "submitted", models)
                await self._collect(identifier, models)
            await self._ledger.keep_batch(tag, identifier, "done", models)

    async def send(self, key: str, model: str, body: dict[str, Any]) -> Answer:
        """As :meth:`.LiveTransport.send`; returns when the job that carries the question has ended."""
        self._wait(key, question := _Question(model, body, asyncio.get_running_loop().create_future()))
        return await question.future

    def _wait(self, key: str, question: _Question) -> None:
        self._waiting[key] = question
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(_QUIET, self._flush)

    def _flush(self) -> None:
        """Send what waits, in jobs of the size that the API allows."""
        waiting, self._waiting = self._waiting, {}
        part: dict[str, _Question] = {}
        lines: list[bytes] = []
        size = 0
        for key, question in waiting.items():
            request = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": question.body}
            line = json.dumps(request, ensure_ascii=False).encode() + b"\n"
            if lines and (len(lines) == _MAX_LINES or size + len(line) > _MAX_BYTES):
                self._start(part, lines)
                part, lines, size = {}, [], 0
            part[key] = question
            lines.append(line)
            size += len(line)
        if lines:
            self._start(part, lines)

    def _start(self, part: dict[str, _Question], lines: list[bytes]) -> None:
        self._jobs.add(job := asyncio.create_task(self._job(part, lines)))
        job.add_done_callback(self._jobs.discard)

    async def _job(self, part: dict[str, _Question], lines: list[bytes]) -> None:
        try:
            found = await self._submit({key: question.model for key, question in part.items()}, lines)
        except Exception as error:  # handed to all records that wait for this job
            for question in part.values():
                if not question.future.done():
                    question.future.set_exception(error)
            return
        for key, question in part.items():
            result = found.get(key)
            question.tries += 1
            if isinstance(result, Answer):
                question.future.set_result(result)
            elif isinstance(result, BadAnswer):
                question.future.set_exception(result)
            elif question.tries == _TRIES:
                question.future.set_exception(BadAnswer(f"no answer in {_TRIES} batches"))
            else:
                self._wait(key, question)

    async def _submit(self, models: dict[str, str], lines: list[bytes]) -> dict[str, Answer | BadAnswer]:
        tag = uuid.uuid4().hex
        await self._ledger.keep_batch(tag, None, "new", models)
        file = await self._client.files.create(file=(f"{tag}.jsonl", io.BytesIO(b"".join(lines))), purpose="batch")
        batch = await self._client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"inf_ir": tag}
        )
        await self._ledger.keep_batch(tag, batch.id, "submitted", models)
        self._log(f"batch {batch.id}: {len(lines)} requests submitted")
        found = await self._collect(batch.id, models)
        await self._ledger.keep_batch(tag, batch.id, "done", models)
        return found

    async def _collect(self, identifier: str, models: dict[str, str]) -> dict[str, Answer | BadAnswer]:
        """Wait for a job's end and store its answers; questions that it left unanswered are not in the result."""
        while (batch := await self._client.batches.retrieve(identifier)).status not in _ENDED:
            await asyncio.sleep(self._poll)
        if batch.status == "failed":
            errors = (batch.errors.data if batch.errors is not None else None) or []
            raise Stop(f"batch {identifier} failed: {errors[0].code if errors else 'no reason given'}")
        found: dict[str, Answer | BadAnswer] = {}
        for file in (batch.output_file_id, batch.error_file_id):
            content = "" if file is None else (await self._client.files.content(file)).text
            for line in filter(None, content.split("\n")):
                row = json.loads(line)
                key, response = row["custom_id"], row.get("response") or {}
                status = response.get("status_code")
                if key not in models:
                    continue
                if status == 200:
                    answer = read_completion(response["body"], models[key], self._prices)
                    await self._ledger.keep_answer(key, models[key], answer)
                    found[key] = answer
                elif status is not None and 400 <= status < 500 and status not in (408, 409, 429):
                    found[key] = BadAnswer(f"the server refuses the request (status {status})")
        self._log(f"batch {identifier}: {batch.status}, {len(found)} of {len(models)} answered")
        return found
