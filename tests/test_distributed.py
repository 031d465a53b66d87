"""Two real processes on halves of a batch give the loss and the gradients of one process on the whole."""

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


@pytest.mark.parametrize(
    ("objective", "cached", "data"),
    [
        ("multi_P_I_IQ", "plain", "records"),
        ("uni_P_I", "plain", "rows"),  # here the processes encode different numbers of chunks
        ("multi_P_I", "cached", "two rows"),
    ],
)
def test_two_processes_agree_with_one(tiny, tmp_path, objective, cached, data):
    out = tmp_path / "result.pt"
    arguments = [str(tmp_path / "store"), tiny, objective, cached, data, str(out)]
    workers = [subprocess.Popen([sys.executable, str(WORKER), str(rank), *arguments]) for rank in range(2)]
    assert [worker.wait(timeout=900) for worker in workers] == [0, 0]
    together = torch.load(out, weights_only=True)
    value, gradients = step(tiny, objective, cached == "cached", list(range(2 * HALVES[data])), False, DATA[data])
    assert together["loss"].item() == pytest.approx(value.item(), abs=1e-9)
    assert together["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(together["gradients"][name], gradient, rtol=0, atol=1e-9), name


@pytest.mark.parametrize(
    ("settings", "whole"),
    [("evaluations=1", 4), ("evaluations=1, gradient_accumulation_steps=2", 2), ("evaluations=1, mini_batch_size=3", 4)],
    ids=["plain", "accumulation", "GradCache"],
)
def test_torchrun_trains_as_one_process_does(tiny, few_records, tmp_path, settings, whole):
    """The same records a step, two processes with half of them each: the same weights. Some have no twin query."""
    few_records = without_twins(few_records, [1, 2])
    few_records.to_parquet(tmp_path / "data" / "train.parquet")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch; torch.set_num_threads(1)\n"
        "from sentence_transformers_inf import InstructionTrainer, InstructionTrainingArguments, load_records\n"
        "args = InstructionTrainingArguments(output_dir=sys.argv[3], per_device_train_batch_size=int(sys.argv[4]),\n"
        "    num_train_epochs=5, dropout=0.0, warmup_steps=0, learning_rate=1e-3, bf16=False,\n"
        f"    frozen_layers=1, disable_tqdm=True, report_to='none', {settings})\n"
        "records = load_records(sys.argv[1])\n"
        "InstructionTrainer(sys.argv[2], args, records, records).train()\n"
    )
    arguments = [str(script), str(tmp_path / "data"), tiny]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for launcher, name, batch_size in (([sys.executable], "one", whole), (torchrun, "two", whole // 2)):
        command = [*launcher, *arguments, str(tmp_path / name), str(batch_size)]
        subprocess.run(command, check=True, timeout=900, env=environment)
    before = load_file(Path(tiny) / "model.safetensors")
    for encoder in ("query_0_Transformer", "document_0_Transformer"):
        one, two = (load_file(tmp_path / name / encoder / "model.safetensors") for name in ("one", "two"))
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
