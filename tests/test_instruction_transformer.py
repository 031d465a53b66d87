"""Instruction and query meet in the prompt; everything else stays the base model's, bit for bit."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from transformers.utils import logging as transformers_logging

from sentence_transformers_inf import InstructionTransformer, load_instruction_model

INSTRUCTION, QUERY = "Only for complete beginners, without jargon.", "how do vaccines work"
PASSAGES = ["Vaccines train the immune system.", "a", "The stock market fell on Monday. " * 40]
E5_TEMPLATE = "Instruct: {instruction}\nQuery: {query}"


@pytest.fixture
def model(tiny):
    """A fresh instruction-aware tiny model, without dropout's randomness."""
    return load_instruction_model(tiny).eval()


@pytest.mark.parametrize("template", [None, "{query} [SEP] {instruction}", E5_TEMPLATE, "{instruction}|{query}"])
def test_an_instructed_query_is_the_embedding_of_the_joined_string(tiny, template):
    model = load_instruction_model(tiny, template=template)
    joined = (template or "{query} {instruction}").format(instruction=INSTRUCTION, query=QUERY)
    instructed = model.encode({"instruction": INSTRUCTION, "query": QUERY})
    assert np.array_equal(instructed, SentenceTransformer(tiny).encode(joined))
    assert np.array_equal(instructed, model.encode_query({"instruction": INSTRUCTION, "query": QUERY}))


def test_plain_strings_are_bit_identical_to_the_base_model(tiny, model):
    plain = SentenceTransformer(tiny)
    assert np.array_equal(model.encode(PASSAGES), plain.encode(PASSAGES))
    assert np.array_equal(model.encode_document(PASSAGES), plain.encode_document(PASSAGES))


@pytest.mark.parametrize("instruction", ["", "  \n", None])
def test_a_blank_instruction_gives_the_bare_query(model, instruction):
    assert model[0].join(instruction, QUERY) == QUERY
    assert np.array_equal(model.encode({"instruction": instruction, "query": QUERY}), model.encode(QUERY))
    assert np.array_equal(model.encode({"query": QUERY}), model.encode(QUERY))


def test_a_mixed_batch_keeps_its_order(model):
    inputs = [PASSAGES[0], {"instruction": INSTRUCTION, "query": QUERY}, PASSAGES[2], {"query": QUERY}]
    alone = np.stack([model.encode(item) for item in inputs])
    assert np.allclose(model.encode(inputs), alone, atol=1e-6)


@given(st.text(max_size=60), st.text(min_size=1, max_size=60))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_braces_and_odd_characters_in_the_texts_are_texts(model, instruction, query):
    joined = query if not instruction.strip() else query + " " + instruction
    assert model[0].join(instruction, query) == joined


@pytest.mark.parametrize(
    "template",
    [
        "{query}",
        "{instruction}",
        "{query} {instruction} {x}",
        "{query!r} {instruction}",
        "{query:>9999999} {instruction}",
        "{query} {instruction",
        "",
    ],
)
def test_a_template_without_both_fields_is_refused(tiny, template):
    with pytest.raises(ValueError, match="template"):
        load_instruction_model(tiny, template=template)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (7, "input 2 is of type int"),
        (None, "input 2 is of type NoneType"),
        ({"instruction": INSTRUCTION}, "input 2 has no query"),
        ({"instruction": 3, "query": QUERY}, "input 2: the instruction is of type int"),
        ({"instruction": INSTRUCTION, "query": QUERY, "passage": ""}, "input 2 has the unknown key 'passage'"),
    ],
)
def test_a_wrong_input_names_its_position(model, bad, message):
    with pytest.raises(TypeError, match=message):
        model.preprocess([QUERY, {"instruction": INSTRUCTION, "query": QUERY}, bad])


def test_only_strings_and_a_wrong_input_names_its_position(model):
    with pytest.raises(TypeError, match="input 1 is of type float"):
        model.preprocess([QUERY, 1.5])


@pytest.mark.parametrize("template", ["{query} {instruction}", "{query} [SEP] {instruction}", E5_TEMPLATE])
def test_a_long_instruction_is_cut_and_the_query_survives(tiny, template, monkeypatch):
    warnings = []
    logger = transformers_logging.get_logger("sentence_transformers_inf.modules.instruction_transformer")
    monkeypatch.setattr(logger, "warning_once", lambda message, *args: warnings.append(message))
    model = load_instruction_model(tiny, template=template, max_query_length=24)
    features = model.preprocess([{"instruction": "very " * 100, "query": QUERY}, {"query": QUERY}])
    text = model.tokenizer.decode(features["input_ids"][0], skip_special_tokens=True)
    assert QUERY in text
    assert text.count("very") >= 8
    assert features["input_ids"].shape[1] <= 24
    assert len(warnings) == 1
    # Passages keep their own, longer limit.
    assert model.preprocess([PASSAGES[2]])["input_ids"].shape[1] == 256


def test_a_query_longer_than_the_limit_is_cut_like_any_text(tiny):
    model = load_instruction_model(tiny, max_query_length=8)
    features = model.preprocess([{"instruction": INSTRUCTION, "query": "word " * 30}])
    assert features["input_ids"].shape[1] == 8


def test_saving_and_loading_gives_the_same_embeddings_and_template(tiny, tmp_path):
    model = load_instruction_model(tiny, template=E5_TEMPLATE, max_query_length=40)
    inputs = [{"instruction": INSTRUCTION * 5, "query": QUERY}, *PASSAGES]
    model.save_pretrained(str(tmp_path / "a"))
    again = load_instruction_model(tmp_path / "a")
    again.save(str(tmp_path / "b"))
    twice = load_instruction_model(tmp_path / "b")
    for loaded in (again, twice):
        assert (loaded[0].template, loaded[0].max_query_length) == (E5_TEMPLATE, 40)
        assert np.array_equal(loaded.encode(inputs), model.encode(inputs))
    assert load_instruction_model(tmp_path / "a", template="{instruction} {query}")[0].template == "{instruction} {query}"


def test_a_checkpoint_holds_no_code(model, tmp_path):
    model.save_pretrained(str(tmp_path / "model"))
    assert list((tmp_path / "model").rglob("*.safetensors"))
    assert not list((tmp_path / "model").rglob("*.py")) + list((tmp_path / "model").rglob("*.bin"))


def test_a_loaded_object_becomes_instruction_aware_and_keeps_its_modules(tiny):
    plain = SentenceTransformer(tiny, prompts={"query": "query: "}, similarity_fn_name="dot")
    modules = list(plain)
    model = load_instruction_model(plain)
    assert model is plain
    assert isinstance(model[0], InstructionTransformer)
    assert list(model)[1:] == modules[1:]
    assert (model.prompts["query"], model.similarity_fn_name) == ("query: ", "dot")
    joined = model.encode(f"query: {QUERY} {INSTRUCTION}")
    assert np.array_equal(model.encode_query({"instruction": INSTRUCTION, "query": QUERY}), joined)


def test_mean_pooling_without_normalisation_is_kept(tiny):
    transformer = Transformer(tiny)
    plain = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "cls")])
    expected = plain.encode(f"{QUERY} {INSTRUCTION}")
    assert np.array_equal(load_instruction_model(plain).encode({"instruction": INSTRUCTION, "query": QUERY}), expected)


def test_a_model_without_a_transformer_is_refused(model):
    static = SentenceTransformer(modules=[StaticEmbedding(model.tokenizer, embedding_dim=8)])
    with pytest.raises(ValueError, match="begins with a StaticEmbedding"):
        load_instruction_model(static)
