"""One recipe: records + base model + objective -> a checkpoint that obeys instructions.

Everything is Sentence Transformers' own trainer; this module chooses the data view, the loss, the defaults (chosen on the
validation split, see docs/recipe.md) and the bookkeeping that makes a run repeatable and resumable.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from numpy.typing import NDArray
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import set_seed

from sentence_transformers_inf.corpora import BUNDLED_BASE, bundled_base, load_training_data
from sentence_transformers_inf.cpu_attention import use_cpu_attention, use_sdpa_again
from sentence_transformers_inf.evaluation import InstructionFollowingEvaluator, Result, measure
from sentence_transformers_inf.hub.card import write_model_card
from sentence_transformers_inf.losses import CachedInstructionContrastiveLoss, InstructionContrastiveLoss
from sentence_transformers_inf.modules import (
    InstructionQueryAttention,
    InstructionRouter,
    InstructionTransformer,
    add_lora,
    encoder_of,
    encoders_of,
    has_lora,
    instructed_tower,
    load_instruction_model,
    merge_lora,
    name_base,
    save_adapter,
    separated_template,
    two_towers,
)
from sentence_transformers_inf.modules.loading import read_model
from sentence_transformers_inf.passages import distinct_passages, encode_passages, passage_rows, read_passage_embeddings
from sentence_transformers_inf.recipe import RECIPE_FILE
from sentence_transformers_inf.records import (
    PASSAGE_COLUMNS,
    ROW_COLUMNS,
    TRAINING_COLUMNS,
    is_on_hub,
    load_records,
    record_splits,
    revision_of,
    training_dataset,
)

_CPUINFO = Path("/proc/cpuinfo")

_NOT_OF_THE_RUN = ("output", "overwrite", "show_progress", "say")

ADAPTER_LORA_R = 32
"""Rank of the LoRA of ``update="queries"``."""

ENCODERS = ("shared", "instructed", "separate")
"""What may have an encoder of its own: nothing, instructed queries, or queries; see :func:`train`."""

SCHEDULES = {
    "instructed": {"epochs": 2.0, "learning_rate": 3e-4, "batch_size": 8, "sampled_instructions": 0},
    "both": {"epochs": 1.6, "learning_rate": 2.5e-4, "batch_size": 16},
    "queries": {"epochs": 4.0, "learning_rate": 3e-4, "batch_size": 16},
    "lora": {"epochs": 4.0, "learning_rate": 2e-3, "batch_size": 16},
}
"""Epochs, peak learning rate, records a step and, where it is not the loss's own default, sampled candidates, by what is
trained: both sides, instructed queries with an encoder of their own; both sides otherwise; a copy for queries; or a LoRA.
See docs/recipe.md."""

PASSAGE_RATE = 0.4
"""Of the learning rate of instructed queries' own encoder: that of the other one, with ``encoders="instructed"``."""


