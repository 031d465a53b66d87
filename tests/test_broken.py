"""Nothing is measured or ranked on the embeddings of a broken model."""

import numpy as np
import pytest
import torch

from sentence_transformers_inf import load_instruction_model, load_records
from sentence_transformers_inf.evaluation import InstructionFollowingEvaluator, measure
from sentence_transformers_inf.evaluation.mteb import run_benchmark, suites
from sentence_transformers_inf.modules import BrokenModelError, check_embeddings
from sentence_transformers_inf.search import search
from tests.commands import call, error_line

NOT_FINITE, THE_SAME = "have embeddings that are not finite", "the same embedding although their texts differ"


def broken(folder, value):
    """A model with this value for every weight."""
    model = load_instruction_model(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)
    return model


KINDS = pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), NOT_FINITE), (float("inf"), NOT_FINITE), (0.0, THE_SAME)]
)


@KINDS
def test_a_broken_model_has_no_measures(tiny, few_records, value, message):
    model = broken(tiny, value)
    with pytest.raises(BrokenModelError, match=f"12 passages .*{message}.*too high a learning rate"):
        measure(model, few_records)
    with pytest.raises(BrokenModelError, match=message):
        InstructionFollowingEvaluator(few_records)(model)


@KINDS
def test_a_broken_model_finds_nothing(tiny, value, message):
    model = broken(tiny, value)
    with pytest.raises(BrokenModelError, match=message):
        search(model, ["the sky", "the sea"], "why is the sky blue")


def test_a_broken_model_finds_nothing_in_a_good_index(tiny):
    index = load_instruction_model(tiny).encode_document(["the sky", "the sea"])
    with pytest.raises(BrokenModelError, match="2 of 2 queries"):
        search(broken(tiny, float("nan")), ["the sky", "the sea"], "why is the sky blue", index=index)


@KINDS
def test_a_broken_model_has_no_results_of_a_benchmark(tiny, tmp_path, value, message):
    broken(tiny, value).save_pretrained(str(tmp_path / "model"))
    options = ["--benchmark", "narratives", "--output", tmp_path / "results"]
    status, _, err = call("inf-embed", "evaluate", tmp_path / "model", *options)
    assert status == 2
    assert message in error_line(err)
    assert not list((tmp_path / "results").rglob("Narrative*.json"))


def test_the_message_says_how_many_of_how_many(tiny):
    texts = [f"passage {number}" for number in range(6)]
    vectors = load_instruction_model(tiny).encode_document(texts)
    check_embeddings(vectors, texts, "passages")
    vectors[2, 3], vectors[4] = np.nan, -np.inf
    with pytest.raises(BrokenModelError, match=r"2 of 6 passages .* not finite: the first is 'passage 2'; the model"):
        check_embeddings(vectors, texts, "passages")


def test_texts_that_do_not_differ_may_have_one_embedding():
    check_embeddings(np.ones((2, 3)), ["The  sky", "the sky"], "passages")
    check_embeddings(np.ones((1, 3)), ["the sky"], "passages")
    with pytest.raises(BrokenModelError, match="all 2 passages have the same"):
        check_embeddings(np.ones((2, 3)), ["the sky", "the sea"], "passages")


def test_a_model_that_ignores_instructions_is_measured(tiny, few_records, tmp_path, monkeypatch):
    """One query under two instructions has one embedding, which is bad and not broken."""
    one = few_records.select([1])
    monkeypatch.setattr(suites, "load_records", lambda *_: one)
    model = load_instruction_model(tiny, max_query_length=7)  # the query's length: instructions are cut off
    assert measure(model, one).means()["p_mrr"] == 0
    model.save_pretrained(str(tmp_path / "model"))
    found = run_benchmark([str(tmp_path / "model")], "mini", tmp_path / "results")
    assert [score.score for score in found] == [0]


def test_passages_that_occur_twice_do_not_lift_ndcg_over_one(model):
    records = load_records("mini", "validation").select([0, 0, 1])
    means = measure(model, records).means()
    assert 0 < means["plain_ndcg_at_10"] <= 100
    assert 0 < means["ndcg_at_10"] <= 100
