"""Adapters: instructed queries obey, and everything else of the base model stays as it was, bit for bit."""

import json
import logging
import threading

import faiss
import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qdrant_client import QdrantClient, models
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Pooling

from sentence_transformers_inf import InstructionTrainingArguments, load_instruction_model, load_records
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.losses import CachedInstructionContrastiveLoss, InstructionContrastiveLoss
from sentence_transformers_inf.modules import (
    adapter_tower,
    attach_adapter,
    copy_tower,
    detach_adapter,
    encoder_of,
    encoders_of,
    has_lora,
    is_adapter,
    save_adapter,
)
from sentence_transformers_inf.passages import distinct_passages, encode_passages, passage_rows, read_passage_embeddings
from sentence_transformers_inf.records import training_dataset
from sentence_transformers_inf.search import read_index, search
from tests.training import train, trainer

ADAPTER = {"update": "queries", "learning_rate": 1e-2, "save_strategy": "no"}
FORMS = {"lora": {}, "copy": {"lora_r": 0}, "merged": {"merge_base": True}}
LOADED: dict = {}
TOLD = {"instruction": "For young children, in simple words.", "query": "why is the sky blue"}
JOINED = "why is the sky blue For young children, in simple words."
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


@pytest.fixture
def model(tiny):
    """A fresh instruction-aware tiny model, without dropout's randomness."""
    return load_instruction_model(tiny).eval()


@pytest.fixture(scope="module")
def plain(tiny):
    return SentenceTransformer(tiny).eval()


@pytest.fixture(scope="module", params=FORMS)
def adapted(request, tiny, few_records, tmp_path_factory):
    """(form, folder, the model as trained) of each form in which an adapter is saved."""
    folder = tmp_path_factory.mktemp(request.param) / "adapter"
    return request.param, folder, train(few_records, tiny, folder, **ADAPTER, **FORMS[request.param])


@pytest.fixture(scope="module")
def lora(tiny, few_records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "adapter"
    train(few_records, tiny, folder, **ADAPTER)
    return folder


def is_told(item):
    return isinstance(item, dict) and bool((item["instruction"] or "").strip())


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
            expected = plain.encode(texts)
            assert np.array_equal(embeddings[untold], expected)
            assert np.array_equal(model.encode_query(texts), expected)
            assert np.array_equal(model.encode_document(texts), expected)


def test_it_loads_as_it_was_trained(plain, adapted):
    _, folder, trained = adapted
    told = trained.encode([TOLD, "a passage"])
    assert np.allclose(load_instruction_model(folder).encode([TOLD, "a passage"]), told, atol=1e-6)
    assert not np.allclose(told[0], plain.encode(JOINED), atol=1e-3)


def test_it_is_an_ordinary_folder_of_what_encodes_joined_strings(adapted):
    form, folder, trained = adapted
    there = SentenceTransformer(str(folder))
    task = {"task": "instructed"} if form == "merged" else {}
    assert np.allclose(there.encode(JOINED, **task), trained.encode(TOLD), atol=1e-6)


def test_its_card_says_what_it_promises_and_how_it_is_attached(adapted):
    form, folder, _ = adapted
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert ("bit for bit" in card) == ("attach_adapter" in card) == (form != "merged")


def test_it_names_its_base(adapted, tiny):
    form, folder, _ = adapted
    assert (folder / "instruction_adapter.json").exists() == (form != "merged")
    if form != "merged":
        said = json.loads((folder / "instruction_adapter.json").read_text(encoding="utf-8"))
        assert (said["base"], said["revision"], said["lora"]) == (tiny, None, form == "lora")
    if form == "lora":
        assert json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"] == tiny


def test_only_a_lora_leaves_the_weights_to_the_base(adapted):
    form, folder, _ = adapted
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 2**20
    assert (size < 1) == (form == "lora")


def test_saved_by_the_host_it_is_an_adapter_with_its_base(adapted, plain, tmp_path):
    _, folder, _ = adapted
    loaded = load_instruction_model(folder)
    expected = loaded.encode([TOLD, {"query": "sky"}, "a passage"])
    loaded.save_pretrained(str(tmp_path / "a"))
    assert np.array_equal(loaded.encode([TOLD, {"query": "sky"}, "a passage"]), expected)
    once = load_instruction_model(tmp_path / "a")
    once.save_pretrained(str(tmp_path / "b"))
    for model in (once, load_instruction_model(tmp_path / "b")):
        assert is_adapter(model)
        assert np.allclose(model.encode([TOLD, {"query": "sky"}, "a passage"]), expected, atol=1e-6)
        assert np.array_equal(detach_adapter(model).encode(["a passage"]), plain.encode(["a passage"]))


@pytest.mark.parametrize("lora_r", [4, 0])
def test_the_best_checkpoint_is_loaded_into_an_adapter(corpus, tiny, tmp_path, caplog, lora_r):
    options = {**ADAPTER, "save_strategy": "steps", "num_train_epochs": 2, "evaluations": 2, "lora_r": lora_r}
    running = trainer(corpus, tiny, tmp_path / "m", **options)
    with caplog.at_level(logging.ERROR):
        running.train()
    assert "Could not load the best model" not in caplog.text
    scores = [entry["eval_validation_p_mrr"] for entry in running.state.log_history if "eval_validation_p_mrr" in entry]
    assert len(scores) == 2
    encoder_of(running.model)[0].find_exclusions = False  # as in training
    score = measure(running.model, load_records(corpus, "validation")).means()["p_mrr"]
    assert any(score == pytest.approx(each, abs=1e-4) for each in scores)


def test_an_index_of_the_plain_model_is_searched_with_instructions(tiny, plain, lora, tmp_path):
    """Through Qdrant, over vectors that the plain model made: the evaluator's pair accuracy."""
    records = load_records("mini", "test").select(range(24))
    passages = distinct_passages([records])
    vectors = plain.encode(passages)
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


def test_an_adapter_finds_the_same_in_every_kind_of_index(lora, tmp_path, plain):
    texts = ["The sky is blue because air scatters blue light.", "Taxes are due in April.", "Vaccines train the body."]
    vectors = plain.encode(texts)
    np.save(tmp_path / "i.npy", vectors)
    np.savez(tmp_path / "i.npz", vectors)
    index = faiss.IndexFlatIP(32)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "i.faiss"))
    model = load_instruction_model(lora)
    expected = search(model, texts, "why is the sky blue", "In simple words.", 3)
    assert len(expected) == 3
    for name in ("i.npy", "i.npz", "i.faiss"):
        hits = search(model, texts, "why is the sky blue", "In simple words.", 3, read_index(tmp_path / name, 3, 32))
        assert [(hit.passage, hit.rank, hit.plain_rank) for hit in hits] == [
            (hit.passage, hit.rank, hit.plain_rank) for hit in expected
        ]
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-6)


