"""``inf-embed evaluate``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from sentence_transformers_inf.cli.checks import need, output_file, output_folder
from sentence_transformers_inf.cli.display import print_line, quiet
from sentence_transformers_inf.cli.options import TrustOption
from sentence_transformers_inf.cli.tables import benchmark_table, comparison_table, metrics_table, obedience


def evaluate(
    model: Annotated[str, typer.Argument(help="A Hub id or a folder.")],
    data: Annotated[
        Optional[str],
        typer.Option(
            help="InF-IR records: 'mini' (default), a file, a folder, or a Hub dataset id; "
            "with --benchmark narratives, a .jsonl file of topics."
        ),
    ] = None,
    split: Annotated[Optional[str], typer.Option(help="Split of the data; default: test, else validation.")] = None,
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="Write the measurements to this file.", callback=output_file)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts encoded at a time.", min=1)] = 32,
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
    quiet()
    if benchmark is not None:
        options: dict[str, Any] = {"tasks": tasks, "data": data, "no_instruction": no_instruction, "batch_size": batch_size}
        options["trust_remote_code"] = trust_remote_code
        _run_benchmark([model, *(compare or [])], benchmark, output, json_file, options)
        return
    data = data or "mini"
    from sentence_transformers_inf.evaluation import measure
    from sentence_transformers_inf.modules import load_instruction_model
    from sentence_transformers_inf.passages import (
        check_dimension,
        distinct_passages,
        passage_rows,
        read_passage_embeddings,
    )
    from sentence_transformers_inf.recipe import read_recipe, write_whole
    from sentence_transformers_inf.records import is_on_hub, load_records, record_splits

    recipe = (read_recipe(model) if Path(model).is_dir() else None) or {}
    records, split, trained_on = _choose_records(model, recipe, data, split)
    vectors = None
    if passage_embeddings is not None:
        texts = distinct_passages([load_records(data, name) for name in record_splits(data)])
        vectors = read_passage_embeddings(passage_embeddings, texts)[passage_rows(records, texts).ravel()]
    loaded = load_instruction_model(model, trust_remote_code=trust_remote_code)
    if vectors is not None:
        check_dimension(str(passage_embeddings), vectors, loaded)
    result = measure(loaded, records, batch_size, show_progress_bar=sys.stderr.isatty(), passage_embeddings=vectors)
    means, per_type = result.means(), result.per_type()
    report: dict[str, Any] = {"model": model, "data": data, "data_on_hub": is_on_hub(data), "split": split}
    report |= {"records": len(records), "trained_on": trained_on, **means, "per_type": per_type}
    before = None
    if vectors is None and (base := _load_base(recipe)) is not None:
        before = measure(base, records, batch_size, show_progress_bar=sys.stderr.isatty())
        report["base"] = before.means()
    if json_file is not None:
        write_whole(json_file, json.dumps(report, indent=2) + "\n")
    print_line(f"{model} on {data}{f' ({split})' if split else ''}, {len(records)} records, values times 100")
    metrics_table(means, per_type, len(records)).print()
    if before is not None:
        comparison_table(before, result, f"{len(records)} records").print()
    print_line(obedience(result, before))


def _choose_records(model: str, recipe: dict[str, Any], data: str, split: str | None) -> tuple[Any, str | None, bool]:
    """What to measure on: records and their split, those held out of training if there is no other split; and whether the
    model was trained on them."""
    from sentence_transformers_inf.corpora import hold_out, was_trained_on
    from sentence_transformers_inf.records import load_records, record_splits

    if split is None and len(splits := record_splits(data)) > 1:
        split = next((name for name in ("test", "validation") if name in splits), None)
    records = load_records(data, split)
    others, held_out = hold_out(records)
    if split is None and held_out is not None and was_trained_on(recipe, others):
        print_line(f"{model} was trained on {data}: measured on its {len(held_out)} records that were held out of training")
        return held_out, "held out", False
    if trained_on := was_trained_on(recipe, records) or was_trained_on(recipe, others):
        print_line(f"{model} was trained on these records: the numbers do not say how it does on others")
    return records, split, trained_on


def _load_base(recipe: dict[str, Any]) -> Any:
    """The base model that a recipe names, to stand beside what was trained from it, if it is there."""
    from sentence_transformers_inf.corpora import BUNDLED_BASE, bundled_base
    from sentence_transformers_inf.modules import load_instruction_model

    if (name := recipe.get("base")) is None or not (recipe.get("base_on_hub") or Path(name).is_dir()):
        return None
    try:
        return load_instruction_model(bundled_base() if name == BUNDLED_BASE else name)
    except OSError as error:
        print_line(f"The base model {name} does not stand beside it, for it cannot be loaded: {error}")
        return None


def _run_benchmark(
    models: list[str],
    benchmark: str,
    output: Path,
    json_file: Optional[Path],
    options: dict[str, Any],
) -> None:
    need("--benchmark", "mteb")
    output_folder(output)
    from sentence_transformers_inf.evaluation.mteb import run_benchmark
    from sentence_transformers_inf.recipe import write_whole

    scores = run_benchmark(models, benchmark, output, log=print_line, **options)
    if json_file is not None:
        report = {"benchmark": benchmark, "rows": [dataclasses.asdict(score) for score in scores]}
        write_whole(json_file, json.dumps(report, indent=2) + "\n")
    benchmark_table(benchmark, models, scores, options["no_instruction"]).print()
    print_line(f"The results are in {output}, in MTEB's layout")
