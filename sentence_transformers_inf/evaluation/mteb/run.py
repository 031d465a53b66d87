"""Run benchmarks through MTEB: results in its own layout, resumable task by task."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import mteb
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from mteb.abstasks import AbsTask
from mteb.cache import ResultCache
from mteb.results import TaskResult

from sentence_transformers_inf.evaluation.mteb.encoder import InstructionEncoder, folder_revision, result_name
from sentence_transformers_inf.evaluation.mteb.suites import FOLLOW_IR_METRICS, find_task, get_suite, takes_instructions
from sentence_transformers_inf.modules import load_instruction_model


class BenchmarkError(OSError):
    """A benchmark cannot be run; the message names the task and the remedy."""


@dataclass(frozen=True)
class BenchmarkScore:
    """One measure of one task for one model."""

    model: str
    """As it was named in the call."""
    instructed: bool
    """False for the control run, which leaves the instructions out."""
    task: str
    metric: str
    """The task's own main score, or what is reported beside it: for FollowIR's tasks what the paper reports."""
    score: float
    """Times 100, the mean over the task's subsets."""
    dataset: str
    """The id of the task's dataset on the Hub; of topics of one's own, the name of their file."""
    revision: str
    """Its revision; of topics of one's own, a digest of their file."""
    split: str
    takes_instructions: bool = True
    """False for a task of which no instruction reaches the model: none, or as part of the query (IFIR)."""


def run_benchmark(
    models: Sequence[str],
    benchmark: str,
    output: str | Path,
    *,
    tasks: list[str] | None = None,
    data: str | Path | None = None,
    no_instruction: bool = False,
    batch_size: int = 32,
    trust_remote_code: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> list[BenchmarkScore]:
    """Run a benchmark; tasks whose results are in ``output`` are not run again.

    Args:
        models: Hub ids or folders; the first is the one in question, others are for comparison.
        benchmark: One of :data:`~sentence_transformers_inf.evaluation.mteb.SUITES`.
        output: Folder of the results, in MTEB's layout (``results/MODEL/REVISION/TASK.json``).
        tasks: Some of the benchmark's tasks; ``None`` for all.
        data: Topics of one's own, for ``narratives`` only; see
            :mod:`~sentence_transformers_inf.evaluation.narratives`. ``None``: the bundled ones.
        no_instruction: Run every model without the instructions as well.
        batch_size: Texts encoded at a time.
        trust_remote_code: See :func:`~sentence_transformers_inf.load_instruction_model`.
        log: Called with a line about the task that is about to run.

    Returns:
        One score per model, control, task and metric.

    Raises:
        ValueError: No such benchmark or task, or ``data`` for another benchmark.
        NarrativeError, FileNotFoundError: ``data`` does not hold topics.
        BrokenModelError: A model's embeddings are not finite, or all the same for different texts.
        BenchmarkError: A dataset cannot be read.
    """
    suite = get_suite(benchmark, tasks, data)
    cache = ResultCache(Path(output))
    scores: list[BenchmarkScore] = []
    for name in models:
        model = load_instruction_model(name, trust_remote_code=trust_remote_code)
        revision = folder_revision(name) if Path(name).is_dir() else model.model_card_data.base_model_revision
        for bare in (False, True) if no_instruction else (False,):
            encoder = InstructionEncoder(model, result_name(name), revision, no_instruction=bare)
            for task in suite:
                log(f"{task.metadata.name}: {name}{' without instructions' if bare else ''}")
                if not takes_instructions(task):
                    log(f"{task.metadata.name} hands no instruction to the model: its score says nothing about obeying")
                _drop_half_written(cache.get_task_result_path(task.metadata.name, cast(Any, encoder.mteb_model_meta)), log)
                result = _run(encoder, task, cache, batch_size)
                scores += _scores(name, not bare, task, result.task_results[0])
    return scores


def read_results(model: str, folder: str | Path) -> list[BenchmarkScore]:
    """The results of one model in the output folder of :func:`run_benchmark`, with those of its control run.

    Args:
        model: The model's folder. Results of other weights that were there before are left out.
        folder: The output folder.

    Raises:
        ValueError: A file is no result.
    """
    revision = folder_revision(model)
    try:
        loaded = ResultCache(Path(folder)).load_results(
            [result_name(model)], include_remote=False, load_experiments="match_name"
        )
        found = [
            score
            for result in loaded.model_results
            if result.model_revision == revision
            for task in result.task_results
            for score in _scores(model, result.experiment_name is None, find_task(task.task_name), task)
        ]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: there is a file in it that is no result of MTEB: move it away ({error!r})") from error
    return sorted(found, key=lambda score: (score.task, not score.instructed))


def _drop_half_written(result: Path, log: Callable[[str], None]) -> None:
    """Remove what a run was writing of a task's results when it was killed: MTEB would stumble over it."""
    for path in (result, result.with_name("model_meta.json"), result.with_name("run_settings.jsonl")):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else "{}"
        try:
            for document in text.splitlines() if path.suffix == ".jsonl" else [text]:
                json.loads(document)
        except (ValueError, RecursionError):
            log(f"{path} was not written to its end: {result.stem} is run again")
            path.unlink()
    try:
        if result.exists():
            TaskResult.from_disk(result)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BenchmarkError(f"{result}: this is no result of MTEB: move it away, or name another --output") from error


def _scores(model: str, instructed: bool, task: AbsTask, result: TaskResult) -> list[BenchmarkScore]:
    """The task's main score and what is reported beside it; for FollowIR (§4) a measure of the original instructions."""
    metadata = task.metadata
    split = next(iter(result.scores))

    values = {metadata.main_score: result.get_score()}
    if (metric := FOLLOW_IR_METRICS.get(metadata.name)) is not None:
        values[metric] = result.get_score(getter=lambda scores: scores["og"][metric])
    for further in getattr(task, "further_metrics", ()):
        values[further] = result.get_score(getter=itemgetter(further))
    dataset, revision = metadata.dataset["path"], metadata.dataset["revision"]
    return [
        BenchmarkScore(
            model, instructed, metadata.name, metric, 100 * float(value), dataset, revision, split, takes_instructions(task)
        )
        for metric, value in values.items()
    ]


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
