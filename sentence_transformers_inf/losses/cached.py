"""The objectives with GradCache (Gao et al. 2021, arXiv:2101.06983): large batches, little memory."""

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from torch import Tensor

from sentence_transformers_inf.losses.batch import Plan
from sentence_transformers_inf.losses.chunks import Group
from sentence_transformers_inf.losses.instruction_contrastive import InstructionContrastiveLoss


class CachedInstructionContrastiveLoss(CachedLossMixin, InstructionContrastiveLoss):
    """:class:`~sentence_transformers_inf.losses.InstructionContrastiveLoss` with GradCache.

    Texts are encoded ``mini_batch_size`` at a time, twice, and only one mini-batch's activations are alive. Loss and
    gradients are those of the plain loss, up to dropout.

    Args:
        model: See :class:`~sentence_transformers_inf.losses.InstructionContrastiveLoss`, as for all further arguments.
        mini_batch_size: Texts encoded at a time.
        show_progress_bar: Show the mini-batches of every step.
        **kwargs: The arguments of :class:`~sentence_transformers_inf.losses.InstructionContrastiveLoss`.
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
        self.all_instructions = False  # their tokens would have to be kept
        self.mini_batch_size = mini_batch_size
        self.show_progress_bar = show_progress_bar

    _step: tuple[Plan, list[Group]]

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of one batch of tokenised columns, a scalar whose backward pass re-encodes the batch."""
        self._step = _, groups = self._prepare(list(sentence_features), labels)
        size = self.mini_batch_size
        self._lengths = [
            group.lengths[start : start + size] for group in groups for start in range(0, len(group.texts), size)
        ]
        return self.forward_cached([group.features(self.tokenizer) for group in groups])

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss from the embeddings of the mini-batches; called by the mixin within :meth:`forward`."""
        step, groups = self._step
        embeddings = self._in_order(torch.cat([rep for group in reps for rep in group]), step, groups)
        loss = self._score(embeddings, step) + self._anchor_loss(embeddings, step, groups)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments of this loss, for the model card."""
        return {**super().get_config_dict(), "mini_batch_size": self.mini_batch_size}
