"""The pipeline as a datatrove step, so that datatrove's executors run it: processes, Slurm, Ray.

Every task takes its share of the prepared pairs through the stages with a ledger of its own. A task that ended is marked
by datatrove and skipped when the build is run again; one that was killed goes on from its ledger.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("LOGURU_DIAGNOSE", "NO")  # before datatrove: its logger would print the values of variables

from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep

from dataset_builder.client import Limits, Prices, Stop
from dataset_builder.pipeline import Settings, run

EXECUTORS = ("local", "slurm", "ray")


class BuildShard(PipelineStep):
    """One task's share of a build.

    Args:
        folder: Of a prepared build; every task reaches it under this path.
        settings: Of the build.
        limits: Of the whole build; a task takes its share.
        prices: What requests cost.
        base_url: An OpenAI-compatible server; ``None`` for OpenAI's, with the key in each task's environment.
        retry_failed: Take records that failed before through the stages again.
    """

    type = "BUILD"
    name = "InF-IR"

    def __init__(
        self,
        folder: str,
        settings: Settings,
        limits: Limits,
        prices: Prices,
        base_url: str | None = None,
        retry_failed: bool = False,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.settings = settings
        self.limits = limits
        self.prices = prices
        self.base_url = base_url
        self.retry_failed = retry_failed

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Run one task; raises :class:`~dataset_builder.client.Stop` where it cannot go on, so that it is not marked."""
        failure = None
        try:
            progress = asyncio.run(
                run(
                    Path(self.folder),
                    self.settings,
                    _share(self.limits, world_size),
                    self.prices,
                    base_url=self.base_url,
                    retry_failed=self.retry_failed,
                    rank=rank,
                    tasks=world_size,
                )
            )
        except Stop as error:
            failure = Stop(str(error), error.budget)
        if failure is not None:  # outside of the handler: the executor logs tracebacks, and those may show records
            raise failure
        for status, count in progress.counts.items():
            self.stat_update(status, value=count)
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


def executor(
    kind: str,
    step: BuildShard,
    tasks: int,
    workers: int,
    *,
    slurm_partition: str | None = None,
    slurm_time: str = "24:00:00",
) -> PipelineExecutor:
    """A datatrove executor for a build.

    Args:
        kind: ``local``, ``slurm`` or ``ray``.
        step: What each task runs.
        tasks: How many tasks share the build.
        workers: How many run at a time.
        slurm_partition: Partition of the cluster; needed for ``slurm``.
        slurm_time: Time limit of a task there.

    Raises:
        ValueError: An unknown kind, or no partition.
    """
    logs = str(Path(step.folder) / "work" / "logs")
    # Failed records are looked for in tasks that ended, too.
    common: dict[str, Any] = {"logging_dir": logs, "skip_completed": not step.retry_failed}
    if kind == "local":
        from datatrove.executor.local import LocalPipelineExecutor

        return LocalPipelineExecutor([step], tasks=tasks, workers=workers, start_method="spawn", **common)
    if kind == "ray":
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor([step], tasks=tasks, workers=workers, **common)
    if kind == "slurm":
        from datatrove.executor.slurm import SlurmPipelineExecutor

        if not slurm_partition:
            raise ValueError("Slurm needs a partition: --slurm-partition NAME")
        return SlurmPipelineExecutor(
            [step], tasks=tasks, workers=workers, partition=slurm_partition, time=slurm_time, job_name="inf-ir", **common
        )
    raise ValueError(f"there is no executor {kind!r}; there are {', '.join(EXECUTORS)}")
