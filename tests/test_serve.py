"""``inf-embed serve`` over real HTTP: what it gives is what the model gives, and what it refuses does not stop it."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sentence_transformers_inf import load_instruction_model
from sentence_transformers_inf.export import export_model
from sentence_transformers_inf.serving.app import create_app
from sentence_transformers_inf.serving.batching import Batcher
from tests.commands import call, error_line
from tests.serving import metric, post, running

TEXTS = [
    "Sunlight is scattered by the air.",
    "Taxes are due in April.",
    "A vaccine shows your body a harmless bit of a germ.",
]
QUERY = {"query": "why is the sky blue", "instruction": "For a ten-year-old, nothing about physics."}


@pytest.fixture(scope="module")
def model(tiny):
    return load_instruction_model(tiny, find_exclusions=True)


@pytest.fixture(scope="module")
def url(model):
    with running(create_app(model, "tiny")) as url:
        yield url


@pytest.fixture
def held(tiny):
    """A server whose model encodes when it is let go, what it encoded, and what lets it go."""
    model, encoded, go, encode = load_instruction_model(tiny), [], threading.Event(), None

    def wait(inputs, **options):
        encoded.extend(inputs)
        assert go.wait(60)
        return encode(inputs, **options)

    encode, model.encode_document = model.encode_document, wait
    with running(create_app(model, "tiny", max_waiting=3)) as url:
        yield url, encoded, go
        go.set()


def vectors(answer):
    status, body = answer
    assert status == 200, body
    assert [entry["index"] for entry in body["data"]] == list(range(len(body["data"])))
    return np.array([entry["embedding"] for entry in body["data"]], dtype=np.float32)


@pytest.mark.parametrize("options", [{"encoding_format": "float"}, {}], ids=["float", "base64, its default"])
def test_openai_s_client_gets_the_model_s_embeddings_to_the_bit(model, url, options):
    client = openai.OpenAI(base_url=url, api_key="none")
    assert [each.id for each in client.models.list()] == ["tiny"]
    answer = client.embeddings.create(model="any", input=TEXTS, **options)
    assert np.array_equal(np.array([each.embedding for each in answer.data], dtype=np.float32), model.encode_document(TEXTS))
    assert answer.model == "any"
    assert answer.usage.prompt_tokens == sum(len(ids) for ids in model.tokenizer(TEXTS)["input_ids"])
    told = client.embeddings.create(
        model="any", input=QUERY["query"], extra_body={"instruction": QUERY["instruction"]}, **options
    )
    assert np.array_equal(np.array(told.data[0].embedding, dtype=np.float32), model.encode_query([QUERY])[0])


def test_instructions_and_exclusions_are_for_all_or_for_each(model, url):
    query, instruction = QUERY["query"], QUERY["instruction"]
    assert not np.array_equal(model.encode_query([QUERY]), model.encode_query([QUERY | {"exclude": None}]))
    cases = [
        ({"input": [query, "taxes"], "instruction": instruction}, [QUERY, {"query": "taxes", "instruction": instruction}]),
        ({"input": [query, "taxes"], "instruction": [instruction, None]}, [QUERY, "taxes"]),
        ({"input": [query], "instruction": instruction, "exclude": ""}, [QUERY | {"exclude": ""}]),
        ({"input": query, "exclude": "clouds"}, [{"query": query, "exclude": "clouds"}]),
        ({"input": [query, "a"], "exclude": [["fog", "rain"], None]}, [{"query": query, "exclude": ["fog", "rain"]}, "a"]),
        ({"input": [query], "input_type": "query"}, [query]),
    ]  # fmt: skip
    for body, inputs in cases:
        assert np.array_equal(vectors(post(url, body)), model.encode_query(inputs)), body
    assert np.array_equal(vectors(post(url, {"input": query})), model.encode_document([query]))


def test_queries_and_passages_go_to_their_encoders(tiny):
    """Of a model whose prompts differ; a text without either field is a passage."""
    model = load_instruction_model(tiny)
    model.prompts = {"query": "query: ", "document": "passage: "}
    with running(create_app(model, "prompted")) as url:
        as_query, as_passage, unsaid = (vectors(post(url, {"input": ["sky"]} | more))
                                        for more in ({"input_type": "query"}, {"input_type": "document"}, {}))  # fmt: skip
    assert np.array_equal(as_query, model.encode(["query: sky"]))
    assert np.array_equal(as_passage, model.encode(["passage: sky"]))
    assert np.array_equal(unsaid, as_passage)


def test_a_long_request_comes_back_in_order(model, url):
    texts = [f"{'word ' * (number * 7 % 30)}number {number}" for number in range(75)]
    assert np.allclose(vectors(post(url, {"input": texts})), model.encode_document(texts), atol=1e-6)


def test_concurrent_requests_share_batches_and_get_their_own_rows(model, tiny):
    def ask(number):
        texts = [f"text {number} {row}" for row in range(1 + number % 3)]
        told = number % 2
        given = vectors(post(url, {"input": texts} | ({"instruction": f"Only {number}."} if told else {})))
        inputs = [{"query": text, "instruction": f"Only {number}."} for text in texts]
        wanted = model.encode_query(inputs) if told else model.encode_document(texts)
        return np.abs(given - wanted).max()

    with running(create_app(load_instruction_model(tiny), "tiny")) as url, ThreadPoolExecutor(20) as clients:
        differences = list(clients.map(ask, range(120)))
        assert max(differences) < 1e-5
        assert metric(url, 'inf_embed_requests_total{status="200"}') == 120
        assert metric(url, 'inf_embed_texts_total{input_type="document"}') == sum(1 + n % 3 for n in range(0, 120, 2))
        assert metric(url, "inf_embed_batch_size_count") < 120
        assert metric(url, "inf_embed_request_seconds_count") == 120
        assert metric(url, "inf_embed_waiting_texts") == 0


@pytest.mark.parametrize(
    "sizes", [[1] * 12, [3, 2, 1, 6, 1, 1, 4, 1, 1, 2, 2, 1]], ids=["one text each", "more than a batch too"]
)
def test_who_waits_longest_is_answered_first_whatever_it_asks_for(model, sizes):
    answered = []

    async def ask(batcher, number, size):
        await batcher.encode([f"text {number} {row}" for row in range(size)], is_query=number % 2 == 0)
        answered.append(number)

    async def main():
        batcher = Batcher(model, batch_size=8, common=4, max_waiting=100)
        waiting = [asyncio.create_task(ask(batcher, number, size)) for number, size in enumerate(sizes)]
        await asyncio.sleep(0)  # all are in the queue
        running = asyncio.create_task(batcher.run())
        await asyncio.gather(*waiting)
        running.cancel()

    asyncio.run(main())
    batches, room = [], 0
    for number, size in enumerate(sizes):
        if size > room or not batches:
            batches, room = [*batches, []], 4
        batches[-1].append(number)
        room -= size
    assert answered == [number for batch in batches for number in sorted(batch, key=lambda each: each % 2)]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"input": ["a"] * 10_000}, "input", "at most 2048 items"),
        ({"input": "a" * 2_000_000}, "input", "at most 100000 characters"),
        ({"input": ["fine", "a" * 2_000_000]}, "input", "input[1]: String should have at most 100000 characters"),
        ({"input": "a", "instruction": "a" * 2_000_000}, "instruction", "at most 100000 characters"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": ["a", " "]}, "input", "input[1]: the text is empty"),
        ({"input": [[1, 2], [3]]}, "input", "input[0]: Input should be a valid string"),
        ({"input": [1, 2]}, "input", "input[0]: Input should be a valid string"),
        ({"input": None}, "input", "input: "),
        ({"model": "m"}, "input", "input: Field required"),
        ({"input": "a\ud800"}, "input", "input: "),
        ({"input": "a", "instructions": "x"}, "instructions", "instructions: there is no such field"),
        ({"input": ["a", "b"], "instruction": ["x"]}, "instruction", "instruction: 1 for 2 texts"),
        ({"input": "a", "instruction": 3}, "instruction", "instruction: "),
        ({"input": "a", "exclude": [["b", 3]]}, "exclude", "exclude[0][1]: "),
        ({"input": "a", "instruction": "x", "input_type": "document"}, "instruction", "passages take none"),
        ({"input": "a", "input_type": "passage"}, "input_type", "'query' or 'document'"),
        ({"input": "a", "dimensions": 8}, "dimensions", "this model's embeddings have 32"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        (["a"], None, "the body must be a JSON object"),
        (b'{"input": "a"', None, "the body is not JSON: Expecting ',' delimiter at character 13"),
        (b'{"input": "\xff"}', None, "parsing the body"),
        (b"[" * 100_000, None, "parsing the body"),
        (b"", None, "the body must be a JSON object"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_the_name_of_its_field(model, url, body, param, message):
    status, answer = post(url, body)
    assert (status, answer["error"]["param"], answer["error"]["type"]) == (400, param, "invalid_request_error")
    assert message in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 400
    assert np.array_equal(vectors(post(url, {"input": TEXTS})), model.encode_document(TEXTS))


def test_other_refusals(url):
    host, port = re.search(r"//(.+):(\d+)/", url).groups()
    too_long = http.client.HTTPConnection(host, int(port))
    too_long.putrequest("POST", "/v1/embeddings")
    too_long.putheader("Content-Type", "application/json")
    too_long.putheader("Content-Length", str(2**24 + 1))
    too_long.endheaders()
    assert too_long.getresponse().status == 413
    too_long.close()
    assert post(url, {"input": "a"}, content_type="text/plain")[0] == 400
    status, answer = post(f"{url}/nothing", {"input": "a"})
    assert (status, answer["error"]["message"]) == (404, "Not Found")
    with urllib.request.urlopen(url.replace("/v1", "/health")) as response:
        assert json.loads(response.read()) == {"status": "ok"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
FIELDS = st.sampled_from(["input", "instruction", "exclude", "input_type", "model", "dimensions", "encoding_format", "x"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(FIELDS, JSON | st.sampled_from(["query", "document", "text", ["a", "b"]]), max_size=5))
def test_whatever_json_it_gets_it_answers_or_refuses(url, body):
    status, answer = post(url, body)
    assert status in (200, 400)
    assert status == 200 or answer["error"]["message"]


def test_a_client_that_goes_leaves_the_queue(held):
    url, encoded, go = held
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(post, url, {"input": "first"})
        while metric(url, "inf_embed_waiting_texts") < 1:
            pass
        host, port = re.search(r"//(.+):(\d+)/", url).groups()
        gone = http.client.HTTPConnection(host, int(port))
        gone.request("POST", "/v1/embeddings", json.dumps({"input": "second"}), {"Content-Type": "application/json"})
        while metric(url, "inf_embed_waiting_texts") < 2:
            pass
        gone.close()
        while metric(url, "inf_embed_waiting_texts") > 1:
            pass
        go.set()
        assert first.result()[0] == 200
    assert post(url, {"input": "third"})[0] == 200
    assert encoded == ["first", "third"]


def test_more_than_can_wait_is_told_to_come_again(held):
    url, _, go = held
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(post, url, {"input": ["a", "b"]})
        while metric(url, "inf_embed_waiting_texts") < 2:
            pass
        status, answer = post(url, {"input": ["c", "d"]})
        assert (status, answer["error"]["type"]) == (503, "server_error")
        go.set()
        assert first.result()[0] == 200
    assert post(url, {"input": ["c", "d"]})[0] == 200


def test_a_broken_model_is_an_error_and_no_embedding(tiny):
    model = load_instruction_model(tiny)
    model[0].model.embeddings.word_embeddings.weight.data.fill_(float("nan"))
    with running(create_app(model, "broken")) as url:
        for _ in range(2):
            status, answer = post(url, {"input": "a"})
            assert status == 500
            assert "not finite" in answer["error"]["message"]


@pytest.mark.slow
def test_the_command_answers_what_is_under_way_before_it_stops(tiny):
    words = [sys.executable, "-m", "sentence_transformers_inf.cli", "serve", tiny, "--port", "0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        line = server.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/v1", line).group()
        with ThreadPoolExecutor(1) as clients:
            asked = clients.submit(post, url, {"input": ["a text of some words " * 8] * 1024, "encoding_format": "base64"})
            while metric(url, "inf_embed_waiting_texts") == 0 and not asked.done():
                pass
            assert not asked.done()
            server.send_signal(signal.SIGTERM)
            status, answer = asked.result()
        assert (status, len(answer["data"])) == (200, 1024)
        assert server.wait(60) in (0, -signal.SIGTERM)
        with pytest.raises(urllib.error.URLError):
            metric(url, "inf_embed_waiting_texts")
    finally:
        server.kill()


@pytest.mark.slow
def test_the_command_serves_an_export(tiny, tmp_path):
    export_model(tiny, tmp_path / "export", "onnx")
    exported = load_instruction_model(tmp_path / "export", backend="onnx")
    words = [sys.executable, "-m", "sentence_transformers_inf.cli", "serve", tmp_path / "export", "--port", "0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+/v1", server.stdout.readline()).group()
        told = {"input": QUERY["query"], "instruction": QUERY["instruction"]}
        assert np.allclose(vectors(post(url, told)), exported.encode_query([QUERY]), atol=1e-6)
        assert np.allclose(vectors(post(url, {"input": TEXTS})), exported.encode_document(TEXTS), atol=1e-6)
    finally:
        server.kill()


def test_what_cannot_start_is_one_line(tiny, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        status, _, err = call("inf-embed", "serve", tiny, "--port", port)
    assert status == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in error_line(err)
    status, _, err = call("inf-embed", "serve", tmp_path / "none", "--port", 0)
    assert status == 2
    assert "no such model folder" in error_line(err)
    (tmp_path / "serving.json").write_text('{"format": "merged"}')
    status, _, err = call("inf-embed", "serve", tmp_path, "--port", 0)
    assert status == 2
    assert "export it with --format onnx or openvino" in error_line(err)
    assert call("inf-embed", "serve", tiny, "--host", "no.such.host.invalid")[0] == 2
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert 'pip install "sentence-transformers-inf[serve]"' in error_line(call("inf-embed", "serve", tiny)[2])
