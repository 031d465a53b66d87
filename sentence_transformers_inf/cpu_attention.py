"""Attention for training on a CPU: texts without padding, and products in bfloat16.

Sentence Transformers flattens inputs, all texts of a batch in one row of tokens without padding, where there is flash
attention, which means on GPUs. But all of a transformer except its attention works on tokens one by one, on any device. Here
the texts are taken apart for attention alone, those of like lengths together, and put back after it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from sentence_transformers_inf.losses.instruction_contrastive import cheapest_cuts
from sentence_transformers_inf.modules import InstructionTransformer, encoders_of

PRODUCTS_UP_TO = 512
"""Tokens of a text up to which :func:`attend_on_cpu` keeps attention weights in bfloat16, 6 MiB a layer with 12 heads."""

GROUP_TOKENS = 1024
"""Tokens, padding included, of the texts that :func:`attend_on_cpu` pads to one length."""

_NAME = "attend_on_cpu"


def attend_on_cpu(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for training on a CPU, with transformers' shapes: query, key and value batch×heads×tokens×d, to
    batch×tokens×heads×d; the mask is added to the scores.

    In float32 it is PyTorch's fused attention. In bfloat16, where that takes longer than in float32, texts of at most
    :data:`PRODUCTS_UP_TO` tokens take two products and a softmax between them that takes and gives bfloat16 and sums in
    float32; longer ones, whose weights would fill the memory, and what has dropout, a position bias or shared keys take the
    fused one in float32.

    With ``cu_seq_lens_q``, which says where texts begin in one row of tokens (a batch of 1), each attends to itself alone.

    Raises:
        NotImplementedError: Texts in one row, and a position bias or a soft cap, which would be left out.
    """
    changed_scores = any(kwargs.get(name) is not None for name in ("position_bias", "softcap"))
    dropout = kwargs.get("dropout") or 0.0
    if cu_seq_lens_q is not None:
        if changed_scores:
            raise NotImplementedError("texts with a position bias or a soft cap must be padded")
        return _attend_apart(query, key, value, scaling, dropout, cu_seq_lens_q), None
    if changed_scores or dropout or query.shape[1] != key.shape[1] or not _as_products(value):
        lower = value.dtype == torch.bfloat16
        mask = attention_mask.float() if lower and attention_mask is not None else attention_mask
        with torch.autocast(query.device.type, enabled=False):
            given = (states.float() if lower else states for states in (query, key, value))
            return sdpa_attention_forward(module, *given, mask, scaling=scaling, **kwargs)
    return _products(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None


def _as_products(value: Tensor) -> bool:
    """Whether products take the place of the fused attention; queries and keys may be in float32, from rotary embeddings."""
    return value.dtype == torch.bfloat16 and value.shape[2] <= PRODUCTS_UP_TO


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    scores, scale = query @ key.transpose(-1, -2), query.shape[-1] ** -0.5 if scaling is None else scaling
    if mask is None:
        scores = scores * scale
    else:  # in one pass over the scores; float32's lowest value would be infinite, and where all is masked not a number
        scores = torch.add(mask.to(scores.dtype).clamp_min(torch.finfo(scores.dtype).min), scores, alpha=scale)
    return scores.softmax(dim=-1) @ value


def _attend_apart(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, begins: Tensor
) -> Tensor:
    """Attention of each text to itself, of several in one row of tokens: 1×heads×tokens×d to 1×tokens×heads×d."""
    _, heads, tokens, size = query.shape
    if key.shape[1] != heads:
        key, value = (states.repeat_interleave(heads // key.shape[1], dim=1) for states in (key, value))
    layout = _layout(tuple(begins.tolist()), heads)
    texts = (
        _Rows.apply(states[0].transpose(0, 1).reshape(tokens * heads, size), layout.rows, layout.back, None)
        for states in (query, key, value)
    )
    sizes = [count * heads * longest for count, longest in layout.shapes]
    outputs = []
    for (count, longest), mask, *group in zip(layout.shapes, layout.masks, *(states.split(sizes) for states in texts)):
        q, k, v = (states.view(count, heads, longest, size) for states in group)
        if _as_products(v) and not dropout:
            output = _products(q, k, v, mask, scaling)
        else:
            with torch.autocast(query.device.type, enabled=False):
                q, k, v = (states.float() if states.dtype == torch.bfloat16 else states for states in (q, k, v))
                bias = None if mask is None else mask.to(q.dtype)
                output = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scaling)
        outputs.append(output.reshape(-1, size).to(value.dtype))
    output = _Rows.apply(torch.cat(outputs), layout.back, layout.rows, layout.padding)
    return output.view(1, tokens, heads, size)


class _Rows(torch.autograd.Function):
    """Rows of a matrix (n×d) by index; ``back`` are those of the result whose gradients are the gradients of each row given,
    but for the rows ``without``, which get none."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor, back: Tensor, without: Tensor | None) -> Tensor:
        ctx.back, ctx.without = back, without
        return states.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradient.index_select(0, ctx.back)
        if ctx.without is not None:
            gradient.index_fill_(0, ctx.without, 0)
        return gradient, None, None, None


class _Layout(NamedTuple):
    """Where the texts of one row of tokens go, in groups padded to one length, and back."""

    rows: Tensor  # of each place in count×heads×longest, group by group, its row in tokens×heads; in padding any of its text
    back: Tensor  # of each row in tokens×heads, its place
    padding: Tensor  # the places that hold padding
    shapes: list[tuple[int, int]]  # count and longest of each group
    masks: list[Tensor | None]  # count×1×1×longest, what is added to the scores; None without padding


@functools.lru_cache(maxsize=4)  # all layers of a pass have the same, and so does its backward pass with checkpointing
def _layout(begins: tuple[int, ...], heads: int) -> _Layout:
    starts = torch.tensor(begins)
    lengths = starts.diff()
    lengths, order = lengths.sort(descending=True, stable=True)
    starts = starts[order]
    rows, real, shapes, masks = [], [], [], []
    for begin, end in cheapest_cuts(lengths.tolist(), GROUP_TOKENS):
        position = torch.arange(int(lengths[begin]))
        here = position < lengths[begin:end, None]  # count×longest
        token = torch.where(here, starts[begin:end, None] + position, starts[begin:end, None])
        rows.append((token[:, None] * heads + torch.arange(heads)[:, None]).flatten())
        real.append(here[:, None].expand(-1, heads, -1).flatten())
        shapes.append((end - begin, len(position)))
        blocked = torch.zeros(here.shape).masked_fill_(~here, -torch.inf)[:, None, None]
        masks.append(None if bool(here.all()) else blocked)
    places, holds = torch.cat(rows), torch.cat(real)
    back = torch.empty(begins[-1] * heads, dtype=torch.long)
    back[places[holds]] = holds.nonzero().flatten()
    return _Layout(places, back, (~holds).nonzero().flatten(), shapes, masks)


AttentionInterface.register(_NAME, attend_on_cpu)
AttentionMaskInterface.register(_NAME, eager_mask)


def use_cpu_attention(model: SentenceTransformer, bf16: bool) -> list[InstructionTransformer]:
    """Let the encoders on a CPU that have ``sdpa`` attention use :func:`attend_on_cpu`, without padding where that changes
    nothing.

    Args:
        model: Changed in place.
        bf16: Whether it is trained in bfloat16. In float32, encoders that must have padding stay as they are.

    Returns:
        The encoders that were changed, for :func:`use_sdpa_again`.
    """
    changed = []
    for encoder in encoders_of(model):
        if encoder.model.device.type != "cpu" or encoder.model.config._attn_implementation != "sdpa":
            continue
        encoder.model.set_attn_implementation(_NAME)
        changed.append(encoder)
        if not _unpad(encoder) and not bf16:
            use_sdpa_again([changed.pop()])
    return changed


def use_sdpa_again(encoders: list[InstructionTransformer]) -> None:
    """Undo :func:`use_cpu_attention`."""
    for encoder in encoders:
        encoder.model.set_attn_implementation("sdpa")
        encoder.unpad_inputs = encoder.unpad_inputs  # what is set there is looked at anew


def _unpad(encoder: InstructionTransformer) -> bool:
    """Let an encoder flatten its inputs, as Sentence Transformers does for flash attention, if that changes nothing."""
    windowed = getattr(encoder.model.config.get_text_config(), "sliding_window", None) is not None
    plain = all(modality["method"] == "forward" for modality in encoder.modality_config.values())
    if encoder.pack or encoder.unpad_inputs is False or windowed or not plain:
        return False
    padded = _tokens(encoder)
    encoder.data_collator = DataCollatorWithFlattening(
        return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
    )
    if encoder.model_forward_params is not None:
        encoder.model_forward_params |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
    encoder._flatten_position_offset = encoder._infer_flatten_position_offset()
    encoder.can_flatten_inputs = True
    # A causal model, or one that does not hand on where texts begin, encodes something else now.
    try:
        similar = torch.nn.functional.cosine_similarity(_tokens(encoder), padded, dim=-1)
        encoder.can_flatten_inputs = bool((similar > 0.999).all())
    except NotImplementedError:  # of attend_on_cpu
        encoder.can_flatten_inputs = False
    return encoder.can_flatten_inputs


@torch.no_grad()
def _tokens(encoder: InstructionTransformer) -> Tensor:
    """Token embeddings (tokens×d) of texts of different lengths, encoded together, without dropout."""
    training = encoder.training
    features = encoder.eval().preprocess(["a short text", "and another one, which is longer", "one"])
    try:
        features = encoder(features)
    finally:
        encoder.train(training)
    embeddings: Tensor = features["token_embeddings"]
    if "cu_seq_lens_q" in features:
        return embeddings[0]
    return embeddings[features["attention_mask"].bool()]
