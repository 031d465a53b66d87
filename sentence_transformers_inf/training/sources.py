"""The training data of a run: one source, or several whose batches the host's samplers mix."""

from __future__ import annotations

from collections.abc import Iterator

from datasets import Dataset, DatasetDict
from torch.utils.data import BatchSampler

from sentence_transformers_inf.records import (
    PASSAGE_COLUMNS,
    REQUIRED_COLUMNS,
    ROW_COLUMNS,
    TRAINING_COLUMNS,
    training_dataset,
)


class Shares(BatchSampler):
    """The batches of a sampler, each cut into one share for every process of a run.

    So all processes have records of one source in a step.

    Args:
        whole: Full batches of several sources, each of one.
        count: Processes.
    """

    def __init__(self, whole: BatchSampler, count: int) -> None:
        super().__init__(whole.sampler, whole.batch_size // count, whole.drop_last)
        self.whole, self.count = whole, count

    def set_epoch(self, epoch: int) -> None:
        """Called before every epoch."""
        self.whole.set_epoch(epoch)  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.whole:
            yield from (batch[start : start + self.batch_size] for start in range(0, len(batch), self.batch_size))

    def __len__(self) -> int:
        return len(self.whole) * self.count


def check_train(data: Dataset | dict[str, Dataset] | None) -> dict[str | None, Dataset]:
    """The training data by name; one alone has none.

    Raises:
        ValueError: They are missing, or of another kind.
    """
    if data is None or data == {}:
        raise ValueError("train_dataset is missing: pass records, for example load_records('mini', 'train')")
    if not isinstance(data, dict) or isinstance(data, DatasetDict):  # whose splits are not all for training
        return {None: _check_source(data, "train_dataset")}
    if named := sorted({*data} & {*TRAINING_COLUMNS, *PASSAGE_COLUMNS}):
        raise ValueError(f"train_dataset: {named[0]!r} is the name of a column: give that source another name")
    return {name: _check_source(of_name, f"train_dataset[{name!r}]") for name, of_name in data.items()}


def _check_source(data: Dataset, name: str) -> Dataset:
    columns = _columns(data, name)
    if TRAINING_COLUMNS[0] not in columns and not (columns >= set(REQUIRED_COLUMNS) or columns >= set(ROW_COLUMNS)):
        raise ValueError(
            f"{name} holds neither InF-IR records (load_records) nor rows (load_rows) nor their training view "
            f"(training_dataset); it has the columns {', '.join(sorted(columns))}"
        )
    return data


def check_eval(data: Dataset | None) -> Dataset | None:
    """The validation records.

    Raises:
        ValueError: They are none.
    """
    if data is not None and not (columns := _columns(data, "eval_dataset")) >= set(REQUIRED_COLUMNS):
        raise ValueError(
            "eval_dataset holds no InF-IR records (load_records); it has the columns "
            f"{', '.join(sorted(columns))}. For other data pass an evaluator, and no eval_dataset"
        )
    return data


def training_view(data: Dataset, instructions: bool) -> Dataset:
    """The columns that the losses train on; see :func:`~sentence_transformers_inf.training_dataset`.

    Raises:
        ValueError: They are these columns already, and are to have no instructions.
    """
    if TRAINING_COLUMNS[0] not in data.column_names:
        return training_dataset(data, instructions)
    if not instructions:
        raise ValueError("instructions=False needs records or rows: their training view has the instructions in it already")
    return data


def _columns(data: Dataset, name: str) -> set[str]:
    if not isinstance(data, Dataset):
        raise ValueError(f"{name} must be one split, a datasets.Dataset, not {type(data).__name__}")
    return set(data.column_names)
