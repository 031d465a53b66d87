"""The four stages that make an InF-IR tuple of a query-passage pair: instruct, poison, write, judge (Zhuang et al. 2025,
arXiv:2505.21439, §3). Record in, record out; what a stage asks a model goes through its argument ``ask``.

The prompts are the files of ``prompts/``: a system text, a line ``---``, a user text (Jinja templates). Texts of the record
enter them as JSON strings only, so that nothing a passage says can end its quotation, or be a control token.
"""

import asyncio
import functools
import hashlib
import json
import random
from collections.abc import Awaitable, Iterable
from importlib import resources
from typing import Any, Literal, Protocol, TypeVar

import jinja2
from pydantic import BaseModel, ConfigDict, field_validator

from dataset_builder.chat import escape_control_tokens
from dataset_builder.quality import passage_words, words
from sentence_transformers_inf.records import INSTRUCTION_TYPES, PASSAGE_COLUMNS, TRIPLES

FORMS = {
    "imperative": "a command to the search engine",
    "first person": "a sentence or two in the first person about what the user needs and why",
    "relevance criteria": "a TREC-style narrative: a relevant document does this, one that does that is not relevant",
    "exclusion": "worded by what is NOT wanted",
    "keywords": "terse notes, no full sentences",
}
"""The forms in which an instruction is worded, so that a corpus does not collapse onto one style."""

PROMPTS = ("instruct", "poison", "write", "judge", "judge_pairwise", "contrast", "judge_both")
"""The files of ``prompts/``."""

