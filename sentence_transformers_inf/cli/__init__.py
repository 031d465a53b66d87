"""The command ``inf-embed``: train, evaluate, search, export, demo. The only place of the plugin that parses or prints."""

import typer

from sentence_transformers_inf.cli import demo, evaluate, export, hub, search, train
from sentence_transformers_inf.cli.errors import run

app = typer.Typer(
    help="Train, measure and use embedding models that obey instructions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(context_settings=train.CONTEXT, add_help_option=False)(train.train)
for command in (
    hub.push,
    hub.card,
    evaluate.evaluate,
    train.ablate,
    search.search,
    search.passages,
    export.export,
    demo.demo,
):
    app.command()(command)


def main() -> None:
    """Run the command line; see :func:`~sentence_transformers_inf.cli.errors.run`."""
    run(app, "INF_EMBED_TRACEBACK")
