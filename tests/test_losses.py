"""The objectives: equal to the published values, to their definitions, and to each other however they are computed."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given as with_any
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

from sentence_transformers_inf import load_instruction_model, load_records, load_rows, training_dataset
from sentence_transformers_inf.corpora import bundled_base
from sentence_transformers_inf.losses import (
    OBJECTIVES,
    CachedInstructionContrastiveLoss,
    InstructionContrastiveLoss,
    instruction_contrastive_loss,
)
from sentence_transformers_inf.losses.chunks import cut
from sentence_transformers_inf.records import ROW_COLUMNS

GOLDEN = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text(encoding="utf-8"))


@pytest.fixture
def model(tiny):
    """A small model without dropout's randomness: losses are the same arithmetic."""
    return load_instruction_model(tiny).eval()


def columns(model, records):
    view = training_dataset(records)
    return [model.preprocess(view[name][:]) for name in view.column_names]


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def loss_and_gradients(loss, model, features):
    model.zero_grad()
    value = loss(features, None)
    value.backward()
    return value.item(), gradients(model)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", range(len(GOLDEN)))
def test_every_objective_equals_the_published_implementation(case, objective):
    golden = GOLDEN[case]
    query, passage, candidates = (
        torch.tensor(golden[name], dtype=torch.float64) for name in ("query", "passage", "instruction_candidates")
    )
    loss = instruction_contrastive_loss(query, passage, candidates, objective, golden["scale"])
    assert abs(loss.item() - golden["loss"][objective]) < 1e-9


def test_the_golden_file_has_all_objectives():
    assert len(GOLDEN) == 3
    assert all(set(case["loss"]) == set(OBJECTIVES) for case in GOLDEN)
    assert len(OBJECTIVES) == 11


def test_masked_candidates_leave_the_denominators():
    torch.manual_seed(0)
    query, passage, candidates = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 3, 8)
    candidates[:, 0] = query
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 2] = mask[0, 0] = True  # the diagonal is ignored
    no = torch.tensor([[False, True, False]] * 4)
    loss = instruction_contrastive_loss(
        query, passage, candidates, "multi_P_I", scale=5.0, not_negative=mask, not_candidate=no
    )
    q, p, c = (F.normalize(t, dim=-1) for t in (query, passage, candidates))
    expected = 0.0
    for r in range(4):
        positive = 5 * float(q[r] @ p[r])
        over_passages = [5 * float(q[r] @ p[k]) for k in range(4) if not (r == 0 and k == 2)]
        over_instructions = [positive, 5 * float(c[r, 2] @ p[r])]
        for scores in (over_passages, over_instructions):
            expected += (math.log(sum(math.exp(s) for s in scores)) - positive) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "multi_P"}, "unknown objective 'multi_P': choose one of uni_P"),
        ({"instruction_candidates": None}, "needs instruction_candidates"),
        ({"passage": torch.ones(1, 4)}, "N ≥ R"),
        ({"passage": torch.ones(2, 5)}, r"N×d .* got \(2, 4\) and \(2, 5\)"),
        ({"instruction_candidates": torch.ones(2, 2, 5)}, r"must be R×m×4"),
    ],
)
def test_the_function_refuses_what_does_not_fit(changes, message):
    arguments = {"query": torch.ones(2, 4), "passage": torch.ones(2, 4), "instruction_candidates": torch.ones(2, 2, 4)}
    with pytest.raises(ValueError, match=message):
        instruction_contrastive_loss(**{**arguments, **changes})


@pytest.mark.parametrize("bad", [{"objective": "P_I"}, {"scale": 0}, {"sampled_instructions": -1}, {"plain_weight": -1.0}])
def test_the_loss_refuses_bad_arguments(model, bad):
    with pytest.raises(ValueError, match=next(iter(bad)) if "objective" not in bad else "unknown objective"):
        InstructionContrastiveLoss(model, **bad)


