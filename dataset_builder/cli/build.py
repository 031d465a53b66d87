"""The command ``inf-ir``: from query-passage pairs to InF-IR. The only place of the builder that parses or prints."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from rich.table import Table

if TYPE_CHECKING:
    from dataset_builder.checks import CheckReport
    from dataset_builder.client import Limits, Prices
    from dataset_builder.pipeline import Progress as RunProgress
    from dataset_builder.pipeline import Settings

app = typer.Typer(
    help="Build, judge and compare instruction-following retrieval data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

FAILED, CANNOT, BUDGET = 1, 2, 3
"""Exit statuses: more failures than ``--max-failed``; the run cannot go on; a limit on cost or requests was reached."""

_LOG_SECONDS = 10


def main() -> None:
    """Run the command line; what the user can mend is one line on stderr and exit status 2."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("INF_IR_TRACEBACK"):
            raise
        _say_error(str(error))
        sys.exit(CANNOT)


def _say_error(text: str) -> None:
    errors.print(f"error: {' '.join(text.split())}", markup=False)


@app.callback()
def _commands() -> None:
    """Build, judge and compare instruction-following retrieval data."""


@app.command()
def build(
    pairs: Annotated[
        str,
        typer.Option(help="microsoft/ms_marco, a Hub dataset, a BEIR folder, or a .jsonl/.csv/.parquet file of pairs."),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the build; the same command goes on where it stopped.")],
    model: Annotated[str, typer.Option(help="Writes instructions, twins and passages.")] = "gpt-4o-mini",
    judge: Annotated[str, typer.Option(help="Decides which tuples stand; a reasoning model.")] = "o3-mini",
    base_url: Annotated[
        Optional[str], typer.Option(help="An OpenAI-compatible server, as vLLM or Ollama.", envvar="OPENAI_BASE_URL")
    ] = None,
    local: Annotated[
        Optional[str],
        typer.Option(help="Serve this GGUF file (or USER/REPO/FILE.gguf on the Hub) here; it is model and judge."),
    ] = None,
    query_column: Annotated[str, typer.Option(help="Column with the query.")] = "query",
    passage_column: Annotated[str, typer.Option(help="Column with the passage.")] = "passage",
    split: Annotated[str, typer.Option(help="Split of a Hub dataset or BEIR folder.")] = "train",
    limit: Annotated[Optional[int], typer.Option(help="Read the first so many pairs only.")] = None,
    sample: Annotated[Optional[int], typer.Option(help="Take so many pairs at random.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sample, instruction types, forms and the models.")] = 0,
    types: Annotated[
        Optional[str], typer.Option(help="Weights of instruction types, as audience=2,source=1; default: evenly.")
    ] = None,
    judge_mode: Annotated[str, typer.Option(help="'choice' (3 requests a record) or 'pairwise' (9).")] = "choice",
    temperature: Annotated[float, typer.Option(help="Of the writing model.")] = 0.8,
    effort: Annotated[str, typer.Option(help="Reasoning effort of a reasoning model.")] = "medium",
    concurrency: Annotated[int, typer.Option(help="Requests in flight.", min=1)] = 64,
    rpm: Annotated[Optional[int], typer.Option(help="Most requests per minute.", min=1)] = None,
    tpm: Annotated[Optional[int], typer.Option(help="Most tokens per minute.", min=1)] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 120.0,
    max_cost: Annotated[Optional[float], typer.Option(help="Most dollars for the whole folder.")] = None,
    max_requests: Annotated[Optional[int], typer.Option(help="Most requests of this run.")] = None,
    max_failed: Annotated[float, typer.Option(help="Share of failed records above which the exit status is 1.")] = 0.05,
    price: Annotated[
        Optional[list[str]], typer.Option(help="MODEL=INPUT,OUTPUT in dollars per million tokens; may be repeated.")
    ] = None,
    prices_file: Annotated[Optional[Path], typer.Option("--prices", help="A JSON file of prices.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again for records that failed.")] = False,
    batch: Annotated[bool, typer.Option("--batch", help="Use OpenAI's Batch API: half the price, within a day.")] = False,
    batch_poll: Annotated[float, typer.Option(help="Seconds between two looks at a batch.")] = 30.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print requests, tokens, price and time; send nothing.")
    ] = False,
    executor: Annotated[Optional[str], typer.Option(help="Run tasks with datatrove: local, slurm or ray.")] = None,
    tasks: Annotated[int, typer.Option(help="Parts of the build, with --executor.", min=1)] = 1,
    workers: Annotated[int, typer.Option(help="Tasks at a time, with --executor.", min=1)] = 1,
    slurm_partition: Annotated[Optional[str], typer.Option(help="Partition for --executor slurm.")] = None,
    slurm_time: Annotated[str, typer.Option(help="Time limit of a task for --executor slurm.")] = "24:00:00",
) -> None:
    """Turn query-passage pairs into InF-IR tuples. Nothing is paid for twice: run it again to go on."""
    from dataset_builder import pipeline
    from dataset_builder.client import Limits, Prices, Stop

    if local is not None and (base_url is not None or batch or executor is not None):
        raise ValueError("--local serves the model itself: leave out --base-url (OPENAI_BASE_URL), --batch and --executor")
    if batch and executor is not None:
        raise ValueError("--batch needs no executor: its jobs run at the server")
    if tasks > 1 and executor is None:
        raise ValueError("--tasks needs --executor local, slurm or ray")
    if local is not None:
        model = judge = Path(local).name
    settings = pipeline.Settings(
        pairs=pairs,
        model=model,
        judge=judge,
        judge_mode=judge_mode,
        query_column=query_column,
        passage_column=passage_column,
        split=split,
        limit=limit,
        sample=sample,
        seed=seed,
        temperature=temperature,
        effort=effort,
        type_weights=_weights(types),
    )
    limits = Limits(
        concurrency=pipeline.BATCH_RECORDS if batch else 2 if local is not None else concurrency,
        rpm=rpm,
        tpm=tpm,
        max_cost=max_cost,
        max_requests=max_requests,
        timeout=timeout if local is None else max(timeout, 600.0),
    )
    prices = Prices(prices_file, price or (), factor=0.5 if batch else 1.0, free=local is not None)
    for name in (model, judge):
        prices.cost(name, 0, 0)
    count = pipeline.prepare(output, settings, tasks)
    if dry_run:
        _print_estimate(count, pipeline.estimate(output, settings, limits, prices), prices)
        return
    stopped: Stop | None = None
    started = time.monotonic()
    try:
        if executor is not None:
            _run_executor(executor, output, settings, limits, prices, base_url, retry_failed, tasks, workers,
                          slurm_partition, slurm_time)  # fmt: skip
            if executor == "slurm":
                console.print("The tasks are with Slurm. When they have ended, the same command merges what they made.")
        else:
            with contextlib.ExitStack() as stack:
                if local is not None:
                    from dataset_builder.server import local_server

                    base_url = stack.enter_context(local_server(local))
                watch = stack.enter_context(_watching())
                asyncio.run(
                    pipeline.run(
                        output,
                        settings,
                        limits,
                        prices,
                        base_url=base_url,
                        batch=batch,
                        batch_poll=batch_poll,
                        retry_failed=retry_failed,
                        watch=watch,
                        say=lambda line: errors.print(line, markup=False),
                    )
                )
    except Stop as stop:
        stopped = stop
    report = None
    with contextlib.suppress(FileNotFoundError) if stopped is not None else contextlib.nullcontext():
        report = pipeline.export(output, settings, prices, tasks)
    if report is not None:
        _print_report(report, output, time.monotonic() - started)
    if stopped is not None:
        if stopped.budget:
            errors.print(f"stopped: {stopped}; raise it and run the same command to go on", markup=False)
            raise typer.Exit(BUDGET)
        _say_error(str(stopped))
        raise typer.Exit(CANNOT)
    assert report is not None
    if (line := pipeline.failures(report, max_failed)) is not None:
        _say_error(f"{line}; --retry-failed asks for them again")
        raise typer.Exit(FAILED)


