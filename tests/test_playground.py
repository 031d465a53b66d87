"""The playground: its rankings are the evaluator's, its words are true, and what users type is only text."""

import html.parser
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gradio_client import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from sentence_transformers_inf import load_instruction_model, load_records, passages
from sentence_transformers_inf.evaluation import measure
from sentence_transformers_inf.modules import adapter_tower, copy_tower
from sentence_transformers_inf.playground import page, render
from sentence_transformers_inf.playground.corpus import Corpus, Example, read_corpus
from sentence_transformers_inf.playground.ranking import MOST_CHARACTERS, Ranker, Ranking, load_rankers, rank
from sentence_transformers_inf.playground.words import in_words, obeyed
from tests.commands import call, error_line

TEXTS = [
    "The sky is blue.",
    "Taxes are due in May.",
    "Cats sleep all day.",
    "The sea is deep.",
    "Bread rises.",
    "Trains run.",
]


def corpus_of(texts, examples=()):
    return Corpus(list(texts), [""] * len(texts), [""] * len(texts), tuple(examples))


def ranking_of(before, after, models=("model",)):
    """A ranking that gives row 0 the first of the ranks, row 1 the second ..."""
    before, after = np.array(before), None if after is None else np.array(after)
    ranks = before if after is None else after
    scores = (1 - ranks / 100).astype(np.float32)
    return Ranking(models, np.argsort(ranks), ranks, scores, None if after is None else before)


def rank_one(rankers, query, instruction):
    return rank(rankers, [(query, instruction)])[0]


def search(rankers, corpus, query, instruction):
    return page.search(rankers, corpus, [query], [instruction])[0]


