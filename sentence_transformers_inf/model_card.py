"""The model card of a checkpoint: the template in ``model_cards/``, filled from what its folder says about it.

Everything on the card is in two files beside the model: ``recipe.json`` (how it was trained; written by
:func:`~sentence_transformers_inf.training.train`) and ``results.json`` (how it was measured; :func:`add_results`). So the
card can be written again, under another name or with more results.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf.evaluation import METRICS
from sentence_transformers_inf.modules import (
    InstructionQueryAttention,
    InstructionRouter,
    InstructionTransformer,
    encoder_of,
    load_instruction_model,
)
from sentence_transformers_inf.modules.adapter import ADAPTER_FILE

RECIPE_FILE = "recipe.json"
"""The settings of a run, in its output folder; ``"finished": true`` once the model is saved beside it."""

RESULTS_FILE = "results.json"
"""The measurements of the model in the same folder: ``records`` (on InF-IR records) and ``benchmarks`` (MTEB)."""

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

_NOT_SETTINGS = {
    *("base", "base_on_hub", "data", "data_on_hub", "records", "max_records", "template", "interaction"),
    *("minutes", "hardware", "license", "finished"),
}


def add_results(
    folder: str | Path, records: Sequence[Mapping[str, Any]] = (), benchmarks: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Put measurements of a model into its ``results.json``; those of the same data or task are replaced.

    Args:
        folder: The saved model.
        records: Measurements on InF-IR records, as ``inf-embed evaluate --json`` writes them: ``data``, ``data_on_hub``,
            ``split``, ``records`` (their number), the metrics, ``per_type``, and, if there is one to compare with,
            ``base`` (the metrics of the base model).
        benchmarks: Fields of :class:`~sentence_transformers_inf.evaluation.mteb.Row`.
    """
    path = Path(folder) / RESULTS_FILE
    old = _read(path)
    by_data = {(entry["data"], entry["split"]): entry for entry in (*old.get("records", []), *records)}
    by_task = {(row["task"], row["metric"], row["instructed"]): row for row in (*old.get("benchmarks", []), *benchmarks)}
    merged = {"records": list(by_data.values()), "benchmarks": list(by_task.values())}
    path.write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")


def model_card(folder: str | Path, name: str | None = None, model: SentenceTransformer | None = None) -> ModelCard:
    """The card of a model.

    Args:
        folder: The saved model.
        name: What the card calls it and loads it by: its id on the Hub. ``None``: the name of the folder.
        model: The same model, where it is loaded already.
    """
    folder = Path(folder)
    model = load_instruction_model(folder) if model is None else model
    encoder = encoder_of(model)
    first, second = encoder[0], encoder[1] if len(encoder) > 1 else None
    assert isinstance(first, InstructionTransformer)
    adapter = _read(folder / ADAPTER_FILE)
    if adapter:
        weights = [path for path in folder.rglob("*.safetensors") if "checkpoints" not in path.parts]
        adapter["mib"] = sum(path.stat().st_size for path in weights) / 2**20
    name = folder.resolve().name if name is None else name
    recipe, results = (_read(folder / file) for file in (RECIPE_FILE, RESULTS_FILE))
    records, benchmarks = results.get("records", []), results.get("benchmarks", [])
    base, data = (_shown(recipe.get(key), recipe.get(f"{key}_on_hub", False)) for key in ("base", "data"))
    metadata = ModelCardData(
        language=["en"],
        license=recipe.get("license"),
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction", "instruction-following", "retrieval"],
        base_model=base if recipe.get("base_on_hub") else None,
        datasets=data if recipe.get("data_on_hub") else None,
        model_name=name.split("/")[-1],
        eval_results=[*_record_results(records), *_benchmark_results(benchmarks)] or None,
    )
    return ModelCard.from_template(
        card_data=metadata,
        template_path=str(importlib.resources.files("model_cards") / "model_card.md"),
        name=name,
        base=base,
        data=data,
        instruction_template=first.template,
        adapter=adapter,
        routes=None if adapter or not isinstance(model[0], InstructionRouter) else model[0].instructed_route,
        attention=second.kind if isinstance(second, InstructionQueryAttention) else None,
        max_query_length=first.max_query_length or first.max_seq_length,
        max_passage_length=first.max_seq_length,
        dimension=model.get_embedding_dimension(),
        recipe=recipe,
        settings={
            key: Path(value).name if key == "passage_embeddings" else value
            for key, value in recipe.items()
            if key not in _NOT_SETTINGS and value is not None
        },
        evaluations=[entry | {"data": _shown(entry["data"], entry["data_on_hub"])} for entry in records],
        metrics={metric: METRIC_NAMES[metric] for metric in METRICS},
        benchmarks=_benchmark_rows(benchmarks),
    )


def write_model_card(folder: str | Path, name: str | None = None, model: SentenceTransformer | None = None) -> Path:
    """Write :func:`model_card` as ``README.md`` beside the model.

    Returns:
        The path of the card.
    """
    path = Path(folder) / "README.md"
    model_card(folder, name, model).save(path)
    return path


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _shown(source: str | None, on_hub: bool) -> str | None:
    """The id of a dataset or model on the Hub, else the file's name without the path that leads to it."""
    return source if on_hub or source is None else Path(source).name


def _record_results(records: list[dict[str, Any]]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-retrieval",
            task_name="Instruction-following retrieval",
            dataset_type=str(_shown(entry["data"], entry["data_on_hub"])),
            dataset_name=f"InF-IR records ({_shown(entry['data'], entry['data_on_hub'])})",
            dataset_split=entry["split"],
            metric_type=metric,
            metric_name=METRIC_NAMES[metric],
            metric_value=round(entry[metric], 2),
        )
        for entry in records
        for metric in METRICS
    ]


def _benchmark_results(benchmarks: list[dict[str, Any]]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-retrieval",
            task_name="Retrieval by MTEB" + ("" if row["instructed"] else ", instructions left out"),
            dataset_type=row["dataset"],
            dataset_name=row["task"],
            dataset_config=None if row["instructed"] else "no-instruction",
            dataset_split=row["split"],
            dataset_revision=row["revision"],
            metric_type=row["metric"],
            metric_name=row["metric"],
            metric_value=round(row["score"], 2),
        )
        for row in benchmarks
    ]


def _benchmark_rows(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for a task and metric, the score with and without instructions beside each other."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in benchmarks:
        kind = "instructed" if row["instructed"] else "bare"
        rows.setdefault((row["task"], row["metric"]), {**row, "instructed": None, "bare": None})[kind] = row["score"]
    return list(rows.values())
