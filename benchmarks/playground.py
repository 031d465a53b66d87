"""How fast the playground answers: one query at a time, and 20 clients at once over HTTP.

    python benchmarks/playground.py [--clients 20] [--queries 500]

The page stands on the shipped adapter and its base. The passages are those of the bundled test split, copied until they are
10,000 and 100,000, their vectors with noise, in a memory-mapped file: what is timed does not depend on what they say. The
clients are in a process of their own and call the page's API. Each asks one query of the validation split with its
instruction after the other, without a pause.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import datasets
import numpy as np
from report import at_most, report

from sentence_transformers_inf import load_records
from sentence_transformers_inf.playground.corpus import Corpus, read_corpus
from sentence_transformers_inf.playground.page import launch, page_of
from sentence_transformers_inf.playground.page import search as answer
from sentence_transformers_inf.playground.ranking import Ranker, load_rankers


def cases() -> list[tuple[str, str]]:
    """Queries and instructions that no passage was written for."""
    records = load_records("mini", "validation")
    return [
        (query, instruction)
        for side in ("positive", "negative")
        for query, instruction in zip(records["query_positive"], records[f"instruction_{side}"])
    ]


async def ask(address: str, clients: int, queries: int) -> None:
    """Print, as JSON, the seconds that each of the queries took."""
    asked, turns, seconds = cases(), iter(range(queries)), []

    async def run(session: aiohttp.ClientSession) -> None:
        for turn in turns:
            start = time.perf_counter()
            async with session.post("search", json={"data": asked[turn % len(asked)]}) as response:
                event = (await response.json())["event_id"]
            async with session.get(f"search/{event}") as response:
                shown = await response.text()
            seconds.append(time.perf_counter() - start)
            assert "event: complete" in shown, shown
            assert 'class=\\"columns\\"' in shown, shown  # in JSON

    async with aiohttp.ClientSession(f"{address}gradio_api/call/") as session:
        await asyncio.gather(*(run(session) for _ in range(clients)))
    print(json.dumps(seconds))


def p95(seconds: list[float]) -> float:
    """The 95th, in milliseconds."""
    return 1000 * statistics.quantiles(seconds, n=20)[-1]


def alone(rankers: list[Ranker], corpus: Corpus) -> list[float]:
    """The seconds that 100 queries take, one after the other, the page's HTML included."""
    seconds = []
    for query, instruction in cases()[:101]:
        start = time.perf_counter()
        answer(rankers, corpus, [query], [instruction])
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def grown(rankers: list[Ranker], passages: list[str], size: int, folder: str) -> tuple[list[Ranker], Corpus]:
    """The same models on so many passages."""
    copies = -(-size // len(passages))
    texts = [f"{passage} ({copy})" for copy in range(copies) for passage in passages][:size]
    vectors = np.tile(rankers[0].vectors, (copies, 1))[:size]
    path = Path(folder, f"{size}.npy")
    np.save(path, (vectors + np.random.default_rng(0).normal(0, 0.02, vectors.shape)).astype(np.float32))
    corpus = Corpus(texts, [""] * size, [""] * size)
    return [Ranker(old.name, old.model, texts, np.load(path, mmap_mode="c")) for old in rankers], corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    if options.ask:
        asyncio.run(ask(options.ask, options.clients, options.queries))
        return
    passages = read_corpus("mini").passages
    known, rows = load_rankers(None, None, passages), []
    with tempfile.TemporaryDirectory() as folder:
        for size, bound in ((10_000, 200), (100_000, 1000)):
            rankers, corpus = grown(known, passages, size, folder)
            rows.append(
                at_most(f"one query at a time, {size:,} passages, p95, ms", p95(alone(rankers, corpus)), bound, ".0f")
            )
            if size > 10_000:
                continue
            address = launch(page_of(rankers, corpus), server_name="127.0.0.1", prevent_thread_lock=True)
            load = ["--clients", str(options.clients), "--queries", str(options.queries)]
            command = [sys.executable, __file__, "--ask", address, *load]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            seconds = json.loads(done.stdout.splitlines()[-1])
            assert len(seconds) == options.queries
            measure = f"{options.clients} clients, {options.queries} queries, {size:,} passages, no error, p95, ms"
            rows.append(at_most(measure, p95(seconds), 1000, ".0f"))
    report("playground", "Playground", rows)


if __name__ == "__main__":
    main()
