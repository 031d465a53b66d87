"""The encoders of a model, each as an ordinary Sentence Transformers model of its own."""

from __future__ import annotations

import copy
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import nn

from sentence_transformers_inf.modules import InstructionRouter, has_lora, merge_lora
from sentence_transformers_inf.modules.instruction_router import with_settings

KINDS = ("instructed_queries", "plain_queries", "passages")
"""What is encoded; a model has one, two or three encoders for these."""


def split_encoders(model: SentenceTransformer) -> tuple[dict[str, SentenceTransformer], dict[str, str]]:
    """The encoders of a model by the names of their folders, and which of them encodes what.

    Args:
        model: From :func:`~sentence_transformers_inf.load_instruction_model`. It stays as it is; an encoder without a LoRA
            shares its modules, and of one with a LoRA there is a copy with the LoRA merged.

    Returns:
        The encoders: ``"query"``, and ``"document"`` and ``"plain_query"`` where they differ from the others; and the name
        of the encoder of each of :data:`KINDS`.
    """
    first: Any = model[0]
    if isinstance(first, InstructionRouter):
        routes = [
            first.route(name) for name in (first.instructed_route, first.route_of("query"), first.route_of("document"))
        ]
    else:
        routes = [model] * 3
    instructed, plain, passages = routes
    names = {id(plain): "plain_query", id(passages): "document", id(instructed): "query"}  # the last of equals counts
    encoder_of_kind = {kind: names[id(route)] for kind, route in zip(KINDS, routes)}
    parts = {names[id(route)]: route for route in routes}
    return {name: _alone(route, model) for name, route in parts.items()}, encoder_of_kind


def _alone(route: nn.Sequential, model: SentenceTransformer) -> SentenceTransformer:
    modules: list[Any] = list(route)
    if has_lora(modules[0]):
        modules = copy.deepcopy(modules)
        merge_lora(modules[0])
    return with_settings(SentenceTransformer(modules=modules), model)
