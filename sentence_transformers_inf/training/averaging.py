"""One model from several trainings of one base: the average of their weights, and how far to go towards it.

The average of runs often ranks better than they do one by one (model soups: Wortsman et al. 2022, arXiv:2203.05482). A
longer step from the base in the direction of a training does more of what it taught (task vectors: Ilharco et al. 2023,
arXiv:2212.04089, §3; model extrapolation: Zheng et al. 2024, arXiv:2404.16792).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from sentence_transformers_inf.corpora import BUNDLED_BASE, bundled_base
from sentence_transformers_inf.modules import (
    copy_tower,
    detach_adapter,
    encoder_of,
    encoders_of,
    has_lora,
    is_adapter,
    is_single,
    load_instruction_model,
    merge_lora,
    two_towers,
)
from sentence_transformers_inf.modules.fingerprint import fingerprints, is_same
from sentence_transformers_inf.modules.lora import lora_weights, set_lora
from sentence_transformers_inf.recipe import is_finite, read_recipe
from sentence_transformers_inf.training.run_recipe import IN_MEMORY, OF_SOURCE, of_sources


def average_models(models: Sequence[str | Path], step: float = 1.0, **kwargs: Any) -> SentenceTransformer:
    """The model with the weights base + step · (mean of the models - base).

    Of adapters this is the encoder of instructed queries. The average of LoRAs has the rank of the first: of all that rank
    allows, it is the nearest to the average of what they add.

    Args:
        models: Folders of models, or of adapters, that were trained from one base, which must be as it was then for a step
            other than 1. A LoRA that is no adapter is merged first. What an adapter's LoRA adds is in memory as whole
            matrices, as large as the layers that it sits on.
        step: 1: the average. Above 1 the model obeys more, and moves further from how the base ranks.
        **kwargs: For ``SentenceTransformer`` (``device``, ``trust_remote_code``, ...).

    Returns:
        A model of the same modules, on which :func:`average_recipe` says how it came about.

    Raises:
        OSError: There is no such model, or its base is not there any more.
        ValueError: No model, a step that is not positive, or models of different bases, kinds, shapes or templates.
    """
    recipes = _recipes(models, step)
    averaged = _read(models[0], **kwargs)
    weights = _weights(averaged)
    for name in models[1:]:
        other = _read(name, **kwargs)
        if _kind(other) != _kind(averaged):
            raise ValueError(f"{models[0]} and {name} are of different kinds: average whole models, LoRA adapters or copies")
        if is_adapter(other) and not is_same(detach_adapter(other), fingerprints(detach_adapter(averaged))):
            raise ValueError(f"{models[0]} and {name} stand beside bases with other weights: average adapters of one base")
        if _joins(other) != _joins(averaged):
            raise ValueError(f"{models[0]} and {name} join, cut or exclude texts differently: average models of one kind")
        added = _weights(other)
        _check_alike(models[0], weights, name, added)
        weights = {key: value + added[key] for key, value in weights.items()}
    weights = {key: value / len(models) for key, value in weights.items()}
    if step != 1:
        before = _before(recipes[0]["base"], averaged, **kwargs)
        if beside := sorted(weights.keys() - before.keys()):
            raise ValueError(f"{models[0]} has weights that its base lacks ({beside[0]}): only --step 1 is possible")
        _check_alike(models[0], weights, f"its base {recipes[0]['base']}", {key: before[key] for key in weights})
        weights = {key: before[key] + step * (value - before[key]) for key, value in weights.items()}
    _set_weights(averaged, weights)
    return averaged


def average_recipe(models: Sequence[str | Path], step: float = 1.0) -> dict[str, Any]:
    """The recipe of :func:`average_models`: what the models' recipes have in common, their seeds and data, and the step.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: No model, a step that is not positive, a folder without a finished training, models of different bases.
    """
    recipes = _recipes(models, step)
    settings = [recipe.get("settings", {}) for recipe in recipes]
    common = {key: value for key, value in settings[0].items() if all(other.get(key) == value for other in settings)}
    common |= {"seed": [of_model.get("seed") for of_model in settings]}
    common |= {"averaged_models": len(models), "averaging_step": step}
    sources = [source for recipe in recipes for source in recipe.get("sources", [recipe])]
    by_digest = {source["records_sha256"]: {name: source[name] for name in OF_SOURCE} for source in sources}
    recipe = {name: recipes[0].get(name) for name in ("base", "base_on_hub", "license")}
    recipe |= {**of_sources(list(by_digest.values())), "settings": common}
    if all("minutes" in of_model for of_model in recipes) and len({of_model["hardware"] for of_model in recipes}) == 1:
        minutes = round(sum(of_model["minutes"] for of_model in recipes), 1)
        recipe |= {"minutes": minutes, "hardware": recipes[0]["hardware"]}
    return recipe


def _recipes(models: Sequence[str | Path], step: float) -> list[dict[str, Any]]:
    """The recipes of the models, all of one base."""
    if not models:
        raise ValueError("there is no model to average: name at least one folder")
    if not is_finite(step) or step <= 0:
        raise ValueError(f"step must be positive and finite, got {step}")
    recipes = []
    for name in models:
        if not Path(name).is_dir():
            raise FileNotFoundError(f"{name}: no such folder; check the path")
        recipe = read_recipe(name)
        sources = [] if recipe is None else recipe.get("sources", [recipe])
        is_known = all(entry in source for source in sources for entry in OF_SOURCE)
        if recipe is None or not recipe.get("finished", False) or not is_known:
            raise ValueError(f"{name}: there is no finished training here: name folders that inf-embed train wrote")
        recipes.append(recipe)
        base, first = recipe["base"], recipes[0]["base"]
        if base != first:
            raise ValueError(f"{name} was trained from {base}, {models[0]} from {first}: average models of one base")
    return recipes


def _before(name: str, trained: SentenceTransformer, **kwargs: Any) -> dict[str, Tensor]:
    """The weights that the training of a model began with."""
    if name == IN_MEMORY:
        raise ValueError("the models were trained from a model in memory, which is gone: only --step 1 is possible")
    try:
        start = _read(bundled_base() if name == BUNDLED_BASE else name, **kwargs)
    except OSError as error:
        raise OSError(f"the models' base is not there ({error}): bring it back, or leave --step out") from error
    if not is_adapter(trained):
        return _state(two_towers(start) if is_single(start) and not is_single(trained) else start)
    transformer: Any = encoder_of(trained)[0]
    if is_adapter(start):  # it was trained further
        if not has_lora(transformer):
            merge_lora(encoder_of(start)[0])  # type: ignore[arg-type]
        return _weights(start)
    tower = nn.Sequential(*copy_tower(detach_adapter(trained), share=True))
    if not has_lora(transformer):
        return _state(tower)
    return {key: torch.zeros_like(value) for key, value in lora_weights(transformer).items()} | _state(tower[1:])


def _read(name: str | Path, **kwargs: Any) -> SentenceTransformer:
    model = load_instruction_model(name, **kwargs)
    return model if is_adapter(model) else _merged(model)


def _merged(model: SentenceTransformer) -> SentenceTransformer:
    for transformer in encoders_of(model):
        merge_lora(transformer)
    return model


def _kind(model: SentenceTransformer) -> str:
    """What of a model is averaged."""
    if not is_adapter(model):
        return "model"
    transformer: Any = encoder_of(model)[0]
    return "LoRA adapter" if has_lora(transformer) else "adapter"


def _joins(model: SentenceTransformer) -> tuple[Any, ...]:
    """How a model makes a text of its inputs."""
    transformer: Any = encoder_of(model)[0]
    settings = (transformer.template, transformer.max_query_length, transformer.max_seq_length)
    return *settings, transformer.find_exclusions, transformer.exclusion_weight, model.prompts


def _weights(model: SentenceTransformer) -> dict[str, Tensor]:
    """What of a model is averaged, in float32: of an adapter its encoder, where a LoRA counts by what it adds."""
    modules = encoder_of(model) if is_adapter(model) else model
    if _kind(model) != "LoRA adapter":
        return _state(modules)
    transformer: Any = modules[0]
    return lora_weights(transformer) | _state(modules[1:])


def _set_weights(model: SentenceTransformer, weights: dict[str, Tensor]) -> None:
    modules: Any = encoder_of(model) if is_adapter(model) else model
    if _kind(model) == "LoRA adapter":
        transformer: Any = modules[0]
        set_lora(transformer, weights)
        modules = modules[1:]
    modules.load_state_dict({key: weights.get(key, value) for key, value in modules.state_dict().items()})


def _state(modules: nn.Module) -> dict[str, Tensor]:
    """The weights in float32; what is counted and not learned is left out."""
    return {name: value.float() for name, value in modules.state_dict().items() if torch.is_floating_point(value)}


def _check_alike(first: str | Path, weights: dict[str, Tensor], name: str | Path, other: dict[str, Tensor]) -> None:
    unlike = [key for key in weights.keys() | other.keys() if key not in weights or key not in other]
    unlike += [key for key in weights.keys() & other.keys() if weights[key].shape != other[key].shape]
    if unlike:
        raise ValueError(f"{first} and {name} have different weights ({sorted(unlike)[0]}): average models of one kind")
