"""What the diversity measures cost on as many vectors and texts as `inf-ir analyze` samples, each in a process of its own.

    python benchmarks/diversity.py [--number 10000] [--alike 100000] [--json FILE]

``--alike`` is for the search for near duplicates: so many passages of 84 words that share six of seven words.
Prints the seconds, and the peak memory beyond what the process had before the measure was called, its input included.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from dataset_builder.diversity import average_pairwise_similarity, count_ngrams
from dataset_builder.quality import Duplicates

WORDS = 50_000
"""Size of the vocabulary of the texts, drawn by Zipf's law, 20 words each."""


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, number: int) -> dict[str, float]:
    """Run one of the measures here."""
    generator = np.random.default_rng(0)
    if name == "APS":
        vectors = np.empty((number, 384), dtype=np.float32)
        for start in range(0, number, 10_000):
            vectors[start : start + 10_000] = generator.standard_normal(vectors[start : start + 10_000].shape)
        before, started = peak_mib(), time.perf_counter()
        value = average_pairwise_similarity(vectors)
    elif name == "alike":
        before, started = peak_mib(), time.perf_counter()
        duplicates = Duplicates()
        for text in range(number):
            words = (f"word{place}" if place % 7 else f"own{text}x{place}" for place in range(84))
            duplicates.add(str(text), " ".join(words))
        value = number
    else:
        vocabulary = [f"word{index}" for index in range(WORDS)]
        before, started = peak_mib(), time.perf_counter()
        texts = (
            " ".join(vocabulary[index] for index in row)
            for _ in range(0, number, 1000)
            for row in np.minimum(generator.zipf(1.2, (min(1000, number), 20)), WORDS) - 1
        )
        value = count_ngrams(texts, int(name[-1])).inter_sample_frequency
    return {"value": value, "seconds": time.perf_counter() - started, "MiB": peak_mib() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--alike", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.number)))
        return
    machine = f"{platform.machine()}, {time.strftime('%Y-%m-%d')}"
    table = Table(
        title=f"{options.number:,} vectors of 384 dimensions, or texts of 20 words; {machine}", title_justify="left"
    )
    for column in ("measure", "seconds", "MiB beyond the input"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    report = {}
    for name in ("APS", "INGF-1", "INGF-2", "INGF-3", "alike"):
        number = options.alike if name == "alike" else options.number
        command = [sys.executable, __file__, "--number", str(number), "--only", name]
        report[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        table.add_row(name, f"{report[name]['seconds']:.1f}", f"{report[name]['MiB']:.0f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "number": options.number, **report}, indent=2) + "\n")


if __name__ == "__main__":
    main()
