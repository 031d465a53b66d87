"""Does a model obey instructions, and does it still retrieve without them? Measured on InF-IR records.

The pool is all passages of the records, three each. A record gives three instructed queries, (q+, I+), (q+, I-) and
(q-, I+), each with its own passage as the only right one, and two changes of instruction for p-MRR: (q+, I+) -> (q+, I-),
which makes d+ irrelevant, and (q+, I-) -> (q+, I+), which makes d1 irrelevant. The bare queries are scored as well: q+ has
the right passages d+ and d1, q- has d2. Of a record without q-, what there is counts.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.util import normalize_embeddings

from sentence_transformers_inf.evaluation import metrics
from sentence_transformers_inf.modules import check_embeddings
from sentence_transformers_inf.records import TRIPLES, triples_of

METRIC_NAMES = {
    "p_mrr": "p-MRR",
    "pair_accuracy": "pair accuracy",
    "triple_accuracy": "triple accuracy",
    "ndcg_at_10": "nDCG@10, instructed",
    "recall_at_1": "recall@1, instructed",
    "robustness_at_10": "Robustness@10",
    "plain_ndcg_at_10": "nDCG@10, plain queries",
}
"""What is measured and its name in tables, in their order; all times 100, p-MRR in [-100, 100], the others in [0, 100]."""

METRICS = tuple(METRIC_NAMES)
"""The keys of :data:`METRIC_NAMES`."""

_QUERIES_AT_A_TIME = 1024


class InstructionFollowingEvaluator(BaseEvaluator):
    """Measure instruction following on InF-IR records, alone or during training.

    Args:
        records: Records from :func:`~sentence_transformers_inf.load_records`.
        name: Prefix of the metrics and of the CSV files.
        batch_size: Texts encoded at a time.
        show_progress_bar: Show the encoding.
        write_csv: Write ``instruction_following_evaluation_{name}_results.csv`` (a line per call) and, with
            ``instruction_type`` in the records, ``..._per_type.csv`` of the last call.
        passage_embeddings: See :func:`measure`.

    The primary metric is ``p_mrr``. After a call, :attr:`result` holds the values of every record and
    :meth:`Result.per_type` the breakdown.

    Example:
        >>> from sentence_transformers_inf import load_instruction_model, load_records
        >>> evaluator = InstructionFollowingEvaluator(load_records("mini", split="validation"))
        >>> evaluator(load_instruction_model("sentence-transformers/all-MiniLM-L6-v2"))["p_mrr"]  # doctest: +SKIP
        3.7
    """

    def __init__(
        self,
        records: Dataset,
        name: str = "",
        batch_size: int = 32,
        show_progress_bar: bool = False,
        write_csv: bool = True,
        passage_embeddings: NDArray[np.float32] | None = None,
    ) -> None:
        super().__init__()
        self.records = records
        self.passage_embeddings = passage_embeddings
        self.name = name
        self.batch_size = batch_size
        self.show_progress_bar = show_progress_bar
        self.write_csv = write_csv
        self.primary_metric = "p_mrr"
        self.csv_file = f"instruction_following_evaluation{'_' + name if name else ''}_results.csv"
        self.result: Result | None = None

    def __call__(  # type: ignore[override]
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """The metrics of :data:`METRICS`, each under its name with the evaluator's name before it."""
        self.result = measure(model, self.records, self.batch_size, self.show_progress_bar, self.passage_embeddings)
        means = self.result.means()
        if output_path is not None and self.write_csv:
            self._write_csv(Path(output_path), means, epoch, steps)
        prefixed = self.prefix_name_to_metrics(means, self.name)
        self.store_metrics_in_model_card_data(model, prefixed, epoch, steps)
        return prefixed

    def _write_csv(self, folder: Path, means: dict[str, float], epoch: int, steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.csv_file
        is_new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(["epoch", "steps", *METRICS])
            writer.writerow([epoch, steps, *(means[metric] for metric in METRICS)])
        assert self.result is not None
        if per_type := self.result.per_type():
            with (folder / self.csv_file.replace("_results", "_per_type")).open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["instruction_type", "records", *METRICS])
                for name, values in per_type.items():
                    writer.writerow([name, *(values[key] for key in ("records", *METRICS))])

    def get_config_dict(self) -> dict[str, Any]:
        """What was measured on, for the model card."""
        return {"records": len(self.records)}


