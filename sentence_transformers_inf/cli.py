"""The command ``inf-embed``: train, evaluate, search, demo. The only place of the plugin that parses or prints."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sentence_transformers_inf.evaluation import Result

app = typer.Typer(
    help="Train, measure and use embedding models that obey instructions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)

DataOption = Annotated[
    str,
    typer.Option(help="InF-IR records: 'mini', a .jsonl/.parquet file, a folder of such files, or a Hub dataset id."),
]
BaseOption = Annotated[
    Optional[str],
    typer.Option(help="Base model: a Hub id or a folder. Default: all-MiniLM-L6-v2, bundled with the demo."),
]
PublicOption = Annotated[bool, typer.Option("--public", help="Make it public; else it is private.")]


def main() -> None:
    """Run the command line; what the user can mend is one line on stderr and exit status 2."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("INF_EMBED_TRACEBACK"):
            raise
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {' '.join(str(error).split())}", markup=False)
        sys.exit(2)


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder for the model.")],
    data: DataOption = "mini",
    base: BaseOption = None,
    objective: Annotated[str, typer.Option(help="One of the 11 objectives, for example multi_P_I or uni_P.")] = "multi_P_I",
    template: Annotated[
        Optional[str],
        typer.Option(help="How instruction and query are joined. Default: '{query} [SEP] {instruction}', by the tokenizer."),
    ] = None,
    interaction: Annotated[
        Optional[str], typer.Option(help="How instruction and query meet: concatenation (the template), paper or gated.")
    ] = None,
    update: Annotated[
        str,
        typer.Option(help="What is trained: both, or queries: an adapter for instructed queries, the base untouched."),
    ] = "both",
    encoders: Annotated[
        Optional[str],
        typer.Option(
            help="instructed: a trained encoder of their own for instructed queries, another for passages and bare queries; "
            "separate: one for queries, one for passages; shared: one. Default: instructed; shared with LoRA or attention."
        ),
    ] = None,
    lora_r: Annotated[
        Optional[int], typer.Option(help="Rank of a LoRA; 0: none. Default: 32 with --update queries, else 0.")
    ] = None,
    merge_base: Annotated[
        bool, typer.Option("--merge-base", help="Save the base with the adapter, and LoRA merged into the weights.")
    ] = False,
    passage_embeddings: Annotated[
        Optional[str],
        typer.Option(help="With --update queries: the passages' vectors from elsewhere (.npy, .parquet or a Hub dataset)."),
    ] = None,
    epochs: Annotated[Optional[float], typer.Option(help="Passes over the records; default: by what is trained.")] = None,
    learning_rate: Annotated[Optional[float], typer.Option(help="Peak learning rate; default: likewise.")] = None,
    batch_size: Annotated[Optional[int], typer.Option(help="Records per step; default: likewise.")] = None,
    mini_batch_size: Annotated[
        Optional[int], typer.Option(help="GradCache: texts encoded at a time, for batches larger than memory.")
    ] = None,
    sampled_instructions: Annotated[
        Optional[int],
        typer.Option(help="Candidate instructions drawn from other records; default: by what is trained, 0 or 1, or all."),
    ] = None,
    plain_weight: Annotated[float, typer.Option(help="Weight of the bare queries, which keeps plain retrieval.")] = 0.75,
    anchor_weight: Annotated[
        float, typer.Option(help="Weight of keeping passages and bare queries where the base model puts them.")
    ] = 0.0,
    base_weight: Annotated[float, typer.Option(help="Share of the base model's weights in the result.")] = 0.0,
    dropout: Annotated[float, typer.Option(help="Dropout of the encoder's hidden states while training.")] = 0.1,
    frozen_layers: Annotated[
        int, typer.Option(help="Keep the embeddings and so many of the lowest layers as they are; 0: train everything.")
    ] = 2,
    seed: Annotated[int, typer.Option(help="Of data order, candidates and dropout.")] = 42,
    bf16: Annotated[
        Optional[bool], typer.Option("--bf16/--float32", help="Precision of the encoder.", show_default="as the machine has")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    max_records: Annotated[Optional[int], typer.Option(help="Train on the first so many records only.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that holds a run.")] = False,
    push_to_hub: Annotated[Optional[str], typer.Option(help="Push the model to this repository, user/name.")] = None,
    public: PublicOption = False,
) -> None:
    """Train a model; after an interruption, the same command goes on where it stopped."""
    from sentence_transformers_inf.hub.errors import claim_repo
    from sentence_transformers_inf.training import train as run

    if push_to_hub is not None:
        claim_repo(push_to_hub, "model", public=public)  # a refusal now and not after the training
    run(
        data,
        base,
        output,
        objective=objective,
        template=template,
        interaction=interaction,
        update=update,
        encoders=encoders,
        lora_r=lora_r,
        merge_base=merge_base,
        passage_embeddings=passage_embeddings,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        mini_batch_size=mini_batch_size,
        sampled_instructions=sampled_instructions,
        plain_weight=plain_weight,
        anchor_weight=anchor_weight,
        base_weight=base_weight,
        dropout=dropout,
        frozen_layers=frozen_layers,
        seed=seed,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        max_records=max_records,
        overwrite=overwrite,
        say=lambda line: console.print(line, markup=False, soft_wrap=True),
    )
    if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun started, the first goes on
        return
    console.print(f"\nThe model is in {output}. Measure it: inf-embed evaluate {output} --data {data}")
    if push_to_hub is not None:
        push(output, push_to_hub, public)


