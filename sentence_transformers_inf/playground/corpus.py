"""The passages of a playground, and the cases of a corpus as examples to try."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sentence_transformers_inf.corpora import read_passages
from sentence_transformers_inf.evaluation.elsewhere import HELP_CENTRE
from sentence_transformers_inf.evaluation.narratives import BUNDLED_TOPICS, read_topics
from sentence_transformers_inf.reading import is_table, read_table
from sentence_transformers_inf.records import (
    INSTRUCTION_TYPES,
    PASSAGE_COLUMNS,
    REQUIRED_COLUMNS,
    load_records,
)


@dataclass(frozen=True)
class Example:
    """A query under an instruction, and which passages (rows of the corpus) it should and should not find."""

    kind: str
    query: str
    instruction: str
    expected: tuple[int, ...]
    unwanted: tuple[int, ...]
    opposite: str
    """The instruction under which it is the other way round."""


@dataclass(frozen=True)
class Corpus:
    """N passages, the kind and topic of each (blank where there is none), and examples."""

    passages: list[str]
    kinds: list[str]
    topics: list[str]
    examples: tuple[Example, ...] = ()
    _by_text: Mapping[tuple[str, ...], Example] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        by_text = {_key(example.query, example.instruction): example for example in reversed(self.examples)}
        object.__setattr__(self, "_by_text", by_text)

    def example(self, query: str, instruction: str) -> Example | None:
        """The example with these texts."""
        return self._by_text.get(_key(query, instruction))

    def kinds_of_examples(self) -> dict[str, int]:
        """How many queries the examples of each kind have, the kinds :func:`ordered`."""
        queries: dict[str, set[str]] = {}
        for example in self.examples:
            queries.setdefault(example.kind, set()).update(_key(example.query))
        return {kind: len(queries[kind]) for kind in ordered(queries)}

    def next_example(self, kind: str, query: str = "") -> Example:
        """The example of a kind whose query comes after ``query``, or the first one."""
        of_kind: dict[tuple[str, ...], Example] = {}
        for example in self.examples:
            if example.kind == kind:
                of_kind.setdefault(_key(example.query), example)
        after = [*of_kind].index(_key(query)) + 1 if _key(query) in of_kind else 0
        return [*of_kind.values()][after % len(of_kind)]

    def find(self, kind: str = "", topic: str = "", words: str = "") -> list[int]:
        """The rows of passages of a kind and a topic that contain some words; blank: any."""
        wanted = words.lower().split()
        return [
            row
            for row, passage in enumerate(self.passages)
            if kind in ("", self.kinds[row])
            and topic in ("", self.topics[row])
            and (not wanted or all(word in passage.lower() for word in wanted))
        ]


def _key(*texts: str) -> tuple[str, ...]:
    """Texts without the white space in which a text box may change them."""
    return tuple(" ".join(text.split()) for text in texts)


def ordered(kinds: Iterable[str]) -> list[str]:
    """Distinct kinds, those of the records' types in the types' order."""
    found = dict.fromkeys(kinds)
    return [kind for kind in INSTRUCTION_TYPES if kind in found] + [kind for kind in found if kind not in INSTRUCTION_TYPES]


def read_corpus(source: str) -> Corpus:
    """The corpus of a playground.

    Args:
        source: ``"mini"`` (the bundled test split: the pool that ``inf-embed evaluate`` ranks), ``"narratives"``,
            ``"help-centre"``, a file of InF-IR records, or one of passages as
            :func:`~sentence_transformers_inf.corpora.read_passages` takes it, which brings no examples.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A row is wrong; the message names it.
    """
    if source == "mini":
        return _of_records(load_records("mini", "test"))
    if source == "narratives":
        return _of_narratives()
    if source == "help-centre":
        return _of_help_centre()
    if is_table(source) and Path(source).is_file():
        _, first = next(read_table(Path(source)), ("", {}))
        if set(REQUIRED_COLUMNS) <= first.keys():
            return _of_records(load_records(source))
    passages = read_passages(source)
    return Corpus(passages, [""] * len(passages), [""] * len(passages))


def _of_records(records: Iterable[Mapping[str, Any]]) -> Corpus:
    passages: list[str] = []
    kinds: list[str] = []
    topics: list[str] = []
    examples: list[Example] = []
    for record in records:
        first, kind, topic = len(passages), record.get("instruction_type") or "", record.get("topic") or ""
        of_record = [record[column] for column in PASSAGE_COLUMNS if record[column] is not None]
        passages += of_record
        kinds += [kind] * len(of_record)
        topics += [topic] * len(of_record)
        told = (record["instruction_positive"], record["instruction_negative"])
        examples += _pair(kind, record["query_positive"], told, first)
    return Corpus(passages, kinds, topics, tuple(examples))


def _of_help_centre() -> Corpus:
    passages: list[str] = []
    kinds: list[str] = []
    examples: list[Example] = []
    for line in Path(HELP_CENTRE).read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        told = (case["instruction_positive"], case["instruction_negative"])
        examples += _pair(case["instruction_type"], case["query"], told, len(passages))
        passages += [case["document"], case["hard_negative_document"]]
        kinds += [case["instruction_type"]] * 2
    return Corpus(passages, kinds, [""] * len(passages), tuple(examples))


def _pair(kind: str, query: str, told: tuple[str, str], first: int) -> list[Example]:
    """Two instructions, the first for the passage in row ``first`` and the second for the next one."""
    rows = ((first,), (first + 1,))
    return [Example(kind, query, told[n], rows[n], rows[1 - n], told[1 - n]) for n in (0, 1)]


def _of_narratives() -> Corpus:
    passages: list[str] = []
    topics: list[str] = []
    examples: list[Example] = []
    for topic in read_topics(BUNDLED_TOPICS):
        row_of = {document.id: row for row, document in enumerate(topic.docs, start=len(passages))}
        kept, excluded = (tuple(row_of[name] for name in names) for names in (topic.kept, topic.excluded))
        wide, narrow = topic.og_instruction, topic.changed_instruction
        examples.append(Example("narrower", topic.query, narrow, kept, excluded, wide))
        examples.append(Example("wider", topic.query, wide, kept + excluded, (), narrow))
        passages += [document.text for document in topic.docs]
        topics += [topic.query] * len(topic.docs)
    return Corpus(passages, [""] * len(passages), topics, tuple(examples))
