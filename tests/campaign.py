"""A build that is killed again and again beside a faulty server, with a second builder in its way.

``python -m tests.campaign KILLS SEED LONGEST ARGUMENTS...`` starts two builders on one folder, the second after a random
while, and kills what lives after another one, at most ``LONGEST`` seconds; so many times. The last one is left to end.
Builders are forked: a process that starts from nothing spends most of its life importing. :func:`check` is what must hold.
"""

import collections
import json
import os
import random
import signal
import sys
import time

from dataset_builder import batches, cli, export, run  # noqa: F401 - imported before the forks
from dataset_builder.prices import Prices

FILES = ("train.parquet", "unfiltered/train.parquet", "outcomes.csv")


def check(output, undisturbed, server, kills, in_flight, max_cost, factor=1.0):
    """Assert that a disturbed build ended as the undisturbed one, and was not paid for twice: what the server counted."""
    for name in FILES:
        assert (output / name).read_bytes() == (undisturbed / name).read_bytes(), name
    again = server.asked_after_answer()
    assert len(again) <= in_flight * kills, "more than was in flight at each death"
    prices = Prices(factor=factor)
    paid = [event for event in server.events() if event["event"] == "answered"]
    most = max(prices.cost(model, 200, 50) for model in ("gpt-4o-mini", "o3-mini"))
    spent = json.loads((output / "report.json").read_text(encoding="utf-8"))["cost"]
    assert spent + most * len(again) <= max_cost
    assert not list(output.rglob(".*.part"))
    return {"answered": len(paid), "asked again": len(again), "cost": round(spent, 4)}


def life():
    child = os.fork()
    if child == 0:
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        os._exit(status)
    return child


def main() -> None:
    kills, seed, longest, *sys.argv[1:] = sys.argv[1:]
    generator = random.Random(int(seed))
    ended = collections.Counter()
    while ended[-signal.SIGKILL] < int(kills) and not ended[0]:
        first = life()
        time.sleep(generator.uniform(0, float(longest) / 2))
        second = life()
        time.sleep(generator.uniform(0.02, float(longest)))
        for child in (first, second):
            done, status = os.waitpid(child, os.WNOHANG)
            if not done:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
            ended[os.waitstatus_to_exitcode(status)] += 1
    print(json.dumps(ended))
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(life(), 0)[1]))


if __name__ == "__main__":
    main()