def train(
    data: str | Path = "mini",
    base: str | Path | None = None,
    output: str | Path = "inf-embed",
    *,
    objective: str = "multi_P_I",
    instructions: bool = True,
    template: str | None = None,
    interaction: str | None = None,
    update: str = "both",
    encoders: str | None = None,
    lora_r: int | None = None,
    merge_base: bool = False,
    passage_embeddings: str | Path | None = None,
    epochs: float | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    mini_batch_size: int | None = None,
    scale: float = 20.0,
    sampled_instructions: int | None = None,
    plain_weight: float = 0.75,
    anchor_weight: float = 0.0,
    base_weight: float = 0.0,
    dropout: float = 0.1,
    frozen_layers: int = 2,
    warmup: float = 0.1,
    seed: int = 42,
    bf16: bool | None = None,
    gradient_checkpointing: bool = False,
    evaluations: int = 4,
    max_records: int | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> SentenceTransformer:
    """Train an instruction-following embedding model and save it.

    The run writes a checkpoint at every evaluation. If it is interrupted, the same call goes on from the last complete
    one and, in float32 on a CPU, ends with the same weights.

    Args:
        data: InF-IR records, as for :func:`~sentence_transformers_inf.load_records`; the split ``train`` is trained on,
            and ``validation``, if there, chooses the checkpoint: the last, unless the best by p-MRR is ahead of it by more
            than the standard error of the difference. Or Promptriever's or FollowIR's training data, as for
            :func:`~sentence_transformers_inf.load_rows`: a row counts as a record, and the last checkpoint is kept.
        base: Hub id or folder of any SentenceTransformer that begins with a Transformer. ``None``: :func:`bundled_base`.
        output: Folder for the model, its card, ``recipe.json``, the measurements on ``validation`` (``eval/``) and, until
            the run is finished, what resuming needs (``checkpoints/``).
        objective: One of the 11 of :data:`~sentence_transformers_inf.losses.OBJECTIVES`.
        instructions: With ``False``, the training data's instructions are left out: the baseline that tells what training on
            the same queries and passages gives without them.
        template: How instruction and query are joined; ``None``: the base's own, else the tokenizer's separator stands
            between them (``"{query} [SEP] {instruction}"`` for BERT), where it has one.
        interaction: ``"concatenation"``, ``"paper"`` or ``"gated"``; ``None``: the base's own, else concatenation. See
            :func:`~sentence_transformers_inf.load_instruction_model`.
        update: ``"both"``: queries and passages are trained. ``"queries"``: only what encodes instructed queries is;
            passages and bare queries go through the base model, untouched, so that an index of it stays as it is. The
            passages are encoded once, and what is saved is an adapter.
        encoders: ``"instructed"``: instructed queries have an encoder of their own, which begins as a copy of the one that
            passages and bare queries share and which learns at :data:`PASSAGE_RATE`; both are saved. ``"shared"``: one for
            all. ``"separate"``: queries and passages have one each (:func:`two_towers`). ``None``: ``"instructed"``, which
            obeys better at about the same cost (docs/recipe.md), or ``"shared"`` with LoRA, with attention and without
            instructions. A base that has two encoders already, or attention, stays as it is.
        lora_r: Rank of a LoRA that is trained in the place of the encoder's weights; 0: the weights themselves. ``None``:
            :data:`ADAPTER_LORA_R` for ``update="queries"``, else 0.
        merge_base: Save the base with the adapter, and LoRA merged into the weights, so that the folder needs nothing else.
            The LoRAs of two encoders are always merged.
        passage_embeddings: For ``update="queries"``: vectors of the passages from a model that cannot be run here, as for
            :func:`~sentence_transformers_inf.passages.read_passage_embeddings`. ``base`` then learns to encode queries,
            instructed and bare, into their space, and is saved whole.
        epochs: Passes over the records; ``None``: the best found for what is trained (:data:`SCHEDULES`).
        learning_rate: Peak of a linear schedule (AdamW); ``None``: likewise.
        batch_size: Records per step and device, each of three rows; ``None``: likewise.
        mini_batch_size: Use the GradCache loss with so many texts at a time; for batches larger than memory.
        scale: Inverse temperature.
        sampled_instructions: Candidates of the I term drawn from other records, beside the poisoned twin. ``None``:
            likewise, else see :class:`~sentence_transformers_inf.losses.InstructionContrastiveLoss`.
        plain_weight: Weight of the bare queries' P term, which keeps plain retrieval intact; with an adapter there is
            nothing to keep, and it is not used.
        anchor_weight: Weight of the distance of passages and bare queries to where the base model puts them.
        base_weight: Share of the base model's weights in the result: (1 - base_weight) · trained + base_weight · base
            (Wortsman et al. 2022, arXiv:2109.01903).
        dropout: Dropout probability of the encoder's hidden states while training (:class:`HiddenDropout`).
        frozen_layers: Keep the embeddings and so many of the lowest layers as they are; 0: train everything. Not used with
            LoRA, which keeps them all.
        warmup: Share of the steps over which the learning rate rises.
        seed: Of data order, candidates and dropout.
        bf16: Encode in bfloat16 under autocast; similarities and loss stay in float32. ``None``: where
            :func:`has_fast_bfloat16` says so.
        gradient_checkpointing: Keep no activations inside layers but compute them again, for less memory.
        evaluations: How often to evaluate on ``validation`` and write a checkpoint, evenly over the run.
        max_records: Train on the first so many records only.
        overwrite: Start anew in a folder that holds another or a finished run.
        show_progress: Show a progress bar.
        say: Told what was inferred of the base and the machine.

    Returns:
        The chosen model, as saved.

    Raises:
        FileExistsError: ``output`` holds a finished run, or an unfinished one with other settings.
        FileNotFoundError, OSError: No such data or base model.
        ValueError: Bad records or settings.
    """
    adapter = update == "queries" and passage_embeddings is None
    lora_r = (ADAPTER_LORA_R if adapter else 0) if lora_r is None else lora_r
    if update not in ("both", "queries"):
        raise ValueError(f"unknown update {update!r}; there are both and queries")
    if encoders is None and update == "both":
        own = instructions and not lora_r and interaction in (None, "concatenation")
        encoders = "instructed" if own else "shared"
    schedule = SCHEDULES["lora" if lora_r else "instructed" if encoders == "instructed" else update]
    epochs = schedule["epochs"] if epochs is None else epochs
    learning_rate = schedule["learning_rate"] if learning_rate is None else learning_rate
    batch_size = int(schedule["batch_size"]) if batch_size is None else batch_size
    by_schedule = sampled_instructions is None and "sampled_instructions" in schedule
    if by_schedule:
        sampled_instructions = int(schedule["sampled_instructions"])
    plain_weight = 0.0 if adapter else plain_weight
    bf16 = has_fast_bfloat16() if bf16 is None else bf16
    settings = {name: value for name, value in locals().items() if name in inspect.signature(train).parameters}
    settings = {name: value for name, value in settings.items() if name not in _NOT_OF_THE_RUN}
    _check(settings)
    output = Path(output)

    splits = record_splits(data)
    records = load_training_data(data, "train" if "train" in splits else None, max_records)
    records_revision = revision_of(records)
    of_rows = set(ROW_COLUMNS) <= set(records.column_names)
    validation = load_records(data, "validation") if "validation" in splits and not of_rows else None
    vectors: NDArray[np.float32] | None = None
    passages: list[str] = []
    if passage_embeddings is not None:
        passages = distinct_passages([load_records(data, split) for split in splits])
        vectors = read_passage_embeddings(passage_embeddings, passages)
    fingerprint = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    fingerprint |= {"base": BUNDLED_BASE if base is None else str(base)}
    fingerprint |= {"records": len(records), "records_sha256": _hash_records(records)}
    checkpoints = output / "checkpoints"
    licence = _license(base)

    set_seed(seed)
    model = read_model(bundled_base() if base is None else str(base))
    if template is None and not isinstance(encoder_of(model)[0], InstructionTransformer):
        template = separated_template(model.tokenizer)
    model = load_instruction_model(model, template, interaction=interaction)
    view = training_dataset(records, instructions)
    if adapter:
        passages = distinct_passages([view] if validation is None else [view, validation])
        vectors = encode_passages(model, passages, show_progress=show_progress)
        model = instructed_tower(model, lora=lora_r > 0)
    elif vectors is not None:
        model = _into_space(model, vectors.shape[1])
    elif encoders == "separate":
        model = two_towers(model)
    elif encoders == "instructed" and _is_single(model):
        model = instructed_tower(model).requires_grad_(True)
    elif encoders == "instructed" and not isinstance(model[0], InstructionRouter):  # a base with attention
        fingerprint["encoders"] = "shared"
        if by_schedule:
            sampled_instructions = fingerprint["sampled_instructions"] = None
    model.model_card_data.generate_widget_examples = False
    lower = bf16 and model.device.type == "cpu"
    own_dropout = _replace_dropout(model, dropout, seed, torch.bfloat16 if lower else torch.float32)
    attending = use_cpu_attention(model, lower)
    for encoder in encoders_of(model, trained=adapter):
        if lora_r:
            add_lora(encoder, lora_r)
        elif frozen_layers:
            _freeze(encoder, frozen_layers)
        if gradient_checkpointing:
            encoder.model.gradient_checkpointing_enable({"use_reentrant": False})
    lowered = _cast_frozen(model) if lower else []
    unpadded = ", texts without padding" if encoder_of(model)[0].can_flatten_inputs else ""
    say(f"{_describe(model)}; {'bfloat16' if bf16 else 'float32'} on {_hardware()}{unpadded}")
    base_state = {name: value.clone() for name, value in model.state_dict().items()} if base_weight else {}

    evaluator, rows = None, None
    if validation is not None:
        rows = None if vectors is None else vectors[passage_rows(validation, passages).ravel()]
        evaluator = InstructionFollowingEvaluator(validation, name="validation", passage_embeddings=rows)
    share = min(1 / evaluations, 1 - 1e-6)  # of all steps: the trainer takes 1 for one step
    when: dict[str, Any] = {"save_strategy": "steps", "save_steps": share}
    if evaluator is not None:
        when |= {"eval_strategy": "steps", "eval_steps": when["save_steps"]}
        when |= {"metric_for_best_model": "eval_validation_p_mrr", "greater_is_better": True}  # whose checkpoint is kept
    rates = {}
    if not adapter and isinstance(model[0], InstructionRouter) and "base" in model[0].sub_modules:
        rates = {r"sub_modules\.base\.": PASSAGE_RATE * learning_rate}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=warmup,
        lr_scheduler_type="linear",
        bf16=bf16,
        use_cpu=model.device.type == "cpu",  # else bf16 is refused there
        seed=seed,
        save_total_limit=2,
        logging_steps=10,
        report_to="none",
        disable_tqdm=not show_progress,
        dataloader_pin_memory=torch.cuda.is_available(),
        prompts=_prompts(model),
        learning_rate_mapping=rates,
        ddp_static_graph=isinstance(model[0], InstructionRouter),  # each of a step's passes leaves one of the encoders out
        **when,
    )
    options: dict[str, Any] = {
        "objective": objective,
        "scale": scale,
        "sampled_instructions": sampled_instructions,
        "plain_weight": plain_weight,
        "anchor_weight": anchor_weight,
        "gather_across_devices": arguments.world_size > 1,
        "passage_embeddings": vectors,
        "seed": seed,
    }
    loss = (
        InstructionContrastiveLoss(model, **options)
        if mini_batch_size is None
        else CachedInstructionContrastiveLoss(model, mini_batch_size=mini_batch_size, **options)
    )
    if vectors is not None:
        labels = passage_rows(view, passages).tolist()
        view = view.select_columns([name for name in TRAINING_COLUMNS if name in view.column_names])
        view = view.add_column("label", labels)
    _claim(output, fingerprint, overwrite)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=view, loss=loss, evaluator=evaluator)
    started, resumed_from = time.monotonic(), _last_complete(checkpoints)
    trainer.train(resume_from_checkpoint=resumed_from)
    if validation is not None:
        _take_best(trainer, model, partial(measure, records=validation, passage_embeddings=rows))
    minutes = (time.monotonic() - started) / 60

    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else it would encode under autocast from now on
    for parent, name, module in own_dropout:
        setattr(parent, name, module)
    for layer in lowered:
        del layer.forward
    use_sdpa_again(attending)
    if gradient_checkpointing:
        for encoder in encoders_of(model):
            encoder.model.gradient_checkpointing_disable()
    model.requires_grad_(True)
    if base_weight:
        trained = model.state_dict()
        model.load_state_dict(
            {
                name: torch.lerp(trained[name], value, base_weight) if value.is_floating_point() else value
                for name, value in base_state.items()
            }
        )
    if trainer.is_world_process_zero():
        model.eval()
        if merge_base or encoders in ("instructed", "separate"):
            for encoder in encoders_of(model):
                merge_lora(encoder)
        recipe = {**fingerprint, "license": licence, "data_on_hub": is_on_hub(data)}
        recipe |= {"base_on_hub": base is None or not Path(base).exists(), "data_revision": records_revision}
        if resumed_from is None:  # else these are only the minutes since the interruption
            recipe |= {"minutes": round(minutes, 1), "hardware": _hardware()}
        _save(model, output, recipe, as_adapter=adapter and not merge_base)
        if (checkpoints / "eval").is_dir():  # the evaluator's CSV files
            shutil.rmtree(output / "eval", ignore_errors=True)
            shutil.move(checkpoints / "eval", output / "eval")
        shutil.rmtree(checkpoints)
    return model


