"""Encode instruction and query apart, for the attention between them (Zhuang et al. 2025, §4, "attention")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from torch import Tensor

from sentence_transformers_inf.modules.instruction_transformer import InstructionTransformer
from sentence_transformers_inf.modules.saved_as import saved_as
from sentence_transformers_inf.modules.tokens import pad, unpad


@saved_as(Transformer)
class PackedTransformer(InstructionTransformer):
    """An :class:`~sentence_transformers_inf.modules.InstructionTransformer` that encodes instruction and query apart.

    One row of tokens holds both on the way from :meth:`preprocess` to :meth:`forward`. An
    :class:`~sentence_transformers_inf.modules.InstructionQueryAttention` after it takes the place of the pooling.
    """

    is_packed = True

    def preprocess_instructed(
        self, inputs: Sequence[Mapping[str, str | None]], prompt: str | None, **kwargs: Any
    ) -> dict[str, Any]:
        """Tokenise queries and instructions, each within the length limit.

        A row holds the query's tokens and then the instruction's; ``"instruction_mask"``, of the same shape, is 1 where the
        latter are.
        """
        kwargs["max_length"] = kwargs.pop("max_length", None) or self.max_query_length or self.max_seq_length
        features = Transformer.preprocess(self, [str(item["query"]) for item in inputs], prompt=prompt, **kwargs)
        instructed = [row for row, item in enumerate(inputs) if (item.get("instruction") or "").strip()]
        rows = [{**row, "instruction_mask": torch.zeros_like(row["input_ids"])} for row in unpad(features)]
        if instructed:
            instructions = Transformer.preprocess(self, [str(inputs[row]["instruction"]) for row in instructed], **kwargs)
            for row, tokens in zip(instructed, unpad(instructions)):
                tokens["instruction_mask"] = torch.ones_like(tokens["input_ids"])
                rows[row] = {key: torch.cat([value, tokens[key]]) for key, value in rows[row].items()}
        return {**features, **pad(rows, self.tokenizer)}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Encode each distinct query and each distinct instruction of a batch of N rows once.

        Returns:
            The features: ``token_embeddings`` and ``attention_mask`` of the N queries; of the K rows ``instruction_rows``
            that have an instruction, ``instruction_embeddings`` (K×n×d) and ``instruction_attention_mask`` (K×n).
        """
        if "instruction_mask" not in features:
            return super().forward(features, **kwargs)
        others = {key: value for key, value in features.items() if not isinstance(value, Tensor)}
        queries, instructions, instructed = [], [], []
        for row, text in enumerate(unpad(features)):
            is_instruction = text.pop("instruction_mask").bool()
            queries.append({key: value[~is_instruction] for key, value in text.items()})
            if is_instruction.any():
                instructed.append(row)
                instructions.append({key: value[is_instruction] for key, value in text.items()})
        tokens, mask = self._encode(queries, others, **kwargs)
        result = {**others, "token_embeddings": tokens, "attention_mask": mask}
        if instructed:
            tokens, mask = self._encode(instructions, others, **kwargs)
            result |= {"instruction_embeddings": tokens, "instruction_attention_mask": mask}
            result["instruction_rows"] = torch.tensor(instructed, device=mask.device)
        return result

    def _encode(self, texts: list[dict[str, Tensor]], others: dict[str, Any], **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The token embeddings (N×L×d) and attention mask (N×L) of texts, each distinct one encoded once.

        Padding is on the right, whatever the tokenizer's side: models with absolute positions count from the left.
        """
        keys = [tuple(text["input_ids"].tolist()) for text in texts]
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        place = {key: number for number, key in enumerate(first)}
        batch = pad([texts[row] for row in first.values()], self.tokenizer, "right")
        tokens = super().forward({**others, **batch}, **kwargs)["token_embeddings"]
        which = torch.tensor([place[key] for key in keys], device=tokens.device)
        return tokens[which], batch["attention_mask"][which]
