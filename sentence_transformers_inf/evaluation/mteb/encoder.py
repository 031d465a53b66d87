"""An MTEB 2 encoder that hands instruction and query to the model apart, so that its own template joins them.

MTEB's loaders give both: a batch of queries has the joined text in ``text``, the bare query in ``query`` and the
instruction in ``instruction`` (``mteb.types.BatchedInput``). Its own wrapper encodes ``text``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf.modules import check_embeddings
from sentence_transformers_inf.recipe import is_checkpoint

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import Array, BatchedInput, EncodeKwargs
    from torch.utils.data import DataLoader
    from typing_extensions import Unpack


class InstructionEncoder(AbsEncoder):
    """Run MTEB on a model of :func:`~sentence_transformers_inf.load_instruction_model`.

    Args:
        model: The model.
        name: ``organisation/name`` under which MTEB files its results; of a local folder, ``local/FOLDER``.
        revision: Revision of the checkpoint, for the same purpose.
        no_instruction: Leave all instructions out: the control run.

    Raises:
        ValueError: ``name`` is not of that form.

    Example:
        ::

            encoder = InstructionEncoder(load_instruction_model("user/inf-embed"), "user/inf-embed")
            mteb.evaluate(encoder, mteb.get_task("Core17InstructionRetrieval"))
    """

    def __init__(
        self, model: SentenceTransformer, name: str, revision: str | None = None, no_instruction: bool = False
    ) -> None:
        self.model = model
        self.no_instruction = no_instruction
        self.mteb_model_meta = ModelMeta(
            name=name,
            revision=revision or "no_revision_available",
            max_tokens=model.max_seq_length,
            embed_dim=model.get_embedding_dimension(),
            n_parameters=sum(parameter.numel() for parameter in model.parameters()),
            similarity_fn_name=ScoringFunction.from_str(model.similarity_fn_name),
            framework=["Sentence Transformers", "PyTorch"],
            languages=["eng-Latn"],
            open_weights=True,
            use_instructions=True,
            adapted_from=model.model_card_data.base_model,
            experiment_kwargs={"no_instruction": True} if no_instruction else None,
            # MTEB wants these stated; of a checkpoint at hand they are not known.
            loader=None,
            release_date=None,
            memory_usage_mb=None,
            license=None,
            public_training_code=None,
            public_training_data=None,
            training_datasets=None,
        )

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Unpack[EncodeKwargs],
    ) -> Array:
        """Encode what MTEB's loader gives; see :class:`mteb.models.EncoderProtocol`.

        Returns:
            N×d embeddings, float32.

        Raises:
            BrokenModelError: Embeddings are not finite, or all the same for different texts.
        """
        embeddings, seen = [], []
        for batch in inputs:
            texts: list[Any] = list(batch["text"])
            seen += list(batch.get("query", texts)) if prompt_type == PromptType.query else texts
            if prompt_type == PromptType.query and "query" in batch:
                texts = list(batch["query"])
                if not self.no_instruction and "instruction" in batch:
                    texts = [
                        {"instruction": instruction or "", "query": query}
                        for instruction, query in zip(batch["instruction"], texts)
                    ]
            encode = self.model.encode_query if prompt_type == PromptType.query else self.model.encode_document
            embeddings.append(encode(texts, batch_size=kwargs.get("batch_size", 32), show_progress_bar=False))
        found = np.concatenate(embeddings)
        # By the bare queries: a model that ignores instructions is not broken, and scores as it deserves.
        check_embeddings(found, seen, "queries" if prompt_type == PromptType.query else "passages")
        return found


def result_name(model: str) -> str:
    """``organisation/name`` for MTEB's result folders, of a Hub id or a local folder."""
    return f"local/{Path(model).resolve().name}" if Path(model).is_dir() else model


def folder_revision(model: str) -> str:
    """A revision for MTEB's result folders of a local model: it changes with the weights and the settings."""
    digest = hashlib.sha256()
    for path in sorted([*Path(model).rglob("*.safetensors"), *Path(model).rglob("*config*.json")]):
        if not is_checkpoint(Path(path.relative_to(model).parts[0])):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]
