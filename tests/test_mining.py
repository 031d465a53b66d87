"""Second passages are found by meaning and by words, the same ones again after any interruption."""

import numpy as np
import pytest

from dataset_builder.mining import CANDIDATES, Miner, bind, mine
from dataset_builder.quality import NEAR, jaccard, word_pairs

TOPICS = ("otters", "bridges", "sourdough", "violins", "glaciers", "tax", "bees", "sails")
CORPUS = [
    f"{aspect} of {topic}: what {reader} should know about {topic} and its {aspect}, told in {number} short parts"
    for number, topic in enumerate(TOPICS)
    for aspect in ("history", "price", "care")
    for reader in ("children", "experts")
]


def embed(texts):
    """A vector a text: its words' own random ones, added up."""
    vectors = [
        sum(np.random.default_rng(sum(map(ord, word))).standard_normal(64) for word in text.split()) for text in texts
    ]
    return np.array(vectors, dtype=np.float32)


def pairs(count=40):
    return [(f"price of {TOPICS[n % len(TOPICS)]}", CORPUS[(6 * n + 2) % len(CORPUS)]) for n in range(count)]


def test_candidates_answer_the_query_and_are_no_copies():
    miner = Miner(CORPUS, embed(CORPUS))
    queries, known = zip(*pairs(8))
    for query, passage, found in zip(queries, known, miner.find(list(queries), embed(queries), known)):
        topic = query.split()[-1]
        assert 1 <= len(found) <= CANDIDATES
        assert topic in found[0]
        texts = [passage, *found]
        assert len(set(texts)) == len(texts)
        assert all(jaccard(word_pairs(a), word_pairs(b)) < NEAR for a in texts for b in texts if a != b)


def test_words_find_what_vectors_miss():
    rare = "the zymurgist keeps one record of everything"
    corpus = [*(f"{text} {n}" for n in range(3) for text in CORPUS), rare]
    vectors = embed(corpus)
    query = -vectors[-1:]  # as far from the passage as can be
    miner = Miner(corpus, vectors)
    known = [corpus[int(np.argmax(vectors[:-1] @ query[0]))]]
    assert rare not in miner.find(["history"], query, known)[0]
    vectors[-1] = query[0]  # the passage is closest now, but the index does not know
    assert rare in miner.find(["zymurgist"], query, known)[0]


LONG = " ".join(f"part {number} says much about otters" for number in range(30))


@pytest.mark.parametrize("copies", [10, 25, 200])
def test_near_copies_hide_no_candidate(copies):
    """Neither those of the known passage nor those of another one, however many are closer."""
    near = [f"{LONG} edition {number}" for number in range(copies)]
    other = "bridges of stone and wood, and what keeps them from falling into rivers at night"
    many = [f"{other} {number}" for number in range(copies)]
    corpus = [LONG, *near, *many, *CORPUS]
    vectors = embed(corpus)
    vectors[: 1 + copies] = vectors[0]  # as close as can be
    vectors[1 + copies : 1 + 2 * copies] = 0.9 * vectors[0] + 0.1 * embed([other])
    (found,) = Miner(corpus, vectors).find(["otters"], vectors[:1], [LONG])
    assert len(found) == CANDIDATES
    assert not set(found) & {LONG, *near}
    assert len(set(found) & set(many)) == 1


def test_a_passage_under_a_title_is_no_second_passage():
    own = "Otters hold hands when they sleep on the sea."
    held = "They sleep on the sea. Otters rest there at night, and hold hands when they sleep, as a study of otters says."
    corpus = [own, f"Sea otter facts for children, with many pictures {own}", f"{held} {own}", held, "😀", "😁", *CORPUS]
    (found,) = Miner(corpus, embed(corpus)).find(["how do otters sleep"], embed([own]), [own])
    assert held in found
    assert not set(found) & set(corpus[:3])


@pytest.mark.parametrize("dies_at", [0, 1, 2])
def test_an_interrupted_search_goes_on(tmp_path, monkeypatch, dies_at):
    monkeypatch.setattr("dataset_builder.mining._BLOCK", 16)
    whole = list(mine(tmp_path / "whole", iter(pairs()), 40, CORPUS, embed, embed))
    searched = []

    def embed_queries(texts):
        if len(searched) == dies_at:
            raise KeyboardInterrupt
        searched.append(texts)
        return embed(texts)

    with pytest.raises(KeyboardInterrupt):
        list(mine(tmp_path / "cut", iter(pairs()), 40, CORPUS, embed, embed_queries))
    again = []
    found = list(mine(tmp_path / "cut", iter(pairs()), 40, CORPUS, embed, lambda texts: again.append(texts) or embed(texts)))
    assert found == whole
    assert len(again) == 3 - dies_at
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes() for name in files)


def test_another_corpus_is_searched_anew(tmp_path):
    bind(tmp_path, CORPUS, "model a")
    list(mine(tmp_path, iter(pairs(4)), 4, CORPUS, embed, embed))
    bind(tmp_path, CORPUS, "model a")
    assert list(tmp_path.glob("*.parquet"))
    bind(tmp_path, CORPUS[1:], "model a")
    assert not list(tmp_path.glob("*.parquet"))


def test_what_was_mined_and_is_damaged_is_never_read_as_other_candidates(tmp_path):
    whole = list(mine(tmp_path, iter(pairs(4)), 4, CORPUS, embed, embed))
    (path,) = tmp_path.glob("*.parquet")
    content = path.read_bytes()
    end, refused = len(content) - int.from_bytes(content[-8:-4], "little") - 8, []
    for at in range(4, end):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            found = list(mine(tmp_path, iter(pairs(4)), 4, CORPUS, embed, embed))
            assert found == whole  # a header's statistics, for example
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > (end - 4) / 2
    assert all("delete it and give the same command again" in message for message in refused)
