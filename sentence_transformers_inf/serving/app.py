"""OpenAI's ``/v1/embeddings`` for a model that takes instructions, with ``/v1/models``, ``/health`` and ``/metrics``."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, Optional, TypeVar, Union

from annotated_types import MaxLen, MinLen
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json
from sentence_transformers import SentenceTransformer
from starlette.exceptions import HTTPException

from sentence_transformers_inf.modules import BrokenModelError
from sentence_transformers_inf.serving.batching import Batcher, Encoded, QueueFullError

_Result = TypeVar("_Result")


MAX_BODY = 16 * 2**20
"""Bytes of a request."""
MAX_WAITING = 8192
"""Texts of all requests that are not answered yet."""
BATCH_SIZE = 32
"""Texts of a request that are encoded together."""
COMMON, COMMON_ON_CPU = 64, 8
"""Texts of several requests that are. On a CPU more are no quicker, and each waits for all others of its batch."""

Text = Annotated[str, MaxLen(100_000)]
Texts = Annotated[list[Text], MinLen(1), MaxLen(2048)]  # as many as OpenAI takes
Instructions = Annotated[list[Optional[Text]], MaxLen(2048)]
Exclusions = Annotated[list[Union[Text, Annotated[list[Text], MaxLen(64)], None]], MaxLen(2048)]


class EmbeddingRequest(BaseModel):
    """The body of a request: OpenAI's, and ``instruction``, ``exclude`` and ``input_type``."""

    model_config = ConfigDict(extra="allow")  # refused by read_inputs, at the first one

    input: Union[Text, Texts]
    model: Optional[str] = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Optional[int] = None
    user: Optional[str] = None
    instruction: Union[Text, Instructions, None] = None
    exclude: Union[Text, Exclusions, None] = None
    input_type: Optional[Literal["query", "document"]] = None


class RequestError(Exception):
    """A request that cannot be answered: what is wrong, the field (``param``) and the HTTP status."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


def read_inputs(body: EmbeddingRequest) -> tuple[list[Any], bool]:
    """What the model is to encode, and whether as queries.

    Without ``input_type``, texts with an instruction or an exclusion are queries, and others are passages.

    Raises:
        RequestError: The message names the field.
    """
    if body.model_extra:
        name, known = next(iter(body.model_extra))[:100], ", ".join(EmbeddingRequest.model_fields)
        raise RequestError(f"{name}: there is no such field; there are {known}", name)
    texts = [body.input] if isinstance(body.input, str) else body.input
    for row, text in enumerate(texts):
        if not text.strip():
            raise RequestError(f"input[{row}]: the text is empty", "input")
    given: dict[str, list[Any]] = {}
    for field in ("instruction", "exclude"):
        value = getattr(body, field)
        given[field] = value if isinstance(value, list) else [value] * len(texts)
        if len(given[field]) != len(texts):
            counts = f"{len(given[field])} for {len(texts)} texts"
            raise RequestError(f"{field}: {counts}; give one for all, or one for each", field)
    told = [field for field, values in given.items() if any(value is not None for value in values)]
    if body.input_type == "document" or not (body.input_type or told):
        if told:
            raise RequestError(f"{told[0]}: passages take none; leave it out, or say input_type query", told[0])
        return texts, False
    inputs: list[Any] = []
    for text, instruction, exclude in zip(texts, *given.values()):
        item = {"query": text, "instruction": instruction or ""} | ({} if exclude is None else {"exclude": exclude})
        inputs.append(item if item["instruction"].strip() or exclude is not None else text)
    return inputs, True


class Metrics:
    """What ``/metrics`` tells Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("inf_embed_requests", "Requests, by status", ["status"], registry=self.registry)
        self.texts = Counter("inf_embed_texts", "Texts encoded", ["input_type"], registry=self.registry)
        self.seconds = Histogram("inf_embed_request_seconds", "Time to answer", registry=self.registry)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batches = Histogram("inf_embed_batch_size", "Texts in a batch", buckets=sizes, registry=self.registry)
        self.waiting = Gauge("inf_embed_waiting_texts", "Texts not answered yet", registry=self.registry)

    def failed(self, status: int, message: str, param: str | None = None, headers: Any = None) -> Response:
        """An answer in the shape of OpenAI's errors, counted."""
        self.requests.labels(status).inc()
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": message, "type": kind, "param": param, "code": None}
        return Response(to_json({"error": error}), status, headers, "application/json")


