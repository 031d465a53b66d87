"""Sentence Transformers modules in which an instruction meets its query."""

from sentence_transformers_inf.modules.instruction_query_attention import KINDS, InstructionQueryAttention
from sentence_transformers_inf.modules.instruction_transformer import (
    DEFAULT_TEMPLATE,
    InstructionTransformer,
    load_instruction_model,
)

__all__ = ["DEFAULT_TEMPLATE", "KINDS", "InstructionQueryAttention", "InstructionTransformer", "load_instruction_model"]
