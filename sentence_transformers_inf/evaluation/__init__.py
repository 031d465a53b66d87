"""Measures of instruction following, and the evaluator that takes them on InF-IR records."""

from sentence_transformers_inf.evaluation.instruction_following import (
    METRICS,
    InstructionFollowingEvaluator,
    Result,
    measure,
    score_embeddings,
)

__all__ = ["METRICS", "InstructionFollowingEvaluator", "Result", "measure", "score_embeddings"]
