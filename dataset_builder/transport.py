"""The way to an OpenAI-compatible server, one HTTP request for one question."""

from __future__ import annotations

import os
from typing import Any, Protocol

import httpx2
import openai

from dataset_builder.chat import read_completion
from dataset_builder.errors import Stop
from dataset_builder.ledger import Answer, Ledger
from dataset_builder.prices import Prices

OPENAI_URL = "https://api.openai.com/v1"

MAX_RETRIES = 8
"""Retries of a request after 408, 409, 429, 5xx, a timeout or a broken connection, by the ``openai`` client: it honours
Retry-After and else waits 0.5 to 8 s, doubling, with jitter."""


class Transport(Protocol):
    """A way to a server."""

    async def send(self, key: str, model: str, body: dict[str, Any]) -> Answer:
        """The answer to a chat completion request, stored in the ledger under ``key``.

        Raises:
            openai.APIError: As the ``openai`` client does.
        """
        ...


def connect(base_url: str | None, timeout: float, connections: int) -> openai.AsyncOpenAI:
    """A client for an OpenAI-compatible server, on aiohttp's transport, which costs least.

    Args:
        base_url: The server; ``None`` for OpenAI's.
        timeout: Seconds for one answer.
        connections: Requests in flight.

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
        http_client=openai.DefaultAioHttpClient(limits=httpx2.Limits(max_connections=connections)),
    )


class LiveTransport:
    """A :class:`Transport` that sends each request at once.

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
        # As the client's README has it for requests of one's own: with the client's retries and errors, but without walking
        # through the body and building objects of the response, which would take more than half as much CPU again.
        response = await self._client.post("/chat/completions", cast_to=httpx2.Response, body=body)
        answer = read_completion(response.json(), model, self._prices)
        await self._ledger.keep_answer(key, model, answer)
        return answer
