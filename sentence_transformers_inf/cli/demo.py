"""``inf-embed demo``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from sentence_transformers_inf.cli.checks import output_folder
from sentence_transformers_inf.cli.display import print_line, quiet
from sentence_transformers_inf.cli.interrupted import interrupted, left_of
from sentence_transformers_inf.cli.options import BaseOption
from sentence_transformers_inf.cli.tables import comparison_table, flips_table, gain_table, obedience


def demo(
    base: BaseOption = None,
    output: Annotated[Path, typer.Option(help="Folder for the trained model.", callback=output_folder)] = Path(
        "inf-embed-demo"
    ),
    records: Annotated[
        Optional[int], typer.Option(help="Train on the first so many records only: sooner done, less obedient.", min=1)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that is in the folder.")] = False,
) -> None:
    """Train a model on the bundled corpus and show what it learned, in a few minutes on a CPU."""
    from sentence_transformers_inf.training import RunFolder

    quiet()
    folder = RunFolder(output)
    if folder.is_finished and not folder.checkpoints() and not overwrite:
        raise FileExistsError(f"{output} holds a finished model: name another --output, or replace it with --overwrite")
    if (problem := folder.foreign()) is not None:
        raise FileExistsError(problem)
    with folder.held(), interrupted(lambda: left_of(folder)):
        _demo(base, output, records, overwrite)


def _demo(base: Optional[str], output: Path, records: Optional[int], overwrite: bool) -> None:
    from sentence_transformers_inf.cli.progress import report_progress
    from sentence_transformers_inf.corpora import bundled_base, load_training_data
    from sentence_transformers_inf.evaluation import measure
    from sentence_transformers_inf.hub.card import add_results, write_model_card
    from sentence_transformers_inf.modules import load_instruction_model
    from sentence_transformers_inf.records import load_records
    from sentence_transformers_inf.training import InstructionTrainer, InstructionTrainingArguments

    started = time.monotonic()
    test = load_records("mini", "test")
    base_path = base or bundled_base()
    print_line(f"Measuring the base model on {len(test)} test records it has never seen ...")
    before = measure(load_instruction_model(base_path), test)
    print_line("Training multi_P_I on the bundled corpus, one pass ...")
    # A first look: half of the default's passes, at the rate that obeys best then.
    args = InstructionTrainingArguments(output_dir=str(output), overwrite=overwrite, num_train_epochs=1, learning_rate=3e-4)
    trainer = InstructionTrainer(base, args, *load_training_data("mini", records))
    report_progress(trainer)
    trainer.reopen()
    trainer.train()
    after = measure(load_instruction_model(output), test)
    minutes = (time.monotonic() - started) / 60
    measured = {"data": "mini", "data_on_hub": False, "split": "test", "records": len(test), **after.means()}
    measured |= {"per_type": after.per_type(), "base": before.means()}
    add_results(output, [measured])
    write_model_card(output)
    flips = flips_table(test, before, after)
    flips.save_picture(output / "flips.svg", "inf-embed demo")
    for table in (comparison_table(before, after), gain_table(before, after), flips):
        table.print()
    print_line(obedience(after, before))
    trainer.run_folder.remove_checkpoints()
    print_line()
    print_line(f"Done in {minutes:.1f} minutes; the model and its card are in {output}. Use it:")
    print_line()
    for line in (
        "from sentence_transformers_inf import load_instruction_model",
        f"model = load_instruction_model({json.dumps(str(output))})",
        'model.encode_query({"instruction": "For a ten-year-old.", "query": "why is the sky blue"})',
    ):
        print_line(f"    {line}", style="bold")