def test_an_index_that_does_not_fit_is_refused(tmp_path):
    np.save(tmp_path / "other.npy", np.zeros((2, 32), dtype=np.float32))
    (tmp_path / "bad.faiss").write_text("no index")
    with pytest.raises(ValueError, match="an index of 3 passages in 32"):
        read_index(tmp_path / "other.npy", 3, 32)
    with pytest.raises(ValueError, match="a FAISS index"):
        read_index(tmp_path / "bad.faiss", 3, 32)
    with pytest.raises(FileNotFoundError, match="no such index"):
        read_index(tmp_path / "none.npy", 3, 32)


def test_adapters_stand_side_by_side_on_one_base(tiny, lora):
    one = load_instruction_model(tiny)
    first, second = attach_adapter(one, lora), attach_adapter(one, lora)
    with torch.no_grad():
        for name, weight in encoder_of(second).named_parameters():
            if "lora_B" in name:
                weight.neg_()
    told = [model.encode(TOLD) for model in (first, second, load_instruction_model(lora))]
    assert np.array_equal(told[0], told[2])
    assert not np.allclose(told[0], told[1], atol=1e-3)


def test_a_lora_shares_the_weights_of_its_base(tiny, lora):
    one = load_instruction_model(tiny)
    shared = {weight.data_ptr() for weight in one.parameters()}
    assert len(shared) == len(list(one.parameters()))
    for model in (attach_adapter(one, lora), attach_adapter(one, lora)):
        assert shared <= {weight.data_ptr() for weight in model.parameters()}
        own = {name for name, weight in model.named_parameters() if weight.data_ptr() not in shared}
        assert own
        assert all("lora_" in name for name in own)


def test_an_adapter_comes_off_and_leaves_the_very_base(tiny, lora, plain):
    base = load_instruction_model(tiny)
    adapted = attach_adapter(base, lora)
    adapted.encode([TOLD, "a passage"])
    assert detach_adapter(adapted) is base
    assert np.array_equal(base.encode([JOINED, "a passage"]), plain.encode([JOINED, "a passage"]))
    with pytest.raises(ValueError, match="has no adapter"):
        detach_adapter(base)


