"""What the average of several trainings is worth, and how far to go from the base to it.

    python benchmarks/averages.py MODEL [MODEL ...] [--steps 1 1.2 1.4] [--split validation] [--plain FOLDER]

For each step: p-MRR, pair accuracy, nDCG@10 and plain nDCG@10 on the bundled split, the narratives, the help centre, and
MRR@10 of the plain queries of a folder in BEIR's layout. Step 0 is the base. Choose on validation; the test split is for
reporting.
"""

from __future__ import annotations

import argparse

from report import Row, report

from sentence_transformers_inf import load_instruction_model, load_records
from sentence_transformers_inf.corpora import bundled_base
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.evaluation.elsewhere import measure_help_centre, measure_narratives, measure_plain
from sentence_transformers_inf.training.averaging import average_models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--steps", type=float, nargs="+", default=[1.0, 1.2, 1.4])
    parser.add_argument("--split", default="validation")
    parser.add_argument("--plain", metavar="FOLDER")
    options = parser.parse_args()
    records = load_records("mini", options.split)
    rows, results = [], []
    for step in options.steps:
        model = average_models(options.models, step) if step else load_instruction_model(bundled_base())
        result = measure(model, records)
        values = {name: result.means()[name] for name in ("p_mrr", "pair_accuracy", "ndcg_at_10", "plain_ndcg_at_10")}
        values["exclusion"] = result.per_type()["exclusion"]["pair_accuracy"]
        values |= {f"narratives, {name}": value for name, value in measure_narratives(model).items()}
        values |= {f"help centre, {name}": value for name, value in measure_help_centre(model).items()}
        if options.plain:
            values["plain queries, mrr_at_10"] = measure_plain(model, options.plain)["mrr_at_10"]
        results.append({"models": options.models, "step": step, **values})
        rows.append(Row(f"step {step:g}", ", ".join(f"{name} {value:.1f}" for name, value in values.items())))
    title = f"the average of {len(options.models)}; {len(records)} records of {options.split}; times 100"
    report("averages", title, rows, results=results)


if __name__ == "__main__":
    main()
