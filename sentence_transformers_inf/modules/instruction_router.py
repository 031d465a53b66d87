"""Several encoders in one model: Sentence Transformers' ``Router`` that takes instructed queries.

Two uses, told apart by the names of the routes:

- ``"query"`` and ``"document"``: queries, instructed or not, have an encoder of their own, and passages another
  (:func:`two_towers`; the paper's separate encoders, Zhuang et al. 2025, §4).
- An adapter is a route ``"instructed"`` beside those of a base model that stays as it is (:func:`adapter_tower`): its
  passages and bare queries are the base's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from torch import Tensor, nn

from sentence_transformers_inf.modules.instruction_transformer import TEXT_KEYS, check_inputs, excluded_by
from sentence_transformers_inf.modules.lora import has_lora, merge_lora
from sentence_transformers_inf.modules.saved_as import saved_as


@saved_as(Router)
class InstructionRouter(Router):
    """A ``Router`` whose inputs may be ``{"instruction": str, "query": str}`` as well as strings, mixed as they come.

    An instructed query takes the route ``"instructed"``, or ``"query"`` where there is none. Strings go where the ``Router``
    sends them: by the task of ``encode_query`` and ``encode_document``, else to its default route. A missing or blank
    instruction gives the bare query.

    Every row of a mixed batch is encoded with the rows of its route alone, padded as if the others were not there.
    """

    base_model: tuple[SentenceTransformer, ...] = ()
    """Of an adapter, the model that it stands beside; in a tuple, because its modules are those of the other routes."""
    origin: tuple[str, str | None] | None = None
    """Of an adapter that was loaded or saved, the name and revision of that model."""
    keeps_loras = False
    """Whether :meth:`save` leaves LoRAs apart from the weights, as the checkpoints of a training run need it."""

    def route(self, name: str) -> nn.Sequential:
        """The modules of a route."""
        modules = self.sub_modules[name]
        assert isinstance(modules, nn.Sequential)
        return modules

    @property
    def instructed_route(self) -> str:
        """The route of instructed queries."""
        return "instructed" if "instructed" in self.sub_modules else "query"

    def route_of(self, task: str | None) -> str:
        """The route of a string.

        Raises:
            ValueError: There is no route for the task.
        """
        route = self.route_mappings.get((task, None)) or (task if task in list(self.sub_modules) else None)
        if route is None and (task is not None or self.default_route is None):
            raise ValueError(f"there is no route for the task {task!r}; there are {', '.join(self.sub_modules)}")
        return str(route or self.default_route)

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
            told = is_query[row] and ((item.get("instruction") or "").strip() or excluded_by(item))
            if told or (is_query[row] and self.instructed_route == "query"):
                route = self.instructed_route
            else:
                route = self.route_of("query" if is_query[row] else task)
            rows_of.setdefault(route, []).append(row)
        if len(rows_of) == 1:
            return self._preprocess_route(next(iter(rows_of)), inputs, prompt, **kwargs)
        routes = [
            (rows, self._preprocess_route(route, [inputs[row] for row in rows], prompt, **kwargs))
            for route, rows in rows_of.items()
        ]
        return {"routes": routes, "modality": "text"}

    def _preprocess_route(self, route: str, inputs: Sequence[Any], prompt: str | None, **kwargs: Any) -> dict[str, Any]:
        transformer: Any = self.route(route)[0]
        if route == self.instructed_route:
            return {**transformer.preprocess(inputs, prompt=prompt, **kwargs), "task": route}
        texts = [item["query"] if isinstance(item, Mapping) else item for item in inputs]
        return {**transformer.preprocess(texts, prompt=prompt, **kwargs), "text": texts, "task": route}

    def forward(self, features: dict[str, Any], task: str | None = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Encode what :meth:`preprocess` made; the route found there counts before ``task``."""
        if "routes" not in features:
            features = {key: value for key, value in features.items() if key not in TEXT_KEYS}
            return super().forward(features, task=features.get("task") or task, **kwargs)
        device = next(self.parameters(), torch.empty(0)).device  # an exported encoder has no parameters
        rows = torch.tensor([row for rows, _ in features["routes"] for row in rows], device=device)
        embeddings = []
        for _, part in features["routes"]:
            part = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in part.items()}
            embeddings.append(self.forward(part, **kwargs)["sentence_embedding"])
        return {"sentence_embedding": torch.cat(embeddings)[torch.argsort(rows)]}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """As ``Router.save``; LoRAs are saved as part of the weights, because the host finds none in a route's folder."""
        transformers: list[Any] = [self.route(name)[0] for name in self.sub_modules]
        apart = {} if self.keeps_loras else {each: each.model for each in transformers if has_lora(each)}
        try:
            for transformer in apart:
                merge_lora(transformer)
            super().save(output_path, *args, **kwargs)
        finally:
            for transformer, encoder in apart.items():
                transformer.model = encoder


