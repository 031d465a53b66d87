"""Training in tests: short, in float32, and silent unless a test says otherwise."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf import InstructionTrainer, InstructionTrainingArguments
from sentence_transformers_inf.corpora import load_training_data

QUICK: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "evaluations": 1,
    "warmup_steps": 0,
    "frozen_layers": 0,
    "bf16": False,
    "disable_tqdm": True,
    "report_to": "none",
}


def trainer(
    data: str | Path | Dataset, base: str | Path | SentenceTransformer | None, output: str | Path, **settings: Any
) -> InstructionTrainer:
    """A trainer with quick settings.

    Args:
        data: A source of records with or without validation, or a dataset of the former.
        base: The model to train; ``None``: the bundled one.
        output: Its folder.
        **settings: Further arguments, or other values of :data:`QUICK`; ``max_records`` for the data.
    """
    limit = settings.pop("max_records", None)
    train_dataset, validation = (data, None) if isinstance(data, Dataset) else load_training_data(data, limit)
    arguments = InstructionTrainingArguments(output_dir=str(output), **{**QUICK, **settings})
    return InstructionTrainer(base, arguments, train_dataset, validation)


def train(
    data: str | Path | Dataset, base: str | Path | SentenceTransformer | None, output: str | Path, **settings: Any
) -> SentenceTransformer:
    """The trained model, without dropout's randomness; see :func:`trainer`."""
    running = trainer(data, base, output, **settings)
    running.train()
    return running.model.eval()
