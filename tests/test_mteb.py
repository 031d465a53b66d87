"""MTEB's own task classes through the command line, on small datasets of their schema served by a small Hub."""

import json
import subprocess
import sys

import mteb
import numpy as np
import pytest
from datasets import Dataset
from huggingface_hub import HfApi
from mteb.cache import ResultCache
from sentence_transformers import SentenceTransformer

from sentence_transformers_inf import load_instruction_model, load_records
from sentence_transformers_inf.evaluation import measure, metrics
from sentence_transformers_inf.evaluation.mteb import BenchmarkError, get_suite, read_results, run_benchmark, suites
from sentence_transformers_inf.hub import card
from sentence_transformers_inf.records import TRIPLES
from tests.commands import call, error_line
from tests.hub import connect


def follow_ir(records):
    """Records in the schema of FollowIR's repositories: each is two changes of instruction."""
    corpus, queries, instructions, qrels, ranked, changed = [], [], [], [], [], []
    for number, record in enumerate(records):
        names = [f"{number}-{place}" for place in range(3)]
        corpus += [{"_id": name, "title": "", "text": record[row[2]]} for name, row in zip(names, TRIPLES)]
        for change, (before, after) in enumerate(((0, 1), (1, 0))):
            for kind, place in (("og", before), ("changed", after)):
                identifier = f"{number}-{change}-{kind}"
                queries.append({"_id": identifier, "text": record[TRIPLES[place][0]]})
                instructions.append({"query-id": identifier, "instruction": record[TRIPLES[place][1]]})
                qrels.append({"query-id": identifier, "corpus-id": names[place], "score": 1})
            changed.append({"query-id": f"{number}-{change}", "corpus-ids": [names[before]]})
    pool = [passage["_id"] for passage in corpus]
    ranked = [{"query-id": query["_id"], "corpus-ids": pool} for query in queries]
    return {
        "corpus": ("corpus", corpus),
        "queries": ("queries", queries),
        "default": ("test", qrels),
        "instruction": ("instruction", instructions),
        "top_ranked": ("test", ranked),
        "qrel_diff": ("qrel_diff", changed),
    }


def instructed_retrieval(records, user_suffix=False):
    """Records in the schema of InstructIR and IFIR: instructed queries over one corpus."""
    configs = follow_ir(records)
    for name in ("top_ranked", "qrel_diff"):
        configs.pop(name)
    if user_suffix:  # InstructIR groups queries by what stands before the last underscore

        def renamed(identifier):
            return identifier.replace("-og", "_1").replace("-changed", "_2")

        configs["queries"] = ("queries", [row | {"_id": renamed(row["_id"])} for row in configs["queries"][1]])
        for name in ("default", "instruction"):
            split, rows = configs[name]
            configs[name] = (split, [row | {"query-id": renamed(row["query-id"])} for row in rows])
    return configs


def mair(records, parts):
    """Records in MAIR's schema: ``queries`` over ``docs``, or parts of their own."""
    queries, docs = [], []
    for part, chosen in parts.items():
        prefix = f"{part}_" if part else ""
        asked, passages = [], []
        for number, record in enumerate(records.select(chosen)):
            for place, (query, instruction, passage) in enumerate(TRIPLES):
                name = f"{number}-{place}"
                labels = [{"id": name, "score": 1}]
                asked.append({"qid": name, "instruction": record[instruction], "query": record[query], "labels": labels})
                passages.append({"id": name, "doc": record[passage]})
        queries.append((f"{prefix}queries", asked))
        docs.append((f"{prefix}docs", passages))
    return queries, docs


