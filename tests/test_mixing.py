"""Several sources are trained on together: all of them, in the shares that are asked for, and as one run."""

import json
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file

from sentence_transformers_inf import InstructionTrainer, InstructionTrainingArguments, load_records, training_dataset
from sentence_transformers_inf.cli.train import parse
from sentence_transformers_inf.corpora import load_training_data, together, was_trained_on
from sentence_transformers_inf.hub.card import model_card
from sentence_transformers_inf.playground.render import checkpoint
from sentence_transformers_inf.training.ablation import read_config
from sentence_transformers_inf.training.run_folder import COMPLETE_FILE
from tests.commands import call, error_line
from tests.training import QUICK

ROWS = [
    {
        "instruction": f"Only number {i}.",
        "query": f"numbers {i}",
        "passage": f"Number {i} it is.",
        "negative": f"No number {i}.",
    }
    for i in range(6)
]
PROMPTRIEVER = [
    {
        "query": "q", "only_query": row["query"], "only_instruction": row["instruction"], "has_instruction": True,
        "positive_passages": [{"title": "-", "text": row["passage"]}], "new_negatives": [],
        "negative_passages": [{"title": "-", "text": row["negative"]}],
    }
    for row in ROWS
]  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three folders: records with a validation split, records without one, and rows of another corpus."""
    folder, records = tmp_path_factory.mktemp("sources"), load_records("mini", "train")
    records.select(range(6)).to_json(folder / "with" / "train.jsonl")
    records.select(range(6, 8)).remove_columns("topic").to_json(folder / "with" / "validation.jsonl")
    records.select(range(20, 32)).to_json(folder / "without" / "train.jsonl")
    (folder / "rows").mkdir()
    (folder / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTRIEVER))
    return {name: str(folder / name) for name in ("with", "without", "rows")}


def make(names, sources, base, output, limit=None, **settings):
    data = together({name: load_training_data(sources[name], limit) for name in names})
    args = InstructionTrainingArguments(output_dir=str(output), **{**QUICK, "per_device_train_batch_size": 2, **settings})
    return InstructionTrainer(base, args, *data)


def batches(trainer):
    """By source: the texts of the first passages of each batch of an epoch."""
    return [(batch["dataset_name"], batch["document_text"]) for batch in trainer.get_train_dataloader()]


def weights(folder):
    return {
        f"{path.parent.name}/{name}": value
        for path in sorted(folder.glob("*/model.safetensors"))
        for name, value in load_file(path).items()
    }


def same(one, two, tolerance=1e-6):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=0, atol=tolerance), name


@pytest.fixture
def prompted(tiny):
    """With a prompt the host adds the source's name to the batches."""
    return {"prompts": {"document": "passage: "}}


def test_every_record_is_seen_once_or_the_sources_equally(sources, tiny, prompted, tmp_path):
    trainer = make(["with", "rows"], sources, tiny, tmp_path, **prompted)
    found = batches(trainer)
    expected = {name: view["document"] for name, view in trainer.train_dataset.items()}
    for name, documents in expected.items():
        of_source = [text for source, texts in found if source == name for text in texts]
        assert sorted(of_source) == sorted(documents)
    assert len(expected["rows"]) == len(expected["with"]) == 6
    few = {**sources, "with": sources["without"]}
    trainer = make(["with", "rows"], few, tiny, tmp_path, multi_dataset_batch_sampler="round_robin", **prompted)
    assert Counter(source for source, _ in batches(trainer)) == {"with": 3, "rows": 3}
    assert len(trainer.train_dataset["with"]) > 6


def test_the_validation_is_that_of_all_sources(sources):
    held_out = load_training_data(sources["without"])[1]
    records, validation = together({name: load_training_data(path, 3) for name, path in sources.items()})
    assert {name: len(data) for name, data in records.items()} == {"with": 3, "without": 3, "rows": 3}
    own = load_records(sources["with"], "validation")
    assert validation["document"][:] == [*own["document"], *held_out["document"]]
    assert together({"rows": load_training_data(sources["rows"])})[1] is None


