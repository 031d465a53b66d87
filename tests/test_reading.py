"""Files as users bring them: read whole, or refused with file, row and remedy."""

import contextlib
import csv
import gzip
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset_builder.agreement import read_labels
from dataset_builder.checks import read_evaluation_texts
from dataset_builder.sources import read_pairs
from sentence_transformers_inf import load_instruction_model, load_records
from sentence_transformers_inf.corpora import HELD_OUT, hold_out, load_training_data, read_passages, was_trained_on
from sentence_transformers_inf.evaluation.elsewhere import measure_plain
from sentence_transformers_inf.evaluation.narratives import BUNDLED_TOPICS, read_topics
from sentence_transformers_inf.passages import read_passage_embeddings
from sentence_transformers_inf.reading import RecordError, read_json_lines, read_qrels, read_table
from sentence_transformers_inf.recipe import read_yaml
from sentence_transformers_inf.records import REQUIRED_COLUMNS, record_splits
from tests.beir import PASSAGES, QUERIES, RIGHT, write_beir
from tests.commands import call, error_line

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
ROWS = st.lists(st.fixed_dictionaries({"query": TEXT.filter(str.strip), "passage": TEXT}), min_size=1, max_size=4)
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"


def record(number=0, **changes):
    return {name: f"text {number} of {name}" for name in REQUIRED_COLUMNS} | changes


def as_csv(rows, delimiter=",", end="\r\n"):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def packed(data, ending):
    """Bytes as a file with that ending holds them."""
    if ending == ".gz":
        return gzip.compress(data)
    if ending == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return data


def write(path, text):
    path.write_bytes(packed(text.encode(), path.suffix))
    return path


def write_stream(path, table, size=1000):
    """An Arrow stream as ``datasets`` writes it, and where each of its batches ends."""
    ends = []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        for batch in table.to_batches(size):
            stream.write_batch(batch)
            ends.append(file.tell())
    return ends


# Every text in every format


@SETTINGS
@given(rows=ROWS, delimiter=st.sampled_from(",;\t|"), mark=st.sampled_from(["", BOM]),
       ending=st.sampled_from(["", ".gz", ".zst"]), end=st.sampled_from(["\n", "\r\n"]), escaped=st.booleans())  # fmt: skip
def test_any_text_survives_every_format_and_compression(rows, delimiter, mark, ending, end, escaped, tmp_path):
    lines = [json.dumps(row, ensure_ascii=escaped) for row in rows]
    tsv = as_csv(rows, "\t")
    for name, text in (
        ("a.jsonl", end + "".join(f"{line}{end}{end}" for line in lines)),
        ("a.csv", as_csv(rows, delimiter)),
        ("a.tsv", tsv),
        ("a.json", f"\n[{','.join(lines)}]"),
    ):
        path = write(tmp_path / f"{name}{ending}", mark + text)
        assert [row for _, row in read_table(path)] == rows
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row for _, row in read_table(tmp_path / "a.parquet")] == rows


@SETTINGS
@given(
    cut=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
    name=st.sampled_from(["a.jsonl.gz", "a.csv.zst", "a.parquet", "a.arrow"]),
)
def test_a_cut_or_damaged_file_is_refused_by_name_or_read_whole(cut, flip, name, tmp_path):
    rows, path = [{"query": f"question {number}", "passage": "é" * number} for number in range(20)], tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name == "a.arrow":
        write_stream(path, pa.Table.from_pylist(rows), 7)
    else:
        write(path, as_csv(rows) if ".csv" in name else "".join(json.dumps(row) + "\n" for row in rows))
    whole = path.read_bytes()
    place = int(cut * len(whole))
    path.write_bytes(whole[:place])
    with pytest.raises(RecordError, match=name):
        list(read_table(path))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
    with contextlib.suppress(RecordError):
        list(read_table(path))  # nothing else is raised


def test_no_flipped_bit_of_an_arrow_file_ends_the_process(tmp_path):
    path = tmp_path / "a.arrow"
    write_stream(path, pa.table({"text": [f"the sky is blue {number}" for number in range(64)]}))
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x80]) + whole[place + 1 :])
        with contextlib.suppress(RecordError):
            assert len(list(read_table(path))) == 64


def test_an_arrow_file_that_is_cut_between_two_batches_is_refused(tmp_path):
    path = tmp_path / "a.arrow"
    end = write_stream(path, pa.table({"text": ["a", "b", "c"]}), 2)[0]
    assert len(list(read_table(path))) == 3
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(RecordError, match=r"a\.arrow, row 3: cannot be read as arrow \(it is cut.*copy it again"):
        list(read_table(path))


