"""Adapters: instructed queries obey, and everything else of the base model stays as it was, bit for bit."""

import copy
import json
import logging
import os
import re
import subprocess
import sys
import threading

import faiss
import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from qdrant_client import QdrantClient, models
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, BertTokenizerFast

from sentence_transformers_inf import load_instruction_model, load_records
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.losses import CachedInstructionContrastiveLoss, InstructionContrastiveLoss
from sentence_transformers_inf.modules import add_lora, attach_adapter, detach_adapter, encoder_of, encoders_of
from sentence_transformers_inf.modules.lora import FusedLinear, fuse_lora
from sentence_transformers_inf.passages import distinct_passages, encode_passages, passage_rows, read_passage_embeddings
from sentence_transformers_inf.records import PASSAGE_COLUMNS, training_dataset
from sentence_transformers_inf.training import train
from tests.commands import run_commands

RECIPE = {"update": "queries", "batch_size": 4, "epochs": 1, "evaluations": 1, "warmup": 0.0, "show_progress": False}
FORMS = {"lora": {}, "copy": {"lora_r": 0}, "merged": {"merge_base": True}}
LOADED: dict = {}
TOLD = {"instruction": "For young children, in simple words.", "query": "why is the sky blue"}
JOINED = "why is the sky blue [SEP] For young children, in simple words."
INPUT = st.one_of(
    st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=40),
    st.fixed_dictionaries(
        {"query": st.text("abc xyz", max_size=30), "instruction": st.one_of(st.none(), st.text("mno pqr", max_size=60))}
    ),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    load_records("mini", "train").select(range(8)).to_json(folder / "train.jsonl")
    load_records("mini", "validation").select(range(4)).to_json(folder / "validation.jsonl")
    return folder


@pytest.fixture(scope="module")
def plain(base):
    return SentenceTransformer(base).eval()


@pytest.fixture(scope="module", params=FORMS)
def adapted(request, base, corpus, tmp_path_factory):
    """(form, folder, the model as trained) of each form in which an adapter is saved."""
    folder = tmp_path_factory.mktemp(request.param) / "adapter"
    return request.param, folder, train(corpus, base, folder, **RECIPE, **FORMS[request.param]).eval()


@pytest.fixture(scope="module")
def lora(base, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "adapter"
    train(corpus, base, folder, **RECIPE)
    return folder


def is_told(item):
    return isinstance(item, dict) and bool((item["instruction"] or "").strip())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(inputs=st.lists(INPUT, min_size=1, max_size=6))
def test_all_but_instructed_queries_has_the_base_s_embedding_bit_for_bit(plain, adapted, inputs):
    _, folder, trained = adapted
    untold = [row for row, item in enumerate(inputs) if not is_told(item)]
    texts = [item if isinstance(item, str) else item["query"] for item in (inputs[row] for row in untold)]
    if folder not in LOADED:
        LOADED[folder] = load_instruction_model(folder)
    for model in (trained, LOADED[folder]):
        embeddings = model.encode(inputs)
        if texts:
            assert np.array_equal(embeddings[untold], plain.encode(texts))
            assert np.array_equal(model.encode_query(texts), plain.encode(texts))
            assert np.array_equal(model.encode_document(texts), plain.encode(texts))


def test_it_saves_and_loads_and_needs_no_more_than_it_says(plain, adapted, base):
    form, folder, trained = adapted
    loaded = load_instruction_model(folder)
    told = trained.encode([TOLD, "a passage"])
    assert np.allclose(loaded.encode([TOLD, "a passage"]), told, atol=1e-6)
    assert not np.allclose(told[0], plain.encode(JOINED), atol=1e-3)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    assert (size < 8) == (form == "lora")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert ("bit for bit" in card) == (form != "merged")
    assert ("attach_adapter" in card) == (form != "merged")
    # A machine without this package encodes joined strings.
    code = (
        "import sys, numpy as np; sys.modules['sentence_transformers_inf'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1])\n"
        "np.save(sys.argv[2], model.encode([sys.argv[3]], **({'task': 'instructed'} if len(sys.argv) > 4 else {})))"
    )
    file = folder.parent / "there.npy"
    arguments = [folder, file, JOINED, *(["merged"] if form == "merged" else [])]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)
    assert np.allclose(np.load(file)[0], told[0], atol=1e-6)


