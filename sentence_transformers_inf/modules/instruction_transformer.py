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

from sentence_transformers.base.modules import Transformer
from transformers.utils import logging

from sentence_transformers_inf.modules.exclusions import find_exclusions
from sentence_transformers_inf.modules.saved_as import saved_as
from sentence_transformers_inf.modules.tokens import pad, text_lengths, unpad

logger = logging.get_logger(__name__)

DEFAULT_TEMPLATE = "{query} {instruction}"
"""The order of the paper (§4) and of MTEB's instruction tasks."""

CONFIG_FILE = "instruction_config.json"

TOKENIZER_KEY = "instruction_config"
"""Where the tokenizer's configuration has the same: a program that does not know the file saves it with the tokenizer."""

EXCLUSION_WEIGHT = 0.25
"""How much of the direction of what is excluded is subtracted from a query's, where a model does not say otherwise."""

TEXT_KEYS = ("text", "instruction", "query", "prompt")
"""Features that hold the strings of a batch, for the losses; no encoder gets them."""


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


@saved_as(Transformer)
class InstructionTransformer(Transformer):
    """A ``Transformer`` whose inputs may be ``{"instruction": str, "query": str}`` as well as strings.

    What such an input has under ``"exclude"``, a string or several, is subtracted from its embedding (see
    :mod:`~sentence_transformers_inf.modules.exclusions`). With ``find_exclusions``, inputs without that key are searched for
    what their instructions exclude; else an input is encoded as the joined string is, wherever the model is loaded.

    Args:
        *args: As for Sentence Transformers' ``Transformer``.
        template: How instruction and query become one string; must hold both fields.
        max_query_length: Token limit of instructed queries, special tokens included. ``None``: the model's
            ``max_seq_length``, which stays the limit of plain strings (passages). Where an instructed query is too
            long, the instruction is cut and the query survives.
        **kwargs: As for Sentence Transformers' ``Transformer``.

    Raises:
        ValueError: The template lacks a field.

    A missing, ``None`` or blank instruction gives the bare query, exactly as if the query string had been passed.

    Most users want :func:`~sentence_transformers_inf.load_instruction_model`, which turns any SentenceTransformer into one
    with this module.
    """

    template: str
    max_query_length: int | None
    exclusion_weight: float = EXCLUSION_WEIGHT
    find_exclusions: bool = False
    is_packed = False
    """Whether instruction and query stay apart, for the attention between them."""

    def __init__(
        self, *args: Any, template: str = DEFAULT_TEMPLATE, max_query_length: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.template = check_template(template)
        self.max_query_length = max_query_length

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
            The features of ``Transformer.preprocess``. A batch of strings alone carries them under ``"text"``, one of
            instructed queries alone its strings under ``"instruction"`` and ``"query"`` (lists of str) and its
            ``"prompt"``: from these the losses make their candidates.

        Raises:
            TypeError: An input is neither a string nor such a mapping; the message names its position.
        """
        instructed = check_inputs(inputs)
        if not any(instructed):
            return {**super().preprocess(inputs, prompt=prompt, **kwargs), "text": list(inputs)}
        excluded = {row: text for row, item in enumerate(inputs) if instructed[row] and (text := self._excluded_by(item))}
        if excluded:  # further rows, which the last module subtracts
            further = [{"query": text, "exclude": None} for text in excluded.values()]
            said = [{**item, "exclude": None} if instructed[row] else item for row, item in enumerate(inputs)]
            whole = self.preprocess([*said, *further], prompt, **kwargs)
            return whole | {"exclusions": list(excluded), "exclusion_weight": self.exclusion_weight}
        if all(instructed):
            features = self.preprocess_instructed(inputs, prompt, **kwargs)
            features["instruction"] = [item.get("instruction") or "" for item in inputs]
            return features | {"query": [item["query"] for item in inputs], "prompt": prompt}
        # Each kind has a length limit of its own: tokenise them apart, then put the rows back in order.
        queries = [item for item, is_instructed in zip(inputs, instructed) if is_instructed]
        strings = [item for item, is_instructed in zip(inputs, instructed) if not is_instructed]
        string_features = super().preprocess(strings, prompt=prompt, **kwargs)
        query_rows = iter(unpad(self.preprocess_instructed(queries, prompt, **kwargs)))
        string_rows = iter(unpad(string_features))
        rows = [next(query_rows if is_instructed else string_rows) for is_instructed in instructed]
        shared = {key: value for key, value in string_features.items() if key in ("modality", "prompt_length")}
        return {**pad(rows, self.tokenizer), **shared}

    def _excluded_by(self, item: Mapping[str, Any]) -> str:
        """What an input excludes, as one text, in its own words or found in its instruction; an empty one if nothing."""
        if "exclude" in item or not self.find_exclusions:
            return excluded_by(item)
        return "; ".join(find_exclusions(item.get("instruction") or ""))

    def preprocess_instructed(
        self, inputs: Sequence[Mapping[str, str | None]], prompt: str | None, **kwargs: Any
    ) -> dict[str, Any]:
        """Tokenise instructed queries, joined by the template and within their own length limit."""
        limit = kwargs.pop("max_length", None) or self.max_query_length or self.max_seq_length
        texts = [self.join(item.get("instruction"), item["query"]) for item in inputs]  # type: ignore[arg-type]
        features = super().preprocess(texts, prompt=prompt, max_length=limit, **kwargs)
        if limit is None:
            return features
        # Only a row that fills the limit can have been truncated.
        full = (text_lengths(features) >= limit).nonzero().flatten().tolist()
        shortened = {row: self._shorten(inputs[row], prompt, limit) for row in full}
        if all(shortened[row] == texts[row] for row in full):
            return features
        logger.warning_once(
            f"Some instructed queries are longer than {limit} tokens: their instructions are cut and their queries kept. "
            "Raise max_query_length (or max_seq_length) if the model allows it."
        )
        if self.template.startswith("{query}") and self.template.endswith("{instruction}"):
            return features  # the tokenizer cut the instruction, as it cuts joined strings in any other program
        texts = [shortened.get(row, text) for row, text in enumerate(texts)]
        return super().preprocess(texts, prompt=prompt, max_length=limit, **kwargs)

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
        """As ``Transformer.forward``, without the strings that :meth:`preprocess` leaves for the losses."""
        return super().forward({key: value for key, value in features.items() if key not in TEXT_KEYS}, **kwargs)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """As ``Transformer.save``, and ``instruction_config.json`` with the template and length limit beside it."""
        config: dict[str, Any] = {"template": self.template, "max_query_length": self.max_query_length}
        config |= {"exclusion_weight": self.exclusion_weight, "find_exclusions": self.find_exclusions}
        config["attention"] = self.is_packed
        if self.tokenizer is not None:
            self.tokenizer.init_kwargs[TOKENIZER_KEY] = config
        super().save(output_path, *args, safe_serialization=safe_serialization, **kwargs)
        Path(output_path, CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in Path(output_path).glob("*.safetensors"):  # written for their owner alone, whatever the umask
            path.chmod(Path(output_path, CONFIG_FILE).stat().st_mode)


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


def excluded_by(item: Mapping[str, Any]) -> str:
    """What an input says that it excludes, as one text; an empty one if nothing."""
    exclude = item.get("exclude") or []
    return "; ".join(text.strip() for text in ([exclude] if isinstance(exclude, str) else exclude) if text.strip())


def _check_instructed(position: int, item: Mapping[str, Any]) -> None:
    if unknown := sorted(set(item) - {"instruction", "query", "exclude"}):
        raise TypeError(
            f"input {position} has the unknown key {unknown[0]!r}: expected 'query', 'instruction' and perhaps 'exclude'"
        )
    if not isinstance(item.get("query"), str):
        raise TypeError(f"input {position} has no query: expected {{'instruction': str, 'query': str}}, got {item!r:.200}")
    if not isinstance(item.get("instruction"), (str, type(None))):
        raise TypeError(f"input {position}: the instruction is of type {type(item['instruction']).__name__}, not str")
    exclude = item.get("exclude")
    texts = exclude if isinstance(exclude, (list, tuple)) else [exclude]
    if not all(isinstance(text, str) or (text is None and text is exclude) for text in texts):
        raise TypeError(f"input {position}: 'exclude' must be a string or a list of strings, got {exclude!r:.200}")
