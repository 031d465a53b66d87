"""A checkpoint and its card go to the Hub and come back, in processes of their own, against a small Hub server."""

import json
import shutil

import numpy as np
import pytest

from sentence_transformers_inf import load_instruction_model, load_records
from tests.test_builder import KEY, Server
from tests.test_hub import TOKEN, WITHOUT_PACKAGE, Hub, error_line

REPO = "user/inf-embed"
PAIRS = [{"instruction": "For children.", "query": "why is the sky blue"}, {"instruction": "Brief.", "query": "tax"}]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("hub") / "server")
    yield hub
    hub.process.kill()
    hub.process.wait()


@pytest.fixture(scope="module")
def trained(hub, tmp_path_factory):
    """The folder of a model that was trained for two steps, measured, and pushed twice."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").mkdir()
    records = load_records("mini", "train")
    records.select(range(8)).to_json(folder / "data" / "train.jsonl")
    records.select(range(8, 14)).to_json(folder / "data" / "test.jsonl")
    done, printed = hub.commands(
        folder / "hf",
        [
            "inf-embed",
            "train",
            "--data",
            "data",
            "--output",
            "model",
            "--batch-size",
            4,
            "--epochs",
            1,
            "--push-to-hub",
            REPO,
        ],
        ["inf-embed", "evaluate", "model", "--data", "data", "--json", "scores.json"],
        ["inf-embed", "evaluate", "model", "--benchmark", "mini", "--no-instruction", "--output", "results"],
        ["inf-embed", "card", "model", "--results", "scores.json", "--results", "results"],
        ["inf-embed", "push", "model", "--repo", REPO, "--revision", "measured"],
        ["inf-embed", "push", "model", "--repo", REPO],
        cwd=folder,
    )
    assert [status for status, _ in done] == [0] * 6, printed[-4000:]
    return folder / "model"


def test_a_pushed_model_loads_where_this_package_is_not(hub, trained, tmp_path):
    queries = [{"instruction": "For children.", "query": "why is the sky blue"}, {"instruction": "Brief.", "query": "tax"}]
    joined = ["{query} [SEP] {instruction}".format(**query) for query in queries]
    script = WITHOUT_PACKAGE + (
        "import numpy as np\nfrom sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer({REPO!r})\n"
        f"np.save('joined.npy', model.encode({joined!r}, task='instructed'))\n"
    )
    done = hub.run(tmp_path / "hf", "-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = load_instruction_model(trained).encode_query(queries)
    assert np.array_equal(np.load(tmp_path / "joined.npy"), expected)


def test_the_pushed_card_parses_and_its_snippet_runs(hub, trained, tmp_path):
    script = (
        "import json, re\nfrom huggingface_hub import HfApi, ModelCard\n"
        f"card = ModelCard.load({REPO!r})\ncard.validate()\n"
        "snippet = re.search(r'```python\\n(.*?)```', card.text, flags=re.S).group(1)\n"
        f"assert {REPO!r} in snippet\nexec(snippet)\n"
        f"files = HfApi().list_repo_files({REPO!r})\n"
        f"branch = HfApi().list_repo_files({REPO!r}, revision='measured')\n"
        "print('FOUND', json.dumps({'data': card.data.to_dict(), 'text': card.text, 'files': files, 'branch': branch,\n"
        "    'results': [vars(result) for result in card.data.eval_results]}))\n"
    )
    done = hub.run(tmp_path / "hf", "-c", script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tensor(" in done.stdout
    found = json.loads(done.stdout.split("FOUND ")[1])
    assert found["data"]["license"] == "apache-2.0"
    assert found["data"]["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    scores = json.loads((trained.parent / "scores.json").read_text(encoding="utf-8"))
    values = {
        (result["dataset_name"], result["dataset_config"], result["metric_type"]): result["metric_value"]
        for result in found["results"]
    }
    assert values["InF-IR records (data)", None, "p_mrr"] == pytest.approx(scores["p_mrr"], abs=0.006)
    assert values["MiniInstructionRetrieval", "no-instruction", "p-MRR"] == 0
    instructed = values["MiniInstructionRetrieval", None, "p-MRR"]
    assert f"| MiniInstructionRetrieval | p-MRR | {instructed:.1f} | 0.0 |" in found["text"]
    assert f"| p-MRR | {scores['p_mrr']:.1f} |" in found["text"]
    assert str(trained.parent) not in found["text"]
    assert "passages and queries without an instruction share the other" in found["text"]
    assert "bit for bit" not in found["text"]
    assert {"base_0_Transformer/model.safetensors", "instructed_0_Transformer/model.safetensors"} <= {*found["files"]}
    assert not {"recipe.json", "results.json"} & {*found["files"]}
    assert found["branch"] == found["files"]


def test_pushing_again_changes_nothing(hub, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "renamed")
    commits = [line for line in hub.requests() if "/commit/" in line]
    done, printed = hub.commands(
        tmp_path / "hf",
        ["inf-embed", "push", trained, "--repo", REPO],
        ["inf-embed", "push", tmp_path / "renamed", "--repo", REPO],
    )
    assert [status for status, _ in done] == [0, 0], printed[-3000:]
    assert [line for line in hub.requests() if "/commit/" in line] == commits


def test_a_card_that_was_changed_by_hand_is_pushed_as_it_is(hub, trained, tmp_path):
    path = trained / "README.md"
    own = path.read_text(encoding="utf-8")
    path.write_text(own + "\nOur own remark.\n", encoding="utf-8")
    try:
        done, printed = hub.commands(tmp_path / "hf", ["inf-embed", "push", trained, "--repo", "user/remarked"])
    finally:
        path.write_text(own, encoding="utf-8")
    assert done[0][0] == 0, printed[-3000:]
    script = "from huggingface_hub import ModelCard; print(ModelCard.load('user/remarked').text)"
    assert "Our own remark." in hub.run(tmp_path / "hf", "-c", script).stdout


def test_what_cannot_be_pushed_is_one_clear_line(hub, trained, tmp_path):
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "modules.json").write_text("[]")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    (tmp_path / "running").mkdir()
    (tmp_path / "running" / "modules.json").write_text("[]")
    (tmp_path / "running" / "recipe.json").write_text("{}")
    cases = [
        (TOKEN, ["push", tmp_path, "--repo", REPO], "there is no saved model here"),
        (TOKEN, ["push", tmp_path / "pickled", "--repo", REPO], "pickled weights are not pushed"),
        (TOKEN, ["push", tmp_path / "running", "--repo", REPO], "the training is not finished"),
        (TOKEN, ["push", trained, "--repo", "no-user"], "expected user/name"),
        (TOKEN, ["card", trained, "--results", tmp_path], "there are no results of"),
        ("hf_stranger", ["push", trained, "--repo", REPO], "may not write here"),
        ("hf_nonsense", ["train", "--output", tmp_path / "out", "--push-to-hub", REPO], "does not accept the token"),
    ]
    for token in {token for token, _, _ in cases}:
        chosen = [(words, message) for has, words, message in cases if has == token]
        done, _ = hub.commands(tmp_path / "hf", *(["inf-embed", *words] for words, _ in chosen), token=token)
        for (status, err), (_, message) in zip(done, chosen, strict=True):
            assert status == 2
            assert message in error_line(err)
    assert not (tmp_path / "out").exists()  # refused before the training


def test_no_token_or_key_reaches_a_log_an_exception_or_a_file(hub, trained, tmp_path):
    """Every command, done and refused, with both secrets in its environment and the libraries' loggers at DEBUG."""
    server, data = Server(tmp_path / "llm"), trained.parent / "data"
    pairs, labels, work = tmp_path / "pairs.jsonl", tmp_path / "labels.csv", tmp_path / "work"
    rows = [
        {"query": row["query_positive"], "passage": row["document"]} for row in load_records("mini", "test").select([1, 2])
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    labels.write_text("item,annotator,label\n" + "".join(f"{n},{who},{'AB'[n % 2]}\n" for n in range(6) for who in "mxy"))
    work.mkdir()
    llm = ["--base-url", server.url, "--price", "m=1,1"]
    build = ["inf-ir", "build", "--pairs", pairs, "--model", "m", "--judge", "m", "--output"]
    try:
        done, printed = hub.commands(
            work / "hf",
            [*build, "built", *llm],
            [*build, "wrong", "--base-url", server.url.replace("/v1", "/v2"), "--price", "m=1,1"],
            ["inf-ir", "repair", "built"],
            ["inf-ir", "judge", "built", "--model", "m", "--labels", "labels.jsonl", *llm],
            ["inf-ir", "agreement", labels, "--human", "x", "--human", "y"],
            ["inf-ir", "check", "mini"],
            ["inf-ir", "publish", "mini", "--repo", "user/mini"],
            ["inf-ir", "publish", "mini", "--repo", "stranger/mini"],
            ["inf-embed", "train", "--data", data, "--output", "model", "--epochs", 0.5, "--batch-size", 4],
            ["inf-embed", "train", "--output", "none", "--push-to-hub", "stranger/none"],
            ["inf-embed", "evaluate", "model", "--data", data],
            ["inf-embed", "evaluate", "user/none"],
            ["inf-embed", "evaluate", "model", "--data", "user/none"],
            ["inf-embed", "evaluate", "model", "--benchmark", "MAIR", "--tasks", "MAIR-SciFact"],
            ["inf-embed", "search", REPO, "--corpus", pairs, "--query", "q"],
            ["inf-embed", "card", "model"],
            ["inf-embed", "push", "model", "--repo", "user/again"],
            ["inf-embed", "push", "model", "--repo", "stranger/again"],
            ["inf-embed", "demo", "--max-records", 4],
            cwd=work,
            **{"OPENAI_API_KEY": KEY, "HF_DEBUG": "1", "OPENAI_LOG": "debug"},
            **{"INF_EMBED_TRACEBACK": "1", "INF_IR_TRACEBACK": "1"},
        )
    finally:
        server.process.kill()
        server.process.wait()
    refused = {1, 7, 9, 11, 12, 13, 17}
    assert [number for number, (status, _) in enumerate(done) if status] == sorted(refused), printed[-4000:]
    assert "authorization: <TOKEN>" in printed  # the Hub's client does log its requests
    for secret in (TOKEN, KEY):
        assert secret not in printed
        for path in work.rglob("*"):
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_attention_adapters_and_towers_come_back_from_the_hub(hub, trained, tmp_path):
    options = {"gated": ["--interaction", "gated"], "adapter": ["--update", "queries"], "towers": ["--encoders", "separate"]}
    train = ["inf-embed", "train", "--data", trained.parent / "data", "--batch-size", 4, "--epochs", 1]
    done, printed = hub.commands(
        tmp_path / "hf",
        *[[*train, "--output", name, "--push-to-hub", f"user/{name}", *words] for name, words in options.items()],
        cwd=tmp_path,
    )
    assert [status for status, _ in done] == [0] * 3, printed[-4000:]
    script = (
        "import numpy as np\nfrom huggingface_hub import ModelCard\n"
        "from sentence_transformers_inf import load_instruction_model\n"
        f"for name in {list(options)!r}:\n"
        "    model = load_instruction_model('user/' + name)\n"
        f"    np.save(name + '.npy', model.encode_query([*{PAIRS!r}, 'sky']))\n"
        "    text = ModelCard.load('user/' + name).text\n"
        "    exec(text.split('```python')[1].split('```')[0])\n"
        "    open(name + '.md', 'w').write(text)\n"
    )
    result = hub.run(tmp_path / "there", "-c", script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    for name in options:
        expected = load_instruction_model(tmp_path / name).encode_query([*PAIRS, "sky"])
        assert np.allclose(np.load(tmp_path / f"{name}.npy"), expected, atol=1e-6), name
    cards = {name: (tmp_path / f"{name}.md").read_text() for name in options}
    assert "instructions need sentence-transformers-inf" in cards["gated"]
    assert "bit for bit" in cards["adapter"]
    assert 'attach_adapter(base, "user/adapter")' in cards["adapter"]
    assert "Queries and passages have an encoder each" in cards["towers"]
