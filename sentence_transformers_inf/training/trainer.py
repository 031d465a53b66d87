"""Train an instruction-following embedding model: Sentence Transformers' trainer, from records to a saved model with its
card."""

from __future__ import annotations

import contextlib
import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.evaluation import BaseEvaluator
from torch.utils.data import BatchSampler, DataLoader
from transformers import set_seed
from transformers.trainer_utils import SaveStrategy, TrainOutput
from transformers.utils import logging

from sentence_transformers_inf.corpora import bundled_base
from sentence_transformers_inf.evaluation import InstructionFollowingEvaluator, measure
from sentence_transformers_inf.losses import InstructionContrastiveLoss
from sentence_transformers_inf.modules import (
    detach_adapter,
    encoder_of,
    encoders_of,
    is_adapter,
    merge_lora,
    save_adapter,
)
from sentence_transformers_inf.modules.loading import read_model
from sentence_transformers_inf.modules.lora import lora_base, name_base
from sentence_transformers_inf.passages import (
    distinct_passages,
    encode_passages,
    passage_rows,
    read_passage_embeddings,
)
from sentence_transformers_inf.recipe import locked, write_recipe
from sentence_transformers_inf.records import TRAINING_COLUMNS
from sentence_transformers_inf.training.arguments import InstructionTrainingArguments, evaluate_with_checkpoints, resolve
from sentence_transformers_inf.training.cpu import CHUNK_TOKENS, without_padding
from sentence_transformers_inf.training.divergence import DivergedError, StopDiverged, check_trained, one_line_errors
from sentence_transformers_inf.training.encoders import build_model, describe, hardware, hidden_dropout, loras_apart
from sentence_transformers_inf.training.loss import make_loss, reference_of
from sentence_transformers_inf.training.run_folder import KeepLast, MarkComplete, RunFolder, SaveByTime, copy_of_weights
from sentence_transformers_inf.training.run_recipe import IN_MEMORY, base_name, run_recipe
from sentence_transformers_inf.training.sources import Shares, check_eval, check_train, training_view

logger = logging.get_logger(__name__)


