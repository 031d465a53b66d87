"""``inf-ir judge`` and ``inf-ir agreement``."""

import functools
import sys
from pathlib import Path
from typing import Annotated, Optional

from tqdm.auto import tqdm
from typer import Argument, Exit, Option

from dataset_builder.cli.options import FAILED, MOST, BaseUrl, Concurrency, Effort, MaxCost, PriceList, Reasoning, Records
from sentence_transformers_inf.cli.checks import existing, output_file, picture
from sentence_transformers_inf.cli.display import Table, print_line, quiet


def judge(
    data: Records,
    model: Annotated[str, Option(help="The judge: a model of the server, or with --kind a Hub id or folder.")],
    labels: Annotated[
        Path, Option(help="JSONL file that gets its labels, beside those of other annotators.", callback=output_file)
    ],
    split: Annotated[Optional[str], Option(help="Split of the data.")] = None,
    limit: Annotated[Optional[int], Option(help="Judge the first so many records only.", min=1, max=MOST)] = None,
    kind: Annotated[
        str, Option(help="'server', 'cross-encoder', or 'reranker' (a causal model of the FollowIR-7B kind).")
    ] = "server",
    base_url: BaseUrl = None,
    judge_mode: Annotated[str, Option(help="'choice' or 'pairwise'.")] = "choice",
    effort: Effort = "medium",
    reasoning: Reasoning = None,
    concurrency: Concurrency = 64,
    max_cost: MaxCost = None,
    price: PriceList = None,
) -> None:
    """Add a model's judgments of records to a file of labels, for `inf-ir agreement`."""
    from dataset_builder import judging
    from dataset_builder.errors import Stop
    from dataset_builder.language_model import Limits
    from dataset_builder.live import read_key
    from dataset_builder.prices import Prices
    from sentence_transformers_inf.records import load_records

    if kind not in ("server", "cross-encoder", "reranker"):
        raise ValueError(f"--kind {kind}: expected server, cross-encoder or reranker")
    if judge_mode not in ("choice", "pairwise"):
        raise ValueError(f"--judge-mode {judge_mode}: expected choice or pairwise")
    limits = Limits(concurrency=concurrency, max_cost=max_cost, reasoning=tuple(reasoning or ()))
    prices = Prices(overrides=price or ())
    if kind == "server":
        prices.cost(model, 0, 0)
        read_key(base_url)
    quiet(models=kind != "server")
    records = load_records(data, split)
    if limit is not None:
        records = records.select(range(min(limit, len(records))))
    failed = 0
    if kind == "server":
        try:
            failed = judging.judge_with_server(
                records, model, labels, base_url=base_url, limits=limits, prices=prices,
                pairwise=judge_mode == "pairwise", effort=effort, log=functools.partial(tqdm.write, file=sys.stderr),
            )  # fmt: skip
        except Stop as stop:
            raise ValueError(str(stop)) from stop
    elif kind == "cross-encoder":
        judging.judge_with_cross_encoder(records, model, labels)
    else:
        judging.judge_with_reranker(records, model, labels)
    print_line(f"{len(records) - failed} of {len(records)} records judged; the labels are in {labels}")
    if failed == len(records):
        raise Exit(FAILED)


def agreement(
    labels: Annotated[Path, Argument(help="A table, as .csv or .jsonl, with the columns item, annotator and label.")],
    human: Annotated[list[str], Option(help="A human annotator; may be repeated.")],
    chart: Annotated[Optional[Path], Option(help="Draw a bar chart into this PNG or SVG file.", callback=picture)] = None,
) -> None:
    """Average pairwise Cohen's kappa of each annotator with the humans: which judge to trust."""
    existing([labels])
    from dataset_builder import agreement as measures

    entries = measures.agreement(measures.read_labels(labels), human)
    if chart is not None:
        measures.draw_chart(entries, human, chart)
    table = Table("annotator", ">items", ">κ", ">95% interval", title=f"Agreement with {', '.join(human)}")
    for entry in entries:
        name = f"{entry.annotator} (human)" if entry.annotator in human else entry.annotator
        table.add(name, str(entry.items), f"{entry.kappa:.3f}", f"[{entry.low:.3f}, {entry.high:.3f}]")
    table.print()
    if chart is not None:
        print_line(f"The chart is in {chart}")
