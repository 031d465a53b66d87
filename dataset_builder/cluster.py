"""The build as a step of a datatrove pipeline, so that datatrove's executors run it: processes, Slurm, Ray.

Each task takes its share of the prepared pairs through the stages with a ledger of its own. datatrove marks a task that
ended and skips it when the build is run again; one that was killed goes on from its ledger.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("LOGURU_DIAGNOSE", "NO")  # before datatrove: its logger would print the values of variables

from datatrove.executor.base import PipelineExecutor

from dataset_builder.errors import Stop
from dataset_builder.event_loop import run_sync
from dataset_builder.language_model import Limits
from dataset_builder.prepare import Settings
from dataset_builder.prices import Prices
from dataset_builder.run import run

EXECUTORS = ("local", "slurm", "ray")
"""Which of datatrove's executors there are: processes here, a Slurm cluster, a Ray cluster."""


@dataclasses.dataclass(frozen=True)
class BuildTask:
    """A step of a datatrove pipeline: one task's share of a build."""

    folder: Path
    """Of a prepared build; all tasks reach it under this path."""
    settings: Settings
    limits: Limits
    """Of the whole build; a task takes its share."""
    prices: Prices
    base_url: str | None = None
    """An OpenAI-compatible server; ``None`` for OpenAI's, with the key in each task's environment."""
    retry_failed: bool = False
    """Take records that failed before through the stages again."""

    def __call__(self, data: Any, rank: int, world_size: int) -> Any:
        """Run one task.

        Raises:
            Stop: The task cannot go on; datatrove does not mark it as completed.
        """
        limits = _share(self.limits, world_size)
        failure = None
        try:
            build = functools.partial(run, self.folder, self.settings, limits, self.prices, rank=rank, tasks=world_size)
            run_sync(lambda: build(base_url=self.base_url, retry_failed=self.retry_failed))
        except Stop as error:
            failure = Stop(str(error), error.budget)
        if failure is not None:  # outside of the handler: the executor logs tracebacks, and those may show records
            raise failure
        return data


def _share(limits: Limits, tasks: int) -> Limits:
    """A task's part of the limits that hold for the whole build; concurrency is each task's own."""
    return dataclasses.replace(
        limits,
        rpm=limits.rpm and max(1, limits.rpm // tasks),
        tpm=limits.tpm and max(1, limits.tpm // tasks),
        max_cost=limits.max_cost and limits.max_cost / tasks,
        max_requests=limits.max_requests and max(1, limits.max_requests // tasks),
    )


def run_tasks(kind: str, step: BuildTask, tasks: int, workers: int, slurm_partition: str | None, slurm_time: str) -> None:
    """Run a step as so many tasks, ``workers`` at a time, by one of :data:`EXECUTORS`; with Slurm, submit them.

    Raises:
        Stop: A task cannot go on.
        ValueError: An unknown executor, or Slurm without a partition.
    """
    common: dict[str, Any] = {"tasks": tasks, "workers": workers, "logging_dir": str(step.folder / "work" / "logs")}
    common["skip_completed"] = not step.retry_failed  # failed records are looked for in tasks that ended, too
    executor: PipelineExecutor
    if kind == "local":
        from datatrove.executor.local import LocalPipelineExecutor

        executor = LocalPipelineExecutor([step], start_method="spawn", **common)
    elif kind == "ray":
        from datatrove.executor.ray import RayPipelineExecutor

        executor = RayPipelineExecutor([step], **common)
    elif kind == "slurm":
        from datatrove.executor.slurm import SlurmPipelineExecutor

        if not slurm_partition:
            raise ValueError("Slurm needs a partition: --slurm-partition NAME")
        executor = SlurmPipelineExecutor([step], partition=slurm_partition, time=slurm_time, job_name="inf-ir", **common)
    else:
        raise ValueError(f"there is no executor {kind!r}; there are {', '.join(EXECUTORS)}")
    try:
        executor.run()
    except Stop:
        raise
    except Exception as error:  # executors wrap what a task raises in errors of their own
        if isinstance(error.__cause__, Stop):
            raise error.__cause__ from error
        raise Stop(f"a task did not end ({type(error).__name__}); run it again") from error
