"""``inf-ir repair``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dataset_builder.cli.options import console


def repair(output: Annotated[Path, typer.Argument(help="Folder of a build whose ledger is damaged.")]) -> None:
    """Save what can be read of a damaged ledger; the damaged file is kept."""
    import sqlite3

    from dataset_builder.ledger import Ledger, LedgerError, repair_ledger

    found = sorted((output / "work").glob("**/ledger.sqlite"))
    if not found:
        raise FileNotFoundError(f"{output}: there is no ledger in this folder")
    for path in found:
        try:
            Ledger(path).close()
            console.print(f"{path}: nothing is wrong with it", markup=False)
        except (LedgerError, sqlite3.Error):
            saved, aside = repair_ledger(path)
            console.print(f"{path}: {saved} answers saved; the damaged file is now {aside.name}", markup=False)