@app.command()
def push(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    repo: Annotated[str, typer.Option(help="Model on the Hub, as user/name.")],
    public: PublicOption = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch to push to.")] = None,
) -> None:
    """Push a model and its card to the Hub, private unless --public."""
    from sentence_transformers_inf.hub.push import push_model

    url = push_model(model, repo, public=public, revision=revision)
    console.print(f"Pushed: {url}", markup=False, soft_wrap=True)


@app.command()
def card(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    results: Annotated[
        Optional[list[Path]],
        typer.Option(help="What evaluate wrote: a folder (--output) or a file (--json); may be repeated."),
    ] = None,
) -> None:
    """Write the model's card anew, with results of evaluate in it."""
    from sentence_transformers_inf.hub.card import add_results, write_model_card

    if not (model / "modules.json").is_file():
        raise FileNotFoundError(f"{model}: there is no saved model here")
    for path in results or []:
        if path.is_dir():
            with _needs_mteb():
                from sentence_transformers_inf.evaluation.mteb import read_results
            rows = [dataclasses.asdict(row) for row in read_results(str(model), path)]
        else:
            try:
                report = json.loads(path.read_text(encoding="utf-8"))
                rows = report.get("rows", [report])
                rows = [row for row in rows if Path(row["model"]).resolve() == model.resolve()]
            except (ValueError, AttributeError, LookupError, TypeError) as error:
                raise ValueError(f"{path}: this is not what evaluate --json wrote: write it again ({error!r})") from error
        if not rows:
            raise ValueError(f"{path}: there are no results of {model} here")
        add_results(model, [row for row in rows if "per_type" in row], [row for row in rows if "task" in row])
    console.print(f"The card is {write_model_card(model)}", markup=False, soft_wrap=True)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A Hub id or a folder.")],
    data: DataOption = "mini",
    split: Annotated[Optional[str], typer.Option(help="Split of the data; default: test if there is one.")] = None,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the measurements to this file.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts encoded at a time.")] = 32,
    passage_embeddings: Annotated[
        Optional[str], typer.Option(help="The passages' vectors from elsewhere, as for train.")
    ] = None,
    benchmark: Annotated[
        Optional[str],
        typer.Option(help="Run MTEB instead: FollowIR, InstructIR, IFIR, mFollowIR, BRIGHT, MAIR, NanoBEIR or mini."),
    ] = None,
    tasks: Annotated[Optional[list[str]], typer.Option(help="A task of the benchmark; may be repeated.")] = None,
    no_instruction: Annotated[
        bool, typer.Option("--no-instruction", help="Run the benchmark without the instructions as well.")
    ] = False,
    compare: Annotated[Optional[list[str]], typer.Option(help="Another model for the benchmark; may be repeated.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the benchmark's results, in MTEB's layout.")] = Path("results"),
) -> None:
    """Measure how well a model obeys instructions, and how it retrieves without them."""
    if benchmark is not None:
        _run_benchmark([model, *(compare or [])], benchmark, output, tasks, no_instruction, batch_size, json_file)
        return
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
    loaded = load_instruction_model(model)
    result = measure(loaded, records, batch_size, show_progress_bar=sys.stderr.isatty(), passage_embeddings=vectors)
    means, per_type = result.means(), result.per_type()
    console.print(
        _metrics_table(f"{model} on {data}{f' ({split})' if split else ''}, {len(records)} records", means, per_type)
    )
    if json_file is not None:
        report: dict[str, Any] = {"model": model, "data": data, "data_on_hub": is_on_hub(data), "split": split}
        report |= {"records": len(records), **means, "per_type": per_type}
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _needs_mteb() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ValueError(f"benchmarks run through MTEB: pip install 'sentence-transformers-inf[eval]' ({error})") from error


