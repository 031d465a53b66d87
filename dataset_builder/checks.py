"""Is a corpus fit to publish? Schema, duplicates, leakage, overlap of splits, and texts of evaluation sets."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from dataset_builder.quality import Duplicates, normalised, runs, tuple_problem
from sentence_transformers_inf.reading import format_of, is_table, read_lines, read_table

NGRAM = 8
"""So many words in a row in common with an evaluation set count as contamination; see
:func:`~dataset_builder.quality.runs`."""

_EXAMPLES = 5


@dataclass
class CheckReport:
    """What was found; ``errors`` are reasons not to publish."""

    records: dict[str, int]
    """Records by split."""
    errors: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few record ids of each finding."""

    def add(self, kind: str, finding: str, record: str) -> None:
        """Count a finding, ``kind`` ``error`` or ``warning``."""
        (self.errors if kind == "error" else self.warnings)[finding] += 1
        if len(found := self.examples.setdefault(finding, [])) < _EXAMPLES:
            found.append(record)


def check_records(splits: dict[str, Dataset], evaluation_texts: Iterable[str] = ()) -> CheckReport:
    """Check the records of all splits.

    Args:
        splits: Records by split, as :func:`~sentence_transformers_inf.load_records` returns them (which checks the
            schema).
        evaluation_texts: Queries and instructions of evaluation sets; see :func:`read_evaluation_texts`.

    Returns:
        The report. Errors: an exact duplicate, a query in two splits, eight words in a row of an evaluation text.
        Warnings: a near duplicate, what the builder's free checks would reject, a twin query that is a query of another
        split.
    """
    report = CheckReport({name: len(records) for name, records in splits.items()})
    evaluation = {run for text in evaluation_texts for run in runs(text, NGRAM)}
    where: dict[str, str] = {}
    duplicates = Duplicates()
    for split, records in splits.items():
        for number, record in enumerate(tqdm(records, desc=split, disable=None)):
            name = f"{split}/{record.get('id') or number + 1}"
            text = f"{record['query_positive']}\n{record['instruction_positive']}\n{record['document']}"
            if (found := duplicates.add(name, text)) is not None:
                report.add("error" if found[0] == "duplicate" else "warning", found[0], name)
            if (problem := tuple_problem(record)) is not None:
                report.add("warning", problem, name)
            if where.setdefault(normalised(record["query_positive"]), split) != split:
                report.add("error", "a query in two splits", name)
            columns = ("query_positive", "query_negative", "instruction_positive", "instruction_negative")
            if evaluation and any(not evaluation.isdisjoint(runs(record[column] or "", NGRAM)) for column in columns):
                report.add("error", f"{NGRAM} words of an evaluation text", name)
    for split, records in splits.items():
        for number, record in enumerate(records):
            if where.get(normalised(record["query_negative"] or ""), split) != split:
                name = f"{split}/{record.get('id') or number + 1}"
                report.add("warning", "a twin query that is a query of another split", name)
    return report


def read_evaluation_texts(sources: Sequence[str]) -> list[str]:
    """Queries and instructions of evaluation sets.

    Args:
        sources: Names of MTEB tasks or benchmarks (extra ``eval``), or files: ``.txt`` with a text a line, or a
            table (:func:`~sentence_transformers_inf.reading.read_table`) of which every string is read.

    Raises:
        ValueError: No such task, benchmark or file.
    """
    texts: list[str] = []
    for source in sources:
        path = Path(source)
        if format_of(path) == ".txt":
            texts += [line.strip() for _, line in read_lines(path) if line.strip()]
        elif is_table(path):
            texts += [text for _, row in read_table(path) for text in _strings(row)]
        else:
            texts += _mteb_texts(source)
    return texts


def _strings(value: Any) -> list[str]:
    texts, rest = [], [value]  # no recursion: a value may be nested deep
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            texts.append(value)
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        rest += reversed(list(inside))
    return texts


def _mteb_texts(name: str) -> list[str]:
    try:
        import mteb
    except ImportError as error:
        raise ImportError(f"{name}: tasks are read through MTEB: pip install 'sentence-transformers-inf[eval]'") from error
    try:
        tasks = [mteb.get_task(name)]
    except (KeyError, ValueError):
        try:
            tasks = list(mteb.get_benchmark(name).tasks)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{name}: there is no such MTEB task or benchmark, and no such file") from error
    texts = []
    for task in tasks:
        task.load_data()
        for subset in getattr(task, "dataset", {}).values():
            for data in subset.values():
                for row in data["queries"]:
                    texts += [str(row[column]) for column in ("text", "instruction") if row.get(column)]
    return texts
