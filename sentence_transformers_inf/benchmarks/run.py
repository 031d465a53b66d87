"""Run benchmarks through MTEB: results in its own layout, resumable task by task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mteb
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from mteb.cache import ResultCache

from sentence_transformers_inf.benchmarks.encoder import InstructionEncoder, result_name
from sentence_transformers_inf.benchmarks.suites import get_suite
from sentence_transformers_inf.modules import load_instruction_model


class BenchmarkError(OSError):
    """A benchmark cannot be run; the message names the task and the remedy."""


@dataclass(frozen=True)
class Row:
    """One task's result for one model."""

    model: str
    """As it was named in the call; the control run is told by ``instructed``."""
    instructed: bool
    task: str
    metric: str
    """The task's own main score."""
    score: float
    """Times 100."""


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
        One row per model, control and task.

    Raises:
        ValueError: No such benchmark or task.
        BenchmarkError: A dataset cannot be read.
    """
    suite = get_suite(benchmark, tasks)
    cache = ResultCache(Path(output))
    rows = []
    for name in models:
        model = load_instruction_model(name)
        revision = model.model_card_data.base_model_revision if not Path(name).is_dir() else None
        for bare in (False, True) if no_instruction else (False,):
            encoder = InstructionEncoder(model, result_name(name), revision, no_instruction=bare)
            for task in suite:
                say(f"{task.metadata.name}: {name}{' without instructions' if bare else ''}")
                result = _run(encoder, task, cache, batch_size)
                score = result.task_results[0].get_score()
                rows.append(Row(name, not bare, task.metadata.name, task.metadata.main_score, 100 * float(score)))
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
    except GatedRepoError as error:
        raise BenchmarkError(f"{name}: access to {path} is restricted; ask for it on its page on the Hub") from error
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise BenchmarkError(
            f"{name}: the dataset {path} could not be read from the Hub; check the name, your access to it and the token"
        ) from error
    except (ConnectionError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise BenchmarkError(f"{name}: the Hub cannot be reached for {path}; run the same command when it can") from error
    except HfHubHTTPError as error:
        raise BenchmarkError(
            f"{name}: the Hub answers with status {error.response.status_code} for {path}; check the token, and run again"
        ) from error
