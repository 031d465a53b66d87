"""Requests for structured chat completions, and how their answers are read."""

import functools
import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from dataset_builder.errors import BadAnswer
from dataset_builder.ledger import Answer
from dataset_builder.prices import Prices

REASONING_TOKENS = 4000
"""Room for the thoughts of a reasoning model, beside its answer."""

AnswerType = TypeVar("AnswerType", bound=BaseModel)


def reasons(model: str) -> bool:
    """Whether a model thinks before it answers: those of OpenAI's o and gpt-5 series."""
    return re.match(r"o\d|gpt-5", model) is not None


@functools.cache
def _json_schema(answer: type[BaseModel]) -> dict[str, Any]:
    return answer.model_json_schema()


@dataclass(frozen=True)
class Request(Generic[AnswerType]):
    """One question to a model."""

    stage: str
    model: str
    messages: list[dict[str, str]]
    answer: type[AnswerType]
    max_tokens: int
    """Of the answer; a reasoning model gets :data:`REASONING_TOKENS` more."""
    temperature: float
    seed: int
    effort: str

    def key(self) -> str:
        """SHA-256 of all that shapes the answer; how it is put to a server that lacks something is not part of it."""
        shape = [self.model, self.messages, self.schema(), self.max_tokens, self.temperature, self.seed, self.effort]
        return hashlib.sha256(json.dumps(shape, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def schema(self) -> dict[str, Any]:
        """The JSON schema of the answer."""
        return _json_schema(self.answer)

    def most_tokens(self) -> int:
        """Tokens of the longest answer, thoughts included."""
        return self.max_tokens + (REASONING_TOKENS if reasons(self.model) else 0)


def estimate_tokens(messages: list[dict[str, str]], per_byte: float = 1.0) -> int:
    """How many tokens messages have: :func:`text_tokens`, and eight for each message."""
    return sum(text_tokens(message["content"], per_byte) + 8 for message in messages)


def text_tokens(text: str, per_byte: float = 1.0) -> int:
    """How many tokens a text has: one for four ASCII characters, and ``per_byte`` for a byte in UTF-8 of the others.

    With 1, no script has more, whatever the tokenizer knows of it: a token is a byte at least. Most have 1/3 at most.
    """
    ascii_characters = len(text.encode("ascii", "ignore"))
    return ascii_characters // 4 + math.ceil(per_byte * (len(text.encode()) - ascii_characters))


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
        out = int(usage.get("completion_tokens") or text_tokens(content or ""))
        return Answer(content, choice.get("finish_reason") or "stop", refusal, prompt, out, prices.cost(model, prompt, out))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise BadAnswer("the server's answer is no chat completion") from error


def read_answer(answer: Answer, kind: type[AnswerType]) -> tuple[AnswerType | None, str]:
    """The checked object in an answer, or ``None`` and what is wrong with it."""
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
