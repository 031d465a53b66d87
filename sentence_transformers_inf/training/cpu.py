"""Training on a CPU in about half of the time: cheap dropout, and texts without padding.

Both change a model while it is trained, by public hooks, and put everything back. Loss and gradients stay the same, but for
dropout's masks. ``benchmarks/train_step.py`` measures each by itself.
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
from sentence_transformers_inf.modules import PackedTransformer, encoders_of

CHUNK_TOKENS = 16_384
"""Tokens that texts without padding are encoded at a time: all of a step."""

_ATTENTION = "each_text_to_itself"
_MASK_LENGTH = 1 << 24


@contextlib.contextmanager
def fast_on_cpu(model: SentenceTransformer, bf16: bool = False, seed: int = 0) -> Iterator[bool]:
    """Train a model in this context; on other devices nothing changes. Yields whether texts go without padding."""
    if model.device.type != "cpu":
        yield False
        return
    with cheap_dropout(model, torch.bfloat16 if bf16 else torch.float32, seed), without_padding(model) as unpadded:
        yield unpadded == encoders_of(model)


class CheapDropout(nn.Module):
    """Dropout whose masks are slices, at random offsets, of a long mask of 0 or 1 / (1 - rate): drawing a fresh one costs a
    CPU as much as the layer. Hidden states get the mask's precision."""

    p = 0.0  # encoders that read the rate of attention's dropout find none

    def __init__(self, rate: float, mask: Tensor) -> None:
        super().__init__()
        self.rate = rate
        self.mask = mask

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Drop hidden states (any shape) while training."""
        if not self.training:
            return hidden_states
        if (size := hidden_states.numel()) >= len(self.mask):
            return F.dropout(hidden_states, self.rate)
        start = int(torch.randint(len(self.mask) - size, (1,)))
        return hidden_states.to(self.mask.dtype) * self.mask[start : start + size].view_as(hidden_states)


@contextlib.contextmanager
def cheap_dropout(model: SentenceTransformer, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """:class:`CheapDropout` in the place of every dropout layer whose rate is not 0, with masks in ``dtype``."""
    generator, masks = torch.Generator().manual_seed(seed), {}
    layers = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    replaced = [(parent, name, child) for parent, name, child in layers if isinstance(child, nn.Dropout) and child.p]
    for parent, name, layer in replaced:
        if layer.p not in masks:
            masks[layer.p] = (torch.rand(_MASK_LENGTH, generator=generator) >= layer.p).to(dtype) / (1 - layer.p)
        setattr(parent, name, CheapDropout(layer.p, masks[layer.p]).train(layer.training))
    try:
        yield
    finally:
        for parent, name, layer in replaced:
            setattr(parent, name, layer.train(parent.training))


@contextlib.contextmanager
def without_padding(model: SentenceTransformer) -> Iterator[list[Transformer]]:
    """Let the texts of a call go through an encoder as one row of tokens, as with flash attention; yields which do.

    Attention alone takes texts apart. Where a trial with short texts shows that more changes, the encoder stays as it is.
    """
    with contextlib.ExitStack() as undo:
        yield [transformer for transformer in encoders_of(model) if _unpad(transformer, undo)]


def _unpad(transformer: Transformer, undo: contextlib.ExitStack) -> bool:
    encoder, kind, training = transformer.model, attention_of(transformer.model), transformer.training
    has_windows = getattr(encoder.config, "sliding_window", None) is not None
    if isinstance(transformer, PackedTransformer) or kind != "sdpa" or has_windows:
        return False
    padded, unpadded = _encode(transformer.eval()), False
    with contextlib.ExitStack() as changes, contextlib.suppress(NotImplementedError):  # of attend_apart
        encoder.set_attn_implementation(_ATTENTION)
        changes.callback(encoder.set_attn_implementation, kind)
        changes.callback(transformer.register_forward_pre_hook(_one_row).remove)
        changes.callback(transformer.register_forward_hook(_padded_again).remove)
        unpadded = bool((F.cosine_similarity(_encode(transformer), padded, dim=-1) > 0.999).all())
        if unpadded:
            undo.push(changes.pop_all())
    transformer.train(training)
    return unpadded


def _one_row(module: nn.Module, args: tuple[dict[str, Any]]) -> tuple[dict[str, Any]]:
    """Padded texts (N×L) as one row of their tokens, with where each begins."""
    features: dict[str, Any] = {**args[0]}
    mask = features.pop("attention_mask").bool()
    tokens: dict[str, Any] = {key: features[key][mask][None] for key in features if key in ("input_ids", "token_type_ids")}
    positions = (mask.cumsum(dim=1) - 1)[mask][None]
    begins = F.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0)).int()
    return ({**features, **tokens, "position_ids": positions, "cu_seq_lens_q": begins, "padded": args[0]},)


def _padded_again(module: nn.Module, args: tuple[dict[str, Any]], output: dict[str, Any]) -> dict[str, Any]:
    """The token embeddings of :func:`_one_row` in the places of the padded texts' tokens."""
    features, tokens = args[0]["padded"], output["token_embeddings"][0]
    mask = features["attention_mask"].bool()[..., None]
    padded = tokens.new_zeros(*mask.shape[:2], tokens.shape[-1]).masked_scatter(mask, tokens)
    return {**features, "token_embeddings": padded}


def attend_apart(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of each text to itself, of several in a row (1×heads×tokens×d); ``cu_seq_lens_q`` says where they begin."""
    begins = kwargs.pop("cu_seq_lens_q")
    if any(kwargs.get(name) is not None for name in ("position_bias", "softcap")):
        raise NotImplementedError("texts with a position bias or a soft cap must be padded")
    dtype = value.dtype  # in bfloat16 PyTorch's attention takes a CPU longer than in float32
    states = [each.float() if dtype == torch.bfloat16 else each for each in (query, key, value)]
    texts = zip(*(each.split(begins.diff().tolist(), dim=2) for each in states))
    with torch.autocast("cpu", enabled=False):
        outputs = [sdpa_attention_forward(module, *text, None, **kwargs)[0] for text in texts]
    return torch.cat(outputs, dim=1).to(dtype), None


AttentionInterface.register(_ATTENTION, attend_apart)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


@torch.no_grad()
def _encode(transformer: Transformer) -> Tensor:
    """Token embeddings (tokens×d) of texts of different lengths, encoded together."""
    features = transformer.preprocess(["a short text", "and another one, which is longer", "one"])
    tokens: Tensor = transformer(features)["token_embeddings"]
    return tokens[features["attention_mask"].bool()]
