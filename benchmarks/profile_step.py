"""Where a training step's time goes, by the PyTorch profiler: the recipe's defaults on the bundled corpus, in the precision
that `train` takes on this machine.

    python benchmarks/profile_step.py [--steps 3]

The texts of a step are tokenised twice over: the columns by the data loader, and what only the loss needs (candidates, bare
queries) by the loss. Both count as tokenisation, the rest of the loss outside the encoder as loss.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any

import datasets
import torch
from report import Row, at_most, report
from torch.profiler import ProfilerActivity, profile, record_function

from sentence_transformers_inf import load_instruction_model, load_records, training_dataset
from sentence_transformers_inf.corpora import bundled_base
from sentence_transformers_inf.losses import InstructionContrastiveLoss
from sentence_transformers_inf.modules import encoders_of, two_towers
from sentence_transformers_inf.training.arguments import SCHEDULES, has_fast_bfloat16
from sentence_transformers_inf.training.cpu import CHUNK_TOKENS, without_padding
from sentence_transformers_inf.training.encoders import freeze, hidden_dropout

PARTS = ("tokenisation", "encoder forward", "loss", "backward", "optimizer")


def labelled(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return call(*args, **kwargs)

    return wrapper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    model = two_towers(load_instruction_model(bundled_base())).requires_grad_(True).train()
    size, sampled = (int(SCHEDULES["both"][name]) for name in ("per_device_train_batch_size", "sampled_instructions"))
    device, lower = model.device.type, has_fast_bfloat16()
    for encoder in encoders_of(model):
        freeze(encoder, 2)
    stack = contextlib.ExitStack()
    stack.enter_context(hidden_dropout(model, 0.0))
    chunk = CHUNK_TOKENS if stack.enter_context(without_padding(model)) else None
    loss = InstructionContrastiveLoss(model, sampled_instructions=sampled, plain_weight=0.75, max_tokens_per_chunk=chunk)
    loss.preprocess = labelled("tokenisation", model.preprocess)
    model.forward = labelled("encoder forward", torch.autocast(device, torch.bfloat16, enabled=lower)(model.forward))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-5, fused=True)
    view = training_dataset(load_records("mini", "train").shuffle(seed=0))

    def step(number: int) -> None:
        rows = view[size * number : size * (number + 1)]
        columns = [loss.preprocess(rows[name]) for name in view.column_names]
        with record_function("loss and encoder"):
            value = loss(columns)
        with record_function("backward"):
            value.backward()
        with record_function("optimizer"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    step(0)
    with profile(activities=[ProfilerActivity.CPU]) as profiled, record_function("step"):
        start = time.perf_counter()
        for number in range(1, options.steps + 1):
            step(number)
        seconds = time.perf_counter() - start
    total: dict[str, float] = {}
    inside = 0.0  # tokenisation within the loss
    for event in profiled.events():
        if event.name in (*PARTS, "loss and encoder"):
            total[event.name] = total.get(event.name, 0.0) + event.cpu_time_total / 1e6
            if event.name == "tokenisation" and event.cpu_parent is not None and event.cpu_parent.name == "loss and encoder":
                inside += event.cpu_time_total / 1e6
    total["loss"] = total.pop("loss and encoder") - total["encoder forward"] - inside
    total["everything else"] = seconds - sum(total.values())

    rows = [Row(f"seconds in {'bfloat16' if lower else 'float32'}", f"{seconds / options.steps:.2f}")]
    for name in (*PARTS, "everything else"):
        share = 100 * total[name] / seconds
        inside_encoder = name in ("encoder forward", "backward")
        rows.append(Row(f"{name}, %", f"{share:.1f}") if inside_encoder else at_most(f"{name}, %", share, 3, ".1f"))
    report("profile_step", f"One step of {size} records, where its time goes", rows)


if __name__ == "__main__":
    main()
