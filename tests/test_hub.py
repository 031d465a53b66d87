"""A corpus goes to the Hub and back, against a small Hub server over HTTP."""

import json
import re
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import DatasetCard, HfApi
from hypothesis import given
from hypothesis import strategies as st

from dataset_builder.checks import check_records
from dataset_builder.files import write_parquet
from dataset_builder.inf_ir import KEPT_FEATURES, InFIR, split_of
from dataset_builder.publish import build_splits, dataset_card
from dataset_builder.stages import prompt_hashes
from sentence_transformers_inf import load_records, load_rows
from sentence_transformers_inf.records import PASSAGE_COLUMNS, is_on_hub, source_of
from tests.commands import call, error_line
from tests.hub import TOKEN, WITHOUT_PACKAGE

CARDS = Path(__file__).parent.parent / "model_cards"


def publish(*options, repo="user/InF-IR", source="mini"):
    return call("inf-ir", "publish", source, "--repo", repo, *options)


@pytest.fixture(scope="module")
def mini_on_hub(hub, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        hub.connect(patch, tmp_path_factory.mktemp("publish"))
        status, out, err = publish()
    assert status == 0, err[-3000:]
    assert "Pushed: " in out
    return "user/InF-IR"


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A build of 100 records, as far as a push reads it before it asks the Hub."""
    folder = tmp_path_factory.mktemp("few")
    write_build(folder, list(load_records("mini", "train").select(range(100))))
    write_report(folder)
    return folder


def test_what_is_published_loads_where_this_package_is_not(hub, mini_on_hub, tmp_path):
    script = WITHOUT_PACKAGE + (
        "import json, datasets\n"
        f"data = datasets.load_dataset({mini_on_hub!r})\n"
        "print(json.dumps({name: [dict(row) for row in split] for name, split in data.items()}))\n"
    )
    result = hub.run(tmp_path / "hf", "-c", script)
    assert result.returncode == 0, result.stderr[-3000:]
    loaded = json.loads(result.stdout.splitlines()[-1])
    assert loaded == {name: list(load_records("mini", name)) for name in ("train", "validation", "test")}


def test_a_dataset_is_private_unless_public_is_asked_for(connected, mini_on_hub, monkeypatch, tmp_path):
    assert publish("--public", repo="user/open")[0] == 0
    for token in (None, "hf_stranger"):
        connected.connect(monkeypatch, tmp_path / str(token), token)
        with pytest.raises(DatasetNotFoundError):
            datasets.load_dataset(mini_on_hub, split="test")
    connected.connect(monkeypatch, tmp_path / "none", None)
    assert len(datasets.load_dataset("user/open", split="test")) == 119


def test_load_records_reads_what_was_published(connected, mini_on_hub):
    records = load_records(mini_on_hub, "validation")
    assert len(records) == 81
    source = source_of(records.select(range(3)))
    assert (source.name, source.on_hub) == (mini_on_hub, True)
    assert source.revision == HfApi().dataset_info(mini_on_hub).sha
    assert is_on_hub(mini_on_hub)
    bundled = source_of(load_records("mini", "validation"))
    assert (bundled.name, bundled.on_hub, bundled.revision) == ("mini", False, None)
    assert not is_on_hub("mini")
    streamed = load_rows(mini_on_hub, "validation", limit=4)
    assert streamed.to_list() == load_rows(mini_on_hub, "validation").to_list()[:4]


@pytest.mark.parametrize("content", [b"", b"ARROW1", None])
def test_a_damaged_cache_of_a_published_dataset_is_made_anew(content, connected, mini_on_hub):
    before = load_records(mini_on_hub, "validation").to_list()
    for path in list(datasets.config.HF_DATASETS_CACHE.rglob("*.arrow")):
        path.unlink() if content is None else path.write_bytes(content)
    assert load_records(mini_on_hub, "validation").to_list() == before


def test_the_published_card_parses_and_its_snippet_runs(connected, mini_on_hub):
    card = DatasetCard.load(mini_on_hub)
    card.validate()
    assert card.data.license == "cc0-1.0"
    assert card.data.size_categories == ["1K<n<10K"]
    assert card.data.to_dict()["configs"][0]["config_name"] == "default"
    assert "| `instruction_positive` | 100.0% | 0." in card.text
    names = {}
    exec(re.search(r"```python\n(.*?)```", card.text, flags=re.S).group(1), names)
    assert sum(len(split) for split in names["records"].values()) == 3395


def test_publishing_again_after_a_failure_ends_in_the_same_repository(connected):
    (connected.folder / "fail-commits").touch()
    try:
        status, _, err = publish(repo="user/again")
    finally:
        (connected.folder / "fail-commits").unlink()
    assert status == 2
    assert "run the same command again" in error_line(err)
    listings = []
    for _ in range(2):
        assert publish(repo="user/again")[0] == 0
        listings.append(sorted(HfApi().list_repo_files("user/again", repo_type="dataset")))
    assert listings[0] == listings[1]
    assert sum(name.endswith(".parquet") for name in listings[0]) == 3


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("hf_nonsense_marked_token", "user/x", "does not accept the token"),
        ("hf_stranger", "user/x", "may not write here"),
        (None, "user/x", "does not accept the token"),
        (TOKEN, "no-user", "expected user/name"),
    ],
)
def test_a_hub_that_refuses_is_one_clear_line(hub, few, monkeypatch, tmp_path, token, repo, message):
    hub.connect(monkeypatch, tmp_path, token)
    status, out, err = publish(repo=repo, source=few)
    assert status == 2
    assert message in error_line(err)
    if token:
        assert token not in out + err


# The builder


def records_of_a_build(folder, numbers):
    """An output folder as `inf-ir build` leaves it, its records made of numbers."""
    columns = ("query_positive", "query_negative", "instruction_positive", "instruction_negative")
    rows = [
        {"id": str(n), "instruction_type": "length", **{name: f"{name} {n}" for name in (*columns, *PASSAGE_COLUMNS)}}
        for n in numbers
    ]
    write_build(folder, rows)
    return rows


def write_build(folder, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dataset_builder.inf_ir import KEPT_FEATURES, UNFILTERED_FEATURES

    (folder / "unfiltered").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, KEPT_FEATURES.arrow_schema), folder / "train.parquet")
    judged = {"form": "keywords", "status": "kept", "reason": "", "judge_answers": list(PASSAGE_COLUMNS)}
    complete = pa.Table.from_pylist([row | judged for row in rows], UNFILTERED_FEATURES.arrow_schema)
    pq.write_table(complete, folder / "unfiltered" / "train.parquet")


def test_the_builder_splits_a_build_by_its_queries(tmp_path):
    rows = records_of_a_build(tmp_path / "out", range(2000))
    for config in ("default", "unfiltered"):
        builder = InFIR(config_name=config, data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
        builder.download_and_prepare()
        built = builder.as_dataset()
        assert sorted((row["id"] for split in built.values() for row in split), key=int) == [row["id"] for row in rows]
        for name, split in built.items():
            assert {split_of(row["query_positive"]) for row in split} == {name}
        assert 1700 < len(built["train"]) < 1880  # 1,800 expected, standard deviation 13
        assert 60 < len(built["test"]) < 145
    assert built["train"][0]["judge_answers"][0] == "document"


def test_records_that_are_added_move_no_old_one(tmp_path):
    splits = []
    for name, chosen in (("old", range(0, 600, 2)), ("grown", [*range(599, -1, -1)])):
        records_of_a_build(tmp_path / name, chosen)
        builder = InFIR(config_name="default", data_dir=str(tmp_path / name), cache_dir=str(tmp_path / f"{name}-cache"))
        builder.download_and_prepare()
        splits.append({row["id"]: split for split, rows in builder.as_dataset().items() for row in rows})
    old, grown = splits
    assert len(old) == 300
    assert len(grown) == 600
    assert old.items() <= grown.items()
    assert {*old.values()} == {"train", "validation", "test"}


def test_the_builder_builds_in_several_processes(tmp_path):
    records_of_a_build(tmp_path / "out", range(300))
    (tmp_path / "out" / "train.parquet").rename(tmp_path / "out" / "train-00000.parquet")
    (tmp_path / "out" / "train-00001.parquet").write_bytes((tmp_path / "out" / "train-00000.parquet").read_bytes())
    builder = InFIR(config_name="default", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare(num_proc=2)
    assert sum(len(split) for split in builder.as_dataset().values()) == 600


def test_the_builder_has_the_bundled_corpus(tmp_path):
    builder = InFIR(config_name="mini", cache_dir=str(tmp_path))
    builder.download_and_prepare()
    for name, split in builder.as_dataset().items():
        assert list(split) == list(load_records("mini", name))


def test_the_builder_says_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match="needs data_dir"):
        InFIR(config_name="default", cache_dir=str(tmp_path)).download_and_prepare()
    with pytest.raises(FileNotFoundError, match=r"no train\.parquet"):
        InFIR(config_name="default", data_dir=str(tmp_path), cache_dir=str(tmp_path)).download_and_prepare()


@given(st.text(min_size=1), st.sampled_from(["{}?", "  {} ", "¿{}!", "{}\n"]))
def test_spellings_of_a_query_are_in_one_split(query, spelling):
    assert split_of(spelling.format(query)) == split_of(query)


def test_splits_have_their_shares():
    counts = {"train": 0, "validation": 0, "test": 0}
    for number in range(20_000):
        counts[split_of(f"query {number}")] += 1
    assert 17_800 < counts["train"] < 18_200  # 18,000 expected, standard deviation 42
    assert 850 < counts["validation"] < 1150
    assert 850 < counts["test"] < 1150


# Checks


def test_the_bundled_corpus_has_no_errors():
    report = check_records({name: load_records("mini", name) for name in ("train", "validation", "test")})
    assert report.errors == {}


def test_every_kind_of_error_is_found():
    train, test = load_records("mini", "train").select(range(4)), load_records("mini", "test").select(range(3))

    def changed(records, row, **values):
        return records.map(lambda record, number: record | values if number == row else record, with_indices=True)

    twice = changed(train, 1, **{name: train[0][name] for name in ("query_positive", "instruction_positive", "document")})
    assert check_records({"train": twice}).errors == {"duplicate": 1}
    crossing = changed(test, 0, query_positive=train[2]["query_positive"].upper())
    report = check_records({"train": train, "test": crossing})
    assert report.errors == {"a query in two splits": 1}
    assert report.examples["a query in two splits"] == [f"test/{test[0]['id']}"]
    leaked = check_records({"train": train}, [f"Well, {train[3]['instruction_positive']} And so on."])
    assert leaked.errors == {"8 words of an evaluation text": 1}
    twin = changed(test, 0, query_negative=train[2]["query_positive"])
    assert check_records({"train": train, "test": twin}).warnings["a twin query that is a query of another split"] == 1


def test_check_prints_errors_and_ends_with_status_1(tmp_path):
    records = list(load_records("mini", "train").select(range(3)))
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, records[0]]), encoding="utf-8")
    (tmp_path / "eval.txt").write_text(records[1]["instruction_positive"] + "\n", encoding="utf-8")
    status, out, err = call("inf-ir", "check", path, "--against", tmp_path / "eval.txt", "--json", tmp_path / "r.json")
    assert status == 1, err
    assert "duplicate" in out
    assert json.loads((tmp_path / "r.json").read_text())["errors"] == {"duplicate": 1, "8 words of an evaluation text": 1}


def write_report(build):
    """The report of a build of 60 records, and what it says."""
    report = {"kept": 60, "rejected": 0, "failed": 0, "unfinished": 0, "pairs": 60, "reasons": {}, "usage": {}, "cost": 0.0,
              "per_type": {"length": {"tuples": 60, "kept": 60}}, "prompts": prompt_hashes(),
              "settings": {"pairs": "p.jsonl", "model": "m", "judge": "j"}}  # fmt: skip
    (build / "report.json").write_text(json.dumps(report))
    return report


@pytest.mark.parametrize("part", ["cut", "list", "kept", "settings", "reasons", "missing", "unfiltered", "text", "column"])
def test_a_damaged_build_is_refused_before_anything_is_sent(part, connected, tmp_path):
    build = tmp_path / "out"
    records_of_a_build(build, range(60))
    report, path = write_report(build), build / "report.json"
    if part == "missing":
        path.unlink()
    elif part == "reasons":
        path.write_text(json.dumps({**report, part: 5}))
    elif part in report:
        path.write_text(json.dumps({name: value for name, value in report.items() if name != part}))
    elif part in ("cut", "list"):
        path.write_text("{" if part == "cut" else "[]")
    else:
        path = build / "unfiltered" / "train.parquet"
        if part == "unfiltered":
            path.write_bytes(path.read_bytes()[:-40])
        elif part == "text":
            path.write_text("no table")
        else:
            pq.write_table(pq.read_table(path).drop_columns(["query_positive"]), path)
    repo = f"user/damaged-{part}"
    status, _, err = publish(repo=repo, source=build)
    assert status == 2
    assert str(path) in error_line(err)
    assert re.search("restore the file|give the command of the build again", error_line(err))
    assert not HfApi().repo_exists(repo, repo_type="dataset")


def test_publish_refuses_a_corpus_with_errors(connected, tmp_path):
    build = tmp_path / "out"
    records_of_a_build(build, range(60))
    write_report(build)
    (tmp_path / "eval.txt").write_text("one two three four five six seven eight nine\n")
    status, _, err = publish("--against", tmp_path / "eval.txt", repo="user/built", source=build)
    assert status == 0, err[-3000:]
    default, unfiltered = datasets.load_dataset("user/built"), datasets.load_dataset("user/built", "unfiltered")
    assert sum(map(len, default.values())) == sum(map(len, unfiltered.values())) == 60
    assert unfiltered["train"][0]["judge_answers"][0] == "document"

    path = build / "train.parquet"
    table = pq.read_table(path)
    write_parquet(path, KEPT_FEATURES, table.to_pylist() * 2)
    status, _, err = publish(repo="user/twice", source=build)
    assert status == 2
    assert "60 records with this error: duplicate" in error_line(err)
    assert publish("--despite-errors", repo="user/twice", source=build)[0] == 0


def test_the_example_of_a_dataset_card_is_what_the_template_gives(tmp_path):
    card = dataset_card("mini", "user/inf-ir-mini", {"mini": build_splits("mini", "mini", tmp_path)})
    example = CARDS / "examples" / "inf-ir-mini.md"
    assert example.read_text(encoding="utf-8") == str(card)
