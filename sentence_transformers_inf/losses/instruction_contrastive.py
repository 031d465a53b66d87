"""The instruction-aware contrastive objectives as a Sentence Transformers loss, at the cost of the distinct texts.

One step does this:

    (1) plan (:mod:`~sentence_transformers_inf.losses.batch`): from the texts of the batch, draw the candidate instructions
    of every
        row, and number the distinct texts.
    (2) encode (:mod:`~sentence_transformers_inf.losses.chunks`): each distinct text once, sorted by length, in chunks that
    carry
        almost no padding.
    (3) score: gather the embeddings back into rows and apply
        :func:`~sentence_transformers_inf.losses.instruction_contrastive_loss`. What equals a row's positive in text is
        masked out of its denominators.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import all_gather_with_grad, get_rank, get_world_size
from torch import Tensor, nn

from sentence_transformers_inf.losses.batch import Draws, Pair, Plan, Record, draw, plan
from sentence_transformers_inf.losses.chunks import Group, chunks, default_chunk_tokens, group_texts, positions
from sentence_transformers_inf.losses.functional import instruction_contrastive_loss, objective_terms
from sentence_transformers_inf.modules import InstructionQueryAttention, encoder_of
from sentence_transformers_inf.modules.instruction_query_attention import embed_pairs


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
            cheap (not with ``gather_across_devices`` nor in
            :class:`~sentence_transformers_inf.losses.CachedInstructionContrastiveLoss`).
        plain_weight: Weight of an additional P term over the bare queries, which keeps plain retrieval intact: each
            distinct query of a record against the passages of the batch, one of its own passages drawn as the positive
            and the others masked. 0 gives the paper's objective exactly.
        reference: A model that stays as it is, a copy of the base for example. Bare queries and the first passage of each
            record are held to its embeddings, so that plain retrieval stays what it was.
        anchor_weight: Weight of that: of the mean of 1 - cos(text, the reference's) over these texts.
        gather_across_devices: Use the rows of all processes as candidates. The loss of N processes on a split batch then
            averages to that of one process on the whole batch.
        passage_embeddings: N×d, vectors of passages that were made before, by a model that stays as it is: no passage is
            encoded. The batch then has no passage columns, and the labels (B×(k + e)) say which of these rows are the
            passages of its k instructed queries, and its e further negatives; equal passages must be one row. A
            memory-mapped array stays where it is.
        max_tokens_per_chunk: Texts are encoded in chunks of at most so many tokens, padding included. Smaller chunks
            waste less on padding, larger ones fill a GPU. Changes neither the loss nor the gradients. ``None``: see
            :func:`~sentence_transformers_inf.losses.chunks.default_chunk_tokens`.
        seed: Seeds the draws of candidates and positives.

    Raises:
        ValueError: Unknown objective, or an argument out of range.

    Inputs:
        | Texts                                                                       | Labels    |
        |-----------------------------------------------------------------------------|-----------|
        | (k instructed queries, k passages, e negatives), column k + i right for i   | none      |
        | (k instructed queries), with ``passage_embeddings``                         | B×(k + e) |

        An instructed query is ``{"instruction": str, "query": str}``. An InF-IR record has k = 3 and e = 0, in the order of
        :func:`~sentence_transformers_inf.training_dataset`.

    Example:
        ::

            from sentence_transformers import SentenceTransformerTrainer
            from sentence_transformers_inf import load_instruction_model, load_records, training_dataset
            from sentence_transformers_inf.losses import InstructionContrastiveLoss

            model = load_instruction_model("sentence-transformers/all-MiniLM-L6-v2")
            loss = InstructionContrastiveLoss(model, objective="multi_P_I", plain_weight=0.5)
            trainer = SentenceTransformerTrainer(
                model=model, train_dataset=training_dataset(load_records("mini", split="train")), loss=loss
            )
            trainer.train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        objective: str = "multi_P_I",
        scale: float = 20.0,
        sampled_instructions: int | None = None,
        plain_weight: float = 0.0,
        reference: SentenceTransformer | None = None,
        anchor_weight: float = 0.0,
        gather_across_devices: bool = False,
        passage_embeddings: NDArray[np.float32] | None = None,
        max_tokens_per_chunk: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.terms = objective_terms(objective)
        for name, value, valid in (
            ("scale", scale, scale > 0),
            ("sampled_instructions", sampled_instructions, sampled_instructions is None or sampled_instructions >= 0),
            ("plain_weight", plain_weight, plain_weight >= 0),
            ("anchor_weight", anchor_weight, anchor_weight >= 0 and (anchor_weight == 0 or reference is not None)),
            ("max_tokens_per_chunk", max_tokens_per_chunk, max_tokens_per_chunk is None or max_tokens_per_chunk > 0),
        ):
            if not valid:
                raise ValueError(f"{name} must not be {value!r}")
        encoder = encoder_of(model)
        attends = len(encoder) > 1 and isinstance(encoder[1], InstructionQueryAttention)
        self.all_instructions = sampled_instructions is None and attends and "I" in self.terms and not gather_across_devices
        self.passage_embeddings = passage_embeddings
        self.model = model
        self._encoder = (encoder,)  # in a tuple: the trainer moves and wraps ``self.model``
        # The trainer wraps ``self.model`` for several devices; tokenisation goes past the wrapper.
        self.preprocess = model.preprocess
        self.tokenizer = model.tokenizer
        self.objective = objective
        self.scale = scale
        self.sampled_instructions = 1 if sampled_instructions is None else sampled_instructions
        self.plain_weight = plain_weight
        self._reference = (reference,)  # in a tuple, as the encoder: it is not trained
        self.anchor_weight = anchor_weight
        self.gather_across_devices = gather_across_devices
        self.max_tokens_per_chunk = max_tokens_per_chunk
        self.seed = seed
        self._lengths: list[list[int]] = []

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of one batch of tokenised columns, a scalar."""
        step, groups = self._prepare(list(sentence_features), labels)
        calls = [call for group in groups for call in chunks(group, self.tokenizer, self._chunk_tokens(groups))]
        self._lengths = [call["attention_mask"].sum(dim=1).tolist() for call in calls]
        encoded = [self.model(call) for call in calls]
        embeddings = self._in_order(torch.cat([features["sentence_embedding"] for features in encoded]), step, groups)
        candidates = self._candidates_by_attention(encoded, step, groups) if self.all_instructions else None
        return self._score(embeddings, step, candidates) + self._anchor_loss(embeddings, step, groups)

    def _prepare(self, columns: list[dict[str, Any]], labels: Tensor | None) -> tuple[Plan, list[Group]]:
        """The plan of a batch, and the tokens of the texts that are to be encoded."""
        records = self._records(columns, labels)
        gathered, own = [records], range(len(records))
        if self.gather_across_devices and get_world_size() > 1:
            gathered = [[] for _ in range(get_world_size())]
            torch.distributed.all_gather_object(gathered, records)
            start = sum(len(process) for process in gathered[: get_rank()])
            own = range(start, start + len(records))
        everywhere = [record for process in gathered for record in process]
        draws = self._draw([record.pairs for record in everywhere], own)
        step = plan(everywhere, own, draws, encode_candidates=not self.all_instructions)

        number = {pair: at for at, pair in enumerate(step.pairs)}
        k = len(records[0].pairs)
        numbers = [[number[record.pairs[column]] for record in records] for column in range(k)]
        if self.passage_embeddings is None:
            number_of_passage = {passage: len(number) + at for at, passage in enumerate(step.passages)}
            passages = [[*record.passages, *record.negatives] for record in records]
            numbers += [
                [number_of_passage[of_record[column]] for of_record in passages] for column in range(len(passages[0]))
            ]
        known = {pair for record in records for pair in record.pairs}
        further = sorted((pair for pair in step.pairs if pair not in known), key=_is_bare)
        for _, group in itertools.groupby(further, _is_bare):  # bare queries may have another encoder
            pairs = list(group)
            inputs = [{"instruction": instruction, "query": query} for instruction, query in pairs]
            device = columns[0]["input_ids"].device
            features = self.preprocess(inputs, prompt=columns[0].get("prompt"))
            columns.append(
                {key: value.to(device) if isinstance(value, Tensor) else value for key, value in features.items()}
            )
            numbers.append([number[pair] for pair in pairs])
        return step, group_texts(columns, numbers)

    def _records(self, columns: list[dict[str, Any]], labels: Tensor | None) -> list[Record]:
        """The texts of a batch, record by record."""
        if any("exclusions" in column for column in columns):
            raise ValueError(
                "the texts of a batch exclude something: train a model that was loaded with find_exclusions=False"
            )
        k = sum("query" in column for column in columns)
        if missing := [position for position, column in enumerate(columns[: max(k, 1)]) if "query" not in column]:
            raise ValueError(
                f"column {missing[0]} holds no instructed queries: pass {{'instruction', 'query'}} dictionaries to a model "
                "made by load_instruction_model"
            )
        if self.passage_embeddings is None:
            if len(columns) < 2 * k:
                raise ValueError(
                    f"got {k} columns of instructed queries and {len(columns) - k} of passages: expected a passage for each "
                    "instructed query (see training_dataset)"
                )
            passages: Sequence[Sequence[Any]] = list(zip(*(column["text"] for column in columns[k:])))
        else:
            if labels is None or labels.ndim != 2 or labels.shape[1] < k:
                raise ValueError(
                    f"with passage_embeddings, {k} columns of instructed queries need labels of shape B×{k} or wider"
                )
            passages = labels.tolist()
        queries = [
            [(instruction if instruction.strip() else "", query) for instruction, query in zip(c["instruction"], c["query"])]
            for c in columns[:k]
        ]
        return [Record(list(pairs), list(of[:k]), list(of[k:])) for pairs, of in zip(zip(*queries), passages)]

    def _draw(self, records: Sequence[Sequence[Pair]], own: range) -> Draws:
        plain = self.plain_weight > 0 or self.anchor_weight > 0
        if self.all_instructions:
            draws = draw(records, own, sampled_instructions=None, plain=plain, seed=self.seed)
            pool = list(dict.fromkeys(instruction for record in records for instruction, _ in record))
            return Draws([[(other, query) for other in pool] for record in records for _, query in record], draws.plain)
        sampled = self.sampled_instructions if "I" in self.terms else None
        return draw(records, own, sampled_instructions=sampled, plain=plain, seed=self.seed)

    def _chunk_tokens(self, groups: list[Group]) -> int:
        width = int(self._encoder[0][0].get_embedding_dimension())  # type: ignore[operator]
        return self.max_tokens_per_chunk or default_chunk_tokens(groups[0].texts[0]["input_ids"].device, width)

    def _in_order(self, embeddings: Tensor, step: Plan, groups: list[Group]) -> Tensor:
        """The embeddings of a plan's texts in the plan's order (N×d), passages that were encoded before included."""
        embeddings = embeddings[positions(groups, embeddings.device)]
        if self.passage_embeddings is None:
            return embeddings
        vectors = torch.from_numpy(self.passage_embeddings[np.array(step.passages), : embeddings.shape[1]])
        return torch.cat([embeddings, vectors.to(embeddings)])

    def _candidates_by_attention(self, encoded: list[dict[str, Any]], step: Plan, groups: list[Group]) -> Tensor:
        """The embeddings (R×A×d) of each row's query under every instruction of the batch, from its encoded tokens."""
        rows = [step.pairs[text] for text in step.query.tolist()]
        queries = {query: row for row, (_, query) in reversed(list(enumerate(rows)))}
        instructions = {instruction: row for row, (instruction, _) in reversed(list(enumerate(rows)))}
        pool = list(dict.fromkeys(instruction for instruction, _ in rows))
        place = {query: number for number, query in enumerate(queries)}
        position = positions(groups, encoded[0]["sentence_embedding"].device)
        at = position[step.query.to(position.device)]
        pairs = embed_pairs(
            self._encoder[0], encoded, at[list(queries.values())], at[[instructions[instruction] for instruction in pool]]
        )
        return pairs[[place[query] for _, query in rows]]

    def _score(self, embeddings: Tensor, step: Plan, candidates: Tensor | None = None) -> Tensor:
        """The loss from the embeddings of a plan's texts (N×d), and of its rows under every instruction (R×A×d)."""
        device = embeddings.device
        query, passage = embeddings[step.query.to(device)], embeddings[step.passage.to(device)]
        negatives = embeddings[step.negatives.to(device)]
        if candidates is not None:
            candidates = torch.cat([query[:, None], candidates[..., : query.shape[1]]], dim=1)
        elif "I" in self.terms:
            candidates = embeddings[step.candidates.to(device)]
        if self.gather_across_devices:
            query, passage = all_gather_with_grad(query), all_gather_with_grad(passage)
            negatives = all_gather_with_grad(negatives) if len(negatives) else negatives
        passage = torch.cat([passage, negatives[step.new_negatives.to(device)]])
        loss = instruction_contrastive_loss(
            query,
            passage,
            candidates,
            objective=self.objective,
            scale=self.scale,
            not_negative=step.not_negative.to(device),
            not_candidate=step.not_candidate.to(device),
            first_row=step.first_row,
        )
        if self.plain_weight:
            plain = self._plain_loss(embeddings[step.plain_query.to(device)], passage, step)
            loss = loss + self.plain_weight * step.plain_share * plain
        return loss

    def _anchor_loss(self, embeddings: Tensor, step: Plan, groups: list[Group]) -> Tensor:
        """What the plan's embeddings (N×d) of bare queries and first passages have moved from the reference's."""
        (reference,) = self._reference
        if reference is None or not self.anchor_weight:
            return embeddings.new_zeros(())
        numbers = {*step.plain_query.tolist(), *step.first_passage.tolist()}
        held = [group.only(numbers) for group in groups]
        limit = self._chunk_tokens(groups)
        calls = [call for group in held if group.texts for call in chunks(group, self.tokenizer, limit)]
        with torch.no_grad():
            reference.to(embeddings.device)
            expected = torch.cat([reference(call)["sentence_embedding"] for call in calls])
        moved = embeddings[[number for group in held for number in group.numbers]]
        dtype = torch.promote_types(moved.dtype, torch.float32)
        moved, expected = moved.to(dtype), expected.to(dtype)
        expected = expected[:, : moved.shape[1]]  # of fewer dimensions within Matryoshka
        return self.anchor_weight * step.anchor_share * (1 - F.cosine_similarity(moved, expected, dim=-1)).mean()

    def _plain_loss(self, query: Tensor, passage: Tensor, step: Plan) -> Tensor:
        """The P term over bare queries (Q×d): the drawn passage against all (P×d) that no row gives for the same query."""
        with torch.autocast(query.device.type, enabled=False):
            dtype = torch.promote_types(query.dtype, torch.float32)
            scores = self.scale * F.normalize(query.to(dtype), dim=-1) @ F.normalize(passage.to(dtype), dim=-1).T
            masked = scores.masked_fill(step.not_plain_negative.to(query.device), -torch.inf)
            return F.cross_entropy(masked, step.plain_positive.to(query.device))

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
        return {
            "sequences": sum(map(len, self._lengths)),
            "real_tokens": sum(map(sum, self._lengths)),
            "padded_tokens": sum(max(of_call) * len(of_call) for of_call in self._lengths),
        }

    @property
    def temperature(self) -> float:
        """τ = 1 / scale."""
        return 1.0 / self.scale

    @property
    def citation(self) -> str:
        """BibTeX of the paper."""
        return CITATION


def _is_bare(pair: Pair) -> bool:
    """Whether an (instruction, query) is a query without an instruction."""
    return not pair[0]


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