def write_columns(path, table):
    write_stream(path, table) if path.suffix == ".arrow" else pq.write_table(table, path)
    return path


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_only_the_columns_that_are_wanted_must_be_sound(ending, tmp_path):
    when = pa.array([1, 2], pa.timestamp("us", tz="Nowhere/X"))
    path = write_columns(tmp_path / f"zone{ending}", pa.table({"a": ["x", "y"], "when": when}))
    assert [row for _, row in read_table(path, ["a"])] == [{"a": "x"}, {"a": "y"}]
    with pytest.raises(RecordError, match=rf"zone\{ending}: cannot be read as .*'when'.*Nowhere/X"):
        list(read_table(path))
    texts = pa.array(["x", "y"])
    path = write_columns(tmp_path / f"twice{ending}", pa.table([texts, texts, texts], ["a", "b", "b"]))
    assert [row for _, row in read_table(path, ["a"])] == [{"a": "x"}, {"a": "y"}]
    with pytest.raises(RecordError, match=rf"twice\{ending}: there are two columns 'b'; rename one"):
        list(read_table(path))


def test_a_line_ends_at_a_newline_only(tmp_path):
    texts = [f"one{mark}line" for mark in ("\f", "\v", "\x1c", "\x1e", "\x85", "\u2028", "\u2029", "\r")]
    path = write(tmp_path / "a.txt", BOM + "\r\n".join(texts))
    assert read_passages(path) == texts
    assert read_evaluation_texts([str(path)]) == texts
    write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts))
    assert read_passages(tmp_path / "a.jsonl") == texts


DEEP = "[" * 50_000
BAD = {
    "another encoding": ('{"query": "Müller"}'.encode("latin-1"), "not UTF-8 text (byte 0xfc); save the file in UTF-8"),
    "utf-16": ('{"query": "a"}'.encode("utf-16-le"), "a NUL byte"),
    "half a character": (b'{"query": "a \\uD800 b"}', r"\ud800 is half a character"),
    "a long number": (b'{"query": ' + b"7" * 5000 + b"}", "not valid JSON"),
    "not a number": (b'{"query": NaN}', "NaN is no JSON; write null"),
    "infinity": (b'{"query": -Infinity}', "-Infinity is no JSON; write null"),
    "a list": (b"[1]", "expected a JSON object, got list"),
    "half a row": (b'{"query": "a', "not valid JSON"),
    "a key twice": (b'{"query": "a", "query": "b"}', "not valid JSON (there are two keys 'query'; rename one)"),
    "deep": (f'{{"query": {DEEP}'.encode(), "nested too deep"),
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_a_row_that_cannot_be_read_is_named(line, message, ending, tmp_path):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(packed(b"\n".join([json.dumps({"query": "q", "passage": "p"}).encode(), line, b""]), ending))
    for read in (read_table, read_pairs, read_json_lines):
        with pytest.raises(RecordError) as caught:
            list(read(path))
        assert str(caught.value).startswith(f"{path}, row 2: ")
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query,passage\nq,p\nq,p,with,commas\n", "row 2: 4 field(s), but the header has 2; put a text that holds ','"),
        ("query;passage\nq;p\nq\n", "row 2: 1 field(s), but the header has 2"),
        ('query,passage\nq,p\nq,"p\n', "row 2: unexpected end of data; put a text in double quotes"),
        ("query,passage,query\nq,p,q\n", "header: there are two columns 'query'"),
        ("query,passage\rq,p\r", "header: new-line character"),
        ("query,passage\nq,p\n\nq,\0\n", "row 3: there is a NUL byte"),
    ],
)
def test_a_row_of_another_width_is_an_error(text, message, tmp_path):
    with pytest.raises(RecordError) as caught:
        list(read_pairs(write(tmp_path / "a.csv", text)))
    assert str(caught.value).startswith(f"{tmp_path / 'a.csv'}, {message}")


def test_a_table_of_another_kind_is_refused(tmp_path):
    for name in ("a.xlsx", "a.jsonl.bz2"):
        write(tmp_path / name, "x")
        for read in (read_pairs, load_records, read_labels, read_passages):
            with pytest.raises(ValueError, match=rf"{name}: expected a \.jsonl"):
                list(read(tmp_path / name))


