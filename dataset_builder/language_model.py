"""Asking a language model for structured answers over any OpenAI-compatible server, live or through the Batch API.

:class:`LanguageModel` turns a :class:`~dataset_builder.chat.Request` into a checked pydantic object: from the ledger if it
was ever answered, else from the server, within the limits on cost, requests and rate.
"""

import asyncio
import json
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from dataset_builder import chat
from dataset_builder.batch_files import FileTransport
from dataset_builder.batches import BatchTransport
from dataset_builder.chat import AnswerType, Request
from dataset_builder.errors import BadAnswer, NoAnswer, Refused, Stop
from dataset_builder.ledger import Answer, Ledger
from dataset_builder.live import LiveTransport, public_url
from dataset_builder.models import known
from dataset_builder.prices import Prices

MAX_RETRIES = 8
"""Retries of a request after 408, 409, 429, 5xx, a timeout or a broken connection: as long after as the server asks for, or
0.5 to 8 s, doubling, with jitter."""

BATCH_RETRIES = 2
"""Retries of a question that a job of the Batch API left unanswered."""

MAX_UNANSWERED = 20
"""So many questions in a row without a usable answer, in one stage, and the run stops: the server or model is of no use."""

GRACE = 10.0
"""Seconds that requests in flight have to come home after an interrupt."""

_REMEDY = "raise it and run the same command to go on"

_OPTIONAL = {
    "response_format": ("response_format", "json_schema", "structured output"),
    "temperature": ("temperature",),
    "seed": ("seed",),
    "reasoning_effort": ("reasoning_effort", "reasoning effort"),
}
"""Parameters that a server may refuse, and the words by which its complaint names them."""

_MOST_TOKENS = ("max_tokens", "max_completion_tokens")
_UNSUPPORTED = re.compile(
    r"not.{0,30}(?:support|permit|allow|accept|implement|available|recogni)|unsupported|unrecogni|unknown|unexpected|extra|"
    r"invalid|must be|instead"
)
_TOO_LARGE = re.compile(r"too (?:large|long|many|high)|at most|maximum|context")


@dataclass
class Limits:
    """What a run may use."""

    concurrency: int = 64
    """Requests in flight."""
    rpm: int | None = None
    """Requests per minute, evenly spread."""
    tpm: int | None = None
    """Tokens per minute, prompt and longest possible answer."""
    max_cost: float | None = None
    """US dollars, all runs into one folder together. A request is sent if all that it can cost fits. So the sum is never
    exceeded, except by what is in flight when the process is killed."""
    max_requests: int | None = None
    """Requests, of this run."""
    timeout: float = 120.0
    """Seconds for one answer."""
    batch_tokens: int | None = None
    """Prompt tokens of one job of the Batch API; ``None``: what is known of the model."""
    reasoning: tuple[str, ...] = ()
    """Models that think before they answer, beside those that are known to."""


@dataclass
class Usage:
    """What a run has used so far."""

    requests: int = 0
    tokens: int = 0
    cost: float = 0.0


class _Pace:
    """Spreads what is taken evenly over time, without a burst at the start."""

    def __init__(self, per_minute: int) -> None:
        self._seconds = 60 / per_minute
        self._next = 0.0

    def delay(self, amount: int = 1) -> float:
        """Take so much, and wait so many seconds first."""
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + amount * self._seconds
        return start - now


