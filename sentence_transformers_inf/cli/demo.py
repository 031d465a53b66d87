"""``inf-embed demo``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from sentence_transformers_inf.cli.interrupted import interrupted, left_of
from sentence_transformers_inf.cli.options import BaseOption
from sentence_transformers_inf.cli.tables import comparison_table, console, flips_table, gain_table, save_picture


def demo(
    base: BaseOption = None,
    output: Annotated[Path, typer.Option(help="Folder for the trained model.")] = Path("inf-embed-demo"),
    records: Annotated[
        Optional[int], typer.Option(help="Train on the first so many records only: sooner done, less obedient.", min=1)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that is in the folder.")] = False,
) -> None:
    """Train a model on the bundled corpus and show what it learned, in a few minutes on a CPU."""
    import datasets

    from sentence_transformers_inf.training import RunFolder

    datasets.disable_progress_bars()
    folder = RunFolder(output)
    if folder.is_finished and not folder.checkpoints() and not overwrite:
        raise FileExistsError(f"{output} holds a finished model: name another --output, or --overwrite it")
    if (problem := folder.foreign()) is not None:
        raise FileExistsError(problem)
    with folder.held(), interrupted(lambda: left_of(folder)):
        _demo(base, output, records, overwrite)


def _demo(base: Optional[str], output: Path, records: Optional[int], overwrite: bool) -> None:
    from sentence_transformers_inf.corpora import bundled_base, load_training_data
    from sentence_transformers_inf.evaluation import measure
    from sentence_transformers_inf.hub.card import add_results, write_model_card
    from sentence_transformers_inf.modules import load_instruction_model
    from sentence_transformers_inf.records import load_records
    from sentence_transformers_inf.training import InstructionTrainer, InstructionTrainingArguments

    started = time.monotonic()
    test = load_records("mini", "test")
    base_path = base or bundled_base()
    console.print(f"Measuring the base model on {len(test)} test records it has never seen ...")
    before = measure(load_instruction_model(base_path), test)
    console.print("Training multi_P_I on the bundled corpus ...")
    args = InstructionTrainingArguments(output_dir=str(output), overwrite=overwrite)
    trainer = InstructionTrainer(base, args, *load_training_data("mini", records))
    trainer.reopen()
    trainer.train()
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
    trainer.run_folder.remove_checkpoints()
    console.print(f"\nDone in {minutes:.1f} minutes; the model and its card are in {output}. Use it:\n")
    for line in (
        "from sentence_transformers_inf import load_instruction_model",
        f'model = load_instruction_model("{output}")',
        'model.encode_query({"instruction": "For a ten-year-old.", "query": "why is the sky blue"})',
    ):
        console.print(f"    {line}", style="bold", markup=False, soft_wrap=True)