def without_scores(shown):
    return re.sub(r"\d\.\d{3}", "", shown)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(passages, "cached_assets_path", lambda *_, **__: tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tiny_model(tiny):
    return load_instruction_model(tiny)


@pytest.fixture
def rankers(tiny_model):
    return [Ranker("tiny", tiny_model, TEXTS)]


@pytest.fixture(scope="module")
def records_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    load_records("mini", "test").select(range(5)).to_json(path)
    return str(path)


def test_the_ranks_are_those_of_the_evaluator(base, records_file):
    corpus, records = read_corpus(records_file), load_records(records_file)
    (ranker,) = load_rankers(base, None, corpus.passages)
    expected = measure(ranker.model, records).ranks
    for row, record in enumerate(records):
        for side, instruction in enumerate((record["instruction_positive"], record["instruction_negative"])):
            _, told = rank_one([ranker], record["query_positive"], instruction)
            assert told.ranks[3 * row : 3 * row + 3].tolist() == expected[row, side].tolist()
            example = corpus.example(record["query_positive"], instruction)
            assert (example.expected, example.unwanted) == ((3 * row + side,), (3 * row + 1 - side,))


def test_an_adapter_and_its_base_share_the_ranking_without_an_instruction(tiny):
    base = load_instruction_model(tiny)
    tower = copy_tower(base, share=False)
    for parameter in tower[0].parameters():
        parameter.data += 0.05
    adapted = Ranker("adapter", adapter_tower(base, tower).eval(), TEXTS)
    alone = Ranker("base", base, TEXTS)
    assert alone.vectors.filename == adapted.vectors.filename
    plain, told, moved = rank_one([alone, adapted], "sky", "For children.")
    assert (plain.models, told.models, moved.models) == (("base", "adapter"), ("base",), ("adapter",))
    assert plain.before is None
    assert np.array_equal(moved.before, plain.ranks)
    assert not np.allclose(told.scores, moved.scores)
    assert [found.models for found in rank_one([alone, adapted], "sky", " ")] == [("base", "adapter")]


def test_models_that_differ_have_their_own_ranking_without_an_instruction(tiny_model, base):
    others = [Ranker("tiny", tiny_model, TEXTS), Ranker("base", load_instruction_model(base), TEXTS)]
    assert [(found.models, found.before is None) for found in rank_one(others, "sky", "For children.")] == [
        (("tiny",), True), (("tiny",), False), (("base",), True), (("base",), False),
    ]  # fmt: skip


def test_a_model_is_compared_with_the_base_that_its_recipe_names_while_there_is_one(tiny, tmp_path):
    folder = tmp_path / "trained"
    load_instruction_model(tiny).save_pretrained(str(folder), create_model_card=False)
    assert [ranker.name for ranker in load_rankers(f"{folder}/", None, TEXTS)] == ["trained"]
    for base, names in ((tiny, ["model", "trained"]), (str(tmp_path / "gone"), ["trained"])):
        (folder / "recipe.json").write_text(json.dumps({"base": base, "base_on_hub": False}))
        assert [ranker.name for ranker in load_rankers(str(folder), None, TEXTS)] == names
    assert [ranker.name for ranker in load_rankers(str(folder), str(tiny), TEXTS)] == ["model", "trained"]


def test_queries_that_are_ranked_together_have_their_own_rankings(tiny_model):
    rankers = [Ranker("one", tiny_model, TEXTS), Ranker("two", tiny_model, TEXTS)]
    asked = [("sky", "For children."), ("tax", ""), ("cats", " "), ("bread", "For bakers.")]
    for texts, together in zip(asked, rank(rankers, asked)):
        alone = rank_one(rankers, *texts)
        assert [(found.models, found.before is None) for found in together] == [
            (found.models, found.before is None) for found in alone
        ]
        for one, other in zip(together, alone):
            assert np.allclose(one.scores, other.scores, atol=1e-5)
    assert rank(rankers, []) == []


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_scores_are_the_similarities_of_vectors_of_any_length(tiny, tmp_path, similarity):
    encoder = Transformer(f"{tiny}", max_seq_length=32)
    plain = SentenceTransformer(modules=[encoder, Pooling(32, pooling_mode="mean")], similarity_fn_name=similarity)
    model = load_instruction_model(plain)
    np.save(tmp_path / "vectors.npy", model.encode_document(TEXTS) * np.arange(1, 7, dtype=np.float32)[:, None])
    vectors = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    (found,) = rank_one([Ranker("model", model, TEXTS, vectors)], "sky", "")
    expected = model.similarity(model.encode_query(["sky"]), np.array(vectors)).numpy()[0]
    assert np.allclose(found.scores, expected, atol=1e-5)
    assert np.array_equal(found.order, np.argsort(-expected))


def test_a_corpus_is_encoded_once(tiny_model, cache):
    first = Ranker("tiny", tiny_model, TEXTS)
    (path,) = cache.glob("*.npy")
    written = path.stat().st_mtime_ns
    assert np.array_equal(Ranker("tiny", tiny_model, TEXTS).vectors, first.vectors)
    assert (path.stat().st_mtime_ns, len(list(cache.glob("*.npy")))) == (written, 1)
    assert isinstance(first.vectors, np.memmap)
    Ranker("tiny", tiny_model, TEXTS[::-1])
    assert len(list(cache.glob("*.npy"))) == 2


def test_every_bundled_corpus_has_examples_whose_opposite_is_an_example():
    for name, kinds in (("mini", 12), ("narratives", 2), ("help-centre", 10)):
        corpus = read_corpus(name)
        assert len(corpus.kinds_of_examples()) == kinds
        for example in corpus.examples:
            opposite = corpus.example(example.query, example.opposite)
            assert opposite is not None
            assert {*opposite.expected} & {*example.expected, *example.unwanted}
            assert {*example.expected, *example.unwanted} <= {*range(len(corpus.passages))}


def test_pressing_a_chip_goes_through_the_queries_of_its_kind():
    corpus = read_corpus("mini")
    count = corpus.kinds_of_examples()["exclusion"]
    queries, query = [], "something else"
    for _ in range(count + 1):
        query = corpus.next_example("exclusion", f" {query}\n").query
        queries.append(query)
    assert len({*queries}) == count
    assert queries[0] == queries[-1]


def test_passages_are_found_by_kind_topic_and_words():
    corpus = read_corpus("mini")
    rows = corpus.find(kind="source", topic="head lice")
    assert rows
    assert all("lice" in corpus.topics[row] for row in rows)
    (row,) = corpus.find(words="CONDITIONER fortnight")
    assert row in rows
    assert corpus.find(kind="format", words="fortnight conditioner") == []
    assert len(corpus.find()) == len(corpus.passages)


def test_what_happened_is_said_in_words():
    example = Example("exclusion", "q", "i", expected=(0,), unwanted=(1,), opposite="o")
    moved = ranking_of([8, 1, 2, 3, 4, 5, 6, 7], [1, 7, 2, 3, 4, 5, 6, 8])
    assert in_words(moved, example) == "The expected passage rose from 8 to 1; the passage you excluded fell from 1 to 7."
    assert in_words(moved, None) == "The first passage rose from 8; 1 of the first 5 was not among them before."
    assert obeyed(moved, example) is True
    same = ranking_of([8, 1, 2, 3, 4, 5, 6, 7], [8, 1, 2, 3, 4, 5, 6, 7])
    assert in_words(same, example) == "The expected passage stayed at 8; the passage you excluded stayed at 1."
    assert in_words(same, None) == "Nothing moved among the first 5."
    assert obeyed(same, example) is False
    several = Example("narrower", "q", "i", expected=(0, 2), unwanted=(1, 3), opposite="o")
    assert in_words(moved, several) == (
        "The best of 2 expected passages rose from 2 to 1; the best of 2 passages you excluded fell from 1 to 3."
    )
    assert obeyed(ranking_of([1, 2], None), example) is None


def test_changes_are_readable_without_colour():
    example = Example("audience", "q", "i", expected=(0,), unwanted=(1,), opposite="o")
    shown = render.rankings([ranking_of([3, 1, 2], [1, 3, 2])], corpus_of(TEXTS[:3]), example)
    words = re.sub(r"<[^>]*>", " ", shown)
    for expected in ("▲2 was 3", "▼2 was 1", "– unmoved", "★ expected", "✕ unwanted", "✓ obeys", "0.990"):
        assert expected in " ".join(words.replace("<", " <").split())


def test_a_marked_passage_is_shown_however_far_down():
    example = Example("audience", "q", "i", expected=(8,), unwanted=(9,), opposite="o")
    ranks = list(range(1, 11))
    shown = render.rankings([ranking_of(ranks, ranks)], corpus_of([f"Passage {n}." for n in range(10)]), example)
    assert re.findall(r'data-row="(\d)"', shown) == ["0", "1", "2", "3", "4", "8", "9"]


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.words = set(), set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.words.append(data)


@settings(deadline=None, max_examples=60)
@given(st.text(st.sampled_from("<>\"'&/=`${}! scriptonerrorimg"), min_size=1, max_size=60).filter(str.strip))
def test_texts_are_only_text(words):
    example = Example("audience", words, words, expected=(0,), unwanted=(1,), opposite=words)
    corpus = Corpus([words, f"<script>{words}"], [words] * 2, [words] * 2, (example,))
    told = ranking_of([2, 1], [1, 2], (words,))
    settings = {"base": words, "settings": {words: words}}
    result = {"data": words, "split": words, "records": 1, "p_mrr": 1.0, "per_type": {}}
    result["per_type"] = {words: {"pair_accuracy": 1.0, "p_mrr": -1.0}}
    benchmark = {"task": words, "metric": words, "score": 1.0, "instructed": True}
    for shown in (
        render.rankings([ranking_of([2, 1], None, (words,)), told], corpus, example, [words]),
        render.corpus_list(corpus, [0, 1]),
        render.checkpoint(settings, {"records": [result], "benchmarks": [benchmark]}),
        render.message(words),
    ):
        reader = Reader()
        reader.feed(shown)
        assert not reader.tags & {"script", "img", "svg", "iframe"}
        assert reader.attributes <= {"class", "role", "aria-label", "aria-hidden", "data-row", "scope", "style"}
        assert words in "".join(reader.words)


def test_a_text_that_is_too_long_or_blank_is_one_clear_message(rankers):
    corpus = corpus_of(TEXTS)
    for query, instruction, message in (
        ("x" * 2_000_000, "", "The query has 2,000,000 characters. Shorten it to at most 4,000."),
        ("sky", "x" * 2_000_000, "The instruction has 2,000,000 characters. Shorten it to at most 4,000."),
        (" \n", "For children.", "Type a query first."),
    ):
        assert search(rankers, corpus, query, instruction) == render.message(message)
    assert "columns" in search(rankers, corpus, "x" * MOST_CHARACTERS, "y" * MOST_CHARACTERS)


def test_the_checkpoint_tab_has_the_results_and_the_recipe_or_says_how_to_get_them(rankers):
    entry = {"data": "mini", "split": "test", "records": 3, "p_mrr": 41.26, "pair_accuracy": 56.3, "base": {}}
    entry |= {"base": {"p_mrr": 2.9, "pair_accuracy": 9.2}, "per_type": {"audience": {"p_mrr": -3.0, "pair_accuracy": 63.6}}}
    shown = render.checkpoint({"base": "some/base", "settings": {"seed": 1}}, {"records": [entry]})
    for part in ("<td>2.9</td><td>41.3</td>", "width:63.6%", "width:0.0%", "<td>-3.0</td>", "some/base"):
        assert part in shown
    assert "inf-embed card" in render.checkpoint(None, {})


def test_many_clients_get_their_own_answers_over_http(rankers):
    """20 of Gradio's clients at once, one with far too long a text."""
    examples = (Example("length", "q", "Long.", (0,), (1,), "Short."), Example("length", "q", "Short.", (1,), (0,), "Long."))
    built = page.page_of(rankers, corpus_of(TEXTS, examples))
    address = page.launch(built, server_name="127.0.0.1", prevent_thread_lock=True)
    try:
        client = Client(address, verbose=False)
        asked = [(f"{text} {number}", f"Number {number}.") for number, text in enumerate(TEXTS * 3)]
        with ThreadPoolExecutor(20) as pool:
            long = pool.submit(client.predict, "x" * 2_000_000, "", api_name="/search")
            shown = list(pool.map(lambda texts: client.predict(*texts, api_name="/search"), asked))
        alone = [search(rankers, corpus_of(TEXTS), *texts) for texts in asked]
        assert list(map(without_scores, shown)) == list(map(without_scores, alone))  # a batch is rounded otherwise
        assert "2,000,000 characters" in long.result()
        told, turned = client.predict("q", "Long.", api_name="/opposite")
        assert told == "Short."
        assert without_scores(turned) == without_scores(search(rankers, corpus_of(TEXTS, examples), "q", "Short."))
        assert "1 of 6 passages" in client.predict("", "", "cats", api_name="/corpus")
    finally:
        built.close()


def test_what_cannot_be_opened_is_one_clear_line(tmp_path, tiny):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "One."}\n{"text": " "}\n{"text": "Three."}\n', encoding="utf-8")
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"text": "One."}\n{"text": \n', encoding="utf-8")
    record = load_records("mini", "test")[0]
    records = tmp_path / "records.jsonl"
    records.write_text("".join(json.dumps(row) + "\n" for row in (record, record | {"document": ""})), encoding="utf-8")
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        free.bind(("127.0.0.1", 0))
        unused = free.getsockname()[1]
        free.close()
        for words, parts in (
            (["--port", port], [f"port {port}", "--port"]),
            (["no/such/model", "--port", unused], ["no/such/model"]),
            (["--corpus", "nowhere.jsonl"], ["nowhere.jsonl: no such corpus file"]),
            (["--corpus", bad], [f"{bad}, row 2"]),
            (["--corpus", torn], [f"{torn}, row 2"]),
            (["--corpus", records], [f"{records}, row 2", "'document'"]),
            ([tiny, "--compare", "no/such/base"], ["no/such/base"]),
        ):
            status, _, err = call("inf-embed", "playground", *words)
            assert status == 2
            line = error_line(err)
            assert all(part in line for part in parts), line
