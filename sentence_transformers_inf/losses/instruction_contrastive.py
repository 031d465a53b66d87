"""The instruction-aware contrastive objectives as Sentence Transformers losses, at the cost of the distinct texts.

One step of either loss does this:

    (1) plan: from the texts of the batch, list the candidate instructions of every row: the other instructions of its
        record (the poisoned twin) always, and a few drawn from the rest of the batch. Tokenise the combinations of
        instruction and query that no row has yet.
    (2) encode: merge all texts of the step (instructed queries, passages, candidates, bare queries), drop duplicates,
        sort by length, and encode each distinct text once, in chunks that carry almost no padding; or one after the other
        with no padding at all, where the model takes them so (flash attention).
    (3) score: gather the embeddings back into rows and apply
        :func:`~sentence_transformers_inf.losses.instruction_contrastive_loss`. What equals a row's positive in text is
        masked out of its denominators.

The plan is a pure function of the batch and a seed. So a loss that is called twice on one batch (GradCache, Matryoshka),
a run that is resumed, and two processes that hold half a batch each all see the same candidates.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank, get_world_size
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from sentence_transformers_inf.losses.functional import instruction_contrastive_loss, objective_terms
from sentence_transformers_inf.modules import InstructionQueryAttention, encoder_of
from sentence_transformers_inf.modules.instruction_transformer import text_lengths

_ANCHORS_KEPT = 200_000
"""Embeddings of the frozen base kept in memory; at 384 dimensions in float32, 300 MB."""


@dataclass
class _Every:
    """The Q distinct queries and A distinct instructions of a step's rows."""

    query_row: Tensor  # Q: a row that has the query
    instruction_row: Tensor  # A: a row that has the instruction
    query_of: Tensor  # R: which of the distinct queries each row has
    pair_row: Tensor  # R×A: the row that pairs the row's query with the instruction, -1 if none does


@dataclass
class _Batch:
    """One step: its distinct texts, tokenised, and where each row finds its embeddings among them."""

    features: list[dict[str, Any]]  # groups of distinct texts that preprocess alike, each sorted by length
    query: Tensor  # R: index of each row's instructed query among the distinct texts
    passage: Tensor  # R; with precomputed passages, rows of those
    negatives: Tensor  # B×e: the further negatives of each record; likewise
    candidates: Tensor  # R×m, column 0 the row's own instructed query
    not_candidate: Tensor  # R×m booleans, true where a row has fewer candidates than m
    plain_query: Tensor  # Q: the bare queries
    plain_positive: Tensor  # Q: the row (of this process) whose passage was drawn as the positive
    anchors: Tensor | None  # (R + Q)×d: the frozen base's embeddings of the passages and of the bare queries
    keys: Tensor  # one 64-bit key per distinct text; equal texts have equal keys on every process
    plain_keys: Tensor  # R: key of the bare query of each row
    every: _Every | None = None  # the instructions of the whole batch as candidates, in the place of ``candidates``