def test_uni_P_is_multiple_negatives_ranking(model, few_records):
    features = columns(model, few_records)
    view = training_dataset(few_records)
    queries = [view[name][i] for i in range(4) for name in view.column_names[:3]]
    passages = [view[name][i] for i in range(4) for name in view.column_names[3:]]
    ranking = MultipleNegativesRankingLoss(model, scale=20.0)
    expected = ranking([model.preprocess(queries), model.preprocess(passages)], None)
    assert InstructionContrastiveLoss(model, "uni_P")(features).item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_class_equals_the_function_on_separately_encoded_texts(model, few_records):
    """The poisoned twin is always the candidate; nothing else is with sampled_instructions=0."""
    rows = []
    for record in few_records:
        twin = {record["instruction_positive"]: record["instruction_negative"]}
        twin |= {v: k for k, v in twin.items()}
        for query, instruction, passage in (
            ("query_positive", "instruction_positive", "document"),
            ("query_positive", "instruction_negative", "hard_negative_document_1"),
            ("query_negative", "instruction_positive", "hard_negative_document_2"),
        ):
            q, i = record[query], record[instruction]
            rows.append((f"{q} {i}", record[passage], f"{q} {twin[i]}"))
    encode = lambda texts: model.encode(texts, convert_to_tensor=True)  # noqa: E731
    query, passage, poisoned = (encode(list(texts)) for texts in zip(*rows))
    for objective in OBJECTIVES:
        expected = instruction_contrastive_loss(query, passage, torch.stack([query, poisoned], dim=1), objective)
        loss = InstructionContrastiveLoss(model, objective, sampled_instructions=0)(columns(model, few_records))
        assert loss.item() == pytest.approx(expected.item(), abs=1e-4), objective


def test_the_plain_term_is_its_definition(model, few_records):
    """q+ has d+ or d1 as its positive, the other masked; q- has d2; all other passages are negatives."""
    loss = InstructionContrastiveLoss(model, "uni_P", plain_weight=1.0)
    features = columns(model, few_records)
    value = loss(features).item() - InstructionContrastiveLoss(model, "uni_P")(features).item()
    names = ("document", "hard_negative_document_1", "hard_negative_document_2")
    passages = model.encode([record[name] for record in few_records for name in names], convert_to_tensor=True)
    options = []  # for every bare query, its possible cross-entropies
    for row, record in enumerate(few_records):
        for query, right in (("query_positive", (3 * row, 3 * row + 1)), ("query_negative", (3 * row + 2,))):
            scores = 20 * passages @ model.encode(record[query], convert_to_tensor=True)
            terms = []
            for positive in right:
                kept = [k for k in range(12) if k == positive or k not in right]
                terms.append((scores[kept].logsumexp(0) - scores[positive]).item())
            options.append(terms)
    sums = {0.0}
    for terms in options:
        sums = {total + term for total in sums for term in terms}
    assert min(abs(total / len(options) - value) for total in sums) < 1e-4


@pytest.mark.parametrize("kind", [InstructionContrastiveLoss, CachedInstructionContrastiveLoss])
def test_the_anchor_term_is_its_definition(model, few_records, kind):
    """The mean over the bare queries and the first passage of each record; the other passages may move as they like."""
    model, reference = model.double(), copy.deepcopy(model).double()
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    features = columns(model, few_records)
    value, gradient = loss_and_gradients(kind(model, plain_weight=0.5), model, features)
    loss = kind(model, plain_weight=0.5, reference=reference, anchor_weight=2.0)
    anchored, with_anchor = loss_and_gradients(loss, model, features)
    names = ("query_positive", "query_negative", "document")
    texts = list(dict.fromkeys(record[name] for record in few_records for name in names))
    own, theirs = (each.encode(texts, convert_to_tensor=True) for each in (model, reference))
    expected = 2.0 * (1 - torch.nn.functional.cosine_similarity(own, theirs, dim=-1)).mean().item()
    assert expected > 0.01
    assert anchored - value == pytest.approx(expected, abs=1e-5)
    assert not torch.allclose(with_anchor, gradient)
    assert all(weight.grad is None for weight in reference.parameters())
    with pytest.raises(ValueError, match="anchor_weight must not be"):
        kind(model, anchor_weight=2.0)


def test_every_distinct_text_is_encoded_once(model, few_records):
    twice = training_dataset(few_records.select([0, 1, 0]))
    features = [model.preprocess(twice[name][:]) for name in twice.column_names]
    encoded = []
    handle = model.register_forward_pre_hook(
        lambda _, args: encoded.extend(
            tuple(ids[mask.bool()].tolist()) for ids, mask in zip(args[0]["input_ids"], args[0]["attention_mask"])
        )
    )
    loss = InstructionContrastiveLoss(model, "multi_P_I", sampled_instructions=2, plain_weight=0.5)
    loss(features)
    handle.remove()
    assert len(encoded) == len(set(encoded))
    # 2 distinct records: 6 instructed queries, 6 passages, 2 twins (I-, q-), 4 bare queries, and each of these 4 queries
    # under the 2 instructions of the other record.
    assert len(encoded) == 6 + 6 + 2 + 4 + 8
    assert loss.last_step_stats["sequences"] == len(encoded)
    assert loss.last_step_stats["real_tokens"] == sum(map(len, encoded))


