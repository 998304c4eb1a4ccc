"""examples/obs_accuracy.py and examples/efficientnet_obs.py run, and go on where they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str | Path) -> str:
    command = [sys.executable, f"examples/{script}", "--fast", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_accuracy(tmp_path: Path) -> None:
    first = run("obs_accuracy.py", "--output", tmp_path)
    assert "dense: " in first and "| 50% |" in first and "| 80% |" in first
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert set(results) == {"0 dense", "0 0.5 magnitude", "0 0.5 obs", "0 0.8 magnitude", "0 0.8 obs"}
    del results["0 0.8 obs"]
    results["0 0.5 obs"]["accuracy"] = 12.34  # not measured again
    path.write_text(json.dumps(results))
    second = run("obs_accuracy.py", "--output", tmp_path)
    assert "12.3 (12.3-12.3)" in second and second.splitlines()[-1] == first.splitlines()[-1]


def test_efficientnet(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    table = run("efficientnet_obs.py", "--json", path)
    results = json.loads(path.read_text())
    assert len(results["dense"]) == 6 and all(row["cosine"] == pytest.approx(1) for row in results["dense"])
    cosines = {}
    for scope in ("local", "global"):
        for method in ("magnitude", "obs"):
            rows = results[f"0.5 {scope} {method}"]
            assert f"| 50% | {scope} | {method} |" in table and len(rows["recalibrated"]) == 6
            cosines[scope, method] = sum(row["cosine"] for row in rows["as pruned"]) / 6
    assert all(cosines[scope, "obs"] > cosines[scope, "magnitude"] for scope in ("local", "global"))
