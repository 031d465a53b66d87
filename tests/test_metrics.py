"""The measures equal MTEB's on random and tied runs, and their definitions by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mteb._evaluators.retrieval_metrics import calculate_pmrr, calculate_retrieval_scores, robustness_at_10

from sentence_transformers_inf.evaluation import metrics


def runs(queries, passages, levels):
    """Scores of Q queries for D passages on few levels, so that most runs have ties."""
    return st.lists(
        st.lists(st.integers(0, levels), min_size=passages, max_size=passages), min_size=queries, max_size=queries
    ).map(lambda rows: np.array(rows, dtype=np.float64) / levels)


def as_run(scores, suffix=""):
    return {f"q{q}{suffix}": {f"d{d:03}": float(s) for d, s in enumerate(row)} for q, row in enumerate(scores)}


@given(runs(4, 12, 3), runs(4, 12, 3), st.lists(st.sets(st.integers(0, 11), min_size=1), min_size=4, max_size=4))
@settings(max_examples=60, deadline=None)
def test_p_mrr_equals_mteb(original, changed, irrelevant):
    expected = calculate_pmrr(
        as_run(original, "-og"),
        as_run(changed, "-changed"),
        {f"q{q}": [f"d{d:03}" for d in sorted(s)] for q, s in enumerate(irrelevant)},
    )
    query = [q for q, s in enumerate(irrelevant) for _ in s]
    before, after = (
        np.concatenate(
            [metrics.ranks_of(scores[q : q + 1], np.array([sorted(s)])).ravel() for q, s in enumerate(irrelevant)]
        )
        for scores in (original, changed)
    )
    assert metrics.p_mrr(before, after, query) == pytest.approx(expected, abs=1e-9)


@given(runs(6, 15, 3), st.lists(st.sets(st.integers(0, 14), min_size=1), min_size=6, max_size=6))
@settings(max_examples=60, deadline=None)
def test_ndcg_recall_and_robustness_equal_mteb(scores, relevant):
    """Three queries with two instructions each, named as InstructIR does: query_instruction."""
    names = [f"q{n // 2}_{n % 2}" for n in range(6)]
    qrels = {name: {f"d{d:03}": 1 for d in rows} for name, rows in zip(names, relevant)}
    results = dict(zip(names, as_run(scores).values()))
    per_query, ndcg, _, recall, *_ = calculate_retrieval_scores(results, qrels, [1, 10])
    widest = max(map(len, relevant))
    ranks = np.zeros((6, widest), dtype=int)
    for n, rows in enumerate(relevant):
        ranks[n, : len(rows)] = metrics.ranks_of(scores[n : n + 1], np.array([sorted(rows)]))
    own = metrics.ndcg_at_k(ranks)
    assert own.mean() == pytest.approx(ndcg["NDCG@10"], abs=1e-5)  # MTEB rounds its means to five digits
    assert metrics.recall_at_k(ranks, 1).mean() == pytest.approx(recall["Recall@1"], abs=1e-5)
    assert metrics.recall_at_k(ranks, 10).mean() == pytest.approx(recall["Recall@10"], abs=1e-5)
    for value, name in zip(own, names):
        assert value == pytest.approx(per_query[name]["ndcg_cut_10"], abs=1e-9)
    robustness = robustness_at_10(qrels, results, per_query)
    assert metrics.robustness(own, [n // 2 for n in range(6)]) == pytest.approx(robustness, abs=1e-9)


def test_ties_go_to_the_larger_passage_id():
    scores = np.array([[0.5, 0.9, 0.5, 0.5]])
    assert metrics.ranks_of(scores, np.array([[0, 1, 2, 3]])).tolist() == [[4, 1, 3, 2]]


def test_rank_change_by_hand():
    assert metrics.rank_change(np.array([1, 10, 3, 2]), np.array([10, 1, 3, 4])).tolist() == [0.9, -0.9, 0.0, 0.5]


def test_p_mrr_averages_over_passages_first():
    # Query 0: 0.9 and 0; query 1: -0.5. Over passages first: (0.45 - 0.5) / 2.
    assert metrics.p_mrr(np.array([1, 1, 2]), np.array([10, 1, 1]), [0, 0, 1]) == pytest.approx(-0.025)


def test_pair_and_triple_accuracy_fail_on_ties():
    right = np.eye(3)
    pair_only = np.array([[1, 0, 2], [0, 1, 0], [0, 0, 1]])
    tie = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]])
    third_wrong = np.array([[2, 1, 0], [0, 1, 0], [1, 0, 1]])
    scores = np.stack([right, pair_only, tie, third_wrong]).astype(float)
    assert metrics.pair_correct(scores).tolist() == [True, True, False, True]
    assert metrics.triple_correct(scores).tolist() == [True, False, False, False]


def test_the_bootstrap_interval_covers_the_mean_and_shrinks():
    values = np.random.default_rng(0).normal(10, 2, size=400)
    low, high = metrics.bootstrap_interval(values)
    wide_low, wide_high = metrics.bootstrap_interval(values[:40])
    assert low < values.mean() < high
    assert high - low < wide_high - wide_low
    assert high - low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)
    assert metrics.bootstrap_interval(values) == (low, high)


def test_scores_that_are_not_numbers_have_no_ranks():
    with pytest.raises(ValueError, match="2 of 4 scores are not numbers"):
        metrics.ranks_of(np.array([[0.5, np.nan, np.nan, 0.1]]), np.array([[0]]))


def test_ndcg_refuses_ranks_that_two_passages_share():
    with pytest.raises(ValueError, match="the same rank"):
        metrics.ndcg_at_k(np.array([[1, 1]]))
    assert metrics.ndcg_at_k(np.array([[1, 0, 0], [2, 1, 0]])).tolist() == [1, 1]


def test_a_passage_that_was_not_found_has_the_next_rank():
    run = {"a": 0.5, "b": 0.5, "c": 0.9}
    assert [metrics.rank_in_run(run, name) for name in "abcd"] == [3, 2, 1, 4]


def test_the_pair_share_is_a_mean_over_topics():
    # Topic 1: kept at 1 and 5, excluded at 2 and 4: 1 < 2, 1 < 4, not 5 < 2, not 5 < 4: 2 of 4.
    # Topic 2: kept at 3, excluded at 7: 1 of 1. The mean is 3/4, where pooled pairs would give 3/5.
    kept, excluded = [np.array([1, 5]), np.array([3])], [np.array([2, 4]), np.array([7])]
    assert metrics.pair_share(kept, excluded) == 0.75


def test_sicr_by_hand():
    ranks = [
        [5, 2, 9],  # rises, and falls under the opposite: obeys
        [5, 2, 9],  # the same ranks, but the score fell from the original to the instructed mode: does not
        [1, 1, 3],  # first already, and stays there: obeys
        [4, 4, 9],  # stays where it was, and was not first: does not
        [5, 2, 5],  # does not fall under the opposite: does not
    ]
    scores = [[0.5, 0.7, 0.3], [0.5, 0.4, 0.3], [0.8, 0.8, 0.6], [0.5, 0.7, 0.3], [0.5, 0.7, 0.4]]
    # Query 0 has the first two documents: 1/2. Query 1 the third: 1. Query 2 the last two: 0. The mean is 1/2.
    assert metrics.sicr(np.array(ranks), np.array(scores), [0, 0, 1, 2, 2]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ((3, 1, 9), 1.0),  # among the first N = 3, and lifted to the top
        ((4, 1, 9), 1 - 3 / 20),  # from outside the first N: (1 - 3/20) / √1
        ((12, 4, 30), (1 - 8 / 20) / 2),  # (1 - 8/20) / √4
        ((4, 4, 9), 1 / 2),  # stays: (1 - 0) / √4
        ((21, 1, 30), 0.01),  # from beyond K = 20
        ((5, 9, 2), -1.0),  # the contrary in both modes
        ((5, 10, 7), -1 / 2),  # falls under the instruction: (5 - 10) / 10
        ((8, 3, 2), -3 / 4),  # rises, but rises under the opposite too: (2 - 8) / 8
        ((5, 2, 5), 0.0),  # rises, and the opposite moves nothing: (5 - 5) / 5
    ],
)
def test_wise_by_hand(ranks, expected):
    assert metrics.wise(np.array([ranks]), np.array([3]), ["q"]) == pytest.approx(expected)


def test_wise_is_a_mean_over_documents_and_then_over_queries():
    # Query 0: (1 - 1) / 2 = 0. Query 1: 1/2. The mean is 1/4, where all documents alike would give 1/6.
    ranks = np.array([[3, 1, 9], [5, 9, 2], [4, 4, 9]])
    assert metrics.wise(ranks, np.array([3, 3, 3]), [0, 0, 1]) == pytest.approx(0.25)
