"""The commands, and what a user who makes a mistake sees: status 2 and one clear line."""

import json
import subprocess
import sys

import numpy as np
import pytest

from sentence_transformers_inf import load_instruction_model, load_records
from sentence_transformers_inf.cli.tables import flips_table
from sentence_transformers_inf.evaluation import METRICS, Result
from sentence_transformers_inf.modules import encoder_of
from tests.commands import call, error_line

GOOD = {
    "query_positive": "q1",
    "query_negative": "q2",
    "instruction_positive": "i1",
    "instruction_negative": "i2",
    "document": "d",
    "hard_negative_document_1": "d1",
    "hard_negative_document_2": "d2",
}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_evaluate_prints_a_table_and_writes_json(tiny, tmp_path):
    records = write(tmp_path / "records.jsonl", *load_records("mini", "validation").select(range(8)))
    code, out, _ = call("inf-embed", "evaluate", tiny, "--data", records, "--json", tmp_path / "report.json")
    assert code == 0
    assert "of 8 pairs obey: " in out
    assert "p-MRR" in out
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert set(METRICS) | {"per_type", "records"} <= set(report)
    assert report["records"] == 8
    assert sum(values["records"] for values in report["per_type"].values()) == 8
    assert all(-100 <= report[metric] <= 100 for metric in METRICS)


def test_search_marks_what_the_instruction_moved(base, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(
        "Vaccines show the body a harmless piece of a germ, explained for small children.\n"
        "How vaccines work: adjuvants and T-cell priming, a review for immunologists.\n"
        "The stock market fell on Monday.\n"
        "The immune system remembers what vaccines taught it.\n"
    )
    arguments = ("search", base, "--corpus", corpus, "--query", "how vaccines work", "--top", 2)
    code, plain, _ = call("inf-embed", *arguments)
    assert code == 0
    assert "immunologists" in plain
    assert "▲" not in plain
    code, instructed, _ = call("inf-embed", *arguments, "--instruction", "explained for small children")
    assert code == 0
    rows = [line for line in instructed.splitlines() if "germ" in line]
    assert "▲ 2" in rows[0]
    assert "▼ 2" in instructed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: ("evaluate", "base", "--data", write(t / "r.jsonl", {k: v for k, v in GOOD.items() if k != "document"})), "row 1: the column 'document' is missing"),
        (lambda t: ("evaluate", "base", "--data", write(t / "r.jsonl", GOOD, {**GOOD, "instruction_positive": ""})), "row 2, column 'instruction_positive': the text is empty"),
        (lambda t: ("evaluate", "base", "--split", "dev"), "there is no split 'dev'"),
        (lambda t: ("evaluate", t / "no-model", "--data", "mini"), "no-model"),
        (lambda t: ("evaluate", t, "--data", "mini"), "cannot be loaded"),
        (lambda t: ("train", "--base", "base", "--output", t / "m", "--template", "{query} only"), "template '{query} only' must hold"),
        (lambda t: ("train", "--base", "base", "--output", t / "m", "--objective", "multi_Q", "--frozen-layers", 0), "unknown objective 'multi_Q'"),
        (lambda t: ("train", "--output", t / "m", "--epoch", 1), "there is no argument --epoch; did you mean --epochs?"),
        (lambda t: ("train", "--base", "base", "--output", t / "m", "--data", t / "nothing.jsonl"), "nothing.jsonl: no such file"),
        (lambda t: ("search", "base", "--query", "q", "--corpus", write(t / "c.jsonl", {"text": "one"})), "a corpus of 1 passage(s)"),
        (lambda t: ("search", "base", "--query", "q", "--corpus", write(t / "c.jsonl", {"body": "one"})), "expected a column text"),
        (lambda t: ("search", "base", "--query", "q", "--corpus", write(t / "c.jsonl", {"text": "a"}, {"text": " "})), "row 2, column 'text': the passage is empty"),
        (lambda t: ("search", "base", "--query", "q", "--corpus", t / "c.csv"), "c.csv: no such corpus file"),
        (lambda t: ("search", "base", "--query", " ", "--corpus", write(t / "c.txt", 1, 2)), "'--query': it is empty"),
        (lambda t: ("card", "base", "--results", write(t / "scores.json", {"p_mrr": 1.0})), "scores.json: this is not what evaluate --json wrote"),
        (lambda t: ("card", "base", "--results", write(t / "scores.json", 1, 2)), "scores.json: this is not what evaluate --json wrote"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(tiny, tmp_path, make, message):
    arguments = [tiny if argument == "base" else argument for argument in make(tmp_path)]
    code, _, err = call("inf-embed", *arguments)
    assert code == 2
    assert message in error_line(err)
    assert not (tmp_path / "m").exists()


def test_the_installed_command_fails_without_a_traceback(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sentence_transformers_inf.cli",
        "evaluate",
        str(tmp_path / "none"),
        "--data",
        "mini",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert str(tmp_path / "none") in error_line(done.stderr)


def test_an_unknown_option_is_status_2():
    code, _, err = call("inf-embed", "train", "--outputs", "x")
    assert code == 2
    assert "--outputs" in err


@pytest.fixture
def data(tmp_path):
    records = load_records("mini", "train")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", *records.select(range(8)))
    write(tmp_path / "data" / "test.jsonl", *records.select(range(8, 12)))
    return tmp_path / "data"


def test_a_model_is_trained_and_measured_from_the_command_line(tiny, data, tmp_path):
    model = tmp_path / "model"
    train = ("inf-embed", "train", "--base", tiny, "--data", data, "--output", model, "--epochs", 1, "--batch-size", 4)
    code, out, err = call(*train, "--frozen-layers", 0)
    assert code == 0, err[-2000:]
    assert str(model) in out
    assert "BertModel; mean pooling; padding on the right; " in out
    assert not list(model.glob("checkpoint-*")), "what only resuming needs is gone"
    assert encoder_of(load_instruction_model(model))[0].template == "{query} {instruction}"
    code, out, _ = call("inf-embed", "evaluate", model, "--data", data)
    assert code == 0
    assert "(test), 4 records" in " ".join(out.split())  # a long path breaks the line
    code, _, err = call(*train, "--frozen-layers", 0)
    assert code == 2
    assert "holds a finished model" in error_line(err)


def test_arguments_come_from_a_file_and_the_command_line_counts_before_it(tiny, data, tmp_path):
    """Ours and the host's, of every type, as fields of the same dataclass."""
    config = tmp_path / "recipe.yaml"
    config.write_text(
        f"base: {tiny}\ndata: {data}\nobjective: uni_P\nlearning_rate: 1.0e-3\nnum_train_epochs: 3\nbf16: false\n"
        "gradient_accumulation_steps: 2\nlr_scheduler_type: cosine\nfrozen_layers: 0\nmax_records: 4\n"
    )
    words = ("--output", tmp_path / "model", "--num-train-epochs", 1, "--weight-decay", 0.01, "--report-to", "none")
    code, _, err = call("inf-embed", "train", "--config", config, *words)
    assert code == 0, err[-2000:]
    recipe = json.loads((tmp_path / "model" / "recipe.json").read_text())
    assert recipe["records"] == 4
    expected = {"objective": "uni_P", "learning_rate": 1e-3, "num_train_epochs": 1, "bf16": False, "weight_decay": 0.01}
    expected |= {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "frozen_layers": 0}
    assert {name: recipe["settings"].get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "there is no argument 'epoch'"),
        ("[1, 2]", "expected names and their values"),
        ("a: [", "not valid YAML"),
        (None, "no such file"),
    ],
)
def test_mistakes_in_a_configuration_are_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    code, _, err = call("inf-embed", "train", "--config", tmp_path / "recipe.yaml", "--output", tmp_path / "m")
    assert code == 2
    assert message in error_line(err)
    assert "recipe.yaml" in error_line(err)
    assert not (tmp_path / "m").exists()


