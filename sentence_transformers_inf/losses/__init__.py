"""The instruction-aware contrastive objectives: a pure function of embeddings, and two Sentence Transformers losses."""

from sentence_transformers_inf.losses.cached import CachedInstructionContrastiveLoss
from sentence_transformers_inf.losses.functional import OBJECTIVES, instruction_contrastive_loss
from sentence_transformers_inf.losses.instruction_contrastive import InstructionContrastiveLoss

__all__ = [
    "OBJECTIVES",
    "CachedInstructionContrastiveLoss",
    "InstructionContrastiveLoss",
    "instruction_contrastive_loss",
]