def _take_best(trainer: SentenceTransformerTrainer, model: SentenceTransformer, measured: Callable[..., Result]) -> None:
    """Load the checkpoint that had the highest p-MRR on validation, unless that is within the noise of the last one's.

    On few records the maximum over the checkpoints is mostly luck, while the last has learned at the lowest rate. So an
    earlier one must be ahead by more than the standard error, over the records, of its difference to the last.
    """
    if trainer.state.best_model_checkpoint is None or trainer.state.best_global_step == trainer.state.global_step:
        return
    last = {name: value.clone() for name, value in model.state_dict().items()}
    values = measured(model).values["p_mrr"]
    trainer._load_best_model()
    ahead = measured(model).values["p_mrr"] - values
    if not ahead.mean() > ahead.std(ddof=1) / len(ahead) ** 0.5:
        model.load_state_dict(last)


def _save(model: SentenceTransformer, output: Path, recipe: dict[str, Any], as_adapter: bool) -> None:
    """Save a trained model with its recipe, which is finished from then on, and its card."""
    name = recipe["base"]
    revision = model.model_card_data.base_model_revision if recipe["base_on_hub"] else None
    if as_adapter:
        save_adapter(model, output, name, revision)
    else:
        for encoder in encoders_of(model):
            name_base(encoder, name, revision)
        model.save_pretrained(str(output), create_model_card=False)
    (output / RECIPE_FILE).write_text(json.dumps({**recipe, "finished": True}, indent=2) + "\n", encoding="utf-8")
    write_model_card(output, model=model)


