"""Ablations: train and measure every cell of a grid, and compare the cells record by record.

A configuration is a YAML file::

    data: mini                      # as for inf-embed train, or a list; the split train is trained on
    evaluate: {data: mini, split: validation, plain: beir-folder}  # plain: queries without instructions, in BEIR's layout
    seeds: [42, 43, 44]
    settings: {max_records: 480}    # arguments that all cells have
    grid:                           # every combination is a cell
      objective: [uni_P, multi_P_I]
    cells:                          # further cells, by name
      no plain rows: {plain_weight: 0}

Every cell is measured on the records of ``evaluate``, on text unlike the bundled corpus (see
:mod:`~sentence_transformers_inf.evaluation.elsewhere`) and, where there is one, on the corpus ``plain``.

The baseline ``no instructions`` is always among the cells: the same queries and passages, trained without the instructions.
What it gains over the base model as well is not instruction following.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf.corpora import bundled_base, load_training_data, together
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.evaluation.elsewhere import measure_help_centre, measure_narratives, measure_plain
from sentence_transformers_inf.evaluation.metrics import bootstrap_interval
from sentence_transformers_inf.modules import load_instruction_model
from sentence_transformers_inf.recipe import locked, read_json, read_recipe, read_yaml, write_whole
from sentence_transformers_inf.records import load_records
from sentence_transformers_inf.training.arguments import InstructionTrainingArguments, ScriptArguments
from sentence_transformers_inf.training.run_folder import RunFolder
from sentence_transformers_inf.training.trainer import InstructionTrainer

_CLASSES = (ScriptArguments, InstructionTrainingArguments)

BASELINE = "no instructions"
"""The cell that is trained without instructions."""

BASE = "base model"

_NOT_IN_A_CELL = {"output_dir", "overwrite", "seed", "passage_embeddings", "disable_tqdm", "report_to"}


@dataclass(frozen=True)
class Ablation:
    """A configuration that was read and checked."""

    cells: dict[str, dict[str, Any]]
    """Of each cell, by name: fields of :class:`~sentence_transformers_inf.training.arguments.ScriptArguments` and of
    :class:`~sentence_transformers_inf.training.InstructionTrainingArguments`."""
    seeds: list[int]
    evaluate: dict[str, str | None]
    axis: str | None = None
    """The one option that the grid varies, where its values are numbers: what a curve is drawn over."""


@dataclass(frozen=True)
class CellResult:
    """A cell over its seeds, or the base model."""

    name: str
    means: dict[str, float]
    """By metric: the mean over the seeds."""
    errors: dict[str, float]
    """By metric: the standard error of that mean; NaN with one seed."""
    gains: dict[str, tuple[float, float, float]]
    """By metric that is a mean over records: what is gained over :data:`BASELINE` and its 95% interval, by paired bootstrap
    over the records, each record's value the mean over the seeds."""
    values: dict[str, list[float]]
    """By metric that is a mean over records: the value of every record, the mean over the seeds."""
    per_type: dict[str, dict[str, float]]
    """By instruction type and metric: the mean over the seeds; and the number of ``records``."""
    minutes: float
    """Of training, the mean over the seeds that were not interrupted; NaN where all were."""
    tokens: float
    """Of the language models that wrote and judged the data, as its build reports them; NaN for other data."""
    dollars: float
    """What they cost; likewise."""


