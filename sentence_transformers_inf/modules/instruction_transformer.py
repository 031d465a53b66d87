"""Let instruction and query meet in the prompt: one string, one encoder pass (Zhuang et al. 2025, §4, "concatenation").

:class:`InstructionTransformer` is Sentence Transformers' ``Transformer`` that also takes
``{"instruction": ..., "query": ...}`` inputs and joins them by a template before tokenisation. Nothing else of the model
changes: plain strings (passages, bare queries) go the way they always went, and a saved model is an ordinary Sentence
Transformers folder with one more file, ``instruction_config.json``, which holds the template and the length limit.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from sentence_transformers_inf.modules.instruction_query_attention import KINDS, InstructionQueryAttention

logger = logging.get_logger(__name__)

DEFAULT_TEMPLATE = "{query} {instruction}"
"""The order of the paper (§4) and of MTEB's instruction tasks."""


def separated_template(tokenizer: Any) -> str:
    """The default template with the tokenizer's separator in the middle (``"{query} [SEP] {instruction}"`` for BERT).

    A model can then tell an instruction from a query's own words. Where the tokenizer has no separator, as those of most
    decoders, the default template.
    """
    separator = getattr(tokenizer, "sep_token", None)
    return DEFAULT_TEMPLATE if separator is None else f"{{query}} {separator} {{instruction}}"


CONFIG_FILE = "instruction_config.json"

_INSTRUCTIONS_KEPT = 1000
"""Instructions whose token embeddings are kept while serving; at 30 tokens of 384 dimensions in float32, 46 MB."""


def check_template(template: str) -> str:
    """Return ``template`` if it has the fields ``{instruction}`` and ``{query}`` and no other.

    Raises:
        ValueError: A field is missing or unknown, or the braces do not parse.
    """
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"template {template!r} is not a format string: {error}") from error
    # Neither format specifications nor conversions: a template may come from somebody else's checkpoint.
    if sorted(parts) != [("instruction", "", None), ("query", "", None)]:
        raise ValueError(
            f"template {template!r} must hold {{instruction}} and {{query}} once each and no other field, "
            f"for example {DEFAULT_TEMPLATE!r}"
        )
    return template


