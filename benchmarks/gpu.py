"""How much of a GPU's matrix products a training step uses.

    python benchmarks/gpu.py [--records 32] [--sequence 256] [--steps 10] [--compile] [--json FILE]

BERT-base and ModernBERT-base shapes with random weights, every text `--sequence` tokens long, bfloat16 under autocast,
`multi_P_I` with one sampled candidate and dropout, forward, backward and AdamW. Utilisation is the model's
arithmetic (2 per weight and token forward, twice that backward, attention included) over the time, as a share of what a
product of two 8,192² matrices reaches in the same run. The last columns say what the GPU works on in a step, milliseconds by
PyTorch's profiler; what a step takes beyond their sum, it waits for the host. With `--compile` each shape is measured again
with the encoder compiled by torch.compile. With `--device cpu --layers 1 --records 2` it only shows that it runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import string
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel, BertConfig, BertTokenizer, ModernBertConfig, PretrainedConfig

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.losses import InstructionContrastiveLoss

WORDS = ["".join(letters) for letters in itertools.islice(itertools.product(string.ascii_lowercase, repeat=4), 30_000)]
"""Each a token of its own."""


def random_model(config: PretrainedConfig, sequence: int, device: str) -> SentenceTransformer:
    """A model of this shape with random weights and a tokenizer of :data:`WORDS`."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    with tempfile.TemporaryDirectory() as folder:
        AutoModel.from_config(config).save_pretrained(folder)
        BertTokenizer({token: number for number, token in enumerate(special + WORDS)}).save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=2 * sequence)
    pooling = Pooling(transformer.get_embedding_dimension())
    return load_instruction_model(SentenceTransformer(modules=[transformer, pooling], device=device)).train()


def batch(model: SentenceTransformer, records: int, sequence: int, seed: int) -> list[dict[str, Any]]:
    """Columns of records of which every text, an instruction with its query too, has ``sequence`` tokens, no two alike."""
    generator = random.Random(seed)

    def text(tokens: int) -> str:
        return " ".join(generator.choices(WORDS, k=tokens))

    half = (sequence - 2) // 2  # [CLS] and [SEP]
    told = [{"instruction": text(sequence - 2 - half), "query": text(half)} for _ in range(3 * records)]
    given = [told[part::3] for part in range(3)] + [[text(sequence - 2) for _ in range(records)] for _ in range(3)]
    return [model.preprocess(column) for column in given]


def arithmetic_per_token(model: SentenceTransformer, sequence: int) -> float:
    """Floating point operations of one token forward and backward."""
    encoder = model[0].model
    config = encoder.config
    linear = sum(module.weight.numel() for module in encoder.modules() if isinstance(module, torch.nn.Linear))
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "local_attention", sequence)
    seen = sum(min(sequence, window) if kind == "sliding_attention" else sequence for kind in kinds)
    return 3 * (2 * linear + 4 * seen * config.hidden_size)


def timed(run: Callable[[], object], device: str, times: int) -> float:
    """Median seconds from the end of one call to that of the next, the first two left out. As in training, nothing makes
    the host wait for the GPU between calls."""
    ends: list[Any] = []
    for _ in range(times + 3):
        run()
        if device == "cuda":
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()
        else:
            ends.append(time.perf_counter())
    if device == "cuda":
        torch.cuda.synchronize()
        seconds = [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(ends)]
    else:
        seconds = [end - start for start, end in itertools.pairwise(ends)]
    return statistics.median(seconds[2:])


def kernel_seconds(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of a call that the GPU spends on matrix products, attention, and everything else."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    spent = dict.fromkeys(("products", "attention", "everything else"), 0.0)
    for event in profiled.key_averages():
        seconds = event.self_device_time_total / 1e6
        if event.device_type == DeviceType.CUDA:  # a kernel; the others are the operations that launched them
            spent["everything else"] += seconds
        elif event.key in ("aten::mm", "aten::addmm", "aten::bmm") or "_attention" in event.key:
            spent["attention" if "_attention" in event.key else "products"] += seconds
            spent["everything else"] -= seconds
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=32)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, help="fewer than the shapes have")
    parser.add_argument("--compile", action="store_true", help="measure with the encoder compiled, too; it takes minutes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = options.device
    name = torch.cuda.get_device_name() if device == "cuda" else device

    side = 8192 if device == "cuda" else 512
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    peak = 2 * side**3 / timed(lambda: left @ right, device, 20)
    date = time.strftime("%Y-%m-%d")
    title = f"{name}, torch {torch.__version__}, {date}: products of {side}² at {peak / 1e12:.1f} TFLOP/s"
    table = Table(title=title, title_justify="left")
    parts = ("products", "attention", "everything else")
    for column in ("shape", "ms per step (median)", "tokens/s", "GiB at the peak", "share of the products' speed", *parts):
        table.add_column(column, justify="left" if column == "shape" else "right")
    report: dict[str, Any] = {"device": name, "peak": peak, "date": date, **vars(options)}
    layers = {"num_hidden_layers": options.layers} if options.layers else {}
    special = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}
    shapes = {"BERT-base": BertConfig(**layers), "ModernBERT-base": ModernBertConfig(**special, **layers)}
    for (of, config), compiled in itertools.product(shapes.items(), (False, True) if options.compile else (False,)):
        shape = f"{of}, compiled" if compiled else of
        print(shape, "...", flush=True)
        model = random_model(config, options.sequence, device)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        if compiled:
            model[0].model.forward = torch.compile(model[0].model.forward, dynamic=True)
        loss = InstructionContrastiveLoss(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
        batches = [
            [{key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in column.items()} for column in columns]
            for columns in (batch(model, options.records, options.sequence, seed) for seed in range(4))
        ]
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        turns = iter(range(10**6))

        def step(loss=loss, optimizer=optimizer, batches=batches, turns=turns) -> None:  # type: ignore[no-untyped-def]
            with torch.autocast(device, torch.bfloat16):
                value = loss([dict(column) for column in batches[next(turns) % len(batches)]])
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds = timed(step, device, options.steps)
        tokens = loss.last_step_stats["real_tokens"]
        share = tokens * arithmetic_per_token(model, options.sequence) / seconds / peak
        memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
        spent = kernel_seconds(step) if device == "cuda" else dict.fromkeys(parts, float("nan"))
        measured = {"seconds": seconds, "tokens": tokens, "share": share, "GiB": memory}
        report[shape] = {**measured, **loss.last_step_stats, **spent}
        in_ms = [f"{1000 * spent[part]:.0f}" for part in parts]
        table.add_row(shape, f"{1000 * seconds:.0f}", f"{tokens / seconds:,.0f}", f"{memory:.1f}", f"{share:.2f}", *in_ms)
        if options.json:
            options.json.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    Console(width=125).print(table)


if __name__ == "__main__":
    main()
