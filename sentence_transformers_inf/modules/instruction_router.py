"""Two towers in one model: Sentence Transformers' ``Router`` that sends instructed queries their own way.

Two uses, told apart by the names of the routes:

- ``"query"`` and ``"document"``: queries, instructed or not, have an encoder of their own, and passages another
  (:func:`two_towers`; the paper's separate encoders, Zhuang et al. 2025, §4).
- ``"instructed"`` and ``"base"``: only instructed queries leave the base model. Passages and bare queries, whichever method
  encodes them, go through it as if nothing had been added (:func:`instructed_tower`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from torch import Tensor, nn
from transformers.utils import is_peft_available

from sentence_transformers_inf.modules.instruction_transformer import InstructionTransformer, check_inputs

_BASE_ROUTES: dict[tuple[str | None, str | tuple[str, ...] | None], str] = {
    ("query", None): "base",
    ("document", None): "base",
}


class InstructionRouter(Router):
    """A ``Router`` whose inputs may be ``{"instruction": str, "query": str}`` as well as strings, mixed as they come.

    An instructed query takes the route ``"instructed"``, or ``"query"`` where there is none. Strings go where the ``Router``
    sends them: by the task of ``encode_query`` and ``encode_document``, else to its default route. A missing or blank
    instruction gives the bare query.

    Every row of a mixed batch is encoded with the rows of its route alone, padded as if the others were not there.
    """

    @classmethod
    def from_router(cls, router: Router) -> InstructionRouter:
        """An :class:`InstructionRouter` over the routes of ``router``, shared and not copied."""
        module = _empty()
        module.__dict__.update(router.__dict__)
        return module

    def route(self, name: str) -> nn.Sequential:
        """The modules of a route."""
        modules = self.sub_modules[name]
        assert isinstance(modules, nn.Sequential)
        return modules

    @property
    def instructed_route(self) -> str:
        """The route of instructed queries."""
        return "instructed" if "instructed" in self.sub_modules else "query"

    def preprocess(  # type: ignore[override]
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Tokenise a batch, each input by the tokenizer of its route.

        Returns:
            The features of the route under whose name ``"task"`` stands; for a batch of several routes ``"routes"``, a list
            of (rows, features) of each.

        Raises:
            TypeError: An input is neither a string nor such a mapping; the message names its position.
        """
        kwargs.pop("modality", None)  # text is all there is
        is_query = check_inputs(inputs)
        rows_of: dict[str, list[int]] = {}
        for row, item in enumerate(inputs):
            if is_query[row] and (self.instructed_route == "query" or (item.get("instruction") or "").strip()):
                route = self.instructed_route
            else:
                route = str(self._resolve_route("query" if is_query[row] else task))
            rows_of.setdefault(route, []).append(row)
        if len(rows_of) == 1:
            return self._preprocess_route(next(iter(rows_of)), inputs, prompt, **kwargs)
        routes = [
            (rows, self._preprocess_route(route, [inputs[row] for row in rows], prompt, **kwargs))
            for route, rows in rows_of.items()
        ]
        return {"routes": routes, "modality": "text"}

    def _preprocess_route(self, route: str, inputs: Sequence[Any], prompt: str | None, **kwargs: Any) -> dict[str, Any]:
        if route != self.instructed_route:
            inputs = [item["query"] if isinstance(item, Mapping) else item for item in inputs]
        transformer: Any = self.route(route)[0]
        features = transformer.preprocess(inputs, prompt=prompt, **kwargs)
        return {**features, "task": route}

    def forward(self, features: dict[str, Any], task: str | None = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Encode what :meth:`preprocess` made; the route found there counts before ``task``."""
        if "routes" not in features:
            return super().forward(features, task=features.get("task") or task, **kwargs)
        device = next(self.parameters()).device
        rows = torch.tensor([row for rows, _ in features["routes"] for row in rows], device=device)
        embeddings = []
        for _, part in features["routes"]:
            part = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in part.items()}
            embeddings.append(super().forward(part, task=part["task"], **kwargs)["sentence_embedding"])
        return {"sentence_embedding": torch.cat(embeddings)[torch.argsort(rows)]}

    def train(self, mode: bool = True) -> InstructionRouter:
        """As ``Module.train``. Two towers are many modules, and ``encode`` calls ``eval`` every time: where all of them are
        in evaluation, they are only looked at."""
        modules: list[nn.Module] = [self]
        while not mode and modules:
            module = modules.pop()
            if module.training:
                return super().train(mode)
            modules.extend(module.children())
        return super().train(mode) if mode else self

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (), self.__dict__


def _empty() -> InstructionRouter:
    return InstructionRouter.__new__(InstructionRouter)


# Saved under its parent's name, as InstructionTransformer is: a machine without this package loads the folder as a Router,
# and encodes joined strings by model.encode(texts, task=...), the task being the route.
InstructionRouter.__module__ = Router.__module__
InstructionRouter.__name__ = Router.__name__


def two_towers(model: SentenceTransformer) -> SentenceTransformer:
    """A model with an encoder of its own for queries; both begin as ``model``, which becomes the passages' and is shared.

    Args:
        model: From :func:`~sentence_transformers_inf.load_instruction_model`, with one encoder.

    Raises:
        ValueError: The model has two towers already.
    """
    _check_single(model)
    modules = list(model)
    routes: dict[str, Any] = {"query": copy.deepcopy(modules), "document": modules}
    router = InstructionRouter(routes, default_route="document")
    return with_settings(SentenceTransformer(modules=[router]), model)


def instructed_tower(
    model: SentenceTransformer, tower: list[nn.Module] | None = None, *, lora: bool = False
) -> SentenceTransformer:
    """A model that encodes instructed queries by a tower of its own and all else by ``model``, untouched and shared.

    Args:
        model: The base, from :func:`~sentence_transformers_inf.load_instruction_model`.
        tower: The modules for instructed queries; ``None``: a copy of the base's.
        lora: Let the copy share the base's weights, because only a LoRA will be added to it.

    Raises:
        ValueError: The model has two towers already.
    """
    _check_single(model)
    modules = list(model)
    if tower is None:
        tower = share_weights(modules) if lora else copy.deepcopy(modules)
    model.requires_grad_(False)
    if not lora:
        nn.Sequential(*tower).requires_grad_(True)
    routes: dict[str, Any] = {"instructed": tower, "base": modules}
    router = InstructionRouter(routes, default_route="base", route_mappings=_BASE_ROUTES)
    return with_settings(SentenceTransformer(modules=[router]), model)


def encoder_of(model: SentenceTransformer) -> nn.Sequential:
    """The modules that encode instructed queries: those of the tower where there are two, else the model's own."""
    first = model[0]
    return first.route(first.instructed_route) if isinstance(first, InstructionRouter) else model


def encoders_of(model: SentenceTransformer, trained: bool = False) -> list[InstructionTransformer]:
    """The transformers of a model: one, or one of each tower.

    Args:
        model: From :func:`~sentence_transformers_inf.load_instruction_model` or with two towers.
        trained: Leave out that of a base model which an adapter stands beside.
    """
    first = model[0]
    if not isinstance(first, InstructionRouter):
        return [first]  # type: ignore[list-item]
    return [first.route(name)[0] for name in first.sub_modules if not (trained and name == "base")]  # type: ignore[misc]


def share_weights(modules: list[nn.Module]) -> list[nn.Module]:
    """Copies of modules that hold the same parameters and buffers: one set of weights in memory under two structures."""
    memo: dict[int, Any] = {}
    for module in modules:
        memo |= {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        if isinstance(module, InstructionTransformer):
            memo[id(module.processor)] = module.processor
    return copy.deepcopy(modules, memo)


def add_lora(transformer: InstructionTransformer, r: int) -> None:
    """Freeze a transformer and put a trainable LoRA (Hu et al. 2021, arXiv:2106.09685) on its feed-forward layers.

    Args:
        transformer: The module; its layers are changed in place.
        r: Rank; the scaling α/r is 2.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: The rank is not positive.
    """
    if r < 1:
        raise ValueError(f"the rank of LoRA must be positive, got {r}")
    if not is_peft_available():
        raise ImportError("LoRA needs PEFT: pip install 'sentence-transformers-inf[lora]'")
    from peft import LoraConfig

    from sentence_transformers_inf.modules.lora import fuse_lora

    encoder = transformer.model
    encoder.requires_grad_(False)
    encoder.add_adapter(LoraConfig(r=r, lora_alpha=2 * r, target_modules=lora_targets(encoder)))
    fuse_lora(encoder)


def lora_targets(encoder: nn.Module) -> list[str]:
    """The paths of the feed-forward layers in an encoder's stack: its linear layers outside of attention.

    A LoRA on these alone learns as well as one on all linear layers (Schulman et al. 2025, "LoRA Without Regret"; here,
    docs/adapters.md) and costs less to encode with.
    """
    paths = {
        f"{prefix}.{name}"
        for prefix, stack in encoder.named_modules()
        if isinstance(stack, nn.ModuleList)
        for name, module in stack.named_modules()
        if isinstance(module, nn.Linear) and "att" not in name.lower()
    }
    return sorted(paths)


def has_lora(transformer: InstructionTransformer) -> bool:
    """Whether a transformer carries a LoRA."""
    return bool(transformer.model._hf_peft_config_loaded)


def merge_lora(transformer: InstructionTransformer) -> None:
    """Add a transformer's LoRA to the weights it sits on, and take it away; a transformer without one stays as it is.

    The weights are copied first: whatever shares them keeps them as they are.
    """
    if not has_lora(transformer):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    transformer.model = encoder = copy.deepcopy(transformer.model)
    for parent in list(encoder.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, BaseTunerLayer):
                module.merge()
                setattr(parent, name, module.get_base_layer())
    encoder._hf_peft_config_loaded = False
    del encoder.peft_config


def name_base(transformer: InstructionTransformer, base: str, revision: str | None) -> None:
    """Let what is saved of a LoRA name the base model by its id, whatever path it was loaded from."""
    if has_lora(transformer):
        config = transformer.model.peft_config["default"]
        config.base_model_name_or_path, config.revision = base, revision


def _check_single(model: SentenceTransformer) -> None:
    if isinstance(model[0], Router):
        raise ValueError("the model has two towers already")


def with_settings(model: SentenceTransformer, like: SentenceTransformer) -> SentenceTransformer:
    """Prompts, similarity and the rest that a SentenceTransformer holds beside its modules."""
    model.prompts = dict(like.prompts)
    model.default_prompt_name = like.default_prompt_name
    model.similarity_fn_name = like.similarity_fn_name
    model.truncate_dim = like.truncate_dim
    model.model_card_data.base_model = like.model_card_data.base_model
    model.model_card_data.base_model_revision = like.model_card_data.base_model_revision
    return model.to(like.device).train(like.training)
