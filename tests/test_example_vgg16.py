"""examples/vgg16_taylor.py runs, goes on where it was, and removes what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(output: Path, criteria: str) -> str:
    command = [sys.executable, "examples/vgg16_taylor.py", "--fast", "--criteria", criteria, "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rounds_and_resumption(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    run(tmp_path, "taylor")
    before = json.loads((tmp_path / "results.json").read_text())
    assert sorted(before) == ["dense-0", "dense-1", "taylor-0", "taylor-1"]
    for seed in range(2):
        row, dense = before[f"taylor-{seed}"], before[f"dense-{seed}"]
        assert 0.35 < row["macs_masked"] <= 0.5 and row["parameters"] < 0.9 * dense["parameters"]
        assert row["macs"] == pytest.approx(row["macs_masked"], abs=0.03)  # removed, but for constants that stay
        assert len(row["cut"]) == 2 and all(a >= b for a, b in zip(dense["filters"], row["filters"], strict=True))
    text = run(tmp_path, "taylor,random")
    after = json.loads((tmp_path / "results.json").read_text())
    assert {key: after[key] for key in before} == before and {"random-0", "random-1"} <= set(after)  # not trained again
    assert "Taylor against random filters" in text
