"""The playground goes to the Hub as a Space, against a small Hub server over HTTP."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, hf_hub_download

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.corpora import read_passages
from sentence_transformers_inf.hub.space import FILES, space_files
from sentence_transformers_inf.modules.loading import BUNDLED_ADAPTER
from tests.commands import call, error_line
from tests.hub import TOKEN
from tests.test_reading import packed

EXAMPLE = Path(__file__).parent.parent / "model_cards" / "space"


def read(repo, name):
    return Path(hf_hub_download(repo, name, repo_type="space")).read_text(encoding="utf-8")


def test_the_example_in_the_repository_is_what_the_command_writes():
    for name, content in space_files(None, None, "mini").items():
        assert (EXAMPLE / name).read_text(encoding="utf-8") == content
    assert {path.name for path in EXAMPLE.iterdir()} == {*FILES}


def test_a_model_with_its_corpus_becomes_a_private_space(connected, tiny, tmp_path):
    load_instruction_model(tiny).save_pretrained(str(tmp_path / "my-model"), create_model_card=False)
    recipe = {"base": str(tmp_path / "secret" / "base"), "base_on_hub": False, "finished": True}
    (tmp_path / "my-model" / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "my-model" / "checkpoint-1").mkdir()
    (tmp_path / "my-model" / "checkpoint-1" / "model.safetensors").touch()
    (tmp_path / "corpus of mine.txt").write_text("One.\nTwo.\n")
    words = ["inf-embed", "space", tmp_path / "my-model", "--repo", "user/play", "--corpus", tmp_path / "corpus of mine.txt"]
    for _ in range(2):
        status, out, err = call(*words)
        assert status == 0, err
        assert "/spaces/user/play" in out
    files = HfApi().list_repo_files("user/play", repo_type="space")
    assert {*FILES, "corpus.txt", "model/modules.json", "model/recipe.json"} <= {*files}
    assert not [name for name in files if "checkpoint" in name]
    assert HfApi().space_info("user/play").private
    app = read("user/play", "app.py")
    (launched,) = [node for node in ast.walk(ast.parse(app)) if isinstance(node, ast.Call) and node.keywords]
    assert {word.arg: ast.literal_eval(word.value) for word in launched.keywords} == {
        "model": "model", "compare": None, "corpus": "corpus.txt",
    }  # fmt: skip
    assert yaml.safe_load(read("user/play", "README.md").split("---")[1])["sdk"] == "gradio"
    assert "my-model" in read("user/play", "README.md")
    assert all(str(tmp_path) not in read("user/play", name) for name in (*FILES, "model/recipe.json"))
    assert call(*words, "--public")[0] == 0
    assert not HfApi().space_info("user/play").private


@pytest.mark.parametrize("name", ["a.txt.gz", "B.C.JSONL.zst", "a b.csv"])
def test_a_corpus_keeps_the_endings_by_which_it_is_read(name, connected, tmp_path):
    texts = ["One.", "Two."]
    if "txt" in name:
        content = "\n".join(texts).encode()
    else:
        content = b"text\nOne.\nTwo.\n" if "csv" in name else b'{"text": "One."}\n{"text": "Two."}\n'
    (tmp_path / name).write_bytes(packed(content, (tmp_path / name).suffix))
    status, _, err = call("inf-embed", "space", "--repo", "user/packed", "--corpus", tmp_path / name)
    assert status == 0, err
    (corpus,) = re.findall(r'corpus="(.*?)"', read("user/packed", "app.py"))
    assert read_passages(hf_hub_download("user/packed", corpus, repo_type="space")) == texts


def test_the_shipped_adapter_needs_no_model_in_the_space(connected):
    assert call("inf-embed", "space", "--repo", "user/shipped")[0] == 0
    assert "model=None" in read("user/shipped", "app.py")
    assert not [name for name in HfApi().list_repo_files("user/shipped", repo_type="space") if name.startswith("model")]


@pytest.mark.parametrize("token", [TOKEN, "hf_stranger", None])
def test_what_cannot_become_a_space_is_one_clear_line_without_the_token(hub, tmp_path, monkeypatch, token):
    hub.connect(monkeypatch, tmp_path / "hf", token)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "One."}\n{"text": " "}\n', encoding="utf-8")
    shutil.copytree(BUNDLED_ADAPTER, tmp_path / "local")
    settings = json.loads((tmp_path / "local" / "instruction_adapter.json").read_text()) | {"base": str(tmp_path)}
    (tmp_path / "local" / "instruction_adapter.json").write_text(json.dumps(settings))
    cases = [
        ([tmp_path, "--repo", "user/refused"], "there is no saved model here"),
        (["--repo", "no-user"], "expected user/name"),
        (["--repo", "user/refused", "--corpus", bad], f"{bad}, row 2"),
        ([tmp_path / "local", "--repo", "user/refused"], "is not on the Hub"),
        (["--repo", "user/refused", "--compare", tmp_path], "only with a model on the Hub"),
        (["user/no-such-model", "--repo", "user/refused"], "there is no such repository for you"),
    ]
    if token != TOKEN:
        cases.append((["--repo", "user/refused"], "may not write here" if token else "log in"))
    for words, message in cases:
        status, out, err = call("inf-embed", "space", *words)
        assert status == 2
        assert message in error_line(err)
        assert token is None or token not in out + err
    hub.connect(monkeypatch, tmp_path / "hf")
    assert not HfApi().repo_exists("user/refused", repo_type="space")
