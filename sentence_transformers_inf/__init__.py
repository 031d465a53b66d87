"""Retrievers that obey instructions: data, objectives and measures on top of Sentence Transformers."""

from sentence_transformers_inf.modules import InstructionTransformer, load_instruction_model
from sentence_transformers_inf.records import RecordError, load_records, training_dataset

__version__ = "0.1.0"

__all__ = [
    "InstructionTransformer",
    "RecordError",
    "load_instruction_model",
    "load_records",
    "training_dataset",
]
