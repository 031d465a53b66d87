"""What a training step costs: ratios measured in one run, so that they carry from machine to machine.

    python benchmarks/train_step.py [--steps 5] [--batch-size 16]

all-MiniLM-L6-v2 on records of the bundled corpus, dropout off unless said, forward and backward, medians over steps in which
all take their turn. What is ours goes without padding, as the trainer does on a CPU, unless said:

- `InstructionContrastiveLoss` with `uni_P` against Sentence Transformers' `MultipleNegativesRankingLoss` on the same texts,
  also against the latter with the dropout of its base, and `multi_P_I` with what it adds;
- each against the encoder alone on as many sequences and tokens in even batches: no padding, no loss, nothing to tokenise;
- padded chunks, as the loss has them in a trainer of one's own, against none; these compiled by `torch.compile` against not;
- an adapter's step, LoRA or a copy, against that of the recipe that trains both sides;
- bfloat16 against float32 where the CPU has instructions for it (AMX, AVX512-BF16);
- the recipe's own step in this machine's precision: with padding against without, and with dropout against without.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from report import Row, at_least, at_most, report
from scaling import fresh_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from sentence_transformers_inf import load_instruction_model, load_records, training_dataset
from sentence_transformers_inf.corpora import bundled_base
from sentence_transformers_inf.losses import InstructionContrastiveLoss
from sentence_transformers_inf.modules import adapter_tower, add_lora, copy_tower, encoder_of, encoders_of, two_towers
from sentence_transformers_inf.training.arguments import ADAPTER_LORA_R, has_fast_bfloat16
from sentence_transformers_inf.training.cpu import CHUNK_TOKENS, without_padding
from sentence_transformers_inf.training.encoders import freeze, hidden_dropout


def timed(run: Callable[[], torch.Tensor], model: SentenceTransformer) -> float:
    """Seconds of one forward and backward pass."""
    model.zero_grad()
    start = time.perf_counter()
    run().backward()
    return time.perf_counter() - start


def even(model: SentenceTransformer, sequences: int, tokens: int, chunk: int = 1024) -> torch.Tensor:
    """The encoder on ``sequences`` texts of equal length, ``tokens`` tokens in all, as many at a time as fit a chunk."""
    length = round(tokens / sequences)
    ids = torch.randint(1000, 20_000, (round(tokens / length), length))
    parts = [
        model({"input_ids": part, "attention_mask": torch.ones_like(part)})["sentence_embedding"]
        for part in ids.split(max(1, chunk // length))
    ]
    return torch.cat(parts)[:, 0].sum()


def recipes(stack: contextlib.ExitStack) -> dict[str, InstructionContrastiveLoss]:
    """The losses by what is trained; the adapters' passages are vectors that stand for any."""
    vectors = np.random.default_rng(0).standard_normal((1000, 384), dtype=np.float32)
    both, lora, copied = fresh_model(), fresh_model(), fresh_model()
    lora, copied = (adapter_tower(base, copy_tower(base, share=share)) for base, share in ((lora, True), (copied, False)))
    add_lora(encoder_of(lora)[0], ADAPTER_LORA_R)
    both = two_towers(both).requires_grad_(True)
    for encoder in [*encoders_of(both), encoder_of(copied)[0]]:
        freeze(encoder, 2)
    for model in (both, lora, copied):
        stack.enter_context(without_padding(model.train()))
    options: dict[str, Any] = {"max_tokens_per_chunk": CHUNK_TOKENS}
    return {
        "both": InstructionContrastiveLoss(both, sampled_instructions=0, plain_weight=0.75, **options),
        "LoRA": InstructionContrastiveLoss(lora, passage_embeddings=vectors, **options),
        "a copy": InstructionContrastiveLoss(copied, passage_embeddings=vectors, **options),
    }


