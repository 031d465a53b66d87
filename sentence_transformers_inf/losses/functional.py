"""The objectives as one function of embeddings: no model, no tokenizer, no devices.

Rows r = 1..R are aligned triples of query q_r, instruction I_r and passage p_r, with embeddings x_r = f(I_r, q_r) and
g(p_r), and s(x, p) = scale * cos(x, p). Three conditionals (Zhuang et al. 2025, arXiv:2505.21439, §4), each a softmax
whose positive is s(x_r, p_r):

====  ==========================================  ==================================================
term  models                                      candidates
====  ==========================================  ==================================================
P     p(passage given instruction and query)      s(x_r, p_k) for all rows k
IQ    p(instruction and query given passage)      s(x_k, p_r) for all rows k
I     p(instruction given query and passage)      s(f(I', q_r), p_r) for the row's candidate instructions
====  ==========================================  ==================================================

``uni_...`` puts the candidates of all named terms in one softmax, the positive counted once; ``multi_...`` adds up one
cross-entropy per term. That makes 3 single objectives and 4 of each way, 11 in all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "uni_P": ("P",),
    "uni_IQ": ("IQ",),
    "uni_I": ("I",),
    "uni_P_IQ": ("P", "IQ"),
    "uni_P_I": ("P", "I"),
    "uni_I_IQ": ("I", "IQ"),
    "uni_P_I_IQ": ("P", "I", "IQ"),
    "multi_P_IQ": ("P", "IQ"),
    "multi_P_I": ("P", "I"),
    "multi_I_IQ": ("I", "IQ"),
    "multi_P_I_IQ": ("P", "I", "IQ"),
}
"""The 11 objectives and the terms each is made of."""


def objective_terms(objective: str) -> tuple[str, ...]:
    """The terms (``"P"``, ``"I"``, ``"IQ"``) of an objective.

    Raises:
        ValueError: There is no such objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective]


def instruction_contrastive_loss(
    query: Tensor,
    passage: Tensor,
    instruction_candidates: Tensor | None = None,
    objective: str = "multi_P_I",
    scale: float = 20.0,
    *,
    not_negative: Tensor | None = None,
    not_candidate: Tensor | None = None,
    first_row: int = 0,
) -> Tensor:
    """The loss of aligned rows of embeddings under one of the 11 objectives.

    Args:
        query: R×d, the instructed queries x_r.
        passage: N×d with N ≥ R, the passages p_r; row r belongs to row r of ``query``, and rows from R on are further
            negatives of the P term.
        instruction_candidates: R'×m×d, f(I', q_r) for the candidate instructions of each row; entry 0 of a row is x_r
            itself. Needed by the objectives with an I term.
        objective: One of :data:`OBJECTIVES`.
        scale: Inverse temperature 1/τ. Embeddings need not be of unit length: the similarity is the cosine.
        not_negative: R'×N booleans, true where rows r and k share a query with its instruction, or a passage, so that
            neither is a negative of the other. The diagonal is ignored.
        not_candidate: R'×m booleans, true where a candidate instruction is no negative. Column 0 is ignored.
        first_row: The loss is the mean over the rows ``first_row .. first_row + R' - 1``, where R' is the number of rows
            of the masks and candidates (all R without them): one process's rows among those gathered from all.

    Returns:
        A scalar, in the precision of the inputs, at least float32.

    Raises:
        ValueError: Unknown objective, shapes that do not fit, or an I term without candidates.
    """
    terms = objective_terms(objective)
    if query.ndim != 2 or passage.ndim != 2 or query.shape[1] != passage.shape[1] or len(query) > len(passage):
        raise ValueError(
            f"query must be R×d, and passage N×d with N ≥ R, got {tuple(query.shape)} and {tuple(passage.shape)}"
        )
    if "I" in terms and instruction_candidates is None:
        raise ValueError(f"the objective {objective!r} has an I term and needs instruction_candidates (R×m×d)")
    # Similarity and loss keep their precision when the encoder runs in bfloat16 under autocast.
    with torch.autocast(query.device.type, enabled=False):
        local_rows = next(
            (len(t) for t in (instruction_candidates, not_negative, not_candidate) if t is not None), len(query)
        )
        dtype = torch.promote_types(query.dtype, torch.float32)
        query, passage = F.normalize(query.to(dtype), dim=-1), F.normalize(passage.to(dtype), dim=-1)
        own = torch.arange(first_row, first_row + local_rows, device=query.device)
        local = torch.arange(local_rows, device=query.device)
        own_query, own_passage = query[own], passage[own]
        positive = scale * (own_query * own_passage).sum(-1)

        negatives: list[Tensor] = []  # one R'×K matrix per term, the positive and whatever is no negative at -inf
        for term in terms:
            if term == "I":
                assert instruction_candidates is not None
                if instruction_candidates.ndim != 3 or instruction_candidates.shape[2] != query.shape[1]:
                    raise ValueError(
                        f"instruction_candidates must be R×m×{query.shape[1]}, got {tuple(instruction_candidates.shape)}"
                    )
                candidates = F.normalize(instruction_candidates.to(dtype), dim=-1)
                scores = scale * torch.einsum("rmd,rd->rm", candidates, own_passage)
                masked = torch.zeros_like(scores, dtype=torch.bool) if not_candidate is None else not_candidate.clone()
                masked[:, 0] = True
            else:
                scores = scale * (own_query @ passage.T if term == "P" else own_passage @ query.T)
                masked = torch.zeros_like(scores, dtype=torch.bool)
                if not_negative is not None:
                    masked |= not_negative[:, : scores.shape[1]]
                masked[local, own] = True
            negatives.append(scores.masked_fill(masked, -torch.inf))

        if objective.startswith("uni_"):
            denominators = [torch.cat([positive[:, None], *negatives], dim=1)]
        else:
            denominators = [torch.cat([positive[:, None], scores], dim=1) for scores in negatives]
        return sum((d.logsumexp(dim=1) - positive).mean() for d in denominators)  # type: ignore[return-value]
