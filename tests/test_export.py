"""Exports embed as the model did, where this package cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.export import export_model
from sentence_transformers_inf.export.int8 import even_out, quantize_graph
from sentence_transformers_inf.export.parity import check_parity, measure_parity, parity_inputs
from sentence_transformers_inf.modules import adapter_tower, add_lora, copy_tower, encoder_of, save_adapter, two_towers
from sentence_transformers_inf.modules.loading import BUNDLED_ADAPTER
from tests.commands import call, error_line
from tests.hub import WITHOUT_PACKAGE

FORMS = ("two encoders", "lora", "copy")
GRAPHS = ("onnx", "openvino")
TOLD = {"query": "why is the sky blue", "instruction": "For a ten-year-old."}
JOINED = "why is the sky blue For a ten-year-old."
PASSAGE = "Sunlight is scattered by the air."
MIXED = [
    TOLD, "why is the sky blue", {"query": "how do vaccines work", "instruction": ""},
    {**TOLD, "exclude": "anything on the sea"}, {"query": "tea", "instruction": "Nothing about prices, please."},
]  # fmt: skip
ALONE = (
    WITHOUT_PACKAGE
    + """
import contextlib, io, json, os, re, sys
from pathlib import Path

from sentence_transformers import SentenceTransformer

found = {}
for folder in sys.argv[1:]:
    os.chdir(folder)
    settings = json.loads(Path("serving.json").read_text())
    names = [] if settings["pooling_in_graph"] else ["query", "document"]
    texts = [settings["template"].format(query="why is the sky blue", instruction="For a ten-year-old.")]
    texts += ["Sunlight is scattered by the air."]
    found[folder] = {
        name: SentenceTransformer(name, device="cpu").encode([text]).tolist() for name, text in zip(names, texts)
    }
    for block in re.findall(r"```python\\n(.*?)```", Path("README.md").read_text(), flags=re.S):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                exec(block, {})
            except ModuleNotFoundError as error:
                assert "sentence_transformers_inf" in str(error) or "langchain" in str(error)
                continue
        found[folder]["score"] = float(re.search(r"-?[\\d.]+", out.getvalue().replace("tensor", ""))[0])
print(json.dumps(found))
"""
)


def noisy(modules, scale=0.05):
    with torch.no_grad():
        for parameter in modules.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def make(form, base, folder):
    """A checkpoint or adapter whose instructed queries differ from the base's."""
    torch.manual_seed(0)
    model = load_instruction_model(base).eval()
    if form == "two encoders":
        model = two_towers(model)
        noisy(encoder_of(model))
        model.save_pretrained(str(folder))
        return folder
    model = adapter_tower(model, copy_tower(model, share=form == "lora")).eval()
    if form == "lora":
        add_lora(encoder_of(model)[0], 4)
        for name, parameter in encoder_of(model).named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    else:
        noisy(encoder_of(model))
    encoder_of(model)[0].find_exclusions = True
    save_adapter(model, folder, str(base))
    return folder


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {form: make(form, tiny, root / form.replace(" ", "-")) for form in FORMS}


@pytest.fixture(scope="module")
def qwen(base, tmp_path_factory):
    """The folder of a random two-layer Qwen3 with last-token pooling."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3Model(config).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    modules = [Transformer(str(folder / "backbone"), max_seq_length=128), Pooling(32, pooling_mode="lasttoken"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "model"))
    return folder / "model"


def run_alone(*folders):
    """What plain Sentence Transformers and the README's commands make of exports."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, folders)], capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_merged_folders_of_every_form_embed_as_the_model_where_this_package_is_not(models, tmp_path):
    folders = {form: tmp_path / form.replace(" ", "-") for form in FORMS}
    for form, folder in folders.items():
        settings = export_model(models[form], folder, "merged")
        assert settings["parity"]["texts"] == 64
        assert settings["parity"]["top_10_overlap"] > 0.999
        assert json.loads((folder / "serving.json").read_text()) == settings
    found = run_alone(*folders.values())
    for form, folder in folders.items():
        model, alone = load_instruction_model(models[form]), found[str(folder)]
        ours, passage = model.encode_query([{**TOLD, "exclude": None}]), model.encode_document([PASSAGE])
        np.testing.assert_allclose(alone["query"], ours, atol=1e-5)
        np.testing.assert_allclose(alone["document"], passage, atol=1e-5)
        assert alone["score"] == pytest.approx((ours @ passage.T).item(), abs=1e-4)
    fingerprint = json.loads((models["lora"] / "instruction_adapter.json").read_text())["fingerprints"]["float32"]
    assert json.loads((folders["lora"] / "serving.json").read_text())["base"]["fingerprint"] == fingerprint


