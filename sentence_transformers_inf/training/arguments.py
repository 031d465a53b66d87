"""The settings of a training run: the one source of the command line, YAML files, ablations, the recipe file and the
card."""

from __future__ import annotations

import copy
import dataclasses
import json
import numbers
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union, get_args, get_origin, get_type_hints

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from sentence_transformers_inf.corpora import check_sources
from sentence_transformers_inf.losses.functional import OBJECTIVES, objective_terms
from sentence_transformers_inf.modules import (
    DEFAULT_TEMPLATE,
    KINDS,
    InstructionQueryAttention,
    encoder_of,
    is_adapter,
    is_single,
)
from sentence_transformers_inf.modules.loading import check_settings
from sentence_transformers_inf.modules.lora import lora_rank
from sentence_transformers_inf.recipe import is_finite

ADAPTER_LORA_R = 32
"""Rank of an adapter's LoRA by default."""

SCHEDULES = {
    "both": {
        **{"num_train_epochs": 2.0, "learning_rate": 2e-4, "per_device_train_batch_size": 8},
        "sampled_instructions": 0,
    },
    "queries": {"num_train_epochs": 2.0, "learning_rate": 3e-4, "per_device_train_batch_size": 16},
    "lora": {"num_train_epochs": 2.0, "learning_rate": 2e-3, "per_device_train_batch_size": 16},
}
"""Defaults by what is trained: both sides, a copy of the encoder for instructed queries alone, or a LoRA. See
docs/recipe.md."""

_SHAPE_THE_WEIGHTS = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("learning_rate_mapping", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "seed", "data_seed"),
    *("batch_sampler", "multi_dataset_batch_sampler", "dataloader_drop_last", "prompts"),
)
"""The host's arguments that an interrupted run must not change. What else it has is about saving, logging and machines."""

_OF_THE_RUN = (
    *("output_dir", "overwrite", "logging_steps", "save_steps", "save_total_limit", "hub_private_repo"),
    "hub_strategy",
    *("dataloader_pin_memory", "max_tokens_per_chunk", "save_minutes", "trust_remote_code"),
)
"""The arguments of this class that do not decide the weights."""

_WITHOUT_EFFECT = {
    "neftune_noise_alpha": "does not work with Sentence Transformers",
    "label_smoothing_factor": "has no effect on these objectives",
    "resume_from_checkpoint": "has no effect, as a run goes on from its last checkpoint by itself",
}
"""The host's arguments that would fail later, or do nothing."""

CPUINFO = Path("/proc/cpuinfo")


def _option(default: Any, help: str, *aliases: str) -> Any:
    metadata: dict[str, Any] = {"help": help}
    if aliases:
        metadata["aliases"] = list(aliases)
    return field(default=default, metadata=metadata)


@dataclass
class ScriptArguments:
    """What a command trains, and on what."""

    base: Optional[str] = _option(None, "Base model: a Hub id or a folder. Default: the bundled all-MiniLM-L6-v2.")
    data: list[str] = field(
        default_factory=lambda: ["mini"],
        metadata={
            "help": "InF-IR records: 'mini', a .jsonl or .parquet file, a folder of such files, or a Hub dataset; or "
            "another corpus. Several are trained on together."
        },
    )
    max_records: Optional[int] = _option(None, "Train on the first so many records of each source only.")

    def __post_init__(self) -> None:
        check_kinds(self)
        self.data = check_sources(self.data)
        if self.max_records is not None and self.max_records < 1:
            raise ValueError(f"max_records must be positive, got {self.max_records}")


