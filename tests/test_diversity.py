"""Diversity against direct computations, and the report."""

import collections
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dataset_builder.diversity import average_pairwise_similarity, count_ngrams
from dataset_builder.quality import words
from sentence_transformers_inf import load_records
from tests.other_corpora import FOLLOWIR
from tests.test_builder import inf_ir, only_error

# Average pairwise similarity


@given(
    arrays.arrays(np.float64, st.tuples(st.integers(2, 12), st.integers(1, 6)), elements=st.floats(-5, 5)).filter(
        lambda rows: (np.linalg.norm(rows, axis=1) > 1e-3).all()
    )
)
def test_average_pairwise_similarity_equals_the_double_loop(rows):
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    loop = [unit[i] @ unit[j] for i in range(len(unit)) for j in range(len(unit)) if i != j]
    assert average_pairwise_similarity(rows) == pytest.approx(np.mean(loop), abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([[1.0, 0.0]], "at least two"), ([[1.0, 0.0], [0.0, 0.0]], "row 1 "), ([[np.nan, 0.0], [0.0, 1.0]], "row 0 ")],
)
def test_embeddings_without_a_similarity_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        average_pairwise_similarity(np.array(rows))


# N-grams


@given(st.lists(st.text(alphabet="ab ,", max_size=12), max_size=8), st.integers(1, 3))
def test_ngrams_equal_a_direct_count(texts, n):
    counts = collections.Counter()
    for text in texts:
        found = words(text)
        counts.update(tuple(found[start : start + n]) for start in range(len(found) - n + 1))
    got = count_ngrams(iter(texts), n)
    values = np.array(list(counts.values()), dtype=float)
    assert (got.texts, got.total, got.distinct) == (len(texts), values.sum(), len(values))
    if len(values):
        shares = values / values.sum()
        assert got.deviation == pytest.approx(values.std(), abs=1e-12)
        assert got.entropy == pytest.approx(-(shares * np.log2(shares)).sum(), abs=1e-9)
        assert got.distinct_share == len(values) / values.sum()


def test_grams_are_counted_within_texts_and_inter_sample_frequency_is_their_number_over_their_deviation():
    counts = count_ngrams(["a b a b", "B! a"], 2)  # ab, ba, ab and ba: two each
    assert (counts.distinct_share, counts.inter_sample_frequency) == (2 / 4, math.inf)
    assert count_ngrams(["a b a b", "B! a"], 1).distinct_share == 2 / 6
    counts = count_ngrams(["a a a", "b"], 1)  # a three times, b once: deviation 1
    assert counts.inter_sample_frequency == 2
    assert count_ngrams(["a"], 2).distinct_share == 0


def test_words_in_another_order_are_another_gram():
    assert count_ngrams(["a b", "b a"], 2).distinct == 2
    assert count_ngrams(["a b c", "a c b", "b a c", "b c a", "c a b", "c b a"], 3).distinct == 6


# The report


class _Report(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.rows, self.text = [], 0, ""

    def handle_starttag(self, tag, attributes):
        self.images += [dict(attributes)["src"]] if tag == "img" else []
        self.rows += tag == "tr"

    def handle_data(self, data):
        self.text += data


def test_corpora_are_compared_on_samples_of_one_size(base, tmp_path):
    load_records("mini", "validation").to_parquet(tmp_path / "<mine>.parquet")
    (tmp_path / "followir.jsonl").write_text(
        "\n".join(json.dumps({**row, "instruction": f"{row['instruction']} {i}", "query": f"{row['query']} {i}"})
                  for i, row in enumerate(FOLLOWIR * 3))
    )  # fmt: skip
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, FOLLOWIR)))
    names = [str(tmp_path / "<mine>.parquet"), str(tmp_path / "followir.jsonl")]
    result = inf_ir("analyze", names[0], "--compare", names[1], "--model", base, "--output", tmp_path / "report")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "report" / "report.json").read_text())["diversity"]
    assert list(found) == ["instructions", "queries", "passages"]
    for kind in found.values():
        assert list(kind) == names
        assert len({entry["sampled"] for entry in kind.values()}) == 1
        assert kind[names[0]]["average_pairwise_similarity"] < kind[names[1]]["average_pairwise_similarity"]
    assert found["instructions"][names[0]]["distinct_texts"] == 162
    assert f"{found['queries'][names[0]]['average_pairwise_similarity']:.4f}" in result.stdout
    page = _Report()
    page.feed((tmp_path / "report" / "report.html").read_text())
    assert page.images[0].startswith("data:image/png;base64,iVBOR")
    assert page.rows == 3 * (1 + 2)
    assert names[0] in page.text, "names are escaped"
    assert (tmp_path / "report" / "map.svg").read_text().startswith("<?xml")
    refused = inf_ir("analyze", tmp_path / "one.jsonl", "--model", base, "--output", tmp_path / "other")
    assert "at least two different instructions, it has 1" in only_error(refused)
