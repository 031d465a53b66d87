"""Training on a CPU in about half of the time: cheap dropout, and texts without padding.

:func:`fast_on_cpu` changes a model for as long as it is trained, by public hooks of PyTorch and transformers, and puts
everything back. It changes neither the loss nor the gradients, but for the draw of dropout's masks.
``benchmarks/train_step.py`` measures each.

- Drawing a fresh dropout mask costs a CPU as much as the layer. Here a mask is a slice of one long mask.
- All of a transformer except its attention works on tokens one by one. So the texts of a call go through it as one row of
  tokens without padding, as with flash attention on GPUs, and attention alone takes them apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sentence_transformers_inf.compat import attention_of
from sentence_transformers_inf.modules import encoders_of

_NAME = "texts_apart"
_MASK_LENGTH = 1 << 24


class CheapDropout(nn.Module):
    """Dropout whose masks are slices, at random offsets, of one long mask.

    Args:
        rate: Probability of a zero; what is left is scaled by 1 / (1 - rate).
        mask: The long mask, 0 or 1 / (1 - rate). In bfloat16, hidden states become bfloat16 too.
    """

    p = 0.0  # encoders that read the rate of attention's dropout find none

    def __init__(self, rate: float, mask: Tensor) -> None:
        super().__init__()
        self.rate = rate
        self.mask = mask

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Drop hidden states (any shape) while training."""
        if not self.training:
            return hidden_states
        size = hidden_states.numel()
        if size >= len(self.mask):
            return F.dropout(hidden_states, self.rate)
        start = int(torch.randint(len(self.mask) - size, (1,)))
        return hidden_states.to(self.mask.dtype) * self.mask[start : start + size].view_as(hidden_states)


class _Unpadding:
    """Hooks around an encoder: its texts go in as one row of tokens, and come out padded again."""

    mask: Tensor | None = None
    always = False  # not in training alone

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        mask = kwargs.get("attention_mask")
        self.mask = mask.bool() if (module.training or self.always) and mask is not None and "input_ids" in kwargs else None
        if self.mask is None:
            return None
        tokens = {key: kwargs[key][self.mask][None] for key in ("input_ids", "token_type_ids") if key in kwargs}
        positions = (self.mask.cumsum(dim=1) - 1)[self.mask][None]
        begins = F.pad(self.mask.sum(dim=1).cumsum(dim=0), (1, 0)).int()
        return args, {**kwargs, **tokens, "attention_mask": None, "position_ids": positions, "cu_seq_lens_q": begins}

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.mask is not None:
            tokens = output.last_hidden_state[0]
            padded = tokens.new_zeros(*self.mask.shape, tokens.shape[-1])
            output.last_hidden_state = padded.masked_scatter(self.mask[..., None], tokens)
        return output


def attend_apart(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of each text to itself, of several in one row of tokens; the shapes are transformers'.

    Args:
        module: The attention layer.
        query: 1×heads×tokens×d, as key and value.
        key: The same.
        value: The same.
        mask: For texts that are padded as usual.
        **kwargs: ``cu_seq_lens_q``, where the texts begin, and further arguments of transformers.

    Returns:
        1×tokens×heads×d, and no weights.
    """
    begins = kwargs.pop("cu_seq_lens_q", None)
    if begins is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    if any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "sliding_window")):
        raise NotImplementedError("texts with a position bias, a soft cap or a window must be padded")
    dtype = value.dtype
    # PyTorch's attention in bfloat16 takes a CPU longer than in float32.
    states = [each.float() if each.dtype == torch.bfloat16 else each for each in (query, key, value)]
    texts = zip(*(each.split(begins.diff().tolist(), dim=2) for each in states))
    with torch.autocast("cpu", enabled=False):
        outputs = [sdpa_attention_forward(module, *text, None, **kwargs)[0] for text in texts]
    return torch.cat(outputs, dim=1).to(dtype), None


AttentionInterface.register(_NAME, attend_apart)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextlib.contextmanager
def fast_on_cpu(model: SentenceTransformer, bf16: bool = False, seed: int = 0) -> Iterator[None]:
    """Train a model in this context; on other devices than a CPU nothing changes.

    Args:
        model: Its encoders are changed, and put back at the end.
        bf16: Whether it is trained under autocast in bfloat16.
        seed: Of dropout's long mask.
    """
    with contextlib.ExitStack() as undo:
        if model.device.type == "cpu":
            _replace_dropout(model, torch.bfloat16 if bf16 else torch.float32, seed, undo)
            for transformer in encoders_of(model):
                _unpad(transformer, undo)
        yield


def _replace_dropout(model: SentenceTransformer, dtype: torch.dtype, seed: int, undo: contextlib.ExitStack) -> None:
    generator, masks = torch.Generator().manual_seed(seed), {}
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Dropout) and module.p:
                rate = module.p
                if rate not in masks:
                    masks[rate] = (torch.rand(_MASK_LENGTH, generator=generator) >= rate).to(dtype) / (1 - rate)
                undo.callback(setattr, parent, name, module)
                setattr(parent, name, CheapDropout(rate, masks[rate]).train(module.training))


def _unpad(transformer: Transformer, undo: contextlib.ExitStack) -> None:
    """Let an encoder go without padding, if that changes nothing: it is tried with three short texts."""
    encoder, hooks = transformer.model, _Unpadding()
    if attention_of(encoder) != "sdpa" or type(transformer).__name__ == "PackedTransformer":
        return
    padded = _encode(transformer)
    with contextlib.ExitStack() as changes:
        encoder.set_attn_implementation(_NAME)
        changes.callback(encoder.set_attn_implementation, "sdpa")
        for handle in (
            encoder.register_forward_pre_hook(hooks.before, with_kwargs=True),
            encoder.register_forward_hook(hooks.after),
        ):
            changes.callback(handle.remove)
        hooks.always = True
        with contextlib.suppress(NotImplementedError):  # of attend_apart
            if bool((F.cosine_similarity(_encode(transformer), padded, dim=-1) > 0.999).all()):
                undo.push(changes.pop_all())
        hooks.always = False


@torch.no_grad()
def _encode(transformer: Transformer) -> Tensor:
    """Token embeddings (tokens×d) of texts of different lengths, encoded together, without dropout."""
    training = transformer.training
    features = transformer.eval().preprocess(["a short text", "and another one, which is longer", "one"])
    mask = features["attention_mask"].bool()
    try:
        return transformer(features)["token_embeddings"][mask]  # type: ignore[no-any-return]
    finally:
        transformer.train(training)
