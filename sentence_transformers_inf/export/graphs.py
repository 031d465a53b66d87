"""From an encoder to one graph, pooling and normalisation included, for ONNX Runtime or OpenVINO.

Sentence Transformers has such backends. They export through Optimum, which refuses the transformers that this package needs
(optimum-onnx 0.1: below 4.58; optimum-intel 2.2: below 5.6). So PyTorch's own exporter does it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from sentence_transformers_inf.compat import attention_of, import_openvino
from sentence_transformers_inf.export.int8 import even_out, quantize_graph
from sentence_transformers_inf.modules.exported import GRAPH_INPUTS, GRAPHS, check_backend

OUTPUTS = ("token_embeddings", "sentence_embedding")
"""N×L×d of the transformer, and N×d at the end; Optimum's exports of Sentence Transformers' models have the same."""

_EXAMPLE = ["a text to trace", "a text that is longer than the other one"]


def check_exporter(backend: str) -> None:
    """Refuse an export for which something is not installed, before a model is loaded.

    Raises:
        ImportError: The message says what to install.
    """
    check_backend(backend)
    if backend == "onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise ImportError("--format onnx needs onnx and onnxscript: pip install 'sentence-transformers-inf[onnx]'")


def save_graph(encoder: SentenceTransformer, folder: Path, backend: str, quantize: bool) -> None:
    """Save an encoder's tokenizer, configuration and graph.

    Args:
        encoder: In float32; begins with a Transformer that takes text, and everything after it is traced with it.
        folder: Where to.
        backend: ``"onnx"`` or ``"openvino"``.
        quantize: ``"onnx"`` only: int8 weights and activations in the linear layers.
    """
    transformer: Any = encoder[0]
    transformer.processor.save_pretrained(folder)
    transformer.model.config.save_pretrained(folder)
    settings = transformer.get_config_dict()
    settings["modality_config"] = {"text": {"method": "forward", "method_output_name": "sentence_embedding"}}
    settings |= {"module_output_name": "sentence_embedding", "unpad_inputs": False}
    Path(folder, transformer.config_file_name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    path = folder / GRAPHS[backend]
    path.parent.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's, of its own code
        _save(encoder, path, backend, quantize)


def _save(encoder: SentenceTransformer, path: Path, backend: str, quantize: bool) -> None:
    program = _trace(even_out(encoder) if quantize else encoder)
    if backend == "openvino":
        openvino = import_openvino()
        graph = openvino.convert_model(program)
        for output, name in zip(graph.outputs, OUTPUTS):
            output.get_tensor().set_names({name})
        openvino.save_model(graph, path, compress_to_fp16=False)
    elif quantize:
        with tempfile.TemporaryDirectory() as scratch:
            _save_onnx(program, Path(scratch, "model.onnx"))
            quantize_graph(Path(scratch, "model.onnx"), path)
    else:
        _save_onnx(program, path)


class _Whole(nn.Module):
    """All modules of an encoder in one: token ids in, :data:`OUTPUTS` out."""

    def __init__(self, encoder: SentenceTransformer) -> None:
        super().__init__()
        self.parts = nn.ModuleList(encoder)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "modality": "text"}
        if token_type_ids is not None:
            features["token_type_ids"] = token_type_ids
        for module in self.parts:
            features = module(features)
        return features["token_embeddings"], features["sentence_embedding"]


def _trace(encoder: SentenceTransformer) -> torch.export.ExportedProgram:
    transformer: Any = encoder[0]
    features = transformer.preprocess(_EXAMPLE)
    tokens = {name: features[name] for name in GRAPH_INPUTS if name in features}
    dynamic = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in tokens}
    attention = attention_of(transformer.model)
    transformer.model.set_attn_implementation("eager")  # in plain operators, fewer of them
    try:
        with torch.no_grad():
            return torch.export.export(_Whole(encoder).eval(), (), tokens, dynamic_shapes=dynamic)
    finally:
        transformer.model.set_attn_implementation(attention)


def _save_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of packages for images
    try:
        model = torch.onnx.export(program, dynamo=True, output_names=OUTPUTS, verbose=False)
    finally:
        logger.setLevel(level)
    assert model is not None
    model.save(path)
