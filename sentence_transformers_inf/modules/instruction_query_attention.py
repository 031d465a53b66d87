"""Let instruction and query meet in cross-attention (Zhuang et al. 2025, §4, "attention").

Instruction and query are encoded apart by the same transformer (see
:class:`~sentence_transformers_inf.modules.PackedTransformer`).
:class:`InstructionQueryAttention` takes the place of the pooling: rows with an instruction are pooled with it, all others
(passages, bare queries) as they always were.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sentence_transformers_inf.modules.saved_as import saved_as

CONFIG_FILE = "instruction_query_attention.json"

KINDS = ("paper", "gated")
"""How an instruction acts on its query; see :class:`InstructionQueryAttention`."""


@saved_as(Pooling)
class InstructionQueryAttention(Pooling):
    """Pooling of a query's tokens under an instruction; without one, the pooling that it takes the place of.

    Args:
        kind: ``"paper"``: with the instruction's tokens H_I (n×d) and the query's H_Q (m×d), the mean over the n rows of
            softmax(H_I H_Qᵀ / √d) H_Q, the paper's form. It has no weights, and the query's own pooling is not in it.
            ``"gated"``: the query's pooled embedding, plus d times a gate (d, zero at first) times the mean of the
            instruction's tokens attending to the query's and of the query's attending to the instruction's (multi-head,
            with learned projections that begin as the identity): at first the model is the base model.
        heads: Attention heads of ``"gated"``; must divide d. ``None``: heads of 64, or one.
        **pooling: Settings of Sentence Transformers' ``Pooling``.

    Raises:
        ValueError: An unknown kind, or ``heads`` does not divide d.
    """

    def __init__(self, kind: str, heads: int | None = None, **pooling: Any) -> None:
        super().__init__(**pooling)
        if kind not in KINDS:
            raise ValueError(f"unknown kind of attention {kind!r}; there are {', '.join(KINDS)}")
        self.kind = kind
        size = self.get_embedding_dimension()
        self.heads = heads or (size // 64 if size % 64 == 0 else 1)
        if size % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the embedding dimension {size}")
        if kind == "gated":
            self.instruction_to_query = _CrossAttention(size, self.heads)
            self.query_to_instruction = _CrossAttention(size, self.heads)
            self.gate = nn.Parameter(torch.zeros(size))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Pool a batch of N rows into ``sentence_embedding`` (N×d).

        Args:
            features: ``token_embeddings`` (N×m×d) and ``attention_mask`` (N×m) of queries or passages, and, of the K rows
                ``instruction_rows`` that have an instruction, ``instruction_embeddings`` (K×n×d) and
                ``instruction_attention_mask`` (K×n).
            **kwargs: For the pooling.

        Returns:
            The features, and ``query_embedding`` (N×d), the pooled embeddings without the instructions.
        """
        features = super().forward(features, **kwargs)
        features["query_embedding"] = features["sentence_embedding"]
        if "instruction_rows" not in features:
            return features
        rows = features["instruction_rows"]
        pooled = features["sentence_embedding"]
        combined = self.combine(
            pooled[rows],
            features["token_embeddings"][rows],
            features["attention_mask"][rows],
            features["instruction_embeddings"],
            features["instruction_attention_mask"],
        )
        features["sentence_embedding"] = pooled.index_copy(0, rows, combined.to(pooled.dtype))
        return features

    def combine(
        self, pooled: Tensor, query: Tensor, query_mask: Tensor, instruction: Tensor, mask: Tensor, all_pairs: bool = False
    ) -> Tensor:
        """The embeddings (K×d) of K queries under their instructions, or (Q×A×d) of Q queries under each of A instructions.

        Args:
            pooled: K×d, the queries' pooled embeddings.
            query: K×m×d, their token embeddings.
            query_mask: K×m, 1 where there is a token.
            instruction: K×n×d, the instructions' token embeddings.
            mask: K×n.
            all_pairs: Every query with every instruction, and not row by row.
        """
        if self.kind == "paper":
            read = _attend(instruction, mask, query, query_mask, query, 1, all_pairs)
            return read.transpose(0, 1) if all_pairs else read
        read = self.instruction_to_query(instruction, mask, query, query_mask, all_pairs)
        heard = self.query_to_instruction(query, query_mask, instruction, mask, all_pairs)
        # Adam moves every weight by about the learning rate, and a row of d of them what comes out by up to d times as much:
        # the factor lets the gate, one weight for each dimension, keep up.
        gate = len(self.gate) * self.gate
        return (pooled[:, None] + gate * (read.transpose(0, 1) + heard)) if all_pairs else pooled + gate * (read + heard)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """As ``Pooling.save``, and beside it the kind and, of ``"gated"``, the weights."""
        super().save(output_path, *args, safe_serialization=safe_serialization, **kwargs)
        settings = {"kind": self.kind, "heads": self.heads}
        Path(output_path, CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if self.kind == "gated":
            self.save_torch_weights(output_path, safe_serialization=True)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> InstructionQueryAttention:  # type: ignore[override]
        """Load what :meth:`save` wrote, from a folder or the Hub; of what ``Pooling`` wrote, a ``Pooling``."""
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        place = {name: kwargs[name] for name in names if name in kwargs}
        settings = cls.load_config(model_name_or_path, config_filename=CONFIG_FILE, **place)
        if not settings:
            return Pooling.load(model_name_or_path, **place)
        module = cls(**settings, **cls.load_config(model_name_or_path, **place))
        if module.kind == "gated":
            cls.load_torch_weights(model_name_or_path, model=module, **place)
        return module


def embed_pairs(
    modules: nn.Sequential, encoded: Sequence[Mapping[str, Any]], query_at: Tensor, instruction_at: Tensor
) -> Tensor:
    """The embeddings (Q×A×d) of Q queries under each of A instructions, from tokens that were encoded once.

    Args:
        modules: Those that encoded the texts, an :class:`InstructionQueryAttention` second.
        encoded: The features of some batches of instructed queries, as the modules left them.
        query_at: Q, which of the texts of all batches have the queries.
        instruction_at: A, which of them have the instructions.
    """
    queries: list[tuple[Tensor, Tensor]] = []  # tokens and mask of each text's query
    instructions: dict[int, tuple[Tensor, Tensor]] = {}
    for features in encoded:
        start = len(queries)
        queries.extend(zip(features["token_embeddings"], features["attention_mask"]))
        if "instruction_rows" in features:
            tokens = zip(features["instruction_embeddings"], features["instruction_attention_mask"])
            instructions.update(zip((features["instruction_rows"] + start).tolist(), tokens))
    pooled = torch.cat([features["query_embedding"] for features in encoded])
    attention, *rest = list(modules)[1:]
    assert isinstance(attention, InstructionQueryAttention)
    embeddings = attention.combine(
        pooled[query_at],
        *_stack([queries[at] for at in query_at.tolist()]),
        *_stack([instructions[at] for at in instruction_at.tolist()]),
        all_pairs=True,
    )
    features = {"sentence_embedding": embeddings.flatten(0, 1)}
    for module in rest:
        features = module(features)
    return features["sentence_embedding"].unflatten(0, embeddings.shape[:2])


def _stack(texts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Tokens (n×d, of several n) and masks (n) in one tensor each, padded to the longest."""
    tokens, masks = zip(*texts)
    return pad_sequence(list(tokens), batch_first=True), pad_sequence(list(masks), batch_first=True)


class _CrossAttention(nn.Module):
    """Multi-head attention of one text's tokens to another's, averaged over the former.

    All projections begin as the identity: what the encoder's tokens mean to its pooling, they mean here from the start.
    """

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(size, size) for _ in range(4))
        for projection in (self.query, self.key, self.value, self.output):
            nn.init.eye_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, asking: Tensor, asking_mask: Tensor, asked: Tensor, asked_mask: Tensor, all_pairs: bool) -> Tensor:
        queries, keys, values = self.query(asking), self.key(asked), self.value(asked)
        return self.output(_attend(queries, asking_mask, keys, asked_mask, values, self.heads, all_pairs))


def _attend(
    queries: Tensor, query_mask: Tensor, keys: Tensor, key_mask: Tensor, values: Tensor, heads: int, all_pairs: bool
) -> Tensor:
    """The mean over a text's n tokens of softmax(queries keysᵀ / √e) values, in each head of size e.

    Args:
        queries: K×n×d, or A×n×d.
        query_mask: K×n, or A×n; 0 where there is no token.
        keys: K×m×d, or B×m×d.
        key_mask: K×m, or B×m.
        values: As ``keys``.
        heads: How many.
        all_pairs: All A·B pairs (A×B×d), and not row by row (K×d).
    """
    queries, keys, values = (tensor.unflatten(-1, (heads, -1)) for tensor in (queries, keys, values))
    scores = torch.einsum("anhe,bmhe->abhnm" if all_pairs else "knhe,kmhe->khnm", queries, keys)
    scores = (scores / math.sqrt(queries.shape[-1])).masked_fill((key_mask == 0)[:, None, None, :], -torch.inf)
    share = (query_mask != 0).to(scores.dtype)
    share = share / share.sum(dim=1, keepdim=True)
    # The mean of what the tokens read is what is read by their mean attention.
    weights = torch.einsum("abhnm,an->abhm" if all_pairs else "khnm,kn->khm", scores.softmax(dim=-1), share)
    return torch.einsum("abhm,bmhe->abhe" if all_pairs else "khm,kmhe->khe", weights, values).flatten(-2)