class LanguageModel:
    """Structured answers, each paid for once; ``url`` is the server's."""

    def __init__(
        self,
        transport: LiveTransport | BatchTransport | FileTransport,
        ledger: Ledger,
        prices: Prices,
        limits: Limits,
        url: str,
    ) -> None:
        self.stopped: Stop | None = None
        self.grace: float | None = None
        """Seconds that requests in flight may still take, ``None``: as long as they do."""
        self._url = public_url(url)
        if isinstance(transport, FileTransport):  # what is in files is no request of this run
            limits = replace(limits, max_cost=None, max_requests=None)
        self._transport, self._ledger, self._prices, self._limits = transport, ledger, prices, limits
        self._live = isinstance(transport, LiveTransport)
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._rpm = _Pace(limits.rpm) if limits.rpm and self._live else None
        self._tpm = _Pace(limits.tpm) if limits.tpm and self._live else None
        self._reserved = 0.0
        self._settled = asyncio.Condition()
        self._stopping = asyncio.Event()
        self._asking: dict[str, asyncio.Event] = {}  # by request in flight, set when it has ended
        self._sent = 0
        self._unusable: Counter[str] = Counter()  # by stage, how many questions in a row have no usable answer
        self._thinking = set(limits.reasoning)
        self._lacking: dict[str, set[str]] = {}  # by model, the parameters that the server does not take
        self._most_name = _MOST_TOKENS[(urlsplit(url).hostname or "").endswith("openai.com")]
        self.usage = Usage()
        self.recount()

    def recount(self) -> None:
        """Read from the ledger what all runs have cost so far."""
        self.usage.cost = sum(total["cost"] for total in self._ledger.totals().values())

    async def ask(self, request: Request[AnswerType]) -> AnswerType:
        """The checked answer to a question.

        Raises:
            BadAnswer: The record that asks has failed.
            Stop: The run cannot go on.
        """
        keys: list[str] = []
        while True:
            key = request.key()
            try:
                answer, fresh = await self._answer(key, request)
            except BadAnswer as error:
                raise BadAnswer(str(error), [*keys, *error.requests]) from error
            result, problem = chat.read_answer(answer, request.answer)
            if result is not None:
                self._unusable[request.stage] = 0
                return result
            keys.append(key)
            following = request.follow_up(answer, problem)
            if fresh and (following is None or chat.unreadable(answer)):
                self._count_unusable(request, "gives no usable answer", problem)
            if following is None:
                raise BadAnswer(f"{request.stage}: {problem}", keys)
            if chat.only_thoughts(answer):
                self._thinking.add(request.model)
            request = following

    def stop(self, reason: str, budget: bool = False) -> Stop:
        """Send nothing more; returns why, the first reason if there were several."""
        self.stopped = self.stopped or Stop(reason, budget)
        self._stopping.set()
        if not self._live and not budget:
            self.grace = 0.0  # jobs go on without us
        return self.stopped

    def interrupt(self) -> None:
        """Send nothing more; requests in flight may take :data:`GRACE` seconds."""
        self.grace = GRACE if self._live else 0.0
        self.stop("interrupted; the same command goes on from here")

    async def _answer(self, key: str, request: Request[Any]) -> tuple[Answer, bool]:
        """The answer to a request, and whether it came from the server just now. Who asks what another record is asking
        waits for that answer, and asks itself if there is none."""
        while (asking := self._asking.get(key)) is not None:
            await asking.wait()
        if (answer := self._ledger.answer(key)) is not None:
            return answer, False
        self._asking[key] = asyncio.Event()
        try:
            return await self._answer_of_server(key, request), True
        finally:
            self._asking.pop(key).set()

    async def _answer_of_server(self, key: str, request: Request[Any]) -> Answer:
        retries = 0
        async with self._slots:
            while True:
                body = self._body(request)
                try:
                    answer = await self._attempt(key, request, body)
                    break
                except Refused as error:
                    if not self._does_without(request.model, body, error):
                        raise self._failure(request, str(error), error.line) from error
                except NoAnswer as error:
                    if retries == (MAX_RETRIES if self._live else BATCH_RETRIES):
                        raise self._failure(request, f"no answer, {error} {retries + 1} times") from error
                    backoff = min(0.5 * 2**retries, 8.0) * (1 - 0.25 * random.random())
                    await self._wait(error.wait or backoff)
                    retries += 1
        self.usage.requests += 1
        self.usage.tokens += answer.prompt_tokens + answer.completion_tokens
        return answer

    async def _attempt(self, key: str, request: Request[Any], body: dict[str, Any]) -> Answer:
        """Send a request once, within the limits."""
        content, most = chat.encode_body(body)
        cost = self._prices.cost(request.model, *most)
        await self._reserve(cost)
        try:
            delay = self._rpm.delay() if self._rpm is not None else 0.0
            if self._tpm is not None:
                delay = max(delay, self._tpm.delay(chat.estimate_tokens(request.messages) + most[1]))
            await self._wait(delay)
            answer = await self._transport.send(key, request.model, content, most)
            self.usage.cost += answer.cost
            return answer
        except NoAnswer as error:
            self.usage.cost += error.cost
            raise
        except Stop as stop:
            self.stop(str(stop), stop.budget)
            raise
        finally:
            async with self._settled:
                self._reserved -= cost
                self._settled.notify_all()

    async def _reserve(self, most: float) -> None:
        """Take what a request may cost out of the budget; wait for others to settle where it is tight."""
        async with self._settled:
            while True:
                if self.stopped is not None:
                    raise self.stopped
                if self._limits.max_requests is not None and self._sent >= self._limits.max_requests:
                    raise self.stop(
                        f"the limit of {self._limits.max_requests} requests is reached; {_REMEDY}",
                        budget=True,
                    )
                budget = self._limits.max_cost
                if budget is None or self.usage.cost + self._reserved + most <= budget:
                    break
                if self._reserved <= 1e-12:
                    used = f"${self.usage.cost:.4f} so far, and the next request may cost ${most:.4f}"
                    raise self.stop(
                        f"the budget of ${budget:g} is used up ({used}); {_REMEDY}",
                        budget=True,
                    )
                await self._settled.wait()
            self._reserved += most
            self._sent += 1

    async def _wait(self, seconds: float) -> None:
        """Wait, but not beyond the end of the run."""
        if seconds > 0:
            try:
                await asyncio.wait_for(self._stopping.wait(), seconds)
            except TimeoutError:
                return
        if self.stopped is not None:
            raise self.stopped

    def _body(self, request: Request[Any]) -> dict[str, Any]:
        """The chat completion request, less what the server does not take."""
        model, lacking = known(request.model), self._lacking.get(request.model, set())
        schema = {"name": request.answer.__name__, "strict": True, "schema": request.schema()}
        most_name = self._most_name if self._most_name not in lacking else self._other_most_name()
        body = {
            "model": request.model,
            "messages": request.messages,
            most_name: request.most_tokens(model.thinks or request.model in self._thinking),
            "response_format": {"type": "json_schema", "json_schema": schema},
            "seed": request.seed,
        }
        body |= {"reasoning_effort": request.effort} if model.effort else {}
        body |= {"temperature": request.temperature} if model.temperature else {}
        if "response_format" in lacking:
            demand = f"Answer with one JSON object of this schema and nothing else: {json.dumps(schema['schema'])}"
            first, *rest = request.messages
            body["messages"] = [{"role": first["role"], "content": f"{first['content']}\n\n{demand}"}, *rest]
        return {name: value for name, value in body.items() if name == most_name or name not in lacking}

    def _other_most_name(self) -> str:
        return _MOST_TOKENS[self._most_name == _MOST_TOKENS[0]]

    def _does_without(self, model: str, body: dict[str, Any], error: Refused) -> bool:
        """Whether the server refuses a parameter that can be left out or named otherwise; it is, from now on."""
        lacking = self._lacking.setdefault(model, set())
        said = error.parameter or error.complaint
        for name, words in (_OPTIONAL | {self._most_name: (self._most_name,)}).items():
            refused = any(word in said for word in words) and _UNSUPPORTED.search(error.complaint)
            if name in body and refused and not (name == self._most_name and _TOO_LARGE.search(error.complaint)):
                lacking.add(name)
                return True
        return False

    def _failure(self, request: Request[Any], reason: str, line: str = "") -> BadAnswer:
        """The failure of a record that got no answer.

        Raises:
            Stop: It is one of many in a row.
        """
        self._count_unusable(request, "does not answer", reason)
        return BadAnswer(f"{request.stage}: {reason}", [line] if line else [])

    def _count_unusable(self, request: Request[Any], what: str, reason: str) -> None:
        if reason in ("refused", "content filter"):  # which is for the text, and not for the run
            return
        self._unusable[request.stage] += 1
        if self._unusable[request.stage] >= MAX_UNANSWERED:
            count = self._unusable[request.stage]
            raise self.stop(f"{self._url} {what}, {count} requests in a row (the last: {request.stage}: {reason})")
