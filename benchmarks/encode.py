"""What an instruction costs while serving: ratios of calls that are timed in turns, in one process.

    python benchmarks/encode.py [--rounds 7]

all-MiniLM-L6-v2 and the instructed queries of the bundled validation split, 32 at a time, unless said:

- instructed queries against `SentenceTransformer.encode` of the joined strings;
- instructed queries through an adapter's LoRA, unmerged or merged into a copy of the weights, against the base model's
  encoding of the joined strings, also 100 of them one by one;
- 1,000 queries under one instruction against the same without it, with attention (`gated`, which encodes the instruction
  of a batch once) and with concatenation.

Training does not change these times, so the adapters and the attention have fresh weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import datasets
from report import Row, at_most, report
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf import load_instruction_model, load_records
from sentence_transformers_inf.corpora import bundled_base
from sentence_transformers_inf.modules import adapter_tower, add_lora, copy_tower, encoder_of, merge_lora
from sentence_transformers_inf.training.arguments import ADAPTER_LORA_R


def ratio(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median over the rounds of the first call's time over the second's, and the quartiles; the calls take turns."""
    ratios = []
    for turn in range(rounds + 1):
        seconds = {}
        for call in (first, second) if turn % 2 else (second, first):
            start = time.perf_counter()
            call()
            seconds[call] = time.perf_counter() - start
        if turn:  # the first round warms up
            ratios.append(seconds[first] / seconds[second])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    datasets.disable_progress_bars()

    validation, train = load_records("mini", "validation"), load_records("mini", "train")
    pairs = [
        {"instruction": instruction, "query": query}
        for side in ("positive", "negative")
        for instruction, query in zip(validation[f"instruction_{side}"], validation["query_positive"])
    ]
    joined = [f"{pair['query']} {pair['instruction']}" for pair in pairs]
    queries = list(dict.fromkeys(train["query_positive"]))[:1000]
    instruction = validation["instruction_positive"][0]
    told = [{"instruction": instruction, "query": query} for query in queries]

    base = SentenceTransformer(bundled_base())
    model = load_instruction_model(bundled_base()).eval()
    gated = load_instruction_model(bundled_base(), interaction="gated").eval()
    bases = [load_instruction_model(bundled_base()) for _ in range(2)]
    lora, merged = (adapter_tower(base, copy_tower(base, share=True)).eval() for base in bases)
    for adapted in (lora, merged):
        add_lora(encoder_of(adapted)[0], ADAPTER_LORA_R)
    merge_lora(encoder_of(merged)[0])

    def encode(encoder: SentenceTransformer, texts: list) -> Callable[[], object]:
        return lambda: encoder.encode(texts, batch_size=32, show_progress_bar=False)

    def singly(encoder: SentenceTransformer, texts: list) -> Callable[[], object]:
        return lambda: [encoder.encode(text, show_progress_bar=False) for text in texts[:100]]

    cases = {
        "instructed / joined strings": (encode(model, pairs), encode(base, joined), 1.03),
        "adapter, LoRA unmerged / base": (encode(lora, pairs), encode(base, joined), 1.5),
        "adapter, LoRA unmerged / base, one by one": (singly(lora, pairs), singly(base, joined), 1.5),
        "adapter, LoRA merged / base": (encode(merged, pairs), encode(base, joined), None),
        "adapter, LoRA merged / base, one by one": (singly(merged, pairs), singly(base, joined), None),
        "1,000 queries, gated: 1 instruction / none": (encode(gated, told), encode(gated, queries), None),
        "1,000 queries, concatenation: 1 instruction / none": (encode(model, told), encode(model, queries), None),
    }
    rows = []
    for name, (first, second, bound) in cases.items():
        print(name, "...", flush=True)
        middle, low, high = ratio(first, second, options.rounds)
        measure = f"time, {name} (quartiles {low:.2f} to {high:.2f})"
        rows.append(at_most(measure, middle, bound) if bound else Row(measure, f"{middle:.2f}"))
    report("encode", "Encoding", rows)


if __name__ == "__main__":
    main()
