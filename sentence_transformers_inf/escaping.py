"""Texts from outside, made harmless where they are shown: on a terminal and in Markdown."""

import json
import re
from typing import Any

import jinja2
from markupsafe import Markup

_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Control characters, line separators, what turns the direction of writing, and halves of surrogate pairs."""

_READ_OTHERWISE = re.compile(_OBEYED.pattern + r"|[\\`*<>\[\]|&~#$@^=]|(?<!\w)_|_(?!\w)|\.(?=[^\W\d])|://")
"""What Markdown may read as more than a text: its signs, HTML, and the middle of addresses."""

_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def visible(text: object) -> str:
    """A text in one line that a terminal shows and never obeys: what it would obey is written as an escape, ``\\x1b``."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


def shortened(text: str, limit: int) -> str:
    """A text in one line, cut to ``limit`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def code(text: object) -> Markup:
    """A text as a code span of Markdown, in a table too; nothing in it is read as Markdown or HTML."""
    shown = visible(" ".join(str(text).split())).replace("`", r"\x60").replace("|", r"\x7c")
    return Markup(f"`{shown}`" if shown else "")


def markdown(text: object) -> str:
    """A text as Markdown that reads as it is: itself where it is plain words, else a code span."""
    if isinstance(text, Markup):
        return text
    return code(text) if _READ_OTHERWISE.search(str(text)) else str(text)


def markdown_environment(**options: Any) -> jinja2.Environment:
    """An environment for templates of Markdown: what they insert goes through :func:`markdown`, unless it is ``safe``.

    Filters: ``code`` (a code span), ``python`` (a string of Python or JSON, for code) and ``on_hub(prefix)`` (a link to a
    repository, if it can be the name of one).

    Args:
        **options: Of ``jinja2.Environment``.
    """
    environment = jinja2.Environment(finalize=markdown, **options)
    environment.filters["code"] = code
    environment.filters["python"] = lambda text: Markup(json.dumps(visible(text), ensure_ascii=False))
    environment.filters["on_hub"] = _link
    return environment


def _link(repo: object, prefix: str = "") -> str:
    if not _ON_HUB.fullmatch(str(repo)):
        return code(repo)
    return Markup(f"[{repo}](https://huggingface.co/{prefix}{repo})")
