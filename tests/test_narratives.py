"""The narratives: their files, their figures, and that MTEB's own encoder scores the same."""

import json
import shutil

import mteb
import pytest
from mteb.cache import ResultCache
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.evaluation.mteb import narrative_task, read_results, run_benchmark
from sentence_transformers_inf.evaluation.narratives import BUNDLED_TOPICS, read_topics
from sentence_transformers_inf.hub.card import model_card
from sentence_transformers_inf.reading import RecordError
from tests.commands import call, error_line
from tests.test_modules import made

LINES = BUNDLED_TOPICS.read_text(encoding="utf-8").splitlines()
MEASURES = ("p-MRR", "ndcg_at_10_og", "ndcg_at_10_changed", "pairwise_gain")


@pytest.fixture
def few(tmp_path):
    """A file of three topics."""
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(LINES[:3]) + "\n", encoding="utf-8")
    return path


def test_the_bundled_topics_are_36_with_326_documents():
    topics = read_topics(BUNDLED_TOPICS)
    assert len(topics) == 36
    assert sum(len(topic.docs) for topic in topics) == 326
    assert "CC0" in BUNDLED_TOPICS.with_name("README.md").read_text(encoding="utf-8")


def test_the_figures_of_all_minilm_l6_v2(base, tmp_path):
    found = run_benchmark([base], "narratives", tmp_path)
    assert [score.metric for score in found] == list(MEASURES)
    assert [round(score.score, 1) for score in found] == [-4.0, 66.8, 53.3, 1.1]
    (path,) = tmp_path.rglob("NarrativeInstructionRetrieval.json")
    (filed,) = json.loads(path.read_text(encoding="utf-8"))["scores"]["test"]
    assert [round(100 * filed[f"pair_share_{kind}"], 1) for kind in ("og", "changed")] == [47.2, 48.3]


@pytest.mark.parametrize("encoders", [1, 2])
def test_mteb_s_own_encoder_scores_the_same(encoders, base, tiny, few, tmp_path):
    """The default template joins query and instruction as MTEB does, so both encode equal strings, by the same encoder."""
    path = base
    if encoders == 2:
        path = str(tmp_path / "model")
        made("separate", tiny).save_pretrained(path, create_model_card=False)
    ours = run_benchmark([path], "narratives", tmp_path / "ours", data=few)
    cache = ResultCache(tmp_path / "theirs")
    result = mteb.evaluate(SentenceTransformer(path), narrative_task(few), cache=cache, co2_tracker=False)
    theirs = result.task_results[0]
    for score in ours:
        expected = theirs.get_score(getter=lambda scores, metric=score.metric: scores[metric])
        assert score.score == pytest.approx(100 * expected, abs=1e-6), score.metric
    assert ours[0].score == pytest.approx(100 * theirs.get_score(), abs=1e-6)
    assert ours[0].score != 0


def test_results_are_shown_kept_and_told_apart_by_their_file(tiny, few, tmp_path):
    options = ["--benchmark", "narratives", "--output", tmp_path / "results", "--json", tmp_path / "scores.json"]

    def run():
        status, out, err = call("inf-embed", "evaluate", tiny, *options, "--no-instruction", "--data", few)
        assert status == 0, err[-3000:]
        assert all(measure in out for measure in MEASURES)
        rows = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["rows"]
        return {(row["metric"], row["instructed"]): row["score"] for row in rows}

    def files():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("Narrative*.json")}

    first = run()
    assert len(first) == 8
    assert first["p-MRR", False] == first["pairwise_gain", False] == 0
    written = files()
    assert run() == pytest.approx(first, abs=1e-2)
    assert files() == written  # nothing was run again
    few.write_text("\n".join(LINES[3:6]), encoding="utf-8")
    second = run()
    assert second["p-MRR", True] != pytest.approx(first["p-MRR", True], abs=1e-2)
    assert written.items() < files().items()
    few.unlink()
    read = read_results(tiny, tmp_path / "results")
    for scores in (first, second):
        assert {key: pytest.approx(score, abs=1e-2) for key, score in scores.items()} in [
            {(score.metric, score.instructed): score.score for score in read if score.task == task}
            for task in {score.task for score in read}
        ]
    assert {score.dataset for score in read} == {"few"}


