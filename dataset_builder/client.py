"""Asking a language model for structured answers over any OpenAI-compatible server, live or through the Batch API.

:class:`LanguageModel` turns a :class:`Request` into a checked pydantic object: from the ledger if it was ever answered,
else from the server, within the limits on cost, requests and rate. A :class:`LiveTransport` sends requests one by one, a
:class:`BatchTransport` gathers them into jobs of the Batch API. Both store an answer in the ledger before they return it.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import httpx2
import openai
from aiolimiter import AsyncLimiter
from pydantic import BaseModel, ValidationError

from dataset_builder.ledger import Answer, Ledger, LedgerError

OPENAI_URL = "https://api.openai.com/v1"

MAX_RETRIES = 8
"""Retries of a request after 408, 409, 429, 5xx, a timeout or a broken connection, by the ``openai`` client: it honours
Retry-After and else waits 0.5 to 8 s, doubling, with jitter."""

MAX_UNANSWERED = 20
"""So many requests in a row without any answer, retries included, and the run stops: the server is down."""

_REASONING = re.compile(r"^(o\d|gpt-5)")

REASONING_TOKENS = 4000
"""Room for the thoughts of a reasoning model, beside its answer."""
_OPTIONAL = ("response_format", "temperature", "seed", "reasoning_effort")
_AnswerType = TypeVar("_AnswerType", bound=BaseModel)


class Stop(Exception):
    """The run cannot go on; what was answered is kept, and the same command goes on from there.

    Args:
        reason: One line for the user.
        budget: Whether a limit of the user's was reached, and not an error.
    """

    def __init__(self, reason: str, budget: bool = False) -> None:
        super().__init__(reason)
        self.budget = budget

    def __reduce__(self) -> tuple[Any, ...]:
        return Stop, (str(self), self.budget)


class BadAnswer(Exception):
    """A record fails: a server refused, cut off or garbled an answer twice, or did not answer.

    Args:
        reason: Why, without any text of the record.
        requests: Hashes of the answered requests that led here; a retry of the record asks them anew.
    """

    def __init__(self, reason: str, requests: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.requests = list(requests)


class Prices:
    """US dollars per million tokens, by model.

    Args:
        file: A JSON file like the bundled ``prices.json``, whose models take precedence over it.
        given: ``MODEL=INPUT,OUTPUT`` as on the command line; these come first.
        factor: 0.5 for the Batch API.
        free: Everything costs nothing: a local server.

    Raises:
        ValueError: A price that cannot be read.
    """

    def __init__(
        self, file: Path | None = None, given: Sequence[str] = (), *, factor: float = 1.0, free: bool = False
    ) -> None:
        table = json.loads((resources.files("dataset_builder") / "prices.json").read_text(encoding="utf-8"))
        self.as_of: str = table["as_of"]
        self.factor = 0.0 if free else factor
        self.free = free
        models = table["models"]
        if file is not None:
            try:
                models |= json.loads(file.read_text(encoding="utf-8"))["models"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{file}: expected JSON with 'models': {{name: [input, output]}}, got {error!r}") from error
        for item in given:
            name, _, price = item.rpartition("=")
            try:
                models[name] = [float(part) for part in price.split(",")]
            except ValueError:
                models[name] = []
            if not name or len(models[name]) != 2 or min(models[name]) < 0:
                raise ValueError(
                    f"--price {item}: expected MODEL=INPUT,OUTPUT in dollars per million tokens, as gpt-4o=2.5,10"
                )
        self._models: dict[str, tuple[float, float]] = {name: (price[0], price[1]) for name, price in models.items()}

    def cost(self, model: str, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars for so many tokens.

        Raises:
            ValueError: The model's price is not known.
        """
        if self.free:
            return 0.0
        price = self._models.get(model) or self._models.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model))
        if price is None:
            raise ValueError(
                f"the price of {model!r} is not known: pass --price {model}=INPUT,OUTPUT in dollars per million tokens "
                "(0,0 for a server of your own)"
            )
        return self.factor * (prompt_tokens * price[0] + completion_tokens * price[1]) / 1e6


