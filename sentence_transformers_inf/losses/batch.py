"""What one batch asks for: its distinct texts, and where every row finds its own among them.

Everything here is a pure function of strings and a seed, without a model. So a loss that is called twice on one batch
(GradCache, Matryoshka), a run that is resumed, and two processes that hold half a batch each all see the same candidates.

A record has k instructed queries, k passages and e further negatives. Its rows are the aligned pairs of the former: B
records have R = k·B rows, record by record.
"""

import hashlib
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[str, str]
"""An instruction and a query; the instruction of a bare query is empty."""


@dataclass(frozen=True)
class Record:
    """One record of a batch."""

    pairs: list[Pair]
    """Its k instructed queries."""
    passages: list[Hashable]
    """The passages right for them: texts, or the rows of vectors that were made before."""
    negatives: list[Hashable]
    """e further passages that are right for none of them."""


@dataclass(frozen=True)
class Plan:
    """Texts to encode, and index tensors into them. Of the P passages that count as candidates, the first R are those of
    the rows of all processes and the others further negatives."""

    pairs: list[Pair]
    """The distinct instructed and bare queries to encode: texts 0, 1, ..."""
    passages: list[Hashable]
    """The distinct passages to encode: the texts after them."""
    query: Tensor
    """R': the text of each row of this process."""
    passage: Tensor
    """R': the text of its passage."""
    first_passage: Tensor
    """B: the text of the first passage of each record of this process."""
    negatives: Tensor
    """B·e: the texts of this process's further negatives."""
    new_negatives: Tensor
    """P - R: which of the further negatives of all processes count: those that are no row's passage, once each."""
    candidates: Tensor
    """R'×m: the texts of the row's candidate instructions with its query, the row's own first."""
    first_row: int
    """Where this process's rows stand among the R rows of all."""
    not_negative: Tensor
    """R'×P booleans: row and candidate share a passage, a query with its instruction, or a record repeats the row."""
    not_candidate: Tensor
    """R'×m booleans: the candidate is right for the row's passage, or fills a place that the row has no candidate for."""
    plain_query: Tensor
    """Q: the texts of the bare queries."""
    plain_positive: Tensor
    """Q: the row, among the R of all, whose passage was drawn as the positive."""
    not_plain_negative: Tensor
    """Q×P booleans: the candidate may answer the bare query too."""
    plain_share: float
    """How many bare queries this process has, over the mean of all processes: 1 where all records have equally many."""
    anchor_share: float
    """The same of bare queries and first passages, each once."""


@dataclass(frozen=True)
class Draws:
    """What was drawn for the records of one process."""

    candidates: list[list[Pair]]
    """For each row, further instructions with its query."""
    plain: list[tuple[str, int]]
    """The distinct queries of each record, and for each the row of the process whose passage is its positive."""


def draw(
    records: Sequence[Sequence[Pair]], own: range, *, sampled_instructions: int | None, plain: bool, seed: int
) -> Draws:
    """Draw candidate instructions and the positives of bare queries.

    A row's candidates are the other instructions of its record (the poisoned twin), and some that are drawn from the rest of
    the batch. The rows of a record share the draw: rows with one query then share the encoded candidates as well.

    Args:
        records: The instructed queries of the records of all processes.
        own: Which of the records are this process's.
        sampled_instructions: How many are drawn for each record; ``None``: no candidates, not even the twin.
        plain: Whether to draw for bare queries.
        seed: Of the draws.
    """
    digest = hashlib.blake2b(repr((seed, [list(record) for record in records])).encode(), digest_size=8).digest()
    generator = random.Random(int.from_bytes(digest, "big"))
    pool = list(dict.fromkeys(instruction for record in records for instruction, _ in record))
    draws = Draws([], [])
    for number, record in enumerate(records):  # those of other processes too, so that the generators stay in step
        instructions = dict.fromkeys(instruction for instruction, _ in record)
        sampled: list[str] = []
        if sampled_instructions is not None:
            drawn = generator.sample(pool, min(len(pool), sampled_instructions + len(instructions)))
            sampled = [other for other in drawn if other not in instructions][:sampled_instructions]
        first_row = len(draws.candidates)
        if number in own:
            for instruction, query in record:
                twins = [other for other in instructions if other != instruction and sampled_instructions is not None]
                draws.candidates.append([(other, query) for other in [*twins, *sampled]])
        for query in dict.fromkeys(query for _, query in record) if plain else ():
            column = generator.choice([place for place, (_, other) in enumerate(record) if other == query])
            if number in own:
                draws.plain.append((query, first_row + column))
    return draws