# Further negatives

NEGATIVES = [
    ("For children.", "q one", "right one", "wrong one"),
    ("For experts.", "q two", "right two", "wrong two"),
    ("In verse.", "q one", "right three", "right two"),  # a passage of the batch
    ("In prose.", "q four", "right four", "wrong two"),  # a negative of the batch
    ("In short.", "q five", "right five", None),
]


def negative_rows(model):
    rows = Dataset.from_list([dict(zip(ROW_COLUMNS, row)) for row in NEGATIVES])
    passages = model.encode([row[2] for row in NEGATIVES] + ["wrong one", "wrong two"], convert_to_tensor=True)
    queries = model.encode([f"{query} {instruction}" for instruction, query, _, _ in NEGATIVES], convert_to_tensor=True)
    return columns(model, rows), queries, passages


def test_further_negatives_count_once_in_the_p_term_alone(model):
    features, queries, passages = negative_rows(model)
    scores = 20 * queries @ passages.T
    own = scores.diagonal()
    expected = {
        "uni_P": (scores.logsumexp(dim=1) - own).mean().item(),
        "uni_IQ": (scores[:, :5].T.logsumexp(dim=1) - own).mean().item(),
    }
    for objective, value in expected.items():
        assert InstructionContrastiveLoss(model, objective)(features).item() == pytest.approx(value, abs=1e-5)
    both = InstructionContrastiveLoss(model, "multi_P_IQ")(features).item()
    assert both == pytest.approx(sum(expected.values()), abs=1e-5)


def test_uni_P_with_negatives_is_multiple_negatives_ranking(model):
    rows = Dataset.from_list([dict(zip(ROW_COLUMNS, row)) for row in NEGATIVES[:2]])
    features = columns(model, rows)
    ranking = MultipleNegativesRankingLoss(model, scale=20.0)
    assert InstructionContrastiveLoss(model, "uni_P")(features).item() == pytest.approx(
        ranking(features, None).item(), abs=1e-5
    )


def test_a_record_s_negatives_are_none_of_its_bare_query(model):
    """Two rows have the query "q one": neither's passage nor negative is wrong for it."""
    features, _, passages = negative_rows(model)
    value = InstructionContrastiveLoss(model, "uni_P", plain_weight=1.0)(features).item()
    value -= InstructionContrastiveLoss(model, "uni_P")(features).item()
    # Of passages 0..6, by row: the positive, and what is masked. "right two" is a passage of another query: it counts.
    masked = [{2, 5}, {6}, {0, 5}, {6}, set()]
    expected = 0.0
    for row, (_, query, _, _) in enumerate(NEGATIVES):
        scores = 20 * passages @ model.encode(query, convert_to_tensor=True)
        kept = [k for k in range(7) if k not in masked[row]]
        expected += (scores[kept].logsumexp(0) - scores[row]).item() / 5
    # "wrong two" was seen first as the negative of "q two", and so counts for "q four".
    scores = 20 * passages @ model.encode("q four", convert_to_tensor=True)
    without = [k for k in range(7) if k != 6]
    expected += (scores.logsumexp(0) - scores[without].logsumexp(0)).item() / 5
    assert value == pytest.approx(expected, abs=1e-4)


def test_negatives_may_be_vectors_made_before(model):
    features, _, passages = negative_rows(model)
    loss = InstructionContrastiveLoss(model, "multi_P_I", plain_weight=0.5)
    given = InstructionContrastiveLoss(model, "multi_P_I", plain_weight=0.5, passage_embeddings=passages.numpy())
    labels = torch.tensor([[0, 5], [1, 6], [2, 1], [3, 6], [4, 4]])
    assert given(features[:1], labels).item() == pytest.approx(loss(features).item(), abs=1e-5)


def test_records_train_as_rows(model, few_records, tmp_path):
    """The rows of records, as other corpora's: a query and instruction, its passage, and a negative."""
    few_records.to_parquet(tmp_path / "train.parquet")
    rows = load_rows(tmp_path)
    record, row = columns(model, few_records), columns(model, rows)
    assert len(row) == 3
    values = [InstructionContrastiveLoss(model, "uni_P")(features).item() for features in (record, row)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)  # every negative is a passage of the batch