def check_graph(model, folder, backend):
    """An export that is loaded with a backend takes what the model takes."""
    model, exported = load_instruction_model(model), load_instruction_model(folder, backend=backend)
    np.testing.assert_allclose(exported.encode_query(MIXED), model.encode_query(MIXED), atol=1e-4)
    np.testing.assert_allclose(exported.encode_document([PASSAGE]), model.encode_document([PASSAGE]), atol=1e-4)
    assert exported.similarity_fn_name == model.similarity_fn_name


@pytest.mark.slow
def test_graphs_of_every_form_take_what_the_model_takes(models, tmp_path):
    folders = {(form, format): tmp_path / f"{form[:3]}-{format}" for form in FORMS for format in GRAPHS}
    for (form, format), folder in folders.items():
        export_model(models[form], folder, format)
        check_graph(models[form], folder, format)
    found = run_alone(*folders.values())
    for (form, _), folder in folders.items():
        model = load_instruction_model(models[form])
        score = model.encode_query({**TOLD, "exclude": None}) @ model.encode_document(PASSAGE)
        assert found[str(folder)]["score"] == pytest.approx(float(score), abs=1e-4)


def test_vllm_gets_a_lora_whose_layers_are_named_as_in_its_class(qwen, tmp_path):
    lora = make("lora", qwen, tmp_path / "lora")
    settings = export_model(lora, tmp_path / "export", "vllm")
    assert settings["parity"]["largest_difference"] < 1e-5
    names = load_file(tmp_path / "export/query/adapter_model.safetensors")
    assert names
    assert all(name.startswith("base_model.model.model.layers.") for name in names)
    config = json.loads((tmp_path / "export/query/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(qwen))
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    readme = (tmp_path / "export/README.md").read_text()
    assert f"vllm serve {qwen} --runner pooling" in readme
    assert "--enable-lora --max-lora-rank 8 --lora-modules instructed=./query" in readme


@pytest.mark.parametrize("form", ["two encoders", "copy"])
def test_vllm_gets_whole_folders_where_there_is_no_lora(qwen, form, tmp_path):
    export_model(make(form, qwen, tmp_path / "model"), tmp_path / "export", "vllm")
    assert (tmp_path / "export/query/model.safetensors").is_file()
    assert "vllm serve ./query --runner pooling" in (tmp_path / "export/README.md").read_text()
    assert (tmp_path / "export/document/model.safetensors").is_file()


def test_layers_that_are_evened_out_for_int8_give_the_same_embeddings(tiny):
    model = load_instruction_model(tiny)
    with torch.no_grad():  # a channel that is always large, as trained models have them
        model[0].model.encoder.layer[0].output.LayerNorm.weight[3] = 40.0
    even = even_out(model)
    texts = ["", "a text", " ".join(["and one that is longer"] * 30)]
    assert np.allclose(even.encode(texts), model.encode(texts), rtol=0, atol=1e-5)
    query = even[0].model.encoder.layer[1].attention.self.query
    plain = model[0].model.encoder.layer[1].attention.self.query
    assert query.weight[:, 3].abs().max() > 3 * plain.weight[:, 3].abs().max()  # the weight is large, its input is not


def test_no_weight_in_int8_is_beyond_seven_bits(tmp_path):
    """Of columns whose largest and smallest value, rounded apart, are 129 or 130 steps away from each other."""
    columns = [(-0.34630033, 0.77588814), (-1.7708695, 2.5466788), (-1.5939753, 0.660487), (-1.4478203, 1.3389616)]
    weights = np.array(columns, dtype=np.float32).T
    node = onnx.helper.make_node("MatMul", ["x", "weights"], ["y"])
    given, taken = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, size]) for name, size in (("x", 2), ("y", 4))
    )
    graph = onnx.helper.make_graph([node], "product", [given], [taken], [onnx.numpy_helper.from_array(weights, "weights")])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "float.onnx")
    quantize_graph(tmp_path / "float.onnx", tmp_path / "int8.onnx")
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    found, zero, scale = (stored[f"weights_{name}"] for name in ("quantized", "zero_point", "scale"))
    assert found.dtype == np.int8
    assert np.abs(found.astype(int)).max() == 64
    assert np.abs((found.astype(int) - zero) * scale - weights).max() < 1.1 * scale.max()


