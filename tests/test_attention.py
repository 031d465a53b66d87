"""Instruction and query meet in cross-attention: the formula, the masks, and the whole way from training to loading."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from sentence_transformers_inf import load_instruction_model, training_dataset
from sentence_transformers_inf.losses import (
    CachedInstructionContrastiveLoss,
    InstructionContrastiveLoss,
    instruction_contrastive_loss,
)
from sentence_transformers_inf.modules import InstructionQueryAttention, InstructionTransformer, PackedTransformer
from tests.training import train, trainer

PAIRS = [
    {"instruction": "For young children, in simple words.", "query": "why is the sky blue"},
    {"instruction": "Brief.", "query": "income tax rates for people who moved abroad during the year"},
    {"instruction": "Only from peer-reviewed journals published after 2015, please.", "query": "vaccines"},
]
INPUT = st.one_of(
    st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=40),
    st.fixed_dictionaries(
        {"query": st.text("abc xyz", max_size=30), "instruction": st.one_of(st.none(), st.text("mno pqr", max_size=60))}
    ),
)


@pytest.fixture(scope="module")
def plain(tiny):
    return SentenceTransformer(tiny).eval()


@pytest.fixture(scope="module", params=["paper", "gated"])
def attending(request, tiny):
    """A model of each kind; the gate is open, so that what goes through it counts."""
    torch.manual_seed(0)
    model = load_instruction_model(tiny, interaction=request.param)
    if request.param == "gated":
        model[1] = InstructionQueryAttention("gated", heads=4, **model[1].get_config_dict())
        torch.nn.init.normal_(model[1].gate, std=0.05)
    return model.eval()


def tokens(model, text):
    """The token embeddings of one text, L×d."""
    features = model[0](model.preprocess([text]))
    return features["token_embeddings"][0]


def test_the_paper_s_kind_is_the_formula(tiny, plain):
    model = load_instruction_model(tiny, interaction="paper").eval()
    found = model.encode_query(PAIRS, convert_to_tensor=True)
    for pair, embedding in zip(PAIRS, found):
        with torch.no_grad():
            instruction, query = tokens(plain, pair["instruction"]), tokens(plain, pair["query"])
        expected = torch.zeros(query.shape[1])
        for row in instruction:
            weights = [math.exp(float(row @ other) / math.sqrt(len(row))) for other in query]
            for weight, other in zip(weights, query):
                expected += weight / sum(weights) * other / len(instruction)
        assert torch.allclose(embedding, expected / expected.norm(), atol=1e-5)


def test_a_closed_gate_is_the_base_model(tiny, plain):
    model = load_instruction_model(tiny, interaction="gated").eval()
    for pair in PAIRS:
        assert np.allclose(model.encode_query([pair]), plain.encode([pair["query"]]), atol=1e-6)


@pytest.mark.parametrize("instruction", ["", "  \n", None])
def test_without_an_instruction_it_is_the_base_model_exactly(attending, plain, instruction):
    query = PAIRS[1]["query"]
    expected = plain.encode([query])
    assert np.array_equal(attending.encode_query([{"instruction": instruction, "query": query}]), expected)
    assert np.array_equal(attending.encode_query([{"query": query}]), expected)
    assert np.array_equal(attending.encode_document([query]), expected)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(INPUT, min_size=1, max_size=5))
def test_neither_padding_nor_other_rows_change_an_embedding(attending, inputs):
    together = attending.encode(inputs)
    alone = np.concatenate([attending.encode([item]) for item in inputs])
    assert np.allclose(together, alone, atol=1e-5)


def test_the_side_of_the_padding_does_not_matter(attending):
    expected = attending.encode(PAIRS)
    attending.tokenizer.padding_side = "left"
    try:
        assert np.allclose(attending.encode(PAIRS), expected, atol=1e-5)
    finally:
        attending.tokenizer.padding_side = "right"


def test_what_a_batch_repeats_is_encoded_once(attending):
    seen = []
    handle = attending[0].model.embeddings.register_forward_hook(lambda module, args, output: seen.append(output.shape[:2]))
    queries = [{"instruction": PAIRS[2]["instruction"], "query": f"vaccine {number}"} for number in range(6)]
    try:
        together = attending.encode([*queries, queries[0]])
    finally:
        handle.remove()
    told = len(attending.tokenizer(PAIRS[2]["instruction"])["input_ids"])
    assert seen == [(6, 4), (1, told)], "six queries as wide as a query is, and one instruction"
    assert np.allclose(together[:6], np.concatenate([attending.encode([query]) for query in queries]), atol=1e-5)
    assert np.array_equal(together[0], together[6])


def test_an_attending_model_saves_and_loads(attending, plain, tmp_path):
    attending.save_pretrained(str(tmp_path), create_model_card=False)
    expected = attending.encode([*PAIRS, "a passage"])
    loaded = load_instruction_model(tmp_path)
    assert isinstance(loaded[1], InstructionQueryAttention)
    assert (loaded[1].kind, loaded[1].heads) == (attending[1].kind, attending[1].heads)
    assert np.array_equal(loaded.encode([*PAIRS, "a passage"]), expected)
    assert np.array_equal(copy.deepcopy(loaded).encode(PAIRS), expected[:3])
    # Without this package: ordinary pooling, which is what passages and bare queries have.
    assert np.array_equal(SentenceTransformer(str(tmp_path)).encode(["a passage"]), plain.encode(["a passage"]))
    joined = load_instruction_model(tmp_path, interaction="concatenation")
    assert type(joined[0]) is InstructionTransformer
    assert np.array_equal(joined.encode(PAIRS[:1]), plain.encode([f"{PAIRS[0]['query']} {PAIRS[0]['instruction']}"]))


def gradients(model, loss, features):
    model.zero_grad()
    value = loss([dict(column) for column in features])
    value.backward()
    return value.item(), {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_the_losses_agree_and_reach_every_weight(attending, few_records):
    model = copy.deepcopy(attending).double()
    rows = training_dataset(few_records.select(range(2)))
    features = [model.preprocess(rows[column]) for column in rows.column_names]
    options = {"objective": "multi_P_I", "sampled_instructions": 1, "plain_weight": 0.5}
    whole, expected = gradients(model, InstructionContrastiveLoss(model, max_tokens_per_chunk=10**6, **options), features)
    for loss in (
        InstructionContrastiveLoss(model, max_tokens_per_chunk=200, **options),
        CachedInstructionContrastiveLoss(model, mini_batch_size=5, **options),
    ):
        value, found = gradients(model, loss, features)
        assert value == pytest.approx(whole, abs=1e-9)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], expected[name], atol=1e-9) for name in expected)
    if attending[1].kind == "gated":
        assert float(expected["1.gate"].abs().min()) > 0
        assert float(expected["1.query_to_instruction.query.weight"].abs().max()) > 0


@pytest.mark.parametrize("kind", ["paper", "gated"])
def test_training_keeps_the_attention(kind, tiny, few_records, tmp_path):
    options = {"save_strategy": "no", "learning_rate": 1e-2}
    trained = train(few_records, tiny, tmp_path / "model", interaction=kind, **options)
    loaded = load_instruction_model(tmp_path / "model")
    assert np.allclose(loaded.encode(PAIRS), trained.encode(PAIRS), atol=1e-6)
    assert loaded[1].kind == kind
    if kind == "gated":
        assert float(loaded[1].gate.detach().abs().max()) > 0
    assert f"cross-attention (`{kind}`)" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    # Trained further, without a word on attention: every instruction of the batch is a candidate.
    further = train(few_records, tmp_path / "model", tmp_path / "further", **options)
    assert further[1].kind == kind
    settings = json.loads((tmp_path / "further" / "recipe.json").read_text(encoding="utf-8"))["settings"]
    assert settings["encoders"] == "shared"
    assert "sampled_instructions" not in settings


def test_a_base_with_attention_may_leave_it(tiny, few_records, tmp_path):
    base = load_instruction_model(tiny, interaction="gated")
    made = trainer(few_records, base, tmp_path / "m", interaction="concatenation").model
    assert not any(isinstance(module, (InstructionQueryAttention, PackedTransformer)) for module in made.modules())


def test_what_cannot_attend_is_refused(tiny, plain):
    with pytest.raises(ValueError, match="unknown interaction 'gate'"):
        load_instruction_model(tiny, interaction="gate")
    with pytest.raises(ValueError, match="has none after its Transformer"):
        load_instruction_model(SentenceTransformer(modules=[plain[0]]), interaction="paper")
    with pytest.raises(ValueError, match="5 heads do not divide"):
        InstructionQueryAttention("gated", heads=5, **plain[1].get_config_dict())


@pytest.mark.parametrize("objective", ["multi_P_I", "uni_P_I_IQ"])
def test_every_instruction_of_the_batch_is_a_candidate(attending, few_records, objective):
    """The same loss as if every pair of a query and an instruction of the batch had been encoded."""
    model, records = attending, few_records.select(range(3))
    rows = training_dataset(records)
    pairs = [pair for record in zip(*(rows[column] for column in rows.column_names[:3])) for pair in record]
    passages = [passage for record in zip(*(rows[column] for column in rows.column_names[3:])) for passage in record]
    instructions = list(dict.fromkeys(pair["instruction"] for pair in pairs))
    grid = [[{"instruction": told, "query": pair["query"]} for told in instructions] for pair in pairs]
    known = [(pair["instruction"], pair["query"]) for pair in pairs]
    query, passage = (torch.from_numpy(model.encode(texts)) for texts in (pairs, passages))
    candidates = torch.stack([torch.from_numpy(model.encode(row)) for row in grid])
    own = torch.tensor([[tuple(told.values()) == pair for told in row] for row, pair in zip(grid, known)])
    same = torch.tensor([[pair == other for other in known] for pair in known])
    expected = instruction_contrastive_loss(
        query,
        passage,
        torch.cat([query[:, None], candidates], dim=1),
        objective,
        not_negative=same,
        not_candidate=torch.cat([torch.zeros(len(query), 1, dtype=torch.bool), own], dim=1),
    )
    loss = InstructionContrastiveLoss(model, objective, max_tokens_per_chunk=300)
    features = [model.preprocess(rows[column]) for column in rows.column_names]
    found, weights = gradients(model, loss, features)
    assert found == pytest.approx(float(expected), abs=1e-4)
    assert len(instructions) == 6
    encoded = []
    hook = model[0].model.embeddings.register_forward_hook(lambda module, args, output: encoded.append(len(output)))
    whole = InstructionContrastiveLoss(model, objective, max_tokens_per_chunk=10**6)
    whole([dict(column) for column in features])
    hook.remove()
    assert sum(encoded) == 6 + 6 + 9  # queries, instructions, passages: no pair is encoded as such
    few = InstructionContrastiveLoss(model, objective, sampled_instructions=1)
    assert few([dict(column) for column in features]).item() < found
    if model[1].kind == "gated":
        assert float(weights["1.gate"].abs().mean()) > 0
    narrow = MatryoshkaLoss(model, InstructionContrastiveLoss(model, objective), [32, 8])
    assert narrow([dict(column) for column in features], None).item() > found