@app.command()
def repair(output: Annotated[Path, typer.Argument(help="Folder of a build whose ledger is damaged.")]) -> None:
    """Save what can be read of a damaged ledger; the damaged file is kept."""
    import sqlite3

    from dataset_builder.ledger import Ledger, LedgerError, repair_ledger

    found = sorted((output / "work").glob("**/ledger.sqlite"))
    if not found:
        raise FileNotFoundError(f"{output}: there is no ledger in this folder")
    for path in found:
        try:
            asyncio.run(Ledger(path).close())
            console.print(f"{path}: nothing is wrong with it", markup=False)
        except (LedgerError, sqlite3.Error):
            saved, aside = repair_ledger(path)
            console.print(f"{path}: {saved} answers saved; the damaged file is now {aside.name}", markup=False)


@app.command()
def judge(
    data: Annotated[str, typer.Argument(help="InF-IR records: 'mini', a file, a folder, or a Hub dataset id.")],
    model: Annotated[str, typer.Option(help="The judge: a model of the server, or with --kind a Hub id or folder.")],
    labels: Annotated[Path, typer.Option(help="JSONL file that gets its labels, beside those of other annotators.")],
    split: Annotated[Optional[str], typer.Option(help="Split of the data.")] = None,
    limit: Annotated[Optional[int], typer.Option(help="Judge the first so many records only.")] = None,
    kind: Annotated[
        str, typer.Option(help="'server', 'cross-encoder', or 'reranker' (a causal model of the FollowIR-7B kind).")
    ] = "server",
    base_url: Annotated[Optional[str], typer.Option(help="An OpenAI-compatible server.", envvar="OPENAI_BASE_URL")] = None,
    judge_mode: Annotated[str, typer.Option(help="'choice' or 'pairwise'.")] = "choice",
    effort: Annotated[str, typer.Option(help="Reasoning effort of a reasoning model.")] = "medium",
    concurrency: Annotated[int, typer.Option(help="Requests in flight.", min=1)] = 64,
    max_cost: Annotated[Optional[float], typer.Option(help="Most dollars for this file of labels.")] = None,
    price: Annotated[Optional[list[str]], typer.Option(help="MODEL=INPUT,OUTPUT in dollars per million tokens.")] = None,
) -> None:
    """Add a model's judgments of records to a file of labels, for `inf-ir agreement`."""
    from dataset_builder import judging
    from dataset_builder.client import Limits, Prices, Stop
    from sentence_transformers_inf.records import load_records

    if kind not in ("server", "cross-encoder", "reranker"):
        raise ValueError(f"--kind {kind}: expected server, cross-encoder or reranker")
    if judge_mode not in ("choice", "pairwise"):
        raise ValueError(f"--judge-mode {judge_mode}: expected choice or pairwise")
    records = load_records(data, split)
    if limit is not None:
        records = records.select(range(min(limit, len(records))))
    failed = 0
    with Progress(console=errors, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("records", total=len(records))

        def step(done: int, _: int) -> None:
            bar.update(task, completed=done)

        if kind == "server":
            limits = Limits(concurrency=concurrency, max_cost=max_cost)
            prices = Prices(given=price or ())
            prices.cost(model, 0, 0)
            try:
                failed = judging.judge_with_server(
                    records, model, labels, base_url=base_url, limits=limits, prices=prices,
                    pairwise=judge_mode == "pairwise", effort=effort, step=step,
                )  # fmt: skip
            except Stop as stop:
                raise ValueError(str(stop)) from stop
        elif kind == "cross-encoder":
            judging.judge_with_cross_encoder(records, model, labels, step)
        else:
            judging.judge_with_reranker(records, model, labels, step)
    console.print(f"{len(records) - failed} of {len(records)} records judged; the labels are in {labels}", markup=False)


@app.command()
def agreement(
    labels: Annotated[Path, typer.Argument(help="CSV or JSONL file with the columns item, annotator and label.")],
    human: Annotated[list[str], typer.Option(help="A human annotator; may be repeated.")],
    chart: Annotated[Optional[Path], typer.Option(help="Draw a bar chart into this PNG or SVG file.")] = None,
) -> None:
    """Average pairwise Cohen's kappa of each annotator with the humans: which judge to trust."""
    from dataset_builder import agreement as measures

    entries = measures.agreement(measures.read_labels(labels), human)
    table = Table(title=f"Agreement with {', '.join(human)}", title_justify="left")
    table.add_column("annotator")
    for column in ("items", "κ", "95% interval"):
        table.add_column(column, justify="right")
    for entry in entries:
        name = f"{entry.annotator} (human)" if entry.annotator in human else entry.annotator
        table.add_row(name, str(entry.items), f"{entry.kappa:.3f}", f"[{entry.low:.3f}, {entry.high:.3f}]")
    console.print(table)
    if chart is not None:
        measures.draw_chart(entries, human, chart)
        console.print(f"The chart is in {chart}", markup=False)


@app.command()
def analyze(
    data: Annotated[str, typer.Argument(help="InF-IR, Promptriever's or FollowIR's data: a file, folder or Hub id.")],
    output: Annotated[Path, typer.Option(help="Folder for the report (HTML, JSON) and the map (PNG, SVG).")],
    compare: Annotated[Optional[list[str]], typer.Option(help="Another corpus; may be repeated.")] = None,
    model: Annotated[
        str, typer.Option(help="Embedding model: any SentenceTransformer.")
    ] = "sentence-transformers/all-MiniLM-L6-v2",
    split: Annotated[str, typer.Option(help="Split of the corpora that have several.")] = "train",
    sample: Annotated[int, typer.Option(help="Most texts of a kind that are measured.", min=2)] = 10_000,
    limit: Annotated[
        int, typer.Option(help="Most rows that are read of a corpus; an InF-IR record has three.", min=1)
    ] = 100_000,
    seed: Annotated[int, typer.Option(help="Of the samples and the map.")] = 0,
) -> None:
    """How varied a corpus is, beside others: similarity, n-grams, and a map of instructions, queries and passages."""
    import datasets
    from sentence_transformers import SentenceTransformer

    from dataset_builder import diversity
    from sentence_transformers_inf.corpora import load_rows
    from sentence_transformers_inf.records import record_splits

    datasets.disable_progress_bars()
    corpora = {}
    for source in dict.fromkeys([data, *(compare or [])]):
        splits = record_splits(source)
        corpora[source] = load_rows(source, splits[0] if len(splits) == 1 else split, limit)
    encoder = SentenceTransformer(model)
    with console.status("") as status:

        def encode(texts: list[str]) -> Any:
            status.update(f"Embedding {len(texts)} texts")
            return encoder.encode(texts, show_progress_bar=False)

        found, embeddings = diversity.analyse(corpora, encode, sample, seed)
        status.update("Drawing the map")
        diversity.write_report(found, embeddings, output, model, seed)
    table = Table(title="Diversity, on samples of one size", title_justify="left")
    for column in ("", "corpus", "distinct texts", "sampled", "APS ↓", "INGF-1 ↑", "INGF-2 ↑", "INGF-3 ↑", "distinct-2 ↑"):
        table.add_column(column, justify="left" if column in ("", "corpus") else "right")
    for kind, of_kind in found.items():
        for name, entry in of_kind.items():
            frequencies = (f"{entry.ngrams[n].inter_sample_frequency:,.0f}" for n in (1, 2, 3))
            numbers = (f"{entry.distinct_texts:,}", f"{entry.sampled:,}", f"{entry.similarity:.4f}", *frequencies)
            table.add_row(kind, name, *numbers, f"{entry.ngrams[2].distinct_share:.3f}")
        table.add_section()
    console.print(table)
    console.print(f"The report is {output / 'report.html'}", markup=False, soft_wrap=True)


@app.command()
def check(
    data: Annotated[str, typer.Argument(help="InF-IR records: 'mini', a file, a folder, or a Hub dataset id.")],
    against: Annotated[
        Optional[list[str]],
        typer.Option(help="An evaluation set: an MTEB task or benchmark, or a .txt/.jsonl file; may be repeated."),
    ] = None,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the report to this file.")] = None,
) -> None:
    """Check records before publishing: schema, duplicates, leakage, overlap of splits, evaluation texts."""
    report = _check(data, against or [])
    table = Table(title=f"{data}: {sum(report.records.values())} records", title_justify="left")
    for column in ("", "finding", "records", "the first"):
        table.add_column(column, justify="right" if column == "records" else "left")
    for kind, found in (("error", report.errors), ("warning", report.warnings)):
        for finding, number in found.most_common():
            table.add_row(kind, finding, str(number), ", ".join(report.examples[finding][:2]))
    console.print(table if report.errors or report.warnings else f"{data}: nothing found", markup=False)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if report.errors:
        raise typer.Exit(FAILED)


@app.command()
def publish(
    source: Annotated[str, typer.Argument(help="'mini' or the output folder of inf-ir build.")],
    repo: Annotated[str, typer.Option(help="Dataset on the Hub, as user/name.")],
    public: Annotated[bool, typer.Option("--public", help="Make it public; else it is private.")] = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch to push to.")] = None,
    against: Annotated[
        Optional[list[str]], typer.Option(help="Refuse records with texts of this evaluation set; may be repeated.")
    ] = None,
    despite_errors: Annotated[
        bool, typer.Option("--despite-errors", help="Publish although the check finds errors.")
    ] = False,
) -> None:
    """Push a corpus to the Hub as Parquet with a card, private unless --public."""
    import datasets

    from dataset_builder import publish as hub

    if repo.count("/") != 1:
        raise ValueError(f"--repo {repo}: expected user/name")
    datasets.disable_progress_bars()
    report = _check(source, against or [])
    if report.errors and not despite_errors:
        finding, number = report.errors.most_common(1)[0]
        raise ValueError(
            f"{source}: {number} records with this error: {finding} (see `inf-ir check`; --despite-errors publishes)"
        )
    url = hub.publish(source, repo, public=public, revision=revision)
    console.print(f"Pushed: {url}", markup=False, soft_wrap=True)


def _check(source: str, against: list[str]) -> CheckReport:
    """Check what a corpus would be published as: an output folder of a build is split first."""
    import tempfile

    import datasets

    from dataset_builder.checks import check_records, read_evaluation_texts
    from dataset_builder.publish import build_splits
    from sentence_transformers_inf.records import load_records, record_splits

    texts = read_evaluation_texts(against)
    if not (Path(source) / "report.json").is_file():
        return check_records({split: load_records(source, split) for split in record_splits(source)}, texts)
    datasets.disable_progress_bars()
    load_records(source)  # the schema
    with tempfile.TemporaryDirectory() as cache:
        return check_records(dict(build_splits(source, "default", Path(cache))), texts)


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


def _run_executor(
    kind: str,
    output: Path,
    settings: Settings,
    limits: Limits,
    prices: Prices,
    base_url: str | None,
    retry_failed: bool,
    tasks: int,
    workers: int,
    slurm_partition: str | None,
    slurm_time: str,
) -> None:
    try:
        from dataset_builder.cluster import BuildShard, executor
    except ImportError as error:
        raise ImportError(f"--executor needs datatrove: pip install 'sentence-transformers-inf[scale]' ({error})") from error
    from dataset_builder.client import Stop

    step = BuildShard(str(output.resolve()), settings, limits, prices, base_url, retry_failed)
    runner = executor(kind, step, tasks, workers, slurm_partition=slurm_partition, slurm_time=slurm_time)
    try:
        runner.run()
    except Stop:
        raise
    except Exception as error:  # executors wrap what a task raises in errors of their own
        cause = error.__cause__
        raise (
            cause if isinstance(cause, Stop) else Stop(f"a task did not end ({type(error).__name__}); run it again")
        ) from error
    if kind != "slurm" and (missing := runner.get_incomplete_ranks(skip_completed=True)):
        raise Stop(
            f"{len(missing)} of {tasks} tasks did not end (the first: {missing[0]}, see {output}/work/logs); run it again"
        )


@contextlib.contextmanager
def _watching() -> Iterator[Any]:
    """A function that shows where the run stands: a live table on a terminal, else a line every few seconds."""
    if sys.stderr.isatty():
        with Live(console=Console(stderr=True), refresh_per_second=4, transient=True) as live:
            yield lambda progress: live.update(_progress_table(progress))
        return
    last = time.monotonic()

    def log(progress: RunProgress) -> None:
        nonlocal last
        if time.monotonic() - last >= _LOG_SECONDS:
            last = time.monotonic()
            errors.print(", ".join(f"{name} {value}" for name, value in _progress_cells(progress)), markup=False)

    yield log


def _progress_cells(progress: RunProgress) -> list[tuple[str, str]]:
    usage, counts = progress.usage, progress.counts
    here = sum(usage.stages.values())
    rate = usage.requests / progress.seconds if progress.seconds else 0.0
    share = progress.done / progress.total if progress.total else 1.0
    left = f"{progress.seconds * (1 - share) / share / 60:.1f} min" if share and here else "?"
    stages = " ".join(f"{stage} {count}" for stage, count in usage.stages.items())
    return [
        ("records", f"{progress.done}/{progress.total}"),
        ("answers", stages or "0"),
        ("requests/s", f"{rate:.1f}"),
        ("tokens", f"{usage.tokens:,}"),
        ("cost", f"${usage.cost:.4f}"),
        ("kept", str(counts["kept"])),
        ("rejected", str(counts["rejected"])),
        ("failed", str(counts["failed"])),
        ("left", left),
    ]


def _progress_table(progress: RunProgress) -> Table:
    table = Table(show_header=False)
    for name, value in _progress_cells(progress):
        table.add_row(name, value)
    return table


def _print_estimate(count: int, estimate: Any, prices: Prices) -> None:
    table = Table(title="Estimate, as if every record reached the judge", title_justify="left", show_header=False)
    table.add_row("pairs", f"{count:,}")
    table.add_row("without duplicates", f"{estimate.records:,}")
    table.add_row("requests", f"{estimate.requests:,}")
    table.add_row("tokens in", f"{estimate.prompt_tokens:,}")
    table.add_row("tokens out", f"{estimate.completion_tokens:,}")
    table.add_row("price", f"${estimate.cost:,.2f} (prices of {prices.as_of})")
    table.add_row("time", f"{estimate.minutes:,.1f} minutes")
    console.print(table)


def _print_report(report: dict[str, Any], output: Path, seconds: float) -> None:
    table = Table(
        title=f"{report['pairs']} pairs in {seconds / 60:.1f} minutes, ${report['cost']:.4f}", title_justify="left"
    )
    table.add_column("outcome")
    table.add_column("pairs", justify="right")
    for name in ("kept", "rejected", "failed", "unfinished"):
        if report[name] or name != "unfinished":
            table.add_row(name, str(report[name]))
    table.add_section()
    for reason, number in list(report["reasons"].items())[:12]:
        table.add_row(f"  {reason}", str(number))
    console.print(table)
    console.print(
        f"The tuples are in {output}/train.parquet, the report in {output}/report.md", markup=False, soft_wrap=True
    )


if __name__ == "__main__":
    main()
