"""``inf-embed search`` and ``inf-embed passages``."""

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from sentence_transformers_inf.cli.checks import need, not_blank, output_file
from sentence_transformers_inf.cli.display import print_line, quiet
from sentence_transformers_inf.cli.options import DataOption, TrustOption
from sentence_transformers_inf.cli.tables import hits_table


def search(
    model: Annotated[str, typer.Argument(help="A Hub id or a folder.")],
    corpus: Annotated[str, typer.Option(help="Passages: a .txt, .jsonl, .csv, .tsv or .parquet file, or 'mini'.")],
    query: Annotated[str, typer.Option(help="What to search for.", callback=not_blank)],
    instruction: Annotated[Optional[str], typer.Option(help="What the passages should be like.")] = None,
    exclude: Annotated[
        Optional[list[str]], typer.Option(help="What the passages should not be about; may be repeated.")
    ] = None,
    index: Annotated[
        Optional[Path],
        typer.Option(
            help="The corpus's vectors, from the model or its base: .npy, .npz or a FAISS index.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="How many passages to show.", min=1)] = 5,
    trust_remote_code: TrustOption = False,
) -> None:
    """Search a corpus with and without an instruction, and mark the passages that it moved."""
    quiet()
    from sentence_transformers_inf.corpora import read_ids, read_passages
    from sentence_transformers_inf.modules import load_instruction_model
    from sentence_transformers_inf.search import read_index
    from sentence_transformers_inf.search import search as run

    if index is not None and index.suffix not in (".npy", ".npz"):
        need(f"{index}: reading a FAISS index", "faiss", "pip install faiss-cpu")
    texts = read_passages(corpus)
    ids, loaded = read_ids(corpus, len(texts)), load_instruction_model(model, trust_remote_code=trust_remote_code)
    vectors = None if index is None else read_index(index, len(texts), int(loaded.get_embedding_dimension() or 0))
    hits = run(loaded, texts, query, instruction, top, vectors, show_progress=sys.stderr.isatty(), exclude=exclude)
    print_line(query)
    print_line(instruction or "(no instruction)")
    hits_table(hits, ids, bool(instruction), top).print()


def passages(
    output: Annotated[Path, typer.Option(help="File for the passages, .jsonl.", callback=output_file)],
    data: DataOption = "mini",
) -> None:
    """List the distinct passages of a corpus, for embeddings from elsewhere (train --passage-embeddings)."""
    quiet()
    from sentence_transformers_inf.passages import distinct_passages
    from sentence_transformers_inf.recipe import replacing
    from sentence_transformers_inf.records import load_records, record_splits

    texts = distinct_passages([load_records(data, split) for split in record_splits(data)])
    with replacing(output) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    print_line(f"{len(texts)} passages are in {output}; embed them in this order.")