class InstructionTrainer(SentenceTransformerTrainer):
    """Sentence Transformers' trainer for retrievers that obey instructions.

    It makes the encoders that the arguments ask for, the columns, the loss and the evaluator, and saves a finished model
    with its recipe and card. A run that was interrupted goes on from its last checkpoint when it is made again with the same
    arguments; in float32 on a CPU it ends with the same weights.

    Args:
        model: Hub id or folder of any SentenceTransformer that begins with a Transformer, or a loaded one, which is changed
            in place. ``None``: the bundled all-MiniLM-L6-v2. What was trained before is trained further.
        args: The settings; ``None``: the defaults.
        train_dataset: InF-IR records (:func:`~sentence_transformers_inf.load_records`), rows of other corpora
            (:func:`~sentence_transformers_inf.load_rows`), or the columns of
            :func:`~sentence_transformers_inf.training_dataset`. Several sources by their names are trained on together, a
            batch from one of them at a time; the host's ``multi_dataset_batch_sampler`` decides on the shares:
            ``"proportional"``, every record once, or ``"round_robin"``, as many batches of each as the smallest has.
        eval_dataset: InF-IR records, on which p-MRR and the other measures are taken. They choose the checkpoint: the last,
            unless the best by p-MRR is ahead of it by more than the standard error of the difference.
        loss: Another loss than that of the arguments.
        evaluator: Another evaluator than :class:`~sentence_transformers_inf.evaluation.InstructionFollowingEvaluator`.
        **kwargs: As for ``SentenceTransformerTrainer`` (``callbacks``, ``optimizers``, ...).

    Raises:
        OSError: There is no such base model.
        ValueError: The settings do not fit the model, or the data have other columns.

    Example:
        >>> from sentence_transformers_inf import InstructionTrainer, InstructionTrainingArguments, load_records
        >>> trainer = InstructionTrainer(
        ...     args=InstructionTrainingArguments(output_dir="my-model"),
        ...     train_dataset=load_records("mini", "train"),
        ...     eval_dataset=load_records("mini", "validation"),
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    training_args_class = InstructionTrainingArguments
    args: InstructionTrainingArguments

    def __init__(
        self,
        model: str | Path | SentenceTransformer | None = None,
        args: InstructionTrainingArguments | None = None,
        train_dataset: Dataset | dict[str, Dataset] | None = None,
        eval_dataset: Dataset | None = None,
        loss: torch.nn.Module | None = None,
        evaluator: BaseEvaluator | None = None,
        **kwargs: Any,
    ) -> None:
        args = InstructionTrainingArguments() if args is None else args
        if kwargs.get("model_init") is not None:
            raise ValueError("model_init would replace the encoders that the arguments ask for: pass model")
        self.run_folder = RunFolder(str(args.output_dir))
        self.run_folder.check_outside(None if isinstance(model, SentenceTransformer) else model, args.passage_embeddings)
        set_seed(args.seed)
        base = base_name(model)
        if not isinstance(model, SentenceTransformer):
            model = read_model(bundled_base() if model is None else str(model), trust_remote_code=args.trust_remote_code)
        args = resolve(args, model)
        records, self._validation = check_train(train_dataset), check_eval(eval_dataset)
        views = {str(name): training_view(data, args.instructions) for name, data in records.items()}
        passages, vectors = self._passages(model, args, [*views.values()])
        given = args.passage_embeddings is not None
        self._reference = reference_of(model, args)
        self._lora_base = lora_base(encoder_of(model)[0])  # type: ignore[arg-type]
        model = build_model(model, args, vectors.shape[1] if vectors is not None and given else None)
        model.model_card_data.generate_widget_examples = False
        model.model_card_data.widget = [{}]  # else the host computes examples for a card that is not used
        self._validation_vectors = None
        if vectors is not None:
            for name, view in views.items():
                columns = [column for column in TRAINING_COLUMNS if column in view.column_names]
                views[name] = view.select_columns(columns).add_column("label", passage_rows(view, passages).tolist())
            if eval_dataset is not None:
                self._validation_vectors = vectors[passage_rows(eval_dataset, passages).ravel()]
        is_ours = evaluator is None and eval_dataset is not None
        if eval_dataset is not None and is_ours:
            evaluator = InstructionFollowingEvaluator(
                eval_dataset, name="validation", passage_embeddings=self._validation_vectors
            )
        self._chooses = False
        if evaluator is not None:
            metric = "eval_validation_p_mrr" if is_ours else None
            self._chooses = evaluate_with_checkpoints(args, metric)
        if (
            len(encoders_of(model)) > 1 and args.mini_batch_size is None
        ):  # each call of DDP's in a step leaves an encoder out
            args.ddp_static_graph = True
        super().__init__(
            model=model,
            args=args,
            train_dataset=views if len(views) > 1 else next(iter(views.values())),
            loss=make_loss(model, args, vectors, self._reference) if loss is None else loss,
            evaluator=evaluator,
            **kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("FSDP and DeepSpeed are not supported: the encoders are saved whole. Use torchrun alone (DDP)")
        if args.ddp_static_graph:  # whose gradients PyTorch cannot leave unsynchronised while they accumulate
            self.accelerator.no_sync = lambda model: contextlib.nullcontext()
        self.keep_last = KeepLast()
        self._add_callbacks()
        self._recipe = run_recipe(base, records, args)
        self._is_trained = False

    def _add_callbacks(self) -> None:
        self.add_callback(StopDiverged())
        self.add_callback(MarkComplete())
        if self.args.save_minutes and self.args.save_strategy != SaveStrategy.NO:
            self.add_callback(SaveByTime(self.args.save_minutes))
        if self._chooses:
            self.add_callback(self.keep_last)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, choose the checkpoint, and save the finished model with its recipe and card in ``output_dir``.

        Args:
            resume_from_checkpoint: A checkpoint to go on from. ``None``: the last one of the same run, if it was
                interrupted. ``False``: none.
            *args: As for the host.
            **kwargs: The same.

        Raises:
            FileExistsError: ``output_dir`` holds a finished model, a run with other settings, or something else.
            DivergedError: The loss, a gradient or the embeddings are not finite; nothing is saved as finished.
            OSError: Another command is writing in ``output_dir``, or the disk is full.
        """
        with self.run_folder.held(), one_line_errors(self):
            self.run_folder.claim(self._recipe, self.args.overwrite)
            if resume_from_checkpoint in (None, True):
                resume_from_checkpoint = self.run_folder.last_checkpoint()
            return self._train(resume_from_checkpoint, *args, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> TrainOutput:
        logger.info(self.summary())
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.enter_context(loras_apart(self.model))
            stack.enter_context(hidden_dropout(self.model, self.args.dropout))
            is_unpadded = stack.enter_context(without_padding(self.model))
            if self._reference is not None:
                stack.enter_context(without_padding(self._reference))
            if is_unpadded and self.args.max_tokens_per_chunk is None and isinstance(self.loss, InstructionContrastiveLoss):
                self.loss.max_tokens_per_chunk = CHUNK_TOKENS
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        # Left under autocast the model would encode in bfloat16 from now on.
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.args.gradient_checkpointing:
            for transformer in encoders_of(self.model):
                transformer.model.gradient_checkpointing_disable()
        self.choose_weights()
        for view in self.train_dataset.values() if isinstance(self.train_dataset, dict) else [self.train_dataset]:
            check_trained(self.model, view)
        self.model.requires_grad_(True)
        if is_adapter(self.model):  # which other programs cannot attach: nothing has to equal a joined string there
            encoder_of(self.model)[0].find_exclusions = True  # type: ignore[assignment]
        if not resume_from_checkpoint:  # else these are only the minutes since the interruption
            minutes = round((time.monotonic() - started) / 60, 1)
            self._recipe |= {"minutes": minutes, "hardware": hardware(self.model.device)}
        self._is_trained = True
        self.save_model(_internal_call=True)
        return output

    def reopen(self) -> None:
        """Let :meth:`train` end a run again whose model was saved, but not what its command does after that.

        Raises:
            FileExistsError: As for :meth:`train`.
        """
        self.run_folder.reopen(self._recipe)
        self.run_folder.check(self._recipe, self.args.overwrite)

    def get_batch_sampler(self, dataset: Dataset, batch_size: int, *args: Any, **kwargs: Any) -> BatchSampler | None:
        """As the host's; where there are several sources, the batch of all processes."""
        return super().get_batch_sampler(dataset, self._processes() * batch_size, *args, **kwargs)

    def get_multi_dataset_batch_sampler(self, *args: Any, **kwargs: Any) -> BatchSampler:
        """As the host's, but that all processes have records of one source in a step: only such can be compared."""
        mixed = super().get_multi_dataset_batch_sampler(*args, **kwargs)
        return Shares(mixed, self._processes()) if self._processes() > 1 else mixed

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As the host's."""
        loader = super().get_train_dataloader()
        if self._processes() > 1:  # where a resumed epoch is looked for
            loader.batch_sampler.sampler = loader.batch_sampler.batch_sampler  # type: ignore[union-attr]
        return loader

    def _processes(self) -> int:
        """How many processes share a batch that the samplers make."""
        return self.accelerator.num_processes if isinstance(self.train_dataset, dict) else 1

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the host's.

        Raises:
            DivergedError: The loss is not finite.
        """
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss).all():
            step = self.state.global_step + 1
            raise DivergedError.at(step, f"the loss is {float(loss.mean())}", self.args.learning_rate)
        return loss

    def summary(self) -> str:
        """What is trained, in which precision and where, in a line."""
        precision = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else "float32"
        return f"{describe(self.model)}; {precision} on {hardware(self.model.device)}"

    def choose_weights(self) -> None:
        """Take the last weights, unless the best by p-MRR on validation, which are loaded, are ahead of them beyond noise.

        On few records the maximum over the checkpoints is mostly luck, while the last has learned at the lowest rate. So an
        earlier one must be ahead by more than the standard error, over the records, of its difference to the last.
        """
        best_checkpoint = self.state.best_model_checkpoint
        if not self._chooses or best_checkpoint is None or best_checkpoint.endswith(f"-{self.state.global_step}"):
            return  # the best are the last
        measured = functools.partial(measure, records=self._validation, passage_embeddings=self._validation_vectors)
        best = copy_of_weights(self.model)
        ahead = measured(self.model).values["p_mrr"]
        self.model.load_state_dict(self.keep_last.weights)
        ahead = ahead - measured(self.model).values["p_mrr"]
        if ahead.mean() > ahead.std(ddof=1) / len(ahead) ** 0.5:
            self.model.load_state_dict(best)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with its recipe and card.

        Args:
            output_dir: Where to; ``None``: ``output_dir`` of the arguments. The recipe and card are only of a trained model.
            _internal_call: Of the host: whether a checkpoint is saved, or the model before a push.
        """
        if output_dir is not None and _internal_call:  # a checkpoint, with all that is needed to go on
            super().save_model(output_dir, _internal_call=True)
            return
        if self.is_world_process_zero():
            folder = RunFolder(output_dir or str(self.args.output_dir))
            with locked(folder.path):
                self._save_finished(folder)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_finished(self, folder: RunFolder) -> None:
        if self._is_trained:  # not finished until all is written
            write_recipe(folder.path, self._recipe)
        model, name = self.model.eval(), self._recipe["base"]
        revision = self.model.model_card_data.base_model_revision if self._recipe["base_on_hub"] else None
        if is_adapter(model) and not self.args.merge_base:
            router: Any = model[0]
            router.origin = router.origin or (name, revision)
            save_adapter(model, folder.path, *router.origin)
        else:
            if self.args.merge_base or (len(encoders_of(model)) > 1 and not is_adapter(model)):
                for transformer in encoders_of(model):
                    merge_lora(transformer)
            model.save_pretrained(str(folder.path), create_model_card=False)
            if self._lora_base or name != IN_MEMORY:
                name_base(folder.path, *(self._lora_base or (name, revision)))
        folder.share_weights()
        if self._is_trained:
            self._write_card(folder)
            folder.finish(self._recipe)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Push the finished model and its card, without what only the run needs, to ``hub_model_id``.

        Args:
            commit_message: Of the model's files.
            blocking: Of the host; it always is.
            token: ``None``: that of the arguments, else of the login.
            revision: Branch to push to; ``None``: that of the arguments.
            private: Whether a repository that is created is private; ``None``: as the arguments say, else it is.
            **kwargs: Of the host; not used.

        Returns:
            The address of the model; ``None`` on all processes but the first.
        """
        from sentence_transformers_inf.hub.push import push_model  # above this room

        if not self.run_folder.is_finished:
            self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        repo = self.args.hub_model_id or self.hub_model_id or Path(str(self.args.output_dir)).resolve().name
        private = self.args.hub_private_repo if private is None else private
        return push_model(
            str(self.args.output_dir),
            repo,
            public=private is False,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            commit_message=commit_message or "Upload the model",
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of the finished model in ``output_dir``; what the host would put on a card is not used."""
        if self.is_world_process_zero() and self.run_folder.is_finished:
            self._write_card(self.run_folder)

    def _write_card(self, folder: RunFolder) -> None:
        from sentence_transformers_inf.hub.card import write_model_card  # above this room

        write_model_card(folder.path, name=self.args.hub_model_id, model=self.model)

    def _passages(
        self, model: SentenceTransformer, args: InstructionTrainingArguments, views: list[Dataset]
    ) -> tuple[list[str], NDArray[np.float32] | None]:
        """The distinct passages of training and validation with their vectors, where no passage is encoded in training."""
        if args.update != "queries":
            return [], None
        passages = distinct_passages(views if self._validation is None else [*views, self._validation])
        if args.passage_embeddings is not None:
            return passages, read_passage_embeddings(args.passage_embeddings, passages)
        base = detach_adapter(model) if is_adapter(model) else model
        return passages, encode_passages(base, passages, show_progress=not args.disable_tqdm)
