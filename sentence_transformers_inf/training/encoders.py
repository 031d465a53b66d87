"""From a base model and the arguments of a run to what is trained: encoders, LoRAs, frozen layers and dropout."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from sentence_transformers_inf.modules import (
    InstructionRouter,
    adapter_tower,
    add_lora,
    copy_tower,
    encoder_of,
    encoders_of,
    has_lora,
    is_adapter,
    is_single,
    two_towers,
)
from sentence_transformers_inf.modules.loading import take_instructions
from sentence_transformers_inf.modules.lora import lora_layers, train_lora
from sentence_transformers_inf.training.arguments import InstructionTrainingArguments


def build_model(
    model: SentenceTransformer, args: InstructionTrainingArguments, passage_dimension: int | None = None
) -> SentenceTransformer:
    """The model to train, with the parts that are not trained frozen.

    Args:
        model: The base; changed in place, but where an adapter is trained.
        args: Resolved; see :func:`~sentence_transformers_inf.training.arguments.resolve`.
        passage_dimension: Dimensions of passage embeddings from elsewhere, which queries are to be encoded into.

    Raises:
        ValueError: The settings do not fit the model.
    """
    adapts = args.update == "queries" and passage_dimension is None
    if adapts and not is_adapter(model):
        model = adapter_tower(model, copy_tower(model, share=bool(args.lora_r)))
    take_instructions(encoder_of(model), args.template, interaction=args.interaction)
    if passage_dimension is not None:
        size = int(model.get_embedding_dimension() or 0)
        if size != passage_dimension:
            model.append(Dense(size, passage_dimension, activation_function=nn.Identity()).to(model.device))
    elif is_single(model) and args.encoders == "separate":
        model = two_towers(model)
    encoder_of(model)[0].find_exclusions = False  # type: ignore[assignment]  # in training a row is a text
    model.requires_grad_(not adapts)
    encoder_of(model).requires_grad_(True)
    transformers: list[Any] = [encoder_of(model)[0]] if adapts else encoders_of(model)
    for transformer in transformers:
        if has_lora(transformer):
            train_lora(transformer)
        elif args.lora_r:
            add_lora(transformer, args.lora_r)
        elif args.frozen_layers:
            freeze(transformer, args.frozen_layers)
    return model


def freeze(transformer: Transformer, count: int) -> None:
    """Freeze what comes before the layers of an encoder (its embeddings), and the first ``count`` layers.

    Raises:
        ValueError: It has no more layers than that.
    """
    encoder = transformer.model
    stacks = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    layers = max(stacks, key=len, default=nn.ModuleList())
    if count >= len(layers):
        raise ValueError(f"frozen_layers must be less than the {len(layers)} layers of the encoder, got {count}")
    first_trained = next(layers[count].parameters())
    for parameter in encoder.parameters():
        if parameter is first_trained:
            return
        parameter.requires_grad_(False)


@contextlib.contextmanager
def loras_apart(model: SentenceTransformer) -> Iterator[None]:
    """Save checkpoints with their LoRAs apart from the weights in this context."""
    router = model[0]
    if not isinstance(router, InstructionRouter):
        yield
        return
    before, router.keeps_loras = router.keeps_loras, True
    try:
        yield
    finally:
        router.keeps_loras = before


@contextlib.contextmanager
def hidden_dropout(model: SentenceTransformer, rate: float) -> Iterator[None]:
    """Drop the encoders' hidden states at a rate in this context, and attention probabilities not at all.

    Args:
        model: Its dropout layers are changed, and put back at the end.
        rate: Probability of a zero.
    """
    before = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    of_attention = {
        child
        for module in model.modules()
        for child in module.children()
        if isinstance(child, nn.Dropout) and _projects_queries_keys_and_values(module)
    }
    try:
        for module in before:
            module.p = 0.0 if module in of_attention else rate
        yield
    finally:
        for module, p in before.items():
            module.p = p


def _projects_queries_keys_and_values(module: nn.Module) -> bool:
    """Whether a module is an attention whose own dropout is that of its probabilities: it holds the three projections.

    So does a gated feed-forward layer, of a T5 for example: the name tells them apart.
    """
    return "att" in type(module).__name__.lower() and sum(isinstance(each, nn.Linear) for each in module.children()) >= 3


def describe(model: SentenceTransformer) -> str:
    """What a model is made of, in a line."""
    modules = encoder_of(model)
    transformer: Any = modules[0]
    pooling = modules[1] if len(modules) > 1 else None
    parts = [type(transformer.model).__name__]
    if isinstance(pooling, Pooling):
        parts.append(f"{pooling.pooling_mode} pooling")
    if transformer.tokenizer is not None:
        parts.append(f"padding on the {transformer.tokenizer.padding_side}")
    parts += [f"prompt {prompt!r} before a {name}" for name, prompt in model.prompts.items() if prompt]
    if names := {".".join(name.split(".")[-2:]) for name in lora_layers(transformer)}:
        parts.append(f"LoRA on {', '.join(sorted(names))}")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{'; '.join(parts)}; {trained:,} weights are trained"


def hardware(device: torch.device) -> str:
    """What a model on a device computes with."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
