"""What a batch costs as it grows, and how two processes share it.

    python benchmarks/scaling.py [--largest 256] [--json FILE]

- sequences that are encoded at 4, 16 and 64 records a step with 2 sampled candidates, against the scheme that encodes every
  combination of the batch's instructions and queries; and both losses where they must be equal, with their times;
- seconds per record and peak memory of the cached loss, each batch in a process of its own;
- two gloo processes on half a batch each against one on the whole: the loss and the sequences each encodes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
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
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf import load_instruction_model, load_records, training_dataset
from sentence_transformers_inf.losses import (
    CachedInstructionContrastiveLoss,
    InstructionContrastiveLoss,
    instruction_contrastive_loss,
)
from sentence_transformers_inf.training import bundled_base

BATCHES = (8, 32, 128, 256)


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


def one_batch(records: int) -> dict[str, float]:
    """Seconds per record and peak memory of a cached step, in this process."""
    model = fresh_model()
    loss = CachedInstructionContrastiveLoss(model, mini_batch_size=32)
    seconds = []
    for turn in range(3):
        features = columns(model, records, start=0)
        model.zero_grad()
        start = time.perf_counter()
        loss(features).backward()
        if turn or records >= 128:  # large batches warm up within themselves
            seconds.append(time.perf_counter() - start)
        if records >= 128:
            break
    # Not ru_maxrss: a process that was started by another inherits its peak.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024
    return {"seconds": statistics.median(seconds) / records, "MiB": peak}


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
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    if options.only:
        print(json.dumps(one_batch(options.only)))
        return
    table = Table(
        title=f"A growing batch; {platform.machine()}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}",
        title_justify="left",
    )
    table.add_column("measure")
    table.add_column("value", justify="right")
    report: dict[str, Any] = {"machine": platform.machine(), "date": time.strftime("%Y-%m-%d")}

    model = fresh_model()
    for records in (4, 16, 64):
        loss = InstructionContrastiveLoss(model, sampled_instructions=2)
        with torch.no_grad():
            loss(columns(model, records))
        ours, every = loss.last_step_stats["sequences"], 6 * records + (3 * records) ** 2
        report[f"sequences at {records}"] = {"encoded": ours, "quadratic": every}
        table.add_row(f"{records} records: sequences, and of all combinations", f"{ours} and {every}: {every / ours:.1f}x")
    everything = InstructionContrastiveLoss(model, sampled_instructions=10**6)
    for records in (4, 8):
        start = time.perf_counter()
        value = everything(columns(model, records))
        value.backward()
        middle = time.perf_counter()
        other, _ = quadratic_loss(model, records)
        other.backward()
        seconds = (middle - start, time.perf_counter() - middle)
        report[f"all candidates at {records}"] = {"loss": [value.item(), other.item()], "seconds": seconds}
        table.add_row(
            f"{records} records, all candidates: loss, and by the formula", f"{value.item():.5f} and {other.item():.5f}"
        )
        table.add_row("    step time against it", f"{seconds[0] / seconds[1]:.2f}")

    for records in [size for size in BATCHES if size <= options.largest]:
        command = [sys.executable, __file__, "--only", str(records)]
        batch = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        report[f"cached at {records}"] = batch
        table.add_row(f"{records} records, cached: ms per record, MiB", f"{1000 * batch['seconds']:.0f}, {batch['MiB']:.0f}")

    with tempfile.TemporaryDirectory() as folder:
        for size in (1, 2):
            torch.multiprocessing.spawn(process, (size, 16, f"{folder}/store-{size}", folder), nprocs=size)
        whole = json.loads(Path(folder, "1-0.json").read_text(encoding="utf-8"))
        halves = [json.loads(Path(folder, f"2-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    shares = [half["real_tokens"] / whole["real_tokens"] for half in halves]
    report["two processes"] = {"loss": [whole["loss"], halves[0]["loss"]], "share of the tokens": shares}
    table.add_row("16 records: loss of one process and of two", f"{whole['loss']:.6f} and {halves[0]['loss']:.6f}")
    table.add_row("    each one's share of the tokens", " and ".join(f"{share:.2f}" for share in shares))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
