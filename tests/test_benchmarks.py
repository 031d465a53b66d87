"""MTEB's own task classes through the command line, on small datasets of their schema served by a small Hub."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sentence_transformers_inf import load_instruction_model, load_records
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.evaluation.mteb import get_suite
from sentence_transformers_inf.records import TRIPLES
from tests.test_hub import Hub, error_line

PUSH = """
import json, sys, datasets
from huggingface_hub import HfApi
for repo, token, name, split, rows in json.load(sys.stdin):
    datasets.Dataset.from_list(rows).push_to_hub(repo, config_name=name, split=split, token=token)
HfApi().update_repo_settings("mteb/Robust04InstructionRetrieval", gated="manual", repo_type="dataset", token="hf_mteb")
"""


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


MAIR_PARTS = {"SciFact": {"": range(12)}, "IFEval": {"format": range(5), "length": range(5, 12)}}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("benchmarks") / "server")
    records = load_records("mini", "validation").select(range(12))
    try:
        rows = [
            (repo, token, name, split, rows)
            for repo, token, configs in (
                ("mteb/Core17InstructionRetrieval", "hf_mteb", follow_ir(records)),
                ("mteb/Robust04InstructionRetrieval", "hf_mteb", follow_ir(records.select(range(1)))),
                ("mteb/InstructIR-mteb", "hf_mteb", instructed_retrieval(records, user_suffix=True)),
                ("if-ir/fire", "hf_if_ir", instructed_retrieval(records)),
            )
            for name, (split, rows) in configs.items()
        ]
        for task, parts in MAIR_PARTS.items():
            for repo, splits in zip(("MAIR-Bench/MAIR-Queries", "MAIR-Bench/MAIR-Docs"), mair(records, parts)):
                rows += [(repo, "hf_mair", task, split, of_split) for split, of_split in splits]
        result = subprocess.run([sys.executable, "-c", PUSH], input=json.dumps(rows), capture_output=True, text=True,
                                env=hub.environment(hub.folder / "hf"))  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        yield hub
    finally:
        hub.process.kill()
        hub.process.wait()


def scores(path):
    rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
    return {(row["task"], row["metric"], row["instructed"]): row["score"] for row in rows}


BY_MTEB = """
import json, sys, mteb
from mteb.cache import ResultCache
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1])
found = {}
for name in sys.argv[3:]:
    result = mteb.evaluate(model, mteb.get_task(name), cache=ResultCache(sys.argv[2]), co2_tracker=False)
    task = result.task_results[0]
    found[name] = 100 * task.get_score()
    if name == "Core17InstructionRetrieval":
        found["MAP"] = 100 * task.get_score(getter=lambda scores: scores["og"]["map_at_1000"])
print("RESULT", json.dumps(found))
"""

TASKS = {"FollowIR": "Core17InstructionRetrieval", "InstructIR": "InstructIR", "IFIR": "IFIRFire"}


def test_scores_are_those_of_mteb_s_own_encoder_for_its_template(hub, base, tmp_path):
    """The default template joins as MTEB does, so MTEB's encoder of the joined text must score the same."""
    commands = [
        ["inf-embed", "evaluate", base, "--benchmark", suite, "--tasks", task, "--no-instruction",
         "--output", tmp_path / "results", "--json", tmp_path / f"{suite}.json"]
        for suite, task in TASKS.items()
    ]  # fmt: skip
    done, printed = hub.commands(tmp_path / "hf", *commands)
    assert [status for status, _ in done] == [0] * 3, printed[-3000:]
    ours = {key: score for suite in TASKS for key, score in scores(tmp_path / f"{suite}.json").items()}
    result = hub.run(tmp_path / "hf", "-c", BY_MTEB, base, tmp_path / "mteb", *TASKS.values())
    assert result.returncode == 0, result.stderr[-3000:]
    theirs = json.loads(result.stdout.split("RESULT ")[1])
    for task, metric in zip(TASKS.values(), ("p-MRR", "robustness_at_10", "ndcg_at_20")):
        assert ours[task, metric, True] == pytest.approx(theirs[task], abs=1e-4)
        assert ours[task, metric, True] != pytest.approx(ours[task, metric, False], abs=1e-4)  # instructions are seen
    assert ours[TASKS["FollowIR"], "p-MRR", False] == pytest.approx(0, abs=1e-6)  # no instruction: no change of rank
    assert ours[TASKS["FollowIR"], "map_at_1000", True] == pytest.approx(theirs["MAP"], abs=1e-4)