class HiddenDropout(torch.nn.Module):
    """Dropout of hidden states that costs next to nothing on a CPU, where drawing a fresh mask costs as much as the layer.

    A mask is a slice, at a random offset, of one long mask that was drawn once. Attention probabilities are not dropped:
    encoders read their rate from ``p``, which is 0 here, so that attention stays fused.

    Args:
        rate: Probability of a zero; what is left is scaled by 1 / (1 - rate).
        mask: A long mask, 0 or 1 / (1 - rate), shared by all modules. In bfloat16, hidden states become bfloat16 too.
    """

    p = 0.0

    def __init__(self, rate: float, mask: torch.Tensor) -> None:
        super().__init__()
        self.rate = rate
        self.mask = mask

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Drop hidden states (any shape) while training."""
        if not self.training or not self.rate:
            return hidden_states
        size = hidden_states.numel()
        if hidden_states.device.type != "cpu" or size >= len(self.mask):
            return torch.nn.functional.dropout(hidden_states, self.rate)
        start = int(torch.randint(len(self.mask) - size, (1,)))
        return hidden_states.to(self.mask.dtype) * self.mask[start : start + size].view_as(hidden_states)


def _replace_dropout(
    model: SentenceTransformer, rate: float, seed: int, dtype: torch.dtype = torch.float32
) -> list[tuple[torch.nn.Module, str, torch.nn.Module]]:
    """Put :class:`HiddenDropout` in the place of every dropout; returns (parent, name, module) of what was there."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(1 << 24 if rate else 1, generator=generator) >= rate).to(dtype) / (1 - rate)
    replaced: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, torch.nn.Dropout):
                replaced.append((parent, name, module))
                setattr(parent, name, HiddenDropout(rate, mask))
    return replaced