@dataclass
class InstructionTrainingArguments(SentenceTransformerTrainingArguments):
    """Arguments of an :class:`~sentence_transformers_inf.training.InstructionTrainer`.

    Here stand those that are specific to it, and the host's whose defaults differ. ``None`` stands for what is best for
    what is trained (:data:`SCHEDULES`, docs/recipe.md); :func:`resolve` fills it in. All arguments of Sentence
    Transformers' and transformers' own classes may be given as well.

    Raises:
        ValueError: A value that cannot be, or values that contradict each other; the message names them.
    """

    output_dir: Optional[str] = _option("inf-embed", "Folder for checkpoints, the model and its card.", "--output")

    # What is trained
    objective: str = _option("multi_P_I", f"The objective: {', '.join(OBJECTIVES)}.")
    instructions: bool = _option(True, "Train with the instructions; without them: the baseline that shows what they add.")
    update: Optional[str] = _option(
        None, "What is trained: both sides, or queries: an adapter for instructed queries, the base stays. Default: both."
    )
    encoders: Optional[str] = _option(
        None,
        "One encoder for queries and passages (shared), or one each (separate). Default: separate; shared with a LoRA or "
        "with attention.",
    )
    interaction: Optional[str] = _option(
        None, f"How instruction and query meet: concatenation, or attention: {', '.join(KINDS)}. Default: the base's."
    )
    template: Optional[str] = _option(
        None, f"How instruction and query are joined. Default: the base's, else {DEFAULT_TEMPLATE!r}."
    )
    lora_r: Optional[int] = _option(None, f"Rank of a LoRA; 0: none. Default: {ADAPTER_LORA_R} for an adapter, else 0.")
    merge_base: bool = _option(False, "Save the base with an adapter, and LoRA merged into the weights.")
    frozen_layers: Optional[int] = _option(None, "Lowest layers that stay as they are, and the embeddings. Default: 2.")
    passage_embeddings: Optional[str] = _option(
        None, "With update queries: the passages' vectors from elsewhere (.npy, .parquet or a Hub dataset)."
    )

    # The loss
    scale: float = _option(20.0, "Inverse temperature of the similarities.")
    sampled_instructions: Optional[int] = _option(
        None, "Candidate instructions drawn from other records. Default: 0 or 1, by what is trained; all with attention."
    )
    plain_weight: Optional[float] = _option(
        None, "Weight of the bare queries, which keeps plain retrieval. Default: 0.75, for an adapter 0."
    )
    anchor_weight: Optional[float] = _option(
        None,
        "Weight that holds bare queries and passages to the embeddings that the base gives them. Default: 2.5; 0 with "
        "update queries. Takes the memory of another base.",
    )
    mini_batch_size: Optional[int] = _option(None, "Texts encoded at a time by GradCache, for batches larger than memory.")
    max_tokens_per_chunk: Optional[int] = _option(None, "Tokens encoded at a time. Default: by the device.")

    # The run
    dropout: float = _option(0.0, "Dropout of hidden states.")
    evaluations: int = _option(4, "Evaluations and checkpoints, evenly over the run.")
    overwrite: bool = _option(False, "Start anew in a folder that holds another or a finished run.")
    trust_remote_code: bool = _option(False, "Run the code that a base model brings with it. Read it before.")

    # The host's, with other defaults
    num_train_epochs: Optional[float] = _option(None, "Passes over the records. Default: by what is trained.", "--epochs")
    learning_rate: Optional[float] = _option(None, "Peak learning rate (AdamW). Default: by what is trained.", "--lr")
    per_device_train_batch_size: Optional[int] = _option(
        None, "Records per step and device. Default: by what is trained.", "--batch-size"
    )
    warmup_steps: float = _option(0.1, "Steps over which the learning rate rises; below 1: a share of all steps.")
    bf16: Optional[bool] = _option(None, "Encode in bfloat16; the loss stays in float32. Default: where it is fast.")
    logging_steps: float = _option(10, "Steps between two log lines.")
    save_steps: Optional[float] = _option(None, "Steps between two checkpoints; below 1: a share. Default: by evaluations.")
    save_minutes: float = _option(10.0, "Minutes after which a checkpoint is written as well; 0: by evaluations alone.")
    save_total_limit: Optional[int] = _option(2, "Checkpoints that are kept.")
    load_best_model_at_end: Optional[bool] = _option(
        None,
        "End with the best checkpoint. Default: with the last, unless the best is ahead by more than its standard error.",
    )
    hub_strategy: str = _option("end", "When to push: end, or every_save, checkpoint, all_checkpoints of the host.")
    hub_private_repo: Optional[bool] = _option(True, "Whether a repository on the Hub that is created is private.")
    dataloader_pin_memory: Optional[bool] = _option(None, "Pin memory for faster transfers. Default: with CUDA.")

    def __post_init__(self) -> None:
        _check(self)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_fast_bfloat16(self.use_cpu)  # type: ignore[has-type]
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else the host refuses bfloat16
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = torch.cuda.is_available() and not self.use_cpu
        if self.save_steps is None:
            self.save_steps = min(1 / self.evaluations, 1 - 1e-6)  # of all steps: the host takes 1 for one step
        try:
            super().__post_init__()
        except json.JSONDecodeError as error:
            raise ValueError(f"{error.doc!r} is given for an argument that takes JSON, and is none ({error})") from error

    def recipe(self) -> dict[str, Any]:
        """What decides the weights: all that is specific to this class, and what the host's weights depend on.

        What is ``None`` is left out.
        """
        values = self.to_dict()
        hosts = {entry.name: entry.default for entry in dataclasses.fields(SentenceTransformerTrainingArguments)}
        changed = [name for name in _SHAPE_THE_WEIGHTS if name in values and values[name] not in (hosts[name], None, {})]
        names = dict.fromkeys((*InstructionTrainingArguments.__annotations__, *changed))
        return {name: values[name] for name in names if name not in _OF_THE_RUN and values[name] is not None}


