"""examples/resnet18.py runs, goes on where it was, and the weights it left are what they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sparseprune

ROOT = Path(__file__).parents[1]


def run(output: Path, stages: str) -> str:
    command = [sys.executable, "examples/resnet18.py", "--fast", "--stages", stages, "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stages_and_resumption(tmp_path: Path) -> None:
    assert "dense" in run(tmp_path, "dense,one_shot")
    before = json.loads((tmp_path / "results.json").read_text())
    assert before["dense"]["sparsity"] < 0.01
    assert before["one_shot"]["sparsity"] == pytest.approx(0.98, abs=1e-3)
    assert before["one_shot"]["bytes"] < 0.3 * before["dense"]["bytes"]
    run(tmp_path, "all")
    after = json.loads((tmp_path / "results.json").read_text())
    assert {name: after[name] for name in before} == before  # not trained again
    sparsities = {name: row["sparsity"] for name, row in after.items() if name != "dense"}
    assert sparsities == pytest.approx(
        {"one_shot": 0.98, "cubic": 0.98, "global_94": 0.94, "local_94": 0.94, "global_99": 0.99, "global_995": 0.995},
        abs=2e-3,
    )
    assert list((tmp_path / "cubic").glob("pruned-*.safetensors"))


def test_the_committed_weights_are_98_percent_zeros_and_right_after_conversion() -> None:
    path = ROOT / "examples" / "weights" / "resnet18-32-98.safetensors"
    assert path.stat().st_size < 2_500_000
    model = sparseprune.zoo.resnet18_32().eval()
    sparseprune.load_pruned(model, path)
    assert sparseprune.summary(model).sparsity == pytest.approx(0.98, abs=1e-4)
    with np.load(ROOT / "examples" / "data" / "fashion-mnist-subset.npz") as data:
        images, labels = data["test_images"][:400], data["test_labels"][:400]
    pixels = (np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.float32) / 255 - 0.2195) / 0.3327
    inputs = torch.from_numpy(pixels).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    fast = sparseprune.convert(model, inputs[:1], tune="fixed")
    with torch.inference_mode():
        found, expected = fast(inputs), model(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert float((found.argmax(1).numpy() == labels).mean()) > 0.9
