"""Runs a build again and again and kills it: ``python build_and_die.py LIVES SEED ARGUMENTS...``.

Each life is a forked process that gets SIGKILL after a random while; the last one is left to end. Forked, because a
process that starts from nothing spends most of its life importing.
"""

import os
import random
import signal
import sys
import time

from dataset_builder import cli, export, run  # noqa: F401 - imported before the forks


def life() -> int:
    child = os.fork()
    if child == 0:
        cli.main()
        os._exit(0)
    return child


def main() -> None:
    lives, seed, *sys.argv[1:] = sys.argv[1:]
    generator = random.Random(int(seed))
    ended = 0
    for _ in range(int(lives)):
        child = life()
        time.sleep(generator.uniform(0.02, 0.6))
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            ended += 1  # it was through before its time came
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    status = os.waitpid(life(), 0)[1]
    print(f"ended early: {ended}")
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
