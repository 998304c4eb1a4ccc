"""`finetune` in two gloo processes: equal masks and weights, gradients of all examples, files of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
import sparseprune

torch.set_num_threads(1)
kind, folder = sys.argv[1], sys.argv[2]
rank = int(__import__("os").environ["RANK"])
torch.manual_seed(7 + rank)  # the processes do not even start alike
model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3))
x = torch.randn(48, 1, 4, 4, generator=torch.Generator().manual_seed(1))
loader = DataLoader(TensorDataset(x, x[:, 0, 0, :3].argmax(1)), 6, shuffle=True)
pruner = sparseprune.Pruner(model, 0.8, steps=2, criterion="random" if kind == "random" else "magnitude")
trained = model
if kind == "wrapped":
    dist.init_process_group("gloo")
    trained = DistributedDataParallel(model)
history = sparseprune.finetune(
    trained, loader, epochs=3, val_loader=loader, pruner=pruner, checkpoint_dir=folder, progress=False
)
assert len(history.val_accuracy) == len(history.train_loss) == 3
torch.save({"state": model.state_dict(), "loss": history.train_loss}, f"{folder}/rank{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def launch(tmp_path: Path, kind: str) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    here = str(Path(__file__).parents[1])
    children = [
        subprocess.Popen(
            [sys.executable, str(script), kind, str(tmp_path)],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank),
                 "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    done = []
    for child in children:
        try:
            out, err = child.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            for each in children:
                each.kill()
            pytest.fail("the processes hang")
        done.append(subprocess.CompletedProcess(child.args, child.returncode, out, err))
    return done


@pytest.mark.parametrize("kind", ["plain", "wrapped", "random"])
def test_two_processes_end_alike(tmp_path: Path, kind: str) -> None:
    for child in launch(tmp_path, kind):
        assert child.returncode == 0, child.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first["loss"] == second["loss"]
    masks = [key for key in first["state"] if key.endswith(".mask")]
    assert len(masks) == 2
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key
    kept = sum(int(first["state"][key].sum()) for key in masks)
    assert kept == 126 - round(0.8 * 126)
    assert (tmp_path / "last.pt").is_file() and len(list(tmp_path.glob("pruned-*"))) == 2
