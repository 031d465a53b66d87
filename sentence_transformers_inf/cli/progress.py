"""What is seen of a training."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sentence_transformers_inf.cli.display import print_line
from sentence_transformers_inf.cli.tables import SHORT_NAMES
from sentence_transformers_inf.evaluation import InstructionFollowingEvaluator, Result, measure
from sentence_transformers_inf.training import InstructionTrainer

_SHOWN = ("p_mrr", "pair_accuracy", "plain_ndcg_at_10")


def measured(trainer: InstructionTrainer) -> Result | None:
    """The model of a trainer on its validation records, on the first process; ``None`` where there are none."""
    evaluator = trainer.evaluator
    if not trainer.is_world_process_zero() or not isinstance(evaluator, InstructionFollowingEvaluator):
        return None
    return measure(trainer.model, evaluator.records, passage_embeddings=evaluator.passage_embeddings)


def report_progress(trainer: InstructionTrainer, before: Result | None = None) -> None:
    """Show the steps and evaluations of a trainer, and no dictionaries as its host does.

    Args:
        trainer: Before it trains.
        before: The base model's measurements, to stand beside those of each evaluation.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if trainer.is_world_process_zero():
        trainer.add_callback(_Lines(before))


class _Lines(TrainerCallback):
    """A bar on a terminal and a line every so many steps elsewhere, and a line for each evaluation."""

    def __init__(self, before: Result | None) -> None:
        self._base = {} if before is None else before.means()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._started = time.monotonic()
        without_bar = args.disable_tqdm or not sys.stderr.isatty()
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, disable=without_bar
        )
        if state.global_step:
            self._say(f"Going on from step {state.global_step} of {state.max_steps}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        self._bar.set_postfix(loss=f"{logs['loss']:.3f}")
        if self._bar.disable:
            minutes = (time.monotonic() - self._started) / 60
            self._say(f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.3f}, {minutes:.1f} minutes")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        parts = []
        for metric in _SHOWN:
            if (value := (metrics or {}).get(f"eval_validation_{metric}")) is not None:
                base = f" (base {self._base[metric]:.1f})" if metric in self._base else ""
                parts.append(f"{SHORT_NAMES[metric]} {value:.1f}{base}")
        if parts:
            self._say(f"step {state.global_step} of {state.max_steps}: {', '.join(parts)}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.close()

    def _say(self, line: str) -> None:
        with tqdm.external_write_mode():
            print_line(line)
