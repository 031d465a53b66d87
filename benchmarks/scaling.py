"""What a batch costs as it grows, and how two processes share it.

    python benchmarks/scaling.py [--largest 256]

- sequences that are encoded at 4, 16 and 64 records a step with 2 sampled candidates, against the scheme that encodes every
  combination of the batch's instructions and queries; and both losses where they must be equal, with their times;
- seconds per record and peak memory of the cached loss, the same records in steps of 8 to 256, each in its own process;
- two gloo processes on half a batch each against one on the whole: the loss and the sequences each encodes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed
import torch.multiprocessing
from report import Row, at_least, at_most, peak_mib, report
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf import load_instruction_model, load_records, training_dataset
from sentence_transformers_inf.corpora import bundled_base
from sentence_transformers_inf.losses import (
    CachedInstructionContrastiveLoss,
    InstructionContrastiveLoss,
    instruction_contrastive_loss,
)


def fresh_model() -> SentenceTransformer:
    """The base model in training, without the randomness of dropout."""
    model = load_instruction_model(bundled_base()).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def columns(model: SentenceTransformer, records: int, start: int = 0) -> list[dict[str, Any]]:
    view = training_dataset(load_records("mini", "train").shuffle(seed=0).select(range(start, start + records)))
    return [model.preprocess(view[name][:]) for name in view.column_names]


def quadratic_loss(model: SentenceTransformer, records: int) -> tuple[torch.Tensor, int]:
    """P + I with every instruction of the batch as a candidate, from the formula: each row's query is encoded under all R
    instructions, the row's own once more. Returns the loss and how many sequences were encoded."""
    view = training_dataset(load_records("mini", "train").shuffle(seed=0).select(range(records)))
    rows = [row[name] for row in view for name in view.column_names[:3]]
    texts = [row[name] for row in view for name in view.column_names[3:]]
    instructions = [row["instruction"] for row in rows]
    pairs = [{"instruction": other, "query": row["query"]} for row in rows for other in instructions]

    def encoded(inputs: list) -> torch.Tensor:
        parts = [inputs[start : start + 32] for start in range(0, len(inputs), 32)]
        return torch.cat([model(model.preprocess(part))["sentence_embedding"] for part in parts])

    queries, passages = encoded(rows), encoded(texts)
    candidates = torch.cat([queries[:, None], encoded(pairs).view(len(rows), len(rows), -1)], dim=1)
    keys = [(row["instruction"], row["query"]) for row in rows]
    same = [[a == b or p == q for b, q in zip(keys, texts)] for a, p in zip(keys, texts)]
    right = {(*key, text) for key, text in zip(keys, texts)}
    mask = [
        [False, *((other, query) == (own, query) or (other, query, text) in right for other in instructions)]
        for (own, query), text in zip(keys, texts)
    ]
    seen: list[list[bool]] = []
    for number, row in enumerate(mask):  # an instruction that two rows have is one candidate
        known: set[str] = set()
        seen.append([False])
        for other, masked in zip(instructions, row[1:]):
            seen[number].append(masked or other in known)
            known.add(other)
    loss = instruction_contrastive_loss(
        queries, passages, candidates, not_negative=torch.tensor(same), not_candidate=torch.tensor(seen)
    )
    return loss, len(rows) + len(texts) + len(pairs)


def steps_of(records: int, total: int) -> dict[str, float]:
    """Seconds per record and peak memory of cached steps of ``records`` over the first ``total``, in this process."""
    model = fresh_model()
    loss = CachedInstructionContrastiveLoss(model, mini_batch_size=32)
    loss(columns(model, 8)).backward()  # warms up
    start = time.perf_counter()
    for first in range(0, total, records):
        model.zero_grad()
        loss(columns(model, records, first)).backward()
    return {"seconds": (time.perf_counter() - start) / total, "MiB": peak_mib()}


def process(rank: int, size: int, records: int, address: str, output: str) -> None:
    """One of ``size`` processes on its share of a batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=size)
    datasets.disable_progress_bars()
    model = fresh_model()
    loss = InstructionContrastiveLoss(model, gather_across_devices=size > 1)
    value = loss(columns(model, records // size, rank * (records // size)))
    torch.distributed.all_reduce(value.data)
    report = {"loss": value.item() / size, **loss.last_step_stats}
    Path(output, f"{size}-{rank}.json").write_text(json.dumps(report), encoding="utf-8")
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=256)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    if options.only:
        print(json.dumps(steps_of(options.only, options.largest)))
        return
    rows: list[Row] = []
    details: dict[str, Any] = {}

    model = fresh_model()
    for records, fewer in ((4, 2), (16, 8), (64, 30)):
        loss = InstructionContrastiveLoss(model, sampled_instructions=2)
        with torch.no_grad():
            loss(columns(model, records))
        ours, every = loss.last_step_stats["sequences"], 6 * records + (3 * records) ** 2
        details[f"sequences at {records}"] = {"encoded": ours, "quadratic": every}
        rows.append(Row(f"{records} records: sequences, and all combinations", f"{ours} and {every}"))
        rows.append(at_least(f"{records} records: times fewer sequences", every / ours, fewer, ".1f"))
    everything = InstructionContrastiveLoss(model, sampled_instructions=10**6)
    for records in (4, 8):
        start = time.perf_counter()
        value = everything(columns(model, records))
        value.backward()
        middle = time.perf_counter()
        other, _ = quadratic_loss(model, records)
        other.backward()
        seconds = (middle - start, time.perf_counter() - middle)
        details[f"all candidates at {records}"] = {"loss": [value.item(), other.item()], "seconds": seconds}
        losses = f"{value.item():.5f} and {other.item():.5f}"
        rows.append(Row(f"{records} records, all candidates: loss, and by the formula", losses))
        rows.append(Row(f"{records} records, all candidates: step time / by the formula", f"{seconds[0] / seconds[1]:.2f}"))

    sizes = (8, 64, options.largest)
    cached = {}
    for records in sizes:
        print(f"{options.largest} records in steps of {records} ...", flush=True)
        command = [sys.executable, __file__, "--only", str(records), "--largest", str(options.largest)]
        cached[records] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    details["cached"] = cached
    for key, form, measure, bound in (
        ("seconds", ".2f", "seconds per record", 1.1),
        ("MiB", ".0f", "MiB at the peak", 1.15),
    ):
        values = [cached[records][key] for records in sizes]
        named = ", ".join(f"{value:{form}}" for value in values)
        rows.append(Row(f"steps of {', '.join(map(str, sizes))} records, cached: {measure}", named))
        rows.append(at_most(f"steps of {sizes[-1]} / of 8, cached: {measure}", values[-1] / values[0], bound))

    with tempfile.TemporaryDirectory() as folder:
        for size in (1, 2):
            torch.multiprocessing.spawn(process, (size, 16, f"{folder}/store-{size}", folder), nprocs=size)
        whole = json.loads(Path(folder, "1-0.json").read_text(encoding="utf-8"))
        halves = [json.loads(Path(folder, f"2-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    shares = [half["real_tokens"] / whole["real_tokens"] for half in halves]
    details["two processes"] = {"loss": [whole["loss"], halves[0]["loss"]], "share of the tokens": shares}
    rows.append(Row("16 records: loss of one process, and of two", f"{whole['loss']:.6f} and {halves[0]['loss']:.6f}"))
    rows.append(at_most("16 records, two processes: the larger share of the tokens", max(shares), 0.55))
    report("scaling", "A growing batch", rows, **details)


if __name__ == "__main__":
    main()
