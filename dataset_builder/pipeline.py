"""From query-passage pairs to InF-IR: the stages over many records, resumable, bounded in cost, every record accounted for.

A build lives in one folder and goes through three steps, each safe to be killed at any moment and repeated:

    (1) prepare: read the source once into ``work/pairs.parquet``, with ids, instruction types and forms drawn, and
        duplicates marked. From here on the source is not needed any more.
    (2) run: take every pair through the stages, ``concurrency`` requests at a time. Answers and outcomes go into
        ``work/ledger.sqlite`` (several tasks: ``work/task-00000/ledger.sqlite`` ...) before they are used.
    (3) export: write ``train.parquet`` (the tuples that were kept), ``unfiltered/train.parquet`` (rejected ones too, with
        the judge's answers), ``outcomes.csv`` (how every pair ended), ``report.json`` and ``report.md``.

The outcome of a record depends on its pair, the settings and the models' answers alone, never on the order in which
answers arrive. So a run that was interrupted, and one over many machines, end in the same bytes as one that was not.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import heapq
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from dataset_builder import stages
from dataset_builder.batches import BatchTransport
from dataset_builder.client import (
    OPENAI_URL,
    BadAnswer,
    LanguageModel,
    Limits,
    LiveTransport,
    Prices,
    Request,
    Stop,
    Transport,
    Usage,
    connect,
)
from dataset_builder.ledger import Ledger, LedgerError, Outcome
from dataset_builder.quality import Duplicates, tuple_problem
from dataset_builder.sources import Pair, read_pairs
from sentence_transformers_inf.records import OPTIONAL_COLUMNS, REQUIRED_COLUMNS

BATCH_RECORDS = 10_000
"""Records that wait for a job of the Batch API together."""

_PAIRS = pa.schema([(name, pa.string()) for name in ("id", "query", "passage", "instruction_type", "form", "duplicate_of")])
_KEPT = pa.schema([(name, pa.string()) for name in (*OPTIONAL_COLUMNS, *REQUIRED_COLUMNS) if name != "topic"])
_UNFILTERED = pa.schema(
    [
        *_KEPT,
        ("form", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("judge_answers", pa.list_(pa.string())),
    ]
)
_ROWS_AT_A_TIME = 500


@dataclass(frozen=True)
class Settings:
    """What shapes the outcome of a build; a folder holds one build, with one set of them."""

    pairs: str
    model: str = "gpt-4o-mini"
    judge: str = "o3-mini"
    judge_mode: str = "choice"
    query_column: str = "query"
    passage_column: str = "passage"
    split: str = "train"
    limit: int | None = None
    sample: int | None = None
    seed: int = 0
    temperature: float = 0.8
    effort: str = "medium"
    type_weights: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.judge_mode not in ("choice", "pairwise"):
            raise ValueError(f"the judge mode must be 'choice' or 'pairwise', got {self.judge_mode!r}")
        stages.draw_type_and_form("", 0, self.type_weights)


@dataclass
class Progress:
    """Where a run stands."""

    total: int
    """Pairs of this task that are no duplicates."""
    done: int
    usage: Usage
    counts: Counter[str] = field(default_factory=Counter)
    """Records by status."""
    seconds: float = 0.0


Watch = Callable[[Progress], None]


def prepare(folder: Path, settings: Settings, tasks: int = 1) -> int:
    """Read the source into ``work/pairs.parquet``, unless an earlier run did.

    Args:
        folder: Of the build.
        settings: Of the build.
        tasks: How many tasks share the build.

    Returns:
        How many pairs there are.

    Raises:
        FileExistsError: The folder holds something else, or a build with other settings.
        SourceError, FileNotFoundError: The source cannot be read.
    """
    work = folder / "work"
    wanted = asdict(settings) | {"tasks": tasks, "prompts": stages.prompt_hashes()}
    build = work / "build.json"
    if build.is_file():
        earlier = json.loads(build.read_text(encoding="utf-8"))
        if changed := sorted(key for key in wanted if earlier.get(key) != wanted[key]):
            raise FileExistsError(
                f"{folder} holds a build with another {changed[0]} ({earlier.get(changed[0])!r}, now "
                f"{wanted[changed[0]]!r}): name another output folder"
            )
    elif folder.is_dir() and any(folder.iterdir()) and not (folder / "work").is_dir():
        raise FileExistsError(f"{folder} is not empty and holds no build: name another output folder")
    path = work / "pairs.parquet"
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        pairs = read_pairs(
            settings.pairs,
            query_column=settings.query_column,
            passage_column=settings.passage_column,
            split=settings.split,
            limit=settings.limit,
            sample=settings.sample,
            seed=settings.seed,
        )
        _write_parquet(path, _PAIRS, _prepared(pairs, settings))
    if not build.is_file():
        _write_text(build, json.dumps(wanted, indent=2) + "\n")
    return int(pq.ParquetFile(path).metadata.num_rows)


def _prepared(pairs: Iterator[Pair], settings: Settings) -> Iterator[dict[str, Any]]:
    duplicates = Duplicates()
    seen: Counter[str] = Counter()
    for pair in pairs:
        seen[pair.id] += 1
        identifier = pair.id if seen[pair.id] == 1 else f"{pair.id}#{seen[pair.id]}"
        found = duplicates.add(identifier, f"{pair.query}\n{pair.passage}")
        instruction_type, form = stages.draw_type_and_form(identifier, settings.seed, settings.type_weights)
        yield {
            "id": identifier,
            "query": pair.query,
            "passage": pair.passage,
            "instruction_type": instruction_type,
            "form": form,
            "duplicate_of": f"{found[0]} of {found[1]}" if found else None,
        }
    if not seen:
        raise ValueError(f"{settings.pairs}: there are no pairs in it")


def read_prepared(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(position, pair) of all prepared pairs, a few hundred in memory at a time."""
    position = 0
    for batch in pq.ParquetFile(folder / "work" / "pairs.parquet").iter_batches(_ROWS_AT_A_TIME):
        for pair in batch.to_pylist():
            yield position, pair
            position += 1