def _run_benchmark(
    models: list[str],
    benchmark: str,
    output: Path,
    tasks: Optional[list[str]],
    no_instruction: bool,
    batch_size: int,
    json_file: Optional[Path],
) -> None:
    with _needs_mteb():
        from sentence_transformers_inf.evaluation.mteb import run_benchmark
    rows = run_benchmark(
        models,
        benchmark,
        output,
        tasks=tasks,
        no_instruction=no_instruction,
        batch_size=batch_size,
        log=lambda line: console.print(line, markup=False, soft_wrap=True),
    )
    table = Table(title=f"{benchmark}, values times 100", title_justify="left")
    for column in ("task", "measure", *models):
        table.add_column(column, justify="right" if column in models else "left")
        if column in models and no_instruction:
            table.add_column("no instruction", justify="right")
    scores = {(row.task, row.metric, row.model, row.instructed): row.score for row in rows}
    kinds = (True, False) if no_instruction else (True,)
    for task, metric in dict.fromkeys((row.task, row.metric) for row in rows):
        cells = [f"{scores[task, metric, model, instructed]:.1f}" for model in models for instructed in kinds]
        table.add_row(task, metric, *cells)
    console.print(table)
    console.print(f"The results are in {output}, in MTEB's layout", markup=False, soft_wrap=True)
    if json_file is not None:
        report = {"benchmark": benchmark, "rows": [dataclasses.asdict(row) for row in rows]}
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


@app.command()
def ablate(
    config: Annotated[Path, typer.Argument(help="A YAML file: data, evaluate, seeds, settings, grid, cells.")],
    output: Annotated[Path, typer.Option(help="Folder for results and report; the same command goes on where it stopped.")],
) -> None:
    """Train and measure every cell of a grid, the baseline without instructions always among them."""
    import datasets
    from rich.markdown import Markdown

    from sentence_transformers_inf.ablation import read_config, run_ablation, write_report

    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the charts need matplotlib: pip install 'sentence-transformers-inf[eval]'")
    datasets.disable_progress_bars()
    ablation = read_config(config)
    rows = run_ablation(ablation, output, lambda line: console.print(line, markup=False), show_progress=sys.stderr.isatty())
    console.print(Markdown(write_report(ablation, rows, output)))
    console.print(f"The table and the charts are in {output}", markup=False, soft_wrap=True)


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="A Hub id or a folder.")],
    corpus: Annotated[str, typer.Option(help="Passages: a .txt, .jsonl or .parquet file, or 'mini'.")],
    query: Annotated[str, typer.Option(help="What to search for.")],
    instruction: Annotated[Optional[str], typer.Option(help="What the passages should be like.")] = None,
    index: Annotated[
        Optional[Path],
        typer.Option(help="The corpus's vectors, from the model or its base: .npy, .npz or a FAISS index."),
    ] = None,
    top: Annotated[int, typer.Option(help="How many passages to show.", min=1)] = 5,
) -> None:
    """Search a corpus with and without an instruction, and mark the passages that it moved."""
    from sentence_transformers_inf.modules import load_instruction_model
    from sentence_transformers_inf.search import read_index, read_passages
    from sentence_transformers_inf.search import search as run

    texts, loaded = read_passages(corpus), load_instruction_model(model)
    vectors = None if index is None else read_index(index, len(texts), int(loaded.get_embedding_dimension() or 0))
    hits = run(loaded, texts, query, instruction, top, vectors, show_progress=sys.stderr.isatty())
    table = Table(title=f"{query}\n{instruction or '(no instruction)'}", title_justify="left")
    table.add_column("rank", justify="right")
    if instruction:
        table.add_column("without", justify="right")
        table.add_column("moved", justify="right")
    table.add_column("score", justify="right")
    table.add_column("passage")
    for hit in hits:
        moved = hit.plain_rank - hit.rank
        mark = f"[green]▲ {moved}[/]" if moved > 0 else f"[red]▼ {-moved}[/]" if moved else "="
        ranks = [str(hit.rank), str(hit.plain_rank), mark] if instruction else [str(hit.rank)]
        table.add_row(*ranks, f"{hit.score:.3f}", _plain(hit.passage, 240), end_section=hit.rank == top)
    console.print(table)