def test_mair_s_tasks_rank_the_passages_of_their_own_part(hub, base, tmp_path):
    options = ["--benchmark", "MAIR", "--tasks", "MAIR-SciFact", "--tasks", "MAIR-IFEval", "--json", tmp_path / "m.json"]
    done, printed = hub.commands(
        tmp_path / "hf", ["inf-embed", "evaluate", base, *options, "--output", tmp_path / "results"]
    )
    assert done[0][0] == 0, printed[-3000:]
    records, model = load_records("mini", "validation").select(range(12)), load_instruction_model(base)
    found = scores(tmp_path / "m.json")
    for task, parts in MAIR_PARTS.items():
        of_parts = [(len(chosen), measure(model, records.select(chosen)).means()["ndcg_at_10"]) for chosen in parts.values()]
        expected = sum(size * score for size, score in of_parts) / 12
        assert found[f"MAIR-{task}", "ndcg_at_10", True] == pytest.approx(expected, abs=1e-3)


def test_mair_has_126_tasks():
    assert len({task.metadata.name for task in get_suite("MAIR")}) == 126


def test_the_bundled_task_measures_the_evaluator_s_p_mrr(hub, base, tmp_path):
    evaluate = ["inf-embed", "evaluate", base]
    done, printed = hub.commands(
        tmp_path / "hf",
        [*evaluate, "--benchmark", "mini", "--output", tmp_path / "r", "--json", tmp_path / "a.json"],
        [*evaluate, "--json", tmp_path / "b.json"],
    )
    assert [status for status, _ in done] == [0, 0], printed[-3000:]
    expected = json.loads((tmp_path / "b.json").read_text())["p_mrr"]
    assert scores(tmp_path / "a.json")["MiniInstructionRetrieval", "p-MRR", True] == pytest.approx(expected, abs=1e-3)


def test_a_killed_run_goes_on_without_the_tasks_that_were_done(hub, base, tmp_path):
    options = ["--benchmark", "FollowIR", "--tasks", TASKS["FollowIR"], "--no-instruction", "--output", tmp_path / "results"]
    arguments = ["-m", "sentence_transformers_inf.cli", "evaluate", base, *options]
    process = subprocess.Popen([sys.executable, "-u", *map(str, arguments)], env=hub.environment(tmp_path / "hf"),
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    # The task is done when the next one begins: until then its result may still be written again.
    assert any("without instructions" in line for line in process.stdout)
    process.kill()
    process.communicate()
    done = list((tmp_path / "results").rglob("Core17InstructionRetrieval.json"))
    assert len(done) == 1
    first = {path: path.stat().st_mtime_ns for path in done}
    # What was being written when the run died is no result.
    half = done[0].with_name("Robust04InstructionRetrieval.json")
    half.write_bytes(done[0].read_bytes()[:200])
    result = hub.run(tmp_path / "hf", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "was not written to its end" in result.stdout
    assert not half.exists()
    assert len(list((tmp_path / "results").rglob("Core17InstructionRetrieval.json"))) == 2
    assert {path: path.stat().st_mtime_ns for path in first} == first


def test_what_cannot_be_run_is_one_clear_line(hub, base, tmp_path):
    cases = [
        ("hf_owner", ["Nonsense"], "there is no benchmark 'Nonsense'"),
        ("hf_owner", ["FollowIR", "--tasks", "Core18"], "FollowIR has no task 'Core18'"),
        ("hf_owner", ["FollowIR", "--tasks", "News21InstructionRetrieval"], "could not be read from the Hub"),
        ("hf_owner", ["FollowIR", "--tasks", "Robust04InstructionRetrieval"], "is restricted; ask for it"),
        ("hf_nonsense", ["FollowIR", "--tasks", TASKS["FollowIR"]], "the token"),
    ]
    for token in ("hf_owner", "hf_nonsense"):
        chosen = [(words, message) for has, words, message in cases if has == token]
        commands = [
            ["inf-embed", "evaluate", base, "--output", tmp_path / "r", "--benchmark", *words] for words, _ in chosen
        ]
        done, _ = hub.commands(tmp_path / token, *commands, token=token)
        for (status, err), (_, message) in zip(done, chosen, strict=True):
            assert status == 2
            assert message in error_line(err)


def test_no_network_is_one_clear_line(hub, base, tmp_path):
    class Nowhere(Hub):
        def __init__(self):
            self.url = "http://127.0.0.1:9"

    options = ("--benchmark", "FollowIR", "--tasks", TASKS["FollowIR"], "--output", tmp_path / "results")
    done, _ = Nowhere().commands(tmp_path / "hf", ["inf-embed", "evaluate", base, *options])
    assert done[0][0] == 2
    assert "cannot be reached" in error_line(done[0][1])
