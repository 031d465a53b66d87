"""How fast the playground answers: one query at a time, and 20 clients at once over HTTP.

    python benchmarks/playground.py [--clients 20] [--queries 500]

The page stands on the bundled adapter and its base, and on 10,000 passages of the bundled corpus. The clients are Gradio's,
in a process of their own; each asks one query of the validation split with its instruction after the other, without a pause.
Then one query at a time is ranked on 100,000 passages, whose vectors are those of the 10,000 with noise, in a memory-mapped
file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
from report import at_most, report

from sentence_transformers_inf import load_records
from sentence_transformers_inf.passages import distinct_passages
from sentence_transformers_inf.playground.corpus import Corpus
from sentence_transformers_inf.playground.page import launch, page_of
from sentence_transformers_inf.playground.page import search as answer
from sentence_transformers_inf.playground.ranking import Ranker, load_rankers

SIZE = 10_000


def cases() -> list[tuple[str, str]]:
    """Queries and instructions that no passage was written for."""
    records = load_records("mini", "validation")
    return [
        (query, instruction)
        for side in ("positive", "negative")
        for query, instruction in zip(records["query_positive"], records[f"instruction_{side}"])
    ]


def ask(address: str, clients: int, queries: int) -> None:
    """Print, as JSON, the seconds that each of the queries took."""
    from gradio_client import Client

    asked = cases()

    def run(number: int) -> list[float]:
        client, seconds = Client(address, verbose=False), []
        for turn in range(number, queries, clients):
            start = time.perf_counter()
            shown = client.predict(*asked[turn % len(asked)], api_name="/search")
            seconds.append(time.perf_counter() - start)
            assert 'class="columns"' in shown
        return seconds

    with ThreadPoolExecutor(clients) as pool:
        print(json.dumps([second for part in pool.map(run, range(clients)) for second in part]))


def percentile(seconds: list[float]) -> float:
    """The 95th, in milliseconds."""
    return 1000 * statistics.quantiles(seconds, n=20)[-1]


def alone(rankers: list[Ranker], corpus: Corpus) -> list[float]:
    """The seconds that 100 queries take, one after the other, the page's HTML included."""
    seconds = []
    for query, instruction in cases()[:101]:
        start = time.perf_counter()
        answer(rankers, corpus, query, instruction)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def blank(passages: list[str]) -> Corpus:
    """A corpus without kinds, topics and examples."""
    return Corpus(passages, [""] * len(passages), [""] * len(passages))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    if options.ask:
        ask(options.ask, options.clients, options.queries)
        return
    passages = distinct_passages([load_records("mini", split) for split in ("test", "train", "validation")])[:SIZE]
    assert len(passages) == SIZE
    rankers = load_rankers(None, None, passages, show_progress=True)
    rows = [
        at_most("one query at a time, 10,000 passages, p95, ms", percentile(alone(rankers, blank(passages))), 200, ".0f")
    ]

    address = launch(page_of(rankers, blank(passages)), server_name="127.0.0.1", prevent_thread_lock=True)
    load = ["--clients", str(options.clients), "--queries", str(options.queries)]
    done = subprocess.run([sys.executable, __file__, "--ask", address, *load], capture_output=True, text=True, check=True)
    seconds = json.loads(done.stdout.splitlines()[-1])
    assert len(seconds) == options.queries
    rows.append(
        at_most(f"{options.clients} clients, {options.queries} queries, no error, p95, ms", percentile(seconds), 1000, ".0f")
    )

    many = [f"{passage} ({copy})" for copy in range(10) for passage in passages]
    noise = np.random.default_rng(0).normal(0, 0.02, (len(many), rankers[0].vectors.shape[1]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vectors.npy")
        np.save(path, (np.tile(rankers[0].vectors, (10, 1)) + noise).astype(np.float32))
        large = [Ranker(old.name, old.model, many, np.load(path, mmap_mode="r")) for old in rankers]
        rows.append(
            at_most("one query at a time, 100,000 passages, p95, ms", percentile(alone(large, blank(many))), 1000, ".0f")
        )
        del large
    report("playground", "Playground", rows)


if __name__ == "__main__":
    main()
