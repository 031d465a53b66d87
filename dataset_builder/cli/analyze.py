"""``inf-ir analyze``."""

from pathlib import Path
from typing import Annotated, Any, Optional

from rich.table import Table
from typer import Argument, Option

from dataset_builder.cli.options import console


def analyze(
    data: Annotated[str, Argument(help="InF-IR, Promptriever's or FollowIR's data: a file, folder or Hub id.")],
    output: Annotated[Path, Option(help="Folder for the report (HTML, JSON) and the map (PNG, SVG).")],
    compare: Annotated[Optional[list[str]], Option(help="Another corpus; may be repeated.")] = None,
    model: Annotated[
        str, Option(help="Embedding model: any SentenceTransformer.")
    ] = "sentence-transformers/all-MiniLM-L6-v2",
    split: Annotated[str, Option(help="Split of the corpora that have several.")] = "train",
    sample: Annotated[int, Option(help="Most texts of a kind that are measured.", min=2)] = 10_000,
    limit: Annotated[int, Option(help="Most rows that are read of a corpus; an InF-IR record has three.", min=1)] = 100_000,
    seed: Annotated[int, Option(help="Of the samples and the map.")] = 0,
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
