"""Damage to a ledger's file, and what is left of it.

``python -m tests.damage [--count 200] [--seed 0]`` damages a ledger so many times (cuts, flipped bits, headers, zeroed
blocks), repairs it, and compares with what SQLite can still read.
"""

import argparse
import asyncio
import contextlib
import random
import shutil
import sqlite3
import subprocess
import tempfile
from pathlib import Path

from dataset_builder.ledger import Answer, Ledger, LedgerDamage, Outcome, repair_ledger

BUILD = "a build"


def fill(path, count, seed=0):
    """Make a ledger of so many answers, a few of them longer than a page: the answers by request."""
    generator = random.Random(seed)
    answers = {}
    for number in range(count):
        text = f"answer {number} " * generator.choice([3, 30, 100, 100, 1000])
        answers[f"{generator.getrandbits(256):064x}"] = Answer(text, "stop", None, number, 2, 0.5)

    async def keep():
        with contextlib.closing(Ledger(path, BUILD)) as ledger:
            items = list(answers.items())
            for start in range(0, count, 7):
                await asyncio.gather(*(ledger.keep_answer(key, "m", answer) for key, answer in items[start : start + 7]))
            for position in range(count // 6):
                await ledger.keep_outcome(Outcome(position, "kept", "", {"document": "text " * 50}))
            await ledger.keep_batch("tag", "id", "submitted", dict.fromkeys(answers, "m"))

    asyncio.run(keep())
    return answers


def damaged(content, kind, generator):
    """The bytes of a file after something happened to them."""
    content = bytearray(content)
    if kind == "cut":
        return bytes(content[: generator.randrange(len(content))])
    if kind == "flip":
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    elif kind == "header":
        for place in generator.sample(range(100), generator.choice([1, 4, 100])):
            content[place] = generator.randrange(256)
    else:  # a block of the disk
        start = generator.randrange(len(content)) // 4096 * 4096
        content[start : start + 4096] = bytes(4096)
    return bytes(content)


KINDS = ("cut", "flip", "header", "block")


def readable(path, answers):
    """The answers that a ledger still gives back; an error if one is wrong."""
    with contextlib.closing(Ledger(path, BUILD)) as ledger:
        found = {key: ledger.answer(key) for key in answers}
        assert sum(total["requests"] for total in ledger.totals().values()) == sum(map(bool, found.values()))
    assert all(answer is None or answer == answers[key] for key, answer in found.items())
    return {key for key, answer in found.items() if answer is not None}


def read_by_sqlite(path, whole, answers):
    """The requests that SQLite reads row by row, after the file was given its header and length back; where ``sqlite3
    .recover`` runs (it needs a build with ``sqlite_dbpage``), those that it finds as well."""
    found = set()
    content = path.read_bytes()
    mended = path.with_name("mended.sqlite")
    mended.write_bytes(whole[:100] + content[100:] + bytes(max(0, len(whole) - max(100, len(content)))))
    script = b""
    if shutil.which("sqlite3"):
        script = subprocess.run(["sqlite3", path, ".recover"], capture_output=True, check=False).stdout
    with contextlib.closing(sqlite3.connect(mended)) as database, contextlib.closing(sqlite3.connect(":memory:")) as copy:
        with contextlib.suppress(sqlite3.Error):
            copy.executescript(script.decode(errors="replace"))
        for connection in (database, copy):
            for number in range(1, len(answers) + 1):
                with contextlib.suppress(sqlite3.Error, TypeError, AttributeError):
                    row, key = connection.execute("SELECT row, key FROM answers WHERE number = ?", (number,)).fetchone()
                    found |= {key} if key in answers and answers[key].content.encode() in row else set()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    noticed = saved = theirs = worst = 0
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name, "whole.sqlite")
        answers = fill(whole, 180)
        content = whole.read_bytes()
        for number in range(options.count):
            folder = Path(name, str(number))
            folder.mkdir()
            path = folder / "ledger.sqlite"
            path.write_bytes(damaged(content, KINDS[number % len(KINDS)], generator))
            other = read_by_sqlite(path, content, answers)
            try:
                ours = readable(path, answers)
                assert ours == set(answers), "health is claimed only where every answer is there"
            except LedgerDamage:
                noticed += 1
                repaired = repair_ledger(path, BUILD)
                ours = readable(path, answers)
                assert len(ours) == repaired.saved
            saved, theirs, worst = saved + len(ours), theirs + len(other), max(worst, len(other - ours))
    print(f"{options.count} damaged ledgers of {len(answers)} answers: {noticed} refused, the others whole")
    print(f"repair saved {saved} answers; SQLite reads {theirs}, with the header and the length given back")
    print(f"at most {worst} in one ledger that SQLite reads and repair did not save")


if __name__ == "__main__":
    main()
