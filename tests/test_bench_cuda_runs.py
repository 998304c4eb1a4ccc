"""`bench/layers.py` and `bench/networks.py` with `--device cuda`: whole runs on the CPU, with stand-ins.

Those are for the kernels, for CUDA graphs and for time. No timing is judged here.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparseprune
from sparseprune import CudaError, SparseModule, cuda_conversion, cuda_graphs
from sparseprune import cuda_layers as product
from sparseprune.cuda_conversion import FusedLayer, convert_on_device
from sparseprune.cuda_layers import CudaLayer

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
cuda_layers: Any = importlib.import_module("cuda_layers")
cuda_networks: Any = importlib.import_module("cuda_networks")
cuda_table: Any = importlib.import_module("cuda_table")
cuda_timing: Any = importlib.import_module("cuda_timing")
cuda_ways: Any = importlib.import_module("cuda_ways")
layers: Any = importlib.import_module("layers")
networks: Any = importlib.import_module("networks")
shapes: Any = importlib.import_module("layer_shapes")

CPU = torch.device("cpu")
Way = Callable[[], Any]


class Kernel:
    """A kernel that computes as dense torch does."""

    def __init__(self, layer: CudaLayer) -> None:
        self.layer = layer

    def __call__(self, *args: Any) -> Tensor:
        return self.layer._run_dense(*args)


def capture(run: Way) -> tuple[Way, Any]:
    outputs = run()
    return (lambda: outputs.copy_(run())), outputs


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A device that is the CPU; kernels are three times as fast as dense, as `convert`'s own timer has it."""

    def timer(device: torch.device) -> Callable[[Any], float]:
        def sparse(run: Any) -> bool:
            return isinstance(run, Kernel) or any(isinstance(m, FusedLayer) for m in getattr(run, "modules", list)())

        return lambda call: 1.0 if sparse(call.func) else 3.0

    monkeypatch.setattr(CudaLayer, "candidates", lambda self, x: {"dense": self._run_dense, "spmm/1x1/4": Kernel(self)})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for module in (product, cuda_conversion):
        monkeypatch.setattr(module, "event_timer", timer)
    for module in (cuda_graphs, cuda_timing):
        monkeypatch.setattr(module, "capture_graph", capture)
    monkeypatch.setattr(cuda_timing, "DEVICE", CPU)
    monkeypatch.setattr(cuda_layers, "unready", str)
    monkeypatch.setattr(cuda_timing, "unready", str)
    for module in (cuda_layers, cuda_networks):
        monkeypatch.setattr(module, "device_facts", lambda: {"device": "none"})
        monkeypatch.setattr(module, "Events", lambda: lambda way, kind: 1.0)
    return monkeypatch


def by_name(dense: float, sparse: float) -> Callable[[Mapping[str, Way]], tuple[dict[str, Any], dict[str, str]]]:
    """A timer: kernels take `sparse` milliseconds, half of that cold; channels_last is the faster dense way by half."""

    def timer(ways: Mapping[str, Way]) -> tuple[dict[str, Any], dict[str, str]]:
        times: dict[str, Any] = {}
        for name, way in ways.items():
            if "BSR" not in name:  # on the CPU torch has no such product
                way()
                ms = sparse if name.startswith("spmm") else dense / 2 if name == "dense channels_last" else dense
                times[name] = {"warm": ms, "cold": ms / 2 if name.startswith("spmm") else ms}
        return times, {name: "no" for name in ways if "BSR" in name}

    return timer


# ---- layers ----


