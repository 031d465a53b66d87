"""``inf-embed ablate``."""

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from sentence_transformers_inf.cli.tables import console, print_line


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
