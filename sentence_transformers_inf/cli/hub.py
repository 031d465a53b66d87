"""``inf-embed card`` and ``inf-embed push``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Optional

import typer

from sentence_transformers_inf.cli.evaluate import needs_mteb
from sentence_transformers_inf.cli.tables import print_line
from sentence_transformers_inf.reading import read_json


def card(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    results: Annotated[
        Optional[list[Path]],
        typer.Option(help="What evaluate wrote: a folder (--output) or a file (--json); may be repeated."),
    ] = None,
) -> None:
    """Write the model's card anew, with results of evaluate in it."""
    from sentence_transformers_inf.hub.card import add_results, write_model_card

    if not (model / "modules.json").is_file():
        raise FileNotFoundError(f"{model}: there is no saved model here")
    for path in results or []:
        if path.is_dir():
            with needs_mteb():
                from sentence_transformers_inf.evaluation.mteb import read_results
            rows = [dataclasses.asdict(row) for row in read_results(str(model), path)]
        else:
            try:
                report = read_json(path)
                rows = report.get("rows", [report])
                rows = [row for row in rows if Path(row["model"]).resolve() == model.resolve()]
            except (ValueError, AttributeError, LookupError, TypeError) as error:
                raise ValueError(f"{path}: this is not what evaluate --json wrote: write it again ({error!r})") from error
        if not rows:
            raise ValueError(f"{path}: there are no results of {model} here")
        add_results(model, [row for row in rows if "per_type" in row], [row for row in rows if "task" in row])
    print_line(f"The card is {write_model_card(model)}")


def push(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    repo: Annotated[str, typer.Option(help="Model on the Hub, as user/name.")],
    public: Annotated[bool, typer.Option("--public", help="Make it public; else it is private.")] = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch to push to.")] = None,
) -> None:
    """Push a model and its card to the Hub, private unless --public."""
    from sentence_transformers_inf.hub.push import push_model

    url = push_model(model, repo, public=public, revision=revision)
    print_line(f"Pushed: {url}")
