"""Training on a CPU in two thirds of the time: texts without padding.

It changes a model while it is trained, by public hooks, and puts everything back. Loss and gradients stay the same.
``benchmarks/train_step.py`` measures it.
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


@contextlib.contextmanager
def without_padding(model: SentenceTransformer) -> Iterator[bool]:
    """Let the texts of a call go through the encoders as one row of tokens, as with flash attention.

    Attention alone takes texts apart. Where a trial with short texts shows that more changes, an encoder stays as it is; on
    other devices all do. Yields whether all encoders go without padding.
    """
    with contextlib.ExitStack() as undo:
        on_cpu = model.device.type == "cpu"
        yield all([on_cpu and _unpad(transformer, undo) for transformer in encoders_of(model)])


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