def create_app(model: SentenceTransformer, name: str, max_waiting: int = MAX_WAITING) -> FastAPI:
    """The server as an ASGI application.

    Args:
        model: From :func:`~sentence_transformers_inf.load_instruction_model`.
        name: What ``/v1/models`` calls it.
        max_waiting: Texts that may wait before requests are refused.
    """
    metrics = Metrics()
    common = COMMON_ON_CPU if model.device.type == "cpu" else COMMON
    batcher = Batcher(model, BATCH_SIZE, common, max_waiting, metrics.batches.observe)
    metrics.waiting.set_function(lambda: batcher.waiting)
    dimension = model.get_embedding_dimension()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.ensure_future(batcher.run())
        yield
        running.cancel()

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(title="inf-embed serve", docs_url=None, redoc_url=None, max_body_size=MAX_BODY, lifespan=lifespan)
    _answer_errors(app, metrics)

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        started = time.perf_counter()
        inputs, is_query = read_inputs(body)
        if body.dimensions not in (None, dimension):
            raise RequestError(f"dimensions: this model's embeddings have {dimension}; leave it out", "dimensions")
        try:
            encoded = await _unless_gone(request, batcher.encode(inputs, is_query))
        except QueueFullError as error:
            raise RequestError("too many texts are waiting; try again later", status=503) from error
        except BrokenModelError as error:
            raise RequestError(str(error), status=500) from error
        if encoded is None:
            return metrics.failed(499, "the client has gone")
        metrics.requests.labels(200).inc()
        metrics.texts.labels("query" if is_query else "document").inc(len(inputs))
        metrics.seconds.observe(time.perf_counter() - started)
        return Response(_to_body(encoded, body.model or name, body.encoding_format), media_type="application/json")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": name, "object": "model", "created": 0, "owned_by": "sentence-transformers-inf"}
        return {"object": "list", "data": [entry]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _answer_errors(app: FastAPI, metrics: Metrics) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return metrics.failed(error.status, str(error), error.param, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return metrics.failed(400, *_describe(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        return metrics.failed(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:  # the server logs the traceback
        return metrics.failed(500, "the server failed; its log says why")


def _describe(errors: list[dict[str, Any]]) -> tuple[str, str | None]:
    """What pydantic found wrong, in one line, and the field."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][1]}", None
    if len(first["loc"]) == 1:
        return "the body must be a JSON object, sent with Content-Type: application/json", None
    field = str(first["loc"][1])
    of_field = [error for error in errors if error["loc"][1] == field]  # one for each type that it might have
    of_field = [error for error in of_field if not error["type"].endswith("_type")] or of_field
    rows = min((_rows(error) for error in of_field), key=lambda rows: (-len(rows), rows))
    says = dict.fromkeys(error["msg"] for error in of_field if _rows(error) == rows)
    return f"{field}{''.join(f'[{row}]' for row in rows)}: {', or: '.join(says)}", field


def _rows(error: dict[str, Any]) -> tuple[int, ...]:
    return tuple(part for part in error["loc"][2:] if isinstance(part, int))


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result | None:
    """What the work gives; ``None``, and the work is cancelled, when the client goes before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = working, _ = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in tasks:
            task.cancel()


def _to_body(encoded: Encoded, name: str, encoding_format: str) -> bytes:
    def vector(row: Any) -> Any:
        return row.tolist() if encoding_format == "float" else base64.b64encode(row.astype("<f4").tobytes()).decode()

    data = [
        {"object": "embedding", "index": index, "embedding": vector(row)} for index, row in enumerate(encoded.embeddings)
    ]
    usage = {"prompt_tokens": encoded.tokens, "total_tokens": encoded.tokens}
    return to_json({"object": "list", "data": data, "model": name, "usage": usage})
