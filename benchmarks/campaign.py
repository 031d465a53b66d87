"""Builds under faults, kills and a second builder: ``python benchmarks/campaign.py [--pairs 300] [--kills 20]``.

With ``--corpus``, a folder in BEIR's layout: pairs are its judged queries, and their second passages are mined from it.

Live and through the Batch API, against the tests' scripted server: a build that nothing disturbs, and one that two builders
at a time begin at random moments and that is killed so many times. Prints what the server counted; ends with an error if the
outputs differ in a byte, more was paid twice than was in flight at the deaths, or the budget was exceeded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONCURRENCY = 16
COST = 0.01
"""US dollars that a build may cost for each pair."""


def build(program: list[object], output: Path, url: str, options: list[object]) -> subprocess.CompletedProcess[str]:
    words = ["build", "--output", output, "--base-url", url, "--concurrency", CONCURRENCY, *options]
    environment = os.environ | {"OPENAI_API_KEY": "none", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *map(str, [*program, *words])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode or "Traceback" in done.stderr:
        sys.exit(f"the build failed (exit status {done.returncode}):\n{done.stderr[-3000:]}")
    return done


def measure(folder: Path, source: Path, kills: int, batch: bool, corpus: Path | None) -> dict[str, object]:
    from tests.campaign import check
    from tests.llm_server import Server

    most = COST * sum(1 for _ in source.open(encoding="utf-8"))
    options: list[object] = ["--pairs", source, "--max-cost", most, "--max-failed", 0.5, "--timeout", 2]
    options += ["--batch", "--batch-poll", 0.2] if batch else []
    options += ["--passages", "mined", "--corpus", corpus] if corpus else []
    folder.mkdir()
    servers = [Server(folder / name, *([] if batch else ["--faults", "--latency", "0.3"])) for name in ("calm", "storm")]
    try:
        started = time.perf_counter()
        build(["dataset_builder.cli"], folder / "undisturbed", servers[0].url, options)
        program = ["tests.campaign", kills, 0, 20 if corpus else 1.5]  # first the corpus is embedded
        said = build(program, folder / "out", servers[1].url, options).stdout.splitlines()
        ended = json.loads(next(line for line in said if line.startswith("{")))
        factor, deaths = (0.5, 0) if batch else (1.0, ended["-9"])  # an answer of the Batch API can be fetched again
        found = check(folder / "out", folder / "undisturbed", servers[1], deaths, 3 * CONCURRENCY, most, factor)
        return {"seconds": round(time.perf_counter() - started), "builders by exit status": ended, **found}
    finally:
        for server in servers:
            server.stop()


def bundled() -> Iterator[dict[str, str]]:
    from sentence_transformers_inf import load_records

    for record in load_records("mini", "train"):
        yield {"id": record["id"], "query": record["query_positive"], "passage": record["document"]}


def judged(folder: Path) -> Iterator[dict[str, str]]:
    from sentence_transformers_inf.corpora import passage_of
    from sentence_transformers_inf.reading import read_qrels, read_table

    passages = {row["_id"]: passage_of(row, where) for where, row in read_table(folder / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for _, row in read_table(folder / "queries.jsonl")}
    first: dict[str, str] = {}
    for _, query, passage, score in read_qrels(folder / "qrels.tsv"):
        if score > 0:
            first.setdefault(query, passage)
    for query, passage in first.items():
        yield {"id": query, "query": queries[query], "passage": passages[passage]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--only", choices=("live", "batch"))
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "pairs.jsonl")
        with source.open("w", encoding="utf-8") as file:
            for row in islice(judged(options.corpus) if options.corpus else bundled(), options.pairs):
                file.write(json.dumps(row) + "\n")
        for kind in (options.only,) if options.only else ("live", "batch"):
            found = measure(Path(name, kind), source, options.kills, kind == "batch", options.corpus)
            print(kind, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
