"""Measures of instruction following, as pure functions of scores and ranks.

Ranks are 1-based. Ties are broken by passage id, descending, as MTEB and trec_eval do. Percentages and p-MRR are reported
times 100 by the evaluator; the functions here return them as their definitions give them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

_WISE_DEPTH = 20
"""K of InfoSearch's equation 7."""


def ranks_of(scores: NDArray, passages: NDArray) -> NDArray[np.int64]:
    """The ranks of some passages among all.

    Args:
        scores: Q×D similarities of Q queries to D passages, the passages in ascending order of their ids.
        passages: Q×n column numbers, the passages of interest of each query.

    Returns:
        Q×n ranks, 1 for the highest score. Of passages with equal scores the one with the larger id comes first.

    Raises:
        ValueError: A score is not a number: every comparison with it fails, so all its passages would rank first.
    """
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {scores.size} scores are not numbers and cannot be ranked")
    ranks = np.empty(passages.shape, dtype=np.int64)
    columns = np.arange(scores.shape[1])
    for row, (row_scores, row_passages) in enumerate(zip(scores, passages)):
        for n, passage in enumerate(row_passages):
            score = row_scores[passage]
            ranks[row, n] = 1 + np.sum(row_scores > score) + np.sum((row_scores == score) & (columns > passage))
    return ranks


def rank_in_run(run: Mapping[str, float], passage: str) -> int:
    """The rank of a passage among those that a query found.

    Args:
        run: The score of each passage that was found, by its id.
        passage: The id of the passage.

    Returns:
        Its rank, 1 for the highest score, ties as in :func:`ranks_of`; of a passage that was not found, the next rank after
        the last, as MTEB counts.
    """
    if passage not in run:
        return len(run) + 1
    return 1 + sum((score, name) > (run[passage], passage) for name, score in run.items())


def rank_change(original: NDArray, changed: NDArray) -> NDArray[np.float64]:
    """The score of a passage's move between two ranks, in (-1, 1) (FollowIR, Weller et al. 2024, §4).

    Args:
        original: Ranks under the original instruction.
        changed: Ranks under the changed instruction, which made the passages irrelevant.

    Returns:
        ``changed / original - 1`` where the passage rose or stayed (0 or less), ``1 - original / changed`` where it fell.
    """
    original, changed = np.asarray(original, dtype=np.float64), np.asarray(changed, dtype=np.float64)
    return np.where(original >= changed, changed / original - 1, 1 - original / changed)


def p_mrr(original: NDArray, changed: NDArray, query: Sequence | NDArray) -> float:
    """p-MRR (FollowIR, Weller et al. 2024, §4), the same as MTEB's ``calculate_pmrr``.

    Args:
        original: Ranks of the passages that the change of instruction made irrelevant, under the original instruction.
        changed: Their ranks under the changed one.
        query: The query that each of these ranks belongs to.

    Returns:
        The mean of :func:`rank_change` over the passages of a query, then over queries, in [-1, 1]; 0 for a model that
        ignores instructions.
    """
    return float(_mean_by_group(rank_change(original, changed), query, np.mean))


def robustness(ndcg: NDArray, query: Sequence | NDArray) -> float:
    """Robustness@k (InstructIR, Oh et al. 2024, arXiv:2402.14334), the same as MTEB's ``robustness_at_10``.

    Args:
        ndcg: nDCG@k of each instructed query.
        query: The query, without its instruction, that each belongs to.

    Returns:
        The mean over queries of the lowest nDCG@k over the query's instructions, in [0, 1].
    """
    return float(_mean_by_group(ndcg, query, np.min))


def ndcg_at_k(ranks: NDArray, k: int = 10) -> NDArray[np.float64]:
    """nDCG@k with binary relevance.

    Args:
        ranks: Q×n ranks of the relevant passages of each query; 0 where a query has fewer than n.
        k: Cut-off.

    Returns:
        Q values in [0, 1]. A query must have at least one relevant passage.

    Raises:
        ValueError: Two relevant passages of a query have the same rank, which would let its value exceed 1.
    """
    ranks = np.asarray(ranks)
    in_order = np.sort(ranks, axis=1)
    if ((np.diff(in_order, axis=1) == 0) & (in_order[:, 1:] > 0)).any():
        raise ValueError("two relevant passages of a query have the same rank; break ties before, as ranks_of does")
    gains = np.where((ranks > 0) & (ranks <= k), 1 / np.log2(np.maximum(ranks, 1) + 1), 0).sum(axis=1)
    ideal = np.cumsum(1 / np.log2(np.arange(1, k + 1) + 1))
    return gains / ideal[np.minimum((ranks > 0).sum(axis=1), k) - 1]


def recall_at_k(ranks: NDArray, k: int = 1) -> NDArray[np.float64]:
    """Recall@k: the share of a query's relevant passages among its first k.

    Args:
        ranks: Q×n ranks of the relevant passages of each query; 0 where a query has fewer than n.
        k: Cut-off.

    Returns:
        Q values in [0, 1].
    """
    ranks = np.asarray(ranks)
    return ((ranks > 0) & (ranks <= k)).sum(axis=1) / (ranks > 0).sum(axis=1)