class Result:
    """The measurements of one model on N records.

    Attributes:
        values: For every metric that is a mean over records, its N values times 100 (``p_mrr``, ``pair_accuracy``,
            ``triple_accuracy``, ``ndcg_at_10``, ``recall_at_1``, ``plain_ndcg_at_10``).
        ranks: N×3×3 ranks in the pool of each record's passages d+, d1, d2 (last axis) under its instructed queries; 0 where
            a record has no q-.
    """

    def __init__(
        self,
        values: dict[str, NDArray[np.float64]],
        ranks: NDArray[np.int64],
        instructed_ndcg: NDArray[np.float64],
        queries: NDArray[np.object_],
        instruction_types: list[str | None] | None,
    ) -> None:
        self.values = values
        self.ranks = ranks
        self._instructed_ndcg = instructed_ndcg  # N×3, in [0, 1]; NaN where a record has no q-
        self._queries = queries  # N×3 bare queries
        self._instruction_types = instruction_types

    def means(self, chosen: NDArray[np.bool_] | None = None) -> dict[str, float]:
        """The metrics over all records, or over those that the mask chooses, times 100."""
        chosen = np.ones(len(self._queries), dtype=bool) if chosen is None else chosen
        means = {metric: float(values[chosen].mean()) for metric, values in self.values.items()}
        instructed = chosen[:, None] & ~np.isnan(self._instructed_ndcg)
        queries = self._queries[instructed].astype(str)
        means["robustness_at_10"] = 100 * metrics.robustness(self._instructed_ndcg[instructed], queries)
        return {metric: means[metric] for metric in METRICS}

    def per_type(self) -> dict[str, dict[str, float]]:
        """The metrics and the number of records of each instruction type; empty where the records have no types."""
        if self._instruction_types is None:
            return {}
        types = np.asarray([name or "" for name in self._instruction_types])
        return {
            str(name): {"records": int((types == name).sum()), **self.means(types == name)}
            for name in np.unique(types)
            if name
        }


def measure(
    model: SentenceTransformer,
    records: Dataset,
    batch_size: int = 32,
    show_progress_bar: bool = False,
    passage_embeddings: NDArray[np.float32] | None = None,
) -> Result:
    """Encode the queries and passages of the records and score them; see the module's docstring.

    Args:
        model: A model from :func:`~sentence_transformers_inf.load_instruction_model`.
        records: N records.
        batch_size: Texts encoded at a time.
        show_progress_bar: Show the encoding.
        passage_embeddings: 3N×d, those of d+, d1 and d2, record by record, where they were made before (anything for a d2
            that a record lacks); ``None``: the model encodes the passages.

    Raises:
        BrokenModelError: Embeddings are not finite, or all the same for different texts.
    """
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "show_progress_bar": show_progress_bar,
        "convert_to_tensor": True,
    }
    rows = [(record, triple) for record in records for triple in triples_of(record)]
    pairs = [{"instruction": record[instruction], "query": record[query]} for record, (query, instruction, _) in rows]
    queries = [pair["query"] for pair in pairs]
    passages = [record[passage] for record, (*_, passage) in rows]
    distinct_queries = list(dict.fromkeys(queries))
    passage_vectors = (
        model.encode_document(passages, **options)
        if passage_embeddings is None
        else torch.from_numpy(np.array(passage_embeddings[_present(records).ravel()], dtype=np.float32)).to(model.device)
    )
    return score_embeddings(
        records,
        instructed=model.encode_query(pairs, **options),
        plain=dict(zip(distinct_queries, model.encode_query(distinct_queries, **options))),
        passages=passage_vectors,
    )


