"""``inf-embed average``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sentence_transformers_inf.cli.checks import finite, output_folder
from sentence_transformers_inf.cli.display import print_line, quiet
from sentence_transformers_inf.cli.options import TrustOption


def average(
    models: Annotated[list[Path], typer.Argument(help="Folders of models or adapters, trained from one base.")],
    output: Annotated[Path, typer.Option(help="Folder for the model.", callback=output_folder)],
    step: Annotated[
        float,
        typer.Option(
            help="How far to go from the base to the average; above 1 obeys more and ranks less well.",
            min=0.01,
            callback=finite,
        ),
    ] = 1.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that is in the folder.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Average the weights of several trainings into one model."""
    from sentence_transformers_inf.hub.card import write_model_card
    from sentence_transformers_inf.modules import save_adapter
    from sentence_transformers_inf.training import RunFolder
    from sentence_transformers_inf.training.averaging import average_models, average_recipe

    quiet()
    folder = RunFolder(output)
    recipe = average_recipe(models, step)
    folder.check_outside(*models, recipe["base"])
    with folder.held():
        folder.check(recipe, overwrite)
        model = average_models(models, step, trust_remote_code=trust_remote_code)
        folder.claim(recipe, overwrite)
        if (origin := getattr(model[0], "origin", None)) is None:
            model.save_pretrained(str(output), create_model_card=False)
        else:  # an adapter without its base
            save_adapter(model, output, *origin)
        folder.share_weights()
        write_model_card(output, model=model)
        folder.finish(recipe)
    print_line(f"The model is in {output}. Measure it: inf-embed evaluate {output}")
