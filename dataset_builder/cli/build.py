"""``inf-ir build`` and ``inf-ir repair``."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

from rich.table import Table
from tqdm.auto import tqdm
from typer import Argument, Exit, Option

from dataset_builder.cli.options import BUDGET, CANNOT, FAILED, BaseUrl, Concurrency, Effort, PriceList, console, stderr
from sentence_transformers_inf.cli.errors import error_line

if TYPE_CHECKING:
    from dataset_builder.errors import Stop
    from dataset_builder.prepare import Estimate, Settings
    from dataset_builder.prices import Prices


def build(
    pairs: Annotated[
        str, Option(help="microsoft/ms_marco, a Hub dataset, a BEIR folder, or a .jsonl/.csv/.tsv/.parquet file of pairs.")
    ],
    output: Annotated[Path, Option(help="Folder of the build; the same command goes on where it stopped.")],
    model: Annotated[str, Option(help="Writes instructions, twins and passages.")] = "gpt-4o-mini",
    judge: Annotated[str, Option(help="Decides which tuples stand; a reasoning model.")] = "o3-mini",
    base_url: BaseUrl = None,
    local: Annotated[
        Optional[str], Option(help="Serve this GGUF file (or USER/REPO/FILE.gguf on the Hub) here; it is model and judge.")
    ] = None,
    query_column: Annotated[str, Option(help="Column with the query.")] = "query",
    passage_column: Annotated[str, Option(help="Column with the passage.")] = "passage",
    split: Annotated[str, Option(help="Split of a Hub dataset or BEIR folder.")] = "train",
    limit: Annotated[Optional[int], Option(help="Read the first so many pairs only.")] = None,
    sample: Annotated[Optional[int], Option(help="Take so many pairs at random.")] = None,
    seed: Annotated[int, Option(help="Of the sample, instruction types, forms and the models.")] = 0,
    types: Annotated[
        Optional[str], Option(help="Weights of instruction types, as audience=2,source=1; default: evenly.")
    ] = None,
    judge_mode: Annotated[str, Option(help="'choice' (3 requests a record) or 'pairwise' (9).")] = "choice",
    temperature: Annotated[float, Option(help="Of the writing model.")] = 0.8,
    effort: Effort = "medium",
    concurrency: Concurrency = 64,
    rpm: Annotated[Optional[int], Option(help="Most requests per minute.", min=1)] = None,
    tpm: Annotated[Optional[int], Option(help="Most tokens per minute.", min=1)] = None,
    timeout: Annotated[float, Option(help="Seconds to wait for an answer.")] = 120.0,
    max_cost: Annotated[Optional[float], Option(help="Most dollars for the whole folder.")] = None,
    max_requests: Annotated[Optional[int], Option(help="Most requests of this run.")] = None,
    max_failed: Annotated[float, Option(help="Share of failed records above which the exit status is 1.")] = 0.05,
    price: PriceList = None,
    prices_file: Annotated[Optional[Path], Option("--prices", help="A JSON file of prices.")] = None,
    retry_failed: Annotated[bool, Option("--retry-failed", help="Ask again for records that failed.")] = False,
    batch: Annotated[bool, Option("--batch", help="Use OpenAI's Batch API: half the price, within a day.")] = False,
    batch_poll: Annotated[float, Option(help="Seconds between two looks at a batch.")] = 30.0,
    dry_run: Annotated[bool, Option("--dry-run", help="Print requests, tokens, price and time; send nothing.")] = False,
    executor: Annotated[Optional[str], Option(help="Run tasks with datatrove: local, slurm or ray.")] = None,
    tasks: Annotated[int, Option(help="Parts of the build, with --executor.", min=1)] = 1,
    workers: Annotated[int, Option(help="Tasks at a time, with --executor.", min=1)] = 1,
    slurm_partition: Annotated[Optional[str], Option(help="Partition for --executor slurm.")] = None,
    slurm_time: Annotated[str, Option(help="Time limit of a task for --executor slurm.")] = "24:00:00",
) -> None:
    """Turn query-passage pairs into InF-IR tuples. Nothing is paid for twice: run it again to go on."""
    from dataset_builder.batches import BATCH_RECORDS
    from dataset_builder.errors import Stop
    from dataset_builder.language_model import Limits
    from dataset_builder.prepare import Settings, estimate, prepare
    from dataset_builder.prices import Prices

    if local is not None and (base_url is not None or batch or executor is not None):
        raise ValueError("--local serves the model itself: leave out --base-url (OPENAI_BASE_URL), --batch and --executor")
    if batch and executor is not None:
        raise ValueError("--batch needs no executor: its jobs run at the server")
    if tasks > 1 and executor is None:
        raise ValueError("--tasks needs --executor local, slurm or ray")
    if local is not None:
        model = judge = Path(local).name
        concurrency, timeout = 2, max(timeout, 600.0)
    settings = Settings(
        pairs, model, judge, judge_mode, query_column, passage_column, split, limit, sample, seed, temperature, effort,
        _weights(types),
    )  # fmt: skip
    limits = Limits(BATCH_RECORDS if batch else concurrency, rpm, tpm, max_cost, max_requests, timeout)
    prices = Prices(prices_file, price or (), factor=0.5 if batch else 1.0, free=local is not None)
    for name in (model, judge):
        prices.cost(name, 0, 0)
    count = prepare(output, settings, tasks)
    if dry_run:
        _print_estimate(count, estimate(output, settings, limits, prices), prices)
        return
    started = time.monotonic()
    stopped: Stop | None = None
    try:
        if executor is not None:
            try:
                from dataset_builder import cluster
            except ImportError as error:
                hint = "pip install 'sentence-transformers-inf[scale]'"
                raise ImportError(f"--executor needs datatrove: {hint} ({error})") from error
            step = cluster.BuildTask(output.resolve(), settings, limits, prices, base_url, retry_failed)
            cluster.run_tasks(executor, step, tasks, workers, slurm_partition, slurm_time)
            if executor == "slurm":
                console.print("The tasks are with Slurm. When they have ended, the same command merges what they made.")
        else:
            from dataset_builder.run import run, run_sync
            from dataset_builder.server import local_server

            with contextlib.nullcontext(base_url) if local is None else local_server(local) as url:
                here = functools.partial(run, output, settings, limits, prices, base_url=url, retry_failed=retry_failed)
                log = functools.partial(tqdm.write, file=sys.stderr)
                run_sync(lambda: here(batch=batch, batch_poll=batch_poll, show_progress=True, log=log))
    except Stop as stop:
        stopped = stop
    _finish(output, settings, prices, tasks, max_failed, started, stopped, executor)


def _finish(
    output: Path, settings: Settings, prices: Prices, tasks: int, max_failed: float, started: float,
    stopped: Stop | None, executor: str | None,
) -> None:  # fmt: skip
    """Export what there is, and exit with the status of the build."""
    from dataset_builder.export import export

    report = None
    with contextlib.suppress(FileNotFoundError) if stopped is not None else contextlib.nullcontext():
        report = export(output, settings, prices, tasks)
        _print_report(report, output, time.monotonic() - started)
    if stopped is not None and stopped.budget:
        stderr.print(f"stopped: {stopped}; raise it and run the same command to go on", markup=False)
        raise Exit(BUDGET)
    if stopped is not None:
        error_line(str(stopped))
        raise Exit(CANNOT)
    assert report is not None
    if executor in ("local", "ray") and report["unfinished"]:
        error_line(f"{report['unfinished']} pairs are unfinished: tasks did not end, see {output}/work/logs; run it again")
        raise Exit(CANNOT)
    if report["failed"] > max_failed * report["pairs"]:
        line = f"{report['failed']} of {report['pairs']} records failed, more than --max-failed {max_failed:g} allows"
        error_line(f"{line}; --retry-failed asks for them again")
        raise Exit(FAILED)


def _weights(types: str | None) -> dict[str, float] | None:
    if types is None:
        return None
    weights = {}
    for part in types.split(","):
        name, _, weight = part.partition("=")
        try:
            weights[name.strip()] = float(weight or 1)
        except ValueError as error:
            raise ValueError(f"--types {types}: expected TYPE=WEIGHT,TYPE=WEIGHT, got {part!r}") from error
    return weights


def _print_estimate(count: int, estimate: Estimate, prices: Prices) -> None:
    cells = [
        ("pairs", f"{count:,}"),
        ("without duplicates", f"{estimate.records:,}"),
        ("requests", f"{estimate.requests:,}"),
        ("tokens in", f"{estimate.prompt_tokens:,}"),
        ("tokens out", f"{estimate.completion_tokens:,}"),
        ("price", f"${estimate.cost:,.2f} (prices of {prices.as_of})"),
        ("time", f"{estimate.minutes:,.1f} minutes"),
    ]
    table = Table(title="Estimate, as if every record reached the judge", title_justify="left", show_header=False)
    for cell in cells:
        table.add_row(*cell)
    console.print(table)


def _print_report(report: dict[str, Any], output: Path, seconds: float) -> None:
    title = f"{report['pairs']} pairs in {seconds / 60:.1f} minutes, ${report['cost']:.4f}"
    table = Table(title=title, title_justify="left")
    table.add_column("outcome")
    table.add_column("pairs", justify="right")
    for name in ("kept", "rejected", "failed", "unfinished"):
        if report[name] or name != "unfinished":
            table.add_row(name, str(report[name]))
    table.add_section()
    for reason, number in list(report["reasons"].items())[:12]:
        table.add_row(f"  {reason}", str(number))
    console.print(table)
    line = f"The tuples are in {output}/train.parquet, the report in {output}/report.md"
    console.print(line, markup=False, soft_wrap=True)
    _print_first(output / "train.parquet")


def _print_first(path: Path) -> None:
    """Show one record, so that a user sees what was made."""
    from sentence_transformers_inf.reading import read_table
    from sentence_transformers_inf.records import REQUIRED_COLUMNS

    for _, record in islice(read_table(path), 1):
        console.print("\nThe first record:")
        for column in REQUIRED_COLUMNS:
            text = " ".join(record[column].split())
            shown = text if len(text) <= 160 else f"{text[:159]}…"
            console.print(f"  {column}: {shown}", markup=False, soft_wrap=True)


def repair(output: Annotated[Path, Argument(help="Folder of a build whose ledger is damaged.")]) -> None:
    """Save what can be read of a damaged ledger; the damaged file is kept."""
    import sqlite3

    from dataset_builder.ledger import Ledger, LedgerError, repair_ledger

    found = sorted((output / "work").glob("**/ledger.sqlite"))
    if not found:
        raise FileNotFoundError(f"{output}: there is no ledger in this folder")
    for path in found:
        try:
            Ledger(path).close()
            console.print(f"{path}: nothing is wrong with it", markup=False)
        except (LedgerError, sqlite3.Error):
            saved, aside = repair_ledger(path)
            console.print(f"{path}: {saved} answers saved; the damaged file is now {aside.name}", markup=False)
