"""MTEB runs of instruction-following checkpoints: the encoder, the suites by name, and one call that runs them.

Needs the extra ``eval``.
"""

from sentence_transformers_inf.evaluation.mteb.encoder import InstructionEncoder
from sentence_transformers_inf.evaluation.mteb.infosearch import infosearch_task
from sentence_transformers_inf.evaluation.mteb.mair import mair_task
from sentence_transformers_inf.evaluation.mteb.narratives import narrative_task
from sentence_transformers_inf.evaluation.mteb.run import BenchmarkError, BenchmarkScore, read_results, run_benchmark
from sentence_transformers_inf.evaluation.mteb.suites import SUITES, MiniInstructionRetrieval, get_suite

__all__ = [
    "SUITES",
    "BenchmarkError",
    "BenchmarkScore",
    "InstructionEncoder",
    "MiniInstructionRetrieval",
    "get_suite",
    "infosearch_task",
    "mair_task",
    "narrative_task",
    "read_results",
    "run_benchmark",
]
