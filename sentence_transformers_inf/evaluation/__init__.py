"""Measures of instruction following, and the evaluator that takes them on InF-IR records."""

from sentence_transformers_inf.evaluation.instruction_following import (
    METRIC_NAMES,
    METRICS,
    InstructionFollowingEvaluator,
    Result,
    measure,
    score_embeddings,
)

__all__ = ["METRICS", "METRIC_NAMES", "InstructionFollowingEvaluator", "Result", "measure", "score_embeddings"]
