"""What `inf-embed serve` costs: 20 clients on loopback against a bare `encode`, in turns, in one run.

    python benchmarks/serve.py [--rounds 3] [--quantize]

2,000 requests of one text each: bundled instructed queries and passages, in turns. The server is a process of its own with
the adapter that ships; with ``--quantize``, its export to ONNX in int8. Bare: `encode_query` and `encode_document` of the
same texts in this process, 32 at a time, each sorted by length as a whole.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import datasets
import numpy as np
from report import Row, at_least, at_most, report

from sentence_transformers_inf import load_instruction_model, load_records
from sentence_transformers_inf.export import export_model
from sentence_transformers_inf.modules.loading import BUNDLED_ADAPTER
from sentence_transformers_inf.records import PASSAGE_COLUMNS

CLIENTS, REQUESTS = 20, 2000


def bodies() -> list[dict[str, Any]]:
    """The requests: a query and a passage in turns."""
    queries, passages = [], []
    for split in ("test", "validation", "train"):
        for record in load_records("mini", split):
            for side in ("positive", "negative"):
                told = {"input": record["query_positive"], "instruction": record[f"instruction_{side}"]}
                queries.append(told | {"input_type": "query"})
            passages.extend({"input": record[name], "input_type": "document"} for name in PASSAGE_COLUMNS)
    half = REQUESTS // 2
    return list(itertools.chain.from_iterable(zip(queries[:half], passages[:half])))


async def ask(url: str, requests: list[dict[str, Any]]) -> tuple[float, list[float]]:
    """Seconds that all requests take, and each of them, by clients that ask one after the other."""
    waiting, latencies = iter(requests), []

    async def client(session: aiohttp.ClientSession) -> None:
        for body in waiting:
            start = time.perf_counter()
            async with session.post(f"{url}/embeddings", json=body | {"encoding_format": "base64"}) as response:
                answer = await response.read()
                assert response.status == 200, answer
            latencies.append(time.perf_counter() - start)

    async with aiohttp.ClientSession() as session:
        start = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
        return time.perf_counter() - start, latencies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantize", action="store_true")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    requests = bodies()
    assert len(requests) == REQUESTS
    queries = [{"query": body["input"], "instruction": body["instruction"]} for body in requests[::2]]
    passages = [body["input"] for body in requests[1::2]]
    command = [sys.executable, "-m", "sentence_transformers_inf.cli", "serve", "--port", "0"]
    if options.quantize:
        folder = tempfile.TemporaryDirectory()
        export_model(BUNDLED_ADAPTER, Path(folder.name, "export"), "onnx", quantize=True)
        model = load_instruction_model(Path(folder.name, "export"), backend="onnx")
        command.append(f"{folder.name}/export")
    else:
        model = load_instruction_model()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    shares, latencies, bare_rates, rates = [], [], [], []
    try:
        assert server.stdout is not None
        url = re.search(r"http\S+", server.stdout.readline()).group()  # type: ignore[union-attr]
        asyncio.run(ask(url, requests[:200]))
        model.encode_document(passages[:200])
        for _ in range(options.rounds):
            start = time.perf_counter()
            model.encode_query(queries, batch_size=32)
            model.encode_document(passages, batch_size=32)
            bare = time.perf_counter() - start
            served, of_round = asyncio.run(ask(url, requests))
            shares.append(bare / served)
            bare_rates.append(REQUESTS / bare)
            rates.append(REQUESTS / served)
            latencies.extend(of_round)
            print(f"bare {bare:.1f} s, served {served:.1f} s", flush=True)
    finally:
        server.terminate()
        server.wait()
    p50, p95 = (1000 * float(np.percentile(latencies, share)) for share in (50, 95))
    rows = [
        Row("texts per second, bare encode", f"{statistics.median(bare_rates):.0f}"),
        Row("texts per second, served", f"{statistics.median(rates):.0f}"),
        at_least("served / bare", statistics.median(shares), 0.8),
        Row("milliseconds, median", f"{p50:.0f}"),
        at_most("milliseconds, 95th percentile", p95, 300, ".0f"),
    ]
    name = f"Serving{' in int8' if options.quantize else ''}, {CLIENTS} clients, {options.rounds} times {REQUESTS} requests"
    report("serve-int8" if options.quantize else "serve", name, rows)


if __name__ == "__main__":
    main()