def is_single(model: SentenceTransformer) -> bool:
    """Whether a model has one encoder for everything."""
    return not isinstance(model[0], Router)


def two_towers(model: SentenceTransformer) -> SentenceTransformer:
    """A model with an encoder of its own for queries; both begin as ``model``, which becomes the passages' and is shared.

    Args:
        model: From :func:`~sentence_transformers_inf.load_instruction_model`, with one encoder.

    Raises:
        ValueError: The model has several encoders already.
    """
    if not is_single(model):
        raise ValueError("the model has several encoders already")
    modules: Any = list(model)
    router = InstructionRouter({"document": modules, "query": copy.deepcopy(modules)}, default_route="document")
    return with_settings(SentenceTransformer(modules=[router]), model)


def adapter_tower(model: SentenceTransformer, tower: list[nn.Module]) -> SentenceTransformer:
    """A model that encodes instructed queries by a tower of its own and all else by ``model``, frozen and shared.

    Args:
        model: The base, with one encoder or several.
        tower: The modules for instructed queries, for example :func:`copy_tower`'s.
    """
    model.requires_grad_(False)
    if isinstance(model[0], Router):
        routes: Any = {name: list(model[0].sub_modules[name]) for name in ("query", "document")}  # type: ignore[call-overload]
        router = InstructionRouter(routes | {"instructed": tower}, default_route="document")
    else:
        routes = {"base": list(model), "instructed": tower}
        to_base: Any = {("query", None): "base", ("document", None): "base"}
        router = InstructionRouter(routes, default_route="base", route_mappings=to_base)
    router.base_model = (model,)
    return with_settings(SentenceTransformer(modules=[router]), model)


def base_beside(model: SentenceTransformer) -> SentenceTransformer:
    """The base model of an adapter that was saved with it, as a model of its own that shares the modules."""
    router: Any = model[0]
    if "base" in router.sub_modules:
        modules = list(router.route("base"))
    else:
        routes: Any = {name: list(router.route(name)) for name in ("query", "document")}
        modules = [InstructionRouter(routes, default_route="document")]
    return with_settings(SentenceTransformer(modules=modules), model)


def copy_tower(model: SentenceTransformer, *, share: bool) -> list[nn.Module]:
    """A copy of the modules that encode instructed queries; a LoRA on the model's is part of the copy's own weights.

    Args:
        model: The model.
        share: Let the copy's transformer hold the same weights as the model's, because only a LoRA will be added to it.
    """
    modules = list(encoder_of(model))
    transformer: Any = modules[0]
    memo: dict[int, Any] = {}
    if share:
        memo = {id(tensor): tensor for tensor in (*transformer.parameters(), *transformer.buffers())}
        memo[id(transformer.processor)] = transformer.processor
    tower = copy.deepcopy(modules, memo)
    merge_lora(tower[0])  # type: ignore[arg-type]
    return tower


def encoder_of(model: SentenceTransformer) -> nn.Sequential:
    """The modules that encode instructed queries: those of the tower where there are several, else the model's own."""
    first = model[0]
    return first.route(first.instructed_route) if isinstance(first, InstructionRouter) else model


def encoders_of(model: SentenceTransformer) -> list[Transformer]:
    """The transformers of a model: one, or one of each route."""
    first = model[0]
    if not isinstance(first, InstructionRouter):
        return [first]  # type: ignore[list-item]
    return [first.route(name)[0] for name in first.sub_modules]  # type: ignore[misc]


def with_settings(model: SentenceTransformer, like: SentenceTransformer) -> SentenceTransformer:
    """Prompts, similarity and the rest that a SentenceTransformer holds beside its modules."""
    model.prompts = dict(like.prompts)
    model.default_prompt_name = like.default_prompt_name
    model.similarity_fn_name = like.similarity_fn_name
    model.truncate_dim = like.truncate_dim
    model.trust_remote_code = like.trust_remote_code
    model.model_card_data.base_model = like.model_card_data.base_model
    model.model_card_data.base_model_revision = like.model_card_data.base_model_revision
    return model.to(like.device).train(like.training)
