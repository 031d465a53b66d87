"""A model whose files lack weights, or hold further layers, is refused: transformers would make up what is missing."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.modules import two_towers
from sentence_transformers_inf.modules.loading import BUNDLED_ADAPTER


@pytest.fixture(scope="module")
def towers(tiny, tmp_path_factory):
    """A model with an encoder for queries and one for passages."""
    folder = tmp_path_factory.mktemp("towers")
    two_towers(load_instruction_model(tiny)).save_pretrained(str(folder))
    return folder


def changed(source, target, change, file="model.safetensors"):
    """A copy of a model's folder whose weights are what a function makes of them."""
    shutil.copytree(source, target)
    save_file(change(load_file(target / file)), target / file, {"format": "pt"})
    return str(target)


def without(part):
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("word_embeddings"), "embeddings.word_embeddings.weight;"),
        (without("layer.1."), "encoder.layer.1.attention.output.LayerNorm.bias and 15 more"),
        (lambda weights: {f"foo.{name}": weight for name, weight in weights.items()}, "embeddings.LayerNorm.bias and "),
    ],
    ids=["one", "a layer", "renamed"],
)
def test_a_file_without_weights_is_refused(change, named, tiny, tmp_path):
    with pytest.raises(OSError, match=f"model.safetensors lacks weights that the model has: {named}"):
        load_instruction_model(changed(tiny, tmp_path / "copy", change))


def test_each_encoder_is_looked_at(towers, tmp_path):
    for kind in ("query", "document"):
        file = f"{kind}_0_Transformer/model.safetensors"
        folder = changed(towers, tmp_path / kind, without("layer.0.output.dense.bias"), file)
        with pytest.raises(OSError, match=f"{file} lacks weights that the model has: encoder.layer.0.output.dense.bias;"):
            load_instruction_model(folder)


def test_a_lora_is_looked_at(tmp_path):
    folder = changed(BUNDLED_ADAPTER, tmp_path / "copy", without("lora_B"), "adapter_model.safetensors")
    with pytest.raises(OSError, match=r"adapter_model.safetensors lacks .*lora_B.weight and 11 more"):
        load_instruction_model(folder)


@pytest.mark.parametrize(("layers", "problem"), [(1, "has layers"), (-1, "has layers"), (3, "lacks weights")])
def test_the_layers_are_those_that_the_configuration_counts(layers, problem, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": layers}))
    with pytest.raises(OSError, match=f"model.safetensors {problem}"):
        load_instruction_model(str(tmp_path / "copy"))


@pytest.mark.parametrize(
    "change",
    [without("pooler"), lambda weights: {f"bert.{name}": weight for name, weight in weights.items()}],
    ids=["without the unused pooler", "with BERT's prefix"],
)
def test_what_has_all_that_is_needed_is_loaded(change, tiny, tmp_path):
    loaded = load_instruction_model(changed(tiny, tmp_path / "copy", change))
    assert (loaded.encode("a text") == load_instruction_model(tiny).encode("a text")).all()


def test_a_masked_language_model_in_shards_is_loaded(tiny, tmp_path):
    masked = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(tiny))
    masked.save_pretrained(tmp_path / "copy", max_shard_size="1MB")
    assert (tmp_path / "copy" / "model.safetensors.index.json").exists()
    load_instruction_model(tiny).tokenizer.save_pretrained(tmp_path / "copy")
    assert load_instruction_model(str(tmp_path / "copy")).encode("a text").shape == (32,)