@pytest.mark.parametrize("settings", [{"mini_batch_size": 3}, {"update": "queries", "lora_r": 4}], ids=["cached", "adapter"])
def test_records_and_rows_are_trained_on_together(sources, tiny, tmp_path, settings):
    """Leaving out either source, or taking it twice as often, ends with other weights: both were trained on."""
    texts = ["Number 1 it is.", load_records(sources["with"], "train")["document"][0]]
    pair = [{"instruction": "Only number 1.", "query": "numbers"}]
    found = {}
    for names in (["with", "rows"], ["with"], ["rows"]):
        trainer = make(names, sources, tiny, tmp_path / "-".join(names), learning_rate=1e-3, save_strategy="no", **settings)
        trainer.train()
        found["-".join(names)] = trainer.model.encode_query(pair), trainer.model.encode_document(texts)
    both = found.pop("with-rows")
    assert all(abs(both[0] - query).max() > 1e-4 for query, _ in found.values())


def test_the_recipe_the_card_and_the_page_name_all(sources, tiny, tmp_path):
    output = tmp_path / "model"
    data = [word for name in ("with", "without") for word in ("--data", sources[name])]
    words = [word for name, value in (QUICK | {"evaluations": 2}).items() for word in (f"--{name}", value)]
    status, out, err = call("inf-embed", "train", "--base", tiny, *data, "--output", output, *words)
    assert status == 0, err
    assert f"{sources['without']} has no split validation" in out
    assert f"{sources['with']} has no split" not in out
    for name in ("with", "without"):
        assert f"inf-embed evaluate {output} --data {sources[name]}" in out.replace("\n", " ")
    recipe = json.loads((output / "recipe.json").read_text())
    assert recipe["data"] == [sources["with"], sources["without"]]
    trained = [load_training_data(sources[name])[0] for name in ("with", "without")]
    assert recipe["records"] == sum(map(len, trained))
    assert len({source["records_sha256"] for source in recipe["sources"]} | {recipe["records_sha256"]}) == 3
    assert all(was_trained_on(recipe, records) for records in trained)
    assert not was_trained_on(recipe, load_records(sources["with"], "validation"))
    text = model_card(output).text
    assert f"- data: `with`, {len(trained[0])} records\n- data: `without`, {len(trained[1])} records\n" in text
    assert sources["with"] not in text
    assert f"{sources['with']}, {sources['without']}" in checkpoint(recipe, {})
    status, out, err = call("inf-embed", "evaluate", output, "--data", sources["without"])
    assert status == 0, err
    assert "that were held out of training" in out.replace("\n", " ")


def test_datasets_of_the_hub_are_all_in_the_metadata(tiny, tmp_path):
    from tests.test_card import RECIPE, save_towers

    hub = [{"data": f"user/{n}", "data_on_hub": True, "data_revision": n, "records": 4} for n in "ab"]
    own = {"data": "/home/me/own", "data_on_hub": False, "data_revision": None, "records": 2}
    save_towers(tiny, tmp_path, {**RECIPE, "data": ["user/a", "user/b", "/home/me/own"], "sources": [*hub, own]})
    card = model_card(tmp_path)
    assert card.data.datasets == ["user/a", "user/b"]
    assert "[user/b](https://huggingface.co/datasets/user/b), revision `b`, 4 records\n- data: `own`, 2 records" in card.text


def test_sources_from_a_file_and_from_the_command_line(tmp_path):
    config = tmp_path / "run.yaml"
    for text, words, expected in (
        ("data: mini", [], ["mini"]),
        ("data: [mini, a]", [], ["mini", "a"]),
        ("data: [mini, a]", ["--data", "b", "--data", "c", "d"], ["b", "c", "d"]),
        ("seed: 1", [], ["mini"]),
    ):
        config.write_text(text + "\n")
        assert parse(["--config", str(config), *words])[0].data == expected
    config.write_text("evaluate: {data: mini}\ngrid:\n  data: [mini, [mini, a]]\n")
    cells = read_config(config).cells
    assert [cells[name]["data"] for name in list(cells)[:2]] == ["mini", ["mini", "a"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [mini, mini]", "data names mini twice"),
        ("data: [a, ./a]", "data names ./a twice"),
        ("data: []", r"a source of records or a list of such, got \[\]"),
        ("data: [mini, 3]", r"a source of records or a list of such, got \['mini', 3\]"),
    ],
)
def test_a_source_given_twice_or_none_is_one_line(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text + "\n")
    status, _, err = call("inf-embed", "train", "--config", tmp_path / "run.yaml", "--output", tmp_path / "m")
    assert status == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(error_line(err))
    assert not (tmp_path / "m").exists()
    (tmp_path / "ablation.yaml").write_text(f"{text}\nevaluate: {{data: mini}}\ngrid: {{lora_r: [1]}}\n")
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "ablation.yaml")


