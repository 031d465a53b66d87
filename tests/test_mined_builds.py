"""Builds on passages that exist: mined, contrasted, judged; and questions and answers that travel as files."""

import json
import shutil
from collections import Counter

import datasets
import pytest

from dataset_builder.contrast import FORMS, SHOWN_WORDS, shorten
from dataset_builder.prepare import read_prepared
from dataset_builder.quality import words
from sentence_transformers_inf import load_records
from tests.commands import call
from tests.llm_server import Script
from tests.test_builder import IMPATIENT, command, dataset_bytes, inf_ir, kill, only_error, pairs, report, serve, start  # noqa: F401

RECORDS = 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A BEIR folder's corpus, and the pairs whose passages are in it."""
    folder = tmp_path_factory.mktemp("corpus")
    records = load_records("mini", "train").select(range(4 * RECORDS))
    passages = [record[name] for record in records for name in ("document", "hard_negative_document_1")]
    rows = [json.dumps({"_id": str(n), "title": "", "text": text}) for n, text in enumerate(passages)]
    (folder / "corpus.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for record in records.select(range(RECORDS)):
            row = {"id": record["id"], "query": record["query_positive"], "passage": record["document"]}
            file.write(json.dumps(row) + "\n")
    return folder


def mined(corpus, output, url, base, *options):
    return command(corpus / "pairs.jsonl", output, url, "--passages", "mined", "--corpus", corpus, "--base", base, *options)


def test_a_second_passage_is_mined_and_contrasted(serve, corpus, tiny, tmp_path):  # noqa: F811
    server = serve()
    result = inf_ir(*mined(corpus, tmp_path / "out", server.url, tiny))
    assert result.returncode == 0, result.stderr
    counts = report(tmp_path / "out")
    assert counts["pairs"] == RECORDS
    assert counts["kept"] > RECORDS / 3
    assert counts["kept"] + counts["rejected"] == RECORDS
    records = load_records(tmp_path / "out")
    passages = {json.loads(line)["text"] for line in (corpus / "corpus.jsonl").read_text(encoding="utf-8").splitlines()}
    assert set(records["hard_negative_document_1"]) <= passages
    assert set(records["query_negative"]) == set(records["hard_negative_document_2"]) == {None}
    asked = [event["messages"] for event in server.events() if event["event"] == "asked"]
    kinds = Counter("judge" if "judge search results" in messages[0]["content"] else "contrast" for messages in asked)
    assert kinds["judge"] == counts["kept"] + sum(n for reason, n in counts["reasons"].items() if reason.startswith("judge"))
    assert set(kinds) == {"judge", "contrast"}  # nothing was written, poisoned or judged one by one
    assert {pair["form"] for _, pair in read_prepared(tmp_path / "out")} <= set(FORMS)


def test_tokens_are_less_than_half_of_what_written_passages_take(serve, corpus, tiny, tmp_path):  # noqa: F811
    """By the characters of all prompts and answers of a record that is kept, on the same pairs."""
    used = {}
    for kind in ("written", "mined"):
        server = serve(name=kind)
        options = ("--base", tiny, "--passages", "mined", "--corpus", corpus) if kind == "mined" else ()
        assert inf_ir(*command(corpus / "pairs.jsonl", tmp_path / f"out-{kind}", server.url, *options)).returncode == 0
        asked = [event["messages"] for event in server.events() if event["event"] == "asked"]
        sent = sum(len(message["content"]) for messages in asked for message in messages)
        answers = sum(len(json.dumps(Script.reply(messages))) for messages in asked)
        used[kind] = (sent + answers) / report(tmp_path / f"out-{kind}")["kept"]
    assert used["mined"] <= 0.45 * used["written"], used


@pytest.mark.slow
def test_a_mined_build_that_is_killed_ends_in_the_same_bytes(serve, corpus, tiny, tmp_path):  # noqa: F811
    inf_ir(*mined(corpus, tmp_path / "whole", serve(name="calm").url, tiny))
    server = serve("--faults", name="faults")
    arguments = mined(corpus, tmp_path / "cut", server.url, tiny, *IMPATIENT, "--concurrency", 4)
    for asked in (0, 3, 10, 20, 35):
        process = start(*arguments)
        server.wait_for("asked", asked)
        kill(process)
    inf_ir(*arguments)
    assert len(server.asked_after_answer()) <= 5 * 4  # at most those in flight at each death
    inf_ir(*arguments, "--retry-failed")
    assert dataset_bytes(tmp_path / "cut") == dataset_bytes(tmp_path / "whole")


def test_a_query_without_a_second_passage_is_counted(serve, tiny, tmp_path):  # noqa: F811
    rows = [{"query": "how do otters sleep", "passage": "Otters hold hands when they sleep on the sea."}]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(rows[0]) + "\n")
    options = ("--passages", "mined", "--base", tiny)
    result = inf_ir(*command(tmp_path / "pairs.jsonl", tmp_path / "out", serve().url, *options))
    assert result.returncode == 0, result.stderr
    assert report(tmp_path / "out")["reasons"] == {"no second passage": 1}


