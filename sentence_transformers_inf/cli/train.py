"""``inf-embed train`` and ``inf-embed ablate``.

The arguments of ``train`` are the fields of the training arguments, from a YAML file and the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sentence_transformers_inf.cli.checks import existing, need, output_folder
from sentence_transformers_inf.cli.display import Table, print_line, print_text, quiet
from sentence_transformers_inf.cli.interrupted import interrupted, left_of
from sentence_transformers_inf.cli.tables import obedience, trained_table
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
    from transformers.integrations import get_available_reporting_integrations

    from sentence_transformers_inf.cli.progress import measured, report_progress
    from sentence_transformers_inf.corpora import load_training_data, together
    from sentence_transformers_inf.hub.errors import claim_repo
    from sentence_transformers_inf.records import record_splits
    from sentence_transformers_inf.training import InstructionTrainer, RunFolder

    script, args = parse(context.args)
    quiet()
    output_folder(Path(str(args.output_dir)))
    if args.lora_r or (args.update == "queries" and args.lora_r is None and args.passage_embeddings is None):
        need("a LoRA", "peft")
    if missing := sorted({*args.report_to} - {"none", "all", *get_available_reporting_integrations()}):
        raise ImportError(f"--report-to {missing[0]}: it is not installed: pip install {missing[0]}")
    if args.push_to_hub:  # a refusal now and not after the training
        if args.hub_model_id is None:
            raise ValueError("--push-to-hub needs --hub-model-id user/name")
        claim_repo(args.hub_model_id, "model", public=args.hub_private_repo is False, token=args.hub_token)
    folder = RunFolder(str(args.output_dir))
    folder.check_outside(script.base, *script.data, args.passage_embeddings)
    with interrupted(lambda: left_of(folder)):
        sources = {source: load_training_data(source, script.max_records) for source in script.data}
        trainer = InstructionTrainer(script.base, args, *together(sources))
        is_main = trainer.is_world_process_zero()
        if is_main:
            for source, (_, held_out) in sources.items():
                if held_out is not None and "validation" not in record_splits(source):
                    print_line(
                        f"{source} has no split validation: {len(held_out)} records, about one in ten of its queries, "
                        "are held out of training to measure on"
                    )
            print_line(trainer.summary())
        with folder.held():
            trainer.reopen()
            before = measured(trainer)
            report_progress(trainer, before)
            trainer.train()
            after = measured(trainer)
            if before is not None and after is not None:
                trained_table(before, after).print()
                print_line(obedience(after, before))
            url = trainer.push_to_hub() if args.push_to_hub else None
            folder.remove_checkpoints()
    if is_main:
        measure = " and ".join(f"inf-embed evaluate {args.output_dir} --data {source}" for source in script.data)
        print_line(f"The model is in {args.output_dir}. Measure it: {measure}")
    if url is not None:
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
        def add_argument(self, *names: Any, **options: Any) -> Any:
            return super().add_argument(*names, **options | ({"action": _Listed} if options.get("nargs") == "+" else {}))

        def error(self, message: str) -> NoReturn:
            raise ValueError(f"{message} (inf-embed train --help lists the arguments)")

    return Parser(types, prog="inf-embed train", allow_abbrev=False, add_help=False)


class _Listed(argparse.Action):
    """A list's values, from however many options: none is left out, and all count before what a file says."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        earlier = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if earlier is self.default else earlier), *values])


def _print_help(everything: bool) -> None:
    if everything:
        print_text(_parser(_types()).format_help())
        return
    table = Table("argument", "meaning", title="inf-embed train [--config FILE] [ARGUMENTS]")
    own = [name for of_type in _types() for name in of_type.__annotations__]
    for entry in (entry for entry in _fields() if entry.name in own):
        table.add(", ".join(reversed(_names(entry))), entry.metadata["help"])
    table.print()
    print_line(
        "Every other argument of Sentence Transformers' and transformers' trainers works as well, for example "
        "--report-to wandb or --push-to-hub --hub-model-id user/name; --help-all lists them. --config reads arguments from "
        "a YAML file, by their names with underscores. After an interruption, the same command goes on where it stopped."
    )


def ablate(
    config: Annotated[Path, typer.Argument(help="A YAML file: data, evaluate, seeds, settings, grid, cells.")],
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for results and report; the same command goes on where it stopped.", callback=output_folder
        ),
    ],
) -> None:
    """Train and measure every cell of a grid, the baseline without instructions always among them."""
    existing([config])
    need("an ablation draws charts and", "matplotlib")
    from sentence_transformers_inf.cli.progress import report_progress
    from sentence_transformers_inf.training.ablation import read_config, run_ablation
    from sentence_transformers_inf.training.ablation_report import write_report

    quiet()
    ablation = read_config(config)
    with interrupted(lambda: f"what was measured is kept in {output}, and the same command goes on from there"):
        rows = run_ablation(ablation, output, print_line, report_progress)
    header, *lines = write_report(ablation, rows, output)
    table = Table(header[0], *(f">{name}" for name in header[1:]))
    for cells in lines:
        table.add(*cells)
    table.print()
    print_line(f"The table and the charts are in {output}")
