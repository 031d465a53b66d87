"""PEFT's LoRA with fewer passes over memory, for encoders whose texts are so short that these passes are what it costs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn


class FusedLinear(lora.Linear):
    """A linear layer with a LoRA: W·x + s·B·(A·x) in three matrix products and nothing else.

    PEFT scales the update and adds it to the layer's output, each in a pass of its own over a tensor as large as the output;
    here the last product adds to the output where it is. Without gradients, and where the batch has so many tokens that it
    is less work, it is (W + s·B·A)·x instead: the sum is made for the call and thrown away, so that the base's weights stay
    as they are. Values and gradients are PEFT's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, to which all but the plain case is left: merged, switched off, several adapters, dropout, autocast."""
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else ""
        plain = (
            not (args or kwargs or self.disable_adapters or self.merged or torch.is_autocast_enabled(x.device.type))
            and name in self.lora_A
            and name not in self.lora_variant
            and isinstance(self.lora_dropout[name], nn.Identity)
            and self.lora_B[name].bias is None
            and x.dtype == self.lora_B[name].weight.dtype
        )
        if not plain:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        if not torch.is_grad_enabled() and type(base) is nn.Linear:
            tokens = x.numel() // base.in_features
            if tokens * (base.in_features + base.out_features) > base.weight.numel():
                weight = torch.addmm(
                    base.weight, self.lora_B[name].weight, self.lora_A[name].weight, alpha=self.scaling[name]
                )
                return F.linear(x, weight, base.bias)
        result = base(x)
        update = F.linear(x, self.lora_A[name].weight)
        result.view(-1, result.shape[-1]).addmm_(update.flatten(0, -2), self.lora_B[name].weight.T, alpha=self.scaling[name])
        return result


def fuse_lora(encoder: nn.Module) -> None:
    """Let the LoRA layers of an encoder compute as :class:`FusedLinear` does; weights and files stay as they are."""
    for module in encoder.modules():
        if type(module) is lora.Linear:
            module.__class__ = FusedLinear
