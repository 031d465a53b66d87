"""``inf-embed export``."""

from pathlib import Path
from typing import Annotated

import typer

from sentence_transformers_inf.cli.checks import output_folder
from sentence_transformers_inf.cli.display import print_line, quiet


def export(
    model: Annotated[str, typer.Argument(help="A checkpoint or an adapter: a Hub id or a folder.")],
    format: Annotated[str, typer.Option(help="What to write: merged, onnx, openvino or vllm.")],
    output: Annotated[Path, typer.Option(help="Folder for the export.", callback=output_folder)],
    quantize: Annotated[bool, typer.Option("--quantize", help="With onnx: int8, smaller and faster.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the export that is in the folder.")] = False,
) -> None:
    """Write a model as other servers load it, and check that it embeds as before."""
    from sentence_transformers_inf.export import export_model

    quiet()
    settings = export_model(model, output, format, quantize=quantize, overwrite=overwrite)
    parity = settings["parity"]
    print_line(
        f"{parity['texts']} texts against the model: largest difference {parity['largest_difference']:.1e}, top-10 overlap "
        f"{parity['top_10_overlap']:.3f} over the bundled passages"
    )
    print_line(f"The export is in {output}; its README.md has the commands.")