def test_a_file_whose_name_is_no_text_is_refused(tmp_path):
    (tmp_path / "b\udcff.jsonl").write_text(json.dumps(record()))
    for read in (load_records, read_passages):
        with pytest.raises(RecordError, match=r"b\\udcff\.jsonl': the name is not UTF-8; rename the file"):
            read(tmp_path if read is load_records else tmp_path / "b\udcff.jsonl")


def test_settings_are_read_as_other_texts(tmp_path):
    path = write(tmp_path / "a.yaml", f"{BOM}seed: 3\r\n")
    assert read_yaml(path) == {"seed": 3}
    for content in (b"a: \xfc", b"a: \0", b"[" * 5000, b"a: " + b"7" * 5000, b"a: 2024-99-99"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)):
            read_yaml(path)


def test_every_text_of_an_evaluation_set_is_read_however_deep(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": ' + "[" * 700 + '"deep"' + "]" * 700 + ', "b": [{"c": "x", "d": 1}, "y"]}')
    assert read_evaluation_texts([str(path)]) == ["deep", "x", "y"]


def test_labels_and_vectors_come_in_any_table(tmp_path):
    rows = [{"item": "1", "annotator": "ann", "label": "x;y"}, {"item": "2", "annotator": "ann", "label": "z"}]
    path = write(tmp_path / "labels.csv.gz", BOM + as_csv(rows, ";"))
    assert read_labels(path) == {"ann": {"1": "x;y", "2": "z"}}
    vectors = [{"text": text, "embedding": [number, 1]} for number, text in enumerate("abc")]
    path = write(tmp_path / "vectors.jsonl.zst", "".join(json.dumps(row) + "\n" for row in vectors))
    assert np.array_equal(read_passage_embeddings(path, ["c", "a"]), [[2, 1], [0, 1]])
    write(path, "".join(json.dumps(row) + "\n" for row in (vectors[0], {"text": "b", "embedding": [1]})))
    with pytest.raises(ValueError, match=r"row 2, column 'embedding'"):
        read_passage_embeddings(path, ["a", "b"])
    write(path, json.dumps({"text": "a", "embedding": [[1], [1, 2]]}))
    with pytest.raises(ValueError, match=r"row 1, column 'embedding': expected as many numbers"):
        read_passage_embeddings(path, ["a"])


def test_topics_are_read_as_other_tables(tmp_path):
    text = BUNDLED_TOPICS.read_text(encoding="utf-8")
    assert read_topics(write(tmp_path / "a.jsonl.gz", BOM + text.replace("\n", "\r\n"))) == read_topics(BUNDLED_TOPICS)


# Records


def test_records_are_read_by_our_features(tmp_path):
    """Not by what a reader makes of the first thousands."""
    rows = [
        record(
            row, topic="late" if row > 8994 else None, id=row if row % 2 else str(row), meta={"a": [row, None]}, tags=["x"]
        )
        for row in range(9000)
    ]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    records = load_records(path)
    assert records["id"][:] == [str(row) for row in range(9000)]
    assert records["topic"][:] == [None] * 8995 + ["late"] * 5
    assert set(records.column_names) == {"id", "topic", *REQUIRED_COLUMNS}
    write(path, json.dumps(record(id={"a": 1})))
    with pytest.raises(RecordError, match=r"row 1, column 'id': expected text or a number, got dict"):
        load_records(path)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.jsonl.zst", "a.json", "A.CSV"])
def test_records_come_in_every_table(name, tmp_path):
    rows = [record(1, id=""), record(2, id="b")]
    lines = ",".join(map(json.dumps, rows))
    delimiter = "\t" if ".tsv" in name else ";"
    text = f"[{lines}]" if name == "a.json" else lines.replace("},{", "}\n{") if "jsonl" in name else as_csv(rows, delimiter)
    records = load_records(write(tmp_path / name, text))
    assert records.to_list() == [row | {"id": row["id"] or None} for row in rows]


def test_a_row_is_named_by_its_line(tmp_path):
    path = write(tmp_path / "a.jsonl", f"{json.dumps(record(1))}\n\n{json.dumps(record(2, document=' '))}\n")
    with pytest.raises(RecordError, match=r"a\.jsonl, row 3, column 'document': the text is empty"):
        load_records(path)


@pytest.mark.parametrize("configs", [True, False])
def test_a_folder_as_on_the_hub_is_read(configs, tmp_path):
    (tmp_path / "data").mkdir()
    for split, number in (("train", 3), ("test", 1)):
        rows = Dataset.from_list([record(row, id=row) for row in range(number)])
        rows.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    if configs:
        files = "  data_files:\n  - {split: train, path: data/train-*}\n  - {split: mine, path: data/test-*}\n"
        write(tmp_path / "README.md", f"---\nconfigs:\n- config_name: default\n{files}---\n# Data\n")
    assert record_splits(tmp_path) == ["train", "mine" if configs else "test"]
    assert load_records(tmp_path, "train")["id"][:] == ["0", "1", "2"]
    assert len(load_records(tmp_path, "mine" if configs else "test")) == 1


def test_a_folder_of_save_to_disk_is_read_and_left_as_it_is(tmp_path):
    rows = Dataset.from_list([record(row, id=row, score=1.0) for row in range(3)])
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=rows, dev=rows.select([0])).save_to_disk(str(tmp_path / "two"))
    assert load_records(tmp_path / "one").to_list() == [record(row, id=str(row)) for row in range(3)]
    assert record_splits(tmp_path / "two") == ["train", "dev"]
    assert len(load_records(tmp_path / "two", "dev")) == 1
    (data,) = (tmp_path / "one").glob("*.arrow")  # nothing else was written there
    data.write_bytes(data.read_bytes()[:-999])
    with pytest.raises(RecordError, match=r"one: cannot be read|data-.*\.arrow: cannot be read as arrow"):
        load_records(tmp_path / "one")