class InstructionTransformer(Transformer):
    """A ``Transformer`` whose inputs may be ``{"instruction": str, "query": str}`` as well as strings.

    Args:
        *args: As for Sentence Transformers' ``Transformer``.
        template: How instruction and query become one string; must hold both fields.
        max_query_length: Token limit of instructed queries, special tokens included. ``None``: the model's
            ``max_seq_length``, which stays the limit of plain strings (passages). Where an instructed query is too
            long, the instruction is cut and the query survives.
        pack: Encode instruction and query apart, for
            :class:`~sentence_transformers_inf.modules.InstructionQueryAttention`, and not as one string by the template.
        **kwargs: As for Sentence Transformers' ``Transformer``.

    Raises:
        ValueError: The template lacks a field.

    A missing, ``None`` or blank instruction gives the bare query, exactly as if the query string had been passed.
    With ``pack``, the token embeddings of instructions are kept (a thousand at most) while no gradients are wanted, so that
    one that comes again is not encoded again.

    Most users want :func:`~sentence_transformers_inf.load_instruction_model`, which turns any SentenceTransformer into one
    with this module.
    """

    def __init__(
        self,
        *args: Any,
        template: str = DEFAULT_TEMPLATE,
        max_query_length: int | None = None,
        pack: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.template = check_template(template)
        self.max_query_length = max_query_length
        self.pack = pack
        self._kept = (None, {})

    _kept: tuple[Any, dict[tuple[int, ...], Tensor]]

    @classmethod
    def from_transformer(
        cls,
        transformer: Transformer,
        template: str = DEFAULT_TEMPLATE,
        max_query_length: int | None = None,
        pack: bool = False,
    ) -> InstructionTransformer:
        """An :class:`InstructionTransformer` over the weights and tokenizer of ``transformer``, shared and not copied."""
        module = _empty_instruction_transformer()
        module.__dict__.update(transformer.__dict__)
        module.template = check_template(template)
        module.max_query_length = max_query_length
        module.pack = pack
        module._kept = (None, {})
        if getattr(module.model, "_hf_peft_config_loaded", False):
            from sentence_transformers_inf.modules.lora import fuse_lora

            fuse_lora(module.model)
        return module

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> InstructionTransformer:  # type: ignore[override]
        """As ``Transformer.load``; the template is not read (see :func:`~sentence_transformers_inf.load_instruction_model`).

        A subfolder on disk is loaded as a folder: of a LoRA in a subfolder, transformers seeks the base in that subfolder.
        """
        if subfolder and Path(model_name_or_path, subfolder).is_dir():
            model_name_or_path, subfolder = str(Path(model_name_or_path, subfolder)), ""
        return super().load(model_name_or_path, subfolder=subfolder, **kwargs)

    def join(self, instruction: str | None, query: str) -> str:
        """The one string that is encoded for an instruction and a query; the bare query if the instruction is blank."""
        if instruction is None or not instruction.strip():
            return query
        return self.template.format(instruction=instruction, query=query)

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Tokenise a batch of strings and ``{"instruction", "query"}`` inputs, mixed as they come.

        Returns:
            The features of ``Transformer.preprocess``. A batch of instructed queries alone also carries its texts under
            ``"instruction"`` and ``"query"`` (lists of str) and its ``"prompt"``, from which the losses make further
            candidates. With ``pack``, a row holds the query's tokens and then the instruction's, and ``"instruction_mask"``
            (of the same shape) is 1 where the latter are.

        Raises:
            TypeError: An input is neither a string nor such a mapping; the message names its position.
        """
        instructed = check_inputs(inputs)
        if not any(instructed):
            return super().preprocess(inputs, prompt=prompt, **kwargs)
        if all(instructed):
            return self._preprocess_instructed(inputs, prompt, **kwargs)
        # Each kind has a length limit of its own: tokenise them apart, then put the rows back in order.
        queries = [item for item, is_instructed in zip(inputs, instructed) if is_instructed]
        strings = [item for item, is_instructed in zip(inputs, instructed) if not is_instructed]
        features = self._preprocess_instructed(queries, prompt, **kwargs)
        string_features = super().preprocess(strings, prompt=prompt, **kwargs)
        query_rows, string_rows = _unpadded_rows(features), _unpadded_rows(string_features)
        rows = [(query_rows if is_instructed else string_rows).pop(0) for is_instructed in instructed]
        shared = {key: value for key, value in string_features.items() if key in ("modality", "prompt_length")}
        return {**self._pad(rows), **shared}

    def _should_flatten_inputs(self, *args: Any, **kwargs: Any) -> bool:
        return not self.pack and super()._should_flatten_inputs(*args, **kwargs)

    def _preprocess_instructed(
        self, inputs: Sequence[Mapping[str, str | None]], prompt: str | None, **kwargs: Any
    ) -> dict[str, Any]:
        limit = kwargs.pop("max_length", None) or self.max_query_length or self.max_seq_length
        kwargs["max_length"] = limit
        if self.pack:
            features = self._preprocess_packed(inputs, prompt, **kwargs)
        else:
            features = self._preprocess_joined(inputs, prompt, limit, **kwargs)
        features["instruction"] = [item.get("instruction") or "" for item in inputs]
        features["query"] = [item["query"] for item in inputs]
        if prompt is not None:
            features["prompt"] = prompt
        return features

    def _preprocess_packed(
        self, inputs: Sequence[Mapping[str, str | None]], prompt: str | None, **kwargs: Any
    ) -> dict[str, Any]:
        """Query and instruction tokenised apart, each within the limit, and put into one row."""
        features = super().preprocess([item["query"] for item in inputs], prompt=prompt, **kwargs)
        instructed = [row for row, item in enumerate(inputs) if (item.get("instruction") or "").strip()]
        rows = [row | {"instruction_mask": [0] * len(row["input_ids"])} for row in _unpadded_rows(features)]
        if instructed:
            told = super().preprocess([inputs[row]["instruction"] for row in instructed], **kwargs)
            for row, tokens in zip(instructed, _unpadded_rows(told)):
                tokens["instruction_mask"] = [1] * len(tokens["input_ids"])
                rows[row] = {key: values + tokens[key] for key, values in rows[row].items()}
        return {**features, **self._pad(rows)}

    def _pad(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Rows of tokens as tensors, on the tokenizer's side padded to the longest."""
        tokenizer = self.tokenizer
        assert tokenizer is not None
        fill = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id}
        return {
            key: pad_sequence(
                [torch.tensor(row.get(key, [0] * len(row["input_ids"]))) for row in rows],
                batch_first=True,
                padding_value=fill.get(key, 0),
                padding_side=tokenizer.padding_side,
            )
            for key in dict.fromkeys(key for row in rows for key in row)
        }

    def _preprocess_joined(
        self, inputs: Sequence[Mapping[str, str | None]], prompt: str | None, limit: int | None, **kwargs: Any
    ) -> dict[str, Any]:
        texts = [self.join(item.get("instruction"), item["query"]) for item in inputs]  # type: ignore[arg-type]
        features = super().preprocess(texts, prompt=prompt, **kwargs)
        if "input_ids" in features and limit is not None:
            # Only a row that fills the limit can have been truncated.
            full = (text_lengths(features) >= limit).nonzero().flatten().tolist()
            shortened = {row: self._shorten(inputs[row], prompt, limit) for row in full}
            if any(shortened[row] != texts[row] for row in full):
                logger.warning_once(
                    f"Some instructed queries are longer than {limit} tokens: their instructions are cut and their "
                    "queries kept. Raise max_query_length (or max_seq_length) if the model allows it."
                )
                texts = [shortened.get(row, text) for row, text in enumerate(texts)]
                features = super().preprocess(texts, prompt=prompt, **kwargs)
        return features

    def _shorten(self, item: Mapping[str, str | None], prompt: str | None, limit: int) -> str:
        """The longest joined string within ``limit`` tokens that keeps the query whole, by cutting the instruction."""
        instruction, query = item.get("instruction") or "", item["query"] or ""

        tokenizer = self.tokenizer
        assert tokenizer is not None

        def tokens(text: str) -> int:
            return len(tokenizer((prompt or "") + text, truncation=False, verbose=False)["input_ids"])

        if tokens(self.join(instruction, query)) <= limit:
            return self.join(instruction, query)
        # Whole words only, found by bisection: the token count grows with every word.
        words = instruction.split()
        low, high = 0, len(words)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if tokens(self.join(" ".join(words[:middle]), query)) <= limit else (low, middle - 1)
        return self.join(" ".join(words[:low]), query)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """As ``Transformer.forward``; the texts that :meth:`preprocess` left for the losses are not the model's input."""
        if "query" in features:
            features = {key: value for key, value in features.items() if key not in ("instruction", "query", "prompt")}
        if "instruction_mask" not in features:
            return super().forward(features, **kwargs)
        return self._forward_packed(dict(features), **kwargs)

    def _forward_packed(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Queries and instructions apart, in a pass each that is as wide as its longest: queries are the shorter ones.

        ``token_embeddings`` and ``attention_mask`` are then the queries' (N rows), ``instruction_embeddings`` and
        ``instruction_attention_mask`` those of the rows ``instruction_rows``.
        """
        tokens = features["attention_mask"] != 0
        told = tokens & (features.pop("instruction_mask") != 0)
        rows = told.any(dim=1).nonzero().flatten()
        parts = torch.cat([tokens & ~told, told[rows]])  # which tokens of the packed rows are whose
        source = torch.cat([torch.arange(len(tokens), device=rows.device), rows])
        lengths = parts.sum(dim=1)
        width = int(lengths.max())
        order = torch.argsort(parts.int(), dim=1, descending=True, stable=True)[:, :width]
        mask = (torch.arange(width, device=rows.device) < lengths[:, None]).to(features["attention_mask"].dtype)
        # A batch repeats queries and, above all, instructions: each is encoded once.
        texts = features["input_ids"][source].gather(1, order).masked_fill(mask == 0, -1)
        distinct, which = torch.unique(texts, dim=0, return_inverse=True)
        places = torch.arange(len(texts), device=rows.device)
        first = places.new_full((len(distinct),), len(texts)).scatter_reduce(0, which, places, "amin")
        count = len(tokens)
        kept = self._kept_instructions()
        told_texts = (first >= count).nonzero().flatten().tolist() if kept is not None else []
        names = {number: tuple(distinct[number][distinct[number] >= 0].tolist()) for number in told_texts}
        found = {number: kept[name] for number, name in names.items() if kept is not None and name in kept}
        packed: dict[str, Tensor] = {
            key: features[key][source].gather(1, order) for key in ("input_ids", "token_type_ids") if key in features
        }
        apart = {key: value for key, value in features.items() if not isinstance(value, Tensor)}
        is_new = torch.tensor([number not in found for number in range(len(distinct))], device=rows.device)
        encoded: list[tuple[Tensor, Tensor]] = []  # which of the distinct texts, and their token embeddings
        for group in (first < count, (first >= count) & is_new):
            chosen = group.nonzero().flatten()
            if len(chosen):
                texts_of = first[chosen]
                longest = int(lengths[texts_of].max())
                inputs = {key: value[texts_of, :longest] for key, value in packed.items()}
                inputs["attention_mask"] = mask[texts_of, :longest]
                encoded.append((chosen, super().forward({**apart, **inputs}, **kwargs)["token_embeddings"]))
        size, like = encoded[0][1].shape[-1], encoded[0][1]
        embeddings = like.new_zeros(len(distinct), width, size)
        for chosen, of_group in encoded:
            embeddings = embeddings.index_copy(0, chosen, F.pad(of_group, (0, 0, 0, width - of_group.shape[1])))
        for number, tokens_of in found.items():
            embeddings[number, : len(tokens_of)] = tokens_of
        if kept is not None:
            for number, name in names.items():
                kept[name] = embeddings[number, : int(mask[first[number]].sum())].clone()
            while len(kept) > _INSTRUCTIONS_KEPT:
                del kept[next(iter(kept))]
        embeddings = embeddings[which]
        features |= {"token_embeddings": embeddings[:count], "attention_mask": mask[:count]}
        if len(rows):
            features |= {"instruction_rows": rows, "instruction_embeddings": embeddings[count:]}
            features["instruction_attention_mask"] = mask[count:]
        return features

    def train(self, mode: bool = True) -> InstructionTransformer:
        """As ``Module.train``."""
        if mode:
            self._kept = (None, {})
        return super().train(mode)

    def _kept_instructions(self) -> dict[tuple[int, ...], Tensor] | None:
        """Token embeddings of instructions seen before, by their tokens: at serving time few are used again and again.

        ``None`` where gradients are wanted. They go when the weights change: with :meth:`train`, because a fused
        optimizer leaves no trace in the weights' versions, and when versions, device or precision are others.
        """
        if torch.is_grad_enabled() or self.training:
            return None
        weight = next(self.model.parameters())
        state = (weight.device, weight.dtype, sum(weight._version for weight in self.model.parameters()))
        if self._kept[0] != state:
            self._kept = (state, {})
        return self._kept[1]

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """As ``Transformer.save``, and ``instruction_config.json`` with the template and length limit beside it."""
        super().save(output_path, *args, safe_serialization=safe_serialization, **kwargs)
        config = {"template": self.template, "max_query_length": self.max_query_length, "pack": self.pack}
        Path(output_path, CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty_instruction_transformer, (), {**self.__dict__, "_kept": (None, {})}


def _empty_instruction_transformer() -> InstructionTransformer:
    return InstructionTransformer.__new__(InstructionTransformer)


# Sentence Transformers writes a module's class name into modules.json and imports that name on loading. The weights and
# files of this module are those of its parent, so it is saved under its parent's name: a machine without this package
# then loads the folder as it is. Pickling (multi-process encoding, deepcopy) goes by __reduce__ and is not affected.
InstructionTransformer.__module__ = Transformer.__module__
InstructionTransformer.__name__ = Transformer.__name__


def check_inputs(inputs: Sequence[Any]) -> list[bool]:
    """Which inputs of a batch are ``{"instruction", "query"}`` mappings; the others are strings or, if all, what else a
    ``Transformer`` takes.

    Raises:
        TypeError: An input is neither; the message names its position.
    """
    instructed = [isinstance(item, Mapping) and ("query" in item or "instruction" in item) for item in inputs]
    for position, (item, is_instructed) in enumerate(zip(inputs, instructed)):
        if is_instructed:
            _check_instructed(position, item)
        elif not isinstance(item, str) and (any(instructed) or item is None or isinstance(item, (bool, int, float, bytes))):
            raise TypeError(
                f"input {position} is of type {type(item).__name__}: expected a string or a dictionary "
                '{"instruction": str, "query": str}'
            )
    return instructed


def _check_instructed(position: int, item: Mapping[str, Any]) -> None:
    if unknown := sorted(set(item) - {"instruction", "query"}):
        raise TypeError(f"input {position} has the unknown key {unknown[0]!r}: expected 'instruction' and 'query'")
    if not isinstance(item.get("query"), str):
        raise TypeError(f"input {position} has no query: expected {{'instruction': str, 'query': str}}, got {item!r:.200}")
    if not isinstance(item.get("instruction"), (str, type(None))):
        raise TypeError(f"input {position}: the instruction is of type {type(item['instruction']).__name__}, not str")


def text_lengths(features: Mapping[str, Any]) -> Tensor:
    """The number of tokens of each text (N) of tokenised features, padded or flattened."""
    return features["cu_seq_lens_q"].diff() if "cu_seq_lens_q" in features else features["attention_mask"].sum(dim=1)


def _unpadded_rows(features: Mapping[str, Any]) -> list[dict[str, list[int]]]:
    """The rows of tokenised features, as the lists that ``tokenizer.pad`` takes."""
    if "cu_seq_lens_q" in features:
        texts = [ids.tolist() for ids in features["input_ids"][0].split(text_lengths(features).tolist())]
        return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in texts]
    keys = [key for key in ("input_ids", "token_type_ids", "attention_mask", "instruction_mask") if key in features]
    masks = features["attention_mask"].bool()
    return [
        {key: features[key][row][mask].tolist() for key in keys}  # padding on either side falls away
        for row, mask in enumerate(masks)
    ]


def take_instructions(
    modules: nn.Sequential,
    template: str | None = None,
    max_query_length: int | None = None,
    interaction: str | None = None,
) -> None:
    """Change modules in place so that they take ``{"instruction", "query"}`` inputs; ``None`` leaves a setting as it is.

    Args:
        modules: Those of a SentenceTransformer, or of a route of a ``Router``: a ``Transformer``, its pooling, and the rest.
        template: See :func:`~sentence_transformers_inf.load_instruction_model`, as for the further arguments.
        max_query_length: The same.
        interaction: The same.

    Raises:
        ValueError: They do not begin with a Transformer, or, for attention, there is no pooling after it.
    """
    first, second = modules[0], modules[1] if len(modules) > 1 else None
    if not isinstance(first, Transformer):
        raise ValueError(
            f"the model begins with a {type(first).__name__} module; instructions can be joined to queries only in a "
            "model that begins with a Transformer"
        )
    if isinstance(first, InstructionTransformer):
        template, max_query_length = template or first.template, max_query_length or first.max_query_length
    if interaction in KINDS and not (isinstance(second, InstructionQueryAttention) and second.kind == interaction):
        if not isinstance(second, Pooling):
            raise ValueError("attention takes the place of the pooling, and the model has none after its Transformer")
        device = next(first.parameters()).device
        modules[1] = InstructionQueryAttention(str(interaction), **second.get_config_dict()).to(device)
    elif interaction == "concatenation" and isinstance(second, InstructionQueryAttention):
        modules[1] = Pooling(**second.get_config_dict())
    modules[0] = InstructionTransformer.from_transformer(
        first,
        template=template or DEFAULT_TEMPLATE,
        max_query_length=max_query_length,
        pack=len(modules) > 1 and isinstance(modules[1], InstructionQueryAttention),
    )
