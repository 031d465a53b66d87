"""The stages of a build on mined passages: an instruction under which each of two existing passages is the right one.

After Dual-View Training (arXiv:2604.18845): nothing is written but the two instructions. A record has the rows (q+, I+, d+)
and (q+, I-, d1), and no twin query.
"""

import random
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from dataset_builder import stages
from dataset_builder.quality import words
from sentence_transformers_inf.records import INSTRUCTION_TYPES, TWIN_QUERY_COLUMNS

NO_SECOND = "no second passage"
"""Why a pair is rejected for which the corpus has none."""

FORMS = stages.FORMS | {
    "narrative": "a TREC-style narrative of 60 to 110 words: what the user works on, what a relevant document does and what "
    "makes one not relevant",
}
"""The forms of instructions for passages that exist."""

SHOWN_WORDS = 220
"""A longer passage is shown to the models in part; see :func:`shorten`."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")
_SHOWN_CHARACTERS = 10 * SHOWN_WORDS
_PASSAGES = ("document", "hard_negative_document_1")
_CHOICES = Literal["A", "B", "both", "none"]


class Contrasted(BaseModel):
    """Answer of the stage contrast: that a passage does not answer the query, or two instructions."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    both_answer: Literal["yes", "no"]
    kind: str
    instruction_1: str
    instruction_2: str

    @model_validator(mode="after")
    def _instructions(self) -> "Contrasted":
        if self.both_answer == "yes" and not (words(self.instruction_1) and words(self.instruction_2)):
            raise ValueError("a blank instruction")
        return self


class Choices(BaseModel):
    """Answer of the judge who sees two passages and two instructions."""

    model_config = ConfigDict(extra="forbid")

    instruction_1: _CHOICES
    instruction_2: _CHOICES


async def contrast(record: dict[str, Any], candidates: list[str], ask: stages.Ask) -> dict[str, Any] | None:
    """(q+, d+) and the candidates, the best first -> I+, I- and d1; ``None`` where none of them answers the query too."""
    meanings = {"type_meaning": INSTRUCTION_TYPES[record["instruction_type"]], "form_meaning": FORMS[record["form"]]}
    for candidate in candidates:
        shown = [shorten(text, record["query_positive"]) for text in (record["document"], candidate)]
        values = record | meanings | {"kinds": ", ".join(INSTRUCTION_TYPES), "passages": shown}
        answer = await ask("contrast", Contrasted, 500, values)
        if answer.both_answer == "yes":
            kind = answer.kind if answer.kind in INSTRUCTION_TYPES else record["instruction_type"]
            return record | dict.fromkeys(TWIN_QUERY_COLUMNS) | {
                "instruction_type": kind,
                "instruction_positive": answer.instruction_1,
                "instruction_negative": answer.instruction_2,
                "hard_negative_document_1": candidate,
            }  # fmt: skip
    return None


async def judge(record: dict[str, Any], ask: stages.Ask, seed: int, pairwise: bool = False) -> dict[str, Any]:
    """Ask for both instructed queries which passage satisfies them, in one request.

    Args:
        record: A record of :func:`contrast`.
        ask: Puts a prompt to the judge.
        seed: Of the order in which instructions and passages are shown.
        pairwise: Four yes/no judgments instead.

    Returns:
        The record with ``judge_answers``: two of ``document``, ``hard_negative_document_1``, ``several`` and ``none``.
    """
    query, instructions = record["query_positive"], [record["instruction_positive"], record["instruction_negative"]]
    shown = {name: shorten(record[name], query) for name in _PASSAGES}
    if pairwise:
        questions = [
            ask("judge_pairwise", stages.YesNo, 50, {"query": query, "instruction": instruction, "passages": [shown[name]]})
            for instruction in instructions
            for name in _PASSAGES
        ]
        yes = [answer.answer == "yes" for answer in await stages.gather(questions)]
        right = [[name for name, found in zip(_PASSAGES, yes[at : at + 2]) if found] for at in (0, 2)]
        return record | {"judge_answers": [stages.combine(names) for names in right]}
    generator = random.Random(f"{seed}/{record['id']}")
    order, turned = list(_PASSAGES), generator.random() < 0.5
    generator.shuffle(order)
    values = {"query": query, "instructions": instructions[::-1] if turned else instructions}
    answer = await ask("judge_both", Choices, 60, values | {"passages": [shown[name] for name in order]})
    found = [answer.instruction_1, answer.instruction_2]
    names = dict(zip("AB", order)) | {"both": "several", "none": "none"}
    return record | {"judge_answers": [names[choice] for choice in (found[::-1] if turned else found)]}


def shorten(passage: str, query: str) -> str:
    """A passage of at most about :data:`SHOWN_WORDS` words: the sentences in a row that have most words of the query.

    A passage that is short enough comes back as it is. What is left out is marked by "...".
    """
    if len(words(passage)) <= SHOWN_WORDS:
        return passage
    asked = set(words(query))
    sentences = [sentence for sentence in _SENTENCE.split(passage) if sentence.strip()]
    found = [words(sentence) for sentence in sentences]
    best, best_score = (0, 1), -1
    for start in range(len(sentences)):
        end, length, held = start, 0, set()
        while end < len(sentences) and (end == start or length + len(found[end]) <= SHOWN_WORDS):
            length += len(found[end])
            held |= asked.intersection(found[end])
            end += 1
        if len(held) > best_score:
            best, best_score = (start, end), len(held)
    text = " ".join(sentence.strip() for sentence in sentences[slice(*best)])
    is_cut = len(text) > _SHOWN_CHARACTERS  # a sentence without an end
    return f"{'... ' if best[0] else ''}{text[:_SHOWN_CHARACTERS]}{' ...' if is_cut or best[1] < len(sentences) else ''}"