# Its base and no other


def with_other_weights(base):
    with torch.no_grad():
        next(base.parameters())[0, 0] += 1


def with_another_pooling(base):
    base[1] = Pooling(base[1].embedding_dimension, pooling_mode="cls")


def without_normalization(base):
    del base[2]


def with_fewer_dimensions(base):
    base.truncate_dim = 16


def with_other_dimensions(base):
    base.append(Dense(32, 8))


@pytest.mark.parametrize("form", ["lora", "copy"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_other_weights, "other weights"),
        (with_another_pooling, r'"mean".* and this base model has .*"cls"'),
        (without_normalization, r"with modules .*Normalize.* and this base model has"),
        (with_fewer_dimensions, "32 dimensions, and this base model's have 16"),
        (with_other_dimensions, "32 dimensions, and this base model's have 8"),
    ],
)
def test_another_base_is_refused(model, form, change, message, lora, tmp_path):
    folder = lora
    if form == "copy":
        folder = tmp_path
        save_adapter(adapter_tower(model, copy_tower(model, share=False)), folder, "a base")
    change(model)
    with pytest.raises(ValueError, match=message):
        load_instruction_model(folder, base=model)


def test_a_base_of_other_settings_is_refused_even_where_they_do_nothing(model, tmp_path):
    """The same dimensions and weights, but not by the same settings."""
    save_adapter(adapter_tower(model, copy_tower(model, share=False)), tmp_path, "a base")
    model.truncate_dim = 32
    with pytest.raises(ValueError, match="with truncate_dim null, and this base model has 32"):
        attach_adapter(model, tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_its_base_is_accepted_in_half_precision_and_works(adapted, dtype, plain):
    _, folder, trained = adapted
    loaded = load_instruction_model(folder, model_kwargs={"dtype": dtype})
    assert is_adapter(loaded)
    assert {weight.dtype for weight in loaded.parameters()} == {getattr(torch, dtype)}
    embeddings = loaded.encode([TOLD, "a passage"]).astype(np.float32)
    assert np.allclose(embeddings, trained.encode([TOLD, "a passage"]), atol=0.02)
    in_half = SentenceTransformer(plain[0].model.name_or_path, model_kwargs={"dtype": dtype})
    assert np.array_equal(loaded.encode(["a passage"]), in_half.encode(["a passage"]))


def test_other_weights_are_refused_in_half_precision_too(tiny, lora):
    other = load_instruction_model(tiny, model_kwargs={"dtype": "bfloat16"})
    with_other_weights(other)
    with pytest.raises(ValueError, match="other weights"):
        attach_adapter(other, lora)


def test_what_is_no_adapter_is_refused(tiny):
    with pytest.raises(FileNotFoundError, match="there is no adapter here"):
        attach_adapter(load_instruction_model(tiny), tiny)
    with pytest.raises(ValueError, match="is no adapter"):
        load_instruction_model(tiny, base=tiny)


# What is beside the transformer


@pytest.mark.parametrize("lora_r", [4, 0])
def test_an_adapter_learns_to_attend(tiny, few_records, tmp_path, lora_r, plain):
    trained = train(few_records, tiny, tmp_path / "m", interaction="gated", lora_r=lora_r, **ADAPTER)
    gate = encoder_of(trained)[1].gate.detach()
    assert gate.abs().min() > 0
    loaded = load_instruction_model(tmp_path / "m")
    assert torch.equal(encoder_of(loaded)[1].gate, gate)
    in_half = load_instruction_model(tmp_path / "m", model_kwargs={"dtype": "bfloat16"})
    assert np.allclose(in_half.encode(TOLD), trained.encode(TOLD), atol=0.02)
    assert np.allclose(loaded.encode([TOLD, "a passage"]), trained.encode([TOLD, "a passage"]), atol=1e-6)
    assert np.array_equal(loaded.encode(["a passage"]), plain.encode(["a passage"]))


@pytest.mark.parametrize("lora_r", [4, 0])
def test_an_adapter_keeps_what_it_learned_after_the_pooling(tiny, few_records, tmp_path, lora_r):
    torch.manual_seed(0)
    wider = SentenceTransformer(tiny)
    wider.append(Dense(32, 16))
    wider.save_pretrained(str(tmp_path / "base"))
    trained = train(few_records, tmp_path / "base", tmp_path / "m", lora_r=lora_r, **ADAPTER)
    loaded = load_instruction_model(tmp_path / "m")
    assert not torch.equal(encoder_of(loaded)[3].linear.weight, wider[3].linear.weight)
    assert np.allclose(loaded.encode(TOLD), trained.encode(TOLD), atol=1e-6)
    assert np.array_equal(loaded.encode(["a passage"]), wider.eval().encode(["a passage"]))


@pytest.mark.parametrize("lora_r", [4, 0])
def test_an_adapter_stands_beside_a_base_with_a_lora(tiny, few_records, tmp_path, lora_r):
    base = train(few_records, tiny, tmp_path / "base", lora_r=2, learning_rate=1e-2)
    trained = train(few_records, tmp_path / "base", tmp_path / "m", lora_r=lora_r, **ADAPTER)
    loaded = load_instruction_model(tmp_path / "m")
    assert has_lora(detach_adapter(loaded)[0])
    assert np.allclose(loaded.encode(TOLD), trained.encode(TOLD), atol=1e-6)
    for model in (trained, loaded):
        assert np.array_equal(model.encode(["a passage"]), base.encode(["a passage"]))
        assert not np.allclose(model.encode(TOLD), base.encode(TOLD), atol=1e-3)


# In use


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


# Passages that were encoded before


def test_passages_are_encoded_once(model, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("sentence_transformers_inf.passages.cached_assets_path", lambda *_, **__: tmp_path)
    monkeypatch.setattr("sentence_transformers_inf.passages._BLOCK", 8)
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
    assert encode_passages(model, passages[:9]).shape == (9, 32)  # other passages, another file


@pytest.mark.parametrize("kind", [InstructionContrastiveLoss, CachedInstructionContrastiveLoss])
def test_passages_made_before_give_the_loss_and_gradients_of_encoding_them(model, few_records, kind):
    """By the frozen base of an adapter."""
    adapted = adapter_tower(model, copy_tower(model, share=False))
    view = training_dataset(few_records)
    texts = distinct_passages([few_records])
    rows, vectors = torch.from_numpy(passage_rows(few_records, texts)), model.encode(texts)
    options = {"objective": "multi_P_I_IQ", "sampled_instructions": 2, "plain_weight": 0.5}
    found = []
    for loss, columns, labels in (
        (kind(adapted, passage_embeddings=vectors, **options), view.column_names[:3], rows),
        (kind(adapted, **options), view.column_names, None),
    ):
        adapted.zero_grad()
        value = loss([adapted.preprocess(view[column][:]) for column in columns], labels)
        value.backward()
        found.append((value.item(), [w.grad.clone() for w in encoder_of(adapted).parameters() if w.grad is not None]))
        assert all(weight.grad is None for weight in model.parameters())
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert len(found[0][1]) > 30
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(found[0][1], found[1][1], strict=True))


def test_labels_must_say_which_passages(model, few_records):
    view = training_dataset(few_records)
    queries = [model.preprocess(view[column][:]) for column in ("instructed_query", "poisoned_query")]
    loss = InstructionContrastiveLoss(model, passage_embeddings=np.zeros((4, 32), dtype=np.float32))
    with pytest.raises(ValueError, match="need labels of shape B×2"):
        loss(queries)


def test_a_model_learns_to_land_among_vectors_from_elsewhere(base, tiny, corpus, tmp_path):
    """Another model's space, of another dimension: queries, instructed and bare, find their passages there."""
    splits = [load_records(corpus, name) for name in ("train", "validation")]
    texts = distinct_passages(splits)
    turn = torch.linalg.qr(torch.randn(384, 384, generator=torch.Generator().manual_seed(0)))[0][:, :64].numpy()
    vectors = (SentenceTransformer(base).encode(texts) @ turn).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    options = {"num_train_epochs": 12, "learning_rate": 1e-2, "objective": "uni_P", "dropout": 0.0}
    options |= {"update": "queries", "passage_embeddings": str(tmp_path / "v.npy"), "save_strategy": "no"}
    train(corpus, tiny, tmp_path / "m", **options)
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update": "passages"}, "unknown update 'passages'"),
        ({"update": "queries", "encoders": "separate"}, "leave encoders out"),
        ({"update": "queries", "instructions": False}, "an adapter encodes instructed queries alone"),
        ({"encoders": "two"}, "there are shared, separate"),
        ({"passage_embeddings": "v.npy"}, "use them with update='queries'"),
        ({"lora_r": -1}, "lora_r must not be negative"),
        ({"lora_r": 4, "frozen_layers": 1}, "leave frozen_layers out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        InstructionTrainingArguments(**settings)
