"""The evaluator measures what evaluation by hand, and by MTEB's functions, gives."""

import csv

import numpy as np
import pytest
import torch
from mteb._evaluators.retrieval_metrics import calculate_pmrr

from sentence_transformers_inf.evaluation import METRICS, InstructionFollowingEvaluator, measure, score_embeddings
from sentence_transformers_inf.records import INSTRUCTION_TYPES, PASSAGE_COLUMNS


def random_embeddings(records, dimension=6):
    torch.manual_seed(1)
    n = len(records)
    queries = {q for name in ("query_positive", "query_negative") for q in records[name]}
    return (
        torch.randn(3 * n, dimension),
        {q: torch.randn(dimension) for q in sorted(queries)},
        torch.randn(3 * n, dimension),
    )


def test_p_mrr_equals_mteb_on_the_same_scores(validation):
    instructed, plain, passages = random_embeddings(validation)
    scores = torch.nn.functional.normalize(instructed, dim=1) @ torch.nn.functional.normalize(passages, dim=1).T
    run = lambda row: {f"p{d:04}": float(s) for d, s in enumerate(scores[row])}  # noqa: E731
    original, changed, irrelevant = {}, {}, {}
    for n in range(len(validation)):
        for name, before, after, passage in ((f"{n}a", 0, 1, 0), (f"{n}b", 1, 0, 1)):
            original[f"{name}-og"], changed[f"{name}-changed"] = run(3 * n + before), run(3 * n + after)
            irrelevant[name] = [f"p{3 * n + passage:04}"]
    result = score_embeddings(validation, instructed, plain, passages)
    assert result.means()["p_mrr"] == pytest.approx(100 * calculate_pmrr(original, changed, irrelevant), abs=1e-9)


def test_a_model_that_obeys_perfectly_scores_100(validation):
    n = len(validation)
    passages = torch.eye(3 * n)
    plain = {}
    for row in range(n):
        plain[validation[row]["query_positive"]] = passages[3 * row] + passages[3 * row + 1]
        plain[validation[row]["query_negative"]] = passages[3 * row + 2]
    means = score_embeddings(validation, passages, plain, passages).means()
    for metric in set(METRICS) - {"p_mrr"}:
        assert means[metric] == pytest.approx(100), metric
    assert means["p_mrr"] > 95  # d+ falls from rank 1 to somewhere among the passages that tie at 0


def test_a_model_that_ignores_instructions_scores_none(validation):
    _, plain, passages = random_embeddings(validation)
    deaf = torch.stack([plain[q] for row in validation for q in (row["query_positive"],) * 2 + (row["query_negative"],)])
    means = score_embeddings(validation, deaf, plain, passages).means()
    assert means["p_mrr"] == 0
    assert means["pair_accuracy"] == 0


def test_plain_retrieval_counts_both_passages_of_the_positive_query(validation):
    """nDCG@10 of a bare query from the definition, over its two right passages."""
    instructed, plain, passages = random_embeddings(validation)
    result = score_embeddings(validation, instructed, plain, passages)
    unit = torch.nn.functional.normalize(passages, dim=1)
    expected = []
    for row, record in enumerate(validation):
        for query, right in (
            (record["query_positive"], [3 * row, 3 * row + 1]),
            (record["query_negative"], [3 * row + 2]),
        ):
            order = (unit @ plain[query]).argsort(descending=True).tolist()
            ranks = [order.index(p) + 1 for p in right]
            ideal = sum(1 / np.log2(1 + r) for r in range(1, len(right) + 1))
            expected.append(sum(1 / np.log2(1 + r) for r in ranks if r <= 10) / ideal)
    assert result.means()["plain_ndcg_at_10"] == pytest.approx(100 * np.mean(expected), abs=1e-6)


def test_the_base_model_barely_obeys(model, validation, tmp_path):
    evaluator = InstructionFollowingEvaluator(validation, name="validation")
    scores = evaluator(model, output_path=str(tmp_path), epoch=1, steps=5)
    assert evaluator.primary_metric == "validation_p_mrr"
    assert set(scores) == {f"validation_{metric}" for metric in METRICS}
    assert scores["validation_p_mrr"] == pytest.approx(4.9, abs=0.1)
    assert scores["validation_plain_ndcg_at_10"] == pytest.approx(85.9, abs=0.1)

    per_type = evaluator.result.per_type()
    assert set(per_type) == set(INSTRUCTION_TYPES)
    assert sum(values["records"] for values in per_type.values()) == len(validation)
    weighted = sum(values["records"] * values["p_mrr"] for values in per_type.values()) / len(validation)
    assert weighted == pytest.approx(scores["validation_p_mrr"])

    rows = list(csv.DictReader((tmp_path / evaluator.csv_file).open(encoding="utf-8")))
    assert [float(row["p_mrr"]) for row in rows] == [scores["validation_p_mrr"]]
    types = list(csv.DictReader((tmp_path / "instruction_following_evaluation_validation_per_type.csv").open()))
    assert [row["instruction_type"] for row in types] == sorted(INSTRUCTION_TYPES)
    # The results reach Sentence Transformers' model card data.
    metrics = model.model_card_data.eval_results_dict[evaluator]
    assert metrics["validation_p_mrr"] == scores["validation_p_mrr"]


def test_records_without_types_have_no_breakdown(model, validation):
    few = validation.select(range(2)).select_columns([c for c in validation.column_names if c != "instruction_type"])
    assert measure(model, few).per_type() == {}
    assert set(PASSAGE_COLUMNS) <= set(few.column_names)
