"""Sentence Transformers modules in which an instruction meets its query, and models made of them."""

from sentence_transformers_inf.modules.adapter import detach_adapter, save_adapter
from sentence_transformers_inf.modules.instruction_query_attention import KINDS, InstructionQueryAttention
from sentence_transformers_inf.modules.instruction_router import (
    InstructionRouter,
    add_lora,
    encoder_of,
    encoders_of,
    has_lora,
    instructed_tower,
    merge_lora,
    name_base,
    two_towers,
)
from sentence_transformers_inf.modules.instruction_transformer import (
    DEFAULT_TEMPLATE,
    InstructionTransformer,
    separated_template,
)
from sentence_transformers_inf.modules.loading import attach_adapter, load_instruction_model

__all__ = [
    "DEFAULT_TEMPLATE",
    "KINDS",
    "InstructionQueryAttention",
    "InstructionRouter",
    "InstructionTransformer",
    "add_lora",
    "attach_adapter",
    "detach_adapter",
    "encoder_of",
    "encoders_of",
    "has_lora",
    "instructed_tower",
    "load_instruction_model",
    "merge_lora",
    "name_base",
    "save_adapter",
    "separated_template",
    "two_towers",
]
