"""InF-IR as a ``datasets`` builder: from the output of ``inf-ir build``, or the bundled corpus, to train/validation/test.

``datasets`` runs no loading scripts from the Hub any more: this class runs here, and what it builds is published as Parquet
(:mod:`dataset_builder.publish`), which a plain ``load_dataset("user/InF-IR")`` reads.
"""

import hashlib
import importlib.resources
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from dataset_builder.quality import normalised
from sentence_transformers_inf.reading import RecordError, parquet_batches
from sentence_transformers_inf.records import FEATURES

KEPT_FEATURES = datasets.Features({name: value for name, value in FEATURES.items() if name != "topic"})
"""Features of the configuration ``default``: a record of ``inf-ir build``."""

_TEXT = datasets.Value("string")
UNFILTERED_FEATURES = datasets.Features(
    {**KEPT_FEATURES, "form": _TEXT, "status": _TEXT, "reason": _TEXT, "judge_answers": datasets.List(_TEXT)}
)
"""Features of the configuration ``unfiltered``: the record, and how it was judged."""

SHARES = {"validation": 0.05, "test": 0.05}
"""Shares of the splits that are not ``train``."""


def split_of(query: str) -> str:
    """The split of a record by its ``query_positive``: ``train``, ``validation`` or ``test``.

    A pure function of the query's words without case, punctuation and spacing: a query and its spellings are in one split,
    and no record ever moves when others are added.
    """
    digest = hashlib.sha256(normalised(query).encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    for name, share in SHARES.items():
        if place < share:
            return name
        place -= share
    return "train"


BUILD_AGAIN = "give the command of the build again"
"""What mends a damaged file of a build."""


class InFIR(datasets.GeneratorBasedBuilder):
    """Builds InF-IR.

    Configurations: ``mini`` (the bundled corpus), ``default`` (the tuples that the judge kept) and ``unfiltered`` (all
    tuples, with the judge's answers); the latter two from the output folder of ``inf-ir build``, given as ``data_dir``.

    Example:
        ::

            builder = InFIR(config_name="default", data_dir="my-data")
            builder.download_and_prepare()
            records = builder.as_dataset(split="train")
    """

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 - as datasets has it
        datasets.BuilderConfig(name="mini", description="The bundled corpus, with its own splits."),
        datasets.BuilderConfig(name="default", description="The tuples that the judge kept."),
        datasets.BuilderConfig(name="unfiltered", description="All tuples, with the judge's answers."),
    ]
    DEFAULT_CONFIG_NAME = "default"

    def _info(self) -> datasets.DatasetInfo:
        features = {"mini": FEATURES, "default": KEPT_FEATURES, "unfiltered": UNFILTERED_FEATURES}[self.config.name]
        return datasets.DatasetInfo(features=features)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        names = ("train", "validation", "test")
        if self.config.name == "mini":
            folder = importlib.resources.files("dataset_builder") / "data"
            given: list[dict[str, Any]] = [{"files": [str(folder / f"{name}.parquet")], "split": None} for name in names]
        else:
            if self.config.data_dir is None:
                raise ValueError(f"the configuration {self.config.name!r} needs data_dir, the output folder of inf-ir build")
            output = Path(self.config.data_dir) / ("unfiltered" if self.config.name == "unfiltered" else "")
            files = sorted(str(path) for path in output.glob("train*.parquet"))
            if not files:
                raise FileNotFoundError(f"{output}: there is no train.parquet, as inf-ir build writes it")
            given = [{"files": files, "split": name} for name in names]
        return [datasets.SplitGenerator(name=name, gen_kwargs=kwargs) for name, kwargs in zip(names, given)]

    def _generate_examples(self, files: list[str], split: str | None) -> Iterator[tuple[Any, dict[str, Any]]]:
        names = list(self.info.features)
        for path in files:
            first = 0
            try:
                for batch in parquet_batches(path, names):
                    queries = batch.column("query_positive").to_pylist()
                    chosen = [row for row, query in enumerate(queries) if split is None or split_of(query) == split]
                    for row, record in zip(chosen, batch.take(pa.array(chosen, pa.int64())).to_pylist()):
                        yield f"{Path(path).name}/{first + row}", record
                    first += len(queries)
            except Exception as error:  # pyarrow raises all kinds for damage
                raise RecordError(f"{path}: cannot be read ({error}): {BUILD_AGAIN}") from error