def check_kinds(args: Any) -> None:
    """Refuse what is no finite number, no whole one, no text or neither true nor false where that is expected.

    Args:
        args: A dataclass.

    Raises:
        ValueError: The message names the argument.
    """
    hints = get_type_hints(type(args))
    for entry in dataclasses.fields(args):
        hint = hints[entry.name]
        kinds = {*(get_args(hint) if get_origin(hint) in (Union, types.UnionType) else [hint])} - {type(None)}
        if (value := getattr(args, entry.name)) is None:
            continue
        if kinds == {bool} and not isinstance(value, bool):
            raise ValueError(f"{entry.name} must be true or false, got {value!r}")
        if kinds == {str} and not isinstance(value, (str, Path)):
            raise ValueError(f"{entry.name} must be a text, got {value!r}")
        if not kinds or not kinds <= {int, float}:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not is_finite(value):
            raise ValueError(f"{entry.name} must be a finite number, got {value!r}")
        if float not in kinds and not float(value).is_integer():
            raise ValueError(f"{entry.name} must be a whole number, got {value!r}")


def _check(args: InstructionTrainingArguments) -> None:
    check_kinds(args)
    if not args.output_dir or not str(args.output_dir).strip():
        raise ValueError("output_dir is empty: name a folder (--output)")
    for name in ("seed", "data_seed"):
        if not 0 <= (getattr(args, name) or 0) < 2**32:
            raise ValueError(f"{name} must be at least 0 and less than 2**32, got {getattr(args, name)}")
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(f"max_steps must be positive, or -1 for all epochs, got {args.max_steps}")
    objective_terms(args.objective)
    check_settings(args.template, None, args.interaction)
    for name, values in (("update", ("both", "queries")), ("encoders", ("shared", "separate"))):
        if getattr(args, name) not in (None, *values):
            raise ValueError(f"unknown {name} {getattr(args, name)!r}; there are {', '.join(values)}")
    if args.update == "queries" and args.encoders is not None:
        raise ValueError("with update='queries' it is said already what is encoded by what: leave encoders out")
    if args.update != "queries" and args.passage_embeddings is not None:
        raise ValueError("passage_embeddings are of passages that stay as they are: use them with update='queries'")
    if args.update == "queries" and args.passage_embeddings is None and not args.instructions:
        raise ValueError("an adapter encodes instructed queries alone: with update='queries' leave instructions on")
    positive = (
        *("num_train_epochs", "learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size", "evaluations"),
        *("mini_batch_size", "max_tokens_per_chunk", "gradient_accumulation_steps", "scale"),
        *("save_steps", "eval_steps", "logging_steps"),
    )
    not_negative = (
        *("frozen_layers", "lora_r", "save_minutes", "sampled_instructions", "plain_weight", "anchor_weight"),
        *("warmup_steps", "weight_decay", "max_grad_norm", "dataloader_num_workers", "adam_epsilon"),
    )
    for name in positive:
        if (value := getattr(args, name)) is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    for name in not_negative:
        if (value := getattr(args, name)) is not None and value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    for name, problem in _WITHOUT_EFFECT.items():
        if getattr(args, name):
            raise ValueError(f"{name} {problem}: leave it out")
    if args.update == "queries" and args.anchor_weight:
        raise ValueError("with update='queries' bare queries have no embeddings to be held to: leave anchor_weight out")
    is_adapting = args.update == "queries" and args.passage_embeddings is None
    if args.frozen_layers and (args.lora_r or (is_adapting and args.lora_r is None)):
        raise ValueError("a LoRA keeps all layers as they are: leave frozen_layers out")
    if args.hub_token and args.hub_strategy != "end":
        raise ValueError(
            f"hub_strategy={args.hub_strategy!r} lets the host upload its arguments, hub_token among them: log in with "
            "`hf auth login`, or set HF_TOKEN, and leave hub_token out"
        )
    if not 0 <= args.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, got {args.dropout}")


