"""What commands check before they begin: output paths, numbers, servers, and packages that not everybody has."""

from __future__ import annotations

import importlib.util
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Optional
from urllib.parse import urlsplit

import typer

EXTRAS = {
    "build": (
        *("aiohttp", "anyio", "datasketch", "httpx2", "matplotlib", "openai", "pydantic", "regex"),
        "sklearn",
    ),
    "eval": ("matplotlib", "mteb"),
    "lora": ("peft",),
    "llm": ("xllamacpp",),
    "mine": ("bm25s", "faiss"),
    "scale": ("datatrove", "ray"),
    "playground": ("gradio",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "serve": ("fastapi", "prometheus_client", "uvicorn"),
}
"""The modules of each extra, as pyproject.toml has it."""


def pip_line(module: str, program: str = "inf-embed") -> str | None:
    """How to install a module that comes with an extra; ``None`` for any other."""
    of_program = ("eval", *EXTRAS) if program == "inf-embed" else EXTRAS
    extra = next((extra for extra in of_program if module.partition(".")[0] in EXTRAS[extra]), None)
    return None if extra is None else f'pip install "sentence-transformers-inf[{extra}]"'


def need(what: str, module: str, install: str | None = None) -> None:
    """Make sure that a module is installed before it is needed.

    Args:
        what: What needs it, for the message.
        module: Its name.
        install: How to install it; ``None``: see :func:`pip_line`.

    Raises:
        ImportError: It is not installed.
    """
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise ImportError(f"{what} needs {module}: {install or pip_line(module)}")


def output_file(path: Optional[Path]) -> Optional[Path]:
    """For Typer: a file that can be written; of a link, where it leads."""
    if path is not None:
        path = Path(os.path.realpath(path)) if path.is_symlink() else path
        if path.is_dir():
            raise typer.BadParameter(f"{path} is a folder: name a file")
        if not path.parent.is_dir():
            raise typer.BadParameter(f"there is no folder {path.parent}: make it, or name another file")
        if path.exists() and not path.is_file():
            raise typer.BadParameter(f"{path} is a device or a pipe: name a file")
        _check_writable(path.parent)
    return path


def output_folder(path: Path) -> Path:
    """For Typer: a folder that is there or can be made."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise typer.BadParameter(f"{there} is a file: name another folder")
    _check_writable(there)
    return path


def _check_writable(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise typer.BadParameter(f"nothing can be written in {folder} ({error.strerror}): name another place") from error


def picture(path: Optional[Path]) -> Optional[Path]:
    """For Typer: a picture that can be written."""
    path = output_file(path)
    if path is not None and path.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"{path} is no picture: name a .png, .svg or .pdf file")
    return path


def finite(number: Optional[float]) -> Optional[float]:
    """For Typer: not infinite and not NaN, which any bound lets through."""
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"{number} is no number that can be used")
    return number


def not_blank(text: Optional[str]) -> Optional[str]:
    """For Typer: a text with something in it."""
    if text is not None and not text.strip():
        raise typer.BadParameter("it is empty")
    return text


def server(url: Optional[str]) -> Optional[str]:
    """For Typer: the address of a server."""
    if url is not None:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good or any(character.isspace() or not character.isprintable() for character in url):
            raise typer.BadParameter(f"{url} is no address of a server: write it as http://localhost:8000/v1")
    return url


def existing(paths: Sequence[Path]) -> None:
    """Raise FileNotFoundError for the first path that is not there."""
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder; check the path")
