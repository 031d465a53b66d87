"""The second step of a build: take the prepared pairs through the stages, ``concurrency`` requests at a time.

The outcome of a record depends on its pair, the settings and the models' answers alone, never on the order in which
answers arrive. So a run that was interrupted, and one over many machines, end in the same bytes as one that was not.
"""

import asyncio
import contextlib
import gc
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from anyio.from_thread import start_blocking_portal
from tqdm.auto import tqdm

from dataset_builder import contrast, stages
from dataset_builder.batch_files import FileTransport
from dataset_builder.batches import BatchTransport
from dataset_builder.chat import Request
from dataset_builder.errors import BadAnswer, Stop
from dataset_builder.files import locked
from dataset_builder.language_model import GRACE, LanguageModel, Limits, Usage
from dataset_builder.ledger import Ledger, LedgerError, Outcome, ledger_path
from dataset_builder.live import OPENAI_URL, LiveTransport, connect
from dataset_builder.models import longest_passage
from dataset_builder.prepare import Settings, read_build, read_prepared, start_record
from dataset_builder.prices import Prices
from dataset_builder.quality import tuple_problem, words

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Progress:
    """Where a run stands."""

    total: int
    """Pairs of this task that are no duplicates."""
    usage: Usage
    counts: Counter[str]
    """Records that ended, by status."""


_Result = TypeVar("_Result")


def run_sync(function: Callable[[], Coroutine[Any, Any, _Result]]) -> _Result:
    """Call an asynchronous function and wait for its result.

    Where the thread runs an event loop already, as in a notebook, it runs in another thread; an interrupt cancels it there.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(function())
    call: Callable[[], Awaitable[_Result]] = function
    with start_blocking_portal() as portal:
        return portal.call(call)


def asker(model: LanguageModel, writer: str, judge: str, temperature: float, seed: int, effort: str) -> stages.Ask:
    """A function that puts the prompts of the stages to their models; the temperature is the writer's, the judge has 0."""

    async def ask(prompt: str, answer: type[Any], max_tokens: int, values: dict[str, Any]) -> Any:
        name, heat = (judge, 0.0) if prompt.startswith("judge") else (writer, temperature)
        return await model.ask(Request(prompt, name, stages.render(prompt, values), answer, max_tokens, heat, seed, effort))

    return ask


async def build_tuple(pair: dict[str, Any], ask: stages.Ask, settings: Settings) -> tuple[str, str, dict[str, Any]]:
    """Take one pair, a row of ``pairs.parquet``, through all stages: (``kept`` or ``rejected``, why, the tuple)."""
    is_mined = settings.passages == "mined"  # then passages are shown in part
    longest = settings.max_passage_words or longest_passage(settings.model, settings.judge)
    for name in ("query",) if is_mined else ("query", "passage"):
        if len(words(pair[name])) > longest:
            return "rejected", f"longer than {longest:,} words: {name}", {}
    if is_mined:
        contrasted = await contrast.contrast(start_record(pair), pair["candidates"], ask)
        if contrasted is None:
            return "rejected", contrast.NO_SECOND, {}
        record = contrasted
    else:
        record = await stages.instruct(start_record(pair), ask)
        record = await stages.poison(record, ask)
        record = await stages.write(record, ask)
    if (problem := tuple_problem(record)) is not None:
        return "rejected", problem, record
    judge = contrast.judge if is_mined else stages.judge
    record = await judge(record, ask, settings.seed, pairwise=settings.judge_mode == "pairwise")
    problem = stages.verdict(record["judge_answers"])
    return ("kept", "", record) if problem is None else ("rejected", problem, record)


