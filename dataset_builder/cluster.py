"""The build as a step of a datatrove pipeline, so that datatrove's executors run it: processes, Slurm, Ray.

Each task takes its share of the prepared pairs through the stages with a ledger of its own. datatrove marks a task that
ended and skips it when the build is run again; one that was killed goes on from its ledger.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("LOGURU_DIAGNOSE", "NO")  # before datatrove: its logger would print the values of variables

from datatrove.executor.base import PipelineExecutor

from dataset_builder.errors import Stop
from dataset_builder.language_model import Limits
from dataset_builder.prepare import Settings
from dataset_builder.prices import Prices
from dataset_builder.run import run, run_sync


@dataclasses.dataclass(frozen=True)
class BuildTask:
    """A step of a datatrove pipeline: one task's share of a build."""

    folder: Path
    """Of a prepared build; all tasks reach it under this path."""
    settings: Settings
    limits: Limits
    """Of the whole build; a task takes its share."""
    prices: Prices
    base_url: str | None
    """An OpenAI-compatible server; ``None`` for OpenAI's, with the key in each task's environment."""
    retry_failed: bool

    def __call__(self, data: Any, rank: int, world_size: int) -> Any:
        """Run one task.

        Raises:
            Stop: The task cannot go on; datatrove does not mark it as completed.
        """
        limits = dataclasses.replace(  # the whole build's, shared; concurrency is each task's own
            self.limits,
            rpm=self.limits.rpm and max(1, self.limits.rpm // world_size),
            tpm=self.limits.tpm and max(1, self.limits.tpm // world_size),
            max_cost=self.limits.max_cost and self.limits.max_cost / world_size,
            max_requests=self.limits.max_requests and max(1, self.limits.max_requests // world_size),
        )
        build = functools.partial(run, self.folder, self.settings, limits, self.prices, rank=rank, tasks=world_size)
        failure = None
        try:
            run_sync(lambda: build(base_url=self.base_url, retry_failed=self.retry_failed))
        except Stop as error:
            failure = Stop(str(error), error.budget)
        if failure is not None:  # outside of the handler: the executor logs tracebacks, and those may show records
            raise failure
        return data


def run_tasks(kind: str, step: BuildTask, tasks: int, workers: int, slurm_partition: str | None, slurm_time: str) -> None:
    """Run a step as so many tasks, ``workers`` at a time: as processes (``local``), on Ray, or submitted to Slurm.

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
        raise ValueError(f"there is no executor {kind!r}; there are local, slurm and ray")
    try:
        executor.run()
    except Stop:
        raise
    except Exception as error:  # executors wrap what a task raises in errors of their own
        if isinstance(error.__cause__, Stop):
            raise error.__cause__ from error
        raise Stop(f"a task did not end ({type(error).__name__}); run it again") from error
