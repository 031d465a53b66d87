"""MTEB's own task classes through the command line, on small datasets of their schema served by a small Hub."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sentence_transformers_inf import load_records
from sentence_transformers_inf.records import ROWS
from tests.test_hub import Hub

PUSH = """
import json, sys, datasets
repo, configs = sys.argv[1], json.load(open(sys.argv[2]))
for name, (split, rows) in configs.items():
    datasets.Dataset.from_list(rows).push_to_hub(repo, config_name=name, split=split)
"""


def follow_ir(records):
    """Records in the schema of FollowIR's repositories: each is two changes of instruction."""
    corpus, queries, instructions, qrels, ranked, changed = [], [], [], [], [], []
    for number, record in enumerate(records):
        names = [f"{number}-{place}" for place in range(3)]
        corpus += [{"_id": name, "title": "", "text": record[row[2]]} for name, row in zip(names, ROWS)]
        for change, (before, after) in enumerate(((0, 1), (1, 0))):
            for kind, place in (("og", before), ("changed", after)):
                identifier = f"{number}-{change}-{kind}"
                queries.append({"_id": identifier, "text": record[ROWS[place][0]]})
                instructions.append({"query-id": identifier, "instruction": record[ROWS[place][1]]})
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


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("benchmarks") / "server")
    records = load_records("mini", "validation").select(range(12))
    try:
        for repo, token, configs in (
            ("mteb/Core17InstructionRetrieval", "hf_mteb", follow_ir(records)),
            ("mteb/InstructIR-mteb", "hf_mteb", instructed_retrieval(records, user_suffix=True)),
            ("if-ir/fire", "hf_if_ir", instructed_retrieval(records)),
        ):
            path = hub.folder / "configs.json"
            path.write_text(json.dumps(configs))
            result = hub.run(hub.folder / "hf", "-c", PUSH, repo, path, token=token)
            assert result.returncode == 0, result.stderr[-3000:]
        yield hub
    finally:
        hub.process.kill()
        hub.process.wait()


def evaluate(hub, cache, model, *options, token="hf_owner"):
    return hub.run(cache, "-m", "sentence_transformers_inf.cli", "evaluate", model, *options, token=token)


def scores(path):
    rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
    return {(row["task"], row["instructed"]): row["score"] for row in rows}


BY_MTEB = """
import json, sys, mteb
from mteb.cache import ResultCache
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1])
found = {}
for name in sys.argv[3:]:
    result = mteb.evaluate(model, mteb.get_task(name), cache=ResultCache(sys.argv[2]), co2_tracker=False)
    found[name] = 100 * result.task_results[0].get_score()
print("RESULT", json.dumps(found))
"""

TASKS = {"FollowIR": "Core17InstructionRetrieval", "InstructIR": "InstructIR", "IFIR": "IFIRFire"}


def test_scores_are_those_of_mteb_s_own_encoder_for_its_template(hub, base, tmp_path):
    """The default template joins as MTEB does, so MTEB's encoder of the joined text must score the same."""
    ours = {}
    for suite, task in TASKS.items():
        path = tmp_path / f"{suite}.json"
        result = evaluate(hub, tmp_path / "hf", base, "--benchmark", suite, "--tasks", task, "--no-instruction",
                          "--output", tmp_path / "results", "--json", path)  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        ours |= scores(path)
    result = hub.run(tmp_path / "hf", "-c", BY_MTEB, base, tmp_path / "mteb", *TASKS.values())
    assert result.returncode == 0, result.stderr[-3000:]
    theirs = json.loads(result.stdout.split("RESULT ")[1])
    for task in TASKS.values():
        assert ours[task, True] == pytest.approx(theirs[task], abs=1e-4)
        assert ours[task, True] != pytest.approx(ours[task, False], abs=1e-4)  # instructions do reach the model
    assert ours["Core17InstructionRetrieval", False] == pytest.approx(0, abs=1e-6)  # no instruction: no change of rank


def test_the_bundled_task_measures_the_evaluator_s_p_mrr(hub, base, tmp_path):
    result = evaluate(
        hub, tmp_path / "hf", base, "--benchmark", "mini", "--output", tmp_path / "r", "--json", tmp_path / "a.json"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    result = evaluate(hub, tmp_path / "hf", base, "--json", tmp_path / "b.json")
    assert result.returncode == 0, result.stderr[-3000:]
    expected = json.loads((tmp_path / "b.json").read_text())["p_mrr"]
    assert scores(tmp_path / "a.json")["MiniInstructionRetrieval", True] == pytest.approx(expected, abs=1e-3)


def test_a_killed_run_goes_on_without_the_tasks_that_were_done(hub, base, tmp_path):
    options = ["--benchmark", "FollowIR", "--tasks", TASKS["FollowIR"], "--no-instruction", "--output", tmp_path / "results"]
    arguments = ["-m", "sentence_transformers_inf.cli", "evaluate", base, *options]
    process = subprocess.Popen([sys.executable, *map(str, arguments)], env=hub.environment(tmp_path / "hf"),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    while not (done := list((tmp_path / "results").rglob("Core17InstructionRetrieval.json"))):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    first = {path: path.stat().st_mtime_ns for path in done}
    result = hub.run(tmp_path / "hf", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(list((tmp_path / "results").rglob("Core17InstructionRetrieval.json"))) == 2
    assert {path: path.stat().st_mtime_ns for path in first} == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmark", "Nonsense"], "there is no benchmark 'Nonsense'"),
        (["--benchmark", "FollowIR", "--tasks", "Core18"], "FollowIR has no task 'Core18'"),
        (["--benchmark", "FollowIR", "--tasks", "News21InstructionRetrieval"], "could not be read from the Hub"),
    ],
)
def test_what_cannot_be_run_is_one_clear_line(hub, base, tmp_path, options, message):
    result = evaluate(hub, tmp_path / "hf", base, *options, "--output", tmp_path / "results")
    assert result.returncode == 2, result.stderr[-3000:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in result.stderr


def test_no_network_is_one_clear_line(hub, base, tmp_path):
    class Nowhere(Hub):
        def __init__(self):
            self.url = "http://127.0.0.1:9"

    options = ("--benchmark", "FollowIR", "--tasks", TASKS["FollowIR"], "--output", tmp_path / "results")
    result = evaluate(Nowhere(), tmp_path / "hf", base, *options)
    assert result.returncode == 2, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
