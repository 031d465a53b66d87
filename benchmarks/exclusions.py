"""How much of what an instruction excludes to subtract from its query, and what that is worth.

    python benchmarks/exclusions.py MODEL [MODEL ...] [--split validation] [--weights 0 0.25 0.5 0.75]

For each weight: pair accuracy, of all records and of those that exclude, on the bundled split and on the help centre;
p-MRR and pairwise gain on the narratives. Weight 0 is a model that does not look for exclusions. MODEL may be `base`, the
bundled all-MiniLM-L6-v2. Choose on validation; the test split is for reporting.
"""

from __future__ import annotations

import argparse
from typing import Any

from report import Row, report

from sentence_transformers_inf import load_instruction_model, load_records
from sentence_transformers_inf.corpora import bundled_base
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.evaluation.elsewhere import measure_help_centre, measure_narratives
from sentence_transformers_inf.modules import encoder_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75])
    options = parser.parse_args()
    records = load_records("mini", options.split)
    rows, results = [], []
    for name in options.models:
        model = load_instruction_model(bundled_base() if name == "base" else name, find_exclusions=True)
        encoder: Any = encoder_of(model)[0]
        for weight in options.weights:
            encoder.exclusion_weight, encoder.find_exclusions = weight, weight > 0
            result = measure(model, records)
            values = {"pair": result.means()["pair_accuracy"], "p-MRR": result.means()["p_mrr"]}
            values["pair, exclusion"] = result.per_type()["exclusion"]["pair_accuracy"]
            values["nDCG@10"] = result.means()["ndcg_at_10"]
            values |= {f"help centre, {key}": value for key, value in measure_help_centre(model).items()}
            narratives = measure_narratives(model)
            values |= {f"narratives, {key}": narratives[key] for key in ("p_mrr", "pairwise_gain", "ndcg_at_10_og")}
            results.append({"model": name, "weight": weight, **values})
            rows.append(Row(f"{name}, weight {weight:g}", ", ".join(f"{key} {value:.1f}" for key, value in values.items())))
    report("exclusions", f"{len(records)} records of {options.split}; times 100", rows, results=results)


if __name__ == "__main__":
    main()
