"""Asking a language model for structured answers over any OpenAI-compatible server, live or through the Batch API.

:class:`LanguageModel` turns a :class:`~dataset_builder.chat.Request` into a checked pydantic object: from the ledger if it
was ever answered, else from the server, within the limits on cost, requests and rate.
"""

import asyncio
import base64
import json
import os
import re
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx2
import openai
from aiolimiter import AsyncLimiter

from dataset_builder.batches import BatchTransport
from dataset_builder.chat import AnswerType, Request, estimate_tokens, read_answer, read_completion, reasons
from dataset_builder.errors import BadAnswer, Stop
from dataset_builder.ledger import Answer, Ledger, LedgerError
from dataset_builder.prices import Prices

OPENAI_URL = "https://api.openai.com/v1"
"""Where requests go if no other server is named."""

MAX_RETRIES = 8
"""Retries of a request after 408, 409, 429, 5xx, a timeout or a broken connection, by the ``openai`` client: it honours
Retry-After and else waits 0.5 to 8 s, doubling, with jitter."""

MAX_UNANSWERED = 20
"""So many requests in a row without any answer, retries included, and the run stops: the server is down."""

_OPTIONAL = {
    "response_format": ("response_format", "json_schema", "structured output"),
    "temperature": ("temperature",),
    "seed": ("seed",),
    "reasoning_effort": ("reasoning_effort", "reasoning effort"),
}
"""Parameters that a server may refuse, and the words by which its complaint names them."""


@dataclass
class Limits:
    """What a run may use."""

    concurrency: int = 64
    """Requests in flight."""
    rpm: int | None = None
    """Requests per minute."""
    tpm: int | None = None
    """Tokens per minute, prompt and longest possible answer."""
    max_cost: float | None = None
    """US dollars, all runs into one folder together. Never exceeded: a request is sent if its longest answer fits."""
    max_requests: int | None = None
    """Requests, of this run."""
    timeout: float = 120.0
    """Seconds for one answer."""


@dataclass
class Usage:
    """What a run has used so far."""

    requests: int = 0
    tokens: int = 0
    cost: float = 0.0