class InstructionContrastiveLoss(nn.Module):
    """Contrastive training of retrievers that obey instructions (InF-Embed, Zhuang et al. 2025, arXiv:2505.21439, §4).

    In plain terms: for each record, the passage that suits the query *and* its instruction must beat the passages that
    suit the same query under another instruction, or another query under the same one (the P term); and, given the
    passage, its own instruction must beat the others that the query could have come with (the I term); or its own
    instructed query those of all other rows (IQ). ``objective`` says which terms are used and whether they share a
    softmax (``uni_``) or have one each (``multi_``).

    Args:
        model: A SentenceTransformer from :func:`~sentence_transformers_inf.load_instruction_model`.
        objective: One of the 11 of :data:`~sentence_transformers_inf.losses.OBJECTIVES`. The paper finds
            ``"multi_P_I"`` best.
        scale: Inverse temperature of the cosine similarities (paper: 1/0.05 = 20).
        sampled_instructions: How many instructions of other records each row gets as further candidates of the I term,
            beside the poisoned twin. Each costs one encoded text for each query of a record, two for an InF-IR record.
            ``None``: 1; but all instructions of the batch where instruction and query meet in attention, which makes them
            cheap (not with ``gather_across_devices`` nor in :class:`CachedInstructionContrastiveLoss`).
        plain_weight: Weight of an additional P term over the bare queries, which keeps plain retrieval intact: each
            distinct query of a record against the passages of the batch, one of its own passages drawn as the positive
            and the others masked. 0 gives the paper's objective exactly.
        anchor_weight: Weight of an additional term that holds passages and bare queries near where the model as given puts
            them: the mean squared distance of the unit embeddings, 2 - 2·cos, to those of a frozen copy. It keeps plain
            retrieval, on other domains too, and old indexes useful; instructed queries stay free. 0 does without.
        gather_across_devices: Use the rows of all processes as candidates. The loss of N processes on a split batch then
            averages to that of one process on the whole batch.
        passage_embeddings: N×d, vectors of passages that were made before, by a model that stays as it is: no passage is
            encoded. The batch then has no passage columns, and the labels (B×(k + e)) say which of these rows are the
            passages of its k instructed queries, and its e further negatives; equal passages must be one row. A
            memory-mapped array stays where it is.
        max_tokens_per_chunk: Texts are encoded in chunks of at most so many tokens, padding included. Smaller chunks
            waste less on padding, larger ones fill a GPU. Changes neither the loss nor the gradients. ``None``: 1,024 on a
            CPU; elsewhere 131,072 for a model of 768 hidden dimensions, by their square fewer for a wider one (at least
            16,384) and more for a narrower one. Where the model flattens its inputs, nothing is padded: on a CPU (see
            :mod:`~sentence_transformers_inf.cpu_attention`) a chunk is 4,096 tokens, on a GPU (Sentence Transformers'
            unpadding, which goes with flash attention) all texts of an encoder, whatever is given.
        seed: Seeds the draws of candidates and positives.

    Raises:
        ValueError: Unknown objective, or an argument out of range.

    Inputs:
        | Texts                                                                       | Labels    |
        |-----------------------------------------------------------------------------|-----------|
        | (k instructed queries, k passages, e negatives), column k + i right for i   | none      |
        | (k instructed queries), with ``passage_embeddings``                         | B×(k + e) |

        An instructed query is ``{"instruction": str, "query": str}``. An InF-IR record has k = 3 and e = 0, in the order of
        :func:`~sentence_transformers_inf.training_dataset`: (q+, I+), (q+, I-), (q-, I+), d+, d1, d2. Negatives take part in
        the P term, for all rows of the batch; they are no negatives of their own record's bare queries.

    Relations:
        - ``uni_P`` on columns of one instructed query, one passage and negatives is Sentence Transformers'
          ``MultipleNegativesRankingLoss``; this class adds the candidates on the instruction side.
        - :class:`CachedInstructionContrastiveLoss` is the same loss with GradCache, for batches larger than memory.

    Example:
        >>> from sentence_transformers import SentenceTransformerTrainer  # doctest: +SKIP
        >>> from sentence_transformers_inf import load_instruction_model, load_records, training_dataset
        >>> model = load_instruction_model("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> loss = InstructionContrastiveLoss(model, objective="multi_P_I")  # doctest: +SKIP
        >>> train_dataset = training_dataset(load_records("mini", split="train"))  # doctest: +SKIP
        >>> SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=loss).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: SentenceTransformer,
        objective: str = "multi_P_I",
        scale: float = 20.0,
        sampled_instructions: int | None = None,
        plain_weight: float = 0.0,
        anchor_weight: float = 0.0,
        gather_across_devices: bool = False,
        passage_embeddings: NDArray[np.float32] | None = None,
        max_tokens_per_chunk: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.terms = objective_terms(objective)
        attends = isinstance(encoder_of(model)[1], InstructionQueryAttention) if len(encoder_of(model)) > 1 else False
        self.every_instruction = (
            sampled_instructions is None
            and attends
            and "I" in self.terms
            and not gather_across_devices
            and not isinstance(self, CachedInstructionContrastiveLoss)
        )
        sampled_instructions = 1 if sampled_instructions is None else sampled_instructions
        for name, value, valid in (
            ("scale", scale, scale > 0),
            ("sampled_instructions", sampled_instructions, sampled_instructions >= 0),
            ("plain_weight", plain_weight, plain_weight >= 0),
            ("anchor_weight", anchor_weight, anchor_weight >= 0),
            ("max_tokens_per_chunk", max_tokens_per_chunk, max_tokens_per_chunk is None or max_tokens_per_chunk > 0),
        ):
            if not valid:
                raise ValueError(f"{name} must not be {value!r}")
        if passage_embeddings is not None and anchor_weight:
            raise ValueError("anchor_weight holds passages where they are, and passage_embeddings stay there of themselves")
        self.passage_embeddings = passage_embeddings
        self.model = model
        self._encoder = (encoder_of(model),)  # in a tuple: the trainer moves and wraps ``self.model``
        # The trainer wraps ``self.model`` for several devices; tokenisation goes past the wrapper.
        self.preprocess = model.preprocess
        self.tokenizer = model.tokenizer
        self.objective = objective
        self.scale = scale
        self.sampled_instructions = sampled_instructions
        self.plain_weight = plain_weight
        self.anchor_weight = anchor_weight
        # In a tuple, so that it is neither trained, saved, nor wrapped with the loss's own modules.
        self._base: tuple[SentenceTransformer, ...] = (
            (copy.deepcopy(model).eval().requires_grad_(False),) if anchor_weight else ()
        )
        self._anchors: dict[int, Tensor] = {}
        # Of the last step, for each call of the encoder: the tokens of each text, and whether they came without padding.
        self._encoded: list[tuple[Tensor, bool]] = []
        self.gather_across_devices = gather_across_devices
        self.max_tokens_per_chunk = max_tokens_per_chunk
        self.seed = seed

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of one batch of tokenised columns, a scalar."""
        batch = self._plan(list(sentence_features), labels)
        chunks = [chunk for group in batch.features for chunk in self._chunks(group)]
        self._encoded = [(text_lengths(chunk), "cu_seq_lens_q" in chunk) for chunk in chunks]
        device = batch.keys.device.type
        # Autocast keeps what it made of the weights until its outermost context ends. The trainer's is around each call of
        # the model; with this one around them the weights are cast once for all chunks.
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device)):
            encoded = [self.model(chunk) for chunk in chunks]
        embeddings = torch.cat([features["sentence_embedding"] for features in encoded])
        return self._score(embeddings, batch, self._every_instruction(encoded, batch) if batch.every else None)

    def _plan(self, columns: list[dict[str, Any]], labels: Tensor | None = None) -> _Batch:
        if isinstance(self.model, DistributedDataParallel):
            # It would send buffers around at every call, and hang: each process has as many calls as its texts need.
            self.model.broadcast_buffers = False
        given = self.passage_embeddings is not None
        k = sum("query" in column for column in columns)
        if missing := [position for position, column in enumerate(columns[: max(k, 1)]) if "query" not in column]:
            raise ValueError(
                f"column {missing[0]} holds no instructed queries: pass {{'instruction', 'query'}} dictionaries to a model "
                "made by load_instruction_model"
            )
        if given and (labels is None or labels.ndim != 2 or labels.shape[1] < k):
            raise ValueError(
                f"with passage_embeddings, {k} columns of instructed queries need labels of shape B×{k} or wider"
            )
        if not given and len(columns) < 2 * k:
            raise ValueError(
                f"got {k} columns of instructed queries and {len(columns) - k} of passages: expected a passage for each "
                "instructed query (see training_dataset)"
            )
        records = [
            [(column["instruction"][row], column["query"][row]) for column in columns[:k]]
            for row in range(len(columns[0]["query"]))
        ]
        rows = [row for record in records for row in record]  # record-major: row b*k + c is column c of record b

        candidates, drawn_positive = self._draw(records)
        if self.every_instruction:
            candidates = [[] for _ in rows]
        known = {row: index for index, row in enumerate(rows)}
        plain = [("", query) for query, _ in drawn_positive]
        extra = list(dict.fromkeys(c for c in [*(c for cs in candidates for c in cs), *plain] if c not in known))
        extra.sort(key=_is_bare)
        texts = len(records) * len(columns)
        known |= {pair: texts + index for index, pair in enumerate(extra)}

        first = columns[0]
        task = {key: first[key] for key in ("task",) if key in first}
        for _, pairs in itertools.groupby(extra, _is_bare):  # bare queries may have another encoder
            inputs = [{"instruction": instruction, "query": query} for instruction, query in pairs]
            columns = [*columns, {**task, **self.preprocess(inputs, prompt=first.get("prompt"), **task)}]
        columns = [_in_rows(column, self.tokenizer.padding_side) for column in columns]
        features_by_group, position, keys = self._distinct(columns, k, len(records))

        width = 1 + max((len(cs) for cs in candidates), default=0)
        own = list(range(len(rows)))
        table = torch.tensor([[r, *(known[c] for c in cs), *[r] * (width - 1 - len(cs))] for r, cs in zip(own, candidates)])
        lengths = torch.tensor([1 + len(cs) for cs in candidates])
        device = position.device
        plain_index = torch.tensor([known["", query] for _, query in rows] if self.plain_weight else own, device=device)
        passage = position[len(rows) : 2 * len(rows)]
        negatives = position[2 * len(rows) : texts].reshape(-1, len(records)).T
        if given and labels is not None:
            passage, negatives = labels[:, :k].flatten().to(device), labels[:, k:].to(device)
        plain_query = position[torch.tensor([known[pair] for pair in plain], dtype=torch.long, device=device)]
        anchors = self._anchor(features_by_group, keys, torch.cat([passage, plain_query])) if self._base else None
        return _Batch(
            features=[_flattened(group) for group in features_by_group],
            query=position[: len(rows)],
            passage=passage,
            negatives=negatives,
            candidates=position[table.to(device)],
            not_candidate=(torch.arange(width) >= lengths[:, None]).to(device),
            plain_query=plain_query,
            plain_positive=torch.tensor([row for _, row in drawn_positive], dtype=torch.long, device=device),
            anchors=anchors,
            keys=keys,
            plain_keys=keys[position[plain_index]],
            every=_every(rows, device) if self.every_instruction else None,
        )

    def _every_instruction(self, encoded: list[dict[str, Any]], batch: _Batch) -> Tensor:
        """The embeddings (R×A×d) of each row's query under every instruction of the batch, from its encoded tokens."""
        every = batch.every
        assert every is not None
        queries: list[tuple[Tensor, Tensor]] = []  # tokens and mask of each distinct text's query
        instructions: dict[int, tuple[Tensor, Tensor]] = {}
        for features in encoded:
            start = len(queries)
            queries.extend(zip(features["token_embeddings"], features["attention_mask"]))
            if "instruction_rows" in features:
                told = zip(features["instruction_embeddings"], features["instruction_attention_mask"])
                instructions.update(zip((features["instruction_rows"] + start).tolist(), told))
        pooled = torch.cat([features["query_embedding"] for features in encoded])
        query_at, instruction_at = batch.query[every.query_row], batch.query[every.instruction_row]
        attention, *rest = list(self._encoder[0])[1:]
        embeddings = attention.combine(  # type: ignore[operator]
            pooled[query_at],
            *_stack([queries[at] for at in query_at.tolist()]),
            *_stack([instructions[at] for at in instruction_at.tolist()]),
            every=True,
        )
        shape = embeddings.shape[:2]
        features = {"sentence_embedding": embeddings.flatten(0, 1)}
        for module in rest:
            features = module(features)
        return features["sentence_embedding"].unflatten(0, shape)[every.query_of]

    def _chunks(self, group: dict[str, Any]) -> Iterable[dict[str, Any]]:
        on_cpu = group["input_ids"].device.type == "cpu"
        if "cu_seq_lens_q" in group:
            return _runs(group, self.max_tokens_per_chunk or 4_096) if on_cpu else [group]
        width = int(self._encoder[0][0].get_embedding_dimension())  # type: ignore[operator]
        default = 1_024 if on_cpu else max(16_384, 131_072 * 768**2 // width**2)
        return _chunks(group, self.max_tokens_per_chunk or default)

    def _draw(
        self, records: Sequence[Sequence[tuple[str, str]]]
    ) -> tuple[list[list[tuple[str, str]]], list[tuple[str, int]]]:
        """Candidate (instruction, query) pairs for each row, and (query, row of the drawn positive) for each bare query."""
        everywhere, first = list(records), 0
        if self.gather_across_devices and get_world_size() > 1:
            gathered: list[list[Any]] = [[] for _ in range(get_world_size())]
            torch.distributed.all_gather_object(gathered, list(records))
            everywhere = [record for process in gathered for record in process]
            first = sum(len(process) for process in gathered[: get_rank()])
        digest = hashlib.blake2b(repr((self.seed, everywhere)).encode(), digest_size=8).digest()
        generator = random.Random(int.from_bytes(digest, "big"))
        pool = list(dict.fromkeys(instruction for record in everywhere for instruction, _ in record))

        candidates: list[list[tuple[str, str]]] = []
        positives: list[tuple[str, int]] = []
        for index, record in enumerate(everywhere):
            here = first <= index < first + len(records)
            base = (index - first) * len(record)
            if "I" in self.terms:
                # Drawn for every record of every process, so that the generator stays in step. The rows of a record share
                # the draw: rows with the same query then share the encoded candidate as well.
                own = dict.fromkeys(instruction for instruction, _ in record)
                drawn = generator.sample(pool, min(len(pool), self.sampled_instructions + len(own)))
                sampled = [other for other in drawn if other not in own][: self.sampled_instructions]
                if here:
                    for instruction, query in record:
                        twins = [other for other in own if other != instruction]
                        candidates.append([(other, query) for other in [*twins, *sampled]])
            elif here:
                candidates.extend([] for _ in record)
            if self.plain_weight:
                for query in dict.fromkeys(query for _, query in record):
                    row = generator.choice([column for column, (_, other) in enumerate(record) if other == query])
                    if here:
                        positives.append((query, base + row))
        return candidates, positives

    def _distinct(self, columns: list[dict[str, Any]], k: int, records: int) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
        """Merge all columns, keep each distinct text once and sort by length, longest first, so that the chunk that needs
        most memory is encoded before what the others leave behind, and is a full one.

        Returns:
            The features of the distinct texts, one group per way of preprocessing (task, prompt, modality); the position
            among them of every instructed query (record-major), passage (record-major) and extra text; their keys.
        """
        device = columns[0]["input_ids"].device
        # Column-major order of the texts -> record-major order of the rows, for queries and passages alike.
        kinds = 1 if self.passage_embeddings is not None else 2
        order = torch.arange(kinds * k * records).reshape(kinds, k, records).transpose(1, 2).flatten()
        total = sum(len(column["input_ids"]) for column in columns)
        order = torch.cat([order, torch.arange(len(order), total)]).to(device)

        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, column in enumerate(columns):
            groups.setdefault(tuple(str(column.get(key)) for key in ("modality", "task", "prompt_length")), []).append(index)
        starts = [0]
        for column in columns:
            starts.append(starts[-1] + len(column["input_ids"]))
        position = torch.empty(total, dtype=torch.long, device=device)
        distinct_features, distinct_keys, offset = [], [], 0
        for group, members in enumerate(groups.values()):
            merged = _merge([columns[index] for index in members], self.tokenizer)
            ids = merged["input_ids"]
            if "instruction_mask" in merged:  # the same tokens are another text where some of them are an instruction's
                ids = 2 * ids + merged["instruction_mask"]
            keys = _text_keys(ids, merged["attention_mask"]) + group
            distinct, inverse = torch.unique(keys, return_inverse=True)
            first = torch.full_like(distinct, len(keys)).scatter_reduce(
                0, inverse, torch.arange(len(keys), device=device), "amin", include_self=True
            )
            lengths = merged["attention_mask"].sum(dim=1)[first]
            by_length = torch.argsort(lengths, stable=True, descending=True)
            rank = torch.empty_like(by_length)
            rank[by_length] = torch.arange(len(by_length), device=device)
            chosen = first[by_length]
            distinct_features.append(
                {key: value[chosen] if isinstance(value, Tensor) else value for key, value in merged.items()}
            )
            distinct_keys.append(keys[chosen])
            where = torch.cat([torch.arange(starts[index], starts[index + 1]) for index in members]).to(device)
            position[where] = rank[inverse] + offset
            offset += len(chosen)
        return distinct_features, position[order], torch.cat(distinct_keys)

    @torch.no_grad()
    def _anchor(self, features: list[dict[str, Any]], keys: Tensor, texts: Tensor) -> Tensor:
        """The frozen base's embeddings of some of a batch's distinct texts; a corpus that fits is encoded once in a run."""
        names = keys.tolist()
        if len(self._anchors) > _ANCHORS_KEPT:
            self._anchors.clear()
        wanted = {number for number in texts.tolist() if names[number] not in self._anchors}
        start = 0
        for group in features:
            size = len(group["input_ids"])
            missing = [number for number in range(start, start + size) if number in wanted]
            chosen = torch.tensor([number - start for number in missing], dtype=torch.long, device=keys.device)
            group = {key: value[chosen] if isinstance(value, Tensor) else value for key, value in group.items()}
            base = self._base[0].to(keys.device)
            embeddings = [base(chunk)["sentence_embedding"] for chunk in self._chunks(group)]
            for number, embedding in zip(missing, torch.cat(embeddings).cpu() if embeddings else ()):
                self._anchors[names[number]] = embedding
            start += size
        return torch.stack([self._anchors[names[number]] for number in texts.tolist()]).to(keys.device)

    def _score(self, embeddings: Tensor, batch: _Batch, every: Tensor | None = None) -> Tensor:
        """The loss from the embeddings of a batch's texts (N×d), and of its rows under every instruction (R×A×d)."""
        query, query_keys, plain_keys = embeddings[batch.query], batch.keys[batch.query], batch.plain_keys
        passage, passage_keys = self._passages(embeddings, batch.keys, batch.passage)
        negatives, negative_keys = self._passages(embeddings, batch.keys, batch.negatives.flatten())
        local_query_keys, local_passage_keys = query_keys, passage_keys
        first_row = 0
        if self.gather_across_devices:
            first_row = get_rank() * len(query)
            query, passage = all_gather_with_grad(query), all_gather_with_grad(passage)
            query_keys, passage_keys, plain_keys = (all_gather(keys) for keys in (query_keys, passage_keys, plain_keys))
            if len(negatives):
                negatives, negative_keys = all_gather_with_grad(negatives), all_gather(negative_keys)
        # A further negative counts once: not where its text is a passage of the batch or an earlier negative.
        occurs = negative_keys[:, None] == torch.cat([passage_keys, negative_keys])
        new = torch.arange(len(negatives), device=occurs.device)
        new = new[occurs.long().argmax(dim=1) == len(passage) + new]
        same_query = local_query_keys[:, None] == query_keys[None]
        same_passage = local_passage_keys[:, None] == passage_keys[None]
        not_negative = F.pad(same_query | same_passage, (0, len(new)))
        passage, passage_keys = torch.cat([passage, negatives[new]]), torch.cat([passage_keys, negative_keys[new]])

        candidates = not_candidate = None
        if "I" in self.terms:
            candidates = embeddings[batch.candidates]
            candidate_keys, not_candidate = batch.keys[batch.candidates], batch.not_candidate
            if batch.every is not None and every is not None:
                candidates = torch.cat([query[:, None], every[..., : query.shape[1]]], dim=1)
                pairs = batch.every.pair_row
                known = query_keys[pairs.clamp(min=0)].masked_fill(pairs < 0, 0)
                candidate_keys = torch.cat([query_keys[:, None], known], dim=1)
                not_candidate = torch.zeros_like(candidate_keys, dtype=torch.bool)
            # f(I', q) is right for the row's passage where some row of the batch pairs the two, the row itself included.
            right = (candidate_keys[:, :, None] == query_keys[None, None]) & same_passage[:, None, :]
            not_candidate = not_candidate | right.any(dim=-1)
        loss = instruction_contrastive_loss(
            query,
            passage,
            candidates,
            objective=self.objective,
            scale=self.scale,
            not_negative=not_negative,
            not_candidate=not_candidate,
            first_row=first_row,
        )
        if self.plain_weight:
            loss = loss + self.plain_weight * self._plain_loss(
                embeddings, passage, passage_keys, plain_keys, new, first_row, batch
            )
        if batch.anchors is not None:
            now = embeddings[torch.cat([batch.passage, batch.plain_query])]
            dtype = torch.promote_types(now.dtype, torch.float32)
            distance = 2 - 2 * F.cosine_similarity(now.to(dtype), batch.anchors[:, : now.shape[1]].to(dtype))
            loss = loss + self.anchor_weight * distance.mean()
        return loss

    def _passages(self, embeddings: Tensor, keys: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings and keys of passages, of this batch or made before."""
        if self.passage_embeddings is None:
            return embeddings[which], keys[which]
        return torch.from_numpy(self.passage_embeddings[which.cpu().numpy(), : embeddings.shape[1]]).to(embeddings), which

    def _plain_loss(
        self,
        embeddings: Tensor,
        passage: Tensor,
        passage_keys: Tensor,
        plain_keys: Tensor,
        negatives: Tensor,
        first_row: int,
        batch: _Batch,
    ) -> Tensor:
        """The P term over bare queries: the drawn passage against all that no row gives for the same query."""
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.promote_types(embeddings.dtype, torch.float32)
            query = F.normalize(embeddings[batch.plain_query].to(dtype), dim=-1)
            scores = self.scale * query @ F.normalize(passage.to(dtype), dim=-1).T
            positive = batch.plain_positive + first_row
            right = plain_keys[positive][:, None] == plain_keys[None]
            # What is no answer under a record's instruction may be one to its bare query.
            of_record = right.unflatten(1, (-1, len(batch.passage) // len(batch.negatives))).any(dim=-1)
            right = torch.cat([right, of_record[:, negatives // max(batch.negatives.shape[1], 1)]], dim=1)
            right |= passage_keys[positive][:, None] == passage_keys[None]
            right[torch.arange(len(positive), device=right.device), positive] = False
            return F.cross_entropy(scores.masked_fill(right, -torch.inf), positive)

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments of this loss, for the model card."""
        names = (
            "objective",
            "scale",
            "sampled_instructions",
            "plain_weight",
            "anchor_weight",
            "gather_across_devices",
            "seed",
        )
        return {name: getattr(self, name) for name in names}

    @property
    def last_step_stats(self) -> dict[str, int]:
        """What the last step gave the encoder to do, gradient caching's second pass aside.

        ``sequences``: distinct texts; ``real_tokens`` in them; ``padded_tokens``: the same with the padding.
        """
        real = sum(int(lengths.sum()) for lengths, _ in self._encoded)
        padding = sum(int((lengths.max() - lengths).sum()) for lengths, flattened in self._encoded if not flattened)
        texts = sum(len(lengths) for lengths, _ in self._encoded)
        return {"sequences": texts, "real_tokens": real, "padded_tokens": real + padding}

    @property
    def temperature(self) -> float:
        """τ = 1 / scale."""
        return 1.0 / self.scale

    @property
    def citation(self) -> str:
        """BibTeX of the paper."""
        return CITATION


class CachedInstructionContrastiveLoss(CachedLossMixin, InstructionContrastiveLoss):
    """:class:`InstructionContrastiveLoss` with GradCache (Gao et al. 2021, arXiv:2101.06983): large batches, little memory.

    Texts are encoded ``mini_batch_size`` at a time, twice, and only one mini-batch's activations are alive. Loss and
    gradients are those of the plain loss, up to dropout.

    Args:
        model: See :class:`InstructionContrastiveLoss`, as for all further arguments.
        mini_batch_size: Texts encoded at a time.
        show_progress_bar: Show the mini-batches of every step.
        **kwargs: The arguments of :class:`InstructionContrastiveLoss`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        objective: str = "multi_P_I",
        scale: float = 20.0,
        mini_batch_size: int = 32,
        show_progress_bar: bool = False,
        **kwargs: Any,
    ) -> None:
        if mini_batch_size < 1:
            raise ValueError(f"mini_batch_size must not be {mini_batch_size!r}")
        super().__init__(model, objective, scale, **kwargs)
        self.mini_batch_size = mini_batch_size
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of one batch of tokenised columns, a scalar whose backward pass re-encodes the batch."""
        batch = self._plan(list(sentence_features), labels)
        self._encoded = [
            (part, "cu_seq_lens_q" in group)
            for group in batch.features
            for part in text_lengths(group).split(self.mini_batch_size)
        ]
        # The mixin hands its second argument through to calculate_loss, wrappers like MatryoshkaLoss included.
        return self.forward_cached(batch.features, batch)  # type: ignore[arg-type]

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        """The loss from the embeddings of the mini-batches; ``labels`` is the step's plan."""
        loss = self._score(torch.cat([rep for group in reps for rep in group]), labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments of this loss, for the model card."""
        return {**super().get_config_dict(), "mini_batch_size": self.mini_batch_size}


def _every(rows: list[tuple[str, str]], device: torch.device) -> _Every:
    """The distinct queries and instructions of rows of (instruction, query)."""
    queries = list(dict.fromkeys(query for _, query in rows))
    instructions = list(dict.fromkeys(instruction for instruction, _ in rows))
    row_of = {row: index for index, row in reversed(list(enumerate(rows)))}
    having_query = {query: index for index, (_, query) in enumerate(rows)}
    having_instruction = {instruction: index for index, (instruction, _) in enumerate(rows)}
    place = {query: index for index, query in enumerate(queries)}
    pairs = [[row_of.get((instruction, query), -1) for instruction in instructions] for _, query in rows]
    return _Every(
        query_row=torch.tensor([having_query[query] for query in queries], device=device),
        instruction_row=torch.tensor([having_instruction[instruction] for instruction in instructions], device=device),
        query_of=torch.tensor([place[query] for _, query in rows], device=device),
        pair_row=torch.tensor(pairs, device=device),
    )


def _stack(texts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Tokens (n×d, of several n) and masks (n) in one tensor each, padded to the longest."""
    tokens, masks = zip(*texts)
    return pad_sequence(list(tokens), batch_first=True), pad_sequence(list(masks), batch_first=True)


def _merge(columns: list[dict[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """The rows of several tokenised columns in one, padded on the tokenizer's side to the widest."""
    device = columns[0]["input_ids"].device
    width = max(column["input_ids"].shape[1] for column in columns)
    fill = {
        "input_ids": tokenizer.pad_token_id or 0,
        "token_type_ids": tokenizer.pad_token_type_id,
        "attention_mask": 0,
        "instruction_mask": 0,
        "positions": 0,
    }
    merged: dict[str, Any] = {}
    for key in [key for key in fill if any(key in column for column in columns)]:
        padded = []
        for column in columns:
            values = column[key] if key in column else torch.zeros_like(column["input_ids"])
            missing = width - values.shape[1]
            sides = (missing, 0) if tokenizer.padding_side == "left" else (0, missing)
            padded.append(F.pad(values.to(device), sides, value=fill[key]))
        merged[key] = torch.cat(padded)
    return merged | {key: columns[0][key] for key in ("modality", "task", "prompt_length") if key in columns[0]}


def _in_rows(column: dict[str, Any], padding_side: str) -> dict[str, Any]:
    """Flattened features (one row of all texts' tokens) as a padded row for each text, with their ``positions``; others as
    they are."""
    if "cu_seq_lens_q" not in column:
        return column
    lengths = text_lengths(column).tolist()
    tokens = {"input_ids": column["input_ids"], "positions": column["position_ids"]}
    tokens["attention_mask"] = torch.ones_like(column["input_ids"])
    rows = {
        key: pad_sequence(list(value[0].split(lengths)), batch_first=True, padding_side=padding_side)
        for key, value in tokens.items()
    }
    return rows | {key: column[key] for key in ("modality", "task", "prompt_length") if key in column}


def _flattened(features: dict[str, Any]) -> dict[str, Any]:
    """What :func:`_in_rows` made of flattened features, flattened again: one row of all texts' tokens, with what flash
    attention must know of where each begins."""
    if "positions" not in features:
        return features
    tokens = features["attention_mask"].bool()
    lengths = tokens.sum(dim=1)
    begins = F.pad(lengths.cumsum(dim=0), (1, 0)).int()
    longest = int(lengths.max())
    kept = {key: value for key, value in features.items() if key not in ("attention_mask", "positions")}
    return kept | {
        "input_ids": features["input_ids"][tokens][None],
        "position_ids": features["positions"][tokens][None],
        "seq_idx": torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)[None].int(),
        "cu_seq_lens_q": begins,
        "cu_seq_lens_k": begins,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _is_bare(pair: tuple[str, str]) -> bool:
    """Whether an (instruction, query) is a query without an instruction."""
    return not pair[0].strip()


def _chunks(features: dict[str, Any], max_tokens: int) -> Iterable[dict[str, Any]]:
    """Rows sorted by length, longest first, cut into chunks, each as wide as its longest; see :func:`cheapest_cuts`.

    They are copies: a model that is compiled would be compiled again for a view.
    """
    mask = features["attention_mask"]
    lengths = mask.sum(dim=1).tolist()
    width = mask.shape[1]
    left_padded = bool((mask[:, -1] == 1).all()) and not bool((mask[:, 0] == 1).all())
    for begin, end in cheapest_cuts(lengths, max_tokens):
        columns = slice(width - lengths[begin], width) if left_padded else slice(0, lengths[begin])
        yield {
            key: value[begin:end, columns].clone() if isinstance(value, Tensor) and value.ndim == 2 else value
            for key, value in features.items()
        }


def _runs(features: dict[str, Any], max_tokens: int) -> Iterable[dict[str, Any]]:
    """Flattened features cut between texts, into as few as hold at most ``max_tokens`` tokens each, or a single text."""
    begins = features["cu_seq_lens_q"]
    ends = begins[1:].tolist()
    first = 0
    while first < len(ends):
        start = int(begins[first])
        last = max(first + 1, bisect.bisect_right(ends, start + max_tokens))
        tokens = slice(start, ends[last - 1])
        own = begins[first : last + 1] - start
        longest = int(own.diff().max())
        yield features | {
            "input_ids": features["input_ids"][:, tokens],
            "position_ids": features["position_ids"][:, tokens],
            "seq_idx": features["seq_idx"][:, tokens] - first,
            **{"cu_seq_lens_q": own, "cu_seq_lens_k": own, "max_length_q": longest, "max_length_k": longest},
        }
        first = last


def cheapest_cuts(lengths: list[int], max_tokens: int) -> list[tuple[int, int]]:
    """The chunks (begin, end) of rows, longest first, that cost least together, none of more than ``max_tokens`` tokens with
    padding unless it is a single row's.

    A chunk costs its tokens, padding included, and as much as a 20th of the largest chunk for being one more: about what it
    was measured to on a CPU. On a GPU it costs the launch of its kernels, the same for a model of any width, where a token
    costs more by the square of it: as much as 12,000 tokens of BERT-base on an H200, and fewer on what is slower. Found by
    dynamic programming over where the last chunk begins.
    """
    count, longest = len(lengths), np.array(lengths)
    rows, cost, begins = np.arange(count), np.zeros(count + 1), np.zeros(count + 1, dtype=int)
    first = 0  # where the last chunk may begin
    for end in range(1, count + 1):
        while first < end - 1 and lengths[first] * (end - first) > max_tokens:
            first += 1
        totals = cost[first:end] + longest[first:end] * (end - rows[first:end])
        best = int(totals.argmin())
        cost[end], begins[end] = totals[best] + max_tokens / 20, first + best
    cuts: list[tuple[int, int]] = []
    while count:
        cuts.append((int(begins[count]), count))
        count = cuts[-1][0]
    return cuts[::-1]


def _text_keys(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """A 64-bit key for each row of tokens (N×L -> N), independent of padding and equal on every process.

    A multiplicative hash of token and position: sum over tokens of mix(token * A + position * B), modulo 2^64. Two texts
    get the same embedding if their tokens are the same, so tokens and not strings are what is compared.
    """
    tokens = input_ids.long()
    position = attention_mask.long().cumsum(dim=1)
    mixed = (tokens + 1) * 0x1E3779B97F4A7C15 + position * 0x2545F4914F6CDD1D
    for shift, factor in ((29, 0x3F58476D1CE4E5B9), (32, 0x14D049BB133111EB)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    mixed = mixed ^ (mixed >> 31)
    return (mixed * attention_mask.long()).sum(dim=1)


CITATION = """
@misc{zhuang2025betterinstructionfollowing,
      title={Towards Better Instruction Following Retrieval Models},
      author={Yuchen Zhuang and Aaron Trinh and Rushi Qiang and Haotian Sun and Chao Zhang and Hanjun Dai and Bo Dai},
      year={2025},
      eprint={2505.21439},
      archivePrefix={arXiv},
      primaryClass={cs.CL},
      url={https://arxiv.org/abs/2505.21439},
}
"""