def pair_share(kept: Sequence[NDArray], excluded: Sequence[NDArray]) -> float:
    """The share of the pairs of a kept and an excluded document that a ranking has in the right order.

    Pairwise gain is this share under a changed narrative less that under the original one, where neither is meant to win.

    Args:
        kept: For each topic, the ranks of the documents that are relevant under both narratives.
        excluded: For each topic, the ranks of those that are relevant under the original one alone.

    Returns:
        The mean over topics of the share of a topic's pairs with the kept document before the excluded one, in [0, 1].
    """
    return float(
        np.mean([(k[:, None] < e[None, :]).mean() for k, e in zip(map(np.asarray, kept), map(np.asarray, excluded))])
    )


def sicr(ranks: NDArray, scores: NDArray, query: Sequence | NDArray) -> float:
    """SICR, the Strict Instruction Compliance Ratio (InfoSearch, Zhou et al. 2024, arXiv:2410.23841, eq. 4 and 5).

    A document obeys if rank and score both rise from the original to the instructed mode and both fall from the original to
    the reversely instructed mode. One that is first already cannot rise: as in the authors' code, it obeys if it stays first
    with no lower a score.

    Args:
        ranks: n×3 ranks of n documents that satisfy the instructions of their queries, in the original, instructed and
            reversely instructed mode.
        scores: n×3, their scores.
        query: The query that each document belongs to.

    Returns:
        The share of a query's documents that obey, the mean over queries, in [0, 1].
    """
    original, instructed, reverse = np.asarray(ranks).T
    score, instructed_score, reverse_score = np.asarray(scores).T
    rises = (instructed < original) & (instructed_score > score)
    stays_first = (original == 1) & (instructed == 1) & (instructed_score >= score)
    obeys = (rises | stays_first) & (original < reverse) & (score > reverse_score)
    return float(_mean_by_group(obeys, query, np.mean))


def wise(ranks: NDArray, relevant: NDArray, query: Sequence | NDArray) -> float:
    """WISE, Weighted Instruction Sensitivity Evaluation (InfoSearch, Zhou et al. 2024, arXiv:2410.23841, eq. 6 to 9).

    Equations as the authors' README shows them, K = 20 as in their code (EIT-NLP/InfoSearch, 2025). The code itself gives
    other values: it wants a rank below N for the full reward, and takes the root of the climb in the lesser one.

    Args:
        ranks: As for :func:`sicr`.
        relevant: n numbers, N of the equations: how many documents are relevant to its query in the original mode.
        query: The query that each document belongs to.

    Returns:
        The mean over a query's documents, then over queries, in [-1, 1]: 1 where the instruction lifts its document from
        among the first N to the top and its opposite lowers it; -1 where each does the contrary.
    """
    original, instructed, reverse = np.asarray(ranks, dtype=np.float64).T
    reward = np.select(
        [(original <= relevant) & (instructed == 1), original <= _WISE_DEPTH],
        [1.0, (1 - (original - instructed) / _WISE_DEPTH) / np.sqrt(instructed)],
        0.01,
    )
    penalty = np.select(
        [(reverse < original) & (original < instructed), original <= instructed],
        [-1.0, (original - instructed) / instructed],
        (reverse - original) / original,
    )
    rewarded = (instructed <= original) & (original < reverse)
    return float(_mean_by_group(np.where(rewarded, reward, penalty), query, np.mean))


def pair_correct(scores: NDArray) -> NDArray[np.bool_]:
    """Whether both instructions of a record order its two passages rightly (after NevIR, Weller et al. 2023).

    Args:
        scores: N×3×3 similarities of each record's instructed queries (q+, I+), (q+, I-), (q-, I+) to its passages d+,
            d1, d2.

    Returns:
        N booleans. A tie is a failure; guessing gives 25%, a model that ignores the instruction 0%.
    """
    return (scores[:, 0, 0] > scores[:, 0, 1]) & (scores[:, 1, 1] > scores[:, 1, 0])


def triple_correct(scores: NDArray) -> NDArray[np.bool_]:
    """Whether all three instructed queries of a record prefer their own passage to the other two.

    Args:
        scores: As for :func:`pair_correct`.

    Returns:
        N booleans; a tie is a failure.
    """
    own = scores[:, [0, 1, 2], [0, 1, 2]][:, :, None]
    return np.asarray((scores < own).sum(axis=(1, 2)) == 6)


def bootstrap_interval(
    values: NDArray, confidence: float = 0.95, samples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron and Tibshirani 1993, §13.3).

    Args:
        values: One value per record. For two models, pass the differences: the interval is then a paired one.
        confidence: Coverage.
        samples: Bootstrap samples.
        seed: Of the resampling.

    Returns:
        The lower and upper end, in the unit of the values.
    """
    values = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.array([values[generator.integers(0, len(values), len(values))].mean() for _ in range(samples)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _mean_by_group(values: NDArray, group: Sequence | NDArray, reduce: Callable[[NDArray], float]) -> np.floating:
    _, index = np.unique(np.asarray(group), return_inverse=True)
    values = np.asarray(values, dtype=np.float64)
    return np.mean([reduce(values[index == number]) for number in range(index.max() + 1)])