def ways_to_train(stack: contextlib.ExitStack) -> dict[str, InstructionContrastiveLoss]:
    """The recipe's loss as it is, with padding, and with dropout."""
    lower = has_fast_bfloat16()
    losses = {}
    for name in ("the recipe", "with padding", "with dropout"):
        model = two_towers(load_instruction_model(bundled_base())).requires_grad_(True).train()
        for encoder in encoders_of(model):
            freeze(encoder, 2)
        stack.enter_context(hidden_dropout(model, 0.1 if name == "with dropout" else 0.0))
        chunk = None
        if name != "with padding":
            stack.enter_context(without_padding(model))
            chunk = CHUNK_TOKENS
        model.forward = torch.autocast("cpu", torch.bfloat16, enabled=lower)(model.forward)  # type: ignore[method-assign]
        losses[name] = InstructionContrastiveLoss(
            model, sampled_instructions=0, plain_weight=0.75, max_tokens_per_chunk=chunk
        )
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16, help="records per step")
    options = parser.parse_args()
    datasets.disable_progress_bars()

    stack = contextlib.ExitStack()
    model, theirs, trained = fresh_model(), fresh_model(), recipes(stack)
    parts = ways_to_train(stack)
    view = training_dataset(load_records("mini", "train").shuffle(seed=0))
    rankings = MultipleNegativesRankingLoss(theirs)
    dropping, ours = (load_instruction_model(bundled_base()).train() for _ in range(2))
    stack.enter_context(hidden_dropout(ours, 0.0))
    stack.enter_context(without_padding(ours))
    stack.enter_context(without_padding(model))
    compiled = fresh_model()
    compiled[0].model = torch.compile(compiled[0].model, dynamic=True)

    def whole(model: SentenceTransformer, *arguments: Any, **options: Any) -> InstructionContrastiveLoss:
        return InstructionContrastiveLoss(model, *arguments, **options, max_tokens_per_chunk=CHUNK_TOKENS)

    with_dropout = MultipleNegativesRankingLoss(dropping), whole(ours, "uni_P")
    losses = {
        "uni_P": whole(model, "uni_P"),
        "multi_P_I, poisoned candidate": whole(model, sampled_instructions=0),
        "multi_P_I, + 1 sampled": whole(model, sampled_instructions=1),
        "multi_P_I, + 1 sampled, + plain rows": whole(model, sampled_instructions=1, plain_weight=0.75),
    }
    fullest = list(losses)[-1]
    uni_padded, uni_compiled = (InstructionContrastiveLoss(each, "uni_P") for each in (theirs, compiled))
    of_rankings: dict[str, list[float]] = {name: [] for name in losses}
    of_even: dict[str, list[float]] = {name: [] for name in ("uni_P", fullest)}
    of_both: dict[str, list[float]] = {name: [] for name in list(trained)[1:]}
    of_dropout: list[float] = []
    of_padding: list[float] = []
    of_compiling: list[float] = []
    faster: list[float] = []
    of_parts: dict[str, list[float]] = {name: [] for name in list(parts)[1:]}
    real = naive = of_theirs = of_chunks = 0
    for step in range(options.steps + 1):
        print(f"step {step} of {options.steps} ...", flush=True)
        rows = view[step * options.batch_size : (step + 1) * options.batch_size]
        columns, padded = ([each.preprocess(rows[name]) for name in view.column_names] for each in (model, theirs))
        queries = [rows[name][i] for i in range(options.batch_size) for name in view.column_names[:3]]
        passages = [rows[name][i] for i in range(options.batch_size) for name in view.column_names[3:]]
        texts = [theirs.preprocess(queries), theirs.preprocess(passages)]

        def of(loss: torch.nn.Module, features: list[dict[str, Any]], labels: Any = None) -> Callable[[], torch.Tensor]:
            return lambda: loss([dict(column) for column in features], labels)

        reference = timed(of(rankings, texts), theirs)
        for name, loss in losses.items():
            seconds = timed(of(loss, columns), model)
            stats = loss.last_step_stats
            if name in of_even:
                smooth = timed(lambda stats=stats: even(theirs, stats["sequences"], stats["real_tokens"]), theirs)  # type: ignore[misc]
            if not step:  # the first step warms up
                continue
            of_rankings[name].append(seconds / reference)
            if name in of_even:
                of_even[name].append(seconds / smooth)
        of_dropout.append(timed(of(with_dropout[1], columns), ours) / timed(of(with_dropout[0], texts), dropping))
        in_chunks = timed(of(uni_padded, padded), theirs)
        of_padding.append(in_chunks / timed(of(losses["uni_P"], columns), model))
        of_compiling.append(timed(of(uni_compiled, padded), compiled) / in_chunks)
        labels = torch.arange(3 * options.batch_size).view(-1, 3)
        spent = {
            name: timed(of(loss, columns, None) if name == "both" else of(loss, columns[:3], labels), loss.model)
            for name, loss in trained.items()
        }
        for name in of_both:
            if step:
                of_both[name].append(spent[name] / spent["both"])
        if has_fast_bfloat16():
            with torch.autocast(model.device.type, torch.bfloat16):
                faster.append(seconds / timed(of(losses[fullest], columns), model))
        with_parts = {name: timed(of(loss, columns), loss.model) for name, loss in parts.items()}
        for name in of_parts:
            if step:
                of_parts[name].append(with_parts[name] / with_parts["the recipe"])
        real += losses["uni_P"].last_step_stats["real_tokens"]
        of_chunks += uni_padded.last_step_stats["padded_tokens"]
        of_theirs += sum(column["input_ids"].numel() for column in texts)
        naive += len(queries + passages) * max(column["input_ids"].shape[1] for column in padded)

    median = statistics.median
    results = [
        Row("real / padded tokens", "1.00"),
        at_least("the same in padded chunks", real / of_chunks, 0.9),
        Row("the same in MultipleNegativesRankingLoss's two batches", f"{real / of_theirs:.2f}"),
        Row("the same with all texts padded to the longest", f"{real / naive:.2f}"),
        at_most("step time, uni_P / MultipleNegativesRankingLoss", median(of_rankings["uni_P"]), 0.75),
        Row("the same against the latter with its base's dropout", f"{median(of_dropout[1:]):.2f}"),
        *(
            Row(f"step time, {name} / MultipleNegativesRankingLoss", f"{median(of_rankings[name]):.2f}")
            for name in list(losses)[1:]
        ),
        *(at_most(f"step time, {name} / encoder on even batches", median(values), 1.15) for name, values in of_even.items()),
        at_most("step time, adapter with LoRA / both sides", median(of_both["LoRA"]), 0.5),
        at_most("step time, adapter with a copy / both sides", median(of_both["a copy"]), 0.5),
        Row("step time, uni_P, padded chunks / no padding", f"{median(of_padding[1:]):.2f}"),
        Row("step time, uni_P, padded chunks, torch.compile / without", f"{median(of_compiling[1:]):.2f}"),
        at_least("speed, bfloat16 / float32", median(faster[1:]), 1.4)
        if faster
        else Row("speed, bfloat16 / float32", "not on this CPU", "at least 1.4 with AMX"),
        *(Row(f"the recipe's step, {name} / as it is", f"{median(values):.2f}") for name, values in of_parts.items()),
    ]
    stack.close()
    ratios = {"over_multiple_negatives_ranking": of_rankings, "over_even_batches": of_even, "over_both": of_both}
    ratios["over_the_recipe"] = of_parts
    report("train_step", f"One step of {options.batch_size} records", results, **ratios)


if __name__ == "__main__":
    main()
