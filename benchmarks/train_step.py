"""What a training step costs: ratios measured in one run, so that they carry from machine to machine.

    python benchmarks/train_step.py [--steps 5] [--batch-size 16] [--json FILE]

Compared on the same records of the bundled corpus, dropout off, forward and backward: `InstructionContrastiveLoss` with
`uni_P` against Sentence Transformers' `MultipleNegativesRankingLoss` on the same texts, and `multi_P_I` with what it adds.
Medians of paired runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import datasets
import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from sentence_transformers_inf import load_instruction_model, load_records, training_dataset
from sentence_transformers_inf.losses import InstructionContrastiveLoss
from sentence_transformers_inf.training import bundled_base


def timed(loss: torch.nn.Module, features: list) -> float:
    """Seconds of one forward and backward pass."""
    loss.zero_grad()
    start = time.perf_counter()
    loss([dict(column) for column in features], None).backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16, help="records per step")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    datasets.disable_progress_bars()

    model = load_instruction_model(bundled_base()).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    view = training_dataset(load_records("mini", "train").shuffle(seed=0))
    rankings = MultipleNegativesRankingLoss(model)
    losses = {
        "uni_P": InstructionContrastiveLoss(model, "uni_P"),
        "multi_P_I, poisoned candidate": InstructionContrastiveLoss(model, sampled_instructions=0),
        "multi_P_I, + 1 sampled": InstructionContrastiveLoss(model, sampled_instructions=1),
        "multi_P_I, + plain rows": InstructionContrastiveLoss(model, sampled_instructions=0, plain_weight=0.5),
    }
    ratios: dict[str, list[float]] = {name: [] for name in losses}
    padded = real = naive = 0
    for step in range(options.steps + 1):
        rows = view[step * options.batch_size : (step + 1) * options.batch_size]
        columns = [model.preprocess(rows[name]) for name in view.column_names]
        queries = [rows[name][i] for i in range(options.batch_size) for name in view.column_names[:3]]
        passages = [rows[name][i] for i in range(options.batch_size) for name in view.column_names[3:]]
        reference = timed(rankings, [model.preprocess(queries), model.preprocess(passages)])
        for name, loss in losses.items():
            seconds = timed(loss, columns)
            if step:  # the first step warms up
                ratios[name].append(seconds / reference)
        stats = losses["uni_P"].last_step_stats
        padded, real = padded + stats["padded_tokens"], real + stats["real_tokens"]
        naive += len(queries + passages) * max(column["input_ids"].shape[1] for column in columns)

    report = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "records_per_step": options.batch_size,
        "real_over_padded_tokens": real / padded,
        "real_over_padded_tokens_in_one_batch": real / naive,
        "step_time_over_multiple_negatives_ranking": {name: statistics.median(values) for name, values in ratios.items()},
    }
    table = Table(
        title=f"One step of {options.batch_size} records; {report['machine']}; {report['date']}", title_justify="left"
    )
    table.add_column("measure")
    table.add_column("ratio", justify="right")
    table.add_row("real / padded tokens", f"{real / padded:.2f}")
    table.add_row("the same with all texts padded to the longest", f"{real / naive:.2f}")
    for name, values in ratios.items():
        table.add_row(f"step time, {name} / MultipleNegativesRankingLoss", f"{statistics.median(values):.2f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
