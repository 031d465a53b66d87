"""The third step of a build: the dataset and the report, from the ledgers of all tasks."""

import csv
import heapq
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from dataset_builder import stages
from dataset_builder.files import locked, parquet_writer
from dataset_builder.inf_ir import KEPT_FEATURES, UNFILTERED_FEATURES
from dataset_builder.ledger import Ledger, ledger_path
from dataset_builder.prepare import Settings, read_build, read_prepared
from dataset_builder.prices import Prices
from sentence_transformers_inf.escaping import markdown_environment
from sentence_transformers_inf.recipe import replacing, write_whole


def export(folder: Path, settings: Settings, prices: Prices, tasks: int = 1) -> dict[str, Any]:
    """Write the dataset and the report of a build from the ledgers of all its tasks.

    Returns:
        The report. ``kept``, ``rejected``, ``failed`` and ``unfinished`` add up to ``pairs``.

    Raises:
        BlockingIOError: Another process is at work in the folder.
        FileNotFoundError: The ledger of a task is missing.
        LedgerError: A ledger is damaged, or a task is at work on it.
    """
    paths = [ledger_path(folder, rank, tasks) for rank in range(tasks)]
    for rank, path in enumerate(paths):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: task {rank} of {tasks} has not run, run the same command again")
    with locked(folder), ExitStack() as stack:
        build = read_build(folder)["build"]
        ledgers = [stack.enter_context(closing(Ledger(path, build))) for path in paths]
        counted = _write_outcomes(folder, _outcomes(folder, ledgers))
        usage: dict[str, Counter[str]] = {}
        for ledger in ledgers:
            for model, total in ledger.totals().items():
                usage.setdefault(model, Counter()).update(total)
        report = {
            **counted,
            "usage": usage,
            "cost": sum(total["cost"] for total in usage.values()),
            "prices_as_of": prices.as_of,
            "settings": asdict(settings),
            "prompts": stages.prompt_hashes(),
        }
        write_whole(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        template = (resources.files("dataset_builder") / "report.md").read_text(encoding="utf-8")
        environment = markdown_environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
        write_whole(folder / "report.md", environment.from_string(template).render(report))
    return report


def _outcomes(folder: Path, ledgers: Sequence[Ledger]) -> Iterator[dict[str, Any]]:
    """All pairs in order, with how they ended."""
    ended = heapq.merge(*(ledger.outcomes() for ledger in ledgers), key=lambda outcome: outcome.position)
    following = next(ended, None)
    for position, pair in read_prepared(folder):
        if pair["duplicate_of"] is not None:
            yield {"id": pair["id"], "status": "rejected", "reason": pair["duplicate_of"]}
        elif following is not None and following.position == position:
            yield {**following.record, "id": pair["id"], "status": following.status, "reason": following.reason}
            following = next(ended, None)
        else:
            yield {"id": pair["id"], "status": "unfinished", "reason": ""}


def _write_outcomes(folder: Path, outcomes: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Write the tables of kept and of complete tuples, and ``outcomes.csv``; returns the report's counts."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    types: dict[str, Counter[str]] = {}
    (folder / "unfiltered").mkdir(exist_ok=True)
    with ExitStack() as stack:
        write_kept = stack.enter_context(parquet_writer(folder / "train.parquet", KEPT_FEATURES))
        write_complete = stack.enter_context(parquet_writer(folder / "unfiltered" / "train.parquet", UNFILTERED_FEATURES))
        part = stack.enter_context(replacing(folder / "outcomes.csv"))
        writer = csv.writer(stack.enter_context(part.open("w", encoding="utf-8", newline="")))
        writer.writerow(("id", "status", "reason"))
        for outcome in outcomes:
            writer.writerow((outcome["id"], outcome["status"], outcome["reason"]))
            counts[outcome["status"]] += 1
            if outcome["status"] in ("rejected", "failed"):
                duplicate = outcome["reason"].split("duplicate of ")
                reasons[f"{duplicate[0]}duplicate" if len(duplicate) == 2 else outcome["reason"]] += 1
            if outcome["status"] == "kept":
                write_kept(outcome)
            if "document" in outcome:
                write_complete(outcome)
                types.setdefault(outcome["instruction_type"], Counter())[outcome["status"]] += 1
    return {
        **{status: counts[status] for status in ("kept", "rejected", "failed", "unfinished")},
        "pairs": sum(counts.values()),
        "reasons": dict(reasons.most_common()),
        "per_type": {name: {"tuples": sum(ends.values()), "kept": ends["kept"]} for name, ends in sorted(types.items())},
    }
