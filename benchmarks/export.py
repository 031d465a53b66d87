"""ONNX Runtime's int8 against PyTorch's float32: time, in turns in one process, and quality.

    python benchmarks/export.py [MODEL] [--rounds 7]

The adapter that ships, or another model, exported with `inf-embed export --format onnx --quantize`:

- 24 instructed queries of the bundled test split, one by one;
- 64 of its passages, 32 at a time;
- the first ten passages, and p-MRR on the test split.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import datasets
from encode import ratio
from report import Row, at_least, at_most, report
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf import load_instruction_model, load_records
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.export import export_model
from sentence_transformers_inf.modules.loading import BUNDLED_ADAPTER
from sentence_transformers_inf.passages import distinct_passages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BUNDLED_ADAPTER))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    records = load_records("mini", "test")
    queries = [
        {"query": query, "instruction": instruction}
        for query, instruction in zip(records["query_positive"][:24], records["instruction_positive"])
    ]
    passages = distinct_passages([records])[100:164]
    with tempfile.TemporaryDirectory() as scratch:
        settings = export_model(options.model, Path(scratch, "export"), "onnx", quantize=True)
        exported = load_instruction_model(Path(scratch, "export"), backend="onnx")
        model = load_instruction_model(options.model, device="cpu").eval()

        def singly(encoder: SentenceTransformer) -> None:
            for query in queries:
                encoder.encode_query(query, show_progress_bar=False)

        def batches(encoder: SentenceTransformer) -> None:
            encoder.encode_document(passages, batch_size=32, show_progress_bar=False)

        rows: list[Row] = []
        cases = (("one instructed query", singly, 0.5), ("passages, 32 at a time", batches, 0.6))
        for name, encode, bound in cases:
            middle, low, high = ratio(lambda: encode(exported), lambda: encode(model), options.rounds)  # noqa: B023
            rows.append(at_most(f"time, {name} (quartiles {low:.2f} to {high:.2f})", middle, bound))
            print(rows[-1], flush=True)
        rows.append(at_least("top-10 overlap", settings["parity"]["top_10_overlap"], 0.95, ".3f"))
        p_mrr = [measure(encoder, records).means()["p_mrr"] for encoder in (model, exported)]
        rows.append(at_most(f"p-MRR, change from {p_mrr[0]:.1f}", abs(p_mrr[1] - p_mrr[0]), 1.5))
    name = Path(options.model).resolve().name
    report(f"export_{name}", f"{name}: int8 of ONNX Runtime / float32 of PyTorch", rows)


if __name__ == "__main__":
    main()
