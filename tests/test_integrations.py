"""What docs/serving.md prints runs as printed, and an instruction changes what is found first."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.serving.app import create_app
from tests.commands import call
from tests.serving import running

GUIDE = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
FOR_CHILDREN = "For a ten-year-old, in simple words."


def blocks(heading, language="python"):
    """The snippets below a heading, up to the next one."""
    section = re.search(rf"^#+ {re.escape(heading)}.*?\n(.*?)(?=^#+ \w|\Z)", GUIDE, flags=re.M | re.S).group(1)
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.S)


@pytest.fixture(scope="module")
def preamble():
    """What the lines that all sections go on from define."""
    (code,) = blocks("In your framework")
    defined = {}
    exec(compile(code, "In your framework", "exec"), defined)
    return defined


@pytest.mark.parametrize(
    "heading",
    [
        "LangChain",
        pytest.param("LlamaIndex", marks=pytest.mark.slow),
        pytest.param("Haystack", marks=pytest.mark.slow),
        "Qdrant",
        pytest.param("LanceDB", marks=pytest.mark.slow),
        "FAISS",
        pytest.param(
            "pgvector",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(sys.version_info >= (3, 13), reason="pgserver has no wheel for this Python"),
            ],
        ),
    ],
)
def test_a_snippet_finds_what_the_instruction_asks_for(preamble, heading, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    (code,) = blocks(heading)
    model, passages = preamble["model"], preamble["passages"]
    children = model.encode_query({"query": preamble["question"], "instruction": FOR_CHILDREN})
    for place, instructed in (("own", {}), ("other", {"instruction": FOR_CHILDREN, "query": children})):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        given = {**preamble, **instructed}
        exec(compile(code, heading, "exec"), given)
        scores = model.similarity(given["query"], given["vectors"])[0].tolist()
        nearest = sorted(passages, key=lambda text: -scores[passages.index(text)])[:2]
        assert capsys.readouterr().out == f"{nearest}\n"
        assert nearest[0] == passages[0 if instructed else 1]
        if "server" in given:
            given["connection"].close()
            given["server"].cleanup()


@pytest.mark.slow
def test_the_server_s_lines_run_as_printed(capsys):
    """Only the port is another."""
    (snippet,) = blocks("A server: `inf-embed serve`")
    start, verify = (blocks(heading, "bash")[0].splitlines()[-1] for heading in ("A server: ", "Is my server right? "))
    assert shlex.split(start, comments=True) == ["inf-embed", "serve"]
    with running(create_app(load_instruction_model(), "shipped")) as url:
        exec(compile(snippet.replace("http://127.0.0.1:8000/v1", url), "serve", "exec"), {})
        assert capsys.readouterr().out.startswith("384 ")
        status, out, err = call(*shlex.split(verify.replace("http://127.0.0.1:8000/v1", url), comments=True))
    assert status == 0, out + err
