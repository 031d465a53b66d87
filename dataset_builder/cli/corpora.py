"""``inf-ir analyze``, ``inf-ir check`` and ``inf-ir publish``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

from typer import Argument, Exit, Option

from dataset_builder.cli.options import FAILED, MOST, Records
from sentence_transformers_inf.cli.checks import output_file, output_folder
from sentence_transformers_inf.cli.display import Table, print_line, quiet, status

if TYPE_CHECKING:
    from dataset_builder.checks import CheckReport


def analyze(
    data: Annotated[str, Argument(help="InF-IR, Promptriever's or FollowIR's data: a file, folder or Hub id.")],
    output: Annotated[
        Path, Option(help="Folder for the report (HTML, JSON) and the map (PNG, SVG).", callback=output_folder)
    ],
    compare: Annotated[Optional[list[str]], Option(help="Another corpus; may be repeated.")] = None,
    model: Annotated[
        str, Option(help="Embedding model: any SentenceTransformer.")
    ] = "sentence-transformers/all-MiniLM-L6-v2",
    split: Annotated[str, Option(help="Split of the corpora that have several.")] = "train",
    sample: Annotated[int, Option(help="Most texts of a kind that are measured.", min=2)] = 10_000,
    limit: Annotated[
        int, Option(help="Most rows that are read of a corpus; an InF-IR record has three.", min=1, max=MOST)
    ] = 100_000,
    seed: Annotated[int, Option(help="Of the samples and the map.", min=0, max=2**32 - 1)] = 0,
) -> None:
    """How varied a corpus is, beside others: similarity, n-grams, and a map of instructions, queries and passages."""
    from dataset_builder import diversity
    from sentence_transformers_inf.corpora import load_rows
    from sentence_transformers_inf.modules.loading import read_model
    from sentence_transformers_inf.records import record_splits

    quiet()
    corpora = {}
    for source in dict.fromkeys([data, *(compare or [])]):
        splits = record_splits(source)
        corpora[source] = load_rows(source, splits[0] if len(splits) == 1 else split, limit)
    encoder = read_model(model)
    with status() as say:

        def encode(texts: list[str]) -> Any:
            say(f"Embedding {len(texts)} texts")
            return encoder.encode(texts, show_progress_bar=False)

        found, embeddings = diversity.analyse(corpora, encode, sample, seed)
        say("Drawing the map")
        diversity.write_report(found, embeddings, output, model, seed)
    columns = (">distinct texts", ">sampled", ">APS ↓", ">INGF-1 ↑", ">INGF-2 ↑", ">INGF-3 ↑", ">distinct-2 ↑")
    table = Table("corpus", *columns, title="Diversity, on samples of one size")
    for kind, of_kind in found.items():
        for name, entry in of_kind.items():
            frequencies = (f"{entry.ngrams[n].inter_sample_frequency:,.0f}" for n in (1, 2, 3))
            numbers = (f"{entry.distinct_texts:,}", f"{entry.sampled:,}", f"{entry.similarity:.4f}", *frequencies)
            table.add(f"{name}: {kind}", *numbers, f"{entry.ngrams[2].distinct_share:.3f}")
    table.print()
    print_line(f"The report is {output / 'report.html'}")


def check(
    data: Records,
    against: Annotated[
        Optional[list[str]],
        Option(help="An evaluation set: an MTEB task or benchmark, or a .txt/.jsonl/.csv file; may be repeated."),
    ] = None,
    json_file: Annotated[
        Optional[Path], Option("--json", help="Write the report to this file.", callback=output_file)
    ] = None,
) -> None:
    """Check records before publishing: schema, duplicates, leakage, overlap of splits, evaluation texts."""
    from sentence_transformers_inf.recipe import write_whole

    report = check_source(data, against or [])
    if json_file is not None:
        write_whole(json_file, json.dumps(vars(report), indent=2, ensure_ascii=False) + "\n")
    title = f"{data}: {sum(report.records.values())} records"
    table = Table("finding", ">records", "", "the first", title=title)
    for kind, found in (("error", report.errors), ("warning", report.warnings)):
        for finding, number in found.most_common():
            table.add(finding, str(number), kind, ", ".join(report.examples[finding][:2]))
    if report.errors or report.warnings:
        table.print()
    else:
        print_line(f"{data}: nothing found")
    if report.errors:
        raise Exit(FAILED)


def check_source(source: str, against: list[str]) -> CheckReport:
    """Check what a corpus would be published as: an output folder of a build is split first."""
    import tempfile

    from dataset_builder.checks import check_records, read_evaluation_texts
    from dataset_builder.publish import build_splits
    from sentence_transformers_inf.records import load_records, record_splits

    quiet(models=False)
    texts = read_evaluation_texts(against)
    if not (Path(source) / "report.json").is_file():
        return check_records({split: load_records(source, split) for split in record_splits(source)}, texts)
    load_records(source)  # the schema
    with tempfile.TemporaryDirectory() as cache:
        return check_records(dict(build_splits(source, "default", Path(cache))), texts)


def publish(
    source: Annotated[str, Argument(help="'mini' or the output folder of inf-ir build.")],
    repo: Annotated[str, Option(help="Dataset on the Hub, as user/name.")],
    public: Annotated[bool, Option("--public", help="Make it public; else it is private.")] = False,
    revision: Annotated[Optional[str], Option(help="Branch to push to.")] = None,
    against: Annotated[
        Optional[list[str]], Option(help="Refuse records with texts of this evaluation set; may be repeated.")
    ] = None,
    despite_errors: Annotated[bool, Option("--despite-errors", help="Publish although the check finds errors.")] = False,
) -> None:
    """Push a corpus to the Hub as Parquet with a card, private unless --public."""
    from dataset_builder import publish as hub

    if repo.count("/") != 1:
        raise ValueError(f"--repo {repo}: expected user/name")
    report = check_source(source, against or [])
    if report.errors and not despite_errors:
        finding, number = report.errors.most_common(1)[0]
        hint = "(see `inf-ir check`; --despite-errors publishes)"
        raise ValueError(f"{source}: {number} records with this error: {finding} {hint}")
    url = hub.publish(source, repo, public=public, revision=revision)
    print_line(f"Pushed: {url}")