@pytest.mark.slow
def test_int8_of_the_shipped_adapter_finds_the_same_passages(tmp_path):
    settings = export_model(BUNDLED_ADAPTER, tmp_path / "export", "onnx", quantize=True)
    assert settings["parity"]["top_10_overlap"] >= 0.95
    graphs = list((tmp_path / "export").rglob("*.onnx"))
    assert len(graphs) == 2
    assert max(path.stat().st_size for path in graphs) < 65 * 2**20  # of 87 in float32
    for path in graphs:  # two products of a byte and a weight fit into 16 bits, which is all that AVX2 alone has for them
        stored = onnx.load(path).graph.initializer
        weights = [onnx.numpy_helper.to_array(each) for each in stored if each.data_type == onnx.TensorProto.INT8]
        assert sum(weight.size for weight in weights) > 10_000_000
        assert max(np.abs(weight.astype(int)).max() for weight in weights) * 255 * 2 < 2**15


@pytest.mark.slow
def test_one_encoder_is_one_folder(tiny, tmp_path):
    settings = export_model(tiny, tmp_path / "export", "onnx")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["README.md", "query", "serving.json"]
    assert set(settings["encoders"].values()) == {"query"}
    assert (settings["pooling"], settings["normalize"], settings["dimensions"]) == ("mean", True, 32)
    check_graph(tiny, tmp_path / "export", "onnx")


def test_an_export_beyond_its_bound_is_refused():
    fine = {"texts": 64, "largest_difference": 2e-6, "top_10_overlap": 1.0}
    check_parity(fine, "merged", False)
    check_parity(fine | {"largest_difference": 0.02}, "onnx", True)
    with pytest.raises(ValueError, match=r"differs from the model by 0\.0002, more than 1e-04: nothing was written"):
        check_parity(fine | {"largest_difference": 2e-4}, "onnx", False)
    with pytest.raises(ValueError, match=r"finds 0\.900 of the model's first ten passages.*leave --quantize out"):
        check_parity(fine | {"top_10_overlap": 0.9}, "onnx", True)
    with pytest.raises(ValueError, match="differs from the model by nan"):
        check_parity(fine | {"largest_difference": float("nan")}, "merged", False)


def test_parity_sees_a_wrong_export(tiny):
    inputs, passages = parity_inputs()
    assert sum(map(len, inputs.values())) == 64
    numbers = {text: number for number, text in enumerate(passages)}

    def one_hot(kind, texts):
        rows = np.ones((len(texts), len(passages)), dtype=np.float32)
        for row, text in enumerate(texts):
            rows[row, numbers.get(str(text), row)] += 5
        return rows

    assert measure_parity(one_hot, one_hot) == {"texts": 64, "largest_difference": 0.0, "top_10_overlap": 1.0}
    wrong = measure_parity(one_hot, lambda kind, texts: one_hot(kind, texts) * (1 + (kind == "passages")))
    assert wrong["largest_difference"] > 0.01
    reverse = measure_parity(one_hot, lambda kind, texts: one_hot(kind, texts)[:, :: 1 if kind == "passages" else -1])
    assert reverse["top_10_overlap"] < 0.95


