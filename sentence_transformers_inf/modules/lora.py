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
    here the last product adds to the output where it is. Values and gradients are PEFT's.
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
        result = self.base_layer(x)
        update = F.linear(x, self.lora_A[name].weight)
        result.view(-1, result.shape[-1]).addmm_(update.flatten(0, -2), self.lora_B[name].weight.T, alpha=self.scaling[name])
        return result


def fuse_lora(encoder: nn.Module) -> None:
    """Let the LoRA layers of an encoder compute as :class:`FusedLinear` does; weights and files stay as they are."""
    for module in encoder.modules():
        if type(module) is lora.Linear:
            module.__class__ = FusedLinear
