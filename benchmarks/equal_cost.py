"""What a batch is best spent on: settings that cost as much as each other, and how well they obey.

    python benchmarks/equal_cost.py [--output equal-cost] [--epochs 1] [--cells NAME ...]

Every setting trains one encoder for all on 1,088 records of the bundled train split, for as many passes as cost
what `--epochs` of 16 records a step and one sampled candidate cost, counted in the tokens that the encoder sees.
It is measured on the 231 others: 150 of the train split, drawn with a fixed seed, and the validation split. The
test split is not read. The learning rate goes with the root of the batch. What is done is not done again, so that
cells can be run one by one, or several at a time on several cores.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from report import Row, report

from sentence_transformers_inf import load_records, training_dataset
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.evaluation.metrics import bootstrap_interval
from sentence_transformers_inf.losses import InstructionContrastiveLoss
from sentence_transformers_inf.modules import load_instruction_model
from sentence_transformers_inf.training import SCHEDULES, bundled_base, train

REFERENCE = {"sampled_instructions": 1, "batch_size": 16}
CELLS: dict[str, dict[str, int]] = {
    "16 records, 1 sampled": REFERENCE,
    **{f"{m} sampled": {**REFERENCE, "sampled_instructions": m} for m in (0, 2, 4, 8)},
    **{f"{size} records": {**REFERENCE, "batch_size": size} for size in (8, 32, 64)},
}
METRICS = ("p_mrr", "pair_accuracy", "ndcg_at_10", "plain_ndcg_at_10")


def tokens_per_record(records: datasets.Dataset, sampled_instructions: int, batch_size: int) -> float:
    """Tokens that the encoder is given for a record, padding included, over the first 128 records."""
    model = load_instruction_model(bundled_base())
    loss = InstructionContrastiveLoss(model, sampled_instructions=sampled_instructions, plain_weight=0.75)
    view = training_dataset(records)
    tokens = 0
    for start in range(0, 128, batch_size):
        rows = view[start : start + batch_size]
        with torch.no_grad():
            loss([model.preprocess(rows[name]) for name in view.column_names])
        tokens += loss.last_step_stats["padded_tokens"]
    return tokens / 128


def run(cell: dict[str, int], epochs: float, kept: datasets.Dataset, held: datasets.Dataset, output: Path) -> None:
    """Train and measure a cell, and write its ``result.json``."""
    epochs *= tokens_per_record(kept, **REFERENCE) / tokens_per_record(kept, **cell)
    rate = SCHEDULES["both"]["learning_rate"] * (cell["batch_size"] / REFERENCE["batch_size"]) ** 0.5
    started = time.process_time()
    model = train(
        output.parent / "data",
        output=output / "model",
        encoders="shared",
        **cell,
        epochs=epochs,
        learning_rate=rate,
        evaluations=1,
        seed=1,
    )
    minutes = (time.process_time() - started) / 60
    measured = measure(model, held).values
    values = {name: measured[name].tolist() for name in METRICS}
    result: dict[str, Any] = {**cell, "epochs": epochs, "learning_rate": rate, "cpu_minutes": minutes, "values": values}
    (output / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("equal-cost"))
    parser.add_argument("--epochs", type=float, default=1.0, help="of the first cell, whose cost all have")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), metavar="NAME", help="only these")
    options = parser.parse_args()
    datasets.disable_progress_bars()

    records = load_records("mini", "train")
    order = random.Random(0).sample(range(len(records)), len(records))
    kept = records.select(sorted(order[150:]))
    held = datasets.concatenate_datasets([records.select(order[:150]), load_records("mini", "validation")])
    (options.output / "data").mkdir(parents=True, exist_ok=True)
    kept.to_parquet(options.output / "data" / "train.parquet")
    folders = {name: options.output / "".join(c if c.isalnum() else "-" for c in name) for name in CELLS}
    for name in options.cells:
        if not (folders[name] / "result.json").exists():
            print(name, "...", flush=True)
            run(CELLS[name], options.epochs, kept, held, folders[name])

    found = {name: folder / "result.json" for name, folder in folders.items() if (folder / "result.json").exists()}
    results = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items()}
    first = results.get(next(iter(CELLS)))
    rows = []
    for name, result in results.items():
        means = ", ".join(f"{np.mean(result['values'][metric]):.1f}" for metric in METRICS)
        line = f"{name}; {result['epochs']:.2f} epochs, {result['cpu_minutes']:.1f} CPU minutes"
        gained = ""
        if first is not None and result is not first:
            over = np.subtract(result["values"]["p_mrr"], first["values"]["p_mrr"])
            low, high = bootstrap_interval(over)
            gained = f"p-MRR over the first {over.mean():+.1f} [{low:+.1f}, {high:+.1f}]"
        rows.append(Row(line, means, gained))
    report("equal_cost", f"{', '.join(METRICS)} at the cost of {options.epochs:g} epochs", rows, results=results)


if __name__ == "__main__":
    main()