def score_embeddings(
    records: Dataset, instructed: torch.Tensor, plain: dict[str, torch.Tensor], passages: torch.Tensor
) -> Result:
    """Score embeddings that were made elsewhere.

    Args:
        records: N records.
        instructed: R×d, the instructed queries of all rows, as :func:`~sentence_transformers_inf.records.triples_of` has
            them, record by record; R is 3N where every record has a twin query.
        plain: The embedding (d) of every bare query by its text.
        passages: R×d, the passages of these rows.

    Raises:
        BrokenModelError: Embeddings are not finite, or all the same for different texts.
    """
    n, present = len(records), _present(records)
    columns = [[records[column] for column in of_row] for of_row in TRIPLES]
    queries = np.array([query for query, _, _ in columns], dtype=object).T  # N×3
    texts = np.array([passage for *_, passage in columns], dtype=object).T[present].tolist()
    check_embeddings(passages, texts, "passages")
    check_embeddings(instructed, queries[present].tolist(), "instructed queries")
    check_embeddings(torch.stack(list(plain.values())), list(plain), "plain queries")
    instructed, passages = normalize_embeddings(instructed.float()), normalize_embeddings(passages.float())

    # Ranks of the record's own passages under each of its instructed queries, among the R passages of all.
    place = np.where(present, np.cumsum(present).reshape(n, 3) - 1, -1)
    own_passages = np.repeat(place[:, None, :], 3, axis=1)[present]
    row_ranks, row_scores = _ranks(instructed, passages, np.maximum(own_passages, 0))
    ranks, scores = np.zeros((n, 3, 3), dtype=np.int64), np.full((n, 3, 3), -np.inf)
    ranks[present] = np.where(own_passages >= 0, row_ranks, 0)
    scores[present] = np.where(own_passages >= 0, row_scores, -np.inf)
    scores[~present[:, 2], 2, 2] = 0.0  # a row that is not there prefers nothing wrongly
    own_ranks = ranks[:, [0, 1, 2], [0, 1, 2]]
    instructed_ndcg = np.where(present, metrics.ndcg_at_k(own_ranks.reshape(-1, 1), k=10).reshape(n, 3), np.nan)
    # d+ before and after (q+, I+) -> (q+, I-), and d1 before and after (q+, I-) -> (q+, I+).
    changes = metrics.rank_change(ranks[:, [0, 1], [0, 1]], ranks[:, [1, 0], [0, 1]])

    # The right passages of a bare query are those of all rows that have it.
    rows_of: dict[str, list[int]] = {}
    for row, query in enumerate(queries[present]):
        rows_of.setdefault(query, []).append(row)
    widest = max(len(rows) for rows in rows_of.values())
    relevant = np.array([rows + [-1] * (widest - len(rows)) for rows in rows_of.values()])
    plain_embeddings = normalize_embeddings(torch.stack([plain[query] for query in rows_of]).float())
    plain_ranks, _ = _ranks(plain_embeddings, passages, np.maximum(relevant, 0))
    plain_ndcg = dict(zip(rows_of, metrics.ndcg_at_k(np.where(relevant >= 0, plain_ranks, 0), k=10)))

    values = {
        "p_mrr": changes.mean(axis=1),
        "pair_accuracy": metrics.pair_correct(scores).astype(float),
        "triple_accuracy": metrics.triple_correct(scores).astype(float),
        "ndcg_at_10": np.nanmean(instructed_ndcg, axis=1),
        "recall_at_1": (own_ranks == 1).sum(axis=1) / present.sum(axis=1),
        "plain_ndcg_at_10": np.array(
            [
                np.mean([plain_ndcg[query] for query in (of_record[0], of_record[2]) if query is not None])
                for of_record in queries
            ]
        ),
    }
    types = list(records["instruction_type"]) if "instruction_type" in records.column_names else None
    return Result({metric: 100 * value for metric, value in values.items()}, ranks, instructed_ndcg, queries, types)


def _present(records: Dataset) -> NDArray[np.bool_]:
    """N×3: whether a record has the row."""
    return np.array([[True, True, query is not None] for query in records[TRIPLES[2][0]]])


def _ranks(queries: torch.Tensor, passages: torch.Tensor, of: NDArray) -> tuple[NDArray, NDArray]:
    """Ranks and scores (Q×n) of the passages ``of`` each query, without holding the whole Q×D matrix."""
    ranks, scores = [], []
    for start in range(0, len(queries), _QUERIES_AT_A_TIME):
        part = slice(start, start + _QUERIES_AT_A_TIME)
        similarities = (queries[part] @ passages.T).cpu().numpy()
        ranks.append(metrics.ranks_of(similarities, of[part]))
        scores.append(np.take_along_axis(similarities, of[part], axis=1))
    return np.concatenate(ranks), np.concatenate(scores)