def resolve(args: InstructionTrainingArguments, model: SentenceTransformer) -> InstructionTrainingArguments:
    """The arguments with every default that depends on the model or on other arguments filled in.

    Args:
        args: As they were given; they stay as they are.
        model: That is to be trained, before it is prepared.

    Raises:
        ValueError: They do not fit the model.
    """
    args = copy.copy(args)
    if is_adapter(model):
        if args.update == "both" or args.encoders is not None:
            raise ValueError("the model is an adapter, and its base stays as it is: leave update and encoders out")
        if args.passage_embeddings is not None:
            raise ValueError("the model is an adapter, and its base has the passages' vectors: leave passage_embeddings out")
        args.update = "queries"
    args.update = args.update or "both"
    is_adapting = args.update == "queries" and args.passage_embeddings is None
    args.lora_r = _lora_r(args, model, is_adapting)
    if args.update == "both":
        args.encoders = _encoders(args, model)
    for name, value in SCHEDULES["lora" if args.lora_r else args.update].items():
        if getattr(args, name) is None and not (name == "sampled_instructions" and _attends(args, model)):
            setattr(args, name, value)
    args.plain_weight = (0.0 if is_adapting else 0.75) if args.plain_weight is None else args.plain_weight
    args.anchor_weight = (2.5 if args.update == "both" else 0.0) if args.anchor_weight is None else args.anchor_weight
    args.frozen_layers = (0 if args.lora_r else 2) if args.frozen_layers is None else args.frozen_layers
    if args.dropout and not any(isinstance(module, torch.nn.Dropout) for module in model.modules()):
        raise ValueError(f"the encoder has no dropout layers, dropout={args.dropout} would do nothing: leave dropout out")
    if args.prompts is None:
        args.prompts = _prompts(model)
    return args


def _lora_r(args: InstructionTrainingArguments, model: SentenceTransformer, is_adapting: bool) -> int:
    """The rank of the LoRA that a model of its kind gets, or has."""
    if is_adapting and not is_adapter(model):
        return ADAPTER_LORA_R if args.lora_r is None else args.lora_r
    has = lora_rank(encoder_of(model)[0])  # type: ignore[arg-type]
    if not (has or is_adapter(model)):
        return args.lora_r or 0
    if args.lora_r not in (None, has):
        raise ValueError(f"the model has lora_r={has} already: leave lora_r out")
    return has


def _encoders(args: InstructionTrainingArguments, model: SentenceTransformer) -> str:
    """Which encoders a model of its kind gets, or has."""
    if is_single(model):
        return args.encoders or ("shared" if args.lora_r or _attends(args, model) else "separate")
    if args.encoders == "shared":
        raise ValueError("the model has encoders='separate' already: leave encoders out")
    if args.lora_r:
        raise ValueError("a LoRA is added to a model with one encoder, or with update='queries'")
    return "separate"


def _attends(args: InstructionTrainingArguments, model: SentenceTransformer) -> bool:
    """Whether instruction and query meet in attention."""
    encoder = encoder_of(model)
    has = len(encoder) > 1 and isinstance(encoder[1], InstructionQueryAttention)
    return has if args.interaction is None else args.interaction in KINDS


def evaluate_with_checkpoints(args: InstructionTrainingArguments, metric: str | None) -> bool:
    """Let the host evaluate whenever it writes a checkpoint, and load the best at its end.

    What the arguments say of that already stays.

    Args:
        args: Changed in place.
        metric: What is highest for the best checkpoint; ``None``: nothing tells.

    Returns:
        Whether the host was told to load the best by ``metric``.
    """
    if args.eval_strategy == IntervalStrategy.NO:
        by_epoch = args.save_strategy == SaveStrategy.EPOCH
        args.eval_strategy = IntervalStrategy.EPOCH if by_epoch else IntervalStrategy.STEPS
        args.eval_steps = args.save_steps
    together = args.eval_strategy.value == args.save_strategy.value and args.eval_steps == args.save_steps
    is_unnamed = args.metric_for_best_model in (None, "loss")  # "loss": the host's own, of which there is none
    if metric is None or not is_unnamed or args.load_best_model_at_end is False:
        return False
    if args.load_best_model_at_end:
        args.metric_for_best_model, args.greater_is_better = metric, True
        return False
    if together:
        args.metric_for_best_model, args.greater_is_better, args.load_best_model_at_end = metric, True, True
    return together


def _prompts(model: SentenceTransformer) -> dict[str, str]:
    """The prompt of each column of the training data: what encode_query and encode_document would put before it."""
    from sentence_transformers_inf.records import PASSAGE_COLUMNS, TRAINING_COLUMNS

    query, passage = model.prompts.get("query"), model.prompts.get("document") or model.prompts.get("passage")
    columns = {**dict.fromkeys(TRAINING_COLUMNS, query), **dict.fromkeys(PASSAGE_COLUMNS, passage)}
    return {column: prompt for column, prompt in columns.items() if prompt}


def has_fast_bfloat16(use_cpu: bool = False) -> bool:
    """Whether this machine has instructions for bfloat16: a GPU that does, or an x86 CPU with AMX or AVX512-BF16."""
    if torch.accelerator.is_available() and not use_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if not CPUINFO.exists():
        return False
    lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(flags)
