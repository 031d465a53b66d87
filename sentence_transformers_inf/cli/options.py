"""Options that several commands have."""

from typing import Annotated, Optional

import typer

DataOption = Annotated[
    str,
    typer.Option(help="InF-IR records: 'mini', a file, a folder, or a Hub dataset id."),
]
BaseOption = Annotated[
    Optional[str],
    typer.Option(help="Base model: a Hub id or a folder. Default: all-MiniLM-L6-v2, bundled with the demo."),
]
