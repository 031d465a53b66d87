"""Chat completions over any OpenAI-compatible server, one request at a time, and what its errors mean."""

import asyncio
import base64
import contextlib
import functools
import json
import math
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import aiohttp
import httpx2
import openai

from dataset_builder.chat import POSSIBLY_PAID, read_completion
from dataset_builder.errors import NoAnswer, Refused, Stop
from dataset_builder.ledger import Answer, Ledger
from dataset_builder.prices import Prices

OPENAI_URL = "https://api.openai.com/v1"
"""Where requests go if no other server is named."""

_LONGEST_WAIT = 120.0
"""Seconds; a run does not wait longer, however a server asks."""

_MOST_BYTES, _MOST_OF_FILE = 1 << 24, 1 << 30
"""Of a reply, and of the answers of a job; a longer one is not read to its end."""

_JSON = {"Content-Type": "application/json"}

_CODES = (
    "batch_cancelled", "batch_expired", "content_filter", "context_length_exceeded", "insufficient_quota",
    "invalid_prompt", "invalid_request_error", "invalid_schema", "invalid_type", "invalid_value",
    "missing_required_parameter", "model_not_found", "rate_limit_exceeded", "server_error", "string_above_max_length",
    "token_limit_exceeded", "unknown_parameter", "unsupported_parameter", "unsupported_value",
)  # fmt: skip
"""Codes of errors that may be shown; another one is a server's own words."""


def read_key(base_url: str | None) -> str:
    """The key in the environment variable ``OPENAI_API_KEY``; empty if there is none and another server is named.

    Raises:
        ValueError: OpenAI's server is meant (``None``) and there is no key, or what is there cannot be one.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and base_url is None:
        remedy = "set the environment variable OPENAI_API_KEY, or name a server with --base-url or --local"
        raise ValueError(f"there is no key: {remedy}")
    if not re.fullmatch("[!-~]*", key):
        raise ValueError("the environment variable OPENAI_API_KEY holds a character that no key has: copy the key once more")
    return key


def public_url(url: str) -> str:
    """An address without what may be secret in it: user, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def connect(base_url: str | None, timeout: float, connections: int) -> tuple[openai.AsyncOpenAI, httpx2.AsyncClient]:
    """A client for a server (``None``: OpenAI's), and the HTTP client below it, with its address and headers, on aiohttp's
    transport, which costs least; ``timeout`` is in seconds.

    They send nothing again by themselves: each attempt is counted against the limits and the budget.

    Raises:
        Stop: See :func:`read_key`; or ``base_url`` is no address.
    """
    try:
        key = read_key(base_url)
        parts = urlsplit(base_url or OPENAI_URL)
    except ValueError as error:
        raise Stop(str(error)) from error
    login, _, host = parts.netloc.rpartition("@")  # as a header: aiohttp takes none in an address beside a key
    basic = {"Authorization": f"Basic {base64.b64encode(unquote(login).encode()).decode()}"} if login else None
    http = openai.DefaultAioHttpClient(
        timeout=timeout,
        limits=httpx2.Limits(max_connections=connections),
        event_hooks={"response": [_read_bounded]},
    )
    try:
        client = openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=urlunsplit(parts._replace(netloc=host)),
            default_headers=basic,
            max_retries=0,
            timeout=timeout,
            http_client=http,
        )
    except httpx2.InvalidURL as error:
        raise Stop(f"--base-url {base_url}: this is no address, expected one as http://localhost:8000/v1") from error
    http.base_url = client.base_url
    headers = client.auth_headers | client.default_headers
    del headers["Content-Type"]  # which is for each request to say
    http.headers.update({name: value for name, value in headers.items() if isinstance(value, str)})
    return client, http


async def _read_bounded(response: httpx2.Response) -> None:
    """Read a reply here unless it is short by its header: what a few bytes inflate to must not fill the memory.

    Raises:
        httpx2.DecodingError: It is longer than any answer.
    """
    most = _MOST_OF_FILE if response.request.url.path.endswith("/content") else _MOST_BYTES
    if "content-encoding" not in response.headers and int(response.headers.get("content-length", most + 1)) <= most:
        return
    body = bytearray()
    reading = httpx2.Response(
        response.status_code, headers=response.headers, stream=response.stream, request=response.request
    )
    async for part in reading.aiter_bytes():  # inflated in pieces
        body += part
        if len(body) > most:
            raise httpx2.DecodingError("longer than any answer")
    response.headers.pop("content-encoding", None)
    response.stream = httpx2.ByteStream(bytes(body))


