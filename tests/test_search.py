"""A corpus is searched by its vectors, in an array or in a FAISS index."""

import faiss
import numpy as np
import pytest

from sentence_transformers_inf import load_instruction_model, search

PASSAGES = [f"Passage {number} about the {topic}." for number, topic in enumerate(("sky", "sea", "city", "tax") * 10)]


@pytest.fixture(scope="module")
def model(tiny):
    return load_instruction_model(tiny)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_nearest_of_a_memory_mapped_array_are_those_of_all_similarities(model, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(search, "_CHUNK", 7)
    np.save(tmp_path / "index.npy", model.encode_document(PASSAGES).astype(dtype))
    index = search.read_index(tmp_path / "index.npy", len(PASSAGES), 32)
    assert isinstance(index, np.memmap)
    queries = model.encode_query(["why is the sky blue", "taxes"])
    expected = model.similarity(queries, index.astype(np.float32)).numpy()
    for found, similarities in zip(search.nearest(model, index, queries, 9), expected):
        assert [row for row, _ in found] == np.argsort(-similarities)[:9].tolist()
        assert np.allclose([score for _, score in found], np.sort(similarities)[::-1][:9], atol=1e-6)


def test_hits_that_faiss_lacks_are_not_shown(model):
    """An index that looks into one of its cells finds fewer passages than were asked for."""
    vectors = model.encode_document(PASSAGES)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(32), 32, 4, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    queries = model.encode_query(["why is the sky blue", {"instruction": "For children.", "query": "why is the sky blue"}])
    _, rows = index.search(queries, len(PASSAGES))
    assert (rows == -1).any()
    hits = search.search(model, PASSAGES, "why is the sky blue", "For children.", len(PASSAGES), index)
    assert {hit.passage for hit in hits} == {PASSAGES[row] for row in rows.ravel() if row >= 0}
