"""Write a model for others to serve, check that it embeds as before, and only then put it in its place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling

from sentence_transformers_inf.export.encoders import KINDS, split_encoders
from sentence_transformers_inf.export.graphs import check_exporter, save_graph
from sentence_transformers_inf.export.parity import Encode, check_parity, encode_with, measure_parity
from sentence_transformers_inf.export.vllm import check_backbone, save_lora, with_saved_lora
from sentence_transformers_inf.modules import PackedTransformer, encoder_of, has_lora, load_instruction_model
from sentence_transformers_inf.modules.exported import GRAPHS, SERVING_FILE, read_exported
from sentence_transformers_inf.modules.fingerprint import fingerprints
from sentence_transformers_inf.recipe import read_recipe

FORMATS = ("merged", "onnx", "openvino", "vllm")

TEMPLATE = Path(__file__).with_name("readme.md")


def check_format(format: str, quantize: bool) -> None:
    """Refuse what cannot be exported here, before a model is loaded.

    Raises:
        ImportError: Something is not installed; the message says what to install.
        ValueError: The format is unknown, or has no int8.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    if quantize and format != "onnx":
        raise ValueError(f"--quantize makes int8 of --format onnx, not of {format}: leave it out")
    if format in GRAPHS:
        check_exporter(format)


