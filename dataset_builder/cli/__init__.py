"""The command ``inf-ir``: from query-passage pairs to InF-IR. The only place of the builder that parses or prints."""

import typer

from dataset_builder.cli import build, corpora, judge
from sentence_transformers_inf.cli.errors import run

app = typer.Typer(
    help="Build, judge and compare instruction-following retrieval data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (build.build, build.repair, judge.judge, judge.agreement, corpora.analyze, corpora.check, corpora.publish):
    app.command()(command)


def main() -> None:
    """Run the command line; what the user can mend is one line on stderr and exit status 2."""
    run(app, "INF_IR_TRACEBACK")
