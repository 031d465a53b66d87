"""Training: :class:`InstructionTrainer`, its arguments, and ablations."""

from sentence_transformers_inf.training.arguments import InstructionTrainingArguments
from sentence_transformers_inf.training.run_folder import RECIPE_FILE, RunFolder, read_recipe
from sentence_transformers_inf.training.trainer import InstructionTrainer

__all__ = ["RECIPE_FILE", "InstructionTrainer", "InstructionTrainingArguments", "RunFolder", "read_recipe"]
