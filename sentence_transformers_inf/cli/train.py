"""``inf-embed train`` and ``inf-embed ablate``.

The arguments of ``train`` are the fields of the training arguments, from a YAML file and the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sentence_transformers_inf.cli.tables import console, print_line
from sentence_transformers_inf.recipe import read_yaml

if TYPE_CHECKING:
    from sentence_transformers_inf.training import InstructionTrainingArguments
    from sentence_transformers_inf.training.arguments import ScriptArguments

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""For Typer: the arguments are parsed here."""


def train(context: typer.Context) -> None:
    """Train a model; after an interruption, the same command goes on where it stopped."""
    if "--help" in context.args or "--help-all" in context.args:
        _print_help(everything="--help-all" in context.args)
        return
    from sentence_transformers_inf.corpora import load_training_data
    from sentence_transformers_inf.hub.errors import claim_repo
    from sentence_transformers_inf.records import record_splits
    from sentence_transformers_inf.training import InstructionTrainer

    script, args = parse(context.args)
    if args.push_to_hub:  # a refusal now and not after the training
        if args.hub_model_id is None:
            raise ValueError("--push-to-hub needs --hub-model-id user/name")
        claim_repo(args.hub_model_id, "model", public=args.hub_private_repo is False, token=args.hub_token)
    records, validation = load_training_data(script.data, script.max_records)
    trainer = InstructionTrainer(script.base, args, records, validation)
    is_main = trainer.is_world_process_zero()
    if is_main:
        if validation is not None and "validation" not in record_splits(script.data):
            print_line(
                f"{script.data} has no split validation: {len(validation)} records, about one in ten of its queries, are "
                "held out of training to measure on"
            )
        print_line(trainer.summary())
    trainer.train()
    trainer.run_folder.remove_checkpoints()
    if is_main:
        print_line(
            f"\nThe model is in {args.output_dir}. Measure it: inf-embed evaluate {args.output_dir} --data {script.data}"
        )
    if args.push_to_hub:
        url = trainer.push_to_hub()
        if is_main:
            print_line(f"Pushed: {url}")


def parse(arguments: list[str]) -> tuple[ScriptArguments, InstructionTrainingArguments]:
    """The arguments of a run from a command line; what stands there counts before what ``--config`` names.

    Raises:
        ValueError: An argument that there is not, or a value that cannot be; the message names it.
        FileNotFoundError: There is no such configuration.
    """
    before = _parser([])
    before.add_argument("--config", type=Path)
    given, rest = before.parse_known_args(arguments)
    parser = _parser(_types())
    if given.config is not None:
        config = read_yaml(given.config)
        names = {entry.name for entry in _fields()}
        if unknown := sorted(str(name) for name in config if name not in names):
            raise ValueError(f"{given.config}: there is no argument {unknown[0]!r} (inf-embed train --help-all lists all)")
        parser.set_defaults(**config)
    script, args, unknown = parser.parse_args_into_dataclasses(rest, look_for_args_file=False, return_remaining_strings=True)
    if unknown:
        known = [name for entry in _fields() for name in _names(entry)]
        similar = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        parser.error(f"there is no argument {unknown[0]}" + (f"; did you mean {similar[0]}?" if similar else ""))
    return script, args


def _types() -> list[Any]:
    from sentence_transformers_inf.training import InstructionTrainingArguments
    from sentence_transformers_inf.training.arguments import ScriptArguments

    return [ScriptArguments, InstructionTrainingArguments]


def _fields() -> list[dataclasses.Field[Any]]:
    return [entry for of_type in _types() for entry in dataclasses.fields(of_type)]


def _names(entry: dataclasses.Field[Any]) -> list[str]:
    return [f"--{entry.name.replace('_', '-')}", *entry.metadata.get("aliases", ())]


def _parser(types: list[Any]) -> Any:
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(f"{message} (inf-embed train --help lists the arguments)")

    return Parser(types, prog="inf-embed train", allow_abbrev=False, add_help=False)


def _print_help(everything: bool) -> None:
    from rich.table import Table

    if everything:
        print_line(_parser(_types()).format_help())
        return
    table = Table(title="inf-embed train [--config FILE] [ARGUMENTS]", title_justify="left", show_header=False, box=None)
    own = [name for of_type in _types() for name in of_type.__annotations__]
    for entry in (entry for entry in _fields() if entry.name in own):
        table.add_row(", ".join(reversed(_names(entry))), entry.metadata["help"])
    console.print(table)
    print_line(
        "\nEvery other argument of Sentence Transformers' and transformers' trainers works as well, for example "
        "--report-to wandb or --push-to-hub --hub-model-id user/name; --help-all lists them. --config reads arguments from "
        "a YAML file, by their names with underscores. After an interruption, the same command goes on where it stopped."
    )


def ablate(
    config: Annotated[Path, typer.Argument(help="A YAML file: data, evaluate, seeds, settings, grid, cells.")],
    output: Annotated[Path, typer.Option(help="Folder for results and report; the same command goes on where it stopped.")],
) -> None:
    """Train and measure every cell of a grid, the baseline without instructions always among them."""
    import datasets
    from rich.markdown import Markdown

    from sentence_transformers_inf.training.ablation import read_config, run_ablation
    from sentence_transformers_inf.training.ablation_report import write_report

    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the charts need matplotlib: pip install 'sentence-transformers-inf[eval]'")
    datasets.disable_progress_bars()
    ablation = read_config(config)
    rows = run_ablation(ablation, output, lambda line: console.print(line, markup=False), show_progress=sys.stderr.isatty())
    console.print(Markdown(write_report(ablation, rows, output)))
    print_line(f"The table and the charts are in {output}")
