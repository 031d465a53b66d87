"""Builds on passages that exist: mined, contrasted, judged; and questions and answers that travel as files."""

import json
import os
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
    said = told(result)
    assert "4 answers accepted" in said["a.jsonl"]
    assert "3 answers accepted, 1 of its lines cannot be read" in said["b.jsonl"]
    assert "4 answers accepted, 2 given twice, counted once" in said["c.jsonl"]
    assert "refused, none of its 1 answers is to an open question of this build" in said["d.jsonl"]
    open_now = {json.loads(line)["custom_id"] for line in (files / "requests.jsonl").read_text().splitlines()}
    assert json.loads(lines[7])["custom_id"] in open_now  # the one that was cut is asked again
    assert sum(total["requests"] for total in report(tmp_path / "out")["usage"].values()) == 11
    again = inf_ir(*arguments, key=None)
    assert "known before" in again.stderr
    assert sum(total["requests"] for total in report(tmp_path / "out")["usage"].values()) == 11


@pytest.fixture
def asking(pairs, tmp_path):  # noqa: F811
    """A build of six pairs by files that has written its first questions, and their answers."""
    files = tmp_path / "files"
    arguments = command(pairs(6), tmp_path / "out", None, "--batch-files", files)
    assert inf_ir(*arguments, key=None).returncode == 3
    return arguments, files, answers_to(files / "requests.jsonl")


def told(result):
    """By name of a file: what a run says of it."""
    return {line.split(": ")[0].rsplit("/", 1)[-1]: line for line in result.stderr.splitlines() if ": " in line}


def open_questions(files):
    return {json.loads(line)["custom_id"] for line in (files / "requests.jsonl").read_text(encoding="utf-8").splitlines()}


def with_response(line, **response):
    return json.dumps({"custom_id": json.loads(line)["custom_id"], "response": response, "error": None})


def requests_counted(output):
    return {model: total["requests"] for model, total in report(output)["usage"].items()}


def test_questions_are_written_over_no_other_file(asking, pairs, tmp_path):  # noqa: F811
    arguments, files, lines = asking
    own = (files / "requests.jsonl").read_bytes()
    other = command(pairs(2), tmp_path / "other", None, "--batch-files", files)
    assert "did not write this file: move it away" in only_error(inf_ir(*other, key=None))
    assert (files / "requests.jsonl").read_bytes() == own
    for text in ("\n".join(lines), '{"query": "q", "passage": "p"}\n', ""):
        (files / "requests.jsonl").write_text(text)
        assert "did not write this file: move it away" in only_error(inf_ir(*arguments, key=None))
        assert (files / "requests.jsonl").read_text() == text
    (files / "requests.jsonl").rename(files / "away.jsonl")
    assert inf_ir(*arguments, key=None).returncode == 3
    assert (files / "requests.jsonl").read_bytes() == own


def test_rows_of_errors_leave_their_questions_open(asking, tmp_path):
    arguments, files, lines = asking
    statuses = (401, 402, 403, 404, 429, 500)
    rows = [with_response(line, status_code=status, body={}) for line, status in zip(lines, statuses)]
    expired = {"response": None, "error": {"code": "batch_expired", "message": "words of a server"}}
    odd = [json.dumps({"custom_id": json.loads(line)["custom_id"], **expired}) for line in lines[:3]]
    odd.append(json.dumps({"custom_id": "x", "response": None, "error": "words of a server"}))
    (files / "a.jsonl").write_text("\n".join(rows))
    (files / "b.jsonl").write_text("\n".join(odd))
    before = open_questions(files)
    result = inf_ir(*arguments, key=None)
    assert result.returncode == 3, result.stderr
    said = told(result)
    assert "0 answers accepted, 6 errors: status 401 (1), status 402 (1)" in said["a.jsonl"]
    assert "0 answers accepted, 4 errors: batch_expired (3), no status (1)" in said["b.jsonl"]
    assert "words of a server" not in result.stderr
    assert open_questions(files) == before
    assert report(tmp_path / "out")["failed"] == 0


