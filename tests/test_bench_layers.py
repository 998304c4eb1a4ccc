"""`bench/layers.py`: its table, a small run, its arithmetic. No timing is judged here."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
layers: Any = importlib.import_module("layers")
summary: Any = importlib.import_module("layer_summary")
ceilings: Any = importlib.import_module("ceilings")
shapes: Any = importlib.import_module("layer_shapes")

TOP = {"threads": 1, "fma": 100.0, "l1": 80.0, "l2": 50.0, "l3": 20.0, "read": {"1": 100.0, "1024": 10.0}}
QUICK = ["--shapes", "512-10 ", "--rounds", "1", "--seconds", "0.001", "--threads", "1"]


def test_the_table_has_every_layer_once() -> None:
    table = shapes.table()
    assert len({layer.name for layer in table}) == len(table) > 100
    assert {layer.group for layer in table} == set(shapes.GROUPS)
    by_name = {layer.name: (layer, networks) for layer, networks in table.items()}
    layer, networks = by_name["conv 3x3 s1 64-64 56x56"]
    assert networks == ["resnet18", "resnet50"] and layer.pixels == 56 * 56 and layer.group == "convolution"
    assert by_name["conv 7x7 s2 3-64 224x224"][0].pixels == 112 * 112
    assert by_name["linear 768-3072 n128"][0].group == "batched linear"
    assert by_name["linear 25088-4096"][0].weight_shape == (4096, 25088)
    assert by_name["conv 3x3 s1 960-960 g960 7x7"][0].weight_shape == (960, 1, 3, 3)


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ceilings, "measure", lambda threads: TOP)
    path = tmp_path / "layers.json"
    arguments = [*QUICK, "--sparsity", "0,0.95", "--json", str(path)]
    layers.main(arguments)
    out = capsys.readouterr().out
    assert "1 distinct layers of 1 networks" in out and "break-even" in out
    assert [file.name for file in tmp_path.iterdir()] == ["layers.json"]
    document = json.loads(path.read_text())
    (layer,) = document["layers"]
    assert layer["name"] == "linear 512-10" and layer["group"] == "linear, batch 1"
    cells = {(cell["pattern"], cell["sparsity"]): cell for cell in layer["cells"]}
    assert set(cells) == {("dense", 0.0), ("1x1", 0.95), ("8x1", 0.95)}
    for cell in cells.values():
        assert cell["ms"] > 0 and cell["pack_ms"] > 0 and cell["error"] < 1e-3 and cell["choice"].startswith("dot/")
        assert cell["gflops"] == pytest.approx(2e-6 * cell["kept"] / cell["ms"])
        assert cell["percent"]["l2"] == pytest.approx(2 * cell["gflops"])
        assert cell["fastest_dense"] in cell["dense"]
    assert cells["dense", 0.0]["bytes_per_kept"] == 4
    assert 6 < cells["1x1", 0.95]["bytes_per_kept"] < 7  # with where rows start
    layers.main([*arguments, "--resume"])
    assert json.loads(path.read_text())["layers"] == document["layers"]
    with pytest.raises(SystemExit, match="other settings"):
        layers.main([*arguments, "--resume", "--rounds", "2"])


@pytest.mark.parametrize(
    "layer",
    [
        shapes.Layer(16, 15, (3, 3), (2, 2), (1, 1), 1, (9, 17)),
        shapes.Layer(8, 8, (3, 3), (1, 1), (1, 1), 8, (5, 5), 2),
        shapes.Layer(3, 8, (3, 3), (1, 1), (1, 1), 1, (12, 20)),
        shapes.Layer(24, 20, rows=12),
    ],
    ids=lambda layer: layer.name,
)
def test_a_layer_computes_what_torch_does(layer: Any) -> None:
    weight = layers.np.ones(layer.weight_shape, layers.np.float32)
    weight[::2] = 0
    ours = layers.Ours(layer, "1x1", 0.5, weight, layers.np.ones(layer.outputs, layers.np.float32))
    assert ours() > 0 and ours.facts["error"] < 1e-5 and ours.plan.groups in ([], [[ours.node, ours.node + 1]])
    for way in layers.dense_ways(layer, layers.torch.from_numpy(weight), layers.torch.ones(layer.outputs)).values():
        assert way().shape == layers.torch.Size([layer.rows, layer.outputs, *way().shape[2:]])


def test_break_even() -> None:
    assert summary.break_even([(0.0, 0.5), (0.5, 0.8), (0.7, 4 / 3), (0.9, 3.0)]) == pytest.approx(0.6)
    assert summary.break_even([(0.0, 1.1), (0.5, 0.9), (0.6, 1.0), (0.9, 2.0)]) == pytest.approx(0.6)
    assert summary.break_even([(0.0, 1.0), (0.9, 2.0)]) == 0.0
    assert summary.break_even([(0.0, 2.0), (0.9, 0.9)]) is None
    assert summary.break_even([]) is None
    assert summary.percentile([0.1 * i for i in range(1, 11)], 0.9) == pytest.approx(0.9)
    assert summary.percentile([0.5] * 8 + [None] * 2, 0.9) is None
    assert summary.percentile([0.5, None], 0.5) == 0.5 and summary.percentile([], 0.9) is None


def test_a_curve_begins_without_zeros() -> None:
    points = [("8x1", 0.5, 2.0), ("dense", 0.0, 0.9), ("1x1", 0.9, 3.0)]
    cells = [{"pattern": pattern, "sparsity": sparsity, "ratio": ratio} for pattern, sparsity, ratio in points]
    assert summary.curve({"cells": cells}, "8x1") == [(0.0, 0.9), (0.5, 2.0)]


def test_ceilings_are_medians() -> None:
    assert ceilings.medians([]) is None
    runs = [TOP | {"l2": l2, "read": {"1": l2}} for l2 in (1.0, 5.0, 2.0)]
    found = ceilings.medians(runs)
    assert found["l2"] == 2.0 and found["read"] == {"1": 2.0} and found["fma"] == 100.0


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    ceilings._program.cache_clear()
    with pytest.raises(RuntimeError, match="no C.. compiler .no-such-compiler."):
        ceilings.measure(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sparsity 1", "1.0 is not in [0, 1)"),
        ("--sparsity nan", "nan is not in [0, 1)"),
        ("--sparsity half", "'half': expected numbers"),
        ("--patterns 1x8", "'1x8' is no pattern"),
        ("--shapes (", "'(' is no regular expression"),
        ("--threads 0", "'0' is not a positive whole number"),
        ("--seconds 0", "--seconds 0.0 must be positive"),
        ("--resume", "--resume needs --json"),
        ("--json no/layers.json", "no is not a folder"),
        ("--shapes nothing-like-it", "--shapes finds none"),
    ],
)
def test_bad_options(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        layers.main(arguments.split())
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_no_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        layers.main(["--plot", "layers.png"])
    assert "--plot needs matplotlib: pip install '.[bench]'" in capsys.readouterr().err
