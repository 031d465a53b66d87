"""One model from several trainings: its weights, its recipe and card, and what is refused."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.training.averaging import average_models
from tests.commands import call, error_line
from tests.training import train

ASKED = {"instruction": "For children.", "query": "vaccines"}
DENSE = "encoder.layer.1.output.dense.weight"


@pytest.fixture(scope="module")
def runs(tiny, few_records, tmp_path_factory):
    """Two trainings of one base, which differ in their seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        train(
            few_records, tiny, folder / f"seed-{seed}", seed=seed, learning_rate=1e-2, save_strategy="no", eval_strategy="no"
        )
    return folder


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
    assert recipe["settings"]["seed"] == [1, 2]
    assert recipe["settings"]["learning_rate"] == 1e-2
    assert (recipe["settings"]["averaged_models"], recipe["settings"]["step"]) == (2, step)
    assert [source["records"] for source in recipe["sources"]] == [4]
    card = (output / "README.md").read_text()
    assert "- averaged_models: 2" in card
    assert f"- step: {step}" in card
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


def test_what_cannot_be_averaged_is_named(runs, tiny, few_records, tmp_path, base):
    one = runs / "seed-1"
    quick = {"save_strategy": "no", "eval_strategy": "no", "max_steps": 1}
    train(few_records, tiny, tmp_path / "adapter", update="queries", lora_r=2, frozen_layers=None, **quick)
    with pytest.raises(ValueError, match="adapter is an adapter, and only whole models"):
        average_models([tmp_path / "adapter"])
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
    status, _, err = call("inf-embed", "average", str(one), "--output", str(one), "--overwrite")
    assert status == 2
    assert "name another --output" in error_line(err)
    assert (one / "modules.json").exists()
