"""LoRA files as vLLM loads them (read in vLLM 0.33: ``vllm/lora/utils.py``, ``vllm/lora/peft_helper.py``)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForCausalLM

from sentence_transformers_inf.modules.lora import ADAPTER_NAME, lora_base, lora_rank

ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "modernbert": "ModernBertModel",
}
"""The classes of vLLM that serve a LoRA for embeddings, by the backbone's ``model_type``."""

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be."""

_ADAPTER, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_backbone(transformer: Any) -> None:
    """Refuse a backbone that vLLM serves no LoRA for.

    Raises:
        ValueError: The message says which backbones there are, and what to do.
    """
    kind = transformer.model.config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"vLLM serves no LoRA on the backbone {kind!r} (but on {', '.join(ARCHITECTURES)}): export with "
            "--format merged, and serve that"
        )


def save_lora(transformer: Any, folder: Path) -> dict[str, Any]:
    """Save a transformer's LoRA in PEFT's layout, its layers named as in the class that vLLM loads, and its tokenizer.

    Returns:
        What the command needs: ``base``, ``revision``, ``max_lora_rank``, ``architecture``.

    Raises:
        ValueError: The rank is more than vLLM takes.
    """
    rank = lora_rank(transformer)
    if rank > _RANKS[-1]:
        raise ValueError(f"the LoRA has rank {rank}, and vLLM takes {_RANKS[-1]} at most: export with --format merged")
    transformer.model.save_pretrained(folder)
    transformer.processor.save_pretrained(folder)
    kind = transformer.model.config.model_type
    if not ARCHITECTURES[kind].endswith("Model"):  # the backbone is below "model." there
        weights = load_file(folder / _WEIGHTS)
        renamed = {
            f"base_model.model.model.{name.removeprefix('base_model.model.')}": value for name, value in weights.items()
        }
        save_file(renamed, folder / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))
    base, revision = lora_base(transformer) or (None, None)
    leaves = sorted({name.rpartition(".")[2] for name in config["target_modules"]})
    config |= {"target_modules": leaves, "base_model_name_or_path": base, "inference_mode": True}
    (folder / _ADAPTER).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    limit = next(size for size in _RANKS if size >= rank)
    return {"base": base, "revision": revision, "max_lora_rank": limit, "architecture": ARCHITECTURES[kind]}


def with_saved_lora(encoder: SentenceTransformer, transformer: Any, folder: Path, architecture: str) -> SentenceTransformer:
    """An encoder whose LoRA is read from :func:`save_lora`'s folder onto the class that vLLM loads, for the parity check.

    Args:
        encoder: With the LoRA merged; it is copied.
        transformer: Its first module, with the LoRA beside the weights.
        folder: Where :func:`save_lora` saved that.
        architecture: As :func:`save_lora` says.
    """
    from peft import PeftModel

    model = transformer.model
    weights = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if "lora_" not in name}
    causal = not architecture.endswith("Model")
    whole: Any = (AutoModelForCausalLM if causal else AutoModel).from_config(model.config)
    (whole.model if causal else whole).load_state_dict(weights)
    whole = PeftModel.from_pretrained(whole.to(model.dtype), str(folder), adapter_name=ADAPTER_NAME).base_model.model
    modules: list[Any] = copy.deepcopy(list(encoder))
    modules[0].model = whole.model if causal else whole
    return SentenceTransformer(modules=modules, device="cpu").eval()