def test_the_best_checkpoint_is_what_is_saved(corpus, base, tmp_path, caplog):
    """A LoRA beside its base is loaded again from the trainer's checkpoint."""
    with caplog.at_level(logging.ERROR):
        # In bfloat16 the trainer would measure in it, and what is loaded in float32.
        options = {**RECIPE, "epochs": 2, "evaluations": 2, "learning_rate": 0.02, "bf16": False}
        model = train(corpus, base, tmp_path / "m", **options).eval()
    assert "Could not load the best model" not in caplog.text
    log = tmp_path / "m" / "eval" / "instruction_following_evaluation_validation_results.csv"
    scores = [float(line.split(",")[2]) for line in log.read_text().splitlines()[1:]]
    assert len(scores) == 2
    assert measure(model, load_records(corpus, "validation")).means()["p_mrr"] == pytest.approx(max(scores), abs=1e-6)


def test_an_index_of_the_plain_model_is_searched_with_instructions(base, lora, tmp_path):
    """Through Qdrant, over vectors that another process made without this package: the evaluator's pair accuracy."""
    records = load_records("mini", "test").select(range(24))
    passages = distinct_passages([records])
    (tmp_path / "passages.json").write_text(json.dumps(passages))
    code = (
        "import sys, json, numpy as np; sys.modules['sentence_transformers_inf'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        "np.save(sys.argv[3], SentenceTransformer(sys.argv[1]).encode(json.load(open(sys.argv[2]))))"
    )
    arguments = [base, tmp_path / "passages.json", tmp_path / "index.npy"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)
    vectors = np.load(tmp_path / "index.npy")
    client = QdrantClient(path=str(tmp_path / "qdrant"))
    client.create_collection("p", models.VectorParams(size=vectors.shape[1], distance=models.Distance.COSINE))
    client.upload_collection("p", vectors, ids=range(len(vectors)))

    model, rows = load_instruction_model(lora), passage_rows(records, passages)
    right = 0
    for record, (positive, negative, _) in zip(records, rows.tolist()):
        obeyed = []
        for instruction, first in (("instruction_positive", positive), ("instruction_negative", negative)):
            query = model.encode_query({"instruction": record[instruction], "query": record["query_positive"]})
            both = models.Filter(must=[models.HasIdCondition(has_id=[positive, negative])])
            found = client.query_points("p", query=query.tolist(), query_filter=both, limit=1).points
            obeyed.append(found[0].id == first)
        right += all(obeyed)
    client.close()
    result = measure(model, records)
    assert 100 * right / len(records) == pytest.approx(result.means()["pair_accuracy"])
    through_index = measure(model, records, passage_embeddings=vectors[rows.ravel()]).means()
    assert through_index == pytest.approx(result.means(), abs=1e-4)


def test_adapters_stand_side_by_side_on_one_base_and_come_off(base, lora, plain):
    one = load_instruction_model(base)
    first, second = attach_adapter(one, lora), attach_adapter(one, lora)
    with torch.no_grad():
        for name, weight in encoder_of(second).named_parameters():
            if "lora_B" in name:
                weight.neg_()
    told = [model.encode(TOLD) for model in (first, second, load_instruction_model(lora))]
    assert np.array_equal(told[0], told[2])
    assert not np.allclose(told[0], told[1], atol=1e-3)
    # Three models, one set of base weights.
    assert len({weight.data_ptr() for weight in one.parameters()}) == len(list(one.parameters()))
    shared = {weight.data_ptr() for weight in one.parameters()}
    for model in (first, second):
        assert shared <= {weight.data_ptr() for weight in model.parameters()}
        assert sum(w.numel() for w in model.parameters() if w.data_ptr() not in shared) < 2_000_000
    base_again = detach_adapter(first)
    assert np.array_equal(base_again.encode([JOINED, "a passage"]), plain.encode([JOINED, "a passage"]))
    with pytest.raises(ValueError, match="has no adapter"):
        detach_adapter(base_again)


def test_another_base_is_refused(base, lora, tmp_path):
    other = load_instruction_model(base)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    with pytest.raises(ValueError, match="other weights"):
        attach_adapter(other, lora)
    config = BertConfig(vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(tmp_path / "small")
    BertTokenizerFast.from_pretrained(base).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="384 dimensions, and this base model's have 32"):
        load_instruction_model(lora, base=tmp_path / "small")
    with pytest.raises(FileNotFoundError, match="there is no adapter here"):
        attach_adapter(other, base)
    with pytest.raises(ValueError, match="is no adapter"):
        load_instruction_model(base, base=base)


