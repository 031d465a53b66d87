"""The build as a step of a datatrove pipeline, so that datatrove's executors run it: processes, Slurm, Ray.

Each task takes its share of the prepared pairs through the stages with a ledger of its own. datatrove marks a task that
ended and skips it when the build is run again; one that was killed goes on from its ledger.
"""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("LOGURU_DIAGNOSE", "NO")  # before datatrove: its logger would print the values of variables

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor

from dataset_builder.errors import Stop
from dataset_builder.language_model import Limits
from dataset_builder.live import public_url
from dataset_builder.prepare import Settings
from dataset_builder.prices import Prices
from dataset_builder.run import run, run_sync

_URL_VARIABLE = "INF_IR_BASE_URL"
"""Has the server's address where that holds a password, which the files of an executor must not."""


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
        whole = os.environ.get(_URL_VARIABLE)
        base_url = whole if whole is not None and public_url(whole) == self.base_url else self.base_url
        failure = None
        try:
            run_sync(lambda: build(base_url=base_url, retry_failed=self.retry_failed))
        except Stop as error:
            failure = Stop(str(error), error.budget)
        if failure is not None:  # outside of the handler: the executor logs tracebacks, and those may show records
            raise failure
        return data


class _LocalExecutor(LocalPipelineExecutor):
    """datatrove's executor of this machine with a process for each task, whose end the system tells.

    datatrove's own pool waits forever for a worker that was killed. When a task raises, it sends SIGTERM to the others and
    waits for their end, but that signal asks a run to bring home its answers, and then the worker waits for a task.
    """

    def run(self) -> None:
        """Run the tasks that are not completed, ``workers`` at a time.

        Raises:
            Stop: A task did not end. One that was stopped by an error keeps tasks that have not begun from beginning.
        """
        self.save_executor_as_json()
        waiting = self.get_incomplete_ranks()
        running: dict[Any, tuple[multiprocessing.process.BaseProcess, Connection]] = {}
        stops: list[Stop] = []

        def interrupt(*signalled: object) -> None:
            waiting.clear()
            stops.insert(0, Stop("interrupted; the same command goes on from here"))
            for task, _ in list(running.values()):
                task.terminate()

        with _handling_signals(interrupt):
            while waiting or running:
                while waiting and len(running) < self.workers:
                    receiver, sender = _SPAWN.Pipe(duplex=False)
                    process = _SPAWN.Process(target=_run_task, args=(self, waiting.pop(0), sender))
                    process.start()
                    sender.close()  # here, so that the other end tells when the task has none
                    running[process.sentinel] = process, receiver
                for sentinel in wait(list(running)):
                    task, told = running.pop(sentinel)
                    task.join()
                    with told, contextlib.suppress(EOFError, OSError):  # nothing was sent: a kill, or our error
                        stops.append(stop := Stop(*json.loads(told.recv_bytes())))
                        if not stop.budget:
                            waiting.clear()
                        continue
                    if task.exitcode:
                        logs = Path(self.logging_dir.path, "logs")
                        stops.append(Stop(f"a task did not end (exit status {task.exitcode}), see {logs}; run it again"))
        if stops:
            raise min(stops, key=lambda stop: stop.budget)


_SPAWN = multiprocessing.get_context("spawn")


def _run_task(executor: _LocalExecutor, rank: int, sender: Connection) -> None:
    """Run one task in this process; what stopped it is sent."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if hasattr(signal, "pthread_sigmask"):  # Ctrl-C goes to all processes of a terminal; the parent passes it on, once
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        executor._run_for_rank(rank, rank % executor.workers)
    except Stop as stop:
        sender.send_bytes(json.dumps([str(stop), stop.budget]).encode())


@contextlib.contextmanager
def _handling_signals(handler: Callable[..., None]) -> Iterator[None]:
    """Call a function at Ctrl-C and SIGTERM, where this is the thread that gets them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def run_tasks(kind: str, step: BuildTask, tasks: int, workers: int, slurm_partition: str | None, slurm_time: str) -> None:
    """Run a step as so many tasks, ``workers`` at a time: as processes (``local``), on Ray, or submitted to Slurm.

    Raises:
        Stop: A task cannot go on.
        ValueError: An unknown executor, or Slurm without a partition.
    """
    if step.base_url is not None and (shown := public_url(step.base_url)) != step.base_url:
        os.environ[_URL_VARIABLE] = step.base_url
        step = dataclasses.replace(step, base_url=shown)
    common: dict[str, Any] = {"tasks": tasks, "workers": workers, "logging_dir": str(step.folder / "work" / "logs")}
    common["skip_completed"] = not step.retry_failed  # failed records are looked for in tasks that ended, too
    executor: PipelineExecutor
    if kind == "local":
        executor = _LocalExecutor([step], **common)
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