def test_a_saved_dataset_that_is_cut_between_two_batches_is_refused(tmp_path):
    Dataset.from_list([record(row) for row in range(3)]).save_to_disk(str(tmp_path / "one"))
    (data,) = (tmp_path / "one").glob("*.arrow")
    end = write_stream(data, pa.Table.from_pylist([record(row) for row in range(3)]), 1)[1]
    assert len(load_records(tmp_path / "one")) == 3
    data.write_bytes(data.read_bytes()[:end])
    with pytest.raises(RecordError, match=r"data-.*\.arrow, row 3: cannot be read as arrow \(it is cut"):
        load_records(tmp_path / "one")


# Relevance judgments

JUDGED = [("q 1", "p1", 2.0), ("q 1", "p2", -1.0), ("q2", "p3", 1.0)]


@pytest.mark.parametrize("trec", [True, False])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("mark", ["", BOM])
def test_qrels_of_beir_and_trec_are_read(trec, header, mark, tmp_path):
    lines = ["query-id\tcorpus-id\tscore"] * header
    lines += [f"{query}\t{'0' + chr(9) if trec else ''}{passage}\t{score}" for query, passage, score in JUDGED]
    path = write(tmp_path / "qrels.tsv", mark + "\r\n".join([*lines, "", "q3 0 p4 1", "q3 p5 0"]))
    assert [row[1:] for row in read_qrels(path)] == [*JUDGED, ("q3", "p4", 1.0), ("q3", "p5", 0.0)]


@pytest.mark.parametrize("line", ["q\tp\thigh", "q\tp", "q 0 p 1 run", "q\tp\tnan"])
def test_a_judgment_that_is_none_is_named(line, tmp_path):
    with pytest.raises(RecordError, match=r"qrels\.tsv, row 2: "):
        list(read_qrels(write(tmp_path / "qrels.tsv", f"q\tp\t1\n{line}\n")))


def test_trec_s_judgments_give_the_pairs_and_the_measure_of_beir_s(tiny, tmp_path):
    model, folder = load_instruction_model(tiny), write_beir(tmp_path / "beir")
    expected = measure_plain(model, folder), [(pair.query, pair.passage) for pair in read_pairs(folder)]
    assert expected[1] == [(QUERIES[query], PASSAGES[passage]) for query, passage in RIGHT.items()]
    lines = [f"{query} 0 {passage} 1.0" for query, passage in RIGHT.items()]
    write(folder / "qrels.tsv.gz", "\n".join([*lines, "q1 0 p1 -1"]))
    (folder / "qrels.tsv").unlink()
    write(folder / "corpus.jsonl.gz", BOM + (folder / "corpus.jsonl").read_text(encoding="utf-8").replace("\n", "\n\n"))
    (folder / "corpus.jsonl").unlink()
    assert measure_plain(model, folder) == expected[0]
    assert [(pair.query, pair.passage) for pair in read_pairs(folder)] == expected[1]
    write(folder / "qrels.tsv.gz", "q1 0 p9 1")
    for read in (read_pairs, lambda folder: measure_plain(model, folder)):
        with pytest.raises(ValueError, match=r"qrels\.tsv\.gz, row 1: corpus\.jsonl has no text for 'p9'"):
            list(read(folder))


