"""``inf-ir build`` and ``inf-ir repair``."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

from tqdm.auto import tqdm
from typer import Argument, Context, Exit, Option

from dataset_builder.cli.options import (
    BUDGET,
    CANNOT,
    FAILED,
    MOST,
    BaseUrl,
    Concurrency,
    Effort,
    MaxCost,
    PriceList,
    Reasoning,
)
from sentence_transformers_inf.cli.checks import finite, need, output_folder
from sentence_transformers_inf.cli.display import Table, print_line, quiet
from sentence_transformers_inf.cli.errors import error_line
from sentence_transformers_inf.escaping import visible

if TYPE_CHECKING:
    from dataset_builder.errors import Stop
    from dataset_builder.prepare import Estimate, Settings
    from dataset_builder.prices import Prices


def build(
    context: Context,
    pairs: Annotated[
        str, Option(help="microsoft/ms_marco, a Hub dataset, a BEIR folder, or a .jsonl/.csv/.tsv/.parquet file of pairs.")
    ],
    output: Annotated[
        Path, Option(help="Folder of the build; the same command goes on where it stopped.", callback=output_folder)
    ],
    model: Annotated[str, Option(help="Writes instructions, twins and passages.")] = "gpt-4o-mini",
    judge: Annotated[str, Option(help="Decides which tuples stand; a reasoning model.")] = "o3-mini",
    base_url: BaseUrl = None,
    local: Annotated[
        Optional[str], Option(help="Serve this GGUF file (or USER/REPO/FILE.gguf on the Hub) here; it is model and judge.")
    ] = None,
    query_column: Annotated[str, Option(help="Column with the query.")] = "query",
    passage_column: Annotated[str, Option(help="Column with the passage.")] = "passage",
    split: Annotated[str, Option(help="Split of a Hub dataset or BEIR folder.")] = "train",
    limit: Annotated[Optional[int], Option(help="Read the first so many pairs only.", min=1, max=MOST)] = None,
    sample: Annotated[Optional[int], Option(help="Take so many pairs at random.", min=1, max=MOST)] = None,
    seed: Annotated[int, Option(help="Of the sample, instruction types, forms and the models.", min=0)] = 0,
    types: Annotated[
        Optional[str], Option(help="Weights of instruction types, as audience=2,source=1; default: evenly.")
    ] = None,
    passages: Annotated[
        str, Option(help="'written' by the model, or 'mined': a second passage that exists, for half the tokens.")
    ] = "written",
    corpus: Annotated[
        Optional[str],
        Option(help="What to mine: a BEIR folder, a file of passages, or a Hub dataset; default: the pairs' own passages."),
    ] = None,
    base: Annotated[Optional[str], Option(help="Embedding model that mines; default: the bundled one.")] = None,
    judge_mode: Annotated[str, Option(help="'choice' (3 requests a record) or 'pairwise' (9).")] = "choice",
    temperature: Annotated[float, Option(help="Of the writing model.", min=0, max=2, callback=finite)] = 0.8,
    effort: Effort = "medium",
    reasoning: Reasoning = None,
    max_passage_words: Annotated[
        Optional[int], Option(help="Leave longer passages out; default: what the models can take.", min=1)
    ] = None,
    concurrency: Concurrency = 64,
    rpm: Annotated[Optional[int], Option(help="Most requests per minute.", min=1)] = None,
    tpm: Annotated[Optional[int], Option(help="Most tokens per minute.", min=1)] = None,
    timeout: Annotated[float, Option(help="Seconds to wait for an answer.", min=0.1, callback=finite)] = 120.0,
    max_cost: MaxCost = None,
    max_requests: Annotated[Optional[int], Option(help="Most requests of this run.", min=1)] = None,
    max_failed: Annotated[
        float, Option(help="Share of failed records above which the exit status is 1.", min=0, max=1, callback=finite)
    ] = 0.05,
    price: PriceList = None,
    prices_file: Annotated[
        Optional[Path], Option("--prices", help="A JSON file of prices.", exists=True, dir_okay=False)
    ] = None,
    retry_failed: Annotated[bool, Option("--retry-failed", help="Ask again for records that failed.")] = False,
    batch: Annotated[bool, Option("--batch", help="Use OpenAI's Batch API: half the price, within a day.")] = False,
    batch_poll: Annotated[float, Option(help="Seconds between two looks at a batch.", min=0, callback=finite)] = 30.0,
    batch_files: Annotated[
        Optional[Path],
        Option(
            help="Ask no server: write the questions into this folder, and read the answers that are brought there.",
            file_okay=False,
        ),
    ] = None,
    batch_tokens: Annotated[
        Optional[int], Option(help="Most tokens of a batch; default: what a new account may have waiting.", min=1)
    ] = None,
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
    from dataset_builder.files import locked
    from dataset_builder.language_model import Limits
    from dataset_builder.prepare import Settings, estimate, prepare
    from dataset_builder.prices import Prices

    _check_options(base_url, local, batch, batch_files, executor, tasks, passages)
    if not dry_run and batch_files is None:
        _check_means(base_url, local, executor, slurm_partition)
    if local is not None:
        model = judge = Path(local).name
        concurrency, timeout = 2, max(timeout, 600.0)
    settings = Settings(
        pairs, model, judge, judge_mode, query_column, passage_column, split, limit, sample, seed, temperature, effort,
        _weights(types), max_passage_words, passages, corpus, base,
    )  # fmt: skip
    limits = Limits(
        BATCH_RECORDS if batch or batch_files else concurrency, rpm, tpm, max_cost, max_requests, timeout, batch_tokens,
        tuple(reasoning or ()),
    )  # fmt: skip
    prices = Prices(prices_file, price or (), factor=0.5 if batch else 1.0, free=local is not None)
    for name in (model, judge):
        prices.cost(name, 0, 0)
    quiet(models=passages == "mined")
    context.with_resource(locked(output))
    count = prepare(output, settings, tasks)
    if dry_run:
        _print_estimate(count, estimate(output, settings, limits, prices), prices)
        return
    started = time.monotonic()
    stopped: Stop | None = None
    try:
        if executor is not None:
            from dataset_builder import cluster

            step = cluster.BuildTask(output.resolve(), settings, limits, prices, base_url, retry_failed)
            cluster.run_tasks(executor, step, tasks, workers, slurm_partition, slurm_time)
            if executor == "slurm":
                print_line("The tasks are with Slurm. When they have ended, the same command merges what they made.")
        else:
            from dataset_builder.run import run, run_sync
            from dataset_builder.server import local_server

            with contextlib.nullcontext(base_url) if local is None else local_server(local) as url:
                here = functools.partial(run, output, settings, limits, prices, base_url=url, retry_failed=retry_failed)

                def log(line: str) -> None:
                    tqdm.write(visible(line), file=sys.stderr)

                run_sync(
                    lambda: here(batch=batch, batch_poll=batch_poll, batch_files=batch_files, show_progress=True, log=log)
                )
    except Stop as stop:
        stopped = stop
    _finish(output, settings, prices, tasks, max_failed, started, stopped, executor)


def _check_options(
    base_url: str | None, local: str | None, batch: bool, batch_files: Path | None, executor: str | None, tasks: int,
    passages: str,
) -> None:  # fmt: skip
    """Whether options fit each other, and whether there is what mines."""
    if local is not None and (base_url is not None or batch or executor is not None):
        raise ValueError("--local serves the model itself: leave out --base-url (OPENAI_BASE_URL), --batch and --executor")
    if batch_files is not None and (base_url is not None or local is not None or batch or executor is not None):
        raise ValueError(
            "--batch-files asks no server: leave out --base-url (OPENAI_BASE_URL), --local, --batch and --executor"
        )
    if batch and executor is not None:
        raise ValueError("--batch needs no executor: its jobs run at the server")
    if tasks > 1 and executor is None:
        raise ValueError("--tasks needs --executor local, slurm or ray")
    if passages == "mined":
        for module in ("bm25s", "faiss"):
            need("mining", module)


def _check_means(base_url: str | None, local: str | None, executor: str | None, slurm_partition: str | None) -> None:
    """Whether there is what a build runs with, before it reads a pair."""
    from dataset_builder.live import read_key
    from dataset_builder.server import model_file

    if local is not None:
        need("--local", "xllamacpp")
        model_file(local)
    else:
        read_key(base_url)
    if executor not in (None, "local", "slurm", "ray"):
        raise ValueError(f"--executor {executor}: there are local, slurm and ray")
    if executor is not None:
        need("--executor", "datatrove")
    if executor == "ray":
        need("--executor ray", "ray")
    if executor == "slurm" and not slurm_partition:
        raise ValueError("--executor slurm needs a partition: --slurm-partition NAME")


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
        print_line(f"stopped: {stopped}", stderr=True)
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
            weights[name.strip()] = number = float(weight or 1)
        except ValueError:
            number = -1.0
        if not 0 <= number < math.inf:
            raise ValueError(f"--types {types}: expected TYPE=WEIGHT,TYPE=WEIGHT, got {part!r}")
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
    table = Table("", ">estimate", title="As if every record reached the judge")
    for cell in cells:
        table.add(*cell)
    table.print()


def _print_report(report: dict[str, Any], output: Path, seconds: float) -> None:
    from dataset_builder.chat import POSSIBLY_PAID

    title = f"{report['pairs']} pairs in {seconds / 60:.1f} minutes, ${report['cost']:.4f}"
    table = Table("outcome", ">pairs", title=title)
    reasons = list(report["reasons"].items())[:12]
    for name in ("kept", "rejected", "failed", "unfinished"):
        if report[name] or name != "unfinished":
            table.add(name, str(report[name]))
    for reason, number in reasons:
        table.add(f"  {reason}", str(number))
    table.print()
    if possibly := sum(total["cost"] for model, total in report["usage"].items() if model.endswith(POSSIBLY_PAID)):
        print_line(f"${possibly:.4f} of it is possibly paid only: where no usage came back, the most is counted")
    what = f"{report['kept']} tuples are" if report["kept"] else "No tuple was kept; the empty table is"
    print_line(f"{what} in {output}/train.parquet, the report in {output}/report.md")
    _print_first(output / "train.parquet")


def _print_first(path: Path) -> None:
    """Show one record, so that a user sees what was made."""
    from sentence_transformers_inf.escaping import shortened
    from sentence_transformers_inf.reading import read_table
    from sentence_transformers_inf.records import REQUIRED_COLUMNS

    for _, record in islice(read_table(path), 1):
        print_line("\nThe first record:")
        for column in filter(record.get, REQUIRED_COLUMNS):
            print_line(f"  {column}: {shortened(record[column], 160)}")


def repair(
    output: Annotated[Path, Argument(help="Folder of a build whose ledger is damaged, or the ledger itself.")],
) -> None:
    """Save what can be read of a damaged ledger; the damaged file is kept."""
    from dataset_builder.files import locked
    from dataset_builder.ledger import ledger_path
    from dataset_builder.prepare import read_build

    folder = next((place.parent for place in output.parents if (place / "build.json").is_file()), output)
    if folder.is_file():  # the ledger of judgments
        if not folder.name.endswith("ledger.sqlite"):
            raise ValueError(f"{folder}: expected the folder of a build, or the ledger of judgments, LABELS.ledger.sqlite")
        _repair(folder, None)
        return
    build = read_build(folder)
    with locked(folder):
        for rank in range(build["tasks"]):
            path = ledger_path(folder, rank, build["tasks"])
            if any(path.parent.glob("ledger.*")) or (folder / "report.json").is_file():
                _repair(path, build["build"])
                ended = folder / "work" / "logs" / "completions" / f"{rank:05d}"
                ended.unlink(missing_ok=True)  # the task may have more to do


def _repair(path: Path, build: str | None) -> None:
    from dataset_builder.ledger import Ledger, LedgerDamage, repair_ledger

    missing = not path.exists()
    try:
        with contextlib.closing(Ledger(path, build)) as ledger:
            count = sum(int(total["requests"]) for total in ledger.totals().values())
        line = f"nothing to repair: {count} answers, each as it was written"
        if missing:
            line = "it was missing; a new one without answers is there now"
    except LedgerDamage as damage:
        repaired = repair_ledger(path, build)
        lost = f"at least {repaired.lost} lost" if repaired.lost else "none missing up to the last of them"
        aside = f"; the damaged file is now {repaired.aside.name}" if repaired.aside is not None else ""
        line = f"{damage.problem}: {repaired.saved} answers saved, {lost}{aside}"
    print_line(f"{path}: {line}")
