"""``inf-embed evaluate``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from sentence_transformers_inf.cli.options import TrustOption
from sentence_transformers_inf.cli.tables import benchmark_table, console, metrics_table, print_line


def evaluate(
    model: Annotated[str, typer.Argument(help="A Hub id or a folder.")],
    data: Annotated[
        Optional[str],
        typer.Option(
            help="InF-IR records: 'mini' (default), a .jsonl/.parquet file, a folder of such files, or a Hub dataset id; "
            "with --benchmark narratives, a .jsonl file of topics."
        ),
    ] = None,
    split: Annotated[Optional[str], typer.Option(help="Split of the data; default: test if there is one.")] = None,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the measurements to this file.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts encoded at a time.")] = 32,
    passage_embeddings: Annotated[
        Optional[str], typer.Option(help="The passages' vectors from elsewhere, as for train.")
    ] = None,
    benchmark: Annotated[
        Optional[str],
        typer.Option(
            help="Run MTEB instead: FollowIR, InstructIR, IFIR, mFollowIR, BRIGHT, MAIR, InfoSearch, NanoBEIR, mini or "
            "narratives."
        ),
    ] = None,
    tasks: Annotated[Optional[list[str]], typer.Option(help="A task of the benchmark; may be repeated.")] = None,
    no_instruction: Annotated[
        bool, typer.Option("--no-instruction", help="Run the benchmark without the instructions as well.")
    ] = False,
    compare: Annotated[Optional[list[str]], typer.Option(help="Another model for the benchmark; may be repeated.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the benchmark's results, in MTEB's layout.")] = Path("results"),
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure how well a model obeys instructions, and how it retrieves without them."""
    if benchmark is not None:
        options: dict[str, Any] = {"tasks": tasks, "data": data, "no_instruction": no_instruction, "batch_size": batch_size}
        options["trust_remote_code"] = trust_remote_code
        _run_benchmark([model, *(compare or [])], benchmark, output, json_file, options)
        return
    data = data or "mini"
    from sentence_transformers_inf.evaluation import measure
    from sentence_transformers_inf.modules import load_instruction_model
    from sentence_transformers_inf.records import is_on_hub, load_records, record_splits

    if split is None and "test" in (splits := record_splits(data)) and len(splits) > 1:
        split = "test"
    records = load_records(data, split)
    vectors = None
    if passage_embeddings is not None:
        from sentence_transformers_inf.passages import distinct_passages, passage_rows, read_passage_embeddings

        texts = distinct_passages([load_records(data, name) for name in record_splits(data)])
        vectors = read_passage_embeddings(passage_embeddings, texts)[passage_rows(records, texts).ravel()]
    loaded = load_instruction_model(model, trust_remote_code=trust_remote_code)
    result = measure(loaded, records, batch_size, show_progress_bar=sys.stderr.isatty(), passage_embeddings=vectors)
    means, per_type = result.means(), result.per_type()
    console.print(
        metrics_table(f"{model} on {data}{f' ({split})' if split else ''}, {len(records)} records", means, per_type)
    )
    if json_file is not None:
        report: dict[str, Any] = {"model": model, "data": data, "data_on_hub": is_on_hub(data), "split": split}
        report |= {"records": len(records), **means, "per_type": per_type}
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def needs_mteb() -> Iterator[None]:
    """Turn a failed import of MTEB into a line about what to install."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"benchmarks run through MTEB: pip install 'sentence-transformers-inf[eval]' ({error})") from error


def _run_benchmark(
    models: list[str],
    benchmark: str,
    output: Path,
    json_file: Optional[Path],
    options: dict[str, Any],
) -> None:
    with needs_mteb():
        from sentence_transformers_inf.evaluation.mteb import run_benchmark
    scores = run_benchmark(models, benchmark, output, log=print_line, **options)
    console.print(benchmark_table(benchmark, models, scores, options["no_instruction"]))
    print_line(f"The results are in {output}, in MTEB's layout")
    if json_file is not None:
        report = {"benchmark": benchmark, "rows": [dataclasses.asdict(score) for score in scores]}
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