_ROW_NAMES = ("query and instruction", "negative instruction", "negative query")
_Answer = TypeVar("_Answer", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    @field_validator("*")
    @classmethod
    def _not_blank(cls, value: str) -> str:
        if not words(value):
            raise ValueError("blank")
        return value


class Instructed(_Strict):
    """Answer of the stage instruct."""

    instruction: str


class Poisoned(_Strict):
    """Answer of the stage poison."""

    instruction: str
    query: str


class Written(_Strict):
    """Answer of the stage write."""

    passage_1: str
    passage_2: str


class Choice(_Strict):
    """Answer of the judge who sees three passages."""

    answer: Literal["A", "B", "C", "several", "none"]


class YesNo(_Strict):
    """Answer of the judge who sees one passage."""

    answer: Literal["yes", "no"]


class Ask(Protocol):
    """Puts a prompt to the model of its stage and returns the checked answer."""

    async def __call__(self, prompt: str, answer: type[_Answer], max_tokens: int, values: dict[str, Any]) -> _Answer: ...


async def instruct(record: dict[str, Any], ask: Ask) -> dict[str, Any]:
    """(q+, d+) -> I+, of the record's type and form."""
    values = record | {"type_meaning": INSTRUCTION_TYPES[record["instruction_type"]], "form_meaning": FORMS[record["form"]]}
    answer = await ask("instruct", Instructed, 300, values)
    return record | {"instruction_positive": answer.instruction}


async def poison(record: dict[str, Any], ask: Ask) -> dict[str, Any]:
    """(q+, I+) -> q-, I-: near twins."""
    answer = await ask("poison", Poisoned, 500, record)
    return record | {"instruction_negative": answer.instruction, "query_negative": answer.query}


async def write(record: dict[str, Any], ask: Ask) -> dict[str, Any]:
    """The passages right for (q+, I-) and for (q-, I+), in the length and style of d+."""
    low, high = passage_words(record["document"])
    length = len(words(record["document"]))
    values = record | {"low": max(low, int(0.7 * length)), "high": min(high, max(20, int(1.4 * length)))}
    answer = await ask("write", Written, 100 + 5 * values["high"], values)
    return record | {"hard_negative_document_1": answer.passage_1, "hard_negative_document_2": answer.passage_2}


async def judge(record: dict[str, Any], ask: Ask, seed: int, pairwise: bool = False) -> dict[str, Any]:
    """Ask for each of the three instructed queries which passage satisfies it.

    Args:
        record: A full tuple.
        ask: Puts a prompt to the judge.
        seed: Of the order in which the passages are shown; another one for every record and query.
        pairwise: Nine yes/no judgments instead of three choices.

    Returns:
        The record with ``judge_answers``: three of ``document``, ``hard_negative_document_1``,
        ``hard_negative_document_2``, ``several`` and ``none``, in the order of
        :data:`~sentence_transformers_inf.records.TRIPLES`. The tuple stands if they are the three passages in this order.
    """
    return record | {"judge_answers": await gather(_judge_row(record, row, ask, seed, pairwise) for row in range(3))}


async def _judge_row(record: dict[str, Any], row: int, ask: Ask, seed: int, pairwise: bool) -> str:
    query, instruction, _ = TRIPLES[row]
    values = {"query": record[query], "instruction": record[instruction]}
    if pairwise:
        shown = (values | {"passages": [record[name]]} for name in PASSAGE_COLUMNS)
        answers = await gather(ask("judge_pairwise", YesNo, 50, of_one) for of_one in shown)
        return combine([name for name, answer in zip(PASSAGE_COLUMNS, answers) if answer.answer == "yes"])
    order = list(PASSAGE_COLUMNS)
    random.Random(f"{seed}/{record['id']}/{row}").shuffle(order)
    choice = (await ask("judge", Choice, 50, values | {"passages": [record[name] for name in order]})).answer
    return dict(zip("ABC", order)).get(choice, choice)


async def gather(questions: Iterable[Awaitable[Any]]) -> list[Any]:
    """All answers; an exception is raised only when all questions have ended, so that answers are kept."""
    answers = await asyncio.gather(*questions, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


def combine(passages: list[str]) -> str:
    """The judge's answer for the passages that it found right one by one: the passage, ``several`` or ``none``."""
    return passages[0] if len(passages) == 1 else "several" if passages else "none"


def verdict(judge_answers: list[str]) -> str | None:
    """Why the judge's answers reject a tuple, ``None`` if all three are the intended passage."""
    for name, (_, _, passage), answer in zip(_ROW_NAMES, TRIPLES, judge_answers):
        if answer != passage:
            kind = answer if answer in ("several", "none") else "another passage"
            return f"judge: {kind} for the {name}"
    return None


def draw_type_and_form(
    identifier: str, seed: int, weights: dict[str, float] | None = None, forms: Iterable[str] = tuple(FORMS)
) -> tuple[str, str]:
    """The instruction type and form of a record: a pure function of its id, the seed and the weights (``None``: even).

    Raises:
        ValueError: An unknown type, or no positive weight.
    """
    if weights is not None:
        if unknown := sorted(set(weights) - set(INSTRUCTION_TYPES)):
            raise ValueError(f"there is no instruction type {unknown[0]!r}; there are {', '.join(INSTRUCTION_TYPES)}")
        if min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise ValueError("the weights of the instruction types must not be negative, and one must be positive")
    generator = random.Random(f"{seed}/{identifier}")
    shares = [1.0 if weights is None else weights.get(name, 0.0) for name in INSTRUCTION_TYPES]
    return generator.choices(list(INSTRUCTION_TYPES), shares)[0], generator.choice(list(forms))


def render(prompt: str, values: dict[str, Any]) -> list[dict[str, str]]:
    """The messages of a prompt: system and user."""
    system, user = _templates(prompt)
    return [{"role": "system", "content": system.render(values)}, {"role": "user", "content": user.render(values)}]


def prompt_hashes() -> dict[str, str]:
    """By prompt, the first 12 digits of the SHA-256 of its file."""
    return {name: hashlib.sha256(_prompt_text(name).encode()).hexdigest()[:12] for name in PROMPTS}


def _prompt_text(name: str) -> str:
    return (resources.files("dataset_builder") / "prompts" / f"{name}.txt").read_text(encoding="utf-8")


@functools.cache
def _templates(name: str) -> tuple[jinja2.Template, jinja2.Template]:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.globals.clear()  # the prompts use none, and each rendering copies them
    environment.filters["quoted"] = lambda text: escape_control_tokens(json.dumps(text, ensure_ascii=False))
    system, user = _prompt_text(name).split("\n---\n")
    return environment.from_string(system), environment.from_string(user)