@app.command()
def passages(
    output: Annotated[Path, typer.Option(help="File for the passages, .jsonl.")],
    data: DataOption = "mini",
) -> None:
    """List the distinct passages of a corpus, for embeddings from elsewhere (train --passage-embeddings)."""
    from sentence_transformers_inf.passages import distinct_passages
    from sentence_transformers_inf.records import load_records, record_splits

    texts = distinct_passages([load_records(data, split) for split in record_splits(data)])
    with output.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    console.print(f"{len(texts)} passages are in {output}; embed them in this order.", markup=False, soft_wrap=True)


@app.command()
def demo(
    base: BaseOption = None,
    output: Annotated[Path, typer.Option(help="Folder for the trained model.")] = Path("inf-embed-demo"),
    max_records: Annotated[
        Optional[int], typer.Option(help="Train on the first so many records only: sooner done, less obedient.")
    ] = None,
) -> None:
    """Train a model on the bundled corpus and show what it learned, in a few minutes on a CPU."""
    import datasets

    from sentence_transformers_inf.corpora import bundled_base
    from sentence_transformers_inf.evaluation import measure
    from sentence_transformers_inf.hub.card import add_results, write_model_card
    from sentence_transformers_inf.recipe import RECIPE_FILE
    from sentence_transformers_inf.modules import load_instruction_model
    from sentence_transformers_inf.records import load_records
    from sentence_transformers_inf.training import train as run

    datasets.disable_progress_bars()
    started = time.monotonic()
    test = load_records("mini", "test")
    base_path = base or bundled_base()
    console.print(f"Measuring the base model on {len(test)} test records it has never seen ...")
    before = measure(load_instruction_model(base_path), test)
    recipe = output / RECIPE_FILE
    finished = recipe.exists() and json.loads(recipe.read_text(encoding="utf-8")).get("finished", False)
    console.print("Training multi_P_I on the bundled corpus ...")
    run("mini", base, output, max_records=max_records, overwrite=finished)
    after = measure(load_instruction_model(output), test)
    minutes = (time.monotonic() - started) / 60
    measured = {"data": "mini", "data_on_hub": False, "split": "test", "records": len(test), **after.means()}
    measured |= {"per_type": after.per_type(), "base": before.means()}
    add_results(output, [measured])
    write_model_card(output)
    console.print(_comparison_table(before, after))
    console.print(_gain_table(before, after))
    flips = _flips_table(test, before, after)
    console.print(flips)
    _save_picture(flips, output / "flips.svg")
    console.print(f"\nDone in {minutes:.1f} minutes; the model and its card are in {output}. Use it:\n")
    for line in (
        "from sentence_transformers_inf import load_instruction_model",
        f'model = load_instruction_model("{output}")',
        'model.encode_query({"instruction": "For a ten-year-old.", "query": "why is the sky blue"})',
    ):
        console.print(f"    {line}", style="bold", markup=False, soft_wrap=True)


