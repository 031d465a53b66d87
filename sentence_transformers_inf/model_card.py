"""The model card of a trained checkpoint, from the template in ``model_cards/``."""

from __future__ import annotations

import importlib.resources
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf.evaluation import METRICS, Result
from sentence_transformers_inf.modules import InstructionTransformer

METRIC_NAMES = {
    "p_mrr": "p-MRR",
    "pair_accuracy": "pair accuracy",
    "triple_accuracy": "triple accuracy",
    "ndcg_at_10": "nDCG@10, instructed",
    "recall_at_1": "recall@1, instructed",
    "robustness_at_10": "Robustness@10",
    "plain_ndcg_at_10": "nDCG@10, plain queries",
}
"""The names of :data:`~sentence_transformers_inf.evaluation.METRICS` in tables."""


def write_model_card(
    folder: str | Path,
    model: SentenceTransformer,
    *,
    settings: Mapping[str, Any],
    minutes: float | None = None,
    results: Mapping[str, Result] | None = None,
    evaluated_on: str = "",
) -> Path:
    """Write the card of a model as ``README.md`` beside it.

    Args:
        folder: The saved model.
        model: The same model, loaded by :func:`~sentence_transformers_inf.load_instruction_model`.
        settings: What it was trained with, as in its ``recipe.json``.
        minutes: Training time.
        results: Measurements by column title, such as ``{"base model": ..., "this model": ...}``; the last column is the
            model itself and also gives the scores per instruction type.
        evaluated_on: What the results were measured on, for example ``"mini (test)"``.

    Returns:
        The path of the card.
    """
    data = model.model_card_data
    data.tags = sorted({*(data.tags or []), "instruction-following", "retrieval"})
    data.language = data.language or ["en"]
    base = str(settings["base"])
    data.base_model = None if Path(base).exists() else base
    first = model[0]
    assert isinstance(first, InstructionTransformer)
    columns = list(results or {})
    rows = [
        (METRIC_NAMES[metric], [f"{results[column].means()[metric]:.1f}" for column in columns] if results else [])
        for metric in METRICS
    ]
    card = ModelCard.from_template(
        card_data=data,  # type: ignore[arg-type]
        template_path=str(importlib.resources.files("model_cards") / "model_card.md"),
        title=Path(folder).resolve().name,
        base=Path(base).name if Path(base).exists() else base,
        base_on_hub=not Path(base).exists(),
        instruction_template=first.template,
        max_query_length=first.max_query_length or first.max_seq_length,
        max_passage_length=first.max_seq_length,
        dimension=model.get_embedding_dimension(),
        settings={key: value for key, value in settings.items() if key not in ("base", "records_sha256")},
        minutes=minutes,
        hardware=torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        columns=columns,
        rows=rows,
        per_type=results[columns[-1]].per_type() if results else {},
        evaluated_on=evaluated_on,
    )
    path = Path(folder) / "README.md"
    card.save(path)
    return path