@pytest.mark.parametrize("kind", [InstructionContrastiveLoss, CachedInstructionContrastiveLoss])
def test_the_stats_of_a_step_are_what_the_encoder_was_given(model, few_records, kind):
    given = []
    handle = model.register_forward_pre_hook(lambda _, args: given.append(args[0]["attention_mask"].clone()))
    size = {"mini_batch_size": 5} if kind is CachedInstructionContrastiveLoss else {"max_tokens_per_chunk": 200}
    loss = kind(model, **size)
    loss(columns(model, few_records))
    handle.remove()
    assert len(given) > 2
    assert loss.last_step_stats == {
        "sequences": sum(map(len, given)),
        "real_tokens": sum(int(mask.sum()) for mask in given),
        "padded_tokens": sum(mask.numel() for mask in given),
    }


@with_any(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.sampled_from([20, 60, 100, 200]))
def test_chunks_are_as_full_as_they_may_be(lengths, most):
    lengths.sort(reverse=True)
    cuts = cut(lengths, most)
    assert [row for begin, end in cuts for row in range(begin, end)] == list(range(len(lengths)))
    for begin, end in cuts:
        assert end - begin == 1 or lengths[begin] * (end - begin) <= most
        assert end == len(lengths) or lengths[begin] * (end + 1 - begin) > most


@pytest.mark.parametrize("kind", [InstructionContrastiveLoss, CachedInstructionContrastiveLoss])
def test_the_longest_texts_are_encoded_first(model, few_records, kind):
    """So that what needs most memory is a full batch, and comes before anything else is held."""
    given = []
    handle = model.register_forward_pre_hook(lambda _, args: given.append(args[0]["attention_mask"].sum(dim=1).tolist()))
    size = {"mini_batch_size": 5} if kind is CachedInstructionContrastiveLoss else {"max_tokens_per_chunk": 200}
    kind(model, **size)(columns(model, few_records))
    handle.remove()
    lengths = [length for chunk in given for length in chunk]
    assert len(given) > 2
    assert lengths == sorted(lengths, reverse=True)


def test_cost_is_linear_in_the_batch(model):
    loss, encoded = InstructionContrastiveLoss(model, sampled_instructions=2), []
    for records in (2, 4, 8):
        with torch.no_grad():
            loss(columns(model, load_records("mini", "train").select(range(records))))
        encoded.append(loss.last_step_stats["sequences"])
    # 3 instructed queries, 3 passages, the twin (I-, q-), and 2 queries under each of 2 sampled instructions
    assert encoded == [2 * 11, 4 * 11, 8 * 11]


def test_duplicates_of_the_positive_are_no_negatives(model, few_records):
    """With a record twice in the batch, a row's own passage and instructed query are never its negatives."""
    view = training_dataset(few_records.select([0]))
    query = model.encode([view[name][0] for name in view.column_names[:3]], convert_to_tensor=True)
    passage = model.encode([view[name][0] for name in view.column_names[3:]], convert_to_tensor=True)
    scores = 20 * query @ passage.T
    for objective, matrix in (("uni_P", scores), ("uni_IQ", scores.T)):
        expected = 0.0
        for row in range(3):
            negatives = [matrix[row, k] for k in range(3) if k != row]
            expected += float(torch.stack([matrix[row, row], *negatives, *negatives]).logsumexp(0) - matrix[row, row]) / 3
        loss = InstructionContrastiveLoss(model, objective)(columns(model, few_records.select([0, 0])))
        assert loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("objective", ["multi_P_I", "uni_P_I_IQ", "uni_IQ"])
def test_chunks_and_caching_change_neither_loss_nor_gradients(model, few_records, objective):
    model = model.double()
    features = columns(model, few_records.select([0, 1]))
    options = {"sampled_instructions": 2, "plain_weight": 0.5}
    options |= {"reference": load_instruction_model(bundled_base()).double(), "anchor_weight": 1.0}
    whole = InstructionContrastiveLoss(model, objective, max_tokens_per_chunk=10**9, **options)
    chunked = InstructionContrastiveLoss(model, objective, max_tokens_per_chunk=200, **options)
    cached = CachedInstructionContrastiveLoss(model, objective, mini_batch_size=5, **options)
    value, gradient = loss_and_gradients(whole, model, features)
    for other in (chunked, cached):
        other_value, other_gradient = loss_and_gradients(other, model, features)
        assert other_value == pytest.approx(value, abs=1e-9)
        assert torch.allclose(other_gradient, gradient, rtol=0, atol=1e-9)


