"""``inf-embed verify``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer

from sentence_transformers_inf.cli.checks import existing, server
from sentence_transformers_inf.cli.display import Table, print_line, quiet


class Kind(StrEnum):
    """What is compared."""

    PLAIN = "plain"
    INSTRUCTED = "instructed"


def verify(
    url: Annotated[
        str, typer.Argument(help="An OpenAI-compatible server, such as http://127.0.0.1:8000/v1.", callback=server)
    ],
    model: Annotated[
        Optional[str],
        typer.Option(help="What it should serve: a Hub id or a folder. Default: the adapter that the package ships."),
    ] = None,
    only: Annotated[
        Optional[Kind], typer.Option(help="Compare these alone, where passages and queries have a server each.")
    ] = None,
    index: Annotated[
        Optional[Path], typer.Option(help="Your stored vectors of a corpus, .npy or .npz, to compare as well.")
    ] = None,
    corpus: Annotated[
        Optional[str],
        typer.Option(help="The passages of --index, in its order: a .txt, .jsonl, .csv, .tsv or .parquet file, or 'mini'."),
    ] = None,
    served_as: Annotated[
        Optional[str], typer.Option(help="What the server calls the model. Default: the first that it lists.")
    ] = None,
) -> None:
    """Compare a server's embeddings with a model's, and say what is wrong. Exit status 1: something is."""
    from sentence_transformers_inf.corpora import read_passages
    from sentence_transformers_inf.modules import load_instruction_model
    from sentence_transformers_inf.search import read_index
    from sentence_transformers_inf.serving.verify import Endpoint, verify_endpoint, verify_index

    quiet()
    if (index is None) != (corpus is None):
        raise ValueError("--index and --corpus go together: give both")
    existing([] if index is None else [index])
    if index is not None and index.suffix not in (".npy", ".npz"):
        raise ValueError(f"{index}: expected vectors in a .npy or .npz file")
    passages = [] if corpus is None else read_passages(corpus)
    endpoint = Endpoint(url, served_as)
    endpoint.embed(["Is a server there?"])  # before the model is loaded
    loaded = load_instruction_model(model)
    compared = []
    if index is not None:
        vectors = read_index(index, len(passages), int(loaded.get_embedding_dimension() or 0))
        compared.append(verify_index(index, vectors, loaded, passages))
    compared.extend(verify_endpoint(endpoint, loaded, plain=only != Kind.INSTRUCTED, told=only != Kind.PLAIN))
    table = Table("", "contract", ">largest difference", ">top-10 overlap", title=f"{url} against the model")
    for row in compared:
        table.add(row.what, row.contract, f"{row.difference:.1e}", f"{row.overlap:.3f}")
    table.print()
    for row in compared:
        for finding in row.findings:
            print_line(f"{row.what}: {finding}")
        if row.contract == "ranks":
            print_line(f"{row.what}: ranks hold, values do not: quantised, or a revision that is close")
    if any(row.contract == "none" for row in compared):
        raise typer.Exit(1)