def test_a_refusal_fails_its_record_until_it_is_asked_anew(asking, tmp_path):
    arguments, files, lines = asking
    rows = [with_response(line, status_code=400, body={"error": {"message": "no"}}) for line in lines[:2]]
    (files / "a.jsonl").write_text("\n".join([*rows, *lines[2:]]))
    result = inf_ir(*arguments, key=None)
    assert "4 answers accepted, 2 refusals" in told(result)["a.jsonl"]
    assert report(tmp_path / "out")["reasons"] == {"instruct: the server refuses the request (status 400)": 2}
    refused = {json.loads(line)["custom_id"] for line in lines[:2]}
    assert not refused & open_questions(files)
    for _ in range(2):
        result = inf_ir(*arguments, "--retry-failed", key=None)
        assert "4 known before, 2 forgotten by --retry-failed" in told(result)["a.jsonl"]
        assert refused < open_questions(files)
    (files / "b.jsonl").write_text("\n".join(lines[:2]))
    assert "2 answers accepted" in told(inf_ir(*arguments, key=None))["b.jsonl"]
    assert report(tmp_path / "out")["failed"] == 0


def test_an_answer_that_was_forgotten_does_not_come_back(asking, tmp_path):
    arguments, files, lines = asking
    useless = completed(lines, "no json here")
    for name in ("z1.jsonl", "z2.jsonl"):  # the second one answers the repairs
        (files / name).write_text("\n".join(useless))
        result = inf_ir(*arguments, "--max-failed", 1, key=None)
        useless = completed(answers_to(files / "requests.jsonl"), "nor here") if result.returncode == 3 else []
    assert report(tmp_path / "out")["failed"] == 6
    assert requests_counted(tmp_path / "out") == {"gpt-4o-mini": 12}
    (files / "a.jsonl").write_text("\n".join(lines))
    (files / "z3.jsonl").write_text("\n".join(json.dumps(json.loads(line), indent=None, sort_keys=True) for line in useless))
    result = inf_ir(*arguments, "--retry-failed", key=None)
    assert result.returncode == 3, result.stderr
    said = told(result)
    assert "6 answers accepted" in said["a.jsonl"]
    assert "0 answers accepted, 6 forgotten by --retry-failed" in said["z1.jsonl"]
    assert "0 answers accepted, 6 forgotten by --retry-failed" in said["z2.jsonl"]
    assert requests_counted(tmp_path / "out") == {"gpt-4o-mini": 18}
    inf_ir(*arguments, "--retry-failed", key=None)
    assert requests_counted(tmp_path / "out") == {"gpt-4o-mini": 18}


def completed(lines, content):
    """The same rows of answers with another text."""
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["response"]["body"]["choices"][0]["message"]["content"] = content
    return [json.dumps(row) for row in rows]


def test_answers_that_contradict_are_told_and_the_first_counts(asking):
    arguments, files, lines = asking
    (files / "a.jsonl").write_text("\n".join(lines))
    (files / "b.jsonl").write_text("\n".join(completed(lines, '{"instruction": "Only pages of a second answer, please."}')))
    said = told(inf_ir(*arguments, key=None))
    assert "6 answers accepted" in said["a.jsonl"]
    assert "0 answers accepted, 6 given twice, with different answers: the first counted" in said["b.jsonl"]
    assert "second answer" not in (files / "requests.jsonl").read_text()


def test_what_is_no_file_of_answers_is_a_line_and_hangs_nothing(asking):
    arguments, files, lines = asking
    (files / "folder.jsonl").mkdir()
    os.mkfifo(files / "pipe.jsonl")
    (files / "packed.jsonl.gz").write_bytes(b"\x1f\x8b")
    (files / "A.JSONL").write_text(
        "\n".join([*lines, json.dumps({"custom_id": "\ud800", "response": {"status_code": 200}})])
    )
    said = told(inf_ir(*arguments, key=None))
    for name in ("folder.jsonl", "pipe.jsonl", "packed.jsonl.gz"):
        assert "passed over, answers are read from plain files named .jsonl: unpack or rename it" in said[name]
    assert "6 answers accepted, 1 to no open question" in said["A.JSONL"]


def test_answers_in_files_are_no_requests_and_may_tell_no_usage(asking, tmp_path):
    arguments, files, lines = asking
    rows = [json.loads(line) for line in lines]
    for row in rows[:2]:
        del row["response"]["body"]["usage"]
    (files / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = inf_ir(*arguments, "--max-requests", 2, "--max-cost", 0.00001, key=None)
    assert result.returncode == 3
    assert "6 answers accepted" in told(result)["a.jsonl"]
    assert "6 questions are open" in result.stderr
    assert len(open_questions(files)) == 6
    assert requests_counted(tmp_path / "out") == {"gpt-4o-mini": 4, "gpt-4o-mini (possibly paid)": 2}


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