def test_records_of_a_mined_build_are_checked_and_published(connected, serve, corpus, tiny, tmp_path):  # noqa: F811
    output = tmp_path / "out"
    inf_ir(*mined(corpus, output, serve().url, tiny))
    assert inf_ir("check", output).returncode == 0
    status, _, err = call("inf-ir", "publish", output, "--repo", "user/mined")
    assert status == 0, err[-2000:]
    published = [row for split in datasets.load_dataset("user/mined").values() for row in split]
    assert len(published) == report(output)["kept"]
    assert all(row["query_negative"] is None and row["hard_negative_document_2"] is None for row in published)
    assert {row["id"] for row in load_records("user/mined", "train")} <= {row["id"] for row in published}


def answers_to(requests):
    """Rows of answers, as a batch service gives them back."""
    lines = []
    for line in requests.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        message = {"role": "assistant", "content": json.dumps(Script.reply(row["body"]["messages"])), "refusal": None}
        body = {"model": row["body"]["model"], "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        body["usage"] = {"prompt_tokens": 200, "completion_tokens": 50}
        lines.append(json.dumps({"custom_id": row["custom_id"], "response": {"status_code": 200, "body": body}}))
    return lines


def test_a_build_by_files_ends_as_one_by_a_server(serve, pairs, tmp_path):  # noqa: F811
    inf_ir(*command(pairs(12), tmp_path / "served", serve().url))
    arguments = command(pairs(12), tmp_path / "out", None, "--batch-files", tmp_path / "files")
    rounds = 0
    while (result := inf_ir(*arguments, key=None)).returncode == 3:
        assert "questions are open" in result.stderr
        lines = answers_to(tmp_path / "files" / "requests.jsonl")
        (tmp_path / "files" / f"answers-{rounds}.jsonl").write_text("\n".join(lines) + "\n")
        rounds += 1
    assert result.returncode == 0, result.stderr
    assert rounds == 4  # instruct, poison, write, judge
    assert not (tmp_path / "files" / "requests.jsonl").exists()
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(tmp_path / "served")
    assert report(tmp_path / "out")["usage"] == report(tmp_path / "served")["usage"]


def test_answers_that_are_cut_repeated_or_of_another_build_are_one_line_each(pairs, tmp_path):  # noqa: F811
    files = tmp_path / "files"
    arguments = command(pairs(12), tmp_path / "out", None, "--batch-files", files)
    assert inf_ir(*arguments, key=None).returncode == 3
    lines = answers_to(files / "requests.jsonl")
    shutil.copy(files / "requests.jsonl", tmp_path / "all.jsonl")
    (files / "a.jsonl").write_text("\n".join(lines[:4]) + "\n")
    (files / "b.jsonl").write_text("\n".join(lines[4:8])[:-9])  # cut within its last line
    (files / "c.jsonl").write_text("\n".join([*lines[:2], *lines[8:]]) + "\n")
    (files / "d.jsonl").write_text(lines[0].replace(json.loads(lines[0])["custom_id"], "of-another-build") + "\n")
    result = inf_ir(*arguments, key=None)
    assert result.returncode == 3, result.stderr
    told = {line.split(": ")[0].rsplit("/", 1)[-1]: line for line in result.stderr.splitlines() if ".jsonl: " in line}
    assert "4 answers accepted" in told["a.jsonl"] or "2 given twice" in told["a.jsonl"]
    assert "3 answers accepted, 1 of its lines cannot be read" in told["b.jsonl"]
    assert "refused, none of its 1 answers is to a question of this build" in told["d.jsonl"]
    open_now = {json.loads(line)["custom_id"] for line in (files / "requests.jsonl").read_text().splitlines()}
    assert json.loads(lines[7])["custom_id"] in open_now  # the one that was cut is asked again
    assert sum(total["requests"] for total in report(tmp_path / "out")["usage"].values()) == 11
    again = inf_ir(*arguments, key=None)
    assert "known before" in again.stderr
    assert sum(total["requests"] for total in report(tmp_path / "out")["usage"].values()) == 11


def test_options_that_contradict_are_one_line(pairs, tmp_path):  # noqa: F811
    for options, part in (
        (("--batch-files", tmp_path / "f", "--batch"), "--batch-files asks no server"),
        (("--corpus", "x.jsonl"), "a corpus and a base are for mining"),
        (("--passages", "stolen"), "'written' or 'mined'"),
    ):
        assert part in only_error(inf_ir(*command(pairs(2), tmp_path / "out", None, *options)))
        assert not (tmp_path / "out").exists()


def test_a_long_passage_is_shown_where_it_speaks_of_the_query():
    about = " ".join(f"Sentence {n} tells of bridges and their cost." for n in range(300))
    passage = f"{about} The zebra eats grass at dawn. {about}"
    shown = shorten(passage, "what does a zebra eat")
    assert "zebra" in shown
    assert len(words(shown)) <= SHOWN_WORDS
    assert shorten("A short one.", "zebra") == "A short one."
    assert len(shorten("猫" * 5000, "猫")) < 2500
