"""Kills, faults and a second builder at once: the same bytes, nothing paid twice (large: `benchmarks/campaign.py`)."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataset_builder.cluster import run_tasks
from dataset_builder.errors import Stop
from dataset_builder.language_model import Limits
from dataset_builder.prepare import Settings
from dataset_builder.prices import Prices
from tests.campaign import check
from tests.faulty_task import Faulty
from tests.test_builder import IMPATIENT, command, dataset_bytes, environment, inf_ir, only_error, pairs, serve, start  # noqa: F401

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("batch", [False, True])
def test_a_disturbed_build_ends_as_one_that_was_not(serve, pairs, tmp_path, batch):  # noqa: F811
    options = [*IMPATIENT, "--concurrency", 4, "--max-cost", 1, "--max-failed", 0.5]
    options += ["--batch", "--batch-poll", 0.1] if batch else []
    faults = [] if batch else ["--faults", "--latency", "0.05"]
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "out"
    plain = inf_ir(*command(pairs(30), undisturbed, serve(*faults, name="calm").url, *options))
    assert plain.returncode == 0, plain.stderr
    server = serve(*faults, name="storm")
    words = command(pairs(30), output, server.url, *options)
    program = [sys.executable, "-m", "tests.campaign", "3", "1", "2" if batch else "1", *words]
    result = subprocess.run(program, capture_output=True, text=True, env=environment(), timeout=900, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    ended = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
    assert set(ended) <= {"-9", "0", "2"}
    assert "Traceback" not in result.stderr
    check(output, undisturbed, server, kills=0 if batch else 3, in_flight=4 * 3, max_cost=1, factor=0.5 if batch else 1.0)


@pytest.mark.slow
def test_the_local_executor_ends_whatever_becomes_of_its_tasks(serve, pairs, tmp_path):  # noqa: F811
    """Stops by a limit, a killed task, a killed parent, a signal; then the same command ends the build."""
    server = serve("--latency", "0.2")
    url = server.url.replace("http://", "http://ann:pass-in-the-url@")
    options = ["--executor", "local", "--tasks", "2", "--workers", "2", "--concurrency", "2"]
    output = tmp_path / "out"
    words = command(pairs(30), output, url, *options)
    stopped = start(*words, "--max-requests", "6", stderr=subprocess.PIPE, text=True)
    said = stopped.communicate(timeout=900)[1]
    assert "limit of 3 requests" in said
    assert stopped.returncode == 3, said

    def tasks(parent):
        found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(parent)], capture_output=True, text=True).stdout
        return [int(line.split()[0]) for line in found.splitlines() if "spawn_main" in line]

    for victim, number in (("task", signal.SIGKILL), ("parent", signal.SIGKILL), ("parent", signal.SIGTERM)):
        asked = len(server.events())
        process = start(*words, stderr=subprocess.PIPE, text=True)
        while len(server.events()) < asked + 6:
            time.sleep(0.02)
        os.kill(tasks(process.pid)[0] if victim == "task" else process.pid, number)
        error = process.communicate(timeout=900)[1]
        if number == signal.SIGTERM:
            assert "goes on from here" in error
            assert process.returncode == 2
        elif victim == "task":
            assert "a task did not end (exit status -9)" in error
            assert process.returncode == 2
    result = inf_ir(*words)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {event["auth"] for event in server.events() if "auth" in event} == {"Basic YW5uOnBhc3MtaW4tdGhlLXVybA=="}
    assert len(server.asked_after_answer()) <= 3 * 2 * 2 * 3
    made = dataset_bytes(output)
    ledger = output / "work" / "task-00001" / "ledger.sqlite"
    ledger.write_bytes(ledger.read_bytes()[: ledger.stat().st_size // 2])
    assert "inf-ir repair" in only_error(inf_ir(*words))
    assert "answers saved" in inf_ir("repair", output).stdout
    result = inf_ir(*words)
    assert result.returncode == 0, result.stderr[-3000:]
    assert dataset_bytes(output) == made
    for path in output.rglob("*"):
        if path.is_file():
            assert b"pass-in-the-url" not in path.read_bytes(), path


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["overflow", "recursion"])
def test_an_unforeseen_error_in_a_task_ends_the_run_with_one_line(fault, tmp_path):
    step = Faulty(tmp_path, Settings("pairs.jsonl"), Limits(), Prices(free=True), fault, retry_failed=False)
    with pytest.raises(Stop, match=r"a task did not end \(exit status 1\), see .*logs; run it again"):
        run_tasks("local", step, tasks=2, workers=2, slurm_partition=None, slurm_time="1:00:00")
    logs = tmp_path / "work" / "logs"
    assert [path.name for path in (logs / "completions").iterdir()] == ["00000"]
    assert f"{fault.title()}Error" in (logs / "logs" / "task_00001.log").read_text()
    sound = dataclasses.replace(step, base_url=None)
    run_tasks("local", sound, tasks=2, workers=2, slurm_partition=None, slurm_time="1:00:00")
    assert len(list((logs / "completions").iterdir())) == 2
