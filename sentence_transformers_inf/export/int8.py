"""Int8 for ONNX Runtime: linear layers whose inputs fit one scale, and the graph with them quantized.

ONNX Runtime measures one scale for a whole activation (N×L×d) whenever it runs, so few large values cost all others their
precision. Two changes, neither of which changes what a layer gives, take them out:

- Of what a norm gives, the same channels are large in every text. They are divided by scales, and the weights multiplied by
  them (SmoothQuant: Xiao et al. 2023, equations 3 and 4).
- Of what all else gives, some tokens are large. Each is divided by its largest value, and its output multiplied by it.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from sentence_transformers_inf.passages import distinct_passages
from sentence_transformers_inf.records import load_records

_STRENGTH = 0.8
"""SmoothQuant's α: how much of what makes a channel large moves into the weights."""
_BATCH = 16
"""Texts that are encoded together to see which channels are large."""
_MOST = 64
"""Of a weight in 7 bits."""
_LEAST = 1e-6
"""What is smaller counts as this, so that nothing is divided by zero."""


class _ScaledByChannel(nn.Linear):
    inverse: Tensor

    def __init__(self, linear: nn.Linear, largest: Tensor) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        weights = linear.weight.abs().amax(dim=0).clamp_min(_LEAST)
        scales = largest.clamp_min(_LEAST) ** _STRENGTH / weights ** (1 - _STRENGTH)
        self.load_state_dict(linear.state_dict() | {"weight": linear.weight * scales})
        self.register_buffer("inverse", 1 / scales)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * self.inverse)


class _ScaledByToken(nn.Linear):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.load_state_dict(linear.state_dict())

    def forward(self, input: Tensor) -> Tensor:
        largest = input.abs().amax(dim=-1, keepdim=True).clamp_min(_LEAST)
        output = F.linear(input / largest, self.weight) * largest
        return output if self.bias is None else output + self.bias


@torch.no_grad()
def even_out(encoder: SentenceTransformer) -> SentenceTransformer:
    """A copy of an encoder that gives the same embeddings, and whose linear layers keep their precision in int8.

    Which channels are large is seen on the bundled validation split.

    Args:
        encoder: In float32; begins with a Transformer.
    """
    records = load_records("mini", "validation")
    asked = map(" ".join, zip(records["query_positive"], records["instruction_positive"]))
    texts = [*asked, *distinct_passages([records])[:128]]
    encoder = copy.deepcopy(encoder)
    transformer: Any = encoder[0]
    model: nn.Module = transformer.model
    normed: dict[int, Tensor] = {}
    largest: dict[str, Tensor | None] = {}

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        normed[output.data_ptr()] = output

    def watch(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            of_batch = args[0].abs().flatten(0, -2).amax(dim=0) if args[0].data_ptr() in normed else None
            before = largest.get(name, of_batch)
            largest[name] = None if of_batch is None or before is None else torch.maximum(before, of_batch)

        return see

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(watch(name)))
        elif type(module).__name__.endswith("Norm"):
            hooks.append(module.register_forward_hook(keep))
    for start in range(0, len(texts), _BATCH):
        normed.clear()
        encoder.encode(texts[start : start + _BATCH], batch_size=_BATCH, show_progress_bar=False)
    for hook in hooks:
        hook.remove()
    for name, channels in largest.items():
        parent, _, leaf = name.rpartition(".")
        linear: Any = model.get_submodule(name)
        even = _ScaledByToken(linear) if channels is None else _ScaledByChannel(linear, channels)
        setattr(model.get_submodule(parent), leaf, even)
    return encoder.eval()


def quantize_graph(source: Path, target: Path) -> None:
    """Turn the linear layers of an ONNX graph to int8: a scale and a zero for each column of a weight, and each activation.

    Args:
        source: The graph in float32.
        target: The file to write.
    """
    root, quiet = logging.getLogger(), logging.NullHandler()
    root.addHandler(quiet)  # the import sets up logging at INFO where there is no handler
    level = root.level
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        root.setLevel(logging.ERROR)  # it advises a preparation that is for images
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            reduce_range=True,  # 7 bits: processors without VNNI add two products in 16 bits, which 8 bits overflow
            extra_options={"MatMulConstBOnly": True, "WeightSymmetric": False},
        )
        model = onnx.load(target)
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT8:  # rounding a column and its zero may end one beyond the 7 bits
                within = onnx.numpy_helper.to_array(tensor).clip(-_MOST, _MOST)
                tensor.CopyFrom(onnx.numpy_helper.from_array(within, tensor.name))
        onnx.save(model, target)
    finally:
        root.setLevel(level)
        root.removeHandler(quiet)
