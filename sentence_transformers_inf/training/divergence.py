"""A training whose numbers are no longer finite, or that cannot write, stops with one error and is not finished."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sentence_transformers_inf.modules import BrokenModelError, check_embeddings
from sentence_transformers_inf.records import PASSAGE_COLUMNS, TRAINING_COLUMNS

_SAMPLE = 16
"""Rows of the training data whose embeddings are looked at when the training ends."""


class DivergedError(ValueError):
    """A training that diverged; the message says at which step, and what to do."""

    @classmethod
    def at(cls, step: int, what: str, learning_rate: float | None) -> DivergedError:
        """The error of a step."""
        return cls(
            f"the training diverged at step {step}: {what}. Train with a lower learning rate than {learning_rate} "
            "(--learning-rate), and with --overwrite or in another folder"
        )


class StopDiverged(TrainerCallback):
    """Stops a training whose gradients are not finite, before they reach the weights."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Called after the gradients were clipped.

        Raises:
            DivergedError: They are not finite. In float16 such steps are left out by the scaler of the loss.
        """
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not args.fp16 and not torch.isfinite(norm := nn.utils.get_total_norm(gradients)):
            step = state.global_step + 1
            raise DivergedError.at(step, f"the norm of the gradients is {float(norm)}", args.learning_rate)


def check_trained(model: SentenceTransformer, data: Dataset) -> None:
    """Refuse a model whose embeddings of some training data mean nothing.

    Args:
        model: The trained model.
        data: The training view.

    Raises:
        BrokenModelError: See :func:`~sentence_transformers_inf.modules.check_embeddings`.
    """
    rows = data[:_SAMPLE]
    queries, passages = rows[TRAINING_COLUMNS[0]], rows.get(PASSAGE_COLUMNS[0], [])  # none where their vectors are given
    check_embeddings(model.encode_query(queries), [query["query"] for query in queries], "instructed queries")
    if passages:
        check_embeddings(model.encode_document(passages), passages, "passages")


@contextlib.contextmanager
def one_line_errors(trainer: Trainer) -> Iterator[None]:
    """Say at which step a model broke, and that a disk is full, which the libraries that write do not.

    Args:
        trainer: That trains; its progress bar is closed, so that an error has a line of its own.

    Raises:
        DivergedError: Its embeddings mean nothing.
        OSError: A checkpoint or the model could not be written.
    """
    try:
        with contextlib.ExitStack() as bars:
            for each in trainer.callback_handler.callbacks:
                if isinstance(each, ProgressCallback):
                    bars.callback(_close_bar, each)
            yield
    except BrokenModelError as error:
        raise DivergedError.at(trainer.state.global_step, str(error), trainer.args.learning_rate) from error
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("inline_container|PytorchStreamWriter", str(error)):
            raise
        raise OSError(
            f"{trainer.args.output_dir}: a checkpoint or the model could not be written ({str(error).splitlines()[0]}): if "
            "the disk is full, make room; then give the same command again"
        ) from error


def _close_bar(callback: ProgressCallback) -> None:
    if callback.training_bar is not None:
        callback.training_bar.close()
