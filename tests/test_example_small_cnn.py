"""examples/small_cnn.py runs, removes filters, and does nothing twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_filters_go_and_nothing_is_done_twice(tmp_path: Path) -> None:
    command = [sys.executable, "examples/small_cnn.py", "--fast", "--output", str(tmp_path)]
    for _ in range(2):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert "| smallest filters |" in done.stdout and "8,192" in done.stdout
    assert "dense ..." not in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    for name, row in results.items():
        filters = 8 if name.endswith("filters") else 10
        assert row["filters"] == filters and row["inputs"] == 1024 * filters and row["compacted"] == row["finetuned"]
        assert row["parameters"] == 27 * filters + 10 * 1024 * filters and (row["pruned"] is None) == ("dense" in name)
