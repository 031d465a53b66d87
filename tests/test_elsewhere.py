"""Measures on text unlike the bundled corpus."""

import json

import numpy as np
import pytest
from sentence_transformers.util import cos_sim

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.evaluation.elsewhere import (
    HELP_CENTRE,
    measure_help_centre,
    measure_narratives,
    measure_plain,
)
from sentence_transformers_inf.evaluation.mteb import run_benchmark
from sentence_transformers_inf.evaluation.narratives import read_topics
from tests.beir import write_beir
from tests.test_narratives import LINES


def test_narratives_are_measured_as_mteb_does(base, tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(LINES[:4]) + "\n", encoding="utf-8")
    model = load_instruction_model(base)
    names = {"p-MRR": "p_mrr", "ndcg_at_10_og": "ndcg_at_10_og", "ndcg_at_10_changed": "ndcg_at_10_changed",
             "pairwise_gain": "pairwise_gain"}  # fmt: skip
    by_mteb = {names[score.metric]: score.score for score in run_benchmark([base], "narratives", tmp_path / "o", data=path)}
    assert measure_narratives(model, read_topics(path)) == pytest.approx(by_mteb, abs=1e-6)


def test_the_help_centre_counts_cases_whose_two_instructions_are_obeyed(tiny):
    model = load_instruction_model(tiny)
    cases = [json.loads(line) for line in HELP_CENTRE.read_text(encoding="utf-8").splitlines()]
    assert len(cases) >= 40
    assert sum(case["instruction_type"] == "exclusion" for case in cases) >= 20
    obeyed = []
    for case in cases:
        right, wrong = case["document"], case["hard_negative_document"]
        ahead = []
        for side in ("positive", "negative"):
            query = model.encode_query(f"{case['query']} {case[f'instruction_{side}']}")
            scores = cos_sim(query, model.encode_document([right, wrong]))[0]
            ahead.append(float(scores[0] - scores[1]))
        obeyed.append(ahead[0] > 0 > ahead[1])
    measured = measure_help_centre(model)
    assert measured["pair_accuracy"] == pytest.approx(100 * np.mean(obeyed))
    excludes = [case["instruction_type"] == "exclusion" for case in cases]
    assert measured["exclusion"] == pytest.approx(100 * np.mean(np.array(obeyed)[excludes]))


def test_plain_queries_are_ranked_on_a_corpus_in_beir_s_layout(base, tmp_path):
    folder = write_beir(tmp_path / "beir")
    model = load_instruction_model(base)
    # The second query is answered by the passage on bread alone, which is judged wrong for it: first place is lost.
    assert measure_plain(model, folder) == pytest.approx({"mrr_at_10": 75, "ndcg_at_10": 100 * (1 + 1 / np.log2(3)) / 2})
    (folder / "qrels.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="there is no qrels"):
        measure_plain(model, folder)


def test_a_help_centre_s_passages_are_not_quoted_by_its_instructions():
    for line in HELP_CENTRE.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        passages = f"{case['document']} {case['hard_negative_document']}".lower()
        for side in ("positive", "negative"):
            words = case[f"instruction_{side}"].lower().split()
            assert not any(" ".join(words[at : at + 5]) in passages for at in range(len(words) - 4))