def read_config(path: Path) -> Ablation:
    """Read a configuration; see the module's docstring.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not YAML, or a key, an option or a value that cannot be; the message names it.
    """
    config = read_yaml(path)
    allowed = {"data": object, "evaluate": dict, "seeds": list, "settings": dict, "grid": dict, "cells": dict}
    for key, value in config.items():
        if key not in allowed:
            raise ValueError(f"{path}: unknown key {key!r}; there are {', '.join(allowed)}")
        if not isinstance(value, allowed[key]):
            raise ValueError(f"{path}: {key} must be a {allowed[key].__name__}, got {value!r}")
    seeds = config.get("seeds", [42])
    if not seeds or not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: seeds must be different whole numbers, got {seeds}")
    grid = config.get("grid", {})
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: grid: {name} must be a list of values, got {values!r}")
    shared = {"data": config.get("data", "mini"), **config.get("settings", {})}
    cells = {
        ", ".join(f"{name} {value}" for name, value in zip(grid, values)): {**shared, **dict(zip(grid, values))}
        for values in itertools.product(*grid.values())
        if grid
    }
    for name, options in config.get("cells", {}).items():
        if not isinstance(options, dict):
            raise ValueError(f"{path}: cells: {name} must be a mapping of options, got {options!r}")
        cells[str(name)] = {**shared, **options}
    if not cells:
        raise ValueError(f"{path}: there is neither a grid nor a cell in it")
    cells.setdefault(BASELINE, {**shared, "instructions": False})
    options = {entry.name for kind in _CLASSES for entry in dataclasses.fields(kind)} - _NOT_IN_A_CELL
    for name, given in cells.items():
        if unknown := sorted(str(option) for option in given if option not in options):
            raise ValueError(
                f"{path}: {name}: there is no argument {unknown[0]!r} of a training (inf-embed train --help lists them)"
            )
        try:
            _arguments(given, output_dir="not written")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {name}: {error}") from error
    for key, value in config.get("evaluate", {}).items():
        if key not in ("data", "split", "plain"):
            raise ValueError(f"{path}: evaluate: unknown key {key!r}; there are data, split, plain")
        if not isinstance(value, str):
            raise ValueError(f"{path}: evaluate: {key} must be a text, got {value!r}")
    evaluate = {"data": shared["data"], "split": "validation", **config.get("evaluate", {})}
    if not isinstance(evaluate["data"], str):
        raise ValueError(f"{path}: evaluate: data must be one source, got {evaluate['data']!r}: name it there")
    numbers = [name for name, values in grid.items() if all(isinstance(value, (int, float)) for value in values)]
    return Ablation(cells, seeds, evaluate, numbers[0] if len(grid) == 1 and numbers else None)


def run_ablation(
    ablation: Ablation,
    output: Path,
    say: Callable[[str], None] = lambda line: None,
    watch: Callable[[InstructionTrainer], None] = lambda trainer: None,
) -> list[CellResult]:
    """Train and measure every cell that has not been yet.

    Args:
        ablation: What to run.
        output: Folder for a result per cell and seed. What is there already is not run again, and a cell that was
            interrupted goes on where it stopped. The trained models are not kept.
        say: Told of every cell.
        watch: Given every trainer before it trains, for example to show its progress.

    Returns:
        The base model's row, then those of the cells.

    Raises:
        ValueError: What the trainer says is wrong, with the name of the cell; or
            ``output`` holds a result of the same name with other settings, or a damaged one.
        BlockingIOError: Another command is writing in ``output``.
    """
    with locked(output):
        return _run_ablation(ablation, output, say, watch)


def _run_ablation(
    ablation: Ablation, output: Path, say: Callable[[str], None], watch: Callable[[InstructionTrainer], None]
) -> list[CellResult]:
    records = load_records(str(ablation.evaluate["data"]), ablation.evaluate["split"])

    def measured(model: SentenceTransformer) -> dict[str, Any]:
        result = measure(model, records)
        values = {metric: of_records.tolist() for metric, of_records in result.values.items()}
        means = result.means() | {f"narratives_{name}": value for name, value in measure_narratives(model).items()}
        means |= {f"help_centre_{name}": value for name, value in measure_help_centre(model).items()}
        if (plain := ablation.evaluate.get("plain")) is not None:
            means |= {f"plain_{name}": value for name, value in measure_plain(model, plain).items() if name == "mrr_at_10"}
        return {"means": means, "per_type": result.per_type(), "values": values}

    def trusted(options: dict[str, Any]) -> bool:
        return bool(options.get("trust_remote_code", False))

    base = ablation.cells[BASELINE].get("base")

    def measured_base() -> dict[str, Any]:
        return measured(load_instruction_model(base or bundled_base(), trust_remote_code=trusted(ablation.cells[BASELINE])))

    found = {BASE: [_once(output / "base.json", {"base": base}, ablation, measured_base)]}
    runs = [(name, options, seed) for name, options in ablation.cells.items() for seed in ablation.seeds]
    for number, (name, options, seed) in enumerate(runs, start=1):
        folder = output / _folder_name(name) / f"seed-{seed}"

        def cell(folder: Path = folder, options: dict[str, Any] = options, seed: int = seed) -> dict[str, Any]:
            if not RunFolder(folder / "model").is_finished:
                _train(options, folder / "model", seed, watch)
            recipe = read_recipe(folder / "model") or {}
            model = load_instruction_model(folder / "model", trust_remote_code=trusted(options))
            return {**measured(model), "minutes": recipe.get("minutes")}

        say(f"{number} of {len(runs)}: {name}, seed {seed}")
        try:
            result = _once(folder / "result.json", {**options, "seed": seed}, ablation, cell)
        except (ValueError, OSError) as error:
            raise ValueError(f"{name}, seed {seed}: {error}") from error
        shutil.rmtree(folder / "model", ignore_errors=True)
        found.setdefault(name, []).append(result)
    baseline = _values(found[BASELINE])
    return [_cell_result(name, results, baseline, ablation.cells.get(name, {})) for name, results in found.items()]


