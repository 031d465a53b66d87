"""Ledgers and folders: damage is named, never read; one process at a time; what was paid for is not lost."""

import asyncio
import contextlib
import json
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_builder.files import locked
from dataset_builder.ledger import Answer, Ledger, LedgerDamage, Outcome, ledger_path, repair_ledger
from dataset_builder.prepare import Settings, prepare, read_build
from dataset_builder.quality import Duplicates
from sentence_transformers_inf.recipe import replacing
from tests.damage import BUILD, KINDS, damaged, fill, readable
from tests.test_builder import command, dataset_bytes, inf_ir, only_error, pairs, report, serve, start  # noqa: F401


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a ledger, and its answers."""
    path = tmp_path_factory.mktemp("whole") / "ledger.sqlite"
    answers = fill(path, 60)
    return path.read_bytes(), answers


# Damage


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32))
def test_a_damaged_ledger_is_refused_or_whole_and_repair_saves_what_is_left(whole, tmp_path_factory, kind, seed):
    content, answers = whole
    path = tmp_path_factory.mktemp("damaged") / "ledger.sqlite"
    rest = damaged(content, kind, random.Random(seed))
    path.write_bytes(rest)
    # A row on pages of which no byte changed must be saved: its text is in what is left of the file.
    intact = {key for key, answer in answers.items() if len(answer.content) < 3000 and answer.content.encode() in rest}
    try:
        assert readable(path, answers) == set(answers)
    except LedgerDamage:
        repaired = repair_ledger(path, BUILD)
        assert repaired.aside.read_bytes() == rest
        found = readable(path, answers)
        assert len(found) == repaired.saved
        assert repaired.lost <= len(answers) - len(found)
        assert len(intact - found) <= 1  # one whose text is whole, and whose head or key is not


@pytest.mark.parametrize("share", [0.999, 0.9, 0.5, 0.3])
def test_a_cut_ledger_keeps_the_answers_in_what_is_left(whole, tmp_path, share):
    content, answers = whole
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(LedgerDamage):
        Ledger(path)
    saved = repair_ledger(path).saved
    assert saved == len(readable(path, answers)) >= (share - 0.1) * len(answers) - 6


@pytest.mark.parametrize("content", [b"", b"no database at all" * 300, None])
def test_an_empty_or_foreign_ledger_is_refused(whole, tmp_path, content):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(whole[0] if content is None else content)
    with pytest.raises(LedgerDamage, match="belongs to another build" if content is None else "repair"):
        Ledger(path, "other")
    # Answers are known by all that shapes them, and serve any build; outcomes do not.
    assert repair_ledger(path, "other").saved == (60 if content is None else 0)
    with contextlib.closing(Ledger(path, "other")) as ledger:
        assert ledger.statuses() == {}


def test_rows_in_the_write_ahead_log_of_a_killed_process_are_saved(tmp_path):
    """The log holds what the file does not yet; the file's header is damaged as well."""
    script = (
        "import asyncio, os, sys; from dataset_builder.ledger import *; ledger = Ledger(Path(sys.argv[1]), 'a build')\n"
        "async def keep():\n"
        "    for number in range(40):\n"
        "        await ledger.keep_answer(str(number), 'm', Answer('text ' * 2000, 'stop', None, 1, 1, 0.0))\n"
        "asyncio.run(keep()); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "ledger.sqlite"
    subprocess.run([sys.executable, "-c", script, path], check=False)
    assert path.with_name("ledger.sqlite-wal").stat().st_size > 0
    content = bytearray(path.read_bytes())
    content[:20] = bytes(20)
    path.write_bytes(content)
    assert repair_ledger(path, BUILD).saved == 40
    assert repair_ledger(path, BUILD).saved == 40


def test_a_repair_that_was_killed_goes_on(whole, tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.with_name("ledger.damaged-1").write_bytes(whole[0])  # put aside, and nothing more
    with pytest.raises(LedgerDamage, match="missing"):
        Ledger(path, BUILD)
    assert repair_ledger(path, BUILD).saved == 60


@given(st.lists(st.tuples(st.text(st.characters(), max_size=20), st.integers() | st.none()), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_any_text_and_any_number_is_kept(tmp_path_factory, contents):
    """Lone surrogates and numbers of any size too: one odd answer must not fail those that are committed with it."""
    path = tmp_path_factory.mktemp("odd") / "ledger.sqlite"
    answers = [Answer(text, "stop", text, 1, number or 0, 0.0) for text, number in contents]

    async def keep():
        with contextlib.closing(Ledger(path)) as ledger:
            await asyncio.gather(*(ledger.keep_answer(str(at), "m", answer) for at, answer in enumerate(answers)))
            await ledger.keep_outcome(Outcome(0, "failed", contents[0][0], {}))

    asyncio.run(keep())
    with contextlib.closing(Ledger(path)) as ledger:
        assert [ledger.answer(str(at)) for at in range(len(answers))] == answers
        assert next(ledger.outcomes()).reason == contents[0][0]


def test_what_was_forgotten_is_asked_for_anew_and_stays_in_the_totals(tmp_path):
    async def run():
        with contextlib.closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
            await ledger.keep_answer("bad", "m", Answer("x", "stop", None, 1, 1, 1.0))
            await ledger.keep_outcome(Outcome(4, "failed", "why", {"bad_requests": ["bad"]}))
            ledger.forget_failures()
            assert (ledger.answer("bad"), ledger.statuses()) == (None, {})
            await ledger.keep_answer("bad", "m", Answer("good", "stop", None, 1, 1, 1.0))

    asyncio.run(run())
    repair_ledger(tmp_path / "ledger.sqlite")
    with contextlib.closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        assert ledger.answer("bad").content == "good"
        assert ledger.statuses() == {}
        assert ledger.totals()["m"]["cost"] == 2


def test_a_row_that_changes_under_an_open_ledger_is_an_error(whole, tmp_path):
    content, answers = whole
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(content)
    key, answer = next((key, answer) for key, answer in answers.items() if len(answer.content) < 3000)
    with contextlib.closing(Ledger(path, BUILD)) as ledger:
        place = content.index(answer.content.encode())
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"A")
        ledger._reader.execute("PRAGMA cache_size = 1")
        for other in answers:
            with contextlib.suppress(LedgerDamage):
                assert ledger.answer(other) == answers[other] or other == key
        with pytest.raises(LedgerDamage, match="not as it was written"):
            ledger.answer(key)


# Folders


def test_a_second_process_is_refused_at_every_step(whole, tmp_path):
    holder = (
        "import sys; from pathlib import Path; from dataset_builder.files import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    source = tmp_path / "pairs.jsonl"
    source.write_text('{"query": "why", "passage": "because of that"}\n')
    prepare(tmp_path / "out", Settings(str(source)))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    process = subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    url = "http://127.0.0.1:9/v1"
    other = tmp_path / "other.jsonl"
    other.write_text('{"query": "how", "passage": "like this or like that"}\n')
    builds = [command(given, tmp_path / "out", url, "--dry-run") for given in (source, other)]
    for words in (*builds, ["repair", tmp_path / "out"]):
        line = only_error(inf_ir(*words))
        assert f"{tmp_path / 'out'}: another run is at work" in line
    process.communicate()
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with locked(tmp_path / "out"), locked(tmp_path / "out"):
        pass


def test_pairs_of_a_killed_preparation_or_another_source_are_not_used(tmp_path):
    sources = [tmp_path / f"{name}.jsonl" for name in "ab"]
    for source in sources:
        source.write_text(json.dumps({"query": f"query {source.stem}", "passage": f"passage {source.stem}"}) + "\n")
    output = tmp_path / "out"
    prepare(output, Settings(str(sources[0])))
    (output / "work" / "build.json").unlink()  # killed before it was written
    prepare(output, Settings(str(sources[1])))
    fresh = tmp_path / "fresh"
    prepare(fresh, Settings(str(sources[1])))
    place = output / "work" / "pairs.parquet"
    assert place.read_bytes() == (fresh / "work" / "pairs.parquet").read_bytes()
    # Damage, and what another build put there: read again, if the source has the same pairs still.
    for content in (place.read_bytes()[:-9], b"", b"x" * 500):
        place.write_bytes(content)
        prepare(output, Settings(str(sources[1])))
        assert place.read_bytes() == (fresh / "work" / "pairs.parquet").read_bytes()
    sources[1].write_text(json.dumps({"query": "another", "passage": "pair of texts"}) + "\n")
    prepare(output, Settings(str(sources[1])))
    place.write_bytes(b"x")
    with pytest.raises(ValueError, match="has other pairs than when this build began"):
        prepare(output, Settings(str(sources[1])))
    assert place.read_bytes() == b"x"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pairs": "a"}', "[" * 100_000])
def test_a_damaged_description_of_a_build_names_it(tmp_path, content):
    output = tmp_path / "out"
    (output / "work").mkdir(parents=True)
    (output / "work" / "build.json").write_text(content)
    with pytest.raises(ValueError, match=r"build\.json"):
        read_build(output)


def test_a_file_takes_its_place_when_it_is_whole_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with contextlib.suppress(KeyError), replacing(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "before"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("1")
        second.write_text("2")
    assert path.read_text() == "1"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_or_emptied_ledger_is_not_paid_for_again(serve, pairs, tmp_path):  # noqa: F811
    server = serve()
    output = tmp_path / "out"
    words = command(pairs(5), output, server.url)
    assert inf_ir(*words).returncode == 0
    made = dataset_bytes(output)
    ledger = ledger_path(output)
    content = ledger.read_bytes()
    for rest in (b"", content[: len(content) // 2], None):
        if rest is None:
            ledger.unlink()
            for aside in ledger.parent.glob("*.damaged-*"):
                aside.unlink()
        else:
            ledger.write_bytes(rest)
        assert "inf-ir repair" in only_error(inf_ir(*words))
        assert sum(server.asked().values()) == 30
    ledger.write_bytes(content)
    printed = inf_ir("repair", output).stdout
    assert "nothing to repair: 30 answers" in printed
    ledger.write_bytes(content[: int(0.9 * len(content))])
    printed = inf_ir("repair", output).stdout
    assert "answers saved" in printed
    assert "nothing to repair" not in printed
    assert inf_ir(*words).returncode == 0
    assert dataset_bytes(output) == made
    assert sum(server.asked().values()) < 40


@pytest.mark.parametrize("key", ["sk-12345\nsk-2", "sk-…", "sk 1", "sk-\u00e4"])
def test_a_key_that_cannot_be_one_is_named_before_anything_is_sent(pairs, tmp_path, key):  # noqa: F811
    line = only_error(inf_ir(*command(pairs(5), tmp_path / "out", "http://127.0.0.1:9/v1"), key=key))
    assert "OPENAI_API_KEY" in line
    assert "12345" not in line


# Near duplicates


def test_the_search_for_near_duplicates_is_bounded(monkeypatch):
    """Of texts that share most of their words, the work for the last is that for the first."""
    compared = []
    monkeypatch.setattr("dataset_builder.quality.jaccard", lambda first, second: compared.append(1) or 0.7)
    duplicates = Duplicates()
    most = 0
    for number in range(1500):
        compared.clear()
        text = " ".join(f"word{at}" if at % 14 else f"own{number}x{at}" for at in range(42))
        assert duplicates.add(str(number), text) is None
        most = max(most, len(compared))
    assert 20 < most <= 32
    assert duplicates.add("again", text) == ("duplicate", "1499")
