"""The command ``inf-ir``: from query-passage pairs to InF-IR. The only place of the builder that parses or prints."""

from dataset_builder.cli import build, corpora, judge
from sentence_transformers_inf.cli.errors import application, run

app = application("Build, judge and compare instruction-following retrieval data.", "inf-ir")
for command in (build.build, build.repair, judge.judge, judge.agreement, corpora.analyze, corpora.check, corpora.publish):
    app.command()(command)


def main() -> None:
    """Run the command line; what the user can mend is one line on stderr and exit status 2."""
    run(app, "inf-ir")
