"""LoRA (Hu et al. 2021, arXiv:2106.09685) on an encoder, through PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

ADAPTER_NAME = "default"
"""What transformers calls the one LoRA of an encoder."""


def add_lora(transformer: Transformer, r: int) -> None:
    """Freeze a transformer and put a trainable LoRA on its feed-forward layers.

    Args:
        transformer: The module; its layers are changed in place.
        r: Rank; the scaling α/r is 2.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: The rank is not positive.
    """
    if r < 1:
        raise ValueError(f"the rank of LoRA must be positive, got {r}")
    if not is_peft_available():
        raise ImportError("LoRA needs PEFT: pip install 'sentence-transformers-inf[lora]'")
    from peft import LoraConfig

    encoder = transformer.model
    encoder.requires_grad_(False)
    encoder.add_adapter(LoraConfig(r=r, lora_alpha=2 * r, target_modules=lora_targets(encoder)), ADAPTER_NAME)


def lora_targets(encoder: nn.Module) -> list[str]:
    """The paths of the feed-forward layers in an encoder's stack: its linear layers outside of attention.

    A LoRA on these alone learns as well as one on all linear layers (Schulman et al. 2025, "LoRA Without Regret"; here,
    docs/history.md) and costs less to encode with.
    """
    paths = {
        f"{prefix}.{name}"
        for prefix, stack in encoder.named_modules()
        if isinstance(stack, nn.ModuleList)
        for name, module in stack.named_modules()
        if isinstance(module, nn.Linear) and "att" not in name.lower()
    }
    return sorted(paths)


def lora_layers(transformer: Transformer) -> dict[str, Any]:
    """The layers of a transformer that carry a LoRA, by their paths."""
    if not is_peft_available():
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def has_lora(transformer: Transformer) -> bool:
    """Whether a transformer carries a LoRA."""
    return bool(lora_layers(transformer))


def lora_rank(transformer: Transformer) -> int:
    """The rank of a transformer's LoRA; 0 where there is none."""
    return max((layer.r[ADAPTER_NAME] for layer in lora_layers(transformer).values()), default=0)


def lora_base(transformer: Transformer) -> tuple[str, str | None] | None:
    """The name and revision of the model that a transformer's LoRA was made for; ``None`` where there is no LoRA."""
    if not has_lora(transformer):
        return None
    config = transformer.model.peft_config[ADAPTER_NAME]
    return config.base_model_name_or_path, config.revision


def train_lora(transformer: Transformer) -> None:
    """Let a LoRA that is there be trained, and nothing else of the encoder."""
    for name, parameter in transformer.model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def lora_weights(transformer: Transformer) -> dict[str, Tensor]:
    """What a transformer's LoRA adds to each layer, (outputs, inputs) in float32, by the layers' paths."""
    return {
        name: layer.scaling[ADAPTER_NAME] * _factor(layer, "B").float() @ _factor(layer, "A").float()
        for name, layer in lora_layers(transformer).items()
    }


@torch.no_grad()
def set_lora(transformer: Transformer, weights: dict[str, Tensor]) -> None:
    """Let a transformer's LoRA add what is given, or what is nearest to it of the LoRA's rank (Eckart and Young 1936).

    Args:
        transformer: One with a LoRA.
        weights: As of :func:`lora_weights`.
    """
    for name, layer in lora_layers(transformer).items():
        left, values, right = torch.linalg.svd(weights[name] / layer.scaling[ADAPTER_NAME], full_matrices=False)
        rank = min(layer.r[ADAPTER_NAME], len(values))
        root = values[:rank].sqrt()
        _factor(layer, "A").zero_()[:rank] = root[:, None] * right[:rank]
        _factor(layer, "B").zero_()[:, :rank] = left[:, :rank] * root


def _factor(layer: Any, which: str) -> Tensor:
    """The factor A, (rank, inputs), or B, (outputs, rank), of a layer's LoRA."""
    weight: Tensor = getattr(layer, f"lora_{which}")[ADAPTER_NAME].weight
    return weight.detach()


def merge_lora(transformer: Transformer) -> None:
    """Give a transformer an encoder of its own with its LoRA added to the weights; one without a LoRA stays as it is.

    Whatever shares the weights keeps them as they are.
    """
    if not has_lora(transformer):
        return
    merged = copy.deepcopy(transformer)
    for layer in lora_layers(merged).values():
        layer.merge()
    weights = {
        name.replace(".base_layer.", "."): value for name, value in merged.model.state_dict().items() if "lora_" not in name
    }
    plain: PreTrainedModel = type(transformer.model)(transformer.model.config)
    plain.load_state_dict(weights)
    transformer.model = plain.to(transformer.model.device, transformer.model.dtype).train(transformer.training)


def name_base(folder: Path, base: str, revision: str | None) -> None:
    """Let the LoRAs that were saved below a folder name their base model by its id, whatever path it was loaded from."""
    for path in folder.rglob("adapter_config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"base_model_name_or_path": base, "revision": revision}
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
