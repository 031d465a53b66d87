"""``inf-embed train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from sentence_transformers_inf.cli.options import BaseOption, DataOption, PublicOption
from sentence_transformers_inf.cli.push import push
from sentence_transformers_inf.cli.tables import console, print_line


def train(
    output: Annotated[Path, typer.Option(help="Folder for the model.")],
    data: DataOption = "mini",
    base: BaseOption = None,
    objective: Annotated[str, typer.Option(help="One of the 11 objectives, for example multi_P_I or uni_P.")] = "multi_P_I",
    template: Annotated[
        Optional[str],
        typer.Option(help="How instruction and query are joined. Default: '{query} [SEP] {instruction}', by the tokenizer."),
    ] = None,
    interaction: Annotated[
        Optional[str], typer.Option(help="How instruction and query meet: concatenation (the template), paper or gated.")
    ] = None,
    update: Annotated[
        str,
        typer.Option(help="What is trained: both, or queries: an adapter for instructed queries, the base untouched."),
    ] = "both",
    encoders: Annotated[
        Optional[str],
        typer.Option(
            help="instructed: a trained encoder of their own for instructed queries, another for passages and bare queries; "
            "separate: one for queries, one for passages; shared: one. Default: instructed; shared with LoRA or attention."
        ),
    ] = None,
    lora_r: Annotated[
        Optional[int], typer.Option(help="Rank of a LoRA; 0: none. Default: 32 with --update queries, else 0.")
    ] = None,
    merge_base: Annotated[
        bool, typer.Option("--merge-base", help="Save the base with the adapter, and LoRA merged into the weights.")
    ] = False,
    passage_embeddings: Annotated[
        Optional[str],
        typer.Option(help="With --update queries: the passages' vectors from elsewhere (.npy, .parquet or a Hub dataset)."),
    ] = None,
    epochs: Annotated[Optional[float], typer.Option(help="Passes over the records; default: by what is trained.")] = None,
    learning_rate: Annotated[Optional[float], typer.Option(help="Peak learning rate; default: likewise.")] = None,
    batch_size: Annotated[Optional[int], typer.Option(help="Records per step; default: likewise.")] = None,
    mini_batch_size: Annotated[
        Optional[int], typer.Option(help="GradCache: texts encoded at a time, for batches larger than memory.")
    ] = None,
    sampled_instructions: Annotated[
        Optional[int],
        typer.Option(help="Candidate instructions drawn from other records; default: by what is trained, 0 or 1, or all."),
    ] = None,
    plain_weight: Annotated[float, typer.Option(help="Weight of the bare queries, which keeps plain retrieval.")] = 0.75,
    anchor_weight: Annotated[
        float, typer.Option(help="Weight of keeping passages and bare queries where the base model puts them.")
    ] = 0.0,
    base_weight: Annotated[float, typer.Option(help="Share of the base model's weights in the result.")] = 0.0,
    dropout: Annotated[float, typer.Option(help="Dropout of the encoder's hidden states while training.")] = 0.1,
    frozen_layers: Annotated[
        int, typer.Option(help="Keep the embeddings and so many of the lowest layers as they are; 0: train everything.")
    ] = 2,
    seed: Annotated[int, typer.Option(help="Of data order, candidates and dropout.")] = 42,
    bf16: Annotated[
        Optional[bool], typer.Option("--bf16/--float32", help="Precision of the encoder.", show_default="as the machine has")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    max_records: Annotated[Optional[int], typer.Option(help="Train on the first so many records only.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that holds a run.")] = False,
    push_to_hub: Annotated[Optional[str], typer.Option(help="Push the model to this repository, user/name.")] = None,
    public: PublicOption = False,
) -> None:
    """Train a model; after an interruption, the same command goes on where it stopped."""
    from sentence_transformers_inf.hub.errors import claim_repo
    from sentence_transformers_inf.training import train as run

    if push_to_hub is not None:
        claim_repo(push_to_hub, "model", public=public)  # a refusal now and not after the training
    run(
        data,
        base,
        output,
        objective=objective,
        template=template,
        interaction=interaction,
        update=update,
        encoders=encoders,
        lora_r=lora_r,
        merge_base=merge_base,
        passage_embeddings=passage_embeddings,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        mini_batch_size=mini_batch_size,
        sampled_instructions=sampled_instructions,
        plain_weight=plain_weight,
        anchor_weight=anchor_weight,
        base_weight=base_weight,
        dropout=dropout,
        frozen_layers=frozen_layers,
        seed=seed,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        max_records=max_records,
        overwrite=overwrite,
        say=print_line,
    )
    if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun started, the first goes on
        return
    console.print(f"\nThe model is in {output}. Measure it: inf-embed evaluate {output} --data {data}")
    if push_to_hub is not None:
        push(output, push_to_hub, public)
