"""Requests through OpenAI's Batch API: half the price, answers within a day, nothing submitted twice.

    (1) Questions gather until no new one comes for a moment: then all records wait for answers.
    (2) They go into files, one model in each, of at most 50,000 lines, 150 MB and the tokens that an account may have
        waiting, each a job; those of a model are submitted one after the other. The ledger notes the job before it is
        submitted, by a tag that the job carries as metadata, and its id after.
    (3) The job is polled until it ends; its answers go into the ledger, then it is marked done, however it ended.

A run that was killed looks at the jobs in its ledger first: one with an id is polled on, one without is looked for on the
server by its tag, and only if it never arrived are its questions asked anew.
"""

import asyncio
import io
import json
import re
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import openai

from dataset_builder.chat import POSSIBLY_PAID, read_completion
from dataset_builder.errors import NoAnswer, Refused, Stop
from dataset_builder.ledger import Answer, Ledger
from dataset_builder.live import error_code, explain, keep_possibly_paid, refused
from dataset_builder.models import known
from dataset_builder.prices import Prices

BATCH_RECORDS = 10_000
"""Records that wait for a job together."""

_MAX_LINES, _MAX_BYTES = 50_000, 150_000_000
_BYTES_PER_TOKEN = 3
"""Of a line, as the server counts the tokens that wait: four are usual."""
_ENDED = ("completed", "failed", "expired", "cancelled")
_TRIES = 5
"""So often a job is submitted, or asked after, before a run gives up."""
_RETRIES = 8
"""Of requests that may safely be sent twice, by the ``openai`` client."""
_QUIET = 2.0
"""Seconds without a new question after which those that wait are sent."""

_Result = TypeVar("_Result")
_Models = dict[str, list[Any]]
"""By request: its model, and the tokens of prompt and answer that it can take at most."""


@dataclass
class _Question:
    """A request that waits for its answer."""

    asked: list[Any]
    """As in :data:`_Models`."""
    line: bytes
    future: asyncio.Future[Answer]


def question_line(key: str, content: bytes) -> bytes:
    """The line of a file of questions for a request and its key."""
    return b'{"custom_id": "%s", "method": "POST", "url": "/v1/chat/completions", "body": %s}\n' % (key.encode(), content)


