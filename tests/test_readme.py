"""What the README shows runs as printed."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_is_short_and_has_its_snippets_and_commands():
    assert len(README.splitlines()) <= 130
    assert len(SNIPPETS) == 2
    assert "make demo" in README
    assert "make test" in README


def test_the_snippets_run_as_printed_one_after_the_other(tmp_path):
    """The first one trains a model, the second one loads that of the package."""
    for snippet in SNIPPETS:
        done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("[") == 3  # a 2×2 tensor


def test_the_card_s_snippet_runs_as_printed(tmp_path, base):
    """The snippet of a model card names the model by its folder, as it would by its id on the Hub."""
    from sentence_transformers_inf import load_instruction_model
    from sentence_transformers_inf.hub.card import write_model_card

    load_instruction_model(base).save_pretrained(str(tmp_path / "my-model"), create_model_card=False)
    path = write_model_card(tmp_path / "my-model")
    snippet = re.search(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL).group(1)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tensor" in done.stdout