@dataclass(frozen=True)
class LiveTransport:
    """Sends each request at once, by the HTTP client of :func:`connect`."""

    http: httpx2.AsyncClient
    ledger: Ledger
    prices: Prices

    @functools.cached_property
    def _url(self) -> httpx2.URL:
        return self.http.base_url.join("chat/completions")

    async def send(self, key: str, model: str, content: bytes, most: tuple[int, int]) -> Answer:
        """The answer to a chat completion request, ``content``, that takes ``most`` tokens, stored in the ledger under
        ``key``.

        What may have been paid without an answer is stored as well, at its most, under a name of its own.

        Raises:
            Refused: The server does not take the request as it is.
            NoAnswer: There is none; another attempt may bring one.
            Stop: No request will be answered.
        """
        # Not by openai's client, which would take half as much CPU again.
        data = b""
        try:
            async with asyncio.timeout(self.http.timeout.read):  # which the client itself begins anew with each byte
                response = await self.http.post(self._url, content=content, headers=_JSON)
            data = response.content
            if not response.is_success:
                raise _status_error(response)
        except Exception as error:
            if not any(isinstance(cause, httpx2.DecodingError) for cause in _causes(error)):  # that is an unreadable answer
                failure = explain(error, str(self.http.base_url), model)
                if isinstance(failure, NoAnswer) and failure.sent:
                    failure.cost = await keep_possibly_paid(self.ledger, self.prices, model, most)
                raise failure from (error if isinstance(error, openai.APIError) else None)  # another one may show the key
        except asyncio.CancelledError:
            await keep_possibly_paid(self.ledger, self.prices, model, most)
            raise
        answer, certain = read_completion(data, model, self.prices, most)
        await self.ledger.keep_answer(key, model if certain else model + POSSIBLY_PAID, answer)
        return answer


async def keep_possibly_paid(ledger: Ledger, prices: Prices, model: str, most: tuple[int, int]) -> float:
    """Count in the ledger, at its most, a request that has no answer and yet may have to be paid: its dollars."""
    cost = prices.cost(model, *most)
    if cost:
        await ledger.keep_answer(uuid.uuid4().hex, model + POSSIBLY_PAID, Answer(None, "no answer", None, *most, cost))
    return cost


def _status_error(response: httpx2.Response) -> openai.APIStatusError:
    """What openai's client raises for a response."""
    body: Any = response.text
    with contextlib.suppress(ValueError, RecursionError):
        body = json.loads(body)
    return openai.APIStatusError("", response=response, body=body.get("error", body) if isinstance(body, dict) else body)


def explain(error: Exception, url: str, model: str | None = None) -> Refused | NoAnswer | Stop:
    """What an error of a client or its transport means; nothing in its text is the server's. ``model`` is the one that
    was asked."""
    url = str(httpx2.URL(url).copy_with(userinfo=b"")).rstrip("/")
    if isinstance(error, openai.APIConnectionError | httpx2.RequestError):
        return _explain_connection(error)
    if isinstance(error, TimeoutError):
        return NoAnswer("timed out", sent=True)
    if not isinstance(error, openai.APIStatusError):  # the transport lets its own errors through where a reply is no HTTP
        return NoAnswer("an answer that is none", sent=True)
    status, code = error.status_code, error_code(error.code, error.type)
    wait = _wait(error.response.headers)
    if status in (401, 403):
        return Stop(f"{url} refuses the key (status {status}): check the environment variable OPENAI_API_KEY")
    if status == 404:
        what = f"has no model {model!r}, or nothing" if model else "has no Batch API"
        return Stop(f"{url} {what} at this address (status 404): check --model, --judge and --base-url")
    if status == 402 or code == "insufficient_quota":
        return Stop(f"{url}: the account's quota is used up (status {status})")
    if status in (408, 409, 429) or status >= 500:
        if wait is not None and wait > _LONGEST_WAIT:
            return Stop(f"{url} asks to wait {wait:.6g} s (status {status}): run the same command then")
        return NoAnswer(f"status {status}", wait)
    return refused(status, error.body)


def refused(status: Any, body: Any) -> Refused:
    """What the JSON (or text) of an error with such a status means."""
    fields = body.get("error", body) if isinstance(body, dict) else {}
    fields = fields if isinstance(fields, dict) else {}
    code = error_code(fields.get("code"), fields.get("type"))
    if code == "content_filter":
        return Refused("content filter", "", "")
    parameter = fields.get("param")
    try:
        complaint = json.dumps(body, ensure_ascii=False)[:5000].lower()
    except (ValueError, RecursionError):
        complaint = ""
    reason = f"the server refuses the request (status {status}{code and f', {code}'})"
    return Refused(reason, parameter.lower() if isinstance(parameter, str) else "", complaint)


def error_code(*codes: Any) -> str:
    """The first code of an error that is known, or nothing."""
    return next((code for code in codes if isinstance(code, str) and code in _CODES), "")


def _explain_connection(error: Exception) -> NoAnswer:
    """Never mind the client's own reading: it takes a refused or broken connection for a timeout."""
    causes = list(_causes(error))
    for kind, reason in (
        (ConnectionRefusedError, "connection refused"),
        (aiohttp.ClientConnectorDNSError, "no such host"),
        (aiohttp.ClientSSLError, "no secure connection"),
        (aiohttp.ConnectionTimeoutError, "no connection in time"),
        (aiohttp.ClientConnectorError, "no connection"),
        (httpx2.UnsupportedProtocol, "no http:// or https:// address"),
    ):
        if any(isinstance(cause, kind) for cause in causes):
            return NoAnswer(reason)
    timed_out = any(isinstance(cause, TimeoutError) for cause in causes)
    return NoAnswer("timed out" if timed_out else "the connection broke", sent=True)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _wait(headers: httpx2.Headers) -> float | None:
    """Seconds that a server asks to wait, if it names them or a time."""
    asked = headers.get("retry-after", "")
    try:
        wait = float(asked)
    except ValueError:
        try:
            wait = max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
        except (ValueError, OverflowError, OSError):
            return None
    return wait if math.isfinite(wait) and wait >= 0 else None