async def run(
    folder: Path,
    settings: Settings,
    limits: Limits,
    prices: Prices,
    *,
    base_url: str | None = None,
    batch: bool = False,
    batch_poll: float = 30.0,
    batch_files: Path | None = None,
    retry_failed: bool = False,
    rank: int = 0,
    tasks: int = 1,
    show_progress: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Progress:
    """Take the prepared pairs ``rank``, ``rank + tasks`` ... through the stages; those that ended before are left alone.

    Args:
        folder: Of a prepared build.
        settings: What it was prepared with.
        base_url: An OpenAI-compatible server; ``None`` for OpenAI's.
        batch: Go through the Batch API.
        batch_poll: Seconds between two looks at a job.
        batch_files: Ask no server: write questions into this folder, and read the answers that are there.
        retry_failed: Take records that failed before through the stages again.
        show_progress: Show a progress bar.
        log: Called with one line about a job of the Batch API, or a file of answers.

    Returns:
        Where the run stands in the end.

    Raises:
        BlockingIOError: Another process is at work in the folder.
        Stop: The run cannot go on, or was interrupted; what was answered is kept.
        ValueError: The price of a model is not known.
    """
    for name in (settings.model, settings.judge):
        prices.cost(name, 0, 0)
    path = ledger_path(folder, rank, tasks)
    if (folder / "report.json").is_file() and not path.exists():
        remedy = f"put it back, or begin it anew by `inf-ir repair {folder}`"
        raise Stop(f"{path} is missing, and its answers were paid for: {remedy}")
    build = read_build(folder)["build"]
    try:
        with contextlib.ExitStack() as stack:
            gc.freeze()  # what is imported is no garbage: to walk through it again and again takes a tenth of the time
            stack.callback(gc.unfreeze)
            if tasks == 1:  # whoever started the tasks of an executor holds the folder
                stack.enter_context(locked(folder))
            # Before the ledger is made, because it checks the key.
            connection = None if batch_files else connect(base_url, limits.timeout, limits.concurrency)
            ledger = stack.enter_context(contextlib.closing(Ledger(path, build)))
            if retry_failed:
                ledger.forget_failures()
            async with contextlib.nullcontext() if connection is None else connection[0]:
                transport: LiveTransport | BatchTransport | FileTransport
                if connection is None:
                    assert batch_files is not None
                    transport = FileTransport(batch_files, ledger, prices, log)
                    stack.callback(transport.end)
                    transport.read_answers()
                elif batch:
                    transport = BatchTransport(connection[0], ledger, prices, batch_poll, limits.batch_tokens, log)
                else:
                    transport = LiveTransport(connection[1], ledger, prices)
                address = str(batch_files) if batch_files else base_url or OPENAI_URL
                model = LanguageModel(transport, ledger, prices, limits, address)
                if isinstance(transport, BatchTransport):
                    await drive(transport.resume, 1, model, log)
                    model.recount()

                def share() -> Iterator[tuple[int, dict[str, Any]]]:
                    pairs = read_prepared(folder)
                    return (item for item in pairs if item[0] % tasks == rank and item[1]["duplicate_of"] is None)

                progress = await _run_share(share, settings, model, ledger, limits.concurrency, show_progress, log)
                if isinstance(transport, FileTransport):
                    transport.remove_questions()
                return progress
    except LedgerError as error:
        raise Stop(str(error)) from error


async def _run_share(
    share: Callable[[], Iterator[tuple[int, dict[str, Any]]]], settings: Settings, model: LanguageModel, ledger: Ledger,
    concurrency: int, show_progress: bool, log: Callable[[str], None],
) -> Progress:  # fmt: skip
    ended = ledger.statuses()
    progress = Progress(sum(1 for _ in share()), model.usage, Counter(ended.values()))
    pairs = (item for item in share() if item[0] not in ended)
    ask = asker(model, settings.model, settings.judge, settings.temperature, settings.seed, settings.effort)

    async def work() -> None:
        for position, pair in pairs:
            if model.stopped is not None:
                return
            try:
                status, reason, record = await build_tuple(pair, ask, settings)
            except BadAnswer as error:
                status, reason, record = "failed", str(error), {"bad_requests": error.requests}
            await ledger.keep_outcome(Outcome(position, status, reason, record))
            progress.counts[status] += 1
            bar.update()

    def show() -> None:
        used = {"requests": model.usage.requests, "tokens": model.usage.tokens, "cost": f"${model.usage.cost:.4f}"}
        bar.set_postfix({**progress.counts, **used}, refresh=on_terminal)

    on_terminal = sys.stderr.isatty()
    bar = tqdm(
        total=progress.total, initial=len(ended), unit="record", mininterval=0.5 if on_terminal else 10.0,
        disable=not show_progress,
    )  # fmt: skip
    with bar:
        await drive(work, concurrency, model, log, show)
    return progress


async def drive(
    work: Callable[[], Coroutine[Any, Any, None]], count: int, model: LanguageModel, log: Callable[[str], None],
    show: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Run so many workers that ask a model until all have ended; call ``show`` twice a second.

    The first Ctrl-C or SIGTERM is told to ``log`` and lets requests in flight come home, for a short while; the second one
    ends the process.

    Raises:
        Stop: The run cannot go on, or was interrupted.
    """

    async def guarded() -> None:
        try:
            await work()
        except Stop as stop:
            model.stop(str(stop), stop.budget)
        except LedgerError as error:
            model.stop(str(error))

    clock = asyncio.get_running_loop().time
    end = None
    with _interrupting(model, log):
        tasks = pending = {asyncio.create_task(guarded()) for _ in range(count)}
        try:
            while pending and (end is None or clock() < end):
                done, pending = await asyncio.wait(pending, timeout=0.5)
                show()
                for task in done:
                    task.result()
                if end is None and model.grace is not None:
                    end = clock() + model.grace
        finally:
            for task in pending:
                task.cancel()
            # What is cut off in flight is noted as possibly paid; errors beside the first are taken, or asyncio prints them.
            await asyncio.gather(*tasks, return_exceptions=True)
    if model.stopped is not None:
        raise model.stopped


@contextlib.contextmanager
def _interrupting(model: LanguageModel, log: Callable[[str], None]) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM stop the model, and the second one the process."""
    loop = asyncio.get_running_loop()
    handled: list[signal.Signals] = []

    def stop() -> None:
        for number in handled:
            loop.remove_signal_handler(number)
        handled.clear()
        model.interrupt()
        log(f"stopping: what is in flight has {GRACE:.0f} s to come home and is kept; Ctrl-C again ends at once")

    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
        for number in _SIGNALS:
            loop.add_signal_handler(number, stop)
            handled.append(number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
