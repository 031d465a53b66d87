"""What a batch is best spent on: settings that cost as much as each other, and how well they obey.

    python benchmarks/equal_cost.py [--output equal-cost] [--epochs 2] [--seeds 1 2 3] [--cells NAME ...]

Every setting trains the default recipe, two encoders, on the bundled train split less 150 records, for as many passes
as cost what `--epochs` of the default's batches cost, counted in the tokens that the encoders see: on a CPU time goes
with them. It is measured on the 231 others: 150 of the train split, drawn with a fixed seed, and the validation split.
Means stand with their standard errors over the seeds. The test split is not read. The learning rates go with the root
of the batch. What is done is not done again, so that cells and seeds can be run one by one, or several at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from report import Row, report

from sentence_transformers_inf import load_records, training_dataset
from sentence_transformers_inf.corpora import bundled_base
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.evaluation.metrics import bootstrap_interval
from sentence_transformers_inf.losses import InstructionContrastiveLoss
from sentence_transformers_inf.modules import load_instruction_model, two_towers
from sentence_transformers_inf.training import InstructionTrainer, InstructionTrainingArguments
from sentence_transformers_inf.training.arguments import SCHEDULES

REFERENCE = {name: int(SCHEDULES["both"][name]) for name in ("sampled_instructions", "per_device_train_batch_size")}
CELLS: dict[str, dict[str, int]] = {
    "the default": REFERENCE,
    **{f"{m} sampled": {**REFERENCE, "sampled_instructions": m} for m in (1, 2, 4, 8)},
    **{f"{size} records": {**REFERENCE, "per_device_train_batch_size": size} for size in (4, 16, 32, 64)},
}
METRICS = ("p_mrr", "pair_accuracy", "ndcg_at_10", "plain_ndcg_at_10")


def tokens_per_record(records: datasets.Dataset, sampled_instructions: int, per_device_train_batch_size: int) -> float:
    """Tokens that the encoders are given for a record, without padding, over the first 128 records."""
    model = two_towers(load_instruction_model(bundled_base())).to("cpu")
    loss = InstructionContrastiveLoss(model, sampled_instructions=sampled_instructions, plain_weight=0.75)
    view = training_dataset(records)
    tokens = 0
    for start in range(0, 128, per_device_train_batch_size):
        rows = view[start : start + per_device_train_batch_size]
        with torch.no_grad():
            loss([model.preprocess(rows[name]) for name in view.column_names])
        tokens += loss.last_step_stats["real_tokens"]
    return tokens / 128


def run(
    cell: dict[str, int], seed: int, epochs: float, kept: datasets.Dataset, held: datasets.Dataset, output: Path
) -> None:
    """Train and measure a cell with one seed, and write its ``result.json``."""
    epochs *= tokens_per_record(kept, **REFERENCE) / tokens_per_record(kept, **cell)
    size = cell["per_device_train_batch_size"] / REFERENCE["per_device_train_batch_size"]
    rate = SCHEDULES["both"]["learning_rate"] * size**0.5
    args = InstructionTrainingArguments(
        output_dir=str(output / "model"), **cell, num_train_epochs=epochs, learning_rate=rate, evaluations=1, seed=seed
    )
    trainer = InstructionTrainer(args=args, train_dataset=kept)
    trainer.train()
    trainer.run_folder.remove_checkpoints()
    measured = measure(trainer.model, held).values
    values = {name: measured[name].tolist() for name in METRICS}
    result: dict[str, Any] = {**cell, "epochs": epochs, "learning_rate": rate, "bf16": args.bf16, "values": values}
    (output / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


def _by_record(runs: list[dict[str, Any]], metric: str) -> np.ndarray:
    """The mean over the seeds for every held-out record."""
    return np.mean([result["values"][metric] for result in runs], axis=0) if runs else np.empty(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("equal-cost"))
    parser.add_argument(
        "--epochs", type=float, default=SCHEDULES["both"]["num_train_epochs"], help="of the first cell, whose cost all have"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), metavar="NAME", help="only these")
    options = parser.parse_args()
    datasets.disable_progress_bars()

    records = load_records("mini", "train")
    order = random.Random(0).sample(range(len(records)), len(records))
    kept = records.select(sorted(order[150:]))
    held = datasets.concatenate_datasets([records.select(order[:150]), load_records("mini", "validation")])
    names = {name: "".join(c if c.isalnum() else "-" for c in name) for name in CELLS}
    for seed, name in itertools.product(options.seeds, options.cells):
        folder = options.output / names[name] / str(seed)
        if not (folder / "result.json").exists():
            print(f"{name}, seed {seed} ...", flush=True)
            run(CELLS[name], seed, options.epochs, kept, held, folder)

    results = {}
    for name, part in names.items():
        paths = sorted((options.output / part).glob("*/result.json"))
        results[name] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    rows = []
    first = _by_record(results[next(iter(CELLS))], "p_mrr")
    for name, runs in results.items():
        if not runs:
            continue
        of_seeds = {metric: [float(np.mean(result["values"][metric])) for result in runs] for metric in METRICS}
        errors = {
            metric: np.std(values, ddof=1) / len(values) ** 0.5 for metric, values in of_seeds.items() if len(values) > 1
        }
        means = ", ".join(
            f"{np.mean(values):.1f}" + (f" ± {errors[metric]:.1f}" if metric in errors else "")
            for metric, values in of_seeds.items()
        )
        line = f"{name}; {runs[0]['epochs']:.2f} epochs, seeds: {len(runs)}"
        gained = ""
        if len(first) and name != next(iter(CELLS)):
            over = _by_record(runs, "p_mrr") - first
            low, high = bootstrap_interval(over)
            gained = f"p-MRR over the first {over.mean():+.1f} [{low:+.1f}, {high:+.1f}]"
        rows.append(Row(line, means, gained))
    report("equal_cost", f"{', '.join(METRICS)} at the cost of {options.epochs:g} epochs", rows, results=results)


if __name__ == "__main__":
    main()
