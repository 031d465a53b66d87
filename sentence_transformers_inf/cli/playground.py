"""``inf-embed playground`` and ``inf-embed space``."""

import socket
import sys
from typing import Annotated, Optional

import typer

from sentence_transformers_inf.cli.checks import need
from sentence_transformers_inf.cli.display import print_line, quiet

ModelArgument = Annotated[
    Optional[str], typer.Argument(help="A Hub id or a folder; without it, the adapter that comes with this package.")
]
CompareOption = Annotated[Optional[str], typer.Option(help="A model to compare with; default: the model's base.")]
CorpusOption = Annotated[
    str,
    typer.Option(help="Passages: a .txt, .jsonl or .parquet file, or 'mini', 'narratives' or 'help-centre' with examples."),
]

_HOST = "127.0.0.1"


def playground(
    model: ModelArgument = None,
    compare: CompareOption = None,
    corpus: CorpusOption = "mini",
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65_535)] = 7860,
) -> None:
    """Open a page on this machine that shows what an instruction moves."""
    need("the playground", "gradio")
    quiet()
    with socket.socket() as probe:  # before a model is loaded
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise OSError(f"port {port} of {_HOST} cannot be used ({error.strerror}); choose another with --port") from error
    from sentence_transformers_inf.playground.page import build_page, launch

    page = build_page(model, compare, corpus, show_progress=sys.stderr.isatty())
    address = launch(page, port, server_name=_HOST, prevent_thread_lock=True)
    print_line(f"The playground is at {address} until you press Ctrl-C.")
    page.block_thread()


def space(
    repo: Annotated[str, typer.Option(help="Space on the Hub, as user/name.")],
    model: ModelArgument = None,
    compare: CompareOption = None,
    corpus: CorpusOption = "mini",
    public: Annotated[bool, typer.Option("--public", help="Make it public; else it is private.")] = False,
) -> None:
    """Push the playground of a model to the Hub as a Space, private unless --public."""
    quiet()
    from sentence_transformers_inf.hub.space import push_space
    from sentence_transformers_inf.playground.corpus import read_corpus

    read_corpus(corpus)  # a bad row is told before anything is pushed
    print_line(f"Pushed: {push_space(model, repo, compare=compare, corpus=corpus, public=public)}")
