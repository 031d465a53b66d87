"""Records without a twin query, as a build on mined passages makes them: they have two rows, and are read, trained on and
measured like others."""

import json

import numpy as np
import pytest
import torch

from sentence_transformers_inf import load_instruction_model, load_records, load_rows, training_dataset
from sentence_transformers_inf.evaluation import measure, score_embeddings
from sentence_transformers_inf.losses import CachedInstructionContrastiveLoss, InstructionContrastiveLoss
from sentence_transformers_inf.passages import distinct_passages, passage_rows
from sentence_transformers_inf.records import TWIN_QUERY_COLUMNS, RecordError
from tests.training import train


def without_twins(records, rows=None):
    """The records, of which those in ``rows`` (``None``: all) lack the twin query and its passage."""

    def change(record, number):
        return record | (dict.fromkeys(TWIN_QUERY_COLUMNS) if rows is None or number in rows else {})

    return records.map(change, with_indices=True, features=records.features)


@pytest.mark.parametrize("rows", [None, [3]], ids=["all", "the last"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_they_are_read_from_files(few_records, tmp_path, suffix, rows):
    records = without_twins(few_records, rows)
    path = tmp_path / f"train{suffix}"
    records.to_parquet(path) if suffix == ".parquet" else records.to_json(path)
    assert load_records(path).to_list() == records.to_list()
    assert len(load_rows(path)) == 3 * len(records) - (4 if rows is None else 1)


def test_half_a_third_row_is_refused(few_records, tmp_path):
    broken = few_records[0] | {"query_negative": None}
    (tmp_path / "train.jsonl").write_text(json.dumps(broken) + "\n")
    with pytest.raises(
        RecordError, match=r"row 1, column 'query_negative': the value is missing, and 'hard_negative_document_2'"
    ):
        load_records(tmp_path)


def test_the_training_view_repeats_one_of_the_two_rows(few_records):
    view = training_dataset(without_twins(load_records("mini", "train").select(range(40))))
    twice = [
        "first" if row["poisoned_query"] == row["instructed_query"] else "second"
        for row in view
        if (row["poisoned_query"], row["hard_negative_document_2"])
        in ((row["instructed_query"], row["document"]), (row["poisoned_instruction"], row["hard_negative_document_1"]))
    ]
    assert len(twice) == 40
    assert 8 < twice.count("first") < 32  # neither row gets all the weight
    assert training_dataset(few_records)[0]["poisoned_query"]["query"] == few_records[0]["query_negative"]


@pytest.mark.parametrize("kind", [InstructionContrastiveLoss, CachedInstructionContrastiveLoss])
def test_a_repeated_row_is_no_negative_of_itself(tiny, few_records, kind):
    """The loss of a record without a twin query is the weighted mean of the losses of its two rows."""
    model = load_instruction_model(tiny).eval().double()
    records = without_twins(few_records.select([0]))
    view = training_dataset(records)
    loss = kind(model, objective="multi_P_I")
    value = loss([model.preprocess(view[name][:]) for name in view.column_names], None)
    record, row = records[0], view[0]
    queries = [row["instructed_query"], row["poisoned_instruction"]]
    passages = [record["document"], record["hard_negative_document_1"]]
    q = torch.from_numpy(model.encode(queries, task="query")).double()
    p = torch.from_numpy(model.encode(passages, task="document")).double()
    scores = 20 * torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(p).T
    right = torch.arange(2)
    of_rows = torch.nn.functional.cross_entropy(scores, right, reduction="none")  # P: the passages
    of_rows = of_rows + torch.nn.functional.cross_entropy(scores.T, right, reduction="none")  # I: the instructions
    repeated = 0 if row["poisoned_query"] == row["instructed_query"] else 1
    assert value.item() == pytest.approx((of_rows.sum() + of_rows[repeated]).item() / 3, abs=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"mini_batch_size": 3}, {"update": "queries", "lora_r": 4}], ids=["plain", "cached", "adapter"]
)
def test_they_are_trained_on(tiny, few_records, tmp_path, settings):
    records = without_twins(few_records, [0, 2])
    model = train(records, tiny, tmp_path / "m", save_strategy="no", learning_rate=1e-3, **settings)
    pair = {"instruction": records[0]["instruction_positive"], "query": records[0]["query_positive"]}
    base = load_instruction_model(tiny)
    moved = np.abs(model.encode_query([pair]) - base.encode_query([pair])).max()
    assert 1e-6 < moved < 2


def test_what_is_there_is_measured(few_records):
    """All metrics of records of which some have no twin query, from their definitions."""
    torch.manual_seed(0)
    records = without_twins(few_records, [1])
    q, p = torch.randn(11, 6), torch.randn(11, 6)
    rows = [(0, 1, 2), (3, 4), (5, 6, 7), (8, 9, 10)]
    plain = {text: torch.randn(6) for name in ("query_positive", "query_negative") for text in records[name] if text}
    result = score_embeddings(records, q, plain, p)
    scores = (torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(p).T).numpy()
    rank = lambda row, passage: int((scores[row] > scores[row, passage]).sum()) + 1  # noqa: E731
    own = [[rank(row, row) for row in of_record] for of_record in rows]
    gain = lambda at: 1 / np.log2(at + 1) if at <= 10 else 0.0  # noqa: E731
    assert result.values["ndcg_at_10"] == pytest.approx([100 * np.mean([gain(at) for at in of]) for of in own])
    assert result.values["recall_at_1"] == pytest.approx([100 * np.mean([at == 1 for at in of]) for of in own])
    triple = [all(scores[a, a] > scores[a, b] for a in of for b in of if a != b) for of in rows]
    assert result.values["triple_accuracy"] == pytest.approx([100.0 * right for right in triple])
    pair = [scores[of[0], of[0]] > scores[of[0], of[1]] and scores[of[1], of[1]] > scores[of[1], of[0]] for of in rows]
    assert result.values["pair_accuracy"] == pytest.approx([100.0 * right for right in pair])
    assert result.ranks[1].tolist() == [[rank(3, 3), rank(3, 4), 0], [rank(4, 3), rank(4, 4), 0], [0, 0, 0]]
    assert all(np.isfinite(value) for value in result.means().values())


def test_passages_made_before_are_measured_alike(model, few_records):
    records = without_twins(few_records, [0, 3])
    texts = distinct_passages([records])
    assert len(texts) == 10
    vectors = model.encode_document(texts)[passage_rows(records, texts).ravel()]
    for metric, value in measure(model, records).means().items():
        assert measure(model, records, passage_embeddings=vectors).means()[metric] == pytest.approx(value, abs=1e-9)
