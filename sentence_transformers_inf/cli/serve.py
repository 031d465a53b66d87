"""``inf-embed serve``."""

import socket
from pathlib import Path
from typing import Annotated, Optional

import typer

from sentence_transformers_inf.cli.checks import need, not_blank
from sentence_transformers_inf.cli.display import print_line, quiet

BUNDLED_NAME = "all-MiniLM-L6-v2-inf"
"""What the shipped adapter is called, which has no name of its own."""


def serve(
    model: Annotated[
        Optional[str],
        typer.Argument(
            help="A Hub id, a folder, or an export for onnx or openvino. Default: the adapter that the package ships."
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. There is no password: others than this machine reach it by 0.0.0.0.",
            callback=not_blank,
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any that is free.", min=0, max=65535)] = 8000,
) -> None:
    """Serve a model over HTTP: OpenAI's /v1/embeddings, with an instruction per request or per text."""
    for module in ("fastapi", "prometheus_client", "uvicorn"):
        need("serving", module)
    quiet()
    import uvicorn

    from sentence_transformers_inf.modules import encoders_of, load_instruction_model, merge_lora
    from sentence_transformers_inf.modules.exported import backend_of
    from sentence_transformers_inf.serving.app import create_app

    listener = _bind(host, port)
    loaded = load_instruction_model(model, backend=backend_of(model))
    for transformer in encoders_of(loaded):
        merge_lora(transformer)
    name = BUNDLED_NAME if model is None else model if not Path(model).exists() else Path(model).resolve().name
    app = create_app(loaded, name)
    config = uvicorn.Config(app, access_log=False, log_level="warning", timeout_graceful_shutdown=30)
    listener.listen(config.backlog)
    address = f"[{host}]" if ":" in host else host
    print_line(f"Serving {name} at http://{address}:{listener.getsockname()[1]}/v1 (Ctrl-C stops it)")
    uvicorn.Server(config).run(sockets=[listener])


def _bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address; uvicorn listens on it once the model is there.

    Raises:
        OSError: The message names the address.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, TypeError, ValueError) as error:  # a host that cannot be encoded is one of the last two
        listener.close()
        why = getattr(error, "strerror", None) or error
        raise OSError(f"cannot listen on {host}, port {port}: {why}; name another --host or --port") from error
    return listener