def plan(records: Sequence[Record], own: range, draws: Draws, *, encode_candidates: bool = True) -> Plan:
    """Number the texts of this process, and find what is no negative of what among the rows of all processes.

    Args:
        records: Of all processes.
        own: Which of the records are this process's.
        draws: For these; see :func:`draw`.
        encode_candidates: Whether the candidates are texts to encode, and not made of the rows' tokens.
    """
    rows = [pair for record in records for pair in record.pairs]
    right = [passage for record in records for passage in record.passages]
    negatives = [negative for record in records for negative in record.negatives]
    k = len(rows) // len(records)
    first_row, own_rows = k * own.start, slice(k * own.start, k * own.stop)

    # Texts of this process.
    candidates = draws.candidates
    further = [pair for of_row in candidates for pair in of_row] if encode_candidates else []
    bare = [("", query) for query, _ in draws.plain]
    pair_number = _numbers([*rows[own_rows], *further, *bare])
    own_negatives = [negative for number in own for negative in records[number].negatives]
    passage_number = _numbers([*right[own_rows], *own_negatives])
    offset = len(pair_number)
    width = 1 + max((len(of_row) for of_row in candidates), default=0)
    filled = [[row, *of_row, *[row] * (width - 1 - len(of_row))] for row, of_row in zip(rows[own_rows], candidates)]

    # What is no negative of what: among the rows of all processes and the further negatives that count.
    new = _new(negatives, right)
    pair_codes, passage_codes = _codes(rows), _codes([*right, *(negatives[at] for at in new)])
    same_pair = pair_codes[own_rows, None] == pair_codes
    same_passage = passage_codes[own_rows, None] == passage_codes
    not_negative = same_passage.clone()
    # A row that a record has twice, for want of a twin query, is one candidate; it stays the positive of its own row.
    repeated = _repeated([(at // k, row, passage) for at, (row, passage) in enumerate(zip(rows, right))])
    not_negative[:, : len(rows)] |= same_pair | repeated
    candidate_codes = _codes_among(rows, filled)
    # f(I', q) is right for the row's passage where some row of the batch pairs the two, the row itself included.
    paired = (candidate_codes[:, :, None] == pair_codes) & same_passage[:, None, : len(rows)]

    # A record's bare query is answered by the passages of all rows that have it, and perhaps by its further negatives.
    query_codes = _codes([query for _, query in rows])
    positive = torch.tensor([first_row + row for _, row in draws.plain], dtype=torch.long)
    same_query = query_codes[positive, None] == query_codes
    of_record = same_query.unflatten(1, (len(records), k)).any(dim=-1)
    answers = torch.cat([same_query, of_record[:, [at * len(records) // len(negatives) for at in new]]], dim=1)
    answers |= passage_codes[positive, None] == passage_codes
    answers[:, : len(rows)] |= repeated
    answers[torch.arange(len(positive)), positive] = False

    passage = offset + torch.tensor([passage_number[passage] for passage in right[own_rows]])
    return Plan(
        pairs=list(dict.fromkeys([*rows[own_rows], *further, *bare])),
        passages=list(passage_number),
        query=torch.tensor([pair_number[pair] for pair in rows[own_rows]]),
        passage=passage,
        first_passage=passage[::k],
        negatives=offset + torch.tensor([passage_number[negative] for negative in own_negatives], dtype=torch.long),
        new_negatives=torch.tensor(new, dtype=torch.long),
        candidates=torch.tensor([[pair_number.get(pair, 0) for pair in of_row] for of_row in filled]),
        first_row=first_row,
        not_negative=not_negative,
        not_candidate=paired.any(dim=-1),
        plain_query=torch.tensor([pair_number["", query] for query, _ in draws.plain], dtype=torch.long),
        plain_positive=positive,
        not_plain_negative=answers,
        plain_share=_share(_bare_queries, records, own),
        anchor_share=_share(_held_texts, records, own),
    )


def _new(values: Sequence[Hashable], known: Sequence[Hashable]) -> list[int]:
    """Where values that are not known stand first."""
    first_at = {value: at for at, value in reversed(list(enumerate(values)))}
    return sorted(first_at[value] for value in first_at.keys() - set(known))


def _codes_among(rows: Sequence[Pair], candidates: Sequence[Sequence[Pair]]) -> Tensor:
    """The codes of rows for each candidate (R'×m); -1 where no row is equal."""
    numbers = _numbers(rows)
    return torch.tensor([[numbers.get(pair, -1) for pair in of_row] for of_row in candidates])


def _bare_queries(records: Sequence[Record]) -> int:
    return sum(len({query for _, query in record.pairs}) for record in records)


def _held_texts(records: Sequence[Record]) -> int:
    queries = {query for record in records for _, query in record.pairs}
    return len(queries) + len({record.passages[0] for record in records})


def _share(count: Callable[[Sequence[Record]], int], records: Sequence[Record], own: range) -> float:
    """The count of this process's records over the mean of all processes, each of which has equally many records."""
    starts = range(0, len(records), len(own))
    total = sum(count(records[start : start + len(own)]) for start in starts)
    return count(records[own.start : own.stop]) * len(starts) / total


def _numbers(values: Sequence[Hashable]) -> dict[Hashable, int]:
    """The distinct values in their order, numbered."""
    return {value: number for number, value in enumerate(dict.fromkeys(values))}


def _codes(values: Sequence[Hashable]) -> Tensor:
    """A number for each value, equal for equal values."""
    numbers = _numbers(values)
    return torch.tensor([numbers[value] for value in values], dtype=torch.long)


def _repeated(values: Sequence[Hashable]) -> Tensor:
    """Whether a value was there before."""
    first = {value: at for at, value in reversed(list(enumerate(values)))}
    return torch.tensor([first[value] != at for at, value in enumerate(values)])
