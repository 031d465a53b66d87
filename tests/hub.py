"""The small Hub of ``hub_server.py``, for this process and for processes of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
from huggingface_hub import constants, hf_api

from tests.commands import run_commands

TOKEN = "hf_owner"

WITHOUT_PACKAGE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sentence_transformers_inf", "dataset_builder"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
"""


def connect(patch, url, cache, token=TOKEN):
    """Let this process use the Hub at ``url``, as HF_ENDPOINT, HF_HOME and HF_TOKEN do for one that is started.

    Args:
        patch: A ``pytest.MonkeyPatch``.
        url: The Hub's address.
        cache: The folder that takes the place of the Hub's cache.
        token: The user's token; ``None``: there is none.
    """
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_TOKEN_PATH": str(cache / "token"),
    }.items():
        patch.setattr(constants, name, value)
    patch.setattr(hf_api.api, "endpoint", url)
    for name, value in {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": False, "HF_DATASETS_CACHE": cache / "datasets"}.items():
        patch.setattr(datasets.config, name, value)
    if token is None:
        patch.delenv("HF_TOKEN", raising=False)
    else:
        patch.setenv("HF_TOKEN", token)


class Hub:
    """hub_server.py in a process of its own."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.process = subprocess.Popen([sys.executable, Path(__file__).parent / "hub_server.py", folder])
        while not (folder / "port").exists():
            assert self.process.poll() is None
            time.sleep(0.05)
        self.url = f"http://127.0.0.1:{(folder / 'port').read_text()}"

    def stop(self):
        self.process.kill()
        self.process.wait()

    def connect(self, patch, cache, token=TOKEN):
        """See :func:`connect`."""
        connect(patch, self.url, cache, token)

    def environment(self, cache, token=TOKEN):
        """The environment of a process that uses this Hub."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        kept |= {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cache), "COLUMNS": "200"}
        return kept | ({"HF_TOKEN": token} if token else {})

    def run(self, cache, *arguments, token=TOKEN, cwd=None):
        """Run Python in a process of its own."""
        return subprocess.run(
            [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=900,
            env=self.environment(cache, token), cwd=cwd,
        )  # fmt: skip

    def commands(self, cache, *commands, token=TOKEN, cwd=None, **more):
        """See :func:`run_commands`."""
        return run_commands(self.environment(cache, token) | more, *commands, cwd=cwd)

    def requests(self):
        return (self.folder / "requests.log").read_text().splitlines()
