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
    command = [sys.executable, "examples/vgg16_taylor.py", "--fast", "--macs", "0.5,0.25"]
    command += ["--criteria", criteria, "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rounds_and_resumption(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    run(tmp_path, "taylor")
    before = json.loads((tmp_path / "results.json").read_text())
    assert sorted(before) == ["dense-0", "taylor-25-0", "taylor-50-0"]
    larger = before["dense-0"]
    for share in (50, 25):
        row = before[f"taylor-{share}-0"]
        assert 0.7 * share < 100 * row["macs_masked"] <= share and row["parameters"] < 0.95 * larger["parameters"]
        assert row["macs"] == pytest.approx(row["macs_masked"], abs=0.03)  # removed, but for constants that stay
        assert len(row["cut"]) == 2 and sum(row["filters"]) < sum(larger["filters"])
        larger = row
    lines = run(tmp_path, "taylor,random").splitlines()
    after = json.loads((tmp_path / "results.json").read_text())
    assert {key: after[key] for key in before} == before  # not trained again
    assert set(after) - set(before) == {"random-50-0", "random-25-0"}
    assert [line.split()[1] for line in lines[-5:]] == ["dense", "taylor", "random", "taylor", "random"]