class BatchTransport:
    """A :class:`~dataset_builder.live.LiveTransport` over the Batch API, whose prices have ``factor=0.5``.

    ``poll`` is the seconds between two looks at a job; ``tokens`` are those of one job at most, ``None`` for what is known
    of the model; ``log`` is called with one line about a job.
    """

    def __init__(
        self, client: openai.AsyncOpenAI, ledger: Ledger, prices: Prices, poll: float, tokens: int | None,
        log: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._client, self._safely = client, client.with_options(max_retries=_RETRIES)
        self._ledger, self._prices = ledger, prices
        self._poll, self._tokens, self._log = poll, tokens, log
        self._waiting: dict[str, _Question] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._jobs: set[asyncio.Task[None]] = set()
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by model

    async def resume(self) -> None:
        """Fetch the answers of jobs that an earlier run submitted; the questions that they left open are asked anew.

        Raises:
            Stop: The Batch API does not answer.
        """
        for tag, identifier, models in self._ledger.batches():
            identifier = identifier or await self._find(tag)
            if identifier is None:  # it never arrived
                await self._ledger.keep_batch(tag, None, "done", models)
                continue
            self._log(f"batch {identifier}: submitted by an earlier run, fetching its answers")
            await self._ledger.keep_batch(tag, identifier, "submitted", models)
            await self._collect(tag, identifier, models)

    async def send(self, key: str, model: str, content: bytes, most: tuple[int, int]) -> Answer:
        """As :meth:`.LiveTransport.send`; returns when the job that carries the question has ended."""
        future = asyncio.get_running_loop().create_future()
        question = _Question([model, *most], question_line(key, content), future)
        self._waiting[key] = question
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(_QUIET, self._flush)
        return await question.future

    def _flush(self) -> None:
        """Send what waits, in jobs of the size that the API allows."""
        waiting, self._waiting = self._waiting, {}
        parts: dict[str, dict[str, _Question]] = {}
        sizes: dict[str, int] = {}
        for key, question in waiting.items():
            model, size = question.asked[0], len(question.line)
            most = min(_MAX_BYTES, _BYTES_PER_TOKEN * (self._tokens or known(model).batch_tokens))
            part = parts.setdefault(model, {})
            if part and (len(part) == _MAX_LINES or sizes[model] + size > most):
                self._start(model, part)
                part = parts[model] = {}
            sizes[model] = size + (sizes[model] if part else 0)
            part[key] = question
        for model, part in parts.items():
            self._start(model, part)

    def _start(self, model: str, part: dict[str, _Question]) -> None:
        self._jobs.add(job := asyncio.create_task(self._job(model, part)))
        job.add_done_callback(self._jobs.discard)

    async def _job(self, model: str, part: dict[str, _Question]) -> None:
        found: Mapping[str, Answer | Exception] = {}
        try:
            async with self._turns[model]:
                part = {key: question for key, question in part.items() if not question.future.done()}
                if part:
                    found = await self._submit(part)
        except Exception as error:  # handed to all records that wait for this job
            found = dict.fromkeys(part, error)
        for key, question in part.items():
            if not question.future.done():
                result = found.get(key) or NoAnswer("left open by a batch")
                if isinstance(result, Answer):
                    question.future.set_result(result)
                else:
                    question.future.set_exception(result)

    async def _submit(self, part: dict[str, _Question]) -> Mapping[str, Answer | Exception]:
        tag, models = uuid.uuid4().hex, {key: question.asked for key, question in part.items()}
        await self._ledger.keep_batch(tag, None, "new", models)
        lines = io.BytesIO(b"".join(question.line for question in part.values()))
        try:
            file = await self._call(self._safely.files.create(file=(f"{tag}.jsonl", lines), purpose="batch"))
            if (name := _identifier(file)) is None:
                raise NoAnswer("an answer that is none")
            identifier = await self._create(tag, name)
        except (NoAnswer, Refused) as error:
            raise Stop(f"the Batch API takes no job ({error}); the same command goes on from here") from error
        await self._ledger.keep_batch(tag, identifier, "submitted", models)
        self._log(f"batch {identifier}: {len(part)} requests submitted")
        problem, found = await self._collect(tag, identifier, models)
        if problem:
            raise Stop(f"batch {identifier} {problem}; the same command asks anew for what it left open")
        return found

    async def _call(self, call: Awaitable[_Result]) -> _Result:
        """What a call of the client returns.

        Raises:
            Refused, NoAnswer, Stop: As :func:`~dataset_builder.live.explain` reads the error.
        """
        try:
            return await call
        except Exception as error:  # of the client, which also reads the answer, or of its transport
            failure = explain(error, str(self._client.base_url))
            raise failure from (error if isinstance(error, openai.APIError) else None)  # another one may show the key

    async def _create(self, tag: str, file: str) -> str:
        """Create a job: its id. One whose id did not arrive is looked for before it is created again."""
        failure = NoAnswer("an answer that is none")
        for attempt in range(_TRIES):
            try:
                batch = await self._call(
                    self._client.batches.create(
                        input_file_id=file,
                        endpoint="/v1/chat/completions",
                        completion_window="24h",
                        metadata={"inf_ir": tag},
                    )
                )
                if (identifier := _identifier(batch)) is not None:
                    return identifier
            except NoAnswer as error:
                failure = error
            await asyncio.sleep(min(self._poll, 5.0 * 2**attempt))
            if (found := await self._find(tag)) is not None:
                return found
        raise failure

    async def _find(self, tag: str) -> str | None:
        """The id of the job with a tag, if the server has it.

        Raises:
            Stop: The server does not say.
        """

        async def look() -> str | None:
            async for batch in self._safely.batches.list(limit=100):
                if isinstance(batch.metadata, dict) and batch.metadata.get("inf_ir") == tag:
                    return _identifier(batch)
            return None

        try:
            return await self._call(look())
        except (NoAnswer, Refused) as error:
            raise Stop(f"the Batch API does not list its jobs ({error}); the same command goes on from here") from error

    async def _end(self, tag: str, identifier: str) -> openai.types.Batch | None:
        """Wait until a job has ended: the job, or ``None`` if the server knows nothing of it."""
        failures = 0
        while True:
            try:
                batch = await self._call(self._safely.batches.retrieve(identifier))
                status = getattr(batch, "status", None)
                if status in _ENDED:
                    return batch
                failures = 0 if isinstance(status, str) else failures + 1
            except (NoAnswer, Refused):
                failures += 1
            except Stop as stop:
                if isinstance(stop.__cause__, openai.NotFoundError) and await self._find(tag) is None:
                    return None
                raise
            if failures == _TRIES:
                raise Stop(f"the Batch API does not say how batch {identifier} is; the same command goes on from here")
            await asyncio.sleep(self._poll)

    async def _collect(
        self, tag: str, identifier: str, models: _Models
    ) -> tuple[str, dict[str, Answer | NoAnswer | Refused]]:
        """Wait for a job's end, store its answers, and mark it done: what is wrong with it as a whole, and by question the
        answer or what became of it."""
        batch = await self._end(tag, identifier)
        found: dict[str, Answer | NoAnswer | Refused] = {}
        for file in () if batch is None else (batch.output_file_id, batch.error_file_id):
            for line in (await self._content(file)).split(b"\n") if isinstance(file, str) else ():
                if (row := read_row(line, models, self._prices)) is None or isinstance(found.get(row[0]), Answer):
                    continue
                key, result, certain = row
                found[key] = result
                if isinstance(result, Answer):
                    name = models[key][0] if certain else models[key][0] + POSSIBLY_PAID
                    await self._ledger.keep_answer(key, name, result)
        status = "not known to the server any more" if batch is None else batch.status
        for key in models.keys() - found.keys() if status == "completed" else ():
            model, *most = models[key]
            found[key] = lost = NoAnswer("left out by a batch")
            lost.cost = await keep_possibly_paid(self._ledger, self._prices, model, (most[0], most[1]))
        await self._ledger.keep_batch(tag, identifier, "done", models)
        answered = sum(isinstance(result, Answer) for result in found.values())
        self._log(f"batch {identifier}: {status}, {answered} of {len(models)} answered")
        return (_failure(batch) if status == "failed" else "was cancelled" if status == "cancelled" else ""), found

    async def _content(self, file: str) -> bytes:
        try:
            return (await self._call(self._safely.files.content(file))).content
        except Stop as stop:
            if isinstance(stop.__cause__, openai.NotFoundError):  # the server keeps files for a while only
                return b""
            raise
        except (NoAnswer, Refused) as error:
            raise Stop(f"the Batch API does not hand over its answers ({error}); the same command goes on") from error


def _identifier(thing: Any) -> str | None:
    """The id of a job or file, if it is one that can be stored and shown."""
    identifier = getattr(thing, "id", None)
    return identifier if isinstance(identifier, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", identifier) else None


def is_refusal(status: Any) -> bool:
    """Whether a status is about the request itself: not about the key, the account, the address or the moment."""
    return type(status) is int and 400 <= status < 500 and status not in (401, 402, 403, 404, 408, 409, 429)


def read_row(line: bytes, models: _Models, prices: Prices) -> tuple[str, Answer | NoAnswer | Refused, bool] | None:
    """(request, answer or what became of it, whether its usage is told) in a line of a job's files, if there is one."""
    try:  # whatever goes wrong in here is the server's doing
        row = json.loads(line)
        key = row["custom_id"]
        model, *most = models[key]
        response = row.get("response") or {}
        status, body = response.get("status_code"), response.get("body")
    except Exception:
        return None
    if status == 200:
        return key, *read_completion(body, model, prices, (most[0], most[1]))
    if is_refusal(status):
        return key, refused(status, body), True
    return key, NoAnswer("left open by a batch"), True


def _failure(batch: Any) -> str:
    """Why a job failed as a whole, in words that may be shown."""
    code = error_code(*(error.code for error in (getattr(batch.errors, "data", None) or ()) if hasattr(error, "code")))
    hint = ": wait for other jobs, or lower --batch-tokens" if code == "token_limit_exceeded" else ""
    return f"failed ({code or 'for a reason of the server'}){hint}"
