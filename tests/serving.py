"""Servers of embeddings in a thread of this process, and what asks them."""

import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route


@contextlib.contextmanager
def running(app):
    """Serve an ASGI application; the address of its ``/v1``."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


def plain_server(model, change=lambda vectors: vectors, prompt="", most_words=10_000):
    """What many run: Sentence Transformers behind OpenAI's interface, without instructions, and with a fault if wished."""

    async def embeddings(request):
        body = await request.json()
        if unknown := set(body) - {"model", "input"}:
            return JSONResponse({"detail": f"unknown: {unknown}"}, 422)
        if any(len(text.split()) > most_words for text in body["input"]):
            return JSONResponse({"detail": "too long"}, 413)
        vectors = change(np.asarray(model.encode(body["input"], prompt=prompt, show_progress_bar=False)))
        data = [{"object": "embedding", "index": row, "embedding": vector.tolist()} for row, vector in enumerate(vectors)]
        return JSONResponse({"object": "list", "data": data, "model": body["model"]})

    return Starlette(routes=[Route("/v1/embeddings", embeddings, methods=["POST"])])


def post(url, body, content_type="application/json"):
    """The status and the answer of a request whose body is JSON, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/embeddings", data, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=900) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else text.decode()


def metric(url, name):
    """A value of ``/metrics``."""
    with urllib.request.urlopen(url.replace("/v1", "/metrics"), timeout=900) as response:
        lines = response.read().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))
