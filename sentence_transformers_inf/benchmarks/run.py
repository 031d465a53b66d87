"""Run benchmarks through MTEB: results in its own layout, resumable task by task."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mteb
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from mteb.abstasks import AbsTask
from mteb.cache import ResultCache
from mteb.results import TaskResult

from sentence_transformers_inf.benchmarks.encoder import InstructionEncoder, folder_revision, result_name
from sentence_transformers_inf.benchmarks.suites import FOLLOW_IR_METRICS, find_task, get_suite
from sentence_transformers_inf.modules import load_instruction_model


class BenchmarkError(OSError):
    """A benchmark cannot be run; the message names the task and the remedy."""


@dataclass(frozen=True)
class Row:
    """One measure of one task for one model."""

    model: str
    """As it was named in the call; the control run is told by ``instructed``."""
    instructed: bool
    task: str
    metric: str
    """The task's own main score; for FollowIR's tasks also what the paper reports beside p-MRR."""
    score: float
    """Times 100, the mean over the task's subsets."""
    dataset: str
    """The id of the task's dataset on the Hub."""
    revision: str
    """Its revision."""
    split: str


def run_benchmark(
    models: Sequence[str],
    benchmark: str,
    output: str | Path,
    *,
    tasks: list[str] | None = None,
    no_instruction: bool = False,
    batch_size: int = 32,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Run a benchmark; tasks whose results are in ``output`` are not run again.

    Args:
        models: Hub ids or folders; the first is the one in question, others are for comparison.
        benchmark: One of :data:`~sentence_transformers_inf.benchmarks.SUITES`.
        output: Folder of the results, in MTEB's layout (``results/MODEL/REVISION/TASK.json``).
        tasks: Some of the benchmark's tasks; ``None`` for all.
        no_instruction: Run every model without the instructions as well.
        batch_size: Texts encoded at a time.
        say: Told which task is about to run.

    Returns:
        One row per model, control, task and measure.

    Raises:
        ValueError: No such benchmark or task.
        BenchmarkError: A dataset cannot be read.
    """
    suite = get_suite(benchmark, tasks)
    cache = ResultCache(Path(output))
    _drop_half_written(Path(output), say)
    rows = []
    for name in models:
        model = load_instruction_model(name)
        revision = folder_revision(name) if Path(name).is_dir() else model.model_card_data.base_model_revision
        for bare in (False, True) if no_instruction else (False,):
            encoder = InstructionEncoder(model, result_name(name), revision, no_instruction=bare)
            for task in suite:
                say(f"{task.metadata.name}: {name}{' without instructions' if bare else ''}")
                result = _run(encoder, task, cache, batch_size)
                rows += _rows(name, not bare, task, result.task_results[0])
    return rows


def read_results(model: str, folder: str | Path) -> list[Row]:
    """The results of one model in the output folder of :func:`run_benchmark`, with those of its control run.

    Args:
        model: The model's folder. Results of other weights that were there before are left out.
        folder: The output folder.
    """
    rows: list[Row] = []
    cache, revision = ResultCache(Path(folder)), folder_revision(model)
    for path in sorted(cache.get_cache_paths([result_name(model)], include_remote=False, load_experiments="match_name")):
        meta = json.loads((path.parent / "model_meta.json").read_text(encoding="utf-8"))
        if meta["revision"] != revision:
            continue
        bare = bool((meta.get("experiment_kwargs") or {}).get("no_instruction"))
        result = TaskResult.from_disk(path)
        rows += _rows(model, not bare, find_task(result.task_name), result)
    return rows


def _drop_half_written(folder: Path, say: Callable[[str], None]) -> None:
    """Remove results that a run was writing when it was killed: MTEB would stumble over them."""
    for path in folder.glob("results/**/*.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            say(f"{path} was not written to its end: its task is run again")
            path.unlink()


def _rows(model: str, instructed: bool, task: AbsTask, result: Any) -> list[Row]:
    """The task's main score, and what the FollowIR paper (§4) reports beside it: a measure of the original instructions."""
    metadata = task.metadata
    split = next(iter(result.scores))

    def row(metric: str, score: float) -> Row:
        dataset, revision = metadata.dataset["path"], metadata.dataset["revision"]
        return Row(model, instructed, metadata.name, metric, 100 * float(score), dataset, revision, split)

    rows = [row(metadata.main_score, result.get_score())]
    if (metric := FOLLOW_IR_METRICS.get(metadata.name)) is not None:
        rows.append(row(metric, result.get_score(getter=lambda scores: scores["og"][metric])))
    return rows


def _run(encoder: InstructionEncoder, task: Any, cache: ResultCache, batch_size: int) -> Any:
    name, path = task.metadata.name, task.metadata.dataset["path"]
    try:
        return mteb.evaluate(
            cast(Any, encoder),
            task,
            cache=cache,
            overwrite_strategy="only-missing",
            encode_kwargs=cast(Any, {"batch_size": batch_size}),
            show_progress_bar=False,
            co2_tracker=False,
        )
    except (DatasetNotFoundError, FileNotFoundError, GatedRepoError) as error:
        if isinstance(error, GatedRepoError) or "gated dataset" in str(error):  # datasets drops the cause
            raise BenchmarkError(f"{name}: access to {path} is restricted; ask for it on its page on the Hub") from error
        raise BenchmarkError(
            f"{name}: the dataset {path} could not be read from the Hub; check the name, your access to it and the token"
        ) from error
    except (ConnectionError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise BenchmarkError(f"{name}: the Hub cannot be reached for {path}; run the same command when it can") from error
    except HfHubHTTPError as error:
        raise BenchmarkError(
            f"{name}: the Hub answers with status {error.response.status_code} for {path}; check the token, and run again"
        ) from error