def _cast_frozen(model: SentenceTransformer) -> list[torch.nn.Linear]:
    """Let linear layers that are frozen use bfloat16 copies of their weights; returns them.

    Of weights that are trained autocast keeps a step what it made, but these it would make anew for every chunk.
    """
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    frozen = [layer for layer in layers if not layer.weight.requires_grad]
    for layer in frozen:
        weight, bias = layer.weight.bfloat16(), None if layer.bias is None else layer.bias.bfloat16()
        layer.forward = partial(_linear, weight, bias)  # type: ignore[method-assign]
    return frozen


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(hidden_states.to(weight.dtype), weight, bias)


def _describe(model: SentenceTransformer) -> str:
    """What was inferred of a base, in a line."""
    modules = encoder_of(model)
    encoder, pooling = cast(InstructionTransformer, modules[0]), modules[1] if len(modules) > 1 else None
    parts = [type(encoder.model).__name__]
    if isinstance(pooling, Pooling):
        parts.append(f"{pooling.pooling_mode} pooling")
    if encoder.tokenizer is not None:
        parts.append(f"padding on the {encoder.tokenizer.padding_side}")
    parts += [f"prompt {prompt!r} before a {name}" for name, prompt in model.prompts.items() if prompt]
    if has_lora(encoder):
        paths = encoder.model.peft_config["default"].target_modules
        parts.append(f"LoRA on {', '.join(sorted({'.'.join(path.split('.')[-2:]) for path in paths}))}")
    return f"Base: {'; '.join(parts)}"


def _is_single(model: SentenceTransformer) -> bool:
    """Whether a model has one encoder, in which instruction and query are one string."""
    return not any(isinstance(module, (InstructionRouter, InstructionQueryAttention)) for module in model)


def _into_space(model: SentenceTransformer, dimension: int) -> SentenceTransformer:
    """The model with a linear layer to another dimension after it, where its own is another."""
    size = int(model.get_embedding_dimension() or 0)
    if size != dimension:
        model.append(Dense(size, dimension, activation_function=torch.nn.Identity()).to(model.device))
    return model


def _prompts(model: SentenceTransformer) -> dict[str, str]:
    """The prompt of each column of the training data: what encode_query and encode_document would put before it."""
    query, passage = model.prompts.get("query"), model.prompts.get("document") or model.prompts.get("passage")
    columns = {**dict.fromkeys(TRAINING_COLUMNS, query), **dict.fromkeys(PASSAGE_COLUMNS, passage)}
    return {column: prompt for column, prompt in columns.items() if prompt}