def test_encoding_finds_a_module_that_was_left_in_training(lora):
    model = load_instruction_model(lora).eval()
    expected = model.encode([TOLD, "a passage"])
    for encoder in encoders_of(model):
        dropout = next(module for module in encoder.model.modules() if isinstance(module, torch.nn.Dropout))
        dropout.p = 0.9
        dropout.train()
        assert np.array_equal(model.encode([TOLD, "a passage"]), expected)
        assert not dropout.training
    assert all(module.training for module in model.train().modules())


def test_what_a_loaded_lora_leaves_alone_is_the_base_s_own_module(lora):
    told, base = (encoder.model for encoder in encoders_of(load_instruction_model(lora)))
    own = set(told.modules()) - set(base.modules())
    kinds = {type(module).__name__ for module in own}
    assert kinds == {"BertModel", "BertEncoder", "ModuleList", "BertLayer", "BertIntermediate", "BertOutput", "FusedLinear"}
    fused = [module for module in own if isinstance(module, FusedLinear)]
    assert len(fused) == 2 * len(base.encoder.layer)
    assert all(layer.base_layer in set(base.modules()) for layer in fused)


def test_threads_do_not_disturb_each_other(lora, plain):
    model = load_instruction_model(lora)
    expected, wrong = (model.encode([TOLD]), plain.encode(["a passage"])), []

    def encode(inputs, embedding):
        for _ in range(20):
            if not np.array_equal(model.encode(inputs), embedding):
                wrong.append(inputs)

    threads = [threading.Thread(target=encode, args=case) for case in zip(([TOLD], ["a passage"]), expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_several_processes_encode_with_an_adapter(lora):
    model = load_instruction_model(lora)
    inputs = [TOLD, "a passage", "another", {"instruction": "", "query": "sky"}] * 3
    assert np.allclose(model.encode(inputs, device=["cpu", "cpu"], chunk_size=4), model.encode(inputs), atol=1e-6)


def test_passages_are_encoded_once(base, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("sentence_transformers_inf.passages.cached_assets_path", lambda *_, **__: tmp_path)
    monkeypatch.setattr("sentence_transformers_inf.passages._BLOCK", 8)
    model = load_instruction_model(base)
    passages = distinct_passages([load_records(corpus, "train")])
    encode, calls = model.encode_document, []

    def until_killed(texts, **kwargs):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(texts, **kwargs)

    monkeypatch.setattr(model, "encode_document", until_killed)
    with pytest.raises(KeyboardInterrupt):
        encode_passages(model, passages)
    vectors = encode_passages(model, passages)
    assert sum(calls) - 8 == len(passages)  # the block that was interrupted is the only one encoded again
    assert np.allclose(vectors, encode(passages), atol=1e-6)
    assert np.array_equal(encode_passages(model, passages), vectors)
    assert sum(calls) - 8 == len(passages)
    assert encode_passages(model, passages[:9]).shape == (9, 384)  # other passages, another file


@pytest.mark.parametrize("kind", [InstructionContrastiveLoss, CachedInstructionContrastiveLoss])
def test_passages_made_before_give_the_loss_and_gradients_of_encoding_them(model, few_records, kind):
    view = training_dataset(few_records)
    queries = [model.preprocess(view[column]) for column in view.column_names[:3]]
    texts = distinct_passages([few_records])
    rows = passage_rows(few_records, texts)
    vectors = model.encode(texts)
    fixed = torch.from_numpy(vectors[rows.flatten()])
    found = []
    for made in (True, False):
        model.zero_grad()
        options = {"passage_embeddings": vectors} if made else {}
        loss = kind(model, "multi_P_I_IQ", sampled_instructions=2, plain_weight=0.5, **options)
        columns = [dict(column) for column in queries]
        if made:
            value = loss(columns, torch.from_numpy(rows))
        else:
            score = loss._score

            def frozen(embeddings, batch, *rest, score=score):
                return score(embeddings.index_copy(0, batch.passage, fixed), batch, *rest)

            loss._score = frozen
            columns += [model.preprocess(view[column]) for column in PASSAGE_COLUMNS]
            value = loss(columns)
        value.backward()
        grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        found.append((value.item(), grads))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for name, gradient in found[0][1].items():
        assert torch.allclose(gradient, found[1][1][name], atol=1e-5), name


def test_labels_must_say_which_passages(model, few_records):
    queries = [model.preprocess(training_dataset(few_records)[column]) for column in ("instructed_query", "poisoned_query")]
    loss = InstructionContrastiveLoss(model, passage_embeddings=np.zeros((4, 384), dtype=np.float32))
    with pytest.raises(ValueError, match="need labels of shape B×2"):
        loss(queries)
    with pytest.raises(ValueError, match="anchor_weight"):
        InstructionContrastiveLoss(model, anchor_weight=1.0, passage_embeddings=np.zeros((4, 384), dtype=np.float32))


def test_a_small_model_learns_to_land_among_vectors_from_elsewhere(base, corpus, tmp_path):
    """Another model's space, of another dimension: queries, instructed and bare, find their passages there."""
    splits = [load_records(corpus, name) for name in ("train", "validation")]
    texts = distinct_passages(splits)
    turn = torch.linalg.qr(torch.randn(384, 384, generator=torch.Generator().manual_seed(0)))[0][:, :64].numpy()
    vectors = (SentenceTransformer(base).encode(texts) @ turn).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    options = {**RECIPE, "epochs": 16, "learning_rate": 1e-3, "frozen_layers": 0, "objective": "uni_P"}
    train(corpus, base, tmp_path / "m", passage_embeddings=tmp_path / "v.npy", **options)
    assert SentenceTransformer(str(tmp_path / "m")).get_embedding_dimension() == 64  # an ordinary model
    model, own = load_instruction_model(tmp_path / "m"), vectors[passage_rows(splits[0], texts).ravel()]
    means = measure(model, splits[0], passage_embeddings=own).means()
    assert means["ndcg_at_10"] > 60  # a random ranking of 24 passages: about 20
    assert means["plain_ndcg_at_10"] > 60


def test_vectors_are_found_by_their_text(tmp_path):
    texts, vectors = ["a", "b", "c"], np.arange(6, dtype=np.float32).reshape(3, 2)
    order = [2, 0, 1]
    shuffled = {"text": [texts[row] for row in order], "embedding": vectors[order].tolist()}
    Dataset.from_dict(shuffled).to_parquet(tmp_path / "v.parquet")
    assert np.array_equal(read_passage_embeddings(tmp_path / "v.parquet", texts), vectors)
    np.save(tmp_path / "v.npy", vectors)
    assert np.array_equal(read_passage_embeddings(tmp_path / "v.npy", texts), vectors)


def test_vectors_that_do_not_fit_are_refused(tmp_path):
    texts = ["a", "b"]
    np.save(tmp_path / "short.npy", np.zeros((1, 4), dtype=np.float32))
    np.save(tmp_path / "nan.npy", np.full((2, 4), np.nan, dtype=np.float32))
    Dataset.from_dict({"text": ["a"], "embedding": [[1.0]]}).to_parquet(tmp_path / "less.parquet")
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "none.parquet")
    for name, message in {"short.npy": "a row for each of the 2", "nan.npy": "not finite", "less.parquet": "passage 'b'",
                          "none.parquet": "'embedding' is missing"}.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_passage_embeddings(tmp_path / name, texts)
    with pytest.raises(FileNotFoundError):
        read_passage_embeddings(tmp_path / "no.npy", texts)


def test_the_command_line_searches_an_existing_index(base, lora, tmp_path, plain):
    texts = ["The sky is blue because air scatters blue light.", "Taxes are due in April.", "Vaccines train the body."]
    (tmp_path / "c.txt").write_text("\n".join(texts))
    vectors = plain.encode(texts)
    np.save(tmp_path / "i.npy", vectors)
    np.savez(tmp_path / "i.npz", vectors)
    index = faiss.IndexFlatIP(384)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "i.faiss"))
    np.save(tmp_path / "other.npy", vectors[:2])
    (tmp_path / "bad.faiss").write_text("no index")
    command = ["inf-embed", "search", lora, "--corpus", tmp_path / "c.txt", "--query", "why is the sky blue"]
    command += ["--instruction", "In simple words."]
    names = [None, "i.npy", "i.npz", "i.faiss", "other.npy", "bad.faiss", "none.npy"]
    done, printed = run_commands(
        {**os.environ, "COLUMNS": "160"}, *[[*command, *(["--index", tmp_path / name] if name else [])] for name in names]
    )
    assert [status for status, _ in done] == [0, 0, 0, 0, 2, 2, 2], printed[-2000:]
    tables = [re.findall(r"^│ .*", table, flags=re.M) for table in printed.split("In simple words.")[1:5]]
    assert len(tables[0]) == 3
    assert all(table == tables[0] for table in tables)
    for (_, err), message in zip(done[4:], ["an index of 3 passages in 384", "a FAISS index", "no such index"]):
        assert message in " ".join(err.split())