def export_model(
    model: str | Path, output: str | Path, format: str, *, quantize: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Export a checkpoint or an adapter.

    Args:
        model: An id on the Hub or a folder.
        output: The folder to make. It appears when everything is written and checked, and not before.
        format: One of :data:`FORMATS`.
        quantize: ``"onnx"``: int8 weights and activations.
        overwrite: Replace an earlier export in the folder.

    Returns:
        What ``serving.json`` says, ``parity`` (:func:`~sentence_transformers_inf.export.parity.measure_parity`) in it.

    Raises:
        FileExistsError: There is something in the folder already.
        ImportError: Something is not installed.
        OSError: There is no such model, or the folder cannot be written.
        ValueError: The format does not fit the model, or the export differs from it by more than its bound.
    """
    check_format(format, quantize)
    output = Path(output)
    _check_output(output, overwrite)
    loaded = load_instruction_model(model, device="cpu", model_kwargs={"dtype": torch.float32}).eval()
    _check_model(loaded, format)
    staging = output.absolute().with_name(f".{output.name}.{os.getpid()}")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"{output}: the folder cannot be made ({error.strerror}): name another --output") from error
    try:
        settings = _write(loaded, model, staging, format, quantize)
        if output.exists():
            shutil.rmtree(output)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return settings


def _check_output(output: Path, overwrite: bool) -> None:
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists: name another --output, or --overwrite an earlier export")
    if not (output / SERVING_FILE).is_file():
        raise FileExistsError(f"{output} holds something that is no export: name another --output")


def _check_model(model: SentenceTransformer, format: str) -> None:
    encoder: Any = encoder_of(model)
    if isinstance(encoder[0], PackedTransformer):
        raise ValueError(
            "instruction and query meet in attention in this model, which no other program runs: train one with the "
            "interaction concatenation"
        )
    if format == "vllm":
        check_backbone(encoder[0])
        if has_lora(encoder[0]) and any(list(module.parameters()) for module in list(encoder)[1:]):
            raise ValueError("the adapter has layers after the pooling, which vLLM takes from the base: use --format merged")
    pooling = next((module for module in encoder if isinstance(module, Pooling)), None)
    if format in GRAPHS and pooling is not None and not pooling.include_prompt and any(model.prompts.values()):
        raise ValueError("the pooling leaves the prompt out, which a graph cannot: use --format merged")


def _write(model: SentenceTransformer, name: str | Path, folder: Path, format: str, quantize: bool) -> dict[str, Any]:
    """Write everything into a folder, and check it."""
    transformer: Any = encoder_of(model)[0]
    encoders, encoder_of_kind = split_encoders(model)
    settings = _serving(model, name, encoders[encoder_of_kind["passages"]])
    settings |= {"format": format, "quantized": quantize, "pooling_in_graph": format in GRAPHS}
    if format == "vllm" and has_lora(transformer):
        settings["vllm"] = save_lora(transformer, folder / "query")
        encoder_of_kind = {"instructed_queries": "query"}  # the rest is the base, which vLLM loads by its name
        with_lora = with_saved_lora(encoders["query"], transformer, folder / "query", settings["vllm"]["architecture"])
        exported = _encode_lora(model, with_lora)
    elif format in GRAPHS:
        for part, encoder in encoders.items():
            (folder / part).mkdir()
            save_graph(encoder, folder / part, format, quantize)
    else:
        for part, encoder in encoders.items():
            for_queries = part == "query" and len(encoders) > 1
            _save_whole(encoder, folder / part, transformer.max_query_length if for_queries else None)
        exported = _encode_folders(folder, encoder_of_kind, transformer.join)
    settings["encoders"] = encoder_of_kind
    _write_json(folder / SERVING_FILE, settings)
    if format in GRAPHS:
        settings["parity"] = measure_parity(encode_with(model), encode_with(read_exported(folder, format)))
    else:
        settings["parity"] = measure_parity(_without_exclusions(model), exported)
    check_parity(settings["parity"], format, quantize)
    _write_json(folder / SERVING_FILE, settings)
    readme = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True)
    tokenizer = transformer.tokenizer
    (folder / "README.md").write_text(readme.render(**settings, tokenizer=tokenizer) + "\n", encoding="utf-8")
    return settings


def _write_json(path: Path, settings: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _serving(model: SentenceTransformer, name: str | Path, passages: SentenceTransformer) -> dict[str, Any]:
    """What a server must know of a model, whatever the format."""
    encoder: Any = encoder_of(model)
    base, revision = getattr(model[0], "origin", None) or (None, None)
    base = base or (read_recipe(name) or {}).get("base", str(name))
    poolings = [module.pooling_mode for module in encoder if isinstance(module, Pooling)]
    return {
        "model": str(name),
        "base": {"name": base, "revision": revision, "fingerprint": fingerprints(passages)["float32"]},
        "template": encoder[0].template,
        "max_query_length": encoder[0].max_query_length,
        "max_seq_length": encoder[0].max_seq_length,
        "prompts": model.prompts,
        "default_prompt_name": model.default_prompt_name,
        "pooling": poolings[0] if poolings else None,
        "normalize": any(isinstance(module, Normalize) for module in encoder),
        "dimensions": model.get_embedding_dimension(),
        "truncate_dim": model.truncate_dim,
        "similarity": model.similarity_fn_name,
        "exclusions": {"find": encoder[0].find_exclusions, "weight": encoder[0].exclusion_weight},
    }


def _save_whole(encoder: SentenceTransformer, folder: Path, limit: int | None) -> None:
    """Save an encoder as an ordinary Sentence Transformers folder, with a limit of its own where there is one."""
    before = encoder.max_seq_length
    encoder.max_seq_length = limit or before
    try:
        encoder.save_pretrained(str(folder), create_model_card=False)
    finally:
        encoder.max_seq_length = before


def _encode_folders(folder: Path, encoder_of_kind: dict[str, str], join: Any) -> Encode:
    """Embed as other programs do: with plain Sentence Transformers, and joined strings."""
    parts = {name: SentenceTransformer(str(folder / name), device="cpu") for name in set(encoder_of_kind.values())}

    def encode(kind: str, inputs: list[Any]) -> NDArray[np.float32]:
        texts = [item if isinstance(item, str) else join(item["instruction"], item["query"]) for item in inputs]
        return encode_with(parts[encoder_of_kind[kind]])(kind, texts)

    return encode


def _encode_lora(model: SentenceTransformer, instructed: SentenceTransformer) -> Encode:
    join: Any = encoder_of(model)[0].join

    def encode(kind: str, inputs: list[Any]) -> NDArray[np.float32]:
        if kind != KINDS[0]:
            return encode_with(model)(kind, inputs)
        return encode_with(instructed)(kind, [join(item["instruction"], item["query"]) for item in inputs])

    return encode


def _without_exclusions(model: SentenceTransformer) -> Encode:
    """Embed without subtracting what instructions exclude, which other programs do not."""

    def encode(kind: str, inputs: list[Any]) -> NDArray[np.float32]:
        return encode_with(model)(kind, [item if isinstance(item, str) else {**item, "exclude": None} for item in inputs])

    return encode
