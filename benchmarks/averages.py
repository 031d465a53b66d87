"""What the average of several trainings is worth, and how far to go from the base to it.

    python benchmarks/averages.py MODEL [MODEL ...] [--steps 1 1.2 1.4] [--leave-one-out] [--split test] [--plain FOLDER]

For each step: p-MRR, pair accuracy, nDCG@10 and plain nDCG@10 on the bundled split, the narratives, the help centre, and
MRR@10 of the plain queries of a folder in BEIR's layout. With --leave-one-out: means over the averages of all models but
one, and the jackknife's standard error (Efron and Tibshirani 1993, equation 11.5). Choose on validation; the test split is
for reporting.
"""

from __future__ import annotations

import argparse

import numpy as np
from datasets import Dataset
from report import Row, report
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf import load_records
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.evaluation.elsewhere import measure_help_centre, measure_narratives, measure_plain
from sentence_transformers_inf.training.averaging import average_models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--steps", type=float, nargs="+", default=[1.0, 1.2, 1.4])
    parser.add_argument("--leave-one-out", action="store_true")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--plain", metavar="FOLDER")
    options = parser.parse_args()
    records, models = load_records("mini", options.split), options.models
    groups = [[other for other in models if other != left] for left in models] if options.leave_one_out else [models]
    rows, results = [], []
    for step in options.steps:
        of_groups = [measure_all(average_models(group, step), records, options.plain) for group in groups]
        shown = []
        for name in of_groups[0]:
            values = np.array([measured[name] for measured in of_groups])
            error = np.sqrt((len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum())
            shown.append(f"{name} {values.mean():.1f}" + (f" ± {error:.1f}" if options.leave_one_out else ""))
        results.append({"models": models, "step": step, "measured": of_groups})
        rows.append(Row(f"step {step:g}", ", ".join(shown)))
    title = f"the average of {len(groups[0])}; {len(records)} records of {options.split}; times 100"
    report("averages", title, rows, results=results)


def measure_all(model: SentenceTransformer, records: Dataset, plain: str | None) -> dict[str, float]:
    """All measures of one model."""
    result = measure(model, records)
    values = {name: result.means()[name] for name in ("p_mrr", "pair_accuracy", "ndcg_at_10", "plain_ndcg_at_10")}
    values |= {f"{kind}, pairs": of_kind["pair_accuracy"] for kind, of_kind in result.per_type().items()}
    values |= {f"narratives, {name}": value for name, value in measure_narratives(model).items()}
    values |= {f"help centre, {name}": value for name, value in measure_help_centre(model).items()}
    return values | ({"plain queries, mrr_at_10": measure_plain(model, plain)["mrr_at_10"]} if plain else {})


if __name__ == "__main__":
    main()
