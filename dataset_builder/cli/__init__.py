"""The command ``inf-ir``: from query-passage pairs to InF-IR. The only place of the builder that parses or prints."""

from __future__ import annotations

import typer

from dataset_builder.cli import agreement, analyze, build, check, judge, publish, repair
from sentence_transformers_inf.cli.errors import run

app = typer.Typer(
    help="Build, judge and compare instruction-following retrieval data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(build.build)
app.command()(repair.repair)
app.command()(judge.judge)
app.command()(agreement.agreement)
app.command()(analyze.analyze)
app.command()(check.check)
app.command()(publish.publish)


def main() -> None:
    """Run the command line; what the user can mend is one line on stderr and exit status 2."""
    run(app, "INF_IR_TRACEBACK")
