"""examples/autoprune.py runs, and goes on where it was."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from sparseprune import conversion, profiling

EXAMPLE = Path(__file__).parents[1] / "examples" / "autoprune.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in (("_SECONDS", 0.002), ("_ROUNDS", 1)):
        monkeypatch.setattr(profiling, name, value)
    monkeypatch.setattr(conversion, "TUNE_SECONDS", 0.05)
    spec = importlib.util.spec_from_file_location("autoprune_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_parts_and_resumption(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--fast", "--output", str(tmp_path), "--train-threads", "1"]
    example.main([*arguments, "--only", "train"])
    assert list(json.loads((tmp_path / "results.json").read_text())["runs"]) == ["dense/0"]
    example.main(arguments)
    text = (tmp_path / "results.json").read_text()
    runs = json.loads(text)["runs"]
    assert list(runs) == ["dense/0", "autoprune/0", "uniform/0"]
    for name in ("autoprune/0", "uniform/0"):
        assert runs[name]["by_turns_ms"] > 0 and 0 < runs[name]["density"] < 1 and 0 <= runs[name]["finetuned"] <= 1
    capsys.readouterr()
    example.main(arguments)
    assert (tmp_path / "results.json").read_text() == text
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["", "---", "dense", "autoprune", "uniform"]
    with pytest.raises(SystemExit, match="other settings"):
        example.main([*arguments, "--batch", "4"])
