"""No false success, no traceback, nothing overwritten: damaged files, two commands at once, full disks, divergence."""

import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from sentence_transformers_inf import InstructionTrainingArguments, load_instruction_model, load_records, passages
from sentence_transformers_inf.hub.push import model_parts
from sentence_transformers_inf.modules import BrokenModelError, encoder_of, read_array
from sentence_transformers_inf.recipe import locked, read_recipe, write_whole
from sentence_transformers_inf.training import RunFolder
from sentence_transformers_inf.training.ablation import read_config
from sentence_transformers_inf.training.arguments import ScriptArguments
from tests.commands import call, error_line
from tests.training import train, trainer

RUN = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "evaluations": 2,
    "encoders": "shared",
}
BY_TIME = {**RUN, "save_minutes": 1e-9}
INPUTS = [{"instruction": "For young children.", "query": "why is the sky blue"}, {"query": "sky"}, "a passage"]
FEW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class StopAt(TrainerCallback):
    """Ctrl-C in a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train_with(callback, data, base, folder, **settings):
    """See tests/training.py; the callback is called before all others."""
    running = trainer(data, base, folder, **settings)
    running.callback_handler.callbacks.insert(0, callback)
    running.train()
    return running


def weights(folder):
    """See tests/test_training.py: a bias of the keys is rounding noise."""
    found = load_file(folder / "model.safetensors")
    return {name: value for name, value in found.items() if not name.endswith("attention.self.key.bias")}


def same_weights(one, other):
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.allclose(first[n], second[n], rtol=0, atol=1e-5) for n in first)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(few_records, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    train(few_records, tiny, folder, **RUN)
    return folder


@pytest.fixture(scope="module")
def interrupted(few_records, tiny, tmp_path_factory):
    """A run that was stopped in its sixth step of eight, with checkpoints of the fourth and fifth."""
    folder = tmp_path_factory.mktemp("part") / "model"
    with pytest.raises(KeyboardInterrupt):
        train_with(StopAt(5), few_records, tiny, folder, **BY_TIME)
    return folder


@pytest.fixture
def part(interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path / "model")
    return tmp_path / "model"


# Checkpoints


def damage(path, kind, at):
    """Remove a file, cut it, or change a byte of it."""
    content = path.read_bytes()
    at %= max(1, len(content))
    if kind == "removed":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[:at])
    else:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


DAMAGE = {"kind": st.sampled_from(["removed", "cut", "flipped"]), "at": st.integers(0, 10**7)}


def test_checkpoints_are_written_by_time_too(interrupted):
    assert [path.name for path in RunFolder(interrupted).checkpoints()] == ["checkpoint-5", "checkpoint-4"]
    assert RunFolder(interrupted).last_checkpoint() == str(interrupted / "checkpoint-5")


def test_what_a_user_keeps_beside_checkpoints_stays_and_stops_nothing(part):
    shutil.copytree(part / "checkpoint-4", part / "checkpoint-4-copy")
    (part / "checkpoint-7-mine").mkdir()
    (part / "checkpoint-9.tar").write_text("packed")
    (part / "checkpoint-12").write_text("a note")
    before = contents(part)
    folder = RunFolder(part)
    assert folder.last_checkpoint() == str(part / "checkpoint-5")
    assert contents(part) == before
    folder.remove_checkpoints()
    left = {path.name for path in part.glob("checkpoint-*")}
    assert left == {"checkpoint-4-copy", "checkpoint-7-mine", "checkpoint-9.tar", "checkpoint-12"}


@FEW
@given(number=st.integers(0, 100), **DAMAGE)
def test_whatever_of_a_checkpoint_is_damaged_the_older_one_is_taken(interrupted, tmp_path_factory, number, kind, at):
    folder = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(interrupted, folder)
    files = sorted(path for path in (folder / "checkpoint-5").rglob("*") if path.is_file() and path.stat().st_size)
    damage(files[number % len(files)], kind, at)
    assert RunFolder(folder).last_checkpoint() == str(folder / "checkpoint-4")
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize("name", [pytest.param("optimizer.pt", marks=pytest.mark.slow), "scheduler.pt"])
def test_a_run_with_a_damaged_checkpoint_ends_with_the_same_weights(name, part, uninterrupted, few_records, tiny, caplog):
    damage(part / "checkpoint-5" / name, "removed" if name == "scheduler.pt" else "cut", 1000)
    train(few_records, tiny, part, **RUN)
    assert f"checkpoint-5 is damaged ({name})" in caplog.text
    assert "Going on from step 4" in caplog.text
    assert same_weights(part, uninterrupted)


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_begins_again(part, uninterrupted, few_records, tiny, caplog):
    for checkpoint in part.glob("checkpoint-*"):
        damage(checkpoint / "trainer_state.json", "cut", 20)
    train(few_records, tiny, part, **RUN)
    assert "starts again from its beginning" in caplog.text
    assert same_weights(part, uninterrupted)


def test_a_command_that_was_killed_after_the_model_was_saved_ends_when_it_is_given_again(
    tiny, few_records, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    few_records.to_json("train.jsonl")
    command = ["inf-embed", "train", "--base", tiny, "--data", "train.jsonl", "--output", "model", "--frozen-layers", 0]
    command += ["--encoders", "shared", "--bf16", "false"]
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "remove_checkpoints", lambda self: sys.exit(9))
        assert call(*command)[0] == 9
    before = weights(Path("model"))
    assert read_recipe("model")["finished"]
    assert RunFolder("model").checkpoints()
    (Path("model") / "README.md").unlink()
    status, _, err = call(*command)
    assert status == 0, err[-2000:]
    after = weights(Path("model"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (Path("model") / "README.md").exists()
    assert not RunFolder("model").checkpoints()
    assert "holds a finished model" in error_line(call(*command)[2])


def test_a_full_disk_is_one_error_and_the_run_goes_on_when_there_is_room(part, uninterrupted, few_records, tiny):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        with pytest.raises(OSError, match=r"could not be written .*make room; then give the same command again"):
            train(few_records, tiny, part, **RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not RunFolder(part).is_finished
    train(few_records, tiny, part, **RUN)
    assert same_weights(part, uninterrupted)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "recipe.json"
    write_whole(path, "old")
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                write_whole(path, "new")
        assert contents(tmp_path) == {Path("recipe.json"): b"old"}


@pytest.mark.parametrize("command", ["evaluate", "passages", "check", "analyze"])
def test_a_full_disk_is_named_by_the_output_which_stays_as_it_was(command, tiny, few_records, tmp_path):
    few_records.to_json(tmp_path / "records.jsonl")
    load_records(tmp_path / "records.jsonl")  # into the cache
    path, data = tmp_path / "report.json", ["--data", tmp_path / "records.jsonl"]
    path.write_text("old")
    words = {
        "evaluate": ["inf-embed", "evaluate", tiny, *data, "--json", path],
        "passages": ["inf-embed", "passages", *data, "--output", path],
        "check": ["inf-ir", "check", tmp_path / "records.jsonl", "--json", path],
        "analyze": ["inf-ir", "analyze", tmp_path / "records.jsonl", "--model", tiny, "--output", tmp_path],
    }[command]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
        status, _, err = call(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    assert re.search(r"report\.json: file too large: make room", error_line(err))
    assert path.read_text() == "old"
    assert {found.name for found in tmp_path.iterdir()} <= {"report.json", "records.jsonl"}


def test_a_file_is_written_where_a_link_leads(few_records, tmp_path):
    few_records.to_json(tmp_path / "records.jsonl")
    (tmp_path / "there").mkdir()
    (tmp_path / "a.json").symlink_to(tmp_path / "there" / "b.json")
    for _ in range(2):
        assert call("inf-ir", "check", tmp_path / "records.jsonl", "--json", tmp_path / "a.json")[0] in (0, 1)
        assert json.loads((tmp_path / "there" / "b.json").read_text(encoding="utf-8"))["records"]
        assert (tmp_path / "a.json").is_symlink()


def test_a_file_of_a_long_name_is_written(tmp_path):
    path = tmp_path / ("ä" * 125 + ".json")
    write_whole(path, "new")
    assert contents(tmp_path) == {Path(path.name): b"new"}


@pytest.mark.parametrize(
    ("name", "words"), [("recipe.json", "card ."), ("results.json", "card ."), ("recipe.json", "push . --repo user/name")]
)
def test_a_pipe_is_not_waited_for(name, words, tiny, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    monkeypatch.chdir(folder)
    status, _, err = call("inf-embed", *words.split())
    assert status == 2
    assert f"{name}: this is no file: restore the file" in error_line(err)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"flour": 500}', "[" * 100_000])
def test_a_recipe_of_no_run_is_named(tmp_path, text):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(ValueError, match=r"recipe\.json: .*move it away"):
        read_recipe(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"recipe\.json: .*move it away"):
            RunFolder(tmp_path).claim({"base": "a"}, overwrite)
    assert contents(tmp_path) == {Path("recipe.json"): text.encode()}


@pytest.mark.parametrize("words", [["train"], ["train", "--overwrite"], ["demo"], ["card"], ["push"]])
def test_no_command_writes_where_a_recipe_is_damaged(tiny, few_records, tmp_path, words):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "recipe.json").write_text("")
    (tmp_path / "train.jsonl").write_text(json.dumps(few_records[0]))
    before = contents(folder)
    options = {
        "train": ["--base", tiny, "--data", tmp_path / "train.jsonl", "--output", folder, "--frozen-layers", 0],
        "demo": ["--base", tiny, "--output", folder],
        "card": [folder],
        "push": [folder, "--repo", "user/name"],
    }[words[0]]
    status, _, err = call("inf-embed", *words, *options)
    assert status == 2
    assert str(folder / "recipe.json") in error_line(err)
    assert {path: content for path, content in contents(folder).items() if path.name != ".lock"} == before


@pytest.mark.parametrize("words", [["train", "--base", "base", "--frozen-layers", 0], ["demo"], ["demo", "--overwrite"]])
def test_somebody_s_model_is_not_trained_over(tiny, tmp_path, words):
    shutil.copytree(tiny, tmp_path / "model")
    before = contents(tmp_path / "model")
    words = [tiny if word == "base" else word for word in words]
    words += ["--max-records", 4] if "train" in words else []
    status, _, err = call("inf-embed", *words, "--output", tmp_path / "model")
    assert status == 2
    assert "is not empty and holds no run" in error_line(err)
    assert contents(tmp_path / "model") == before


# Two commands in one folder


@pytest.fixture
def busy(tmp_path):
    """A folder that a process of its own has locked, and that process."""
    script = "import sys, time\nfrom sentence_transformers_inf.recipe import locked\nwith locked(sys.argv[1]):\n"
    script += "    print('locked', flush=True)\n    time.sleep(600)\n"
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "model"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield tmp_path / "model", process
    process.kill()
    process.communicate()


def test_a_second_command_in_a_folder_ends_at_once_and_a_killed_one_does_not_block(busy, tiny, few_records, tmp_path):
    folder, process = busy
    few_records.to_json(tmp_path / "train.jsonl")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    write_whole(folder / "recipe.json", '{"base": "a"}')
    (tmp_path / "a.yaml").write_text(
        f"data: {tmp_path / 'train.jsonl'}\nsettings: {{base: {tiny}}}\ngrid: {{scale: [20.0]}}\n"
    )
    command = ["inf-embed", "train", "--base", tiny, "--data", tmp_path / "train.jsonl", "--frozen-layers", 0]
    ablate = ["inf-embed", "ablate", tmp_path / "a.yaml", "--output", folder]
    before = contents(folder)
    into = ["--output", folder]
    for words in ([*command, *into], [*command, *into, "--overwrite"], ablate, ["inf-embed", "card", folder]):
        status, _, err = call(*words)
        assert status == 2
        assert f"{folder}: another command is writing here" in error_line(err)
        assert contents(folder) == before
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(folder), locked(folder):  # what a command locks its parts may lock again
        pass


@pytest.mark.slow
def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on_from_there(tiny, few_records, tmp_path):
    few_records.to_json(tmp_path / "train.jsonl")
    words = ["train", "--base", tiny, "--data", tmp_path / "train.jsonl", "--output", tmp_path / "model", "--epochs", 500]
    words += ["--frozen-layers", 0, "--batch-size", 1, "--save-minutes", 1e-9, "--disable-tqdm", "true", "--bf16", "false"]
    command = [sys.executable, "-m", "sentence_transformers_inf.cli", *map(str, words)]
    for again in (False, True):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        said = []
        if again:
            for line in process.stderr:
                said.append(line)
                if "Going on from step" in line:
                    break
        while not RunFolder(tmp_path / "model").checkpoints():
            with pytest.raises(subprocess.TimeoutExpired):  # it must not end before it is stopped
                process.wait(timeout=0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
        err = "".join(said) + err
        assert process.returncode == 130
        assert "is kept, and the same command goes on from there" in err
        assert "Traceback" not in err


# A training that diverges


def test_a_diverged_training_is_one_line_and_not_finished(tiny, few_records, tmp_path):
    few_records.to_json(tmp_path / "train.jsonl")
    words = ["--base", tiny, "--data", tmp_path / "train.jsonl", "--output", tmp_path / "model", "--frozen-layers", 0]
    status, _, err = call("inf-embed", "train", *words, "--learning-rate", "1e10", "--batch-size", 1)
    assert status == 2
    assert "the training diverged at step" in error_line(err)
    assert "lower learning rate than 10000000000.0" in error_line(err)
    assert not RunFolder(tmp_path / "model").is_finished
    assert not (tmp_path / "model" / "modules.json").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_break_in_the_last_step_are_no_finished_model(tiny, few_records, tmp_path, value):
    class Break(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            next(model.parameters()).data.fill_(value)

    with pytest.raises(ValueError, match=r"diverged at step 1: .* not finite"):
        train_with(Break(), few_records, tiny, tmp_path / "model")
    assert not RunFolder(tmp_path / "model").is_finished


def test_gradients_that_are_not_finite_do_not_reach_the_weights(tiny, few_records, tmp_path):
    class Break(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                next(each for each in model.parameters() if each.grad is not None).grad[0] = float("inf")

    model = load_instruction_model(tiny)
    with pytest.raises(ValueError, match="diverged at step 2: the norm of the gradients is inf"):
        train_with(Break(), few_records, model, tmp_path / "model", per_device_train_batch_size=2, encoders="shared")
    assert all(torch.isfinite(each).all() for each in model.parameters())


# Arguments


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_train_epochs", float("inf")), ("num_train_epochs", float("nan")), ("learning_rate", "fast"),
        ("learning_rate", True), ("seed", True), ("seed", -1), ("seed", 2**32), ("data_seed", True), ("scale", float("inf")),
        ("per_device_train_batch_size", 2.5), ("per_device_eval_batch_size", 0), ("gradient_accumulation_steps", 0),
        ("warmup_steps", float("nan")), ("save_steps", 0), ("save_minutes", -1.0), ("dropout", "none"), ("template", 5),
        ("output_dir", ""), ("output_dir", 5), ("bf16", "yes"), ("frozen_layers", True), ("weight_decay", -1.0),
        ("max_grad_norm", float("inf")), ("adam_epsilon", -1.0), ("dataloader_num_workers", -1), ("evaluations", True),
    ],
)  # fmt: skip
def test_an_argument_of_another_kind_is_named(name, value, tmp_path):
    with pytest.raises(ValueError, match=name):
        InstructionTrainingArguments(**{"output_dir": str(tmp_path), name: value})


def test_arguments_of_files_and_ablations_are_checked_as_well(tmp_path):
    for value in (0, -5, True, 2.5, "all"):
        with pytest.raises(ValueError, match="max_records"):
            ScriptArguments(max_records=value)
    with pytest.raises(ValueError, match=r"'{' is given for an argument that takes JSON"):
        InstructionTrainingArguments(output_dir=str(tmp_path), lr_scheduler_kwargs="{")
    for text in ("seeds: [true]\n", "seeds: [-1]\n", "evaluate: {folder: x}\n"):
        (tmp_path / "a.yaml").write_text(f"{text}grid: {{scale: [1.0]}}\n")
        with pytest.raises(ValueError, match=r"a\.yaml: (seeds|evaluate)"):
            read_config(tmp_path / "a.yaml")
    for words in (["--max-records", 0], ["--max-records", -5], ["--epochs", "inf"], ["--seed", "true"]):
        status, _, err = call("inf-embed", "train", "--output", tmp_path / "model", *words)
        assert status == 2
        assert words[0].strip("-").replace("max-records", "max_records") in error_line(err)
    assert not (tmp_path / "model").exists()


# Vectors


@settings(max_examples=150, deadline=None)
@given(suffix=st.sampled_from([".npy", ".npz"]), **DAMAGE)
def test_a_damaged_array_is_one_error(tmp_path_factory, suffix, kind, at):
    path = tmp_path_factory.getbasetemp() / f"vectors{suffix}"
    stream = io.BytesIO()
    (np.save if suffix == ".npy" else np.savez_compressed)(stream, np.arange(12, dtype=np.float32).reshape(4, 3))
    path.write_bytes(stream.getvalue())
    damage(path, kind, at)
    try:
        assert read_array(path).dtype.kind in "fiu"
    except FileNotFoundError:
        assert kind == "removed"
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017


def test_arrays_of_something_else_are_one_error(tmp_path):
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(b"PK")
    np.save(tmp_path / "texts.npy", np.array(["a", "b"]))
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "none.npz")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=path.name):
            read_array(path)


@FEW
@given(damaged=st.sampled_from([".npy", ".partial"]), kind=st.sampled_from(["cut", "flipped"]), at=st.integers(0, 10**7))
def test_a_damaged_cache_of_passages_is_made_anew(tiny, tmp_path_factory, damaged, kind, at):
    folder = tmp_path_factory.mktemp("cache")
    texts = [f"passage {number}" for number in range(5)]
    model = load_instruction_model(tiny)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passages, "cached_assets_path", lambda *_, **__: folder)
        patch.setattr(passages, "_BLOCK", 2)
        expected = np.array(passages.encode_passages(model, texts))
        file = next(folder.glob("*.npy"))
        if damaged == ".partial":
            file = file.rename(file.with_suffix(".partial"))
        damage(file, "cut" if damaged == ".npy" else kind, at % 128 if kind == "flipped" else at)
        assert np.allclose(passages.encode_passages(model, texts), expected, atol=1e-6)


def test_no_passages_of_a_broken_model_are_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(passages, "cached_assets_path", lambda *_, **__: tmp_path)
    model = load_instruction_model(tiny)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    for _ in range(2):
        with pytest.raises(BrokenModelError, match="2 of 2 passages"):
            passages.encode_passages(model, ["sky", "sea"])
    assert not list(tmp_path.glob("*.npy"))


# Model folders


@pytest.fixture(scope="module")
def saved(tiny, few_records, tmp_path_factory):
    """A folder of each kind of model: one encoder, two, and an adapter."""
    folder = tmp_path_factory.mktemp("saved")
    load_instruction_model(tiny, template="{instruction}: {query}").save_pretrained(str(folder / "single"))
    train(few_records, tiny, folder / "towers", save_strategy="no")
    train(few_records, tiny, folder / "adapter", save_strategy="no", update="queries", lora_r=2, frozen_layers=None)
    return folder


def model_files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "README.md"))


def check_damaged(folder, name):
    """What is damaged is refused in an error that names the model, or encodes as before."""
    expected = check_damaged.expected.setdefault(name, load_instruction_model(folder.parent / name).encode(INPUTS))
    try:
        model = load_instruction_model(folder)
    except (ValueError, OSError) as error:
        assert str(folder) in str(error), error  # noqa: PT017
        return
    assert np.allclose(model.encode(INPUTS), expected, atol=1e-5)


check_damaged.expected = {}
MAY_BE_MISSING = ("modules.json", "instruction_adapter.json")
"""Without them a folder is that of another model."""


@pytest.mark.parametrize("kind", ["single", "towers", "adapter"])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 100), how=st.sampled_from(["removed", "cut", "empty", "[]", "{}", "[1]"]), at=st.integers(0))
def test_a_damaged_model_folder_is_one_error(saved, kind, number, how, at):
    folder = saved / "damaged"
    shutil.copytree(saved / kind, folder)
    try:
        files = model_files_of(folder)
        path = files[number % len(files)]
        if how == "removed" and path.name in MAY_BE_MISSING:
            how = "cut"
        if how in ("removed", "cut"):
            damage(path, how, at)
        else:
            path.write_text("" if how == "empty" else how)
        check_damaged(folder, kind)
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["removed", "cut", "{}", "[]"])
@pytest.mark.parametrize("kind", ["single", "towers", "adapter"])
def test_every_file_of_a_model_may_be_damaged(saved, kind, how, tmp_path):
    for path in model_files_of(saved / kind):
        if how == "removed" and path.name in MAY_BE_MISSING:
            continue
        shutil.copytree(saved / kind, saved / "damaged")
        file = saved / "damaged" / path.relative_to(saved / kind)
        if how in ("removed", "cut"):
            damage(file, how, path.stat().st_size // 2)
        else:
            file.write_text(how)
        try:
            check_damaged(saved / "damaged", kind)
        finally:
            shutil.rmtree(saved / "damaged")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("instruction_config.json", '{"template": 5, "max_query_length": null}'),
        ("instruction_config.json", '{"template": "{query} {instruction}", "max_query_length": "long"}'),
        ("instruction_config.json", '{"template": "{query}", "max_query_length": null}'),
        ("instruction_config.json", '{"max_query_length": null}'),
        ("modules.json", '[{"idx": 0}]'),
        ("modules.json", "[]"),
        ("model.safetensors", "x"),
        ("tokenizer.json", "{}"),
        ("config.json", "{}"),
        ("1_Pooling/config.json", '{"pooling_mode": "none"}'),
        ("instruction_adapter.json", '{"base": "x"}'),
    ],
)
def test_a_model_with_a_wrong_file_is_one_line(saved, tmp_path, file, text):
    shutil.copytree(saved / "single", tmp_path / "model")
    (tmp_path / "model" / file).write_text(text)
    status, _, err = call("inf-embed", "evaluate", tmp_path / "model")
    assert status == 2
    assert str(tmp_path / "model") in error_line(err)


def test_a_model_without_its_tokenizer_or_only_pickled_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(OSError, match=r"model: .* its tokenizer knows no words"):
        load_instruction_model(tmp_path / "model")
    shutil.copytree(tiny, tmp_path / "pickled")
    torch.save(load_file(tmp_path / "pickled" / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"pytorch_model\.bin is pickled"):
        load_instruction_model(tmp_path / "pickled")


def test_what_names_no_model_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for name, message in (("", "no such model folder"), (" ", "no such model"), (tmp_path / "file", "is a file")):
        status, _, err = call("inf-embed", "search", name, "--corpus", "mini", "--query", "q")
        assert status == 2
        assert message in error_line(err)


@pytest.mark.parametrize("kind", ["single", "towers"])
def test_a_template_survives_a_program_that_does_not_know_it(saved, kind, tmp_path):
    plain = SentenceTransformer(str(saved / kind))
    plain.save_pretrained(str(tmp_path / "again"))
    assert not list((tmp_path / "again").rglob("instruction_config.json"))
    model, again = load_instruction_model(saved / kind), load_instruction_model(tmp_path / "again")
    assert encoder_of(again)[0].template == encoder_of(model)[0].template
    assert np.array_equal(again.encode(INPUTS), model.encode(INPUTS))


def test_attention_that_such_a_program_lost_is_said(tiny, tmp_path):
    load_instruction_model(tiny, interaction="gated").save_pretrained(str(tmp_path / "ours"))
    SentenceTransformer(str(tmp_path / "ours")).save_pretrained(str(tmp_path / "again"))
    (tmp_path / "ours" / "1_Pooling" / "instruction_query_attention.json").unlink()
    for name in ("again", "ours"):
        with pytest.raises(OSError, match="its attention is missing"):
            load_instruction_model(tmp_path / name)


def test_saved_weights_are_as_readable_as_the_umask_says(tiny, few_records, tmp_path):
    before = os.umask(0o027)
    try:
        load_instruction_model(tiny).save_pretrained(str(tmp_path / "saved"))
        train(few_records, tiny, tmp_path / "trained", save_strategy="no")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert modes == {0o640}


# Code of others


CODE = """
from transformers import BertConfig, BertModel

