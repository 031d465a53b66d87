"""Training: :class:`InstructionTrainer`, its arguments, and ablations."""

from sentence_transformers_inf.training.arguments import InstructionTrainingArguments
from sentence_transformers_inf.training.run_folder import RunFolder
from sentence_transformers_inf.training.trainer import InstructionTrainer

__all__ = ["InstructionTrainer", "InstructionTrainingArguments", "RunFolder"]
