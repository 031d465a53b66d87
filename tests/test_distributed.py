"""Two real processes on halves of a batch give the loss and the gradients of one process on the whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed_worker import DATA, HALVES, step
from tests.test_two_rows import without_twins

WORKER = Path(__file__).parent / "distributed_worker.py"


CASES = [
    ("multi_P_I_IQ", "plain", "records"),
    ("uni_P_I", "plain", "rows"),  # here the processes encode different numbers of chunks
    ("multi_P_I", "cached", "two rows"),
]


@pytest.fixture(scope="module")
def together(tiny, tmp_path_factory):
    """The loss and the gradients of two processes, by case."""
    folder = tmp_path_factory.mktemp("together")
    arguments = [str(folder / "store"), tiny, str(folder), *map(",".join, CASES)]
    workers = [subprocess.Popen([sys.executable, str(WORKER), str(rank), *arguments]) for rank in range(2)]
    assert [worker.wait(timeout=900) for worker in workers] == [0, 0]
    return {case: torch.load(folder / f"{','.join(case)}.pt", weights_only=True) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_two_processes_agree_with_one(tiny, together, case):
    objective, cached, data = case
    value, gradients = step(tiny, objective, cached == "cached", list(range(2 * HALVES[data])), False, DATA[data])
    assert together[case]["loss"].item() == pytest.approx(value.item(), abs=1e-9)
    assert together[case]["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(together[case]["gradients"][name], gradient, rtol=0, atol=1e-9), name


RUNS = {
    "plain": ({}, 4),
    "accumulation": ({"gradient_accumulation_steps": 2}, 2),
    "GradCache": ({"mini_batch_size": 3}, 4),
}
"""Settings, and the records a step of one process."""

SCRIPT = """\
import json, sys, torch; torch.set_num_threads(1)
from sentence_transformers_inf import InstructionTrainer, InstructionTrainingArguments, load_records
data, base, folder, runs = sys.argv[1:]
records = load_records(data)
for name, (settings, size) in json.loads(runs).items():
    args = InstructionTrainingArguments(output_dir=f"{folder}/{name}", per_device_train_batch_size=size,
        num_train_epochs=5, dropout=0.0, warmup_steps=0, learning_rate=1e-3, bf16=False, evaluations=1,
        frozen_layers=1, disable_tqdm=True, report_to="none", **settings)
    InstructionTrainer(base, args, records, records).train()
"""


@pytest.fixture(scope="module")
def runs(tiny, few_records, tmp_path_factory):
    """The folders of the runs by one process and by two, which have half of the records of a step each. Some records have
    no twin query."""
    folder = tmp_path_factory.mktemp("runs")
    without_twins(few_records, [1, 2]).to_parquet(folder / "data" / "train.parquet")
    (folder / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    for launcher, name, processes in (([sys.executable], "one", 1), (torchrun, "two", 2)):
        sizes = {run: (settings, whole // processes) for run, (settings, whole) in RUNS.items()}
        arguments = [str(folder / "script.py"), str(folder / "data"), tiny, str(folder / name), json.dumps(sizes)]
        subprocess.run([*launcher, *arguments], check=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder


@pytest.mark.parametrize("run", RUNS)
def test_torchrun_trains_as_one_process_does(tiny, runs, run):
    """The same records a step, two processes with half of them each: the same weights."""
    before = load_file(Path(tiny) / "model.safetensors")
    for encoder in ("query_0_Transformer", "document_0_Transformer"):
        one, two = (load_file(runs / name / run / encoder / "model.safetensors") for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name in one:
            if not name.endswith("attention.self.key.bias"):  # its gradient is rounding noise
                assert torch.allclose(one[name], two[name], rtol=0, atol=2e-5), name
        assert any((one[name] - before[name]).abs().max() > 1e-4 for name in one if name in before)


def test_processes_claim_a_folder_once_and_refuse_together(tiny, few_records, tmp_path):
    """Every process ends with the one line, none waits for another for ever."""
    few_records.to_parquet(tmp_path / "data" / "train.parquet")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    command += ["sentence_transformers_inf.cli", "train", "--base", tiny, "--data", str(tmp_path / "data")]
    command += ["--output", str(tmp_path / "thesis"), "--frozen-layers", "1", "--report-to", "none"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("is not empty and holds no run of this recipe") == 2
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]
