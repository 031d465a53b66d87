"""One of two gloo processes: the loss and gradients of half a batch, gathered and averaged as DDP does."""

import sys

import datasets
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sentence_transformers_inf import load_instruction_model, load_records, load_rows, training_dataset
from sentence_transformers_inf.losses import CachedInstructionContrastiveLoss, InstructionContrastiveLoss
from sentence_transformers_inf.records import TWIN_QUERY_COLUMNS


def two_rows(source, split):
    """Records of which every second one lacks the twin query and its passage."""

    def change(record, number):
        return record | (dict.fromkeys(TWIN_QUERY_COLUMNS) if number % 2 else {})

    return load_records(source, split).select(range(2)).map(change, with_indices=True, load_from_cache_file=False)


DATA = {"records": load_records, "rows": load_rows, "two rows": two_rows}
HALVES = {"records": 1, "rows": 2, "two rows": 1}
OPTIONS = {"sampled_instructions": 2, "plain_weight": 0.5, "seed": 5}


def batch_columns(model, data, rows):
    view = training_dataset(data("mini", "train").select(rows))
    return [model.preprocess(view[name][:]) for name in view.column_names]


def step(base, objective, cached, rows, gather, data=load_records):
    """(loss, gradients by name) of one batch in double precision."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    model = load_instruction_model(base).eval().double()
    features = batch_columns(model, data, rows)
    kind = CachedInstructionContrastiveLoss if cached else InstructionContrastiveLoss
    extra = {"mini_batch_size": 5} if cached else {}
    loss = kind(model, objective, gather_across_devices=gather, **OPTIONS, **extra)
    if gather:
        # As the trainer does: the pooler of BERT takes no part in mean pooling.
        loss.model = DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
    value = loss(features, None)
    value.backward()
    return value.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


if __name__ == "__main__":
    rank, store, base, folder, *cases = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    for case in cases:
        objective, cached, data = case.split(",")
        half = list(range(HALVES[data])) if rank == "0" else list(range(HALVES[data], 2 * HALVES[data]))
        value, gradients = step(base, objective, cached == "cached", half, True, DATA[data])
        dist.all_reduce(value)
        if rank == "0":
            torch.save({"loss": value / 2, "gradients": gradients}, f"{folder}/{case}.pt")
    dist.destroy_process_group()