class OurConfig(BertConfig):
    model_type = "our_bert"

class OurModel(BertModel):
    config_class = OurConfig
"""


def test_code_of_a_base_runs_only_when_it_is_trusted(tiny, few_records, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "modeling_our.py").write_text(CODE)
    config = json.loads((base / "config.json").read_text())
    classes = {"AutoConfig": "modeling_our.OurConfig", "AutoModel": "modeling_our.OurModel"}
    config |= {"model_type": "our_bert", "auto_map": classes}
    (base / "config.json").write_text(json.dumps(config))
    status, _, err = call("inf-embed", "evaluate", base)
    assert status == 2
    assert f"code that {base} (no revision stated) brings" in error_line(err)
    assert "--trust-remote-code" in error_line(err)
    with pytest.raises(OSError, match="--trust-remote-code"):
        train(few_records, base, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    train(few_records, base, tmp_path / "model", trust_remote_code=True, encoders="shared")
    model = load_instruction_model(tmp_path / "model", trust_remote_code=True)
    assert type(encoder_of(model)[0].model).__name__ == "OurModel"
    assert any(name.endswith("modeling_our.py") for name in model_parts(tmp_path / "model")[0])


# The Hub


def test_only_a_model_is_pushed(saved, tmp_path, connected):
    from huggingface_hub import HfApi

    folder = tmp_path / "model"
    shutil.copytree(saved / "towers", folder)
    for name in ("secret.env", "my_config.json", "train.py", "notes/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "hosts").symlink_to("/etc/hosts")
    status, out, err = call("inf-embed", "push", folder, "--repo", "user/only-a-model")
    assert status == 0, err[-2000:]
    assert "5 files are no part of a model and are not pushed: hosts, my_config.json" in out
    pushed = set(HfApi().list_repo_files("user/only-a-model"))
    assert {"README.md", "modules.json", "router_config.json", "query_0_Transformer/model.safetensors"} <= pushed
    assert not {name for name in pushed if "secret" in name or "notes" in name or "my_" in name or name == "hosts"}
    expected = load_instruction_model(folder).encode(INPUTS)
    assert np.allclose(load_instruction_model("user/only-a-model").encode(INPUTS), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["x.PKL", "weights.Bin", "notes/x.pickle", "a.ckpt", "b.PTH"])
def test_pickles_are_refused_however_they_are_spelled(tiny, tmp_path, name):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "model" / name).write_bytes(b"\x80")
    with pytest.raises(ValueError, match="pickled weights are not pushed"):
        model_parts(tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "README.md", "1_Pooling", "tokenizer.json"])
@pytest.mark.parametrize("target", ["../outside", "inside"])
def test_a_link_in_the_place_of_a_part_of_a_model_is_refused(tiny, tmp_path, name, target):
    shutil.copytree(tiny, tmp_path / "model")
    path = tmp_path / "model" / name
    path.rename(tmp_path / "model" / target)
    path.symlink_to(tmp_path / "model" / target)
    with pytest.raises(ValueError, match=f"{name}: a link is not pushed"):
        model_parts(tmp_path / "model")


def test_a_hub_that_cannot_be_reached_is_asked_once(connected, monkeypatch):
    from huggingface_hub import constants, hf_api

    asked = []
    server = socket.create_server(("127.0.0.1", 0))

    def refuse():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            asked.append(1)
            connection.close()

    thread = threading.Thread(target=refuse, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    try:
        status, _, err = call("inf-embed", "evaluate", "user/mistyped")
    finally:
        server.close()
    assert status == 2
    assert "user/mistyped" in error_line(err)
    assert "the Hub cannot be reached" in error_line(err)
    assert len(asked) <= 2


def test_the_bundled_base_is_not_sought_on_the_hub(base):
    for name in ("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"):
        model = load_instruction_model(name)
        assert np.array_equal(model.encode(["sky"]), load_instruction_model(base).encode(["sky"]))


@pytest.mark.slow
def test_a_lora_finds_the_bundled_base_without_the_hub(base, few_records, tmp_path):
    train(few_records, None, tmp_path / "lora", encoders="shared", lora_r=2, frozen_layers=None, save_strategy="no")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    model = load_instruction_model(tmp_path / "lora")
    model.save_pretrained(str(tmp_path / "again"))
    assert (
        json.loads((tmp_path / "again" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == (config["base_model_name_or_path"])
    )
    assert not np.allclose(model.encode(INPUTS), load_instruction_model(base).encode(INPUTS), atol=1e-3)
