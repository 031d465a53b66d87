"""A language model on this machine: xllamacpp's OpenAI-compatible server on a free port of the loopback address."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

CONTEXT_TOKENS = 4096
"""Tokens of one question with its answer."""


@contextlib.contextmanager
def local_server(gguf: str, slots: int = 2) -> Iterator[str]:
    """Serve a GGUF model on ``OMP_NUM_THREADS`` threads (one for each core where that is not set) while the context lasts.

    Args:
        gguf: A file, or ``USER/REPO/FILE.gguf`` on the Hub.
        slots: Questions answered at a time.

    Yields:
        The server's base URL; it answers already.

    Raises:
        FileNotFoundError: No such file, here or on the Hub.
        ImportError: xllamacpp is not installed (extra ``llm``).
        OSError: The model cannot be served.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise ImportError("a local model needs xllamacpp: pip install 'sentence-transformers-inf[llm]'") from error

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model_file(gguf))
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.n_parallel = slots
    parameters.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    parameters.n_ctx = CONTEXT_TOKENS * slots
    parameters.warmup = False
    parameters.verbosity = 0
    try:
        server = xllamacpp.Server(parameters)  # returns when the model is loaded and the port is open
    except Exception as error:
        raise OSError(f"{gguf}: the model cannot be served ({error})") from error
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server


def model_file(gguf: str) -> Path:
    """A GGUF file: its path, or that of ``USER/REPO/FILE.gguf``, which is downloaded from the Hub.

    Raises:
        FileNotFoundError: No such file, here or on the Hub.
    """
    path = Path(gguf)
    if path.is_file():
        return path
    parts = gguf.split("/")
    if len(parts) < 3 or path.is_absolute() or gguf.startswith("."):
        raise FileNotFoundError(f"{gguf}: no such file (a model on the Hub is named USER/REPO/FILE.gguf)")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{gguf}: no such file here, and none could be read from the Hub ({error})") from error
