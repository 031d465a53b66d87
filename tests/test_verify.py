"""``inf-embed verify`` against real servers: right ones pass, and what a wrong one does is named."""

import copy
import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.modules import adapter_tower, copy_tower, encoder_of
from sentence_transformers_inf.serving.app import create_app
from sentence_transformers_inf.serving.verify import Endpoint, verify_endpoint
from tests.commands import call, error_line
from tests.serving import plain_server, running


def other_weights(model):
    """Another revision: every weight moved a little."""
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data += 0.3 * weight.data.std(correction=0) * torch.randn_like(weight)
    return model


def verify(app, tiny, *options):
    with running(app) as url:
        return call("inf-embed", "verify", url, "--model", tiny, *options)


def test_the_own_server_passes_to_the_bit(tiny):
    status, out, _ = verify(create_app(load_instruction_model(tiny), "tiny"), tiny)
    assert status == 0, out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(("plain texts", "instructed queries"))]
    assert [cells[2] for cells in rows] == ["bits", "bits"]


def test_exclusions_that_only_the_server_subtracts_are_named(tiny):
    status, out, _ = verify(create_app(load_instruction_model(tiny, find_exclusions=True), "tiny"), tiny)
    assert status == 1
    assert "instructed queries: what instructions exclude is subtracted" in out
    assert "plain texts:" not in out


def test_a_plain_server_that_is_right_passes(tiny):
    status, out, err = verify(plain_server(SentenceTransformer(tiny)), tiny)
    assert status == 0, out + err
    assert "plain texts" in out
    assert "instructed queries" in out


def mean_instead(model):
    model[1].pooling_mode = "cls"
    return model


def cut(model):
    model.max_seq_length = 64
    return model


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (lambda model: plain_server(model, lambda vectors: 3 * vectors), "not normalised to length 1"),
        (lambda model: plain_server(model, prompt="query: "), "encoded with the prompt 'query: ' instead of ''"),
        (lambda model: plain_server(cut(model)), "cut after 64 tokens instead of 256"),
        (lambda model: plain_server(mean_instead(model)), "pooled by 'cls' instead of 'mean'"),
        (lambda model: plain_server(other_weights(model)), "another model or another revision"),
        (lambda model: plain_server(model, lambda vectors: vectors[::-1]), "in another order than the texts"),
        (lambda model: plain_server(model, lambda vectors: vectors[:, :16]), "16 dimensions instead of 32"),
        (lambda model: plain_server(model, lambda vectors: np.full(vectors.shape, None)), "not finite"),
    ],
)  # fmt: skip
def test_a_fault_is_named(tiny, server, words):
    status, out, err = verify(server(SentenceTransformer(tiny)), tiny, "--only", "plain")
    assert status == 1, out + err
    findings = [line for line in out.splitlines() if line.startswith("plain texts:")]
    assert len(findings) == 1, out
    assert words in findings[0]


def test_two_faults_are_named(tiny):
    model = mean_instead(SentenceTransformer(tiny))
    _, out, _ = verify(plain_server(model, lambda vectors: 3 * vectors), tiny, "--only", "plain")
    assert "plain texts: not normalised" in out
    assert "plain texts: pooled by 'cls'" in out


def test_another_template_is_named(tiny):
    app = create_app(load_instruction_model(tiny, template="{instruction} {query}"), "tiny")
    status, out, _ = verify(app, tiny)
    assert status == 1
    assert "instructed queries: joined by the template '{instruction} {query}' instead of '{query} {instruction}'" in out
    assert "plain texts:" not in out


def test_coarse_values_keep_their_ranks(tiny):
    status, out, _ = verify(plain_server(SentenceTransformer(tiny), lambda vectors: (250 * vectors).round() / 250), tiny)
    assert status == 0, out
    assert "ranks hold, values do not" in out