def _freeze(transformer: InstructionTransformer, count: int) -> None:
    """Freeze what comes before the layers of an encoder (its embeddings), and the first ``count`` layers."""
    encoder = transformer.model
    stacks = [module for module in encoder.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = max(stacks, key=len, default=torch.nn.ModuleList())
    if count >= len(layers):
        raise ValueError(f"frozen_layers must be less than the {len(layers)} layers of the encoder, got {count}")
    first_trained = next(layers[count].parameters())
    for parameter in encoder.parameters():
        if parameter is first_trained:
            return
        parameter.requires_grad_(False)


def _check(settings: dict[str, Any]) -> None:
    if settings["encoders"] not in (None, *ENCODERS):
        raise ValueError(f"unknown encoders {settings['encoders']!r}; there are {', '.join(ENCODERS)}")
    if settings["update"] == "queries" and settings["encoders"] is not None:
        raise ValueError("with update='queries' it is said already what is encoded by what: leave encoders out")
    if settings["encoders"] == "instructed" and not settings["instructions"]:
        raise ValueError("without instructions nothing would train their encoder: leave encoders out")
    if settings["update"] == "both" and settings["passage_embeddings"] is not None:
        raise ValueError("passage_embeddings are of passages that stay as they are: use them with update='queries'")
    if settings["update"] == "queries" and settings["passage_embeddings"] is None and not settings["instructions"]:
        raise ValueError("an adapter encodes instructed queries alone: with update='queries' leave instructions on")
    if settings["lora_r"] < 0:
        raise ValueError(f"lora_r must not be negative, got {settings['lora_r']}")
    if settings["base_weight"] and (settings["lora_r"] or settings["update"] == "queries"):
        raise ValueError("base_weight mixes the weights of base and result, and needs update='both' and lora_r=0")
    for name in ("epochs", "learning_rate", "batch_size", "scale", "evaluations"):
        if settings[name] <= 0:
            raise ValueError(f"{name} must be positive, got {settings[name]}")
    if settings["frozen_layers"] < 0:
        raise ValueError(f"frozen_layers must not be negative, got {settings['frozen_layers']}")
    for name in ("base_weight", "dropout", "warmup"):
        if not 0 <= settings[name] < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, got {settings[name]}")


def _claim(output: Path, fingerprint: dict[str, Any], overwrite: bool) -> None:
    """Make ``output`` this run's folder, or refuse one that holds something else."""
    recipe, checkpoints = output / RECIPE_FILE, output / "checkpoints"
    if overwrite:
        shutil.rmtree(checkpoints, ignore_errors=True)
        recipe.unlink(missing_ok=True)
    if recipe.exists():
        earlier = json.loads(recipe.read_text(encoding="utf-8"))
        if earlier.pop("finished", False):
            raise FileExistsError(f"{output} holds a finished model: name another output, or overwrite it")
        if changed := sorted(key for key in fingerprint if earlier.get(key) != fingerprint[key]):
            raise FileExistsError(
                f"{output} holds an unfinished run with another {changed[0]} ({earlier.get(changed[0])!r}, now "
                f"{fingerprint[changed[0]]!r}): name another output, or overwrite it"
            )
    elif output.is_dir() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(f"{output} is not empty and holds no run of this recipe: name another output")
    output.mkdir(parents=True, exist_ok=True)
    recipe.write_text(json.dumps(fingerprint, indent=2) + "\n", encoding="utf-8")


def _last_complete(checkpoints: Path) -> str | None:
    """The newest checkpoint that was written to its end: the trainer writes ``trainer_state.json`` last."""
    for folder in sorted(checkpoints.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        return str(folder)
    return None


def _license(base: str | Path | None) -> str | None:
    """The licence that the base model's own card states, which is that of what is made from it."""
    if base is None:
        return "apache-2.0"  # all-MiniLM-L6-v2
    try:
        return ModelCard.load(Path(base) / "README.md" if Path(base).is_dir() else str(base)).data.license
    except Exception:  # whatever is wrong with somebody else's card, it states no licence
        return None


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"


def has_fast_bfloat16() -> bool:
    """Whether this machine has instructions for bfloat16: a GPU that does, or an x86 CPU with AMX or AVX512-BF16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not _CPUINFO.exists():
        return False
    lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags)


def _hash_records(records: Dataset) -> str:
    digest = hashlib.sha256()
    for batch in records.iter(1000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()[:16]