def _once(path: Path, settings: dict[str, Any], ablation: Ablation, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result in ``path``; made and written there, whole or not at all, if there is none."""
    asked = json.loads(json.dumps({"settings": settings, "evaluate": ablation.evaluate}))
    if path.exists():
        result: dict[str, Any] = read_json(path, dict, (*asked, "means", "per_type", "values"))
        if {key: result[key] for key in asked} != asked:
            raise ValueError(f"{path} is of other settings: name another --output, or delete it")
        return result
    result = {**asked, **run()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result) + "\n")
    return result


def _train(options: dict[str, Any], output: Path, seed: int, watch: Callable[[InstructionTrainer], None]) -> None:
    """Train one cell with one seed."""
    script, args = _arguments(options, output_dir=str(output), seed=seed, report_to="none")
    sources = {source: load_training_data(source, script.max_records) for source in script.data}
    trainer = InstructionTrainer(script.base, args, *together(sources))
    watch(trainer)
    trainer.train()


def _arguments(options: dict[str, Any], **settings: Any) -> tuple[ScriptArguments, InstructionTrainingArguments]:
    of_script = {entry.name for entry in dataclasses.fields(ScriptArguments)}
    script = ScriptArguments(**{name: value for name, value in options.items() if name in of_script})
    settings |= {name: value for name, value in options.items() if name not in of_script}
    return script, InstructionTrainingArguments(**settings)


def _folder_name(name: str) -> str:
    """A readable folder name, and a different one for every cell."""
    readable = re.sub(r"[^\w.]+", "-", name).strip("-")[:60]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _values(results: list[dict[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """By metric: the value of every record, the mean over the seeds."""
    return {metric: np.mean([result["values"][metric] for result in results], axis=0) for metric in results[0]["values"]}


def _cell_result(
    name: str, results: list[dict[str, Any]], baseline: dict[str, NDArray[np.float64]], options: dict[str, Any]
) -> CellResult:
    values = _values(results)
    gains = {}
    for metric, of_records in values.items():
        difference = of_records - baseline[metric]
        gains[metric] = (float(difference.mean()), *bootstrap_interval(difference))
    spread = {metric: np.array([result["means"][metric] for result in results]) for metric in results[0]["means"]}
    minutes = [result["minutes"] for result in results if result.get("minutes") is not None]
    types = {
        kind: {metric: float(np.mean([result["per_type"][kind][metric] for result in results])) for metric in of_kind}
        for kind, of_kind in results[0]["per_type"].items()
    }
    tokens, dollars = _cost(options)
    return CellResult(
        name=name,
        means={metric: float(of_seeds.mean()) for metric, of_seeds in spread.items()},
        errors={
            metric: float(of_seeds.std(ddof=1)) / len(of_seeds) ** 0.5 if len(of_seeds) > 1 else math.nan
            for metric, of_seeds in spread.items()
        },
        gains=gains,
        values={metric: of_records.tolist() for metric, of_records in values.items()},
        per_type=types,
        minutes=float(np.mean(minutes)) if minutes else math.nan,
        tokens=tokens,
        dollars=dollars,
    )


def _cost(options: dict[str, Any]) -> tuple[float, float]:
    """Tokens and dollars of the builds that made a cell's data."""
    data = options.get("data", "")
    if isinstance(data, list):
        tokens, dollars = zip(*(_cost({"data": source}) for source in data))
        return sum(tokens), sum(dollars)
    report = Path(str(data)) / "report.json"
    if not report.is_file():
        return math.nan, math.nan
    try:
        usage = read_json(report, dict, ["usage"])["usage"].values()
        tokens = sum(total["prompt_tokens"] + total["completion_tokens"] for total in usage)
        return float(tokens), float(sum(total["cost"] for total in usage))
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{report}: this is no report of inf-ir build: move it elsewhere ({error!r})") from error
