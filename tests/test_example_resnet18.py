"""examples/resnet18.py runs, and goes on where it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
