"""A language model on this machine: xllamacpp's OpenAI-compatible server on a free port of the loopback address.

It runs in a process of its own, which can be ended whatever it is at; with a question in flight it would not end by itself.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from dataset_builder.models import LOCAL_CONTEXT


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
    if find_spec("xllamacpp") is None:
        raise ImportError("a local model needs xllamacpp: pip install 'sentence-transformers-inf[llm]'")
    told, tell = os.pipe()  # and not stdout, where the library may write
    command = [sys.executable, "-m", "dataset_builder.server", str(model_file(gguf)), str(slots), str(tell)]
    server = subprocess.Popen(  # in a session of its own: Ctrl-C in a terminal is for us alone
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[tell], start_new_session=True
    )
    os.close(tell)
    try:
        with open(told, encoding="utf-8") as channel:
            url = channel.read()
        if not url.startswith("http"):
            raise OSError(f"{gguf}: the model cannot be served ({url or f'its server ended with status {server.wait()}'})")
        yield f"{url}/v1"
    finally:
        server.kill()
        server.communicate()


def _serve(path: str, slots: int, told: int) -> None:
    """Serve a model until stdin ends: write the address, or why there is none, to a file descriptor."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.n_parallel = slots
    parameters.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    parameters.n_ctx = LOCAL_CONTEXT * slots
    parameters.warmup = False
    parameters.verbosity = 0
    try:
        server = xllamacpp.Server(parameters)  # returns when the model is loaded and the port is open
        answer = server.listening_address
    except Exception as error:  # whatever the library makes of a file that is no model
        answer = " ".join(str(error).split())
    with open(told, "w", encoding="utf-8") as channel:
        channel.write(answer)
    sys.stdin.read()  # ends with the process that started this one, however that ended
    os._exit(0)


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


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
