"""A LoRA that costs less where texts are short: PEFT's layers with fewer modules and fewer passes over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class FusedLinear(nn.Module, BaseTunerLayer):
    """A linear layer with a LoRA: W·x + b + s·B·(A·x) in three matrix products and nothing else.

    PEFT scales the update and adds it to the layer's output, each in a pass of its own over a tensor as large as the output;
    here the last product adds to the output where it is. Without gradients, and where the batch has so many tokens that it
    is less work, it is (W + s·B·A)·x instead: the sum is made for the call and thrown away, so that the base's weights stay
    as they are. Values and gradients are PEFT's.

    PEFT's layer is eleven modules, and every call of ``encode`` walks over all modules of a model; this is two, the layer
    below included. It holds the same parameters under the names that they have there, so that PEFT, files, checkpoints and
    optimizers see no difference.

    Args:
        layer: PEFT's layer, with one adapter and neither dropout, a bias of the adapter nor a variant (DoRA and the like).
    """

    _parameters: dict[str, nn.Parameter]  # type: ignore[assignment]

    def __init__(self, layer: lora.Linear) -> None:
        super().__init__()
        (name,) = layer.active_adapters
        self.base_layer = layer.base_layer
        self.scaling = layer.scaling[name]
        self._active_adapter = name
        self._parameters = {
            f"lora_A.{name}.weight": layer.lora_A[name].weight,
            f"lora_B.{name}.weight": layer.lora_B[name].weight,
        }
        outputs, inputs = layer.base_layer.weight.shape
        self._many = inputs * inputs * outputs / (inputs + outputs)  # values of x, with which the sum is less work

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (..., in), to (..., out)."""
        base = self.base_layer
        if self._disable_adapters:
            return base(x)
        down, up = self._parameters.values()
        if torch.is_autocast_enabled(x.device.type):
            return base(x) + F.linear(F.linear(x, down), up) * self.scaling
        if x.numel() > self._many and not torch.is_grad_enabled():
            return F.linear(x, self._summed(), base.bias)
        result = F.linear(x, base.weight, base.bias)
        update = F.linear(x, down)
        result.view(-1, result.shape[-1]).addmm_(update.view(-1, update.shape[-1]), up.T, alpha=self.scaling)
        return result

    def merge(self) -> None:
        """Give the layer below the weights W + s·B·A, and leave all to it from now on."""
        self.base_layer.weight.data = self._summed().detach()
        self._disable_adapters = True

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the LoRA on or off, as PEFT's layers do."""
        self._disable_adapters = not enabled
        for parameter in self._parameters.values():
            parameter.requires_grad_(enabled)

    def _summed(self) -> Tensor:
        down, up = self._parameters.values()
        return torch.addmm(self.base_layer.weight, up, down, alpha=self.scaling)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        *rest, unexpected, errors = args
        others: list[str] = []  # nn.Module takes a name with a dot for that of a child, and misses it
        super()._load_from_state_dict(state_dict, prefix, *rest, others, errors)  # type: ignore[call-arg]
        unexpected += [key for key in others if key.removeprefix(prefix) not in self._parameters]


def fuse_lora(encoder: nn.Module) -> None:
    """Put a :class:`FusedLinear` in the place of every LoRA layer of an encoder that is a plain one."""
    for parent in list(encoder.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is lora.Linear and _is_plain(module):
                setattr(parent, name, FusedLinear(module).train(module.training))


def share_modules(encoder: nn.Module, base: nn.Module) -> None:
    """Put the modules of ``base`` in the place of those of an encoder with LoRA that do the same, the layers below the LoRA
    included: every call of ``encode`` walks over all modules, and what stands in both places is seen once.

    Args:
        encoder: Changed in place. Its structure is that of ``base``, and so are its weights, less the LoRA.
        base: Stays as it is.
    """
    for name, module in list(encoder.named_children()):
        same = getattr(base, name)
        if isinstance(module, BaseTunerLayer):
            module.base_layer = same
        elif any(isinstance(layer, BaseTunerLayer) for layer in module.modules()):
            share_modules(module, same)
        else:
            setattr(encoder, name, same)


def _is_plain(layer: lora.Linear) -> bool:
    adapters = list(layer.lora_A)
    if adapters != layer.active_adapters or len(adapters) != 1 or layer.merged or layer.disable_adapters:
        return False
    (name,) = adapters
    return (
        type(layer.base_layer) is nn.Linear
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_B[name].bias is None
        and layer.lora_B[name].weight.dtype == layer.base_layer.weight.dtype
    )
