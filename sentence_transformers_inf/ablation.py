"""Ablations: train and measure every cell of a grid, and compare the cells record by record.

A configuration is a YAML file::

    data: mini                      # records, as for train; the split train is trained on
    evaluate: {data: mini, split: validation}
    seeds: [42, 43, 44]
    settings: {max_records: 480}    # options of train that all cells have
    grid:                           # every combination is a cell
      objective: [uni_P, multi_P_I]
    cells:                          # further cells, by name
      no plain rows: {plain_weight: 0}

The baseline ``no instructions`` is always among the cells: the same queries and passages, trained without the instructions.
What it gains over the base model as well is not instruction following.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf.corpora import bundled_base
from sentence_transformers_inf.evaluation import METRIC_NAMES, METRICS, measure
from sentence_transformers_inf.evaluation.metrics import bootstrap_interval
from sentence_transformers_inf.modules import load_instruction_model
from sentence_transformers_inf.recipe import RECIPE_FILE
from sentence_transformers_inf.records import load_records
from sentence_transformers_inf.training import train

BASELINE = "no instructions"
"""The cell that is trained without instructions."""

BASE = "base model"

_NOT_IN_A_CELL = ("output", "overwrite", "show_progress", "say", "seed", "passage_embeddings")


@dataclass(frozen=True)
class Ablation:
    """A configuration that was read and checked."""

    cells: dict[str, dict[str, Any]]
    """The options of :func:`~sentence_transformers_inf.training.train` of each cell, by name."""
    seeds: list[int]
    evaluate: dict[str, str | None]
    axis: str | None = None
    """The one option that the grid varies, where its values are numbers: what a curve is drawn over."""


@dataclass(frozen=True)
class Row:
    """A cell over its seeds, or the base model."""

    name: str
    means: dict[str, float]
    """By metric: the mean over the seeds."""
    deviations: dict[str, float]
    """By metric: the standard deviation over the seeds (n − 1); NaN with one seed."""
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
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({error})") from error
    allowed = {"data": str, "evaluate": dict, "seeds": list, "settings": dict, "grid": dict, "cells": dict}
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected the keys {', '.join(allowed)}")
    for key, value in config.items():
        if key not in allowed:
            raise ValueError(f"{path}: unknown key {key!r}; there are {', '.join(allowed)}")
        if not isinstance(value, allowed[key]):
            raise ValueError(f"{path}: {key} must be a {allowed[key].__name__}, got {value!r}")
    seeds = config.get("seeds", [42])
    if not seeds or not all(isinstance(seed, int) for seed in seeds) or len(set(seeds)) < len(seeds):
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
    options_of_train = set(inspect.signature(train).parameters) - set(_NOT_IN_A_CELL)
    for name, options in cells.items():
        if unknown := sorted(set(options) - options_of_train):
            raise ValueError(
                f"{path}: {name}: train has no option {unknown[0]!r}; it has {', '.join(sorted(options_of_train))}"
            )
    evaluate = {"data": shared["data"], "split": "validation", **config.get("evaluate", {})}
    numbers = [name for name, values in grid.items() if all(isinstance(value, (int, float)) for value in values)]
    return Ablation(cells, seeds, evaluate, numbers[0] if len(grid) == 1 and numbers else None)


def run_ablation(
    ablation: Ablation, output: Path, say: Callable[[str], None] = lambda line: None, show_progress: bool = True
) -> list[Row]:
    """Train and measure every cell that has not been yet.

    Args:
        ablation: What to run.
        output: Folder for a result per cell and seed. What is there already is not run again, and a cell that was
            interrupted goes on where it stopped. The trained models are not kept.
        say: Told of every cell.
        show_progress: Show a progress bar in training.

    Returns:
        The base model's row, then those of the cells.

    Raises:
        ValueError: What :func:`~sentence_transformers_inf.training.train` says is wrong, with the name of the cell; or
            ``output`` holds a result of the same name with other settings.
    """
    records = load_records(str(ablation.evaluate["data"]), ablation.evaluate["split"])

    def measured(model: SentenceTransformer) -> dict[str, Any]:
        result = measure(model, records)
        values = {metric: of_records.tolist() for metric, of_records in result.values.items()}
        return {"means": result.means(), "per_type": result.per_type(), "values": values}

    base = ablation.cells[BASELINE].get("base")

    def measured_base() -> dict[str, Any]:
        return measured(load_instruction_model(base or bundled_base()))

    found = {BASE: [_once(output / "base.json", {"base": base}, ablation, measured_base)]}
    runs = [(name, options, seed) for name, options in ablation.cells.items() for seed in ablation.seeds]
    for number, (name, options, seed) in enumerate(runs, start=1):
        folder = output / _folder_name(name) / f"seed-{seed}"

        def cell(folder: Path = folder, options: dict[str, Any] = options, seed: int = seed) -> dict[str, Any]:
            if not _is_finished(folder / "model"):
                train(**options, output=folder / "model", seed=seed, show_progress=show_progress)
            recipe = json.loads((folder / "model" / RECIPE_FILE).read_text(encoding="utf-8"))
            return {**measured(load_instruction_model(folder / "model")), "minutes": recipe.get("minutes")}

        say(f"{number} of {len(runs)}: {name}, seed {seed}")
        try:
            result = _once(folder / "result.json", {**options, "seed": seed}, ablation, cell)
        except (ValueError, OSError) as error:
            raise ValueError(f"{name}, seed {seed}: {error}") from error
        shutil.rmtree(folder / "model", ignore_errors=True)
        found.setdefault(name, []).append(result)
    baseline = _values(found[BASELINE])
    return [_row(name, results, baseline, ablation.cells.get(name, {})) for name, results in found.items()]


def _once(path: Path, settings: dict[str, Any], ablation: Ablation, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result in ``path``; made and written there, whole or not at all, if there is none."""
    asked = json.loads(json.dumps({"settings": settings, "evaluate": ablation.evaluate}))
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        if {key: result[key] for key in asked} != asked:
            raise ValueError(f"{path} is of other settings: name another output, or delete it")
        return result
    result = {**asked, **run()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return result


def _is_finished(model: Path) -> bool:
    recipe = model / RECIPE_FILE
    return recipe.exists() and json.loads(recipe.read_text(encoding="utf-8")).get("finished", False)


def _folder_name(name: str) -> str:
    """A readable folder name, and a different one for every cell."""
    readable = re.sub(r"[^\w.]+", "-", name).strip("-")[:60]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _values(results: list[dict[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """By metric: the value of every record, the mean over the seeds."""
    return {metric: np.mean([result["values"][metric] for result in results], axis=0) for metric in results[0]["values"]}


def _row(name: str, results: list[dict[str, Any]], baseline: dict[str, NDArray[np.float64]], options: dict[str, Any]) -> Row:
    values = _values(results)
    gains = {}
    for metric, of_records in values.items():
        difference = of_records - baseline[metric]
        gains[metric] = (float(difference.mean()), *bootstrap_interval(difference))
    spread = {metric: np.array([result["means"][metric] for result in results]) for metric in METRICS}
    minutes = [result["minutes"] for result in results if result.get("minutes") is not None]
    types = {
        kind: {metric: float(np.mean([result["per_type"][kind][metric] for result in results])) for metric in of_kind}
        for kind, of_kind in results[0]["per_type"].items()
    }
    tokens, dollars = _cost(options)
    return Row(
        name=name,
        means={metric: float(of_seeds.mean()) for metric, of_seeds in spread.items()},
        deviations={
            metric: float(of_seeds.std(ddof=1)) if len(of_seeds) > 1 else math.nan for metric, of_seeds in spread.items()
        },
        gains=gains,
        values={metric: of_records.tolist() for metric, of_records in values.items()},
        per_type=types,
        minutes=float(np.mean(minutes)) if minutes else math.nan,
        tokens=tokens,
        dollars=dollars,
    )


def _cost(options: dict[str, Any]) -> tuple[float, float]:
    """Tokens and dollars of the build that made a cell's data."""
    report = Path(str(options.get("data", ""))) / "report.json"
    if not report.is_file():
        return math.nan, math.nan
    usage = json.loads(report.read_text(encoding="utf-8"))["usage"].values()
    tokens = sum(total["prompt_tokens"] + total["completion_tokens"] for total in usage)
    return float(tokens), float(sum(total["cost"] for total in usage))


def write_report(ablation: Ablation, rows: list[Row], folder: Path) -> str:
    """Write ``report.json``, ``report.md``, ``ablation.png`` and, with instruction types, ``types.png``, both also as SVG.

    Returns:
        The Markdown table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = _markdown(ablation, rows)
    best = max(rows[1:], key=lambda row: row.means["p_mrr"])
    (folder / "report.md").write_text(f"{table}\n{_failures(ablation, best)}", encoding="utf-8")
    report = json.dumps([asdict(row) for row in rows], indent=2)
    (folder / "report.json").write_text(re.sub(r"\bNaN\b", "null", report) + "\n", encoding="utf-8")
    _draw_cells(ablation, rows, folder)
    if rows[0].per_type:
        _draw_types(rows[0], best, folder)
    return table


def _markdown(ablation: Ablation, rows: list[Row]) -> str:
    metrics = ("p_mrr", "pair_accuracy", "ndcg_at_10", "plain_ndcg_at_10")
    costs = [name for name in ("minutes", "tokens", "dollars") if any(math.isfinite(getattr(row, name)) for row in rows)]
    header = ["", *(METRIC_NAMES[metric] for metric in metrics), f"p-MRR over {BASELINE}", *costs]
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    for row in rows:
        cells = [
            f"{row.means[metric]:.1f}"
            + (f" ± {row.deviations[metric]:.1f}" if len(ablation.seeds) > 1 and row is not rows[0] else "")
            for metric in metrics
        ]
        gain, low, high = row.gains["p_mrr"]
        cells.append("" if row.name == BASELINE else f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]")
        for cost in costs:
            value = getattr(row, cost)
            cells.append("" if math.isnan(value) else f"{value:,.0f}" if cost == "tokens" else f"{value:.1f}")
        lines.append(f"| {' | '.join([row.name, *cells])} |")
    return "\n".join(lines) + "\n"


def _failures(ablation: Ablation, row: Row) -> str:
    """Of each instruction type, the record that a cell obeys least, and in how many it obeys both instructions."""
    records = load_records(str(ablation.evaluate["data"]), ablation.evaluate["split"])
    types = records["instruction_type"] if "instruction_type" in records.column_names else [""] * len(records)
    lines = [f"## What {row.name} gets wrong", ""]
    for kind in sorted(set(types), key=lambda kind: kind or ""):
        of_kind = [index for index, other in enumerate(types) if other == kind]
        obeyed = sum(row.values["pair_accuracy"][index] == 100 for index in of_kind)
        worst = min(of_kind, key=lambda index: (row.values["pair_accuracy"][index], row.values["p_mrr"][index]))
        lines.append(f"**{kind or 'all'}**: {obeyed} of {len(of_kind)} obeyed with every seed.")
        if row.values["pair_accuracy"][worst] < 100:
            record = records[worst]
            lines += ["", f"- query: {_line(record['query_positive'])}"]
            for instruction, passage in (("positive", "document"), ("negative", "hard_negative_document_1")):
                lines.append(f"- *{_line(record[f'instruction_{instruction}'])}* should prefer: {_line(record[passage])}")
        lines.append("")
    return "\n".join(lines)


def _line(text: str, limit: int = 160) -> str:
    """A text in one line of Markdown, shortened."""
    text = re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
    return text if len(text) <= limit else f"{text[:limit].rstrip()} …"


def _draw_cells(ablation: Ablation, rows: list[Row], folder: Path) -> None:
    """A curve over the one numeric option that is varied, else a bar for every cell."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {"p_mrr": "tab:blue", "ndcg_at_10": "tab:orange", "plain_ndcg_at_10": "tab:green"}
    points = [
        (ablation.cells[row.name][ablation.axis], row)
        for row in rows
        if ablation.axis and row.name.startswith(f"{ablation.axis} ")
    ]
    figure = Figure(figsize=(7, 4.2 if points else 0.45 * len(rows) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    if points:
        axes = figure.subplots()
        for metric, colour in shown.items():
            values = [row.means[metric] for _, row in points]
            spread = [row.deviations[metric] for _, row in points]
            axes.errorbar(
                [at for at, _ in points], values, spread, color=colour, marker="o", capsize=3, label=METRIC_NAMES[metric]
            )
            axes.axhline(rows[0].means[metric], color=colour, linestyle=":", linewidth=1)
        axes.set_xlabel(f"{ablation.axis} (dotted: the base model)")
        axes.legend(frameon=False)
    else:
        for axes, (metric, colour) in zip(figure.subplots(1, len(shown), sharey=True), shown.items()):
            values = [row.means[metric] for row in rows][::-1]
            spread = [row.deviations[metric] for row in rows][::-1]
            axes.barh([row.name for row in rows][::-1], values, color=colour, xerr=np.nan_to_num(spread), capsize=2)
            axes.set_xlabel(METRIC_NAMES[metric])
            axes.set_xlim(left=min(0, min(values)) if metric == "p_mrr" else max(0, min(values) - 10))
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"ablation.{suffix}", dpi=150)


def _draw_types(base: Row, best: Row, folder: Path) -> None:
    """Pair accuracy of each instruction type: the base model and the cell with the highest p-MRR."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = sorted(best.per_type, key=lambda kind: best.per_type[kind]["pair_accuracy"])
    figure = Figure(figsize=(7, 0.4 * len(kinds) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for offset, row, colour in ((0.2, base, "0.7"), (-0.2, best, "tab:blue")):
        values = [row.per_type[kind]["pair_accuracy"] for kind in kinds]
        axes.barh(np.arange(len(kinds)) - offset, values, 0.4, color=colour, label=row.name)
    axes.set_yticks(np.arange(len(kinds)), [f"{kind} ({best.per_type[kind]['records']:.0f})" for kind in kinds])
    axes.set_xlabel("pair accuracy (in brackets: records)")
    axes.legend(frameon=False, loc="lower right")
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"types.{suffix}", dpi=150)
