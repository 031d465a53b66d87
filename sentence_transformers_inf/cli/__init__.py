"""The command ``inf-embed``: its commands, one file each. The only place of the plugin that parses or prints."""

from sentence_transformers_inf.cli import average, demo, evaluate, export, hub, playground, search, serve, train, verify
from sentence_transformers_inf.cli.errors import application, run

app = application("Train, measure and use embedding models that obey instructions.", "inf-embed")
app.command(context_settings=train.CONTEXT, add_help_option=False)(train.train)
for command in (
    hub.push,
    hub.card,
    evaluate.evaluate,
    train.ablate,
    average.average,
    search.search,
    search.passages,
    export.export,
    demo.demo,
    playground.playground,
    playground.space,
    serve.serve,
    verify.verify,
):
    app.command()(command)


def main() -> None:
    """Run the command line; see :func:`~sentence_transformers_inf.cli.errors.run`."""
    run(app, "inf-embed")
