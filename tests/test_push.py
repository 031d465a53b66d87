"""A checkpoint and its card go to the Hub and come back, against a small Hub server over HTTP."""

import json
import re
import shutil

import numpy as np
import pytest
from huggingface_hub import HfApi, ModelCard

from sentence_transformers_inf import load_instruction_model, load_records
from sentence_transformers_inf.hub import card, push
from tests.commands import call, error_line
from tests.hub import TOKEN, WITHOUT_PACKAGE
from tests.test_builder import KEY, Server
from tests.test_card import save_towers

REPO = "user/inf-embed"
PAIRS = [{"instruction": "For children.", "query": "why is the sky blue"}, {"instruction": "Brief.", "query": "tax"}]


@pytest.fixture(scope="module")
def pushed(hub, tiny, tmp_path_factory):
    """The folder of a model with an encoder of its own for instructed queries, measured, and pushed twice."""
    folder = tmp_path_factory.mktemp("pushed")
    save_towers(tiny, folder / "model")
    (folder / "data").mkdir()
    records = load_records("mini", "train")
    records.select(range(8)).to_json(folder / "data" / "train.jsonl")
    records.select(range(8, 14)).to_json(folder / "data" / "test.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        hub.connect(patch, folder / "hf")
        patch.chdir(folder)
        for words in (
            ["evaluate", "model", "--data", "data", "--json", "scores.json"],
            ["evaluate", "model", "--benchmark", "mini", "--no-instruction", "--output", "results"],
            ["card", "model", "--results", "scores.json", "--results", "results"],
            ["push", "model", "--repo", REPO, "--revision", "measured"],
            ["push", "model", "--repo", REPO],
        ):
            status, _, err = call("inf-embed", *words)
            assert status == 0, err[-3000:]
    return folder / "model"


def test_a_pushed_model_loads_where_this_package_is_not(hub, pushed, tmp_path):
    joined = ["{query} {instruction}".format(**pair) for pair in PAIRS]
    script = WITHOUT_PACKAGE + (
        "import numpy as np\nfrom sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer({REPO!r})\n"
        f"np.save('joined.npy', model.encode_query({joined!r}))\n"
    )
    done = hub.run(tmp_path / "hf", "-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = load_instruction_model(pushed).encode_query(PAIRS)
    assert np.allclose(np.load(tmp_path / "joined.npy"), expected, atol=1e-6)


def test_the_pushed_card_parses_and_its_snippet_runs(connected, pushed, capsys):
    found = ModelCard.load(REPO)
    found.validate()
    snippet = re.search(r"```python\n(.*?)```", found.text, flags=re.S).group(1)
    assert REPO in snippet
    exec(snippet, {})
    assert "tensor(" in capsys.readouterr().out
    assert found.data.license == "apache-2.0"
    assert found.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    scores = json.loads((pushed.parent / "scores.json").read_text(encoding="utf-8"))
    values = {
        (result.dataset_name, result.dataset_config, result.metric_type): result.metric_value
        for result in found.data.eval_results
    }
    assert values["InF-IR records (data)", None, "p_mrr"] == pytest.approx(scores["p_mrr"], abs=0.006)
    assert values["MiniInstructionRetrieval", "no-instruction", "p-MRR"] == 0
    instructed = values["MiniInstructionRetrieval", None, "p-MRR"]
    assert f"| MiniInstructionRetrieval | p-MRR | {instructed:.1f} | 0.0 |" in found.text
    assert f"| p-MRR | {scores['base']['p_mrr']:.1f} | {scores['p_mrr']:.1f} |" in found.text
    assert str(pushed.parent) not in found.text


def test_the_weights_are_pushed_and_the_runs_own_files_are_not(connected, pushed):
    files = HfApi().list_repo_files(REPO)
    assert {"document_0_Transformer/model.safetensors", "query_0_Transformer/model.safetensors"} <= {*files}
    assert not {"recipe.json", "results.json"} & {*files}
    assert HfApi().list_repo_files(REPO, revision="measured") == files


def test_pushing_again_changes_nothing(connected, pushed, tmp_path):
    shutil.copytree(pushed, tmp_path / "renamed")
    commits = [line for line in connected.requests() if "/commit/" in line]
    for folder in (pushed, tmp_path / "renamed"):
        assert call("inf-embed", "push", folder, "--repo", REPO)[0] == 0
    assert [line for line in connected.requests() if "/commit/" in line] == commits


def test_a_card_that_was_edited_is_pushed_as_it_is(connected, pushed, tmp_path):
    shutil.copytree(pushed, tmp_path / "model")
    with (tmp_path / "model" / "README.md").open("a", encoding="utf-8") as file:
        file.write("\nOur own remark.\n")
    push.push_model(tmp_path / "model", "user/remarked")
    assert "Our own remark." in ModelCard.load("user/remarked").text


def test_a_card_of_an_earlier_template_is_written_anew(connected, pushed, tmp_path, monkeypatch):
    shutil.copytree(pushed, tmp_path / "model")
    template = tmp_path / "model_card.md"
    template.write_text(
        "---\n{{ card_data | safe }}\n---\n\n# {{ name }}\n\nThe template of an earlier version.\n", encoding="utf-8"
    )
    with monkeypatch.context() as patch:
        patch.setattr(card, "TEMPLATE", template)
        card.write_model_card(tmp_path / "model")
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    push.push_model(tmp_path / "elsewhere", "user/renewed")
    text = ModelCard.load("user/renewed").text
    assert "earlier version" not in text
    assert "# user/renewed" in text


def test_what_cannot_be_pushed_is_one_clear_line(hub, pushed, tmp_path, monkeypatch):
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "modules.json").write_text('[{"path": ""}]')
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    (tmp_path / "running").mkdir()
    (tmp_path / "running" / "modules.json").write_text("[]")
    (tmp_path / "running" / "recipe.json").write_text('{"base": "a"}')
    for token, words, message in [
        (TOKEN, ["push", tmp_path, "--repo", REPO], "there is no saved model here"),
        (TOKEN, ["push", tmp_path / "pickled", "--repo", REPO], "pickled weights are not pushed"),
        (TOKEN, ["push", tmp_path / "running", "--repo", REPO], "the training is not finished"),
        (TOKEN, ["push", pushed, "--repo", "no-user"], "expected user/name"),
        (TOKEN, ["card", pushed, "--results", tmp_path], "there are no results of"),
        ("hf_stranger", ["push", pushed, "--repo", REPO], "may not write here"),
        (
            "hf_nonsense",
            ["train", "--output", tmp_path / "out", "--push-to-hub", "--hub-model-id", REPO],
            "does not accept the token",
        ),
    ]:
        hub.connect(monkeypatch, tmp_path / "hf", token)
        status, _, err = call("inf-embed", *words)
        assert status == 2
        assert message in error_line(err)
    assert not (tmp_path / "out").exists()  # refused before the training


def test_no_token_or_key_reaches_a_log_an_exception_or_a_file(hub, pushed, tiny, tmp_path):
    """Commands, done and refused, with both secrets in their environment and the libraries' loggers at DEBUG."""
    server, data = Server(tmp_path / "llm"), pushed.parent / "data"
    pairs, labels, work = tmp_path / "pairs.jsonl", tmp_path / "labels.csv", tmp_path / "work"
    rows = [
        {"query": row["query_positive"], "passage": row["document"]} for row in load_records("mini", "test").select([1, 2])
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    labels.write_text("item,annotator,label\n" + "".join(f"{n},{who},{'AB'[n % 2]}\n" for n in range(6) for who in "mxy"))
    work.mkdir()
    llm = ["--base-url", server.url, "--price", "m=1,1"]
    train = ["inf-embed", "train", "--base", tiny, "--frozen-layers", 0]
    build = ["inf-ir", "build", "--pairs", pairs, "--model", "m", "--judge", "m", "--output"]
    try:
        done, printed = hub.commands(
            work / "hf",
            [*build, "built", *llm],
            [*build, "wrong", "--base-url", server.url.replace("/v1", "/v2"), "--price", "m=1,1"],
            ["inf-ir", "repair", "built"],
            ["inf-ir", "judge", "built", "--model", "m", "--labels", "labels.jsonl", *llm],
            ["inf-ir", "agreement", labels, "--human", "x", "--human", "y"],
            ["inf-ir", "check", data],
            ["inf-ir", "publish", "built", "--repo", "user/built"],
            ["inf-ir", "publish", "built", "--repo", "stranger/built"],
            [*train, "--data", data, "--output", "model", "--epochs", 0.5, "--batch-size", 4],
            [*train, "--output", "none", "--push-to-hub", "--hub-model-id", "stranger/none"],
            ["inf-embed", "evaluate", "model", "--data", data],
            ["inf-embed", "evaluate", "user/none"],
            ["inf-embed", "evaluate", "model", "--data", "user/none"],
            ["inf-embed", "evaluate", "model", "--benchmark", "MAIR", "--tasks", "MAIR-NFCorpus"],
            ["inf-embed", "search", REPO, "--corpus", pairs, "--query", "q"],
            ["inf-embed", "card", "model"],
            ["inf-embed", "push", "model", "--repo", "user/again"],
            ["inf-embed", "push", "model", "--repo", "stranger/again"],
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


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gated", ["--interaction", "gated"], "instructions need sentence-transformers-inf"),
        ("adapter", ["--update", "queries"], "bit for bit"),
        ("towers", ["--encoders", "separate"], "Queries and passages have an encoder each"),
    ],
)
def test_attention_adapters_and_towers_come_back_from_the_hub(
    connected, pushed, tiny, tmp_path, monkeypatch, capsys, name, options, words
):
    train = ["inf-embed", "train", "--base", tiny, "--data", pushed.parent / "data", "--batch-size", 4, "--epochs", 1]
    repo, output = f"user/{name}", tmp_path / name
    status, _, err = call(
        *train, "--frozen-layers", 0, "--output", output, "--push-to-hub", "--hub-model-id", repo, *options
    )
    assert status == 0, err[-3000:]
    connected.connect(monkeypatch, tmp_path / "elsewhere")
    expected = load_instruction_model(output).encode_query([*PAIRS, "sky"])
    assert np.allclose(load_instruction_model(repo).encode_query([*PAIRS, "sky"]), expected, atol=1e-6)
    text = ModelCard.load(repo).text
    assert words in text
    exec(text.split("```python")[1].split("```")[0], {})
    assert "tensor(" in capsys.readouterr().out
    if name == "adapter":
        assert f'attach_adapter(base, "{repo}")' in text
