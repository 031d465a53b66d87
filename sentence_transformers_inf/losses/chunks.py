"""Distinct texts to calls of the encoder that carry little padding.

A text is encoded once, from the tokens of the first column that has it. Texts that preprocess alike are sorted by length,
the longest first, so that the call that needs most memory comes before what the others leave behind.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sentence_transformers_inf.modules.tokens import pad, unpad

_SHARED = ("modality", "task", "prompt_length")
"""What the texts of one call have in common."""


@dataclass
class Group:
    """Distinct texts that preprocess alike, the longest first."""

    shared: dict[str, Any]
    numbers: list[int] = field(default_factory=list)
    """What the plan of the batch calls them."""
    texts: list[dict[str, Tensor]] = field(default_factory=list)
    """Their tokens, each of its own length."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(text["input_ids"]) for text in self.texts]

    def only(self, numbers: Container[int]) -> "Group":
        """The group without the texts of other numbers."""
        rows = [row for row, number in enumerate(self.numbers) if number in numbers]
        return Group(self.shared, [self.numbers[row] for row in rows], [self.texts[row] for row in rows])

    def features(self, tokenizer: Any, begin: int = 0, end: int | None = None) -> dict[str, Any]:
        """Some of the texts as one padded batch."""
        return {**pad(self.texts[begin:end], tokenizer), **self.shared}


def group_texts(columns: Sequence[Mapping[str, Any]], numbers: Sequence[Sequence[int]]) -> list[Group]:
    """The distinct texts of tokenised columns, in groups that preprocess alike.

    Args:
        columns: Features of ``preprocess``, padded or flattened.
        numbers: For each column, the number of each row's text; equal texts have equal numbers.
    """
    groups: dict[str, Group] = {}
    seen: set[int] = set()
    for column, of_column in zip(columns, numbers):
        shared = {key: column[key] for key in _SHARED if key in column}
        group = groups.setdefault(str(shared), Group(shared))
        for number, text in zip(of_column, unpad(column)):
            if number not in seen:
                seen.add(number)
                group.numbers.append(number)
                group.texts.append(text)
    for group in groups.values():
        lengths = group.lengths
        order = sorted(range(len(lengths)), key=lambda row, lengths=lengths: -lengths[row])  # type: ignore[misc]
        group.numbers, group.texts = [group.numbers[row] for row in order], [group.texts[row] for row in order]
    return list(groups.values())


def positions(groups: Sequence[Group], device: torch.device) -> Tensor:
    """Where the text of each number stands when the groups' embeddings lie one after the other."""
    order = [number for group in groups for number in group.numbers]
    position = torch.empty(len(order), dtype=torch.long)
    position[torch.tensor(order)] = torch.arange(len(order))
    return position.to(device)


def chunks(group: Group, tokenizer: Any, max_tokens: int) -> Iterator[dict[str, Any]]:
    """A group's features in calls of at most ``max_tokens`` tokens, padding included, or a single text."""
    for begin, end in cut(group.lengths, max_tokens):
        yield group.features(tokenizer, begin, end)


def cut(lengths: Sequence[int], max_tokens: int) -> list[tuple[int, int]]:
    """Where to cut texts (begin, end), the longest first, so that no chunk has more than ``max_tokens`` tokens with its
    padding, unless it is a single text's."""
    cuts, begin = [], 0
    for row in range(1, len(lengths) + 1):
        if row == len(lengths) or lengths[begin] * (row + 1 - begin) > max_tokens:
            cuts.append((begin, row))
            begin = row
    return cuts


def default_chunk_tokens(device: torch.device, width: int) -> int:
    """Tokens of a chunk: 1,024 on a CPU; elsewhere 131,072 for a model of 768 hidden dimensions, by their square fewer for
    a wider one (at least 16,384) and more for a narrower one, so that launching the kernels of a chunk takes less time than
    running them.

    Args:
        device: Of the model.
        width: Its hidden dimensions.
    """
    return 1_024 if device.type == "cpu" else max(16_384, 131_072 * 768**2 // width**2)
