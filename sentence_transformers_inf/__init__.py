"""Retrievers that obey instructions: data, objectives and measures on top of Sentence Transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sentence_transformers_inf.corpora import load_rows
from sentence_transformers_inf.records import RecordError, load_records, training_dataset

if TYPE_CHECKING:
    from sentence_transformers_inf.modules import InstructionTransformer, load_instruction_model
    from sentence_transformers_inf.training import InstructionTrainer, InstructionTrainingArguments

__version__ = "0.2.0"

__all__ = [
    "InstructionTrainer",
    "InstructionTrainingArguments",
    "InstructionTransformer",
    "RecordError",
    "load_instruction_model",
    "load_records",
    "load_rows",
    "training_dataset",
]


def __getattr__(name: str) -> Any:
    """Import modules and training, and PyTorch with them, when they are first asked for: building data needs neither."""
    if name in ("InstructionTransformer", "load_instruction_model"):
        from sentence_transformers_inf import modules

        return getattr(modules, name)
    if name in ("InstructionTrainer", "InstructionTrainingArguments"):
        from sentence_transformers_inf import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
