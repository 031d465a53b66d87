"""Whether a server gives the embeddings of a model, and what is wrong with those that it gives.

Texts are sent to the server and encoded here. Where the two differ, they are encoded here once more as a server might do it
wrongly (another pooling, another prompt, ...), until one way gives what the server gave.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from sentence_transformers_inf.modules import detach_adapter, encoder_of, encoders_of, is_adapter
from sentence_transformers_inf.records import PASSAGE_COLUMNS, load_records

CLOSE = 1e-3
"""How far values may differ, of embeddings whose length is 1."""
RANKS = 0.95
"""The share of the ten nearest passages that must be the same for ranks to hold."""

_COUNT = 32
"""Texts of each kind that are compared."""
_TEMPLATES = ("{query}", "{instruction} {query}", "{query} {instruction}", "{instruction}: {query}",
              "Instruct: {instruction}\nQuery: {query}", "Instruct: {instruction}\nQuery:{query}")  # fmt: skip
_PROMPTS = ("", "query: ", "passage: ", "search_query: ", "search_document: ",
            "Represent this sentence for searching relevant passages: ")  # fmt: skip
_LENGTHS = (16, 32, 64, 128, 256, 384, 512, 1024)

Vectors = NDArray[np.float32]


class ServerError(ValueError):
    """A server that cannot be reached, refuses, or answers with something else than embeddings."""


@dataclass(frozen=True)
class Comparison:
    """Embeddings of one kind of text, those that were given against those of the model."""

    what: str
    """Which texts: ``"plain texts"``, ``"instructed queries"`` or the file of an index."""
    contract: str
    """``"bits"``; ``"1e-3"``: no value differs by more; ``"ranks"``: enough of the nearest are the same; ``"none"``."""
    difference: float
    """The largest, in units of the length of the model's embeddings; NaN where dimensions differ."""
    overlap: float
    """The share of the ten nearest that are the same."""
    findings: tuple[str, ...] = ()
    """What is wrong, in words; none if a contract holds."""


