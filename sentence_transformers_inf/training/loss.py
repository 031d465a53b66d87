"""The loss of a training run, and the model that plain retrieval is held to in it."""

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf.losses import CachedInstructionContrastiveLoss, InstructionContrastiveLoss
from sentence_transformers_inf.training.arguments import InstructionTrainingArguments


def reference_of(model: SentenceTransformer, args: InstructionTrainingArguments) -> SentenceTransformer | None:
    """A copy of the model as it is before the training, in the precision of the run; ``None`` if nothing is held to it."""
    if not args.anchor_weight:
        return None
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    device = args.device.type
    lower = torch.autocast(device, torch.bfloat16, enabled=bool(args.bf16))
    reference.forward = lower(reference.forward)  # type: ignore[method-assign]
    return reference


def make_loss(
    model: SentenceTransformer,
    args: InstructionTrainingArguments,
    vectors: NDArray[np.float32] | None,
    reference: SentenceTransformer | None,
) -> InstructionContrastiveLoss:
    """The loss that the arguments ask for.

    Args:
        model: The model to train.
        args: Resolved.
        vectors: Of the passages, where they are not encoded in training.
        reference: From :func:`reference_of`.
    """
    options: dict[str, Any] = {
        "objective": args.objective,
        "scale": args.scale,
        "sampled_instructions": args.sampled_instructions,
        "plain_weight": args.plain_weight,
        "reference": reference,
        "anchor_weight": args.anchor_weight,
        "gather_across_devices": args.world_size > 1,
        "passage_embeddings": vectors,
        "max_tokens_per_chunk": args.max_tokens_per_chunk,
        "seed": args.seed,
    }
    if args.mini_batch_size is None:
        return InstructionContrastiveLoss(model, **options)
    return CachedInstructionContrastiveLoss(model, mini_batch_size=args.mini_batch_size, **options)