def test_a_compiled_encoder_takes_chunks_of_all_shapes(model, few_records):
    """It is compiled once for chunks of all lengths and numbers of texts, from two on."""
    loss, encoder = InstructionContrastiveLoss(model, max_tokens_per_chunk=200), model[0].model
    encoder.encoder.layer = encoder.encoder.layer[:1]
    features = columns(model, few_records)
    value, gradient = loss_and_gradients(loss, model, features)
    torch._dynamo.reset()
    model.zero_grad()
    compiled = torch._dynamo.utils.counters["stats"]
    before = compiled["unique_graphs"]
    encoder.forward = torch.compile(encoder.forward, dynamic=True, backend="eager")
    other_value, other_gradient = loss_and_gradients(loss, model, features)
    assert loss.last_step_stats["padded_tokens"] > 600  # four chunks or more
    assert compiled["unique_graphs"] - before == 1
    assert other_value == pytest.approx(value, abs=1e-5)
    assert F.cosine_similarity(other_gradient[: len(gradient)], gradient, dim=0) > 0.9999


def test_caching_replays_dropout(model, few_records):
    """With dropout on, the cached gradients belong to the embeddings that the loss was computed from."""
    model.train()
    loss = CachedInstructionContrastiveLoss(model, mini_batch_size=7)
    features = columns(model, few_records)
    torch.manual_seed(3)
    value, gradient = loss_and_gradients(loss, model, features)
    torch.manual_seed(3)
    again, same_gradient = loss_and_gradients(loss, model, features)
    assert value == again
    assert torch.equal(gradient, same_gradient)


@pytest.mark.parametrize("kind", [InstructionContrastiveLoss, CachedInstructionContrastiveLoss])
def test_matryoshka_is_the_weighted_sum_over_dimensions(model, few_records, kind):
    features = columns(model, few_records)
    options = {"sampled_instructions": 2, "plain_weight": 0.5}
    loss = kind(model, **options)
    plain = InstructionContrastiveLoss(model, **options)
    expected, expected_gradient = 0.0, 0.0
    for dimension in (32, 8):

        def shorten(module, inputs, output, dimension=dimension):
            return {**output, "sentence_embedding": output["sentence_embedding"][:, :dimension]}

        handle = model.register_forward_hook(shorten)
        value, gradient = loss_and_gradients(plain, model, features)
        handle.remove()
        expected += value
        expected_gradient = expected_gradient + gradient
    value, gradient = loss_and_gradients(MatryoshkaLoss(model, loss, [32, 8]), model, features)
    assert value == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(gradient, expected_gradient, atol=1e-5 * expected_gradient.abs().max().item() + 1e-6)


def test_more_samples_than_instructions_takes_what_there_is(model, few_records):
    loss = InstructionContrastiveLoss(model, sampled_instructions=8)
    assert math.isfinite(loss(columns(model, few_records.select([0]))).item())


def test_left_padding_gives_the_same_loss(tiny, few_records):
    right = load_instruction_model(tiny).eval()
    left = load_instruction_model(tiny).eval()
    left.tokenizer.padding_side = "left"
    # BERT counts positions from the left edge, so only the bookkeeping can be compared: the tokens that reach the model.
    seen = {}
    for name, model in (("right", right), ("left", left)):
        texts = seen.setdefault(name, [])
        model.register_forward_pre_hook(
            lambda _, args, texts=texts: texts.extend(
                tuple(ids[mask.bool()].tolist()) for ids, mask in zip(args[0]["input_ids"], args[0]["attention_mask"])
            )
        )
        InstructionContrastiveLoss(model, plain_weight=0.5)(columns(model, few_records))
    assert seen["left"] == seen["right"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda features: features[:5], "got 3 columns of instructed queries and 2 of passages"),
        (lambda features: features[3:] + features[:3], "column 0 holds no instructed queries"),
    ],
)
def test_wrong_columns_are_refused(model, few_records, make, message):
    with pytest.raises(ValueError, match=message):
        InstructionContrastiveLoss(model)(make(columns(model, few_records)))


def test_the_configuration_reaches_the_model_card(model):
    config = CachedInstructionContrastiveLoss(model, "uni_P_I", mini_batch_size=4, plain_weight=0.25).get_config_dict()
    assert config["objective"] == "uni_P_I"
    assert config["mini_batch_size"] == 4
    assert config["plain_weight"] == 0.25
    assert "2505.21439" in InstructionContrastiveLoss(model).citation
