"""Read what ``inf-embed export`` wrote for ONNX Runtime or OpenVINO: ``load_instruction_model(DIR, backend="onnx")``.

Such a folder has ``serving.json`` and, for each encoder, a folder with the tokenizer and a graph. The graph turns token ids
into a finished embedding, pooling and normalisation included. All before it (templates, limits, exclusions) is what it is
for every other model of this package.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from sentence_transformers_inf.compat import import_openvino
from sentence_transformers_inf.modules.exclusions import compose_exclusions
from sentence_transformers_inf.modules.instruction_router import InstructionRouter
from sentence_transformers_inf.modules.instruction_transformer import InstructionTransformer
from sentence_transformers_inf.recipe import read_json

SERVING_FILE = "serving.json"
_KEYS = ("format", "encoders", "template", "max_query_length", "exclusions", "prompts", "similarity", "truncate_dim")

GRAPHS = {"onnx": "onnx/model.onnx", "openvino": "openvino/openvino_model.xml"}
"""Where the graph of an encoder is, by the backend that runs it; Sentence Transformers and Optimum keep it there too."""

GRAPH_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What a graph may take, each N×L."""


class ExportedTransformer(InstructionTransformer):
    """An :class:`~sentence_transformers_inf.modules.InstructionTransformer` whose encoder is a graph.

    Args:
        model_name_or_path: A folder with a tokenizer, ``sentence_bert_config.json`` and a graph at its place of
            :data:`GRAPHS`.
        backend: ``"onnx"`` or ``"openvino"``.
    """

    def _load_model(
        self, model_name_or_path: str, transformer_task: str, config: Any, backend: str, is_peft_model: bool, **kwargs: Any
    ) -> Graph:
        return Graph(Path(model_name_or_path, GRAPHS[backend]), backend, config)


class Graph(nn.Module):
    """A graph in the place of a transformers model: token ids in, embeddings out.

    It uses as many threads as PyTorch does when the graph is loaded.
    """

    def __init__(self, path: Path, backend: str, config: Any) -> None:
        super().__init__()
        check_backend(backend)
        self.config, self.path, self.backend = config, path, backend
        self._load()

    def _load(self) -> None:
        if self.backend == "onnx":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            # Its threads would wait for work at full speed, in the way of all else: a server answered half as many texts.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            self.session = onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
            self.inputs = [entry.name for entry in self.session.get_inputs()]
        else:
            openvino = import_openvino()
            settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
            self.session = openvino.Core().compile_model(self.path, "CPU", settings)
            self.inputs = [entry.get_any_name() for entry in self.session.inputs]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "session"}

    def __setstate__(self, state: dict[str, Any]) -> None:  # in the processes of encode's pool
        super().__setstate__(state)
        self._load()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None, return_dict: bool = True
    ) -> dict[str, Tensor]:
        """Embed N texts of at most L tokens (each tensor N×L); ``sentence_embedding`` is N×d."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        feed: dict[str, np.ndarray] = {
            name: (torch.zeros_like(input_ids) if (tensor := given[name]) is None else tensor).cpu().numpy()
            for name in self.inputs
        }
        if self.backend == "onnx":
            (embeddings,) = self.session.run(["sentence_embedding"], feed)
        else:
            embeddings = self.session.infer_new_request(feed)["sentence_embedding"]
        return {"sentence_embedding": torch.from_numpy(np.array(embeddings))}


def check_backend(backend: str) -> None:
    """Refuse a backend that is unknown or not installed.

    Raises:
        ImportError: It is not installed; the message says what to install.
        ValueError: It is unknown.
    """
    if backend not in GRAPHS:
        raise ValueError(f"unknown backend {backend!r}; there are torch, {', '.join(GRAPHS)}")
    module = "onnxruntime" if backend == "onnx" else "openvino"
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{backend} needs {module}: pip install 'sentence-transformers-inf[{backend}]'")


def read_serving(folder: str | Path) -> dict[str, Any]:
    """What ``serving.json`` says of an export.

    Raises:
        FileNotFoundError: There is no export in the folder.
    """
    file = Path(folder, SERVING_FILE)
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: there is no {SERVING_FILE} here: make an export with inf-embed export")
    settings: dict[str, Any] = read_json(file, dict, ["format"])
    return settings


def backend_of(model: str | Path | None) -> str:
    """What runs a model: the backend that it was exported for, else ``"torch"``.

    Raises:
        ValueError: It was exported for other programs.
    """
    if model is None or not Path(model, SERVING_FILE).is_file():
        return "torch"
    if (backend := read_serving(model)["format"]) not in tuple(GRAPHS):
        formats = " or ".join(GRAPHS)
        raise ValueError(f"{model} was exported for other programs: name the model, or export it with --format {formats}")
    return str(backend)


def read_exported(folder: str | Path, backend: str) -> SentenceTransformer:
    """The model that was exported to a folder, run by the backend, which takes dictionaries as it did before.

    Args:
        folder: What ``inf-embed export`` wrote.
        backend: ``"onnx"`` or ``"openvino"``.

    Raises:
        FileNotFoundError: There is no export in the folder.
        ImportError: The backend is not installed.
        ValueError: The export is for something else, or its ``serving.json`` is damaged.
    """
    check_backend(backend)
    settings = read_serving(folder)
    if settings["format"] != backend:
        raise ValueError(
            f"{folder} was exported with --format {settings['format']}: backend={backend!r} needs --format {backend}"
        )
    read_json(Path(folder, SERVING_FILE), dict, _KEYS)
    encoders: dict[str, ExportedTransformer] = {}
    for name in dict.fromkeys(settings["encoders"].values()):
        encoder = ExportedTransformer.load(str(Path(folder, name)), backend=backend)
        encoder.template, encoder.max_query_length = settings["template"], settings["max_query_length"]
        compose_exclusions(nn.Sequential(encoder))
        encoders[name] = encoder  # type: ignore[assignment]
    instructed, plain, passages = (
        encoders[settings["encoders"][kind]] for kind in ("instructed_queries", "plain_queries", "passages")
    )
    instructed.exclusion_weight = settings["exclusions"]["weight"]
    instructed.find_exclusions = settings["exclusions"]["find"]
    modules: list[Any] = [instructed]
    if len(encoders) > 1:
        routes: Any = {"query": [plain], "document": [passages]} | (
            {} if instructed is plain else {"instructed": [instructed]}
        )
        modules = [InstructionRouter(routes, default_route="document")]
    model = SentenceTransformer(modules=modules, device="cpu")
    model.prompts, model.default_prompt_name = settings["prompts"], settings["default_prompt_name"]
    model.similarity_fn_name, model.truncate_dim = settings["similarity"], settings["truncate_dim"]
    return model.eval()
