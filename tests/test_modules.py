"""Every kind of model: what it is called, its copies, and what the host makes of its folder."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.modules import (
    InstructionQueryAttention,
    InstructionRouter,
    InstructionTransformer,
    PackedTransformer,
    adapter_tower,
    add_lora,
    copy_tower,
    detach_adapter,
    encoder_of,
    encoders_of,
    is_adapter,
    save_adapter,
    two_towers,
)
from sentence_transformers_inf.modules.loading import take_instructions

TOLD = {"instruction": "For young children, in simple words.", "query": "why is the sky blue"}
INPUTS = [TOLD, "a passage", {"instruction": "", "query": "sky"}, "another passage of more words than the first"]
JOINED = "why is the sky blue For young children, in simple words."


def adapter(base, interaction="concatenation", lora_r=0):
    tower = torch.nn.Sequential(*copy_tower(base, share=lora_r > 0))
    take_instructions(tower, interaction=interaction)
    if lora_r:
        add_lora(tower[0], lora_r)
    return adapter_tower(base, list(tower))


ATTENDING = {PackedTransformer, InstructionQueryAttention}
KINDS = {
    "concatenation": (load_instruction_model, {InstructionTransformer}),
    "paper": (lambda name: load_instruction_model(name, interaction="paper"), ATTENDING),
    "gated": (lambda name: load_instruction_model(name, interaction="gated"), ATTENDING),
    "separate": (lambda name: two_towers(load_instruction_model(name)), {InstructionRouter, InstructionTransformer}),
    "separate, gated": (
        lambda name: two_towers(load_instruction_model(name, interaction="gated")),
        {InstructionRouter, *ATTENDING},
    ),
    "copy": (lambda name: adapter(load_instruction_model(name)), {InstructionRouter, InstructionTransformer}),
    "lora": (lambda name: adapter(load_instruction_model(name), lora_r=4), {InstructionRouter, InstructionTransformer}),
    "gated lora": (
        lambda name: adapter(load_instruction_model(name), "gated", lora_r=4),
        {InstructionRouter, InstructionTransformer, *ATTENDING},
    ),
}


def made(kind, name):
    """A model of a kind, all its weights a little off, so that no two encoders are the same."""
    torch.manual_seed(0)
    model = KINDS[kind][0](name).eval()
    with torch.no_grad():
        for transformer in encoders_of(model):
            for weight in transformer.parameters():
                if weight.requires_grad:
                    weight.add_(0.02 * torch.randn_like(weight))
        for module in model.modules():
            if isinstance(module, InstructionQueryAttention) and module.kind == "gated":
                torch.nn.init.normal_(module.gate, std=0.05)
    return model


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tiny):
    """(name, model, its own classes) of each kind."""
    return request.param, made(request.param, tiny), KINDS[request.param][1]


def classes(model):
    ours = (InstructionTransformer, PackedTransformer, InstructionQueryAttention, InstructionRouter)
    return {next(cls for cls in ours if type(module) is cls) for module in model.modules() if type(module) in ours}


def test_repr_names_the_class_that_a_module_has(kind):
    _, model, own = kind
    assert classes(model) == own
    names = {InstructionTransformer: "InstructionTransformer(", PackedTransformer: "PackedTransformer(",
             InstructionQueryAttention: "InstructionQueryAttention(", InstructionRouter: "InstructionRouter("}  # fmt: skip
    assert {cls for cls, name in names.items() if name in repr(model)} == own


def test_a_folder_names_the_host_s_classes_alone(kind, tmp_path):
    _, model, _ = kind
    model.save_pretrained(str(tmp_path), create_model_card=False)
    types = [entry["type"] for entry in json.loads((tmp_path / "modules.json").read_text(encoding="utf-8"))]
    for path in tmp_path.rglob("router_config.json"):
        types += json.loads(path.read_text(encoding="utf-8"))["types"].values()
    assert types
    assert all(name.startswith("sentence_transformers.") for name in types)


def test_what_was_pickled_is_the_same_model(kind):
    name, model, own = kind
    again = pickle.loads(pickle.dumps(model))
    assert classes(again) == own
    assert np.array_equal(again.encode(INPUTS), model.encode(INPUTS))
    assert is_adapter(again) == (name in ("copy", "lora", "gated lora"))


def test_a_copy_is_the_same_model_and_independent(kind):
    _, model, own = kind
    before = model.encode(INPUTS)
    clone = copy.deepcopy(model)
    assert classes(clone) == own
    assert np.array_equal(clone.encode(INPUTS), before)
    with torch.no_grad():
        for weight in clone.parameters():
            weight.mul_(1.5)
    encoder_of(clone)[0].template = "{instruction} {query}"
    assert np.array_equal(model.encode(INPUTS), before)
    assert encoder_of(model)[0].template == "{query} {instruction}"


class Extended(InstructionTransformer):
    """As somebody else may write it."""


def test_a_class_that_extends_ours_is_copied_and_unpickled_as_itself(tiny):
    extended = Extended(tiny)
    for again in (copy.deepcopy(extended), pickle.loads(pickle.dumps(extended))):
        assert type(again) is Extended
        assert again.template == extended.template


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_base_of_a_copied_adapter_is_the_copy_s(tiny, duplicate):
    model = made("copy", tiny)
    base = detach_adapter(duplicate(model))
    assert np.array_equal(base.encode(["a passage"]), model.encode(["a passage"]))
    assert base is not detach_adapter(model)


def test_the_base_of_a_copied_adapter_is_in_memory_once(tiny):
    clone = copy.deepcopy(made("copy", tiny))
    held = {weight.data_ptr() for weight in clone.parameters()}
    assert {weight.data_ptr() for weight in detach_adapter(clone).parameters()} <= held


def test_saved_and_loaded_it_encodes_as_before(kind, tmp_path):
    name, model, _ = kind
    model.save_pretrained(str(tmp_path), create_model_card=False)
    loaded = load_instruction_model(tmp_path)
    assert np.allclose(loaded.encode(INPUTS), model.encode(INPUTS), atol=1e-6)
    for encode in ("encode_query", "encode_document"):
        assert np.allclose(getattr(loaded, encode)(INPUTS[1::2]), getattr(model, encode)(INPUTS[1::2]), atol=1e-6), name


def test_another_process_encodes_as_this_one(tiny):
    model = made("gated lora", tiny)
    inputs = [{**TOLD, "query": f"{TOLD['query']} {number}"} for number in range(6)] + INPUTS
    pool = model.start_multi_process_pool(["cpu"])
    try:
        there = model.encode(inputs, pool=pool, chunk_size=4)
    finally:
        model.stop_multi_process_pool(pool)
    assert np.allclose(there, model.encode(inputs), atol=1e-6)


ELSEWHERE = """
import sys
class Refuse:
    def find_spec(self, name, *args):
        if name.split(".")[0] in ("sentence_transformers_inf", "dataset_builder"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np
from pathlib import Path
from sentence_transformers import SentenceTransformer
for folder, joined, route in zip(sys.argv[2::3], sys.argv[3::3], sys.argv[4::3]):
    model = SentenceTransformer(folder)
    told = model.encode([joined], **({"task": route} if route else {}))
    np.save(Path(folder, "there.npy"), np.concatenate([told, model.encode([sys.argv[1]])]))
"""


ROUTES = {"copy": "instructed", "lora": "instructed", "gated lora": "instructed",
          "separate": "query", "separate, gated": "query"}  # fmt: skip


def test_folders_load_where_this_package_is_not_installed(tiny, tmp_path):
    """And encode what needs nothing of it: passages, joined strings, and, of attention, bare queries."""
    models, told, words = {}, {}, []
    for name in KINDS:
        models[name] = made(name, tiny)
        attends = any(isinstance(module, InstructionQueryAttention) for module in models[name].modules())
        models[name].save_pretrained(str(tmp_path / name), create_model_card=False)
        words += [tmp_path / name, TOLD["query"] if attends else JOINED, ROUTES.get(name, "")]
        if name != "gated lora":  # bare queries are its base's
            told[name] = models[name].encode_query(TOLD["query"] if attends else TOLD)
    for name in ("copy", "lora"):  # what the adapter alone is
        alone = f"{name} alone"
        save_adapter(models[name], tmp_path / alone, tiny)
        words += [tmp_path / alone, JOINED, ""]
        told[alone] = told[name]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", ELSEWHERE, "a passage", *map(str, words)], check=True, env=environment)
    for name, expected in told.items():
        assert np.allclose(np.load(tmp_path / name / "there.npy")[0], expected, atol=1e-6), name
    for name, model in models.items():
        assert np.array_equal(np.load(tmp_path / name / "there.npy")[1], model.encode("a passage")), name