def test_what_cannot_be_exported_is_one_line(models, tiny, tmp_path, monkeypatch):
    def refusal(*words):
        status, _, err = call("inf-embed", "export", *words)
        assert status == 2
        return error_line(err)

    there = tmp_path / "there"
    there.mkdir()
    (there / "thesis.txt").write_text("mine")
    new = tmp_path / "new"
    assert "no such model folder" in refusal("./nowhere", "--format", "merged", "--output", new)
    assert "unknown format 'gguf'; there are merged, onnx" in refusal(tiny, "--format", "gguf", "--output", new)
    assert "exists: name another --output" in refusal(tiny, "--format", "merged", "--output", there)
    assert "holds something that is no export" in refusal(tiny, "--format", "merged", "--output", there, "--overwrite")
    assert "leave it out" in refusal(tiny, "--format", "merged", "--output", new, "--quantize")
    assert "--format merged" in refusal(models["lora"], "--format", "vllm", "--output", new)
    below = there / "thesis.txt/export"
    assert "thesis.txt is a file" in refusal(tiny, "--format", "merged", "--output", below)
    for module, format in (("onnxruntime", "onnx"), ("onnxscript", "onnx"), ("openvino", "openvino")):
        with monkeypatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda name, missing=module: None if name == missing else 1)
            line = refusal(tiny, "--format", format, "--output", new)
            assert f"pip install 'sentence-transformers-inf[{format}]'" in line
    gated = load_instruction_model(tiny, interaction="gated")
    gated.save_pretrained(str(tmp_path / "gated"))
    assert "attention" in refusal(tmp_path / "gated", "--format", "merged", "--output", new)
    assert not new.exists()
    assert [path.name for path in there.iterdir()] == ["thesis.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gated", "there"]


def test_an_earlier_export_is_replaced_when_asked_and_only_by_a_good_one(tiny, tmp_path, monkeypatch):
    words = ("inf-embed", "export", tiny, "--format", "merged", "--output", tmp_path / "export")
    status, out, _ = call(*words)
    assert (status, "64 texts against the model: largest difference" in out) == (0, True)
    before = (tmp_path / "export/serving.json").read_bytes()
    monkeypatch.setattr("sentence_transformers_inf.export.parity.OVERLAP", 1.1)
    status, _, err = call(*words, "--overwrite")
    assert (status, "nothing was written" in error_line(err)) == (2, True)
    assert (tmp_path / "export/serving.json").read_bytes() == before
    monkeypatch.undo()
    (tmp_path / "export/query/old").write_text("old")
    assert call(*words, "--overwrite")[0] == 0
    assert not (tmp_path / "export/query/old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_backend_wants_an_export_in_its_format(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no serving\.json here: make an export"):
        load_instruction_model(tiny, backend="onnx")
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        load_instruction_model(tiny, backend="tpu")
    with pytest.raises(ValueError, match="takes a folder"):
        load_instruction_model(backend="onnx")
    Path(tmp_path, "serving.json").write_text(json.dumps({"format": "merged"}))
    with pytest.raises(ValueError, match=r"was exported with --format merged: backend='onnx' needs --format onnx"):
        load_instruction_model(tmp_path, backend="onnx")
    Path(tmp_path, "serving.json").write_text(json.dumps({"format": "onnx"}))
    with pytest.raises(ValueError, match=r"serving\.json: there is no 'encoders' in it"):
        load_instruction_model(tmp_path, backend="onnx")
    Path(tmp_path, "serving.json").write_text("{")
    with pytest.raises(ValueError, match=r"serving\.json: damaged"):
        load_instruction_model(tmp_path, backend="onnx")
