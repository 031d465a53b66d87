"""``inf-ir publish``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from dataset_builder.cli.check import check_source
from dataset_builder.cli.options import console


def publish(
    source: Annotated[str, typer.Argument(help="'mini' or the output folder of inf-ir build.")],
    repo: Annotated[str, typer.Option(help="Dataset on the Hub, as user/name.")],
    public: Annotated[bool, typer.Option("--public", help="Make it public; else it is private.")] = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch to push to.")] = None,
    against: Annotated[
        Optional[list[str]], typer.Option(help="Refuse records with texts of this evaluation set; may be repeated.")
    ] = None,
    despite_errors: Annotated[
        bool, typer.Option("--despite-errors", help="Publish although the check finds errors.")
    ] = False,
) -> None:
    """Push a corpus to the Hub as Parquet with a card, private unless --public."""
    import datasets

    from dataset_builder import publish as hub

    if repo.count("/") != 1:
        raise ValueError(f"--repo {repo}: expected user/name")
    datasets.disable_progress_bars()
    report = check_source(source, against or [])
    if report.errors and not despite_errors:
        finding, number = report.errors.most_common(1)[0]
        raise ValueError(
            f"{source}: {number} records with this error: {finding} (see `inf-ir check`; --despite-errors publishes)"
        )
    url = hub.publish(source, repo, public=public, revision=revision)
    console.print(f"Pushed: {url}", markup=False, soft_wrap=True)