@dataclass(frozen=True)
class Request(Generic[_AnswerType]):
    """One question to a model."""

    stage: str
    model: str
    messages: list[dict[str, str]]
    answer: type[_AnswerType]
    max_tokens: int
    """Of the answer; a reasoning model gets :data:`REASONING_TOKENS` more."""
    temperature: float
    seed: int
    effort: str

    def key(self) -> str:
        """SHA-256 of all that shapes the answer; how it is put to a server that lacks something is not part of it."""
        shape = [
            self.model,
            self.messages,
            _schema(self.answer),
            self.max_tokens,
            self.temperature,
            self.seed,
            self.effort,
        ]
        return hashlib.sha256(json.dumps(shape, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def most_tokens(self) -> int:
        """Tokens of the longest answer, thoughts included."""
        return self.max_tokens + (REASONING_TOKENS if _REASONING.match(self.model) else 0)

    def prompt_tokens(self) -> int:
        """About how many tokens the prompt has: a token for four characters, and a few for every message."""
        return sum(len(message["content"]) // 4 + 8 for message in self.messages)


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
    stages: Counter[str] = field(default_factory=Counter)
    """Answers checked, by stage."""


class Transport(Protocol):
    """A way to a server."""

    async def send(self, key: str, model: str, body: dict[str, Any]) -> Answer:
        """The answer to a chat completion request, stored in the ledger under ``key``.

        Raises:
            openai.APIError: As the ``openai`` client does.
        """
        ...


def connect(base_url: str | None, timeout: float) -> openai.AsyncOpenAI:
    """A client for an OpenAI-compatible server, on aiohttp's transport, which costs least.

    Args:
        base_url: The server; ``None`` for OpenAI's.
        timeout: Seconds for one answer.

    Raises:
        Stop: OpenAI's server is meant and there is no key in the environment variable ``OPENAI_API_KEY``.
    """
    key = os.environ.get("OPENAI_API_KEY")
    if not key and base_url is None:
        raise Stop(
            "there is no key: set the environment variable OPENAI_API_KEY, or name a server with --base-url or --local"
        )
    return openai.AsyncOpenAI(
        api_key=key or "none",
        base_url=base_url or OPENAI_URL,
        max_retries=MAX_RETRIES,
        timeout=timeout,
        # 0 is no limit: the run's own is on requests in flight, and None would be aiohttp's, 100.
        http_client=openai.DefaultAioHttpClient(timeout=timeout, limits=httpx2.Limits(max_connections=0)),
    )


class LiveTransport:
    """One HTTP request for one question.

    Args:
        client: The client.
        ledger: Where answers go.
        prices: What they cost.
    """

    def __init__(self, client: openai.AsyncOpenAI, ledger: Ledger, prices: Prices) -> None:
        self._client = client
        self._ledger = ledger
        self._prices = prices

    async def send(self, key: str, model: str, body: dict[str, Any]) -> Answer:
        """See :class:`Transport`."""
        # The client's own method for paths that it does not wrap: its retries and errors, without walking through the
        # body and building an object of the response, which together cost as much as the request itself.
        response = await self._client.post("/chat/completions", cast_to=httpx2.Response, body=body)
        answer = read_completion(json.loads(response.content), model, self._prices)
        await self._ledger.keep_answer(key, model, answer)
        return answer


def read_completion(completion: Any, model: str, prices: Prices) -> Answer:
    """The answer in a chat completion's JSON.

    Raises:
        BadAnswer: It is none.
    """
    try:
        choice = completion["choices"][0]
        message = choice["message"]
        usage = completion.get("usage") or {}
        content, refusal = message.get("content"), message.get("refusal")
        prompt = int(usage.get("prompt_tokens") or 0)
        out = int(usage.get("completion_tokens") or len(content or "") // 4)
        return Answer(content, choice.get("finish_reason") or "stop", refusal, prompt, out, prices.cost(model, prompt, out))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise BadAnswer("the server's answer is no chat completion") from error


class LanguageModel:
    """Structured answers, each paid for once.

    Args:
        transport: The way to the server.
        ledger: Answers of earlier runs and of this one.
        prices: What a request may cost.
        limits: What the run may use.
        url: The server, for messages.
    """

    def __init__(self, transport: Transport, ledger: Ledger, prices: Prices, limits: Limits, url: str) -> None:
        self.usage = Usage(cost=sum(total["cost"] for total in ledger.totals().values()))
        self.stopped: Stop | None = None
        self._transport = transport
        self._ledger = ledger
        self._prices = prices
        self._limits = limits
        self._url = url
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._rpm = AsyncLimiter(limits.rpm, 60) if limits.rpm else None
        self._tpm = AsyncLimiter(limits.tpm, 60) if limits.tpm else None
        self._reserved = 0.0
        self._settled = asyncio.Condition()
        self._sent = 0
        self._unanswered = 0
        self._lacking: dict[str, set[str]] = {}  # by model, the optional parameters that the server does not take

    async def ask(self, request: Request[_AnswerType]) -> _AnswerType:
        """The checked answer to a question.

        Raises:
            BadAnswer: The record that asks has failed.
            Stop: The run cannot go on.
        """
        key = request.key()
        answer = await self._answer(key, request)
        result, problem = _read(answer, request.answer)
        if result is None:
            again = Request(
                stage=request.stage,
                model=request.model,
                messages=[
                    *request.messages,
                    {"role": "assistant", "content": answer.content or ""},
                    {
                        "role": "user",
                        "content": f"That cannot be used: {problem}. Answer again, with the JSON object alone.",
                    },
                ],
                answer=request.answer,
                max_tokens=2 * request.max_tokens,
                temperature=request.temperature,
                seed=request.seed,
                effort=request.effort,
            )
            second = again.key()
            try:
                result, problem = _read(await self._answer(second, again), request.answer)
            except BadAnswer as error:
                raise BadAnswer(str(error), [key]) from error
            if result is None:
                raise BadAnswer(f"{request.stage}: {problem}", [key, second])
        self.usage.stages[request.stage] += 1
        return result

    async def _answer(self, key: str, request: Request[Any]) -> Answer:
        if (answer := self._ledger.answer(key)) is not None:
            return answer
        most = self._prices.cost(request.model, request.prompt_tokens(), request.most_tokens())
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
                    raise self._stop(f"the limit of {self._limits.max_requests} requests is reached", budget=True)
                budget = self._limits.max_cost
                if budget is None or self.usage.cost + self._reserved + most <= budget:
                    break
                if self._reserved <= 1e-12:
                    raise self._stop(f"the budget of ${budget:g} is used up (${self.usage.cost:.4f} so far)", budget=True)
                await self._settled.wait()
            self._reserved += most
            self._sent += 1

    async def _send(self, key: str, request: Request[Any]) -> Answer:
        if self._rpm is not None:
            await self._rpm.acquire()
        if self._tpm is not None:
            await self._tpm.acquire(min(self._tpm.max_rate, request.prompt_tokens() + request.most_tokens()))
        while True:
            body = self._body(request)
            try:
                answer = await self._transport.send(key, request.model, body)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if self._does_without(request.model, body, error):
                    continue
                if error.code == "content_filter":
                    raise BadAnswer(f"{request.stage}: content filter") from error
                raise self._no_answer(f"{request.stage}: the server refuses the request ({self._told(error)})") from error
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise self._stop(
                    f"{self._url} refuses the key (status {error.status_code}): check the environment variable "
                    "OPENAI_API_KEY"
                ) from error
            except openai.NotFoundError as error:
                raise self._stop(
                    f"{self._url} has no model {request.model!r}, or nothing at this address (status 404): check --model, "
                    "--judge and --base-url"
                ) from error
            except openai.RateLimitError as error:
                if error.code == "insufficient_quota":
                    raise self._stop(f"{self._url}: the account's quota is used up (status 429)") from error
                wait = error.response.headers.get("retry-after", "")
                if wait.isdigit() and int(wait) > 120:
                    raise self._stop(f"{self._url} asks to wait {wait} s (status 429): run the same command then") from error
                raise self._no_answer(f"{request.stage}: no answer, status 429 after {MAX_RETRIES} retries") from error
            except openai.APIStatusError as error:
                raise self._no_answer(
                    f"{request.stage}: no answer, status {error.status_code} after {MAX_RETRIES} retries"
                ) from error
            except openai.APITimeoutError as error:
                raise self._no_answer(f"{request.stage}: no answer, timed out {MAX_RETRIES + 1} times") from error
            except openai.APIConnectionError as error:
                raise self._no_answer(f"{request.stage}: no answer, the connection broke {MAX_RETRIES + 1} times") from error
            except json.JSONDecodeError as error:
                raise self._no_answer(f"{request.stage}: the server's answer is no JSON") from error
            except LedgerError as error:
                raise self._stop(str(error)) from error
            self._unanswered = 0
            self.usage.cost += answer.cost
            return answer

    def _body(self, request: Request[Any]) -> dict[str, Any]:
        """The chat completion request, less what the server does not take."""
        schema = _schema(request.answer)  # type: ignore[arg-type]
        body: dict[str, Any] = {"model": request.model, "messages": request.messages}
        body["max_completion_tokens" if self._url == OPENAI_URL else "max_tokens"] = request.most_tokens()
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": request.answer.__name__, "strict": True, "schema": schema},
        }
        body["seed"] = request.seed
        if _REASONING.match(request.model):
            body["reasoning_effort"] = request.effort
        else:
            body["temperature"] = request.temperature
        lacking = self._lacking.get(request.model, set())
        if "response_format" in lacking:
            told = f"Answer with one JSON object of this schema and nothing else: {json.dumps(schema)}"
            first, *rest = request.messages
            body["messages"] = [{"role": first["role"], "content": f"{first['content']}\n\n{told}"}, *rest]
        return {name: value for name, value in body.items() if name not in lacking}

    def _does_without(self, model: str, body: dict[str, Any], error: openai.APIStatusError) -> bool:
        """Whether a 400 is about a parameter that can be left out; it is, from now on."""
        told = f"{error.param or ''} {error.message}".lower()
        names = {
            "response_format": ("response_format", "json_schema", "structured output"),
            "temperature": ("temperature",),
            "seed": ("seed",),
            "reasoning_effort": ("reasoning_effort", "reasoning effort"),
        }
        for name in _OPTIONAL:
            if name in body and any(word in told for word in names[name]):
                self._lacking.setdefault(model, set()).add(name)
                return True
        return False

    def _no_answer(self, reason: str) -> Exception:
        self._unanswered += 1
        if self._unanswered >= MAX_UNANSWERED:
            return self._stop(f"{self._url} does not answer, {self._unanswered} requests in a row (the last: {reason})")
        return BadAnswer(reason)

    def _stop(self, reason: str, budget: bool = False) -> Stop:
        self.stopped = self.stopped or Stop(reason, budget)
        return self.stopped

    def _told(self, error: openai.APIStatusError) -> str:
        """What kind of complaint a server makes; its text may quote the record, so only its code or type is told."""
        return f"status {error.status_code}{f', {error.code or error.type}' if error.code or error.type else ''}"


@functools.cache
def _schema(kind: Any) -> dict[str, Any]:
    schema: dict[str, Any] = kind.model_json_schema()
    return schema


def _read(answer: Answer, kind: type[_AnswerType]) -> tuple[_AnswerType | None, str]:
    """The checked object in an answer, or what is wrong with it."""
    if answer.refusal or answer.finish_reason == "content_filter":
        return None, "refused" if answer.refusal else "content filter"
    if answer.finish_reason == "length":
        return None, "cut off at the length limit"
    if not answer.content:
        return None, "empty answer"
    text = answer.content
    try:
        return kind.model_validate_json(text), ""
    except ValidationError:
        start, end = text.find("{"), text.rfind("}")
    try:  # servers without structured outputs wrap the object in a code fence or a sentence
        return kind.model_validate_json(text[start : end + 1]), ""
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return None, f"invalid answer ({f'{where}: ' if where else ''}{first['type']})"