def test_the_two_sides_of_an_adapter_are_told_apart(tiny):
    base = load_instruction_model(tiny)
    adapted = adapter_tower(base, copy_tower(base, share=False))
    other_weights(encoder_of(adapted))
    tower = SentenceTransformer(modules=list(encoder_of(copy.deepcopy(adapted))))

    def contracts(app):
        with running(app) as url:
            return {row.what: (row.contract, row.findings) for row in verify_endpoint(Endpoint(url), adapted)}

    right = contracts(create_app(copy.deepcopy(adapted), "adapted"))
    assert {contract for contract, _ in right.values()} <= {"bits", "1e-3"}
    of_base, of_tower = contracts(plain_server(SentenceTransformer(tiny))), contracts(plain_server(tower))
    assert of_base["plain texts"][0] in ("bits", "1e-3")
    assert "by the base, without the adapter" in of_base["instructed queries"][1][0]
    assert "by the encoder of instructed queries" in of_tower["plain texts"][1][0]
    assert of_tower["instructed queries"][0] in ("bits", "1e-3")


def test_stored_vectors_of_another_revision_are_found(tiny, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    texts = [f"Passage {number} on {topic}, at length." for number, topic in enumerate(["the sky", "the sea", "taxes"] * 30)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    model = load_instruction_model(tiny)
    np.save(tmp_path / "right.npy", model.encode_document(texts).astype(np.float16))
    np.savez(tmp_path / "wrong.npz", other_weights(SentenceTransformer(tiny)).encode(texts))
    np.save(tmp_path / "short.npy", model.encode_document(texts[:-1]))
    with running(plain_server(SentenceTransformer(tiny))) as url:
        words = ("inf-embed", "verify", url, "--model", tiny, "--only", "plain", "--corpus", corpus, "--index")
        status, out, _ = call(*words, tmp_path / "right.npy")
        assert status == 0, out
        status, out, _ = call(*words, tmp_path / "wrong.npz")
        assert status == 1
        assert "wrong.npz: another model or another revision of it" in " ".join(out.split())
        status, _, err = call(*words, tmp_path / "short.npy")
        assert status == 2
        assert "expected an index of 90 passages" in error_line(err)
        assert "--index and --corpus go together" in error_line(call(*words[:-3], "--index", tmp_path / "right.npy")[2])


def answering(text, status=200):
    async def answer(request):
        return PlainTextResponse(text, status)

    return Starlette(routes=[Route("/v1/embeddings", answer, methods=["POST"])])


def test_a_server_that_refuses_long_texts_may_be_right(tiny):
    server = plain_server(SentenceTransformer(tiny), most_words=300)
    status, out, err = verify(server, tiny, "--only", "plain")
    assert status == 0, out + err


@pytest.mark.parametrize(
    ("app", "message"),
    [
        (answering("<html>hello</html>"), "the answer is not JSON"),
        (answering('{"data": [{"vector": [1]}]}'), "holds no embeddings"),
        (answering('{"data": []}'), "1 texts were sent"),
        (answering('{"error": "no such key"}', 401), "the server answers 401"),
    ],
)
def test_what_is_no_server_of_embeddings_is_one_line(tiny, app, message):
    status, _, err = verify(app, tiny)
    assert status == 2
    assert message in error_line(err)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/v1", "no server answers"),
        ("127.0.0.1:8000", "no address of a server"),
        ("http://[", "no address of a server"),
        ("http://a b:80", ""),
    ],
)
def test_no_server_is_one_line(tiny, url, message):
    status, _, err = call("inf-embed", "verify", url, "--model", tiny)
    assert status == 2
    assert message in error_line(err)


def test_the_key_is_sent_to_the_server_alone(tiny, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-test")
    keys = []

    async def note(request):
        keys.append(request.headers.get("authorization"))
        return PlainTextResponse("no", 403)

    with running(Starlette(routes=[Route("/v1/embeddings", note, methods=["POST"])])) as url:
        status, out, err = call("inf-embed", "verify", url, "--model", tiny)
    assert (status, keys) == (2, ["Bearer sk-of-the-test"])
    assert "sk-of-the-test" not in out + err
