"""What was trained is trained further as what it is: first on one corpus, then on another."""

import json

import numpy as np
import pytest

from sentence_transformers_inf import load_instruction_model, load_records
from sentence_transformers_inf.modules import detach_adapter, encoder_of, has_lora, is_adapter
from sentence_transformers_inf.modules.lora import lora_rank
from tests.training import train, trainer

FIRST = {
    "shared": {"encoders": "shared"},
    "separate": {},
    "with a LoRA": {"lora_r": 4},
    "adapter": {"update": "queries", "lora_r": 4},
    "adapter of a copy": {"update": "queries", "lora_r": 0},
    "merged adapter": {"update": "queries", "lora_r": 4, "merge_base": True},
}
BECOMES = {"shared": "separate", "with a LoRA": "shared"}
QUICK = {"learning_rate": 1e-2, "save_strategy": "no"}
INPUTS = [{"instruction": "For young children.", "query": "why is the sky blue"}, {"query": "sky"}, "a passage"]


def embeddings(model):
    return np.concatenate([model.encode(INPUTS), model.encode_query(INPUTS[:2]), model.encode_document(INPUTS[2:])])


def settings_of(folder):
    return json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["settings"]


@pytest.fixture(scope="module")
def mine():
    """Records of another corpus than the first."""
    return load_records("mini", "train").select(range(8, 12))


@pytest.fixture(scope="module")
def checkpoints(tiny, few_records, tmp_path_factory):
    """The folder of a model of each kind, trained once, when it is first asked for."""
    folder, done = tmp_path_factory.mktemp("first"), {}

    def checkpoint(kind):
        if kind not in done:
            done[kind] = folder / kind
            train(few_records, tiny, done[kind], **QUICK, **FIRST[kind])
        return done[kind]

    return checkpoint


@pytest.fixture(scope="module", params=FIRST)
def further(request, checkpoints, mine, tmp_path_factory):
    """(kind, folder, model) of each kind, trained further with nothing said about it."""
    folder = tmp_path_factory.mktemp("further") / "model"
    return request.param, folder, train(mine, checkpoints(request.param), folder, **QUICK)


def test_it_is_saved_as_it_was_trained(further):
    _, folder, model = further
    assert np.allclose(embeddings(load_instruction_model(folder)), embeddings(model), atol=1e-6)


def test_it_goes_on_from_what_the_first_training_left(further, checkpoints):
    kind, _, model = further
    first = embeddings(load_instruction_model(checkpoints(kind)))
    moved = np.abs(embeddings(model) - first).max(axis=1) > 1e-4
    instructed, bare, passage = moved[0], moved[1], moved[2]
    assert instructed
    assert bare == passage == ("adapter" not in kind)


def test_it_stays_what_it_is(further):
    kind, folder, model = further
    settings = settings_of(folder)
    assert is_adapter(model) == is_adapter(load_instruction_model(folder)) == ("adapter" in kind)
    if is_adapter(model):
        assert settings["update"] == "queries"
        assert "encoders" not in settings
    else:
        assert settings["encoders"] == BECOMES.get(kind, kind)
    assert settings["lora_r"] == lora_rank(encoder_of(model)[0]) == (4 if kind in ("with a LoRA", "adapter") else 0)


def test_an_adapter_keeps_its_own_base(further, checkpoints, tiny):
    kind, folder, model = further
    if not is_adapter(model):
        assert not (folder / "instruction_adapter.json").exists()
        return
    said = json.loads((folder / "instruction_adapter.json").read_text(encoding="utf-8"))
    base = str(checkpoints(kind)) if kind == "merged adapter" else tiny
    assert (said["base"], said["lora"]) == (base, kind == "adapter")
    plain = load_instruction_model(tiny)
    for loaded in (model, load_instruction_model(folder)):
        assert np.array_equal(loaded.encode(INPUTS[1:]), plain.encode(INPUTS[1:]))