class Endpoint:
    """An OpenAI-compatible server of embeddings.

    Args:
        url: Its address, with or without ``/v1`` or ``/v1/embeddings``. It gets the key in ``OPENAI_API_KEY``, if any.
        name: What it calls the model; ``None``: the first that it lists.

    Raises:
        ValueError: The address is none.
    """

    def __init__(self, url: str, name: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url}: expected the address of a server, such as http://127.0.0.1:8000/v1")
        url = url.rstrip("/")
        if not url.endswith("/embeddings"):
            url = f"{url}/embeddings" if url.endswith("/v1") else f"{url}/v1/embeddings"
        self.url = url
        self.name = name or self._first_name()

    def embed(self, texts: Sequence[str], **fields: Any) -> Vectors:
        """The embeddings of texts (N×d), in the order in which they come.

        Raises:
            ServerError: There is no answer, or it holds no such embeddings.
        """
        answer = self._ask(self.url, {"model": self.name, "input": list(texts), **fields})
        try:
            vectors = np.array([entry["embedding"] for entry in answer["data"]], dtype=np.float32)
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(f"{self.url}: the answer holds no embeddings as OpenAI's do: {answer!r:.200}") from error
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise ServerError(f"{self.url}: {len(texts)} texts were sent, and the answer is of shape {vectors.shape}")
        return vectors

    def takes_instructions(self) -> bool:
        """Whether the field ``instruction`` changes an embedding."""
        try:
            plain, told = (self.embed(["how do vaccines work"], input_type="query", **more)
                           for more in ({}, {"instruction": "For children."}))  # fmt: skip
        except ServerError:
            return False
        return plain.shape == told.shape and bool(np.abs(plain - told).max() > CLOSE * np.linalg.norm(plain))

    def _first_name(self) -> str:
        try:
            return str(self._ask(self.url.removesuffix("/embeddings") + "/models")["data"][0]["id"])
        except (ServerError, LookupError, TypeError):
            return "default"

    def _ask(self, url: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        except ValueError as error:
            raise ServerError(f"{url}: this is no address: {error}") from error
        if key := os.environ.get("OPENAI_API_KEY"):
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                answer = response.read()
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace")
            raise ServerError(f"{url}: the server answers {error.code}: {said}") from error
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            raise ServerError(f"{url}: no server answers ({why}): start it, or check the address") from error
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise ServerError(f"{url}: the answer is not JSON: is this an OpenAI-compatible server?") from error


def verify_endpoint(
    endpoint: Endpoint, model: SentenceTransformer, plain: bool = True, told: bool = True
) -> list[Comparison]:
    """Compare a server with a model: its passages, and its instructed queries.

    A server that does not take ``instruction`` gets query and instruction as the one string that the model's template makes
    of them; what instructions exclude is then left in.

    Args:
        endpoint: The server.
        model: From :func:`~sentence_transformers_inf.load_instruction_model`.
        plain: Compare passages.
        told: Compare instructed queries.

    Raises:
        ServerError: It gives no embeddings.
    """
    passages, queries = _probes(model)
    compared = []
    if plain:
        try:
            given = endpoint.embed(passages)
        except ServerError:  # some servers refuse what they would have to cut
            passages.pop()
            given = endpoint.embed(passages)
    references = encode(model, passages)
    if plain:
        compared.append(compare("plain texts", given, references, references, _plain_mistakes(model, passages)))
    if told:
        if takes := endpoint.takes_instructions():
            instructions = [query["instruction"] for query in queries]
            texts = [query["query"] for query in queries]
            given = endpoint.embed(texts, instruction=instructions, input_type="query")
        else:
            queries = [query | {"exclude": None} for query in queries]
            transformer: Any = encoder_of(model)[0]
            given = endpoint.embed([transformer.join(query["instruction"], query["query"]) for query in queries])
        wanted = encode(model, queries, "query")
        mistakes = _told_mistakes(model, queries, takes)
        compared.append(compare("instructed queries", given, wanted, references, mistakes))
    return compared


def verify_index(path: Path, vectors: NDArray, model: SentenceTransformer, passages: Sequence[str]) -> Comparison:
    """Compare stored vectors (N×d) of passages (N) with a model's, at rows spread over the whole."""
    rows = np.unique(np.linspace(0, len(passages) - 1, 2 * _COUNT).astype(int))
    texts = [passages[row] for row in rows]
    references = encode(model, texts)
    given = np.asarray(vectors[rows], dtype=np.float32)
    return compare(str(path), given, references, references, _plain_mistakes(model, texts))


def encode(model: SentenceTransformer, inputs: Sequence[Any], task: str = "document", prompt: str | None = None) -> Vectors:
    """Embeddings (N×d) as the model gives them."""
    function = model.encode_query if task == "query" else model.encode_document
    return np.asarray(function(list(inputs), prompt=prompt, show_progress_bar=False), dtype=np.float32)


Mistakes = Iterator[tuple[str, Vectors]]
"""What a server may do wrongly, in words, and the embeddings that come of it, made when they are asked for."""


def compare(what: str, given: Vectors, wanted: Vectors, passages: Vectors, mistakes: Mistakes) -> Comparison:
    """Which contract holds between two sets of embeddings (N×d), and what is wrong if none does.

    Args:
        what: Which texts they are of.
        given: Those of the server, or stored.
        wanted: The model's.
        passages: The model's of passages, for ranks.
        mistakes: Tried where they differ.
    """
    if given.shape != wanted.shape:
        words = f"{given.shape[1]} dimensions instead of {wanted.shape[1]}: it is another model"
        return Comparison(what, "none", float("nan"), 0.0, (words,))
    if not np.isfinite(given).all():
        return Comparison(what, "none", float("nan"), 0.0, ("values that are not finite: the model is broken",))
    difference = _difference(given, wanted)
    overlap = _overlap(given, wanted, passages)
    if difference <= CLOSE:
        return Comparison(what, "bits" if np.array_equal(given, wanted) else "1e-3", difference, overlap)
    findings = _explain(given, wanted, mistakes)
    ranks = overlap >= RANKS and not findings
    if not ranks and not findings:
        cosine = float((_unit(given) * _unit(wanted)).sum(axis=1).mean())
        findings = [
            f"another model or another revision of it (mean cosine {cosine:.2f}), or a way to encode that is not known here"
        ]
    return Comparison(what, "ranks" if ranks else "none", difference, overlap, tuple(findings))


def _explain(given: Vectors, wanted: Vectors, mistakes: Mistakes) -> list[str]:
    """The mistakes that give these embeddings; none if there is no such."""
    findings = []
    lengths, wanted_lengths = np.linalg.norm(given, axis=1), np.linalg.norm(wanted, axis=1)
    if np.abs(lengths / wanted_lengths - 1).max() > 10 * CLOSE and (_is_one(lengths) or _is_one(wanted_lengths)):
        findings.append("normalised, which the model does not do" if _is_one(lengths) else "not normalised to length 1")
    given, unit = _unit(given), _unit(wanted)
    if _difference(given, unit) <= CLOSE:
        return findings
    nearest = (given @ unit.T).argmax(axis=1)
    if len(set(nearest.tolist())) == len(unit) and _difference(given, unit[nearest]) <= CLOSE:
        return [*findings, "in another order than the texts that were sent"]
    for words, encoded in mistakes:
        if _difference(given, _unit(encoded)) <= CLOSE:
            return [*findings, words]
    return []


def _plain_mistakes(model: SentenceTransformer, texts: Sequence[str]) -> Mistakes:
    if len(encoders_of(model)) > 1:
        yield "encoded by the encoder of instructed queries; serve the one of passages for them", _query_side(model, texts)
    yield from _any_mistakes(model, texts, "document")


def _told_mistakes(model: SentenceTransformer, queries: list[dict[str, Any]], takes: bool) -> Mistakes:
    transformer: Any = encoder_of(model)[0]
    joined = [transformer.join(query["instruction"], query["query"]) for query in queries]
    if is_adapter(model):
        yield "encoded by the base, without the adapter", encode(detach_adapter(model), joined, "query")
    elif len(encoders_of(model)) > 1:
        yield "encoded by the encoder of passages", encode(model, joined)
    if takes:
        with _set([transformer], "find_exclusions", not transformer.find_exclusions):
            vectors = encode(model, queries, "query")
        yield f"what instructions exclude is {'not ' if transformer.find_exclusions else ''}subtracted", vectors
        for template in _TEMPLATES:
            if template != transformer.template:
                words = f"joined by the template {template!r} instead of {transformer.template!r}"
                yield words, _query_side(model, [template.format(**query) for query in queries])
    yield from _any_mistakes(model, queries, "query")


def _query_side(model: SentenceTransformer, texts: Sequence[str]) -> Vectors:
    """Texts, as they are, by the encoder of instructed queries."""
    alone = SentenceTransformer(modules=list(encoder_of(model)), device=str(model.device))
    return encode(alone, texts, prompt=model.prompts.get("query"))


def _any_mistakes(model: SentenceTransformer, inputs: Sequence[Any], task: str) -> Mistakes:
    """Of prompts, lengths and pooling."""
    own = model.prompts.get(task) or ""
    for prompt in dict.fromkeys([*_PROMPTS, *filter(None, model.prompts.values())]):
        if prompt != own:
            yield f"encoded with the prompt {prompt!r} instead of {own!r}", encode(model, inputs, task, prompt)
    transformers: list[Any] = encoders_of(model)
    for length in _LENGTHS:
        if length != (limit := transformers[0].max_seq_length):
            with _set(transformers, "max_seq_length", length):
                vectors = encode(model, inputs, task)
            yield f"cut after {length} tokens instead of {limit}", vectors
    poolings: list[Any] = [module for module in model.modules() if type(module) is Pooling]
    for mode in Pooling.POOLING_MODES:
        if poolings and mode != (own_mode := poolings[0].pooling_mode):
            with _set(poolings, "pooling_mode", mode):
                vectors = encode(model, inputs, task)
            yield f"pooled by {mode!r} instead of {own_mode!r}", vectors


@contextlib.contextmanager
def _set(objects: Sequence[Any], name: str, value: Any) -> Iterator[None]:
    """An attribute of some objects, for a while."""
    before = [getattr(each, name) for each in objects]
    try:
        for each in objects:
            setattr(each, name, value)
        yield
    finally:
        for each, old in zip(objects, before):
            setattr(each, name, old)


def _probes(model: SentenceTransformer) -> tuple[list[str], list[dict[str, Any]]]:
    """Passages, one of them longer than the model takes (or 1,100 words), and instructed queries."""
    records = load_records("mini", "test")
    passages = [record[column] for record in records.select(range(_COUNT)) for column in PASSAGE_COLUMNS]
    limit = min(encoders_of(model)[0].max_seq_length or 1024, 1024)
    long = " ".join(" ".join(passages).split()[: limit + 76])
    queries = [
        {"query": record["query_positive"], "instruction": record["instruction_positive"]}
        for record in records.select(range(_COUNT))
    ]
    return [*passages[: _COUNT - 1], long], queries


def _difference(one: Vectors, other: Vectors) -> float:
    return float(np.abs(one - other).max() / np.linalg.norm(other, axis=1).mean())


def _overlap(given: Vectors, wanted: Vectors, passages: Vectors) -> float:
    """The mean share of a query's ten nearest passages that are the same; passages that are queries find the others."""
    same = wanted is passages
    found = [
        (_unit(queries) @ _unit(those).T) for queries, those in ((given, given if same else passages), (wanted, passages))
    ]
    depth = min(10, len(passages) - 1)
    nearest = [np.argsort(-scores, axis=1)[:, int(same) : int(same) + depth] for scores in found]
    return float(np.mean([len(set(one) & set(other)) / depth for one, other in zip(*map(np.ndarray.tolist, nearest))]))


def _unit(vectors: Vectors) -> Vectors:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _is_one(lengths: Vectors) -> bool:
    return bool(np.abs(lengths - 1).max() < 10 * CLOSE)
