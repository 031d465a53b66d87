"""Search a small corpus in memory, with and without an instruction, and see what the instruction moved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets import load_dataset
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf.records import PASSAGE_COLUMNS, load_records

TEXT_COLUMNS = ("text", "passage", "document")


@dataclass(frozen=True)
class Hit:
    """A passage and its ranks (from 1); ``rank`` is under the instruction if there is one, ``plain_rank`` without it."""

    passage: str
    score: float
    rank: int
    plain_rank: int


def read_passages(source: str | Path) -> list[str]:
    """The passages of a corpus.

    Args:
        source: ``.txt`` (a passage per line), ``.jsonl`` or ``.parquet`` with a column ``text``, ``passage`` or
            ``document`` (and perhaps ``title``, put before it, as in BEIR), or ``"mini"``: the bundled test split.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Another format, no such column, an empty passage, or fewer than two passages.
    """
    if source == "mini":
        records = load_records("mini", "test")
        return [passage for name in PASSAGE_COLUMNS for passage in records[name]]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such corpus file")
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8").splitlines()
        passages = [line.strip() for line in lines if line.strip()]
    elif path.suffix in (".jsonl", ".parquet"):
        try:
            data = load_dataset("json" if path.suffix == ".jsonl" else "parquet", data_files=str(path), split="train")
        except Exception as error:  # datasets wraps whatever its readers raise in an error of its own
            raise ValueError(f"{path}: cannot be read: {error.__cause__ or error}") from error
        column = next((name for name in TEXT_COLUMNS if name in data.column_names), None)
        if column is None:
            raise ValueError(f"{path}: expected a column {', '.join(TEXT_COLUMNS)}; it has {', '.join(data.column_names)}")
        titles = data["title"] if "title" in data.column_names else [""] * len(data)
        for row, text in enumerate(data[column], start=1):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{path}, row {row}, column {column!r}: the passage is empty")
        passages = [f"{title or ''} {text}".strip() for title, text in zip(titles, data[column])]
    else:
        raise ValueError(f"{path}: expected a .txt, .jsonl or .parquet file")
    if len(passages) < 2:
        raise ValueError(f"{path}: a corpus of {len(passages)} passage(s) cannot be ranked; give it at least two")
    return passages


def search(
    model: SentenceTransformer,
    passages: list[str],
    query: str,
    instruction: str | None = None,
    top: int = 5,
    show_progress: bool = False,
) -> list[Hit]:
    """Rank passages for a query under an instruction.

    Args:
        model: From :func:`~sentence_transformers_inf.load_instruction_model`.
        passages: The corpus.
        query: The query.
        instruction: What the passages should be like; ``None`` or blank: plain search.
        top: How many passages.
        show_progress: Show the encoding.

    Returns:
        The first ``top`` passages under the instruction and those that it pushed out of the first ``top``, by rank.
    """
    if not query.strip():
        raise ValueError("the query is empty")
    corpus = model.encode_document(passages, convert_to_tensor=True, show_progress_bar=show_progress)
    pairs = [{"instruction": instruction or "", "query": query}, {"instruction": "", "query": query}]
    scores = model.similarity(model.encode_query(pairs, convert_to_tensor=True), corpus)
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranks = order.argsort(dim=1) + 1
    shown = dict.fromkeys([*order[0, :top].tolist(), *order[1, :top].tolist()])
    hits = [Hit(passages[i], float(scores[0, i]), int(ranks[0, i]), int(ranks[1, i])) for i in shown]
    return sorted(hits, key=lambda hit: hit.rank)