def test_an_adapter_in_memory_keeps_its_own_base(few_records, mine, tiny, tmp_path):
    model = train(few_records, tiny, tmp_path / "a", update="queries", lora_r=4, **QUICK)
    trained = train(mine, model, tmp_path / "b", **QUICK)
    assert json.loads((tmp_path / "b" / "instruction_adapter.json").read_text(encoding="utf-8"))["base"] == tiny
    assert np.allclose(embeddings(load_instruction_model(tmp_path / "b")), embeddings(trained), atol=1e-6)


def test_a_lora_keeps_its_own_base(checkpoints, mine, tiny, tmp_path):
    train(mine, checkpoints("with a LoRA"), tmp_path / "m", **QUICK)
    config = json.loads((tmp_path / "m" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == tiny


def test_saved_again_it_is_the_same_model(further, tmp_path):
    _, folder, _ = further
    model = load_instruction_model(folder)
    model.save_pretrained(str(tmp_path / "a"), create_model_card=False)
    again = load_instruction_model(tmp_path / "a")
    again.save_pretrained(str(tmp_path / "b"), create_model_card=False)
    for loaded in (again, load_instruction_model(tmp_path / "b")):
        assert np.allclose(embeddings(loaded), embeddings(model), atol=1e-6)


@pytest.mark.parametrize(
    ("first", "settings", "message"),
    [
        ("separate", {"encoders": "shared"}, "the model has encoders='separate' already"),
        ("separate", {"lora_r": 4}, "a LoRA is added to a model with one encoder"),
        ("with a LoRA", {"lora_r": 8}, "the model has lora_r=4 already"),
        ("adapter", {"lora_r": 0}, "the model has lora_r=4 already"),
        ("adapter", {"update": "both"}, "the model is an adapter, and its base stays as it is"),
        ("adapter", {"encoders": "separate"}, "the model is an adapter, and its base stays as it is"),
        ("adapter of a copy", {"lora_r": 4}, "the model has lora_r=0 already"),
        (
            "adapter of a copy",
            {"update": "queries", "passage_embeddings": "v.npy"},
            "the model is an adapter, .* leave passage_embeddings out",
        ),
    ],
)
def test_it_does_not_become_something_else(checkpoints, mine, tmp_path, first, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(mine, checkpoints(first), tmp_path / "m", **settings)


# An adapter beside a model of several encoders


@pytest.mark.parametrize("lora_r", [4, 0])
@pytest.mark.parametrize("kind", ["separate"])
def test_an_adapter_leaves_a_base_of_two_encoders_as_it_is(checkpoints, mine, tmp_path, kind, lora_r):
    base = load_instruction_model(checkpoints(kind))
    trained = train(mine, checkpoints(kind), tmp_path / "m", update="queries", lora_r=lora_r, **QUICK)
    loaded = load_instruction_model(tmp_path / "m")
    assert np.allclose(embeddings(loaded), embeddings(trained), atol=1e-6)
    for model in (trained, loaded):
        assert is_adapter(model)
        assert np.array_equal(model.encode_query(["sky", {"query": "sky"}]), base.encode_query(["sky", {"query": "sky"}]))
        assert np.array_equal(model.encode_document(["a passage"]), base.encode_document(["a passage"]))
        assert not np.allclose(model.encode(INPUTS[0]), base.encode(INPUTS[0]), atol=1e-3)
    assert np.array_equal(embeddings(detach_adapter(loaded)), embeddings(base))


def test_such_an_adapter_is_trained_further_and_names_the_same_base(checkpoints, few_records, mine, tmp_path):
    base = checkpoints("separate")
    train(few_records, base, tmp_path / "a", update="queries", lora_r=4, **QUICK)
    trained = train(mine, tmp_path / "a", tmp_path / "b", **QUICK)
    assert json.loads((tmp_path / "b" / "instruction_adapter.json").read_text(encoding="utf-8"))["base"] == str(base)
    loaded = load_instruction_model(tmp_path / "b")
    assert has_lora(encoder_of(loaded)[0])
    assert np.allclose(embeddings(loaded), embeddings(trained), atol=1e-6)
    assert np.array_equal(loaded.encode(["a passage"]), load_instruction_model(base).encode(["a passage"]))
