"""MTEB runs of instruction-following checkpoints: the encoder, the suites by name, and one call that runs them.

Needs the extra ``eval``.
"""

from sentence_transformers_inf.benchmarks.encoder import InstructionEncoder
from sentence_transformers_inf.benchmarks.mair import mair_task
from sentence_transformers_inf.benchmarks.run import BenchmarkError, Row, read_results, run_benchmark
from sentence_transformers_inf.benchmarks.suites import SUITES, MiniInstructionRetrieval, get_suite

__all__ = [
    "SUITES",
    "BenchmarkError",
    "InstructionEncoder",
    "MiniInstructionRetrieval",
    "Row",
    "get_suite",
    "mair_task",
    "read_results",
    "run_benchmark",
]
