"""Passages are encoded once for a model, and again for one whose embeddings are others."""

import numpy as np
import pytest
from sentence_transformers.sentence_transformer.modules import Pooling

from sentence_transformers_inf import load_instruction_model, passages

TEXTS = [f"A passage about the {topic}, in a few words." for topic in ("sky", "sea", "city", "tax")]


def with_cls(model):
    model[1] = Pooling(model[1].embedding_dimension, pooling_mode="cls")


def without_normalization(model):
    del model[2]


def with_fewer_dimensions(model):
    model.truncate_dim = 8


def with_fewer_tokens(model):
    model.max_seq_length = 7


def with_a_prompt(model):
    model.prompts["document"] = "passage: "


@pytest.mark.parametrize(
    "change", [with_cls, without_normalization, with_fewer_dimensions, with_fewer_tokens, with_a_prompt]
)
def test_a_model_of_the_same_weights_and_other_settings_has_its_own_vectors(tiny, tmp_path, monkeypatch, change):
    monkeypatch.setattr(passages, "cached_assets_path", lambda *_, **__: tmp_path)
    first, second = load_instruction_model(tiny), load_instruction_model(tiny)
    change(second)
    for model in (first, second, first, second):
        vectors, expected = passages.encode_passages(model, TEXTS), model.encode_document(TEXTS)
        assert vectors.shape == expected.shape
        assert np.allclose(vectors, expected, atol=1e-6)
    assert len(list(tmp_path.glob("*.npy"))) == 2
