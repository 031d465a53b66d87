"""``inf-embed card`` and ``inf-embed push``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from sentence_transformers_inf.cli.checks import existing, need
from sentence_transformers_inf.cli.display import print_line, quiet
from sentence_transformers_inf.cli.options import TrustOption
from sentence_transformers_inf.reading import read_json


def card(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    results: Annotated[
        Optional[list[Path]],
        typer.Option(help="What evaluate wrote: a folder (--output) or a file (--json); may be repeated."),
    ] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write the model's card anew, with results of evaluate in it."""
    existing([model, *(results or [])])
    for path in results or []:
        if path.is_dir():
            need(f"{path}: reading the results of a benchmark", "mteb")
    from sentence_transformers_inf.hub.card import add_results, write_model_card
    from sentence_transformers_inf.modules import load_instruction_model
    from sentence_transformers_inf.recipe import locked

    quiet()
    if not (model / "modules.json").is_file():
        raise FileNotFoundError(f"{model}: there is no saved model here: name a model's folder")
    found = [(path, _results(model, path)) for path in results or []]
    loaded = load_instruction_model(model, trust_remote_code=trust_remote_code)
    with locked(model):
        for path, rows in found:
            try:
                add_results(model, [row for row in rows if "task" not in row], [row for row in rows if "task" in row])
            except (LookupError, TypeError, ValueError) as error:
                raise _no_report(path, error) from error
        card = write_model_card(model, model=loaded)
    print_line(f"The card is {card}")


def _results(model: Path, path: Path) -> list[dict[str, Any]]:
    """What evaluate wrote of a model."""
    if path.is_dir():
        from sentence_transformers_inf.evaluation.mteb import read_results

        rows = [dataclasses.asdict(row) for row in read_results(str(model), path)]
    else:
        try:
            report = read_json(path)
            rows = report.get("rows", [report])
            rows = [row for row in rows if Path(row["model"]).resolve() == model.resolve()]
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            raise _no_report(path, error) from error
    if not rows:
        raise ValueError(f"{path}: there are no results of {model} here")
    return rows


def _no_report(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: this is not what evaluate --json wrote: write it again ({error})")


def push(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    repo: Annotated[str, typer.Option(help="Model on the Hub, as user/name.")],
    public: Annotated[bool, typer.Option("--public", help="Make it public; else it is private.")] = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch to push to.")] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Push a model and its card to the Hub, private unless --public."""
    existing([model])
    from sentence_transformers_inf.hub.push import push_model

    quiet()
    url = push_model(model, repo, public=public, revision=revision, trust_remote_code=trust_remote_code, log=print_line)
    print_line(f"Pushed: {url}")
