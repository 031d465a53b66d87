"""One model from several trainings: its weights, its recipe and card, and what is refused."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.modules import encoder_of, merge_lora
from sentence_transformers_inf.training.averaging import average_models, average_recipe
from tests.commands import call, error_line
from tests.training import train

ASKED = {"instruction": "For children.", "query": "vaccines"}
DENSE = "encoder.layer.1.output.dense.weight"


@pytest.fixture(scope="module")
def runs(tiny, few_records, tmp_path_factory):
    """Two trainings of one base, with other seeds, a setting that differs, and other records."""
    folder = tmp_path_factory.mktemp("runs")
    quick = {"learning_rate": 1e-2, "save_strategy": "no", "eval_strategy": "no"}
    train(few_records, tiny, folder / "seed-1", seed=1, **quick)
    train(few_records.select(range(3)), tiny, folder / "seed-2", seed=2, per_device_train_batch_size=3, **quick)
    for seed, minutes in ((1, 1.5), (2, 2.0)):
        change_recipe(folder / f"seed-{seed}", minutes=minutes)
    return folder


def change_recipe(folder, **entries):
    path = folder / "recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def dense(folder, route):
    """A weight of the encoder of queries or passages."""
    (path,) = folder.glob(f"{route}_0_*/model.safetensors")
    return load_file(path)[DENSE]


@pytest.mark.parametrize("step", [1.0, 1.5])
def test_the_average_goes_from_the_base_as_far_as_it_is_told(runs, tiny, tmp_path, step):
    output = tmp_path / "average"
    status, _out, err = call(
        *("inf-embed", "average", str(runs / "seed-1"), str(runs / "seed-2"), "--step", str(step), "--output", str(output))
    )
    assert status == 0, err
    base = load_file(f"{tiny}/model.safetensors")[DENSE]
    for route in ("query", "document"):
        one, two = (dense(runs / f"seed-{seed}", route) for seed in (1, 2))
        assert not one.allclose(two)
        assert dense(output, route).allclose(base + step * ((one + two) / 2 - base), atol=1e-6)
    plain = SentenceTransformer(str(output))
    assert np.array_equal(load_instruction_model(output).encode_query(ASKED), plain.encode_query("vaccines For children."))
    recipe = json.loads((output / "recipe.json").read_text())
    assert recipe["finished"]
    assert recipe["base"] == str(tiny)
    assert recipe["minutes"] == 3.5
    assert recipe["records"] == 7
    assert [source["records"] for source in recipe["sources"]] == [4, 3]
    settings = recipe["settings"]
    assert settings["seed"] == [1, 2]
    assert settings["learning_rate"] == 1e-2
    assert "per_device_train_batch_size" not in settings
    assert (settings["averaged_models"], settings["averaging_step"]) == (2, step)
    card = (output / "README.md").read_text()
    assert f"- The average of 2 trainings, {step} times as far from the base\n" in card
    assert "3.5 minutes" in card
    status, _, err = call("inf-embed", "average", str(runs / "seed-1"), "--output", str(output))
    assert status == 2
    assert "--overwrite" in error_line(err)
    status, _, err = call("inf-embed", "average", str(runs / "seed-1"), "--output", str(output), "--overwrite")
    assert status == 0, err
    assert dense(output, "query").equal(dense(runs / "seed-1", "query"))


def test_a_lora_is_merged(tiny, few_records, tmp_path):
    learned = {"learning_rate": 1e-2, "num_train_epochs": 20, "save_strategy": "no", "eval_strategy": "no"}
    lora = train(few_records, tiny, tmp_path / "lora", encoders="shared", lora_r=4, frozen_layers=None, **learned)
    assert list((tmp_path / "lora").rglob("adapter_model.safetensors"))
    average_models([tmp_path / "lora"]).save_pretrained(str(tmp_path / "merged"))
    assert not list((tmp_path / "merged").rglob("adapter_model.safetensors"))
    merged = SentenceTransformer(str(tmp_path / "merged")).encode_query("vaccines For children.")
    assert np.allclose(merged, lora.encode_query(ASKED), atol=1e-5)
    assert not np.allclose(merged, load_instruction_model(tiny).encode_query(ASKED), atol=1e-2)
    further = {"learning_rate": 1e-2, "save_strategy": "no", "eval_strategy": "no"}
    train(few_records, str(tmp_path / "lora"), tmp_path / "further", frozen_layers=None, **further)
    before, after = (average_models([tmp_path / name]).state_dict() for name in ("lora", "further"))
    longer = average_models([tmp_path / "further"], step=2.0).state_dict()
    (weight,) = (name for name in longer if name.endswith(DENSE))
    assert not before[weight].allclose(after[weight], atol=1e-4)
    assert longer[weight].allclose(2 * after[weight] - before[weight], atol=1e-5)


@pytest.mark.parametrize(("lora_r", "merge_base"), [(4, False), (0, False), (4, True)])
def test_adapters_are_averaged_beside_their_base(tiny, few_records, tmp_path, lora_r, merge_base):
    learned = {"learning_rate": 1e-2, "num_train_epochs": 10, "save_strategy": "no", "eval_strategy": "no"}
    folders = [tmp_path / "seed-1", tmp_path / "seed-2"]
    for seed, folder in enumerate(folders):
        kind = {"lora_r": lora_r, "merge_base": merge_base} | ({"frozen_layers": None} if lora_r else {})
        train(few_records, tiny, folder, update="queries", seed=seed, **kind, **learned)
    output = tmp_path / "average"
    status, _out, err = call("inf-embed", "average", *map(str, folders), "--step", "1.5", "--output", str(output))
    assert status == 0, err
    base, average = load_instruction_model(tiny), load_instruction_model(output)
    texts = ["vaccines", "A vaccine shows the body a germ."]
    assert np.array_equal(average.encode_query(texts), base.encode_query(texts))
    assert np.array_equal(average.encode_document(texts), base.encode_document(texts))
    one, two, together = (dense_of_tower(load_instruction_model(folder)) for folder in (*folders, output))
    before = dense_of_tower(base)
    expected = 1.5 * ((one + two) / 2 - before)
    if lora_r and not merge_base:  # of two LoRAs of rank 4, what rank 4 can hold
        left, values, right = torch.linalg.svd(expected)
        assert values[4] > 1e-4
        expected = left[:, :4] * values[:4] @ right[:4]
    assert (together - before).allclose(expected, atol=1e-6)
    assert expected.abs().max() > 1e-3
    assert (output / "adapter_model.safetensors").exists() == bool(lora_r and not merge_base)
    assert (output / "instruction_adapter.json").exists() != merge_base
    card = (output / "README.md").read_text()
    assert "- The average of 2 trainings, 1.5 times as far from the base\n" in card
    # One alone, as far as it went, is itself.
    assert dense_of_tower(average_models(folders[:1])).allclose(one, atol=1e-6)
    # What was trained further began with the adapter, not with its base.
    train(few_records, str(folders[0]), tmp_path / "further", **learned)
    after = dense_of_tower(load_instruction_model(tmp_path / "further"))
    longer = dense_of_tower(average_models([tmp_path / "further"], step=1.5))
    assert not after.allclose(one, atol=1e-3)
    assert (longer - after).norm() < 0.6 * (after - one).norm()
    if not lora_r or merge_base:  # nothing is cut to a rank
        assert longer.allclose(one + 1.5 * (after - one), atol=1e-5)


def test_adapters_beside_other_weights_are_refused(tiny, few_records, tmp_path):
    base = SentenceTransformer(tiny)
    for name in ("one", "two"):
        for weight in base[0].parameters():
            weight.data.mul_(1.1)
        kind = {"update": "queries", "lora_r": 2, "merge_base": True, "frozen_layers": None, "max_steps": 1}
        train(few_records, base, tmp_path / name, save_strategy="no", eval_strategy="no", **kind)
    with pytest.raises(ValueError, match="stand beside bases with other weights: average adapters of one base"):
        average_models([tmp_path / "one", tmp_path / "two"])


def test_what_was_trained_with_an_adapters_lora_is_averaged_too(tiny, few_records, tmp_path):
    base = SentenceTransformer(tiny)
    base.append(Dense(32, 16))
    base.save_pretrained(str(tmp_path / "base"))
    learned = {"learning_rate": 1e-2, "num_train_epochs": 3, "save_strategy": "no", "eval_strategy": "no"}
    folders = [tmp_path / "seed-1", tmp_path / "seed-2"]
    for seed, folder in enumerate(folders):
        kind = {"update": "queries", "lora_r": 2, "frozen_layers": None}
        train(few_records, str(tmp_path / "base"), folder, seed=seed, **kind, **learned)
    one, two, average = (
        encoder_of(model)[3].linear.weight
        for model in (*map(load_instruction_model, folders), average_models(folders, step=1.5))
    )
    before = base[3].linear.weight
    assert not one.allclose(two, atol=1e-4)
    assert average.allclose(before + 1.5 * ((one + two) / 2 - before), atol=1e-6)


def dense_of_tower(model):
    """A weight of the encoder of instructed queries, its LoRA merged."""
    encoder = copy.deepcopy(encoder_of(model)[0])
    merge_lora(encoder)
    return encoder.model.state_dict()[DENSE].clone()


def test_what_cannot_be_averaged_is_named(runs, tiny, few_records, tmp_path, base):
    one = runs / "seed-1"
    quick = {"save_strategy": "no", "eval_strategy": "no", "max_steps": 1}
    train(few_records, tiny, tmp_path / "lora", update="queries", lora_r=2, frozen_layers=None, **quick)
    train(few_records, tiny, tmp_path / "copy", update="queries", lora_r=0, **quick)
    for names in ([one, tmp_path / "lora"], [tmp_path / "lora", tmp_path / "copy"], [tmp_path / "copy", one]):
        with pytest.raises(ValueError, match="are of different kinds: average whole models, LoRA adapters or copies"):
            average_models(names)
    train(few_records, tiny, tmp_path / "one-encoder", encoders="shared", **quick)
    with pytest.raises(ValueError, match="average models of one kind"):
        average_models([one, tmp_path / "one-encoder"])
    train(few_records, str(one), tmp_path / "further", **quick)
    with pytest.raises(ValueError, match="average models of one base"):
        average_models([one, tmp_path / "further"])
    train(few_records, tiny, tmp_path / "attention", interaction="gated", **quick)
    assert average_models([tmp_path / "attention"]) is not None
    with pytest.raises(ValueError, match=r"weights that its base lacks .*: only --step 1 is possible"):
        average_models([tmp_path / "attention"], step=1.5)
    train(few_records, SentenceTransformer(tiny), tmp_path / "of-memory", **quick)
    with pytest.raises(ValueError, match="a model in memory, which is gone: only --step 1 is possible"):
        average_models([tmp_path / "of-memory"], step=1.5)
    recipe = json.loads((tmp_path / "further" / "recipe.json").read_text())
    (tmp_path / "further" / "recipe.json").write_text(json.dumps(recipe | {"finished": False}))
    with pytest.raises(ValueError, match="no finished training"):
        average_models([tmp_path / "further"])
    with pytest.raises(ValueError, match="no finished training"):
        average_models([base])
    with pytest.raises(ValueError, match="name at least one"):
        average_models([])
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        average_models(["nowhere"])
    for output in (one, Path(tiny)):
        status, _, err = call("inf-embed", "average", str(one), "--output", str(output), "--overwrite")
        assert status == 2
        assert "name another --output" in error_line(err)
        assert (output / "modules.json").exists()


def test_models_of_other_texts_machines_or_a_base_that_is_gone_are_not_mixed_up(runs, tiny, few_records, tmp_path):
    one = tmp_path / "one"
    shutil.copytree(runs / "seed-1", one)
    change_recipe(one, hardware="another machine")
    assert "minutes" not in average_recipe([one, runs / "seed-2"])
    train(few_records, tiny, tmp_path / "lines", template="{query}: {instruction}", save_strategy="no", eval_strategy="no")
    with pytest.raises(ValueError, match="join, cut or exclude texts differently"):
        average_models([one, tmp_path / "lines"])
    change_recipe(one, base=str(tmp_path / "gone"))
    assert average_models([one]) is not None
    with pytest.raises(OSError, match=r"the models' base is not there .*leave --step out"):
        average_models([one], step=1.5)
    recipe = json.loads((one / "recipe.json").read_text())
    del recipe["records_sha256"]
    (one / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="no finished training"):
        average_models([one])