def test_a_run_of_the_table(device: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device.setattr(cuda_layers, "graph_times", lambda rounds, sample: by_name(1.0, 1.6))
    path = tmp_path / "layers.json"
    arguments = ["--device", "cuda", "--only", "table", "--shapes", "linear 512-10 |1x1 s2 64-128 32x32", "--sparsity",
                 "0,0.9", "--patterns", "1x1,8x1", "--batch", "1,64", "--json", str(path)]  # fmt: skip
    assert layers.main(arguments) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["layers.json"]
    document = json.loads(path.read_text())
    names = ["conv 1x1 s2 64-128 32x32", "linear 512-10", "conv 1x1 s2 64-128 32x32 n64", "linear 512-10 n64"]
    assert [layer["name"] for layer in document["layers"]] == names and document["cases"] == []
    for layer in document["layers"]:
        cells = layer["cells"]
        keys = [(cell["tf32"], cell["pattern"], cell["sparsity"]) for cell in cells]
        assert keys == [(tf32, *zeros) for tf32 in (False, True)
                        for zeros in (("dense", 0.0), ("1x1", 0.9), ("8x1", 0.9))]  # fmt: skip
        conv = layer["name"].startswith("conv")
        for cell in cells:
            assert [choice["choice"] for choice in cell["choices"]] == ["spmm/1x1/4"] * (2 if conv else 1)
            assert all(error < 1e-5 for error in cell["errors"].values()) and len(cell["errors"]) == 1 + conv
            assert cell["warm"]["ratio"] == pytest.approx(0.5 / 1.6 if conv else 1 / 1.6)
            assert cell["cold"]["ratio"] == pytest.approx(0.5 / 0.8 if conv else 1 / 0.8)
            assert cell["warm"]["dense"] == ("dense channels_last" if conv else "dense")
    found = document["summary"]["precisions"]
    assert set(found) == {"float32 without TF32", "float32 with TF32"}
    for figures in found.values():
        assert figures["cells"] == 12 and len(figures["warm"]["slower"]) == 12 and len(figures["cold"]["slower"]) == 6
    out = capsys.readouterr().out
    assert "float32 with TF32, cold: layers slower than dense after convert: 6 of 12 (by more than 3%; asked: 0)" in out
    cut = {**document, "layers": document["layers"][:2]}
    path.write_text(json.dumps(cut))
    assert layers.main([*arguments, "--resume"]) == 0
    assert json.loads(path.read_text()) == document
    assert "  3 of 4  ! conv 1x1" in (out := capsys.readouterr().out) and "  2 of 4" not in out
    with pytest.raises(SystemExit, match="other settings"):
        layers.main([*arguments, "--resume", "--rounds", "2"])


def test_convert_leaves_a_layer_to_torch(device: pytest.MonkeyPatch) -> None:
    device.setattr(product, "event_timer", lambda device: lambda call: 1.0)
    (layer,) = cuda_table.layers([1], re.compile("linear 512-10 "))
    found = cuda_ways.measure_converted(cuda_table.case_of(layer, "1x1", 0.9, "float32", False), False, by_name(1, 9))
    assert [choice["way"] for choice in found["choices"]] == ["dense"] and found["errors"] == {}
    assert "dense is fastest" in found["choices"][0]["reason"] and found["warm"]["ratio"] == 1.0
    assert set(found["times_ms"]) == {"dense", "torch.sparse CSR"}


def test_the_cases_of_the_issue(device: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device.setattr(cuda_layers, "graph_times", lambda rounds, sample: by_name(9.0, 1.0))
    conv = cuda_ways.Window(padding=(1, 1))
    small = [cuda_ways.Case("a", (32, 32), (1, 32), 0.8, at_least=20, cold=True),
             cuda_ways.Case("b", (8, 8, 3, 3), (2, 8, 5, 5), 0.8, window=conv, at_least=4.5)]  # fmt: skip
    device.setattr(cuda_layers, "cases", lambda: small)
    path = tmp_path / "layers.json"
    assert cuda_layers.main(["--only", "cases", "--json", str(path)]) == 0
    linear, conv2d = json.loads(path.read_text())["cases"]
    assert linear["cold"] == {"ours": "spmm/1x1/4", "other": "dense", "ratio": 18.0} and linear["reached"] is False
    assert linear["failed"] == {"torch BSR 32x32": "no"} and conv2d["warm"]["ratio"] == 4.5 and conv2d["reached"]
    assert "asked 20x cold" in capsys.readouterr().out
    assert cuda_layers.main(["--only", "cases", "--json", str(path), "--resume"]) == 0
    assert capsys.readouterr().out == ""


def test_a_wrong_kernel_and_a_failing_one_stop_the_run(device: pytest.MonkeyPatch) -> None:
    case = cuda_ways.Case("case", (8, 8), (2, 8), 0.5)
    with pytest.raises(RuntimeError, match="case: spmm/1x1/4: broken"):
        cuda_ways.measure(case, False, lambda ways: ({"dense": {"warm": 1.0, "cold": 1.0}}, {"spmm/1x1/4": "broken"}))
    device.setattr(Kernel, "__call__", lambda self, *args: 1.1 * self.layer._run_dense(*args))
    with pytest.raises(AssertionError, match="relative error"):
        cuda_ways.measure(case, False, by_name(1, 1))


def test_zeros_of_a_layer() -> None:
    options = cuda_layers._options(cuda_layers._parser(None), ["--patterns", "8x1,1x1,32x32", "--sparsity", "0,0.5"])
    plain, depthwise = shapes.Layer(8, 8, size=(4, 4)), shapes.Layer(8, 8, groups=8, size=(4, 4))
    dense, *others = cuda_table.zeros(plain, options)
    assert dense == ("dense", 0.0) and others == [("8x1", 0.5), ("1x1", 0.5), ("32x32", 0.5)]
    assert cuda_table.zeros(depthwise, options) == [("dense", 0.0), ("1x1", 0.5)]
    case = cuda_table.case_of(depthwise, "1x1", 0.5, "float16", False)
    assert case.weight == (8, 1, 1, 1) and case.x == (1, 8, 4, 4) and case.window.groups == 8


def test_the_default_table_has_the_cpus_layers() -> None:
    found = cuda_table.layers([1], re.compile(""))
    assert found == shapes.table()
    both = cuda_table.layers([1, 64], re.compile(""))
    assert set(shapes.table()) | set(shapes.table(64)) == set(both)


def test_within_noise_is_not_slower() -> None:
    def cell(ratio: float) -> dict[str, Any]:
        side = {"ours": "spmm/1x1/4", "dense": "dense", "ratio": ratio}
        return {"pattern": "1x1", "sparsity": 0.9, "dtype": "float16", "tf32": False, "warm": side, "cold": side}

    document = {"layers": [{"name": "layer", "cells": [cell(r) for r in (0.98, 0.96, 2.0, 0.5)]}]}
    found, text = cuda_table.summary(document)
    assert [one["ratio"] for one in found["precisions"]["float16"]["warm"]["slower"]] == [0.5, 0.96]
    assert "slower than dense after convert: 2 of 4" in text and "4 run sparse, median 0.97 times dense" in text


def test_max_autotune_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def compile(function: Any, **options: Any) -> Any:
        asked.append(options)
        return lambda *args: 0 * function(*args)

    monkeypatch.setattr(torch, "compile", compile)
    case = cuda_ways.Case("", (8, 4, 1, 1), (2, 4, 5, 5), 0.5)
    ways = cuda_ways.torch_ways(case, cuda_ways.pruned(case), torch.randn(case.x), True)
    assert set(ways) == {"dense", "dense channels_last", "dense, max-autotune", "dense channels_last, max-autotune"}
    assert asked == [{"mode": "max-autotune-no-cudagraphs", "dynamic": False}]
    assert not ways["dense, max-autotune"]().any() and ways["dense"]().any()


# ---- networks ----


def test_a_run_of_networks(device: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def convert(model: Any, x: Tensor, verify: bool) -> SparseModule:
        assert not verify
        return SparseModule(convert_on_device(model, (x,), "measure", 1.05, False, CPU))

    def sample(way: Any, kind: str) -> float:
        way()
        return (1.0 if isinstance(way.func, SparseModule) else 3.0) * (2 if kind == "cold" else 1)

    device.setattr(sparseprune, "convert", convert)
    device.setattr(cuda_networks, "Events", lambda: sample)
    prepare = cuda_networks.prepare

    def failing(name: str, *args: Any) -> Any:
        if name == "eager":
            raise CudaError("out of\nmemory")
        return prepare(name, *args)

    device.setattr(cuda_networks, "prepare", failing)
    path = tmp_path / "networks.json"
    device.setattr(torch.cuda, "get_device_name", lambda device: "none")
    arguments = ["--device", "cuda", "tutorial-cnn", "--sparsity", "0.9", "--batch", "2", "--rounds", "3", "--json"]
    assert networks.main([*arguments, str(path)]) == 0
    results = json.loads(path.read_text())
    assert [file.name for file in tmp_path.iterdir()] == ["networks.json"]
    assert [result["tf32"] for result in results] == [False, True]
    for result in results:
        rows = result["rows"]
        assert rows["eager"] == {"failure": "CudaError: out of memory"}
        assert result["fastest_dense"] == "channels_last" and result["fastest_ours"] == "sparseprune"
        assert result["ratio"] == 3.0 and result["cold_ratio"] == 3.0 and result["reached"] is None
        for name in ("channels_last", "sparseprune", "sparseprune_channels_last"):
            assert rows[name]["max_abs_error"] < 1e-4 and rows[name]["samples"] == 3 and rows[name]["no_graph"] == ""
        assert rows["sparseprune"]["runs"] == "sparse" and rows["sparseprune"]["sparse_layers"] == 5
    out = capsys.readouterr().out
    assert "tutorial-cnn, 90 % zeros, batch 2, float32 with TF32" in out and "5 of 5 layers sparse; runs sparse" in out
    assert "sparseprune is 3.00 times the fastest dense, channels_last (cold 3.00 times channels_last)" in out


def test_a_candidate_without_a_graph_says_so(device: pytest.MonkeyPatch) -> None:
    def capture(run: Way) -> Any:
        raise RuntimeError("operation not permitted")

    device.setattr(cuda_graphs, "capture_graph", capture)
    case = cuda_networks.Case("tutorial-cnn", 0.9, 1, "float32", False)
    device.setattr(cuda_networks, "OURS", ())
    result = cuda_networks.measure(case, False, 1, lambda way, kind: 1.0)
    assert result["rows"]["eager"]["no_graph"] == "operation not permitted"
    assert result["ratio"] is None and result["fastest_ours"] is None
    assert "no CUDA graph: operation not permitted" in cuda_networks.table(case, result)


def test_ours_is_never_the_cpus_program(device: pytest.MonkeyPatch) -> None:
    """Without the extension `convert` makes one, whatever the device."""
    convert = sparseprune.convert
    device.setattr(sparseprune, "convert", lambda *args, verify: convert(*args, tune="fixed", verify=verify))
    device.setattr(cuda_networks, "OURS", ("sparseprune",))
    case = cuda_networks.Case("lenet-300-100", 0.9, 1, "float32", False)
    result = cuda_networks.measure(case, False, 1, lambda way, kind: 1.0)
    assert "convert made Program, no module on cpu" in result["rows"]["sparseprune"]["failure"]


def test_a_wrong_network_is_not_timed() -> None:
    want = [torch.tensor([4.0, 0.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)]
    assert cuda_networks.difference((torch.tensor([4.0, 0.5]), torch.ones(1)), want, 0.2) == 0.5
    for wrong in ([4.0, 1.0], [4.0, float("nan")]):
        with pytest.raises(AssertionError, match="from float64, where 4 is the largest"):
            cuda_networks.difference((torch.tensor(wrong), torch.ones(1)), want, 0.2)
    with pytest.raises(AssertionError, match="differ by inf"):
        cuda_networks.difference((torch.tensor([float("inf"), 0.0]), torch.ones(1)), want, float("inf"))


def test_the_default_cases() -> None:
    found = cuda_networks.cases(cuda_networks._parser(None).parse_args([]))
    assert found[0] == cuda_networks.Case("resnet50", 0.95, 64, "float32", False) and found[0].asked == 2.0
    assert sum(case.asked is not None for case in found) == 1 and len(set(found)) == len(found) == 5 * 2 * 2 * 2
    assert {case.network for case in found} == set(networks.NETWORKS.split(","))
    rows = {"eager": {"median_ms": 3.0, "cold_ms": 3.0}, "sparseprune": {"median_ms": 2.0, "cold_ms": 1.0}}
    summary = cuda_networks.summary(rows, 2.0)
    assert summary["ratio"] == 1.5 and summary["cold_ratio"] == 3.0 and summary["reached"] is False


# ---- what both share ----


def test_all_take_turns() -> None:
    calls: list[tuple[int, str]] = []

    def sample(way: Way, kind: str) -> float:
        calls.append((way(), kind))
        return float(len(calls))

    taken = cuda_timing.take_turns({"a": lambda: 1, "b": lambda: 2}, 2, sample)
    assert calls == [(1, "warm"), (1, "cold"), (2, "warm"), (2, "cold")] + [
        (2, "warm"), (2, "cold"), (1, "warm"), (1, "cold")]  # fmt: skip
    assert taken == {"a": {"warm": [1, 7], "cold": [2, 8]}, "b": {"warm": [3, 5], "cold": [4, 6]}}
    assert cuda_timing.take_turns({}, 2, sample) == {}


def test_what_cannot_be_captured_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def bad() -> Tensor:
        raise NotImplementedError("no\nkernel")

    monkeypatch.setattr(cuda_timing, "capture_graph", capture)
    numbers = iter([1.0, 10.0, 5.0, 20.0, 2.0, 90.0])
    timer = cuda_timing.graph_times(3, lambda way, kind: next(numbers))
    times, failed = timer({"bad": bad, "good": torch.zeros(1).abs})
    assert times == {"good": {"warm": 2.0, "cold": 20.0}} and failed == {"bad": "NotImplementedError: no kernel"}


def test_precision_is_put_back() -> None:
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for tf32 in (True, False):
        with pytest.raises(ValueError), cuda_timing.precision(tf32):
            assert [flag.allow_tf32 for flag in flags] == [tf32, tf32] and torch.backends.cudnn.benchmark
            assert not torch.is_grad_enabled()
            raise ValueError
    assert [flag.allow_tf32 for flag in flags] == before and not torch.backends.cudnn.benchmark
    assert cuda_timing.precisions(["float32", "float16"], ["off", "on"]) == [
        ("float32", False), ("float32", True), ("float16", False)]  # fmt: skip


def test_without_a_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for main in (layers.main, networks.main):
        assert main(["--device", "cuda"]) == 2
        assert capsys.readouterr().err == "there is no CUDA device: nothing can be measured\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_timing, "extension", lambda: (_ for _ in ()).throw(CudaError("was built without")))
    for main in (layers.main, networks.main):
        assert main(["--device=cuda"]) == 2 and capsys.readouterr().err == "was built without\n"


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (layers, "--device cuda --threads 2", "--threads is an option of --device cpu only"),
        (layers, "--device cuda --plot a.png", "--plot is an option of --device cpu only"),
        (layers, "--compile", "--compile is an option of --device cuda only"),
        (layers, "--device cuda --patterns 0x4", "'0x4' is no pattern"),
        (layers, "--device cuda --shapes nothing-like-it", "--shapes finds no layer"),
        (layers, "--device cuda --resume", "--resume needs --json"),
        (layers, "--device cuda --json no/a.json", "no is not a folder"),
        (layers, "--device tpu", "invalid choice: 'tpu'"),
        (networks, "--device cuda --only eager", "--only is an option of --device cpu only"),
        (networks, "--dtype float16", "--dtype is an option of --device cuda only"),
        (networks, "--device cuda --dtype int8", "'int8' is none of float32, float16, bfloat16"),
        (networks, "--device cuda resnet51", "'resnet51' is none of"),
        (networks, "--device cuda --batch 1,0", "'0' is not a positive whole number"),
        (networks, "--device cuda --json no/a.json", "no is not a folder"),
    ],
)
def test_bad_options(program: Any, arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        program.main(arguments.split())
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_the_checking_scripts_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = (BENCH / "gpu_check.sh").read_text()
    commands = re.findall(r'^limited \d+ "\$python" bench/(\w+)\.py (.*)$', text, re.MULTILINE)
    assert [name for name, _ in commands] == ["layers", "networks", "layers"]
    for name, arguments in commands:
        given = [part.replace("$out", ".") for part in shlex.split(arguments)]
        assert {"layers": layers, "networks": networks}[name].main(given) == 2
        assert "no CUDA device" in capsys.readouterr().err