@dataclass(frozen=True)
class Estimate:
    """What a build will take; tokens are a quarter of the characters, answers are of the usual lengths."""

    records: int
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    minutes: float


def estimate(folder: Path, settings: Settings, limits: Limits, prices: Prices) -> Estimate:
    """Requests, tokens, price and time of a prepared build, as if every record reached the judge.

    The first 200 pairs are measured. Assumed: instructions of 40 tokens, passages as long as the given one, 12 tokens for
    an answer of the judge and 600 more where it reasons (a model of the o or gpt-5 series), 2 s for an answer and 6 s for
    a reasoned one.

    Raises:
        ValueError: The price of a model is not known.
    """
    total, measured = 0, 0
    used = {settings.model: [0, 0], settings.judge: [0, 0]}
    judged = 3 if settings.judge_mode == "choice" else 9
    reasons = 600 if settings.judge.startswith(("o1", "o3", "o4", "gpt-5")) else 0
    for _, pair in read_prepared(folder):
        if pair["duplicate_of"] is not None:
            continue
        total += 1
        if measured == 200:
            continue
        measured += 1
        words = " ".join(["word"] * 30)
        record = _start_record(pair) | {"instruction_positive": words, "instruction_negative": words}
        record |= {"query_negative": pair["query"]}
        record |= {"hard_negative_document_1": pair["passage"], "hard_negative_document_2": pair["passage"]}
        passage = len(pair["passage"]) // 4
        extra = {"type_meaning": words, "form_meaning": words, "low": 0, "high": 0}
        shown = [record["document"]] * (3 if judged == 3 else 1)
        asked = record | extra | {"query": pair["query"], "instruction": words, "passages": shown}
        for prompt, answer, times in (
            ("instruct", 50, 1),
            ("poison", 70, 1),
            ("write", 20 + 2 * passage, 1),
            ("judge" if judged == 3 else "judge_pairwise", 12 + reasons, judged),
        ):
            tokens = used[settings.judge if prompt.startswith("judge") else settings.model]
            tokens[0] += times * sum(len(message["content"]) // 4 + 8 for message in stages.render(prompt, asked))
            tokens[1] += times * answer
    scale = total / max(measured, 1)
    requests = total * (3 + judged)
    prompt_tokens = round(scale * sum(tokens[0] for tokens in used.values()))
    completion_tokens = round(scale * sum(tokens[1] for tokens in used.values()))
    seconds = total * (3 * 2 + judged * (6 if reasons else 2)) / limits.concurrency
    if limits.rpm:
        seconds = max(seconds, 60 * requests / limits.rpm)
    if limits.tpm:
        seconds = max(seconds, 60 * (prompt_tokens + completion_tokens) / limits.tpm)
    cost = scale * sum(prices.cost(model, *tokens) for model, tokens in used.items())
    return Estimate(total, requests, prompt_tokens, completion_tokens, cost, seconds / 60)


async def build_tuple(pair: dict[str, Any], ask: stages.Ask, settings: Settings) -> tuple[str, str, dict[str, Any]]:
    """Take one pair through all stages.

    Args:
        pair: A row of ``pairs.parquet``.
        ask: Puts a prompt to its model.
        settings: Of the build.

    Returns:
        (``kept`` or ``rejected``, why, the tuple).

    Raises:
        BadAnswer: The record has failed.
        Stop: The run cannot go on.
    """
    record = await stages.instruct(_start_record(pair), ask)
    record = await stages.poison(record, ask)
    record = await stages.write(record, ask)
    if (problem := tuple_problem(record)) is not None:
        return "rejected", problem, record
    record = await stages.judge(record, ask, settings.seed, pairwise=settings.judge_mode == "pairwise")
    problem = stages.verdict(record["judge_answers"])
    return ("kept", "", record) if problem is None else ("rejected", problem, record)


def _start_record(pair: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": pair["id"],
        "instruction_type": pair["instruction_type"],
        "form": pair["form"],
        "query_positive": pair["query"],
        "document": pair["passage"],
    }


def ledger_path(folder: Path, rank: int = 0, tasks: int = 1) -> Path:
    """Where a task keeps its ledger."""
    return folder / "work" / ("" if tasks == 1 else f"task-{rank:05d}") / "ledger.sqlite"


async def run(
    folder: Path,
    settings: Settings,
    limits: Limits,
    prices: Prices,
    *,
    base_url: str | None = None,
    batch: bool = False,
    batch_poll: float = 30.0,
    retry_failed: bool = False,
    rank: int = 0,
    tasks: int = 1,
    watch: Watch | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Progress:
    """Take the prepared pairs ``rank``, ``rank + tasks`` ... through the stages; those that ended before are left alone.

    Args:
        folder: Of a prepared build.
        settings: Of the build.
        limits: What the run may use.
        prices: What requests cost.
        base_url: An OpenAI-compatible server; ``None`` for OpenAI's.
        batch: Go through the Batch API.
        batch_poll: Seconds between two looks at a job.
        retry_failed: Take records that failed before through the stages again.
        rank: Number of this task.
        tasks: How many tasks share the build.
        watch: Called twice a second.
        say: Told about jobs of the Batch API.

    Returns:
        Where the run stands in the end.

    Raises:
        Stop: The run cannot go on, or was interrupted; what was answered is kept.
    """
    for model in (settings.model, settings.judge):
        try:
            prices.cost(model, 0, 0)
        except ValueError as error:
            raise Stop(str(error)) from error
    path = ledger_path(folder, rank, tasks)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.parent / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise Stop(f"{folder}: another run is at work in this folder; wait for it or stop it") from error
    try:
        ledger = Ledger(path)
        try:
            async with connect(base_url, limits.timeout) as client:
                transport: Transport = LiveTransport(client, ledger, prices)
                if batch:
                    transport = batches = BatchTransport(client, ledger, prices, poll=batch_poll, say=say)
                    await batches.resume()
                if retry_failed:
                    ledger.forget_failures()
                language_model = LanguageModel(transport, ledger, prices, limits, base_url or OPENAI_URL)
                return await _run(folder, settings, language_model, ledger, limits, rank, tasks, watch)
        finally:
            await ledger.close()
    except LedgerError as error:
        raise Stop(str(error)) from error
    finally:
        lock.release()


async def _run(
    folder: Path,
    settings: Settings,
    model: LanguageModel,
    ledger: Ledger,
    limits: Limits,
    rank: int,
    tasks: int,
    watch: Watch | None,
) -> Progress:
    finished = ledger.finished()
    pairs = (
        (position, pair)
        for position, pair in read_prepared(folder)
        if position % tasks == rank and position not in finished and pair["duplicate_of"] is None
    )
    total = sum(1 for position, pair in read_prepared(folder) if position % tasks == rank and pair["duplicate_of"] is None)
    progress = Progress(total, len(finished), model.usage)
    progress.counts.update(outcome.status for outcome in ledger.outcomes())

    async def ask(prompt: str, answer: type[Any], max_tokens: int, values: dict[str, Any]) -> Any:
        judging = prompt.startswith("judge")
        return await model.ask(
            Request(
                stage=prompt,
                model=settings.judge if judging else settings.model,
                messages=stages.render(prompt, values),
                answer=answer,
                max_tokens=max_tokens,
                temperature=0.0 if judging else settings.temperature,
                seed=settings.seed,
                effort=settings.effort,
            )
        )

    async def work() -> None:
        for position, pair in pairs:
            if model.stopped is not None:
                return
            try:
                status, reason, record = await build_tuple(pair, ask, settings)
            except BadAnswer as error:
                status, reason, record = "failed", str(error), {"bad_requests": error.requests}
            except (Stop, LedgerError) as error:
                model.stopped = model.stopped or (error if isinstance(error, Stop) else Stop(str(error)))
                return
            try:
                await ledger.keep_outcome(Outcome(position, status, reason, record))
            except LedgerError as error:
                model.stopped = model.stopped or Stop(str(error))
                return
            progress.done += 1
            progress.counts[status] += 1

    started = time.monotonic()
    with _stop_on_signal(model):
        workers = [asyncio.create_task(work()) for _ in range(limits.concurrency)]
        pending: set[asyncio.Task[None]] = set(workers)
        while pending:
            done, pending = await asyncio.wait(pending, timeout=0.5)
            progress.seconds = time.monotonic() - started
            if watch is not None:
                watch(progress)
            for task in done:
                task.result()
    if model.stopped is not None:
        raise model.stopped
    return progress


@contextlib.contextmanager
def _stop_on_signal(model: LanguageModel) -> Iterator[None]:
    """The first Ctrl-C lets requests in flight come home and be kept; the second one ends the process."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        model.stopped = model.stopped or Stop("interrupted; the same command goes on from here")
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
    except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
        yield
        return
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def export(folder: Path, settings: Settings, prices: Prices, tasks: int = 1) -> dict[str, Any]:
    """Write the dataset and the report from the ledgers of all tasks.

    Args:
        folder: Of the build.
        settings: Of the build.
        prices: For the date of the table.
        tasks: How many tasks share the build.

    Returns:
        The report. ``kept``, ``rejected``, ``failed`` and ``unfinished`` add up to ``pairs``.

    Raises:
        FileNotFoundError: The ledger of a task is missing.
    """
    ledgers = []
    for rank in range(tasks):
        path = ledger_path(folder, rank, tasks)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: task {rank} of {tasks} has not run, run the same command again")
        ledgers.append(Ledger(path))
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    types: dict[str, Counter[str]] = {}

    def outcomes() -> Iterator[dict[str, Any]]:
        """All pairs in order, with how they ended."""
        ended = heapq.merge(*(ledger.outcomes() for ledger in ledgers), key=lambda outcome: outcome.position)
        following = next(ended, None)
        for position, pair in read_prepared(folder):
            if pair["duplicate_of"] is not None:
                yield {"id": pair["id"], "status": "rejected", "reason": pair["duplicate_of"]}
            elif following is not None and following.position == position:
                yield {**following.record, "id": pair["id"], "status": following.status, "reason": following.reason}
                following = next(ended, None)
            else:
                yield {"id": pair["id"], "status": "unfinished", "reason": ""}

    folder.joinpath("unfiltered").mkdir(exist_ok=True)
    table = folder / "outcomes.csv.part"
    with table.open("w", encoding="utf-8", newline="") as file, contextlib.ExitStack() as stack:
        kept = stack.enter_context(_parquet(folder / "train.parquet", _KEPT))
        unfiltered = stack.enter_context(_parquet(folder / "unfiltered" / "train.parquet", _UNFILTERED))
        writer = csv.writer(file)
        writer.writerow(("id", "status", "reason"))
        for outcome in outcomes():
            writer.writerow((outcome["id"], outcome["status"], outcome["reason"]))
            counts[outcome["status"]] += 1
            if outcome["status"] in ("rejected", "failed"):
                duplicate = outcome["reason"].split("duplicate of ")
                reasons[f"{duplicate[0]}duplicate" if len(duplicate) == 2 else outcome["reason"]] += 1
            if "document" in outcome:
                types.setdefault(outcome["instruction_type"], Counter())[outcome["status"]] += 1
                unfiltered(outcome)
                if outcome["status"] == "kept":
                    kept(outcome)
    os.replace(table, folder / "outcomes.csv")

    usage: dict[str, dict[str, float]] = {}
    for ledger in ledgers:
        for model, total in ledger.totals().items():
            sums = usage.setdefault(model, dict.fromkeys(total, 0))
            for name, value in total.items():
                sums[name] += value
        asyncio.run(ledger.close())
    report: dict[str, Any] = {
        "kept": counts["kept"],
        "rejected": counts["rejected"],
        "failed": counts["failed"],
        "unfinished": counts["unfinished"],
        "pairs": sum(counts.values()),
        "reasons": dict(reasons.most_common()),
        "per_type": {
            name: {"tuples": sum(of_type.values()), "kept": of_type["kept"]} for name, of_type in sorted(types.items())
        },
        "usage": usage,
        "cost": sum(total["cost"] for total in usage.values()),
        "prices_as_of": prices.as_of,
        "settings": asdict(settings),
        "prompts": stages.prompt_hashes(),
    }
    _write_text(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _write_text(folder / "report.md", _report_text(report))
    return report


def _report_text(report: dict[str, Any]) -> str:
    settings, pairs = report["settings"], max(report["pairs"], 1)
    lines = [
        "# Report of the build",
        "",
        f"{report['pairs']} pairs of `{settings['pairs']}`; written by {settings['model']}, judged by {settings['judge']}.",
        "",
        "| outcome | pairs | share |",
        "|---|---|---|",
        *(
            f"| {name} | {report[name]} | {report[name] / pairs:.1%} |"
            for name in ("kept", "rejected", "failed", "unfinished")
        ),
        "",
        "| why rejected or failed | pairs |",
        "|---|---|",
        *(f"| {reason} | {count} |" for reason, count in report["reasons"].items()),
        "",
        "| instruction type | tuples | kept |",
        "|---|---|---|",
        *(
            f"| {name} | {counts['tuples']} | {counts['kept']} ({counts['kept'] / counts['tuples']:.0%}) |"
            for name, counts in report["per_type"].items()
        ),
        "",
        f"| model | requests | tokens in | tokens out | dollars (prices of {report['prices_as_of']}) |",
        "|---|---|---|---|---|",
        *(
            f"| {model} | {total['requests']:.0f} | {total['prompt_tokens']:.0f} | {total['completion_tokens']:.0f} | "
            f"{total['cost']:.4f} |"
            for model, total in report["usage"].items()
        ),
        "",
        "Prompts: " + ", ".join(f"{name} {digest}" for name, digest in report["prompts"].items()),
        "",
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def _parquet(path: Path, schema: pa.Schema) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that adds rows to a Parquet file, which takes its place when all is written."""
    part = path.with_name(path.name + ".part")
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(part, schema, compression="zstd") as writer:

        def add(row: dict[str, Any]) -> None:
            rows.append({name: row.get(name) for name in schema.names})
            if len(rows) == _ROWS_AT_A_TIME:
                flush()

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(rows, schema))
            rows.clear()

        yield add
        flush()
    os.replace(part, path)


def _write_parquet(path: Path, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> None:
    with _parquet(path, schema) as add:
        for row in rows:
            add(row)


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def failures(report: dict[str, Any], max_failed: float) -> str | None:
    """One line if more than the share ``max_failed`` of the pairs failed, else ``None``."""
    if report["failed"] <= max_failed * report["pairs"]:
        return None
    return f"{report['failed']} of {report['pairs']} records failed, more than --max-failed {max_failed:g} allows"
