"""Mining second passages at scale: memory beyond the index, throughput against bare FAISS, and whether it is linear.

    python benchmarks/mining.py --passages 500000 --pairs 100000

Texts are drawn from 50,000 words with Zipf's frequencies, vectors at random, so that nothing is downloaded or encoded.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np

from dataset_builder.mining import Miner, mine

_WORDS = np.array([f"w{number}" for number in range(50_000)])


def texts(generator: np.random.Generator, count: int, length: int) -> list[str]:
    shares = 1 / np.arange(1, len(_WORDS) + 1)
    found: list[str] = []
    while len(found) < count:
        rows = generator.choice(len(_WORDS), (min(10_000, count - len(found)), length), p=shares / shares.sum())
        found += [" ".join(row) for row in _WORDS[rows]]
    return found


def peak() -> float:
    """MiB of this process at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=4_000)
    parser.add_argument("--dimension", type=int, default=384)
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    passages = list(dict.fromkeys(texts(generator, arguments.passages, 60)))
    queries = texts(generator, arguments.pairs, 8)
    vectors = generator.standard_normal((len(passages), arguments.dimension), dtype=np.float32)
    index = vectors.nbytes / 2**20
    before = peak()
    started = time.perf_counter()
    miner = Miner(passages, vectors)
    print(f"{len(passages)} passages: index made in {time.perf_counter() - started:.0f} s, {index:.0f} MiB of vectors")

    def embed(batch: list[str]) -> np.ndarray:
        return np.random.default_rng(len(batch)).standard_normal((len(batch), arguments.dimension), dtype=np.float32)

    block, ratios = embed(queries[:512]), []
    bare = faiss.IndexFlatIP(arguments.dimension)
    bare.add(vectors)
    for _ in range(3):  # by turns
        started = time.perf_counter()
        miner.find(queries[:512], block, passages[:512])
        whole = time.perf_counter() - started
        started = time.perf_counter()
        bare.search(block, 50)
        ratios.append((time.perf_counter() - started) / whole)
    del bare, miner
    print(f"throughput of the search against bare FAISS: {sorted(ratios)[1]:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        started, half = time.perf_counter(), 0.0
        pairs = zip(queries, (passages[number % len(passages)] for number in range(len(queries))))
        for number, _ in enumerate(mine(Path(folder), pairs, len(queries), passages, lambda _: vectors, embed)):
            if number == len(queries) // 2:
                half = time.perf_counter() - started
        whole = time.perf_counter() - started
    print(f"{len(queries)} pairs in {whole:.0f} s; the first half in {half / whole:.2f} of it")
    print(f"peak memory: {peak() - before - index:.0f} MiB beyond index, vectors and texts")


if __name__ == "__main__":
    main()
