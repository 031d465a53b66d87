"""The adapter that the package ships: it obeys at once, and its card tells the truth."""

import json
import re

import numpy as np
import pytest

from sentence_transformers_inf import load_instruction_model, load_records
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.modules.loading import BUNDLED_ADAPTER
from sentence_transformers_inf.records import records_digest, source_of


@pytest.fixture(scope="module")
def model():
    return load_instruction_model()


def test_it_obeys_without_a_training_and_leaves_all_else_to_the_base(model, base):
    plain = load_instruction_model(base)
    texts = ["how do vaccines work", "A vaccine shows your body a harmless bit of a germ."]
    assert np.array_equal(model.encode_query(texts), plain.encode_query(texts))
    assert np.array_equal(model.encode_document(texts), plain.encode_document(texts))
    passages = model.encode_document(["A vaccine shows your body a harmless bit of a germ.", "Adjuvants engage TLR4."])
    told = [{"query": texts[0], "instruction": instruction} for instruction in ("For young children.", "For immunologists.")]
    simple, technical = (model.encode_query(told) @ passages.T).T
    assert simple[0] - technical[0] > simple[1] - technical[1] + 0.05


@pytest.mark.slow
def test_its_card_has_the_scores_that_it_reaches(model):
    records = load_records("mini", "test")
    means = measure(model, records).means()
    card = (BUNDLED_ADAPTER / "README.md").read_text(encoding="utf-8")
    for title, metric in (
        ("p-MRR", "p_mrr"),
        ("pair accuracy", "pair_accuracy"),
        ("nDCG@10, plain queries", "plain_ndcg_at_10"),
    ):
        (said,) = re.findall(rf"^\| {re.escape(title)} \| [\d.]+ \| ([\d.]+) \|$", card, flags=re.M)
        assert float(said) == pytest.approx(means[metric], abs=0.6)  # a tie may fall otherwise on another processor
    assert means["pair_accuracy"] > 60


def test_it_is_small_and_says_what_it_was_made_from():
    assert (BUNDLED_ADAPTER / "adapter_model.safetensors").stat().st_size < 3 * 2**20
    assert not [path for path in BUNDLED_ADAPTER.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    recipe = json.loads((BUNDLED_ADAPTER / "recipe.json").read_text(encoding="utf-8"))
    records = load_records("mini", "train")
    assert source_of(records).name == recipe["data"]
    assert (recipe["records"], recipe["finished"]) == (len(records), True)
    assert recipe["records_sha256"] == records_digest(records)
    makefile = (BUNDLED_ADAPTER.parents[1] / "Makefile").read_text(encoding="utf-8")
    settings = recipe["settings"]
    assert f"--update {settings['update']} --seed $* --evaluations {settings['evaluations']}" in makefile
    trainings = " ".join(f"build/adapter-{seed}/README.md" for seed in settings["seed"])
    assert f"adapter: {trainings} " in makefile
    assert settings["averaged_models"] == len(settings["seed"])
    assert f"--step {settings['averaging_step']} " in makefile
