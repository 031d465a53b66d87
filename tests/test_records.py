"""Records are read whole or refused with the file, the row and the column."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from sentence_transformers_inf import RecordError, load_records, load_rows, training_dataset
from sentence_transformers_inf.corpora import load_training_data
from sentence_transformers_inf.records import (
    FEATURES,
    INSTRUCTION_TYPES,
    OPTIONAL_COLUMNS,
    PASSAGE_COLUMNS,
    REQUIRED_COLUMNS,
    ROW_COLUMNS,
    record_splits,
)
from tests.other_corpora import FOLLOWIR, PROMPTRIEVER, passage


def record(**changes):
    good = {name: f"text of {name}" for name in REQUIRED_COLUMNS}
    return good | changes


def write(path, records):
    path.write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(("split", "size"), [("train", 3195), ("validation", 81), ("test", 119)])
def test_the_bundled_corpus_has_its_splits(split, size):
    records = load_records("mini", split)
    assert len(records) == size
    assert records.features == FEATURES
    assert set(records["instruction_type"]) == set(INSTRUCTION_TYPES)


def test_the_bundled_splits_share_no_query_and_no_id():
    splits = [load_records("mini", split) for split in record_splits("mini")]
    assert sorted(record_splits("mini")) == ["test", "train", "validation"]
    for column in ("query_positive", "query_negative", "id"):
        values = [value for split in splits for value in set(split[column])]
        assert len(values) == len(set(values))


def test_records_survive_a_round_trip_through_jsonl_parquet_and_folders(tmp_path, few_records):
    folder = tmp_path / "corpus"
    folder.mkdir()
    few_records.to_parquet(folder / "train-00000-of-00002.parquet")
    few_records.to_parquet(folder / "train-00001-of-00002.parquet")
    few_records.select(range(2)).to_parquet(folder / "test.parquet")
    jsonl = tmp_path / "records.jsonl"
    few_records.to_json(jsonl)
    assert load_records(jsonl).to_list() == few_records.to_list()
    assert load_records(folder, "train").to_list() == few_records.to_list() * 2
    assert load_records(str(folder), "test").to_list() == few_records.to_list()[:2]


def test_the_published_columns_without_the_optional_ones_are_enough(tmp_path, few_records):
    path = tmp_path / "published.parquet"
    few_records.remove_columns(list(OPTIONAL_COLUMNS)).add_column("score", [1.0] * 4).to_parquet(path)
    assert load_records(path).column_names == list(REQUIRED_COLUMNS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [record(), {k: v for k, v in record().items() if k != "document"}],
            r"row 2: the column 'document' is missing",
        ),
        ([record(), record(), record(query_positive=" ")], r"row 3, column 'query_positive': the text is empty"),
        ([record(instruction_negative=None)], r"row 1, column 'instruction_negative': the value is null"),
        ([record(query_negative="text of query_positive")], r"row 1, column 'query_negative': the text is the same"),
        (
            [record(instruction_negative="text of instruction_positive ")],
            r"column 'instruction_negative': the text is the same",
        ),
        ([record(document=7)], r"row 1, column 'document': expected text"),
        ([], r"records.jsonl"),
    ],
)
def test_bad_records_are_refused_by_file_row_and_column(tmp_path, rows, message):
    path = write(tmp_path / "records.jsonl", rows)
    with pytest.raises(RecordError, match=message) as error:
        load_records(path)
    assert "records.jsonl" in str(error.value)


def test_a_parquet_file_without_a_column_is_refused_by_name(tmp_path):
    path = tmp_path / "r.parquet"
    Dataset.from_list([record()]).remove_columns("hard_negative_document_2").to_parquet(path)
    with pytest.raises(RecordError, match=r"r\.parquet: the column 'hard_negative_document_2' is missing"):
        load_records(path)


def test_broken_json_names_its_row(tmp_path):
    path = write(tmp_path / "records.jsonl", [record()])
    path.write_text(path.read_text(encoding="utf-8") + '{"document": ', encoding="utf-8")
    with pytest.raises(RecordError, match=r"row 2: not valid JSON"):
        load_records(path)


def test_what_is_not_there_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        load_records(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match="nobody/nothing"):
        load_records("nobody/nothing", "train")
    with pytest.raises(RecordError, match="there is no split 'dev'; it has"):
        load_records("mini", "dev")
    with pytest.raises(RecordError, match="name a split"):
        load_records("mini")
    with pytest.raises(RecordError, match=r"holds no \.jsonl or \.parquet"):
        load_records(tmp_path)
    (tmp_path / "records.txt").write_text("a,b\n")
    with pytest.raises(
        RecordError, match=r"records\.txt: expected a \.jsonl, \.parquet, \.csv, \.tsv, \.json or \.arrow file"
    ):
        load_records(tmp_path / "records.txt")


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_a_file_without_records_is_said_so_and_harms_no_others(name, few_records, tmp_path):
    """A build that keeps nothing writes one."""
    path = tmp_path / name
    write = few_records.to_parquet if path.suffix == ".parquet" else few_records.to_json
    few_records.select([]).to_parquet(path) if path.suffix == ".parquet" else path.touch()
    with pytest.raises(RecordError, match=f"{name}: there are no records in it"):
        load_records(path)
    write(tmp_path / name.replace(".", "-2."))
    assert len(load_records(tmp_path, "train")) == len(few_records)


def damaged(data):
    """What may become of a file on a disk."""
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    return {"empty": b"", "cut": data[: len(data) // 2], "flipped": bytes(flipped), "a list": b"[]", "lost": None}


@pytest.mark.parametrize("name", ["generator-train.arrow", "dataset_info.json", "cache-*.arrow"])
def test_a_damaged_cache_is_made_anew(name, few_records, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    few_records.to_json(tmp_path / "records.jsonl")
    view = training_dataset(load_records(tmp_path / "records.jsonl")).to_list()
    (path,) = (tmp_path / "cache").rglob(name)
    for kind, content in damaged(path.read_bytes()).items():
        path.unlink() if content is None else path.write_bytes(content)
        records = load_records(tmp_path / "records.jsonl")
        assert records.to_list() == few_records.to_list(), kind
        assert training_dataset(records).to_list() == view, kind


def test_a_sound_cache_is_kept(few_records, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    few_records.to_json(tmp_path / "records.jsonl")
    first, second = (load_records(tmp_path / "records.jsonl") for _ in range(2))
    assert first.cache_files == second.cache_files
    (path,) = (tmp_path / "cache").rglob("*.arrow")
    before = path.stat().st_mtime_ns
    load_records(tmp_path / "records.jsonl")
    assert path.stat().st_mtime_ns == before


def test_a_column_that_no_record_has_need_not_be_read(few_records, tmp_path):
    table = pyarrow.Table.from_pylist(few_records.to_list())
    table = table.append_column("when", pyarrow.array([1] * 4, pyarrow.timestamp("us", tz="Nowhere/X")))
    pyarrow.parquet.write_table(table, tmp_path / "records.parquet")
    assert load_records(tmp_path / "records.parquet").to_list() == few_records.to_list()


def test_the_training_view_has_the_three_aligned_rows(few_records):
    view = training_dataset(few_records)
    assert view.column_names == ["instructed_query", "poisoned_instruction", "poisoned_query", *PASSAGE_COLUMNS]
    row, source = view[0], few_records[0]
    assert row["instructed_query"] == {"instruction": source["instruction_positive"], "query": source["query_positive"]}
    assert row["poisoned_instruction"] == {
        "instruction": source["instruction_negative"],
        "query": source["query_positive"],
    }
    assert row["poisoned_query"] == {"instruction": source["instruction_positive"], "query": source["query_negative"]}
    assert [row[name] for name in PASSAGE_COLUMNS] == [source[name] for name in PASSAGE_COLUMNS]


# Other corpora


def test_records_are_three_rows(few_records, tmp_path):
    few_records.to_parquet(tmp_path / "train.parquet")
    rows, record = load_rows(tmp_path), few_records[0]
    assert rows.column_names == list(ROW_COLUMNS)
    assert len(rows) == 3 * len(few_records)
    assert rows[1] == {
        "instruction": record["instruction_negative"], "query": record["query_positive"],
        "passage": record["hard_negative_document_1"], "negative": record["document"],
    }  # fmt: skip


def test_promptriever_rows_have_instruction_negatives_first(tmp_path):
    Dataset.from_list(PROMPTRIEVER).to_parquet(tmp_path / "train.parquet")
    assert load_rows(tmp_path / "train.parquet").to_list() == [
        dict(zip(ROW_COLUMNS, ("The language.", "what is rust", "Rust A compiled language.", "Iron oxide."))),
        dict(zip(ROW_COLUMNS, ("Green tea.", "tea", "Sencha.", "Assam."))),
    ]


def test_followir_rows_pair_relevant_documents_with_others(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, FOLLOWIR)))
    assert load_rows(tmp_path).to_list() == [
        dict(zip(ROW_COLUMNS, ("Gangs only.", "crime", "A gang.", "A thief."))),
        dict(zip(ROW_COLUMNS, ("Gangs only.", "crime", "Two gangs.", None))),
    ]
    assert len(load_rows(tmp_path, limit=1)) == 1


def test_other_data_are_refused_by_their_columns(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(RecordError, match=r"train\.jsonl: neither InF-IR records .* it has the columns text"):
        load_rows(tmp_path)
    Dataset.from_list(PROMPTRIEVER[:1]).to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(RecordError, match="no row with an instruction"):
        load_rows(tmp_path / "bare.parquet")


@pytest.mark.parametrize(
    ("good", "change", "message"),
    [
        (PROMPTRIEVER[2], {"positive_passages": ...}, ": the column 'positive_passages' is missing; it has "),
        (PROMPTRIEVER[2], {"only_instruction": ...}, ": the column 'only_instruction' is missing; it has "),
        (PROMPTRIEVER[2], {"positive_passages": 5}, ", column 'positive_passages': expected a list of passages, got int"),
        (PROMPTRIEVER[2], {"positive_passages": ["a"]}, ", column 'positive_passages': expected passages with title and"),
        (PROMPTRIEVER[2], {"positive_passages": [passage("a", 5)]}, ", column 'title': expected text, got int"),
        (PROMPTRIEVER[2], {"positive_passages": [passage(None)]}, ", column 'positive_passages': the first passage has no"),
        (PROMPTRIEVER[2], {"new_negatives": 5}, ", column 'new_negatives': expected a list of passages, got int"),
        (PROMPTRIEVER[2], {"negative_passages": {}}, ", column 'negative_passages': expected a list of passages, got dict"),
        (PROMPTRIEVER[2], {"only_instruction": 5}, ", column 'only_instruction': expected text, got int"),
        (PROMPTRIEVER[2], {"only_query": None}, ", column 'only_query': the value is null"),
        (FOLLOWIR[0], {"query": ...}, ": the column 'query' is missing; it has "),
        (FOLLOWIR[0], {"label": ...}, ": the column 'label' is missing; it has "),
        (FOLLOWIR[0], {"document": ["a"]}, ", column 'document': expected text, got list"),
    ],
)
def test_a_row_of_other_data_is_refused_by_its_column(good, change, message, tmp_path):
    row = {name: value for name, value in (good | change).items() if value is not ...}
    path = write(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(RecordError) as error:
        load_rows(path)
    assert str(error.value).startswith(f"{path}, row 2{message}" if message[0] == ":" else f"{path}, row 2, column ")
    assert message in str(error.value)
    assert str(error.value).endswith("; mend the row, or take it out")


def test_training_data_are_records_or_rows(tmp_path, few_records):
    few_records.to_parquet(tmp_path / "records" / "train.parquet")
    Dataset.from_list(PROMPTRIEVER).to_parquet(tmp_path / "rows.parquet")
    few_records.to_parquet(tmp_path / "records" / "validation.parquet")
    records, validation = load_training_data(tmp_path / "records")
    assert records.to_list() == validation.to_list() == few_records.to_list()
    assert len(load_training_data(tmp_path / "records", limit=3)[0]) == 3
    assert len(load_training_data(tmp_path / "records", limit=10)[0]) == len(few_records)
    rows, validation = load_training_data(tmp_path / "rows.parquet", limit=1)
    assert validation is None
    assert rows.to_list() == load_rows(tmp_path / "rows.parquet").to_list()[:1], "the first with an instruction"
    (tmp_path / "other.jsonl").write_text('{"document": "a"}\n')
    with pytest.raises(RecordError, match=r"other\.jsonl, row 1: the column 'query_positive' is missing"):
        load_training_data(tmp_path / "other.jsonl")


def test_the_training_view_of_rows(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, FOLLOWIR)))
    pair = {"instruction": "Gangs only.", "query": "crime"}
    assert training_dataset(load_rows(tmp_path)).to_list() == [
        {"instructed_query": pair, "document": "A gang.", "hard_negative_document_1": "A thief."},
        {"instructed_query": pair, "document": "Two gangs.", "hard_negative_document_1": "Two gangs."},
    ]
    bare = training_dataset(load_rows(tmp_path), instructions=False)
    assert bare["instructed_query"][:] == [{"instruction": "", "query": "crime"}] * 2