def public_url(url: str) -> str:
    """An address without what may be secret in it: user, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def connect(base_url: str | None, timeout: float, connections: int) -> openai.AsyncOpenAI:
    """A client for a server (``None``: OpenAI's) on aiohttp's transport, which costs least; ``timeout`` is in seconds.

    Raises:
        Stop: OpenAI's server is meant and there is no key in the environment variable ``OPENAI_API_KEY``, or what is in it
            cannot be one.
    """
    key = os.environ.get("OPENAI_API_KEY")
    if not key and base_url is None:
        remedy = "set the environment variable OPENAI_API_KEY, or name a server with --base-url or --local"
        raise Stop(f"there is no key: {remedy}")
    if key and not re.fullmatch("[!-~]+", key):
        raise Stop("OPENAI_API_KEY holds a space, a line end or a character outside of ASCII, as no key does: copy it again")
    parts = urlsplit(base_url or OPENAI_URL)
    login, _, host = parts.netloc.rpartition("@")  # as a header: aiohttp takes none in an address beside a key
    basic = {"Authorization": f"Basic {base64.b64encode(unquote(login).encode()).decode()}"} if login else None
    return openai.AsyncOpenAI(
        api_key=key or "none",
        base_url=urlunsplit(parts._replace(netloc=host)),
        default_headers=basic,
        max_retries=MAX_RETRIES,
        timeout=timeout,
        http_client=openai.DefaultAioHttpClient(limits=httpx2.Limits(max_connections=connections)),
    )


@dataclass(frozen=True)
class LiveTransport:
    """Sends each request at once."""

    client: openai.AsyncOpenAI
    ledger: Ledger
    prices: Prices

    async def send(self, key: str, model: str, body: dict[str, Any]) -> Answer:
        """The answer to a chat completion request, stored in the ledger under ``key``.

        Raises:
            openai.APIError: As the ``openai`` client does.
        """
        # As the client's README has it for requests of one's own: with the client's retries and errors, but without walking
        # through the body and building objects of the response, which would take more than half as much CPU again.
        response = await self.client.post("/chat/completions", cast_to=httpx2.Response, body=body)
        answer = read_completion(response.json(), model, self.prices)
        await self.ledger.keep_answer(key, model, answer)
        return answer


class LanguageModel:
    """Structured answers, each paid for once; ``url`` is the server's, for messages."""

    def __init__(
        self, transport: LiveTransport | BatchTransport, ledger: Ledger, prices: Prices, limits: Limits, url: str
    ) -> None:
        self.usage = Usage(cost=sum(total["cost"] for total in ledger.totals().values()))
        self.stopped: Stop | None = None
        self._transport, self._ledger, self._prices, self._limits = transport, ledger, prices, limits
        self._url = public_url(url)
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._rpm = AsyncLimiter(limits.rpm, 60) if limits.rpm else None
        self._tpm = AsyncLimiter(limits.tpm, 60) if limits.tpm else None
        self._reserved = 0.0
        self._settled = asyncio.Condition()
        self._sent = 0
        self._unanswered = 0
        self._lacking: dict[str, set[str]] = {}  # by model, the optional parameters that the server does not take

    async def ask(self, request: Request[AnswerType]) -> AnswerType:
        """The checked answer to a question.

        Raises:
            BadAnswer: The record that asks has failed.
            Stop: The run cannot go on.
        """
        key = request.key()
        answer = await self._answer(key, request)
        result, problem = read_answer(answer, request.answer)
        if result is None:
            repair = f"That cannot be used: {problem}. Answer again, with the JSON object alone."
            exchange = [{"role": "assistant", "content": answer.content or ""}, {"role": "user", "content": repair}]
            again = replace(request, messages=[*request.messages, *exchange], max_tokens=2 * request.max_tokens)
            second = again.key()
            try:
                result, problem = read_answer(await self._answer(second, again), request.answer)
            except BadAnswer as error:
                raise BadAnswer(str(error), [key]) from error
            if result is None:
                raise BadAnswer(f"{request.stage}: {problem}", [key, second])
        return result

    def stop(self, reason: str, budget: bool = False) -> Stop:
        """Send nothing more; returns why, the first reason if there were several."""
        self.stopped = self.stopped or Stop(reason, budget)
        return self.stopped

    async def _answer(self, key: str, request: Request[Any]) -> Answer:
        if (answer := self._ledger.answer(key)) is not None:
            return answer
        most = self._prices.cost(request.model, estimate_tokens(request.messages), request.most_tokens())
        async with self._slots:
            await self._reserve(most)
            try:
                answer = await self._send(key, request)
            finally:
                async with self._settled:
                    self._reserved -= most
                    self._settled.notify_all()
        self.usage.requests += 1
        self.usage.tokens += answer.prompt_tokens + answer.completion_tokens
        return answer

    async def _reserve(self, most: float) -> None:
        """Take what a request may cost out of the budget; wait for others to settle where it is tight."""
        async with self._settled:
            while True:
                if self.stopped is not None:
                    raise self.stopped
                if self._limits.max_requests is not None and self._sent >= self._limits.max_requests:
                    raise self.stop(f"the limit of {self._limits.max_requests} requests is reached", budget=True)
                budget = self._limits.max_cost
                if budget is None or self.usage.cost + self._reserved + most <= budget:
                    break
                if self._reserved <= 1e-12:
                    raise self.stop(f"the budget of ${budget:g} is used up (${self.usage.cost:.4f} so far)", budget=True)
                await self._settled.wait()
            self._reserved += most
            self._sent += 1

    async def _send(self, key: str, request: Request[Any]) -> Answer:
        if self._rpm is not None:
            await self._rpm.acquire()
        if self._tpm is not None:
            tokens = estimate_tokens(request.messages) + request.most_tokens()
            await self._tpm.acquire(min(self._tpm.max_rate, tokens))
        while True:
            body = self._body(request)
            try:
                answer = await self._transport.send(key, request.model, body)
            except (openai.APIStatusError, openai.APIConnectionError, json.JSONDecodeError, LedgerError) as error:
                if self._does_without(request.model, body, error):
                    continue
                raise self._failure(request, error) from error
            self._unanswered = 0
            self.usage.cost += answer.cost
            return answer

    def _body(self, request: Request[Any]) -> dict[str, Any]:
        """The chat completion request, less what the server does not take."""
        schema = {"name": request.answer.__name__, "strict": True, "schema": request.schema()}
        body = {
            "model": request.model,
            "messages": request.messages,
            "max_completion_tokens" if self._url == OPENAI_URL else "max_tokens": request.most_tokens(),
            "response_format": {"type": "json_schema", "json_schema": schema},
            "seed": request.seed,
        }
        body |= {"reasoning_effort": request.effort} if reasons(request.model) else {"temperature": request.temperature}
        lacking = self._lacking.get(request.model, set())
        if "response_format" in lacking:
            demand = f"Answer with one JSON object of this schema and nothing else: {json.dumps(schema['schema'])}"
            first, *rest = request.messages
            body["messages"] = [{"role": first["role"], "content": f"{first['content']}\n\n{demand}"}, *rest]
        return {name: value for name, value in body.items() if name not in lacking}

    def _does_without(self, model: str, body: dict[str, Any], error: Exception) -> bool:
        """Whether the server refuses a parameter that can be left out; it is, from now on."""
        if isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
            complaint = f"{error.param or ''} {error.message}".lower()
            for name, words in _OPTIONAL.items():
                if name in body and any(word in complaint for word in words):
                    self._lacking.setdefault(model, set()).add(name)
                    return True
        return False

    def _failure(self, request: Request[Any], error: Exception) -> Exception:
        """What an error means: :class:`Stop` for the run, or :class:`BadAnswer` for the record."""
        if isinstance(error, LedgerError):
            return self.stop(str(error))
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return self.stop(
                f"{self._url} refuses the key (status {error.status_code}): check the environment variable OPENAI_API_KEY"
            )
        if isinstance(error, openai.NotFoundError):
            return self.stop(
                f"{self._url} has no model {request.model!r}, or nothing at this address (status 404): check --model, "
                "--judge and --base-url"
            )
        if isinstance(error, openai.RateLimitError):
            if error.code == "insufficient_quota":
                return self.stop(f"{self._url}: the account's quota is used up (status 429)")
            wait = error.response.headers.get("retry-after", "")
            if wait.isdigit() and int(wait) > 120:
                return self.stop(f"{self._url} asks to wait {wait} s (status 429): run the same command then")
        reason = f"{request.stage}: {_describe(error)}"
        if reason.endswith(": content filter"):
            return BadAnswer(reason)
        self._unanswered += 1
        if self._unanswered >= MAX_UNANSWERED:
            return self.stop(f"{self._url} does not answer, {self._unanswered} requests in a row (the last: {reason})")
        return BadAnswer(reason)


def _describe(error: Exception) -> str:
    """An error in a few words; a server's text may quote the record, so only its code or type is in them."""
    if isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
        if error.code == "content_filter":
            return "content filter"
        kind = error.code or error.type
        return f"the server refuses the request (status {error.status_code}{f', {kind}' if kind else ''})"
    if isinstance(error, openai.APIStatusError):
        return f"no answer, status {error.status_code} after {MAX_RETRIES} retries"
    if isinstance(error, openai.APITimeoutError):
        return f"no answer, timed out {MAX_RETRIES + 1} times"
    if isinstance(error, openai.APIConnectionError):
        return f"no answer, the connection broke {MAX_RETRIES + 1} times"
    return "the server's answer is no JSON"