def test_a_card_shows_the_four_measures(tiny, few, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    model = str(tmp_path / "model")
    load_instruction_model(tiny).save_pretrained(model)
    status, _, err = call(
        "inf-embed", "evaluate", model, "--benchmark", "narratives", "--data", few, "--output", tmp_path / "results"
    )
    assert status == 0, err[-3000:]
    status, _, err = call("inf-embed", "card", model, "--results", tmp_path / "results")
    assert status == 0, err[-3000:]
    card = str(model_card(model))
    assert all(f"| {measure} |" in card for measure in MEASURES)
    assert str(tmp_path) not in card


def edited(change):
    """The second of two topics after a change."""
    topic = json.loads(LINES[1])
    change(topic)
    return json.dumps(topic)


def put(**values):
    return lambda topic: topic.update(values)


def put_in_document(**values):
    return lambda topic: topic["docs"][0].update(values)


def label(og, changed):
    return lambda topic: [doc.update(og=og, changed=changed) for doc in topic["docs"]]


TOPIC = "row 2, topic 'nd-002'"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (edited(lambda topic: topic.pop("query")), f"{TOPIC}: the key 'query' is missing; add it"),
        (edited(lambda topic: topic.pop("id")), "row 2: the key 'id' is missing; add it"),
        (edited(lambda topic: topic["docs"][0].pop("og")), f"{TOPIC}, document 1: the key 'og' is missing; add it"),
        (edited(put(changed_instruction=" ")), f"{TOPIC}: 'changed_instruction' is blank; write its text"),
        (edited(put(query=None)), f"{TOPIC}: 'query' is not text; write its text"),
        (edited(put(docs={})), f"{TOPIC}: 'docs' is dict; make it a list of documents"),
        (edited(put(docs=[])), f"{TOPIC}: no document is relevant under both narratives; give one"),
        (edited(put_in_document(text="")), f"{TOPIC}, document 1: 'text' is blank; write its text"),
        (edited(put_in_document(og=2)), f"{TOPIC}, document 1: 'og' is 2; write 1 (relevant) or 0"),
        (edited(put_in_document(og=0, changed=1)), "set og to 1 or changed to 0"),
        (edited(put_in_document(id="nd-001-d1")), f"{TOPIC}: two documents have the id 'nd-001-d1'; give each"),
        (edited(put(id="nd-001")), "row 2, topic 'nd-001': row 1 has a topic of this id; give each its own"),
        (edited(label(1, 0)), f"{TOPIC}: no document is relevant under both narratives; give one"),
        (edited(label(1, 1)), f"{TOPIC}: no document is relevant under the original narrative alone; give one"),
        ("[1]", "row 2: expected a JSON object, got list"),
        ("{", "row 2: not valid JSON"),
    ],
)
def test_what_is_not_a_topic_is_refused_with_its_place(tmp_path, line, message):
    path = tmp_path / "topics.jsonl"
    path.write_text(f"{LINES[0]}\n{line}\n", encoding="utf-8")
    with pytest.raises(RecordError) as caught:
        read_topics(path)
    assert str(caught.value).startswith(f"{path}, row 2")
    assert message in str(caught.value)


def test_files_that_cannot_be_measured_are_one_clear_line(tiny, few, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "latin.jsonl").write_bytes(LINES[0].replace("bell", "b\xe9ll").encode("latin-1", "replace"))
    for data, benchmark, message in (
        ("empty.jsonl", "narratives", "there are no topics in it"),
        ("latin.jsonl", "narratives", "in UTF-8"),
        ("none.jsonl", "narratives", "no such file of topics"),
        (few.name, "mini", "the benchmark mini brings its own data; only 'narratives' takes a file"),
    ):
        options = ["--benchmark", benchmark, "--data", tmp_path / data, "--output", tmp_path / "results"]
        status, _, err = call("inf-embed", "evaluate", tiny, *options)
        assert status == 2
        assert message in error_line(err)
