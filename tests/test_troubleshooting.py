"""Every message that the troubleshooting page quotes is one that the code can print."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\| `(.+?)` \| .+ \|$", PAGE.partition("## What does this error mean?")[2], flags=re.MULTILINE)

ANY = "\0"
"""Stands for what a message is filled with."""

LITERAL = {"JSON", "MTEB", "NUL", "BEIR", "PEFT", "INPUT", "OUTPUT"}
"""Words in capitals that stand in messages as they are."""


def text_of(node: ast.expr) -> str | None:
    """A text in the code, with ANY for what is filled in; ``None`` for another expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(ANY if isinstance(part, ast.FormattedValue) else part.value for part in node.values)
    return None


TEXTS = [
    variant
    for package in ("sentence_transformers_inf", "dataset_builder")
    for path in sorted((ROOT / package).rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.expr) and (text := text_of(node)) is not None
    for variant in (text, re.sub(r"{\w+}", ANY, text))  # filled in by str.format
]


def pattern_of(message: str) -> re.Pattern[str]:
    """What finds a quoted message among the texts: a word in capitals is filled in."""
    parts, at = [], 0
    for found in re.finditer(r"(?<![\w-])[A-Z]{3,}(?![\w-])", message):
        if found[0] not in LITERAL:
            parts += [re.escape(message[at : found.start()]), f"[^\\n]*{ANY}[^\\n]*"]
            at = found.end()
    return re.compile("".join([*parts, re.escape(message[at:])]))


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_of_the_page_is_one_of_the_code(message):
    assert any(map(pattern_of(message).search, TEXTS))


def test_the_page_quotes_many_messages():
    assert len(MESSAGES) > 80
    assert len(MESSAGES) == len(set(MESSAGES))
