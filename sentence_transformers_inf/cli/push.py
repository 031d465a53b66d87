"""``inf-embed push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sentence_transformers_inf.cli.options import PublicOption
from sentence_transformers_inf.cli.tables import print_line


def push(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    repo: Annotated[str, typer.Option(help="Model on the Hub, as user/name.")],
    public: PublicOption = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch to push to.")] = None,
) -> None:
    """Push a model and its card to the Hub, private unless --public."""
    from sentence_transformers_inf.hub.push import push_model

    url = push_model(model, repo, public=public, revision=revision)
    print_line(f"Pushed: {url}")
