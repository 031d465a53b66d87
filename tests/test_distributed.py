"""Two real processes on halves of a batch give the loss and the gradients of one process on the whole."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed_worker import DATA, step

WORKER = Path(__file__).parent / "distributed_worker.py"


@pytest.mark.parametrize(
    ("objective", "cached", "data"),
    [
        ("multi_P_I_IQ", "plain", "records"),
        ("uni_P_I", "plain", "rows"),  # here the processes encode different numbers of chunks
        ("multi_P_I", "cached", "records"),
    ],
)
def test_two_processes_agree_with_one(base, tmp_path, objective, cached, data):
    out = tmp_path / "result.pt"
    arguments = [str(tmp_path / "store"), base, objective, cached, data, str(out)]
    workers = [subprocess.Popen([sys.executable, str(WORKER), str(rank), *arguments]) for rank in range(2)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    together = torch.load(out, weights_only=True)
    value, gradients = step(base, objective, cached == "cached", [0, 1, 2, 3], False, DATA[data])
    assert together["loss"].item() == pytest.approx(value.item(), abs=1e-9)
    assert together["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(together["gradients"][name], gradient, rtol=0, atol=1e-9), name
