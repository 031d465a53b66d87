"""``inf-embed demo``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from sentence_transformers_inf.cli.options import BaseOption
from sentence_transformers_inf.cli.tables import comparison_table, console, flips_table, gain_table, save_picture


def demo(
    base: BaseOption = None,
    output: Annotated[Path, typer.Option(help="Folder for the trained model.")] = Path("inf-embed-demo"),
    max_records: Annotated[
        Optional[int], typer.Option(help="Train on the first so many records only: sooner done, less obedient.")
    ] = None,
) -> None:
    """Train a model on the bundled corpus and show what it learned, in a few minutes on a CPU."""
    import datasets

    from sentence_transformers_inf.corpora import bundled_base
    from sentence_transformers_inf.evaluation import measure
    from sentence_transformers_inf.hub.card import add_results, write_model_card
    from sentence_transformers_inf.modules import load_instruction_model
    from sentence_transformers_inf.recipe import read_recipe
    from sentence_transformers_inf.records import load_records
    from sentence_transformers_inf.training import train as run

    datasets.disable_progress_bars()
    started = time.monotonic()
    test = load_records("mini", "test")
    base_path = base or bundled_base()
    console.print(f"Measuring the base model on {len(test)} test records it has never seen ...")
    before = measure(load_instruction_model(base_path), test)
    finished = (read_recipe(output) or {}).get("finished", False)
    console.print("Training multi_P_I on the bundled corpus ...")
    run("mini", base, output, max_records=max_records, overwrite=finished)
    after = measure(load_instruction_model(output), test)
    minutes = (time.monotonic() - started) / 60
    measured = {"data": "mini", "data_on_hub": False, "split": "test", "records": len(test), **after.means()}
    measured |= {"per_type": after.per_type(), "base": before.means()}
    add_results(output, [measured])
    write_model_card(output)
    console.print(comparison_table(before, after))
    console.print(gain_table(before, after))
    flips = flips_table(test, before, after)
    console.print(flips)
    save_picture(flips, output / "flips.svg")
    console.print(f"\nDone in {minutes:.1f} minutes; the model and its card are in {output}. Use it:\n")
    for line in (
        "from sentence_transformers_inf import load_instruction_model",
        f'model = load_instruction_model("{output}")',
        'model.encode_query({"instruction": "For a ten-year-old.", "query": "why is the sky blue"})',
    ):
        console.print(f"    {line}", style="bold", markup=False, soft_wrap=True)