def test_settings_that_contradict_each_other_are_refused(corpus, tmp_path):
    for options, message in [
        ({"update": "passages"}, "unknown update 'passages'"),
        ({"update": "queries", "encoders": "separate"}, "leave encoders out"),
        ({"encoders": "two"}, "there are shared, instructed, separate"),
        ({"passage_embeddings": "v.npy"}, "use them with update='queries'"),
        ({"lora_r": -1}, "lora_r must not be negative"),
        ({"lora_r": 4, "base_weight": 0.2}, "base_weight"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(corpus, output=tmp_path / "m", **options)


def with_lora(**options):
    """Two layers with a LoRA of PEFT's on each, its weights anything."""
    torch.manual_seed(0)
    stack = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6))
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0", "1"], **options)
    model = inject_adapter_in_model(config, stack)
    for layer in model:
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_fused_lora_is_peft_s_in_values_and_gradients(dtype):
    """On, switched off, merged, under autocast and without gradients; in bfloat16 up to its rounding."""
    model = with_lora().to(dtype)
    fused = copy.deepcopy(model)
    fuse_lora(fused)
    assert [type(layer) for layer in fused] == [FusedLinear, FusedLinear]
    x = torch.randn(2, 5, 6, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(copy.deepcopy(model).float()(x.float()), copy.deepcopy(fused).float()(x.float()))
    states = {
        "plain": lambda stack: None,
        "off": lambda stack: [layer.enable_adapters(False) for layer in stack],
        "on": lambda stack: [layer.enable_adapters(True) for layer in stack],
        "merged": lambda stack: [layer.merge() for layer in stack],
    }
    tolerance = {"rtol": 0, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.1}
    seen = {}
    for state, change in states.items():
        gradients = []
        for each in (model, fused):
            change(each)
            learned = [x, *(p for p in each.parameters() if p.requires_grad)]
            value = each(x)
            gradients.append(torch.autograd.grad(value.square().sum(), learned, allow_unused=True))
            seen.setdefault(state, []).append(value)
        assert torch.allclose(*seen[state], **tolerance), state
        for tokens in (x, x[:1, :2]):  # the weights are summed for ten tokens, not for two
            before = [parameter.clone() for parameter in fused.parameters()]
            with torch.no_grad():
                assert torch.allclose(model(tokens), fused(tokens), **tolerance), state
            assert all(torch.equal(*pair) for pair in zip(before, fused.parameters()))
        assert sum(gradient is not None for gradient in gradients[1]) == {"off": 1, "merged": 1}.get(state, 5)
        for theirs, ours in zip(*gradients, strict=True):
            assert (theirs is None) == (ours is None)
            if ours is not None:
                assert torch.allclose(theirs, ours, rtol=tolerance["rtol"], atol=100 * tolerance["atol"]), state
    assert not torch.allclose(seen["plain"][1], seen["off"][1], atol=0.1)
    assert [type(layer.get_base_layer()) for layer in fused] == [torch.nn.Linear, torch.nn.Linear]


def test_a_fused_lora_keeps_the_names_of_peft_s_weights():
    model, other = with_lora(), with_lora()
    fuse_lora(other)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == [name for name, parameter in other.named_parameters() if parameter.requires_grad]
    torch.nn.init.normal_(model[0].lora_A["default"].weight)
    for source, target in ((model, other), (other, with_lora())):
        target.load_state_dict(source.state_dict(), strict=True)
        assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())
    wrong = {name.replace("lora_A", "lora_C"): value for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*0.lora_A.default.weight.*Unexpected.*0.lora_C.default.weight"):
        other.load_state_dict(wrong)


@pytest.mark.parametrize("how", ["dropout", "DoRA", "bias", "two adapters", "half", "off"])
def test_a_lora_that_is_not_a_plain_one_stays_peft_s(how):
    options = {"dropout": {"lora_dropout": 0.5}, "DoRA": {"use_dora": True}, "bias": {"lora_bias": True}}
    model = with_lora(**options.get(how, {}))
    if how == "two adapters":
        inject_adapter_in_model(LoraConfig(target_modules=["0", "1"]), model, "other")
    for layer in model:
        if how == "half":
            layer.base_layer.bfloat16()
        elif how == "off":
            layer.enable_adapters(False)
    fuse_lora(model)
    assert [type(layer) for layer in model] == [LoraLinear, LoraLinear]


def test_every_lora_that_is_made_or_loaded_is_fused(lora, base):
    for encoder in (encoder_of(load_instruction_model(lora))[0], load_instruction_model(base)[0]):
        if not encoder.model._hf_peft_config_loaded:
            add_lora(encoder, 2)
        assert {type(module) for module in encoder.modules() if isinstance(module, BaseTunerLayer)} == {FusedLinear}