def test_an_ablation_over_several_sources_says_what_it_is_measured_on(tmp_path):
    (tmp_path / "a.yaml").write_text("data: [mini, a]\ncells:\n  one: {}\n")
    with pytest.raises(ValueError, match="evaluate: data must be one source"):
        read_config(tmp_path / "a.yaml")


def test_what_the_trainer_does_not_take(few_records, tmp_path):
    view = training_dataset(few_records)
    for data, message in (
        ({}, "train_dataset is missing"),
        (DatasetDict(train=view, test=view), "must be one split"),
        ({"a": view, "b": Dataset.from_dict({"c": [1]})}, r"train_dataset\['b'\] holds neither"),
        ({"a": view, "document": view}, "'document' is the name of a column"),
    ):
        with pytest.raises(ValueError, match=message):
            InstructionTrainer(None, InstructionTrainingArguments(output_dir=str(tmp_path / "m")), data)


def test_an_interrupted_run_goes_on_with_the_same_sources_and_shares(sources, tiny, tmp_path):
    """Killed in its second epoch, it ends with the weights of one that was not."""
    options = {**QUICK, "num_train_epochs": 2, "evaluations": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
    make(["with", "rows"], sources, tiny, tmp_path / "whole", **options).train()
    command = [sys.executable, "-m", "sentence_transformers_inf.cli", "train", "--base", tiny]
    command += ["--output", tmp_path / "killed", "--data", sources["with"], "--data", sources["rows"]]
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not any(int(path.parent.name[11:]) > 6 for path in (tmp_path / "killed").glob(f"checkpoint-*/{COMPLETE_FILE}")):
        with pytest.raises(subprocess.TimeoutExpired):  # the run must not end before it is killed
            process.wait(timeout=0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    words = ["inf-embed", *command[3:]]
    status, _, err = call(*words, "--multi-dataset-batch-sampler", "round_robin")
    assert status == 2
    assert "an unfinished run with another multi_dataset_batch_sampler" in error_line(err)
    status, out, err = call(*words)
    assert status == 0, err
    assert "Going on from step" in out
    same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


@pytest.mark.slow
def test_two_processes_train_as_one_does(sources, tiny, tmp_path):
    """In every step both have records of one source; also after both were killed in their second epoch."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, torch; torch.set_num_threads(1)\n"
        "from transformers import TrainerCallback\n"
        "from sentence_transformers_inf import InstructionTrainer, InstructionTrainingArguments\n"
        "from sentence_transformers_inf.corpora import load_training_data, together\n"
        "class Kill(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **kwargs):\n"
        "        if state.global_step == int(sys.argv[4]):\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "sources = {path: load_training_data(path) for path in sys.argv[5:]}\n"
        "args = InstructionTrainingArguments(output_dir=sys.argv[2], per_device_train_batch_size=int(sys.argv[3]),\n"
        "    num_train_epochs=2, warmup_steps=0, learning_rate=1e-3, bf16=False, frozen_layers=1, evaluations=4,\n"
        "    disable_tqdm=True, report_to='none')\n"
        "InstructionTrainer(sys.argv[1], args, *together(sources), callbacks=[Kill()]).train()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    runs = [([sys.executable], "one", 2, 0), (torchrun, "two", 1, 11), (torchrun, "two", 1, 0)]
    for launcher, name, size, end in runs:
        command = [*launcher, script, tiny, tmp_path / name, size, end, sources["with"], sources["rows"]]
        done = subprocess.run(list(map(str, command)), check=False, timeout=900)
        assert (done.returncode != 0) == (end > 0)
        assert (tmp_path / name / "checkpoint-9" / COMPLETE_FILE).is_file() or not end
    same(weights(tmp_path / "one"), weights(tmp_path / "two"), 2e-5)