def test_help_lists_our_arguments_and_all_of_them():
    code, out, _ = call("inf-embed", "train", "--help")
    assert code == 0
    for words in ("--epochs", "--num-train-epochs", "--objective", "--update", "--config", "--help-all"):
        assert words in out
    assert "--adam-beta1" not in out
    code, out, _ = call("inf-embed", "train", "--help-all")
    assert code == 0
    assert "--adam-beta1" in out
    assert "--objective" in out


def test_a_value_that_cannot_be_is_one_line(tmp_path):
    code, _, err = call("inf-embed", "train", "--output", tmp_path / "m", "--epochs", "many")
    assert code == 2
    assert "invalid float value: 'many'" in error_line(err)
    assert not (tmp_path / "m").exists()


def test_rankings_that_flip_are_shown_with_what_each_model_prefers(monkeypatch, capsys):
    """Shown are only records that the trained model has right under both instructions and the base model under one."""
    records = load_records("mini", "test").select(range(4))
    first, second, third = [1, 2, 3], [2, 1, 3], [3, 2, 1]  # ranks of d+, d1, d2
    before = np.array([[first, first, third], [first, second, third], [second, second, third], [second, first, third]])
    after = np.array([[first, second, third]] * 4)
    results = [Result({}, ranks, np.zeros((4, 3)), ["q"] * 12, None) for ranks in (before, after)]
    monkeypatch.setenv("COLUMNS", "300")
    flips_table(records, *results).print()
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if "✓" in line]
    assert [line.count("✗") for line in lines] == [0, 1, 1, 0]
    for row, right in ((0, True), (1, False), (2, True), (3, False)):
        assert (records[row]["query_positive"] in shown) == right
    start = [records[0][name][:30] for name in ("document", "hard_negative_document_1")]
    assert lines[1].index(start[0]) < lines[1].index(start[1]), "the base keeps to d+, the trained model prefers d1"


@pytest.mark.slow
def test_the_demo_shows_what_was_learned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("inf-embed", "demo", "--records", 16, "--output", "trained")
    assert code == 0
    assert "base model" in out
    assert "nDCG@10, plain queries" in out
    assert "By instruction type" in out
    assert "Rankings that flip with the instruction" in out
    assert "<svg" in (tmp_path / "trained" / "flips.svg").read_text(encoding="utf-8")
    assert 'load_instruction_model("trained")' in out
    card = (tmp_path / "trained" / "README.md").read_text(encoding="utf-8")
    assert "| p-MRR | 2.9 |" in card
    assert "| exclusion |" in card
    code, _, err = call("inf-embed", "demo", "--records", 16, "--output", "trained")
    assert code == 2
    assert "holds a finished model" in error_line(err)
