"""Tokenised texts: from the rows of a padded or flattened batch to texts one by one, and back into a padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

TOKEN_KEYS = ("input_ids", "token_type_ids", "attention_mask", "instruction_mask")
"""The features that hold one value for each token."""


def text_lengths(features: Mapping[str, Any]) -> Tensor:
    """The number of tokens of each text (N) of tokenised features, padded or flattened."""
    return features["cu_seq_lens_q"].diff() if "cu_seq_lens_q" in features else features["attention_mask"].sum(dim=1)


def unpad(features: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """The texts of a batch, each the features of :data:`TOKEN_KEYS` that it has, of its own length (views where padded).

    Args:
        features: Of ``preprocess``: padded on either side (N×L), or flattened (1×tokens, with ``cu_seq_lens_q``).
    """
    lengths = text_lengths(features).tolist()
    if "cu_seq_lens_q" in features:
        texts = features["input_ids"][0].split(lengths)
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in texts]
    mask = features["attention_mask"]
    left_padded = bool(mask[:, -1].all()) and not bool(mask[:, 0].all())
    width = mask.shape[1]
    places = [slice(width - length, width) if left_padded else slice(0, length) for length in lengths]
    keys = [key for key in TOKEN_KEYS if key in features]
    return [{key: features[key][row, place] for key in keys} for row, place in enumerate(places)]


def pad(texts: Sequence[Mapping[str, Tensor]], tokenizer: Any, side: str | None = None) -> dict[str, Tensor]:
    """Texts as one batch (N×L), padded to the longest.

    Args:
        texts: From :func:`unpad`. A feature that a text lacks is 0 for it.
        tokenizer: Whose padding tokens count.
        side: ``"left"`` or ``"right"``; ``None``: the tokenizer's.
    """
    fill = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id}
    keys = [key for key in TOKEN_KEYS if any(key in text for text in texts)]
    columns = {key: [text[key] if key in text else torch.zeros_like(text["input_ids"]) for text in texts] for key in keys}
    return {
        key: pad_sequence(
            values, batch_first=True, padding_value=fill.get(key, 0), padding_side=side or tokenizer.padding_side
        )
        for key, values in columns.items()
    }