def _metrics_table(title: str, means: dict[str, float], per_type: dict[str, dict[str, float]]) -> Table:
    from sentence_transformers_inf.evaluation import METRIC_NAMES

    table = Table(title=title, title_justify="left")
    table.add_column("instruction type")
    table.add_column("records", justify="right")
    for metric in means:
        table.add_column(METRIC_NAMES[metric], justify="right")
    for name, values in per_type.items():
        table.add_row(name, str(values["records"]), *(f"{values[metric]:.1f}" for metric in means))
    table.add_section()
    table.add_row("all", "", *(f"{value:.1f}" for value in means.values()), style="bold")
    return table


def _comparison_table(before: Result, after: Result) -> Table:
    from sentence_transformers_inf.evaluation import METRICS
    from sentence_transformers_inf.evaluation.metrics import bootstrap_interval
    from sentence_transformers_inf.evaluation import METRIC_NAMES

    table = Table(title="Test split, all values times 100, with 95% bootstrap intervals", title_justify="left")
    for column in ("", "base model", "trained", "gain"):
        table.add_column(column, justify="left" if not column else "right")
    old, new = before.means(), after.means()
    for metric in METRICS:
        if metric == "plain_ndcg_at_10":
            table.add_section()
        cells = [f"{old[metric]:.1f}", f"{new[metric]:.1f}", f"{new[metric] - old[metric]:+.1f}"]
        if metric in before.values:  # Robustness is a mean over queries, not over records
            differences = after.values[metric] - before.values[metric]
            for index, values in enumerate((before.values[metric], after.values[metric], differences)):
                low, high = bootstrap_interval(values)
                cells[index] += f" [{low:+.1f}, {high:+.1f}]" if index == 2 else f" [{low:.1f}, {high:.1f}]"
        table.add_row(METRIC_NAMES[metric], *cells)
    return table


def _gain_table(before: Result, after: Result) -> Table:
    table = Table(title="By instruction type", title_justify="left")
    for column in ("instruction type", "records", "p-MRR before", "after", "pair accuracy before", "after"):
        table.add_column(column, justify="left" if column == "instruction type" else "right")
    old, new = before.per_type(), after.per_type()
    for name, values in new.items():
        cells = [f"{scores[metric]:.1f}" for metric in ("p_mrr", "pair_accuracy") for scores in (old[name], values)]
        table.add_row(name, str(values["records"]), *cells)
    return table


def _flips_table(records: Any, before: Result, after: Result, count: int = 3) -> Table:
    """Records whose two instructions put different passages first after training, and the same one before."""
    same_before = (before.ranks[:, 0, 0] < before.ranks[:, 0, 1]) == (before.ranks[:, 1, 0] < before.ranks[:, 1, 1])
    flips = (after.ranks[:, 0, 0] == 1) & (after.ranks[:, 1, 1] == 1) & same_before
    passages = ("document", "hard_negative_document_1")
    table = Table(title="Rankings that flip with the instruction", title_justify="left")
    table.add_column("query and instruction")
    for model in ("the base model", "the trained model"):
        table.add_column(f"{model} prefers", ratio=1)
    for row in flips.nonzero()[0][:count].tolist():
        record = records[row]
        table.add_row(f"[bold]{_plain(record['query_positive'])}[/]")
        for right, instruction in enumerate(("instruction_positive", "instruction_negative")):
            cells = []
            for result in (before, after):
                preferred = int(result.ranks[row, right, 1] < result.ranks[row, right, 0])
                mark = "[green]✓[/]" if preferred == right else "[red]✗[/]"
                cells.append(f"{mark} {_plain(record[passages[preferred]], 120)}")
            table.add_row(f"[cyan]{_plain(record[instruction])}[/]", *cells, end_section=right == 1)
    return table


def _save_picture(table: Table, path: Path) -> None:
    recorder = Console(record=True, width=120, file=io.StringIO())
    recorder.print(table)
    path.write_text(recorder.export_svg(title="inf-embed demo"), encoding="utf-8")


def _plain(text: str, limit: int = 1000) -> str:
    """Text that Rich prints as it is, cut to ``limit`` characters."""
    from rich.markup import escape

    return escape(text if len(text) <= limit else text[: limit - 1].rstrip() + "…")


if __name__ == "__main__":
    main()
