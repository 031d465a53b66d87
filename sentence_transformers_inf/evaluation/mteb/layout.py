"""How MTEB lays out a retrieval task of one subset and one split."""

from typing import Any

from datasets import Dataset


def as_test_split(
    corpus: list[dict[str, str]],
    queries: list[dict[str, str]],
    relevant: dict[str, dict[str, int]],
    ranked: dict[str, list[str]] | None = None,
) -> dict[str, Any]:
    """The ``dataset`` of an ``AbsTaskRetrieval``.

    Args:
        corpus: Documents, each ``id``, ``title`` and ``text``.
        queries: Each ``id``, ``text`` and ``instruction``.
        relevant: By query: the relevance of its judged documents.
        ranked: By query: the documents that it ranks; ``None``: all.
    """
    split = {"corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(queries)}
    return {"default": {"test": {**split, "relevant_docs": relevant, "top_ranked": ranked}}}