def infosearch(records):
    """Records in InfoSearch's schema: q+ without an instruction, with one for d+, and with one for d1."""
    corpus, queries, qrels = [], [], {"og": [], "changed": [], "reversed": []}
    for number, record in enumerate(records):
        corpus += [{"_id": f"{number}-{place}", "title": "", "text": record[row[2]]} for place, row in enumerate(TRIPLES)]
        queries.append(
            {"_id": str(number), "text": record["query_positive"], "instruction_og": "",
             "instruction_changed": record["document"], "instruction_reversed": record["hard_negative_document_1"]}
        )  # fmt: skip
        for mode, labels in (("og", (1, 1)), ("changed", (1, 0)), ("reversed", (0, 1))):
            for place, label in enumerate(labels):
                qrels[mode].append({"query-id": str(number), "corpus-id": f"{number}-{place}", "score": float(label)})
    judged = {f"qrels_{mode}": ("test", rows) for mode, rows in qrels.items()}
    return {"corpus": ("corpus", corpus), "queries": ("queries", queries), **judged}


MAIR_PARTS = {"SciFact": {"": range(12)}, "IFEval": {"format": range(5), "length": range(5, 12)}}


@pytest.fixture(scope="module")
def datasets_on_hub(hub, tmp_path_factory):
    """Datasets of MTEB's and MAIR's names on the small Hub."""
    records = load_records("mini", "validation").select(range(12))
    rows = [
        (repo, token, name, split, rows)
        for repo, token, configs in (
            ("mteb/Core17InstructionRetrieval", "hf_mteb", follow_ir(records)),
            ("mteb/Robust04InstructionRetrieval", "hf_mteb", follow_ir(records.select(range(1)))),
            ("mteb/InstructIR-mteb", "hf_mteb", instructed_retrieval(records, user_suffix=True)),
            ("if-ir/fire", "hf_if_ir", instructed_retrieval(records)),
            ("jianqunZ/Clarity-v1", "hf_infosearch", infosearch(records)),
        )
        for name, (split, rows) in configs.items()
    ]
    for task, parts in MAIR_PARTS.items():
        for repo, splits in zip(("MAIR-Bench/MAIR-Queries", "MAIR-Bench/MAIR-Docs"), mair(records, parts)):
            rows += [(repo, "hf_mair", task, split, of_split) for split, of_split in splits]
    with pytest.MonkeyPatch.context() as patch:
        hub.connect(patch, tmp_path_factory.mktemp("datasets"))
        for repo, token, name, split, of_split in rows:
            Dataset.from_list(of_split).push_to_hub(repo, config_name=name, split=split, token=token)
        gated = "mteb/Robust04InstructionRetrieval"
        HfApi().update_repo_settings(gated, gated="manual", repo_type="dataset", token="hf_mteb")


TASKS = {"FollowIR": "Core17InstructionRetrieval", "InstructIR": "InstructIR", "IFIR": "IFIRFire"}


@pytest.mark.usefixtures("connected", "datasets_on_hub")
def test_scores_are_those_of_mteb_s_own_encoder_for_its_template(tiny, tmp_path):
    """The default template joins as MTEB does, so MTEB's encoder of the joined text must score the same."""
    model = SentenceTransformer(tiny)
    for (suite, task), metric in zip(TASKS.items(), ("p-MRR", "robustness_at_10", "ndcg_at_20")):
        found = run_benchmark([tiny], suite, tmp_path / "results", tasks=[task], no_instruction=True)
        ours = {(score.metric, score.instructed): score.score for score in found}
        result = mteb.evaluate(model, mteb.get_task(task), cache=ResultCache(tmp_path / "mteb"), co2_tracker=False)
        theirs = result.task_results[0]
        assert ours[metric, True] == pytest.approx(100 * theirs.get_score(), abs=1e-4)
        assert ours[metric, True] != pytest.approx(ours[metric, False], abs=1e-4)  # instructions are seen
        if suite == "FollowIR":
            assert ours["p-MRR", False] == pytest.approx(0, abs=1e-6)  # no instruction: no change of rank
            original = theirs.get_score(getter=lambda scores: scores["og"]["map_at_1000"])
            assert ours["map_at_1000", True] == pytest.approx(100 * original, abs=1e-4)


