"""Narratives: topics with a narrative and a narrower one, in FollowIR's design (Weller et al. 2024, arXiv:2403.15246).

A file of topics has one JSON object a line: ``id``, ``query``, ``og_instruction``, ``changed_instruction`` and ``docs``,
each with ``id``, ``text``, ``og`` and ``changed``: 1 where the document is relevant under the original and under the changed
narrative, else 0. The pool of every topic is the documents of all topics.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentence_transformers_inf.reading import RecordError, read_json_lines

BUNDLED_TOPICS = Path(str(importlib.resources.files("sentence_transformers_inf") / "evaluation/data/narratives.jsonl"))
"""The 36 bundled topics (CC0); a data statement is beside them."""

_TOPIC_TEXTS = ("id", "query", "og_instruction", "changed_instruction")
_DOCUMENT_TEXTS = ("id", "text")
_LABELS = ("og", "changed")


class NarrativeError(RecordError):
    """A file that does not hold topics; the message names the file, the row, the topic and the remedy."""


@dataclass(frozen=True)
class Document:
    """A document and whether it is relevant to its topic under the original (``og``) and the changed narrative."""

    id: str
    text: str
    og: bool
    changed: bool


@dataclass(frozen=True)
class Topic:
    """A query with an original and a narrower narrative, and the documents that were judged under both."""

    id: str
    query: str
    og_instruction: str
    changed_instruction: str
    docs: tuple[Document, ...]

    @property
    def kept(self) -> list[str]:
        """The ids of the documents that are relevant under both narratives."""
        return [document.id for document in self.docs if document.changed]

    @property
    def excluded(self) -> list[str]:
        """The ids of the documents that are relevant under the original narrative alone."""
        return [document.id for document in self.docs if document.og and not document.changed]


def read_topics(path: str | Path) -> list[Topic]:
    """Read topics and check every one.

    Args:
        path: A ``.jsonl`` file, perhaps compressed; see the module's docstring.

    Returns:
        At least one topic, each with a kept and an excluded document. Ids differ, those of documents in the whole file.

    Raises:
        FileNotFoundError: No such file.
        RecordError: The file cannot be read.
        NarrativeError: A row is not a topic, or there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of topics")
    topics: list[Topic] = []
    place_of: dict[str, str] = {}
    documents: set[str] = set()
    for where, row in read_json_lines(path):
        topic = _topic(row, where)
        place, where = where.rpartition(", ")[2], f"{where}, topic {topic.id!r}"
        if topic.id in place_of:
            raise NarrativeError(f"{where}: {place_of[topic.id]} has a topic of this id; give each its own")
        place_of[topic.id] = place
        for document in topic.docs:
            if document.id in documents:
                raise NarrativeError(f"{where}: two documents have the id {document.id!r}; give each in the file its own")
            documents.add(document.id)
        topics.append(topic)
    if not topics:
        raise NarrativeError(f"{path}: there are no topics in it; write one JSON object a line")
    return topics


def _topic(row: Any, where: str) -> Topic:
    if isinstance(row, dict) and isinstance(row.get("id"), str):
        where += f", topic {row['id']!r}"
    _check(row, _TOPIC_TEXTS, ("docs",), where)
    if not isinstance(row["docs"], list):
        raise NarrativeError(f"{where}: 'docs' is {type(row['docs']).__name__}; make it a list of documents")
    documents = tuple(_document(doc, f"{where}, document {number}") for number, doc in enumerate(row["docs"], start=1))
    topic = Topic(**{key: row[key] for key in _TOPIC_TEXTS}, docs=documents)
    if not topic.kept:
        raise NarrativeError(f"{where}: no document is relevant under both narratives; give one og 1 and changed 1")
    if not topic.excluded:
        raise NarrativeError(
            f"{where}: no document is relevant under the original narrative alone; give one og 1, changed 0"
        )
    return topic


def _document(row: Any, where: str) -> Document:
    _check(row, _DOCUMENT_TEXTS, _LABELS, where)
    for key in _LABELS:
        if row[key] not in (0, 1):
            raise NarrativeError(f"{where}: {key!r} is {row[key]!r}; write 1 (relevant) or 0")
    if row["changed"] and not row["og"]:
        raise NarrativeError(
            f"{where}, {row['id']!r}: relevant under the changed narrative but not under the original one, which is wider; "
            "set og to 1 or changed to 0"
        )
    return Document(row["id"], row["text"], bool(row["og"]), bool(row["changed"]))


def _check(row: Any, texts: Iterable[str], others: Iterable[str], where: str) -> None:
    """Whether a row is an object with these keys, and the texts are texts."""
    if not isinstance(row, dict):
        raise NarrativeError(f"{where}: expected a JSON object, got {type(row).__name__}; see the bundled file for the form")
    for key in (*texts, *others):
        if key not in row:
            raise NarrativeError(f"{where}: the key {key!r} is missing; add it")
    for key in texts:
        if not isinstance(row[key], str) or not row[key].strip():
            raise NarrativeError(
                f"{where}: {key!r} is {'blank' if isinstance(row[key], str) else 'not text'}; write its text"
            )
