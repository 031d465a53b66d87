"""Requests for structured chat completions, and how their answers are read."""

import functools
import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from dataset_builder.ledger import Answer
from dataset_builder.models import THINKING_TOKENS, known
from dataset_builder.prices import Prices

POSSIBLY_PAID = " (possibly paid)"
"""Stands after a model's name in the ledger and report where a server did not say what it used: the most is counted."""

_UNREADABLE = "unreadable answer"
_MOST_USAGE = 1_000_000
"""Tokens; a server that says that it used more for one request is not believed."""
_BYTES_PER_TOKEN = 64
"""An answer that has more than so many bytes for each token that it was allowed is not read."""
_THINKING_ROUNDS = 3
"""So often the room for thoughts doubles."""

AnswerType = TypeVar("AnswerType", bound=BaseModel)


def reasons(model: str) -> bool:
    """Whether a model is known to think before it answers."""
    return known(model).thinks


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
    """Of the answer; a model that thinks gets :data:`~dataset_builder.models.THINKING_TOKENS` more."""
    temperature: float
    seed: int
    effort: str
    rounds: int = 0
    """How often the room for thoughts was doubled."""
    repaired: bool = False
    """Whether it asks once more, after an answer that could not be used."""

    def key(self) -> str:
        """SHA-256 of all that shapes the answer; how it is put to a server that lacks something is not part of it."""
        shape = [self.model, self.messages, self.schema(), self.max_tokens, self.temperature, self.seed, self.effort]
        shape += [self.rounds] if self.rounds else []
        return hashlib.sha256(json.dumps(shape, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def schema(self) -> dict[str, Any]:
        """The JSON schema of the answer."""
        return _json_schema(self.answer)

    def most_tokens(self, thinks: bool) -> int:
        """Tokens of the longest answer, thoughts included."""
        doubled = self.rounds - (not thinks)
        return self.max_tokens + (THINKING_TOKENS << doubled if doubled >= 0 else 0)

    def follow_up(self, answer: Answer, problem: str) -> "Request[AnswerType] | None":
        """What to ask after an answer that cannot be used: with more room for thoughts, or once with what is wrong."""
        if only_thoughts(answer):
            return replace(self, rounds=self.rounds + 1) if self.rounds < _THINKING_ROUNDS else None
        if self.repaired:
            return None
        repair = f"That cannot be used: {problem}. Answer again, with the JSON object alone."
        messages, content = self.messages, escape_control_tokens(answer.content or "")
        if content and len(content) <= 16 * self.max_tokens:
            messages = [*messages, {"role": "assistant", "content": content}, {"role": "user", "content": repair}]
        else:  # no turn without a text: some servers refuse it
            *before, last = messages
            messages = [*before, last | {"content": f"{last['content']}\n\nAn earlier answer was of no use. {repair}"}]
        tokens = max(self.max_tokens, min(2 * self.max_tokens, known(self.model).output))
        return replace(self, messages=messages, max_tokens=tokens, repaired=True)


def escape_control_tokens(text: str) -> str:
    r"""JSON whose strings hold nothing that a tokenizer takes for a control token: ``<`` is written as ``\u003c``, and so
    is ``[`` before a name in capitals, as in ``[/INST]`` and ``[SEP]``."""
    return re.sub(r"\[(?=/?[A-Z_]+\])", r"\\u005b", text.replace("<", r"\u003c"))


def encode_body(body: dict[str, Any]) -> tuple[bytes, tuple[int, int]]:
    """The JSON of a chat completion request, and the tokens that it can take at most, of prompt and answer. A token is a
    byte at least, whatever the tokenizer; the schema counts, and the names in the JSON stand for the marks around
    messages."""
    content = json.dumps(body, ensure_ascii=False).encode()
    return content, (len(content), body.get("max_completion_tokens") or body.get("max_tokens") or 0)


def estimate_tokens(messages: list[dict[str, str]]) -> int:
    """About how many tokens messages have: :func:`text_tokens`, and eight for each message."""
    return sum(text_tokens(message["content"]) + 8 for message in messages)


def text_tokens(text: str) -> int:
    """About how many tokens a text has: one for four ASCII characters, and for three bytes in UTF-8 of the others."""
    ascii_characters = len(text.encode("ascii", "ignore"))
    return ascii_characters // 4 + math.ceil((len(text.encode()) - ascii_characters) / 3)


def read_completion(data: Any, model: str, prices: Prices, most: tuple[int, int]) -> tuple[Answer, bool]:
    """The answer in a chat completion, whatever a server sent.

    Args:
        data: The bytes of a response, or the JSON object that they hold.
        model: The model that was asked.
        prices: What it costs.
        most: Tokens that the request can have taken, of prompt and answer.

    Returns:
        The answer, and whether the server said what it used; else the most is counted. Of an answer that cannot be read,
        only ``finish_reason`` has a text: that it is unreadable, and why.
    """
    content = refusal = None
    counts: list[int | None] = [None, None]
    reason = "no JSON"
    try:  # whatever goes wrong in here is the server's doing
        completion = json.loads(data) if isinstance(data, bytes) else data
        reason = "no chat completion"
        usage = completion.get("usage")
        if isinstance(usage, dict):
            counts = [_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
        choice = completion["choices"][0]
        message, finished = choice["message"], choice.get("finish_reason")
        found = [message.get(name) for name in ("content", "refusal")]
        reason = "its text is none, or too long"
        for text in found:
            if text is not None and len(text.encode()) > 1000 + _BYTES_PER_TOKEN * most[1]:
                raise ValueError(reason)
        content, refusal = found
        finish = finished if finished in ("length", "content_filter") else "stop"
    except Exception:
        finish = f"{_UNREADABLE} ({reason})"
    prompt, out = (bound if count is None else count for count, bound in zip(counts, most))
    return Answer(content, finish, refusal, prompt, out, prices.cost(model, prompt, out)), None not in counts


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= _MOST_USAGE else None


def unreadable(answer: Answer) -> bool:
    """Whether a server sent something else than a chat completion."""
    return answer.finish_reason.startswith(_UNREADABLE)


def only_thoughts(answer: Answer) -> bool:
    """Whether a model used up its room before it began to answer."""
    return answer.finish_reason == "length" and not _without_thoughts(answer.content or "").strip()


def _without_thoughts(content: str) -> str:
    """A text without the thoughts that some servers leave in it."""
    _thoughts, end, rest = content.rpartition("</think>")
    return rest if end or not content.lstrip().startswith("<think>") else ""


def read_answer(answer: Answer, kind: type[AnswerType]) -> tuple[AnswerType | None, str]:
    """The checked object in an answer, or ``None`` and what is wrong with it."""
    if unreadable(answer):
        return None, answer.finish_reason
    if answer.refusal or answer.finish_reason == "content_filter":
        return None, "refused" if answer.refusal else "content filter"
    if answer.finish_reason == "length":
        return None, "cut off at the length limit"
    text = _without_thoughts(answer.content or "")
    if not text.strip():
        return None, "empty answer"
    start, end = text.find("{"), text.rfind("}")
    problem = "invalid answer"
    for part in (text, text[start : end + 1]):  # servers without structured outputs wrap the object in a code fence
        try:  # whatever goes wrong in here is the model's doing
            return kind.model_validate_json(part), ""
        except ValidationError as error:
            first = error.errors(include_input=False, include_context=False)[0]
            where = ".".join(str(name) for name in first["loc"] if name in kind.model_fields)  # no words of the server
            problem = f"invalid answer ({f'{where}: ' if where else ''}{first['type']})"
        except Exception:
            problem = "invalid answer"
    return None, problem