@pytest.mark.usefixtures("connected", "datasets_on_hub")
def test_mair_s_tasks_rank_the_passages_of_their_own_part(tiny, tmp_path):
    found = run_benchmark([tiny], "MAIR", tmp_path, tasks=["MAIR-SciFact", "MAIR-IFEval"])
    ours = {score.task: score.score for score in found if score.metric == "ndcg_at_10"}
    records, model = load_records("mini", "validation").select(range(12)), load_instruction_model(tiny)
    for task, parts in MAIR_PARTS.items():
        of_parts = [(len(chosen), measure(model, records.select(chosen)).means()["ndcg_at_10"]) for chosen in parts.values()]
        expected = sum(size * score for size, score in of_parts) / 12
        assert ours[f"MAIR-{task}"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.usefixtures("connected", "datasets_on_hub")
def test_infosearch_compares_the_three_modes_of_a_query(base, tmp_path):
    found = run_benchmark([base], "InfoSearch", tmp_path, tasks=["InfoSearch-Keyword"])
    records, model = load_records("mini", "validation").select(range(12)), load_instruction_model(base)
    passages = model.encode_document([record[row[2]] for record in records for row in TRIPLES])
    instructions = ("", "document", "hard_negative_document_1")
    pairs = [
        {"query": record["query_positive"], "instruction": record[name] if name else ""}
        for record in records
        for name in instructions
    ]
    scores = model.encode_query(pairs) @ passages.T
    right = np.repeat(3 * np.arange(12), 3)[:, None]  # d+ under each of its query's three instructions
    ranks = metrics.ranks_of(scores, right).reshape(12, 3)
    of_right = np.take_along_axis(scores, right, axis=1).reshape(12, 3)
    expected = {
        "WISE": 100 * metrics.wise(ranks, np.full(12, 2), range(12)),
        "SICR": 100 * metrics.sicr(ranks, of_right, range(12)),
    }
    assert {score.metric: score.score for score in found} == pytest.approx(expected, abs=1e-3)
    assert 0 < expected["SICR"] < 100
    read = {score.metric: score.score for score in read_results(base, tmp_path)}
    assert read == pytest.approx(expected, abs=1e-2)


def test_mair_has_126_tasks():
    assert len({task.metadata.name for task in get_suite("MAIR")}) == 126


def test_the_bundled_task_measures_the_evaluator_s_p_mrr(base, few_records, tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "load_records", lambda *_: few_records)
    status, out, err = call(
        "inf-embed", "evaluate", base, "--benchmark", "mini", "--no-instruction",
        "--output", tmp_path / "results", "--json", tmp_path / "scores.json",
    )  # fmt: skip
    assert status == 0, err[-3000:]
    assert "MiniInstructionRetrieval" in out
    written = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["rows"]
    scores = {(row["metric"], row["instructed"]): row["score"] for row in written}
    expected = measure(load_instruction_model(base), few_records).means()["p_mrr"]
    assert scores == {("p-MRR", True): pytest.approx(expected, abs=1e-3), ("p-MRR", False): 0}
    read = {(score.metric, score.instructed): score.score for score in read_results(base, tmp_path / "results")}
    assert read == {key: pytest.approx(score, abs=1e-3) for key, score in scores.items()}


@pytest.mark.usefixtures("datasets_on_hub")
def test_a_killed_run_goes_on_without_the_tasks_that_were_done(connected, tiny, tmp_path):
    options = ["--benchmark", "FollowIR", "--tasks", TASKS["FollowIR"], "--no-instruction", "--output", tmp_path / "results"]
    arguments = ["-m", "sentence_transformers_inf.cli", "evaluate", tiny, *options]
    process = subprocess.Popen([sys.executable, "-u", *map(str, arguments)], env=connected.environment(tmp_path / "hf"),
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    # The task is done when the next one begins: until then its result may still be written again.
    assert any("without instructions" in line for line in process.stdout)
    process.kill()
    process.communicate()
    done = list((tmp_path / "results").rglob("Core17InstructionRetrieval.json"))
    assert len(done) == 1
    first = {path: path.stat().st_mtime_ns for path in done}
    foreign = tmp_path / "results" / "results" / "tsconfig.json"
    foreign.write_text("{ // somebody's")
    status, _, err = call("inf-embed", "evaluate", tiny, *options)
    assert status == 0, err[-3000:]
    # What was being written when the run died is no result.
    half = next(path for path in (tmp_path / "results").rglob("Core17InstructionRetrieval.json") if path not in done)
    whole = half.read_bytes()
    half.write_bytes(whole[:200])
    status, out, err = call("inf-embed", "evaluate", tiny, *options)
    assert status == 0, err[-3000:]
    assert "was not written to its end" in out
    assert json.loads(half.read_bytes())["scores"] == json.loads(whole)["scores"]
    assert foreign.read_text() == "{ // somebody's"
    assert len(list((tmp_path / "results").rglob("Core17InstructionRetrieval.json"))) == 2
    assert {path: path.stat().st_mtime_ns for path in first} == first
    half.write_text("{}")
    status, _, err = call("inf-embed", "evaluate", tiny, *options)
    assert status == 2
    assert f"{half}: this is no result of MTEB" in error_line(err)
    assert half.read_text() == "{}"


def test_it_is_said_where_no_instruction_reaches_the_model(tiny, tmp_path):
    """IFIR's instructions are in the texts of its queries."""
    benchmarks = {name: [suites.takes_instructions(task) for task in get_suite(name)] for name in suites.SUITES}
    none = {name for name, takes in benchmarks.items() if not any(takes)}
    assert none == {"IFIR", "BRIGHT", "NanoBEIR"}
    assert all(all(takes) for name, takes in benchmarks.items() if name not in none)
    row = {"task": "IFIRAila", "metric": "ndcg_at_20", "instructed": True, "score": 20.0, "dataset": "if-ir/aila"}
    row |= {"revision": "1", "split": "test", "takes_instructions": False}
    load_instruction_model(tiny).save_pretrained(str(tmp_path / "model"))
    card.add_results(tmp_path / "model", (), [row, {**row, "task": "InstructIR", "takes_instructions": True}])
    text = str(card.model_card(tmp_path / "model"))
    assert "| IFIRAila (no instruction reaches the model) |" in text
    assert "| InstructIR |" in text


@pytest.mark.usefixtures("datasets_on_hub")
@pytest.mark.parametrize(
    ("token", "words", "message"),
    [
        ("hf_owner", ["Nonsense"], "there is no benchmark 'Nonsense'"),
        ("hf_owner", ["FollowIR", "--tasks", "Core18"], "FollowIR has no task 'Core18'"),
        ("hf_owner", ["FollowIR", "--tasks", "News21InstructionRetrieval"], "could not be read from the Hub"),
        ("hf_owner", ["FollowIR", "--tasks", "Robust04InstructionRetrieval"], "is restricted; ask for it"),
        ("hf_nonsense", ["FollowIR", "--tasks", TASKS["FollowIR"]], "the token"),
    ],
)
def test_what_cannot_be_run_is_one_clear_line(hub, monkeypatch, tiny, tmp_path, token, words, message):
    hub.connect(monkeypatch, tmp_path / "hf", token)
    status, _, err = call("inf-embed", "evaluate", tiny, "--output", tmp_path / "results", "--benchmark", *words)
    assert status == 2
    assert message in error_line(err)


def test_no_network_is_one_clear_line(monkeypatch, tiny, tmp_path):
    connect(monkeypatch, "http://127.0.0.1:9", tmp_path / "hf")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts to reach the Hub
    with pytest.raises(BenchmarkError, match="cannot be reached"):
        run_benchmark([tiny], "FollowIR", tmp_path / "results", tasks=[TASKS["FollowIR"]])
