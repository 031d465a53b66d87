"""Dynamic batching: what concurrent requests ask for is encoded together, by one thread, while the server listens on."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf.modules import BrokenModelError, encoder_of


class QueueFullError(Exception):
    """So many texts are waiting that no more are taken."""


_WAIT = 0.002
"""Seconds that a batch waits to be filled."""


@dataclass(frozen=True)
class Encoded:
    """The embeddings (N×d, float32) of a request's texts, and the number of their tokens."""

    embeddings: NDArray[np.float32]
    tokens: int


@dataclass
class _Piece:
    """At most a batch of one request's texts."""

    inputs: list[Any]
    is_query: bool
    encoded: asyncio.Future[Encoded]


class Batcher:
    """Encodes the texts of concurrent requests in common batches, those that wait longest first; queries and passages of a
    batch apart, and each answered when it is encoded.

    A request of more than a batch is encoded piece by piece, and others get their turn in between. Where requests come one
    at a time, each is encoded at once. Where they come together, a batch that is not full waits a few milliseconds for more.

    Args:
        model: From :func:`~sentence_transformers_inf.load_instruction_model`.
        batch_size: Texts of a request in a batch, at most.
        common: Texts of several requests in a batch, at most.
        max_waiting: Texts that may wait before requests are refused.
        on_batch: Called with the number of texts in each batch.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        batch_size: int,
        common: int,
        max_waiting: int,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.waiting = 0
        """Texts of requests that are not answered yet."""
        self._model, self._max_waiting, self._on_batch = model, max_waiting, on_batch
        self._batch_size, self._common = batch_size, common
        self._pieces: deque[_Piece] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "encoder")

    async def encode(self, inputs: Sequence[Any], is_query: bool) -> Encoded:
        """Encode the inputs of one request, strings or what else the model takes. Cancelled, it leaves the queue.

        Raises:
            QueueFullError: Too many texts are waiting.
            BrokenModelError: The embeddings mean nothing.
        """
        if self.waiting and self.waiting + len(inputs) > self._max_waiting:
            raise QueueFullError
        self.waiting += len(inputs)
        try:
            if len(inputs) <= self._batch_size:
                return await self._encode_piece(list(inputs), is_query)
            longest_first = sorted(range(len(inputs)), key=lambda row: -len(str(inputs[row])))  # little padding
            parts = [
                await self._encode_piece([inputs[row] for row in longest_first[at : at + self._batch_size]], is_query)
                for at in range(0, len(inputs), self._batch_size)
            ]
            embeddings = np.concatenate([part.embeddings for part in parts])[np.argsort(longest_first)]
            return Encoded(embeddings, sum(part.tokens for part in parts))
        finally:
            self.waiting -= len(inputs)

    async def run(self) -> None:
        """Encode batch after batch, until cancelled."""
        several = False
        try:
            while True:
                await self._arrived.wait()
                if several and sum(len(piece.inputs) for piece in self._pieces) < self._common:
                    await asyncio.sleep(_WAIT)
                batch = self._take()
                several = len(batch) > 1
                for is_query in (True, False):  # queries are the shorter ones
                    if pieces := [piece for piece in batch if piece.is_query == is_query and not piece.encoded.done()]:
                        await self._answer(pieces)
        finally:
            self._thread.shutdown(wait=False)

    async def _encode_piece(self, inputs: list[Any], is_query: bool) -> Encoded:
        piece = _Piece(inputs, is_query, asyncio.get_running_loop().create_future())
        self._pieces.append(piece)
        self._arrived.set()
        return await piece.encoded

    def _take(self) -> list[_Piece]:
        """The next batch: the pieces that wait longest, as many as fit. What was cancelled is dropped."""
        batch: list[_Piece] = []
        room = self._common
        while self._pieces and (self._pieces[0].encoded.done() or not batch or len(self._pieces[0].inputs) <= room):
            piece = self._pieces.popleft()
            if not piece.encoded.done():
                batch.append(piece)
                room -= len(piece.inputs)
        if not self._pieces:
            self._arrived.clear()
        return batch

    async def _answer(self, pieces: list[_Piece]) -> None:
        """Encode pieces of one kind, and hand each its rows, unless it was cancelled meanwhile."""
        inputs = [item for piece in pieces for item in piece.inputs]
        self._on_batch(len(inputs))
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._encode_batch, inputs, pieces[0].is_query)
        try:
            embeddings, tokens = await work
        except Exception as error:  # not hidden: whoever asked gets it
            for piece in pieces:
                if not piece.encoded.done():
                    piece.encoded.set_exception(error)
            return
        start = 0
        for piece in pieces:
            end = start + len(piece.inputs)
            if not piece.encoded.done():
                piece.encoded.set_result(Encoded(embeddings[start:end], sum(tokens[start:end])))
            start = end

    def _encode_batch(self, inputs: list[Any], is_query: bool) -> tuple[NDArray[np.float32], list[int]]:
        encode = self._model.encode_query if is_query else self._model.encode_document
        embeddings = np.asarray(encode(inputs, batch_size=len(inputs), show_progress_bar=False), dtype=np.float32)
        if not np.isfinite(embeddings).all():
            raise BrokenModelError("the model gives embeddings that are not finite: it is broken")
        return embeddings, _count_tokens(self._model, inputs)


def _count_tokens(model: SentenceTransformer, inputs: list[Any]) -> list[int]:
    """The tokens of each input, joined by the template and cut as they are encoded; prompts do not count."""
    transformer: Any = encoder_of(model)[0]
    texts = [item if isinstance(item, str) else transformer.join(item["instruction"], item["query"]) for item in inputs]
    limit = transformer.max_seq_length
    return [len(ids) for ids in transformer.tokenizer(texts, truncation=limit is not None, max_length=limit)["input_ids"]]