# Pairs that are no records yet


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_own_pairs_are_told_how_to_become_records(command, tiny, tmp_path):
    arguments = {"train": ["train", "--base", tiny, "--output", tmp_path / "m"], "evaluate": ["evaluate", tiny]}[command]
    pairs = [{"query": "q", "passage": "p"}]
    for name, text in (("my pairs.csv", as_csv(pairs)), ("p.jsonl", json.dumps(pairs[0])), ("p.tsv", as_csv(pairs, "\t"))):
        path = write(tmp_path / name, text)
        status, _, err = call("inf-embed", *arguments, "--data", path)
        assert status == 2
        quoted = f"'{path}'" if " " in name else path
        assert f"inf-ir build --pairs {quoted} --output my-data" in error_line(err)
    path = write(tmp_path / "other.csv", as_csv([{"question": "q", "answer": "a"}]))
    status, _, err = call("inf-embed", *arguments, "--data", path)
    assert "--query-column question --passage-column answer" in error_line(err)
    status, _, err = call("inf-embed", *arguments, "--data", write_beir(tmp_path / "beir"))
    assert f"inf-ir build --pairs {tmp_path / 'beir'} --output my-data" in error_line(err)
    assert not (tmp_path / "m").exists()


# What is held out of training


@given(numbers=st.lists(st.integers(0, 10**6), min_size=60, max_size=90, unique=True), more=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_a_share_is_held_out_and_stays_so(numbers, more):
    queries = [f"Query {number}" for number in numbers]
    records = Dataset.from_dict({"query_positive": queries + [query.upper() + " " for query in queries[:9]]})
    others, held = hold_out(records)
    assert sorted([*others["query_positive"], *held["query_positive"]]) == sorted(records["query_positive"])
    fold = {query.strip().casefold() for query in held["query_positive"]}
    assert fold.isdisjoint(query.strip().casefold() for query in others["query_positive"])
    grown = hold_out(Dataset.from_dict({"query_positive": [*queries, *(f"other {number}" for number in range(more))]}))[1]
    if len(fold) > 1:
        assert fold <= {query.casefold() for query in grown["query_positive"]}


def test_what_is_held_out_is_about_a_tenth_and_at_least_one():
    numbers = Dataset.from_dict({"query_positive": [f"query {number}" for number in range(5000)]})
    assert len(hold_out(numbers)[1]) == pytest.approx(HELD_OUT * 5000, rel=0.15)
    for size in range(2, 30):
        others, held = hold_out(numbers.select(range(size)))
        assert len(others) >= 1
        assert len(held) >= 1
    assert hold_out(numbers.select([0, 0]))[1] is None


def test_training_holds_records_out_and_evaluate_measures_on_them(tiny, tmp_path):
    data = tmp_path / "train.jsonl"
    load_records("mini", "train").select(range(24)).to_json(data)
    others, held = load_training_data(data)
    assert len(load_training_data(data, limit=3)[0]) == 3
    options = ["--frozen-layers", 0]
    status, out, err = call("inf-embed", "train", "--base", tiny, "--data", data, "--output", tmp_path / "m", *options)
    assert status == 0, err[-3000:]
    assert f"{len(held)} records, about one in ten of its queries, are held out of training" in out
    recipe = json.loads((tmp_path / "m" / "recipe.json").read_text(encoding="utf-8"))
    assert recipe["records"] == len(others)
    assert was_trained_on(recipe, others)
    assert not was_trained_on(recipe, held)
    status, out, err = call("inf-embed", "evaluate", tmp_path / "m", "--data", data, "--json", tmp_path / "a.json")
    assert status == 0, err[-3000:]
    assert f"measured on its {len(held)} records that were held out of training" in out
    assert "base model" in out
    report = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (report["records"], report["split"], report["trained_on"]) == (len(held), "held out", False)
    held.to_json(tmp_path / "held.jsonl")
    call("inf-embed", "evaluate", tiny, "--data", tmp_path / "held.jsonl", "--json", tmp_path / "b.json")
    base = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert report["base"]["p_mrr"] == pytest.approx(base["p_mrr"], abs=1e-5)
    others.to_json(tmp_path / "seen.jsonl")
    seen = ["--data", tmp_path / "seen.jsonl", "--split", "seen", "--json", tmp_path / "a.json"]
    status, out, err = call("inf-embed", "evaluate", tmp_path / "m", *seen)
    assert status == 0, err[-3000:]
    assert "was trained on these records" in out
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["trained_on"]
