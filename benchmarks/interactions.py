"""How instruction and query meet: concatenation, the paper's attention and the gated one, trained alike and compared.

    python benchmarks/interactions.py [--records 620] [--output DIR] [--test]

Every row is one run of the recipe with its defaults on the first records of the bundled corpus, one seed. The validation
split is measured; `--test` measures the test split as well, once everything was chosen. A run that was interrupted goes on,
and finished ones are not repeated. Beside quality: training minutes, seconds of a training step (forward and backward,
median of 5 on equal batches), and milliseconds per instructed query (median of 5 passes over 162 of the validation split,
32 at a time).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import datasets
import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf import load_instruction_model, load_records, training_dataset
from sentence_transformers_inf.corpora import bundled_base
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.losses import InstructionContrastiveLoss
from sentence_transformers_inf.modules import DEFAULT_TEMPLATE
from sentence_transformers_inf.recipe import read_recipe
from sentence_transformers_inf.training import InstructionTrainer, InstructionTrainingArguments, RunFolder

# name: (interaction, objective, sampled instructions)
RUNS = {
    "concatenation, P": ("concatenation", "uni_P", None),
    "concatenation, P_I": ("concatenation", "multi_P_I", None),
    "paper, P": ("paper", "uni_P", None),
    "paper, P_I": ("paper", "multi_P_I", None),
    "gated, P": ("gated", "uni_P", None),
    "gated, P_I": ("gated", "multi_P_I", None),
    "gated, P_I, 1 sampled": ("gated", "multi_P_I", 1),
}
COLUMNS = ("p_mrr", "pair_accuracy", "ndcg_at_10", "plain_ndcg_at_10")


def median_time(call, repeats: int = 5) -> float:
    """Median seconds of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def step_seconds(interaction: str, objective: str, sampled: int | None) -> float:
    """Forward and backward of 16 records, dropout off."""
    model = load_instruction_model(bundled_base(), interaction=interaction).eval()
    rows = training_dataset(load_records("mini", "train").select(range(16)))
    features = [model.preprocess(rows[column]) for column in rows.column_names]
    loss = InstructionContrastiveLoss(model, objective, sampled_instructions=sampled, plain_weight=0.75)

    def step() -> None:
        model.zero_grad()
        loss([dict(column) for column in features]).backward()

    return median_time(step)


def milliseconds_per_query(model: SentenceTransformer) -> float:
    """Of instructed queries in batches."""
    validation = load_records("mini", "validation")
    pairs = [
        {"instruction": instruction, "query": query}
        for name in ("positive", "negative")
        for instruction, query in zip(validation[f"instruction_{name}"], validation["query_positive"])
    ]

    def batches() -> None:
        model.encode_query(pairs, batch_size=32, show_progress_bar=False)

    return 1000 * median_time(batches) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=620)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/interactions"))
    parser.add_argument("--test", action="store_true")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    splits = ["validation", "test"] if options.test else ["validation"]
    results = []
    for name, (interaction, objective, sampled) in RUNS.items():
        folder = options.output / name.replace(", ", "-").replace(" ", "-")
        if not RunFolder(folder).is_finished:
            settings = {"objective": objective, "interaction": interaction, "sampled_instructions": sampled}
            args = InstructionTrainingArguments(
                output_dir=str(folder), encoders="shared", evaluations=2, template=DEFAULT_TEMPLATE, **settings
            )
            records = load_records("mini", "train").select(range(options.records))
            InstructionTrainer(None, args, records, load_records("mini", "validation")).train()
        measured = folder / "row.json"
        if not measured.exists() or (options.test and "test p_mrr" not in json.loads(measured.read_text(encoding="utf-8"))):
            model = load_instruction_model(folder).eval()
            row = {"run": name, "minutes": (read_recipe(folder) or {}).get("minutes")}
            for split in splits:
                means = measure(model, load_records("mini", split)).means()
                row |= {f"{split} {column}": means[column] for column in COLUMNS}
            row |= {"step_seconds": step_seconds(interaction, objective, sampled)}
            row |= {"ms_per_query": milliseconds_per_query(model)}
            measured.write_text(json.dumps(row), encoding="utf-8")
        row = json.loads(measured.read_text(encoding="utf-8"))
        results.append(row)
        print(json.dumps(row), flush=True)

    report = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "records": options.records, "rows": results}
    (options.output.parent / "interactions.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for split in splits:
        table = Table(title=f"{split}, {options.records} training records, {torch.get_num_threads()} threads")
        for column in ("", *COLUMNS, "training minutes", "step s", "ms per query"):
            table.add_column(column, justify="right" if column else "left")
        for row in results:
            values = [f"{row[f'{split} {column}']:.1f}" for column in COLUMNS]
            costs = [str(row["minutes"]), f"{row['step_seconds']:.2f}", f"{row['ms_per_query']:.1f}"]
            table.add_row(row["run"], *values, *costs)
        Console(width=160).print(table)


if __name__ == "__main__":
    main()
