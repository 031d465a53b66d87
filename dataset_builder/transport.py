"""The way to an OpenAI-compatible server, one HTTP request for one question."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import httpx2
import openai

from dataset_builder.chat import read_completion
from dataset_builder.errors import Stop
from dataset_builder.ledger import Answer, Ledger
from dataset_builder.prices import Prices

OPENAI_URL = "https://api.openai.com/v1"
"""Where requests go if no other server is named."""

MAX_RETRIES = 8
"""Retries of a request after 408, 409, 429, 5xx, a timeout or a broken connection, by the ``openai`` client: it honours
Retry-After and else waits 0.5 to 8 s, doubling, with jitter."""


def connect(base_url: str | None, timeout: float, connections: int) -> openai.AsyncOpenAI:
    """A client for a server (``None``: OpenAI's) on aiohttp's transport, which costs least; ``timeout`` is in seconds.

    Raises:
        Stop: OpenAI's server is meant and there is no key in the environment variable ``OPENAI_API_KEY``.
    """
    key = os.environ.get("OPENAI_API_KEY")
    if not key and base_url is None:
        remedy = "set the environment variable OPENAI_API_KEY, or name a server with --base-url or --local"
        raise Stop(f"there is no key: {remedy}")
    return openai.AsyncOpenAI(
        api_key=key or "none",
        base_url=base_url or OPENAI_URL,
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
