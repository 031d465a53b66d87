"""What several commands share: exit statuses and options."""

from typing import Annotated, Optional

import typer

from sentence_transformers_inf.cli.checks import finite, server

FAILED, CANNOT, BUDGET = 1, 2, 3
"""Exit statuses: more failures than ``--max-failed``; the run cannot go on; a limit on cost or requests was reached."""

MOST = 2**63 - 1
"""The highest bound on a number of rows."""

Records = Annotated[str, typer.Argument(help="InF-IR records: 'mini', a file, a folder, or a Hub dataset id.")]
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")  # OpenAI's


def _effort(name: str) -> str:
    if name not in _EFFORTS:
        raise typer.BadParameter(f"{name!r} is no effort; there are {', '.join(_EFFORTS)}")
    return name


Effort = Annotated[str, typer.Option(help="Reasoning effort of a reasoning model.", callback=_effort)]
Reasoning = Annotated[
    Optional[list[str]],
    typer.Option(help="A model that thinks before it answers and is not known to; may be repeated.", metavar="MODEL"),
]
BaseUrl = Annotated[
    Optional[str],
    typer.Option(help="An OpenAI-compatible server, as vLLM or Ollama.", envvar="OPENAI_BASE_URL", callback=server),
]
PriceList = Annotated[
    Optional[list[str]], typer.Option(help="MODEL=INPUT,OUTPUT in dollars per million tokens; may be repeated.")
]
Concurrency = Annotated[int, typer.Option(help="Requests in flight.", min=1, max=10_000)]
MaxCost = Annotated[
    Optional[float], typer.Option(help="Most dollars for what is written, all runs together.", min=0, callback=finite)
]
