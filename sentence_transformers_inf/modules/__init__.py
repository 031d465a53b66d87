"""Sentence Transformers modules in which an instruction meets its query, and models made of them."""

from sentence_transformers_inf.modules.adapter import detach_adapter, is_adapter, save_adapter
from sentence_transformers_inf.modules.broken import BrokenModelError, check_embeddings, check_parts, read_array
from sentence_transformers_inf.modules.instruction_query_attention import KINDS, InstructionQueryAttention
from sentence_transformers_inf.modules.instruction_router import (
    InstructionRouter,
    adapter_tower,
    copy_tower,
    encoder_of,
    encoders_of,
    is_single,
    two_towers,
)
from sentence_transformers_inf.modules.instruction_transformer import (
    DEFAULT_TEMPLATE,
    InstructionTransformer,
)
from sentence_transformers_inf.modules.loading import attach_adapter, load_instruction_model
from sentence_transformers_inf.modules.lora import add_lora, has_lora, merge_lora
from sentence_transformers_inf.modules.packed_transformer import PackedTransformer

__all__ = [
    "DEFAULT_TEMPLATE",
    "KINDS",
    "BrokenModelError",
    "InstructionQueryAttention",
    "InstructionRouter",
    "InstructionTransformer",
    "PackedTransformer",
    "adapter_tower",
    "add_lora",
    "attach_adapter",
    "check_embeddings",
    "check_parts",
    "copy_tower",
    "detach_adapter",
    "encoder_of",
    "encoders_of",
    "has_lora",
    "is_adapter",
    "is_single",
    "load_instruction_model",
    "merge_lora",
    "read_array",
    "save_adapter",
    "two_towers",
]
