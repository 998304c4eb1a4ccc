from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from sparseprune import benchmarking, cli
from sparseprune.benchmarking import BenchmarkResult, Timing, benchmark, prune_uniform
from sparseprune.dense import plain_copy
from sparseprune.synthetic import fit_batch_norm, fit_scale
from sparseprune.timing import machine

QUICK: dict[str, Any] = {"threads": 1, "rounds": 2, "block_seconds": 0.002, "progress": False}

random_unstructured: Any = prune.random_unstructured


def tiny() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 8, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )  # fmt: skip


class Mask(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (weight > 0)


class Off(nn.Module):
    """A model's output, off by 0.25 in one place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x).clone()
        y[0, 3] += 0.25
        return y


def test_result() -> None:
    model, x = tiny().train(), torch.randn(1, 3, 8, 8)
    before, state = torch.get_num_threads(), {name: t.clone() for name, t in model.state_dict().items()}
    result = benchmark(model, x, sparse=Off(plain_copy(model)), baselines=("eager", "channels_last"), **QUICK)
    assert torch.get_num_threads() == before and model.training
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert [t.name for t in result.timings] == ["eager", "channels_last", "sparseprune"]
    assert result.timings[0].max_abs_error == 0 and result.sparse.max_abs_error == pytest.approx(0.25)
    for timing in result.timings:
        assert timing.samples >= 2 * 3 and timing.failure is None
        assert timing.median_ms is not None and timing.p90_ms is not None and 0 < timing.median_ms <= timing.p90_ms
    fastest = result.fastest_dense
    assert fastest is not None and fastest.speedup == 1 and fastest.name != "sparseprune"
    assert result.speedup == pytest.approx(fastest.median_ms / result.sparse.median_ms)  # type: ignore[operator]
    assert result.input_shapes == ((1, 3, 8, 8),) and result.threads == 1
    table, data = str(result), json.loads(result.to_json())
    for word in ("Sequential", "1×3×8×8", "channels_last", "2.50e-01", str(result.machine["cpu"])):
        assert word in table
    assert data["speedup"] == result.speedup and data["timings"][2]["name"] == "sparseprune"


def test_a_baseline_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module) -> nn.Module:
        raise RuntimeError("no C++\ncompiler here")

    monkeypatch.setattr(torch, "compile", broken)
    model = tiny()
    result = benchmark(model, torch.zeros(1, 3, 8, 8), sparse=model.eval(), baselines=("compile",), **QUICK)
    assert result.timings[0].failure == "RuntimeError: no C++ compiler here"
    assert "failed: RuntimeError: no C++ compiler here" in str(result)
    assert result.fastest_dense is None and result.speedup is None
    json.loads(result.to_json())


def test_a_disturbed_run_says_so() -> None:
    def result(waited: float) -> BenchmarkResult:
        rows = (Timing("eager", 2.0, 3.0, 9, 1.0, 0.0, 0.0), Timing("sparseprune", 1.0, 1.0, 9, 2.0, 0.0, waited))
        return BenchmarkResult("net", ((1, 3),), 2, 0.5, rows, machine())

    assert not result(0.01).disturbed and "WARNING" not in str(result(0.01))
    assert result(0.4).disturbed and "sparseprune 40%" in str(result(0.4)) and result(0.4).to_dict()["disturbed"]


def test_errors_that_are_not_finite() -> None:
    x = torch.ones(1, 4)
    result = benchmark(nn.Identity(), x, sparse=lambda x: x * float("nan"), baselines=("eager",), **QUICK)
    assert result.to_dict()["timings"][1]["max_abs_error"] == "inf"
    both = benchmark(nn.Identity(), x / 0, sparse=lambda x: x * 1, baselines=("eager",), **QUICK)
    assert both.sparse.max_abs_error == 0


def test_wrong_arguments() -> None:
    model, x = tiny().eval(), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="'fast' is not one of eager"):
        benchmark(model, x, sparse=model, baselines=("fast",))
    with pytest.raises(ValueError, match="rounds=0"):
        benchmark(model, x, sparse=model, rounds=0)
    with pytest.raises(ValueError, match=r"returns shapes \[\(1, 4\)\], the model \[\(1, 5\)\]"):
        benchmark(model, x, sparse=lambda x: torch.zeros(1, 4), baselines=("eager",), **QUICK)


def test_plain_copy_folds_masks() -> None:
    model = tiny()
    random_unstructured(model[0], "weight", 0.5)
    parametrize.register_parametrization(model[7], "weight", Mask())
    model[0].weight_orig.data.mul_(2)  # as after a step of the optimizer: `weight` is stale
    copy: Any = plain_copy(model)
    assert torch.equal(copy[0].weight, model[0].weight_orig * model[0].weight_mask)
    assert torch.equal(copy[7].weight, model[7].weight)
    assert not copy.training and not any(p.requires_grad for p in copy.parameters())
    assert {"0.weight", "7.weight"} <= copy.state_dict().keys() and "0.weight_orig" in model.state_dict()


def test_prune_uniform() -> None:
    prune_uniform: Any = benchmarking.prune_uniform
    model = prune_uniform(tiny(), 0.9)
    zeros = {name: int((p == 0).sum()) for name, p in model.named_parameters() if name.endswith("weight")}
    assert zeros == {"0.weight": 0, "1.weight": 0, "2.weight": 0, "4.weight": round(0.9 * 32), "7.weight": 36}
    assert torch.equal(model[4].weight, prune_uniform(tiny(), 0.9)[4].weight)
    assert not torch.equal(model[4].weight, prune_uniform(tiny(), 0.9, seed=1)[4].weight)
    assert int((prune_uniform(tiny(), 0.5, exclude=["7"])[0].weight == 0).sum()) == 54
    with pytest.raises(ValueError, match="sparsity=1"):
        prune_uniform(tiny(), 1)
    with pytest.raises(ValueError, match="'stem' is not a convolution"):
        prune_uniform(tiny(), 0.5, exclude=["stem"])
    random_unstructured(model[7], "weight", 0.5)
    with pytest.raises(ValueError, match="7: the weight has a mask"):
        prune_uniform(model, 0.5)


def test_fit_batch_norm() -> None:
    model = tiny().train()
    model[2].eval()
    fit_batch_norm(model, [torch.zeros(1, 3, 8, 8)])
    assert model.training and model[1].training and not model[2].training and model[1].momentum == 0.1
    y = model.eval()[1](model[0](torch.randn(64, 3, 8, 8)))
    assert y.mean(dim=(0, 2, 3)).abs().max() < 0.3 and (y.std(dim=(0, 2, 3)) - 1).abs().max() < 0.3


def test_fit_scale() -> None:
    x = torch.randn(64, 3, 8, 8)
    normed: Any = fit_scale(tiny(), [x])  # as fit_batch_norm
    assert torch.equal(normed[1].running_mean, fit_batch_norm(tiny(), [x])[1].running_mean)  # type: ignore[index]
    assert torch.equal(normed[0].weight, tiny()[0].weight)

    plain: Any = nn.Sequential(*(layer for layer in tiny() if not isinstance(layer, nn.BatchNorm2d))).train()
    prune_uniform(plain, 0.5, exclude=())
    before = plain[0].weight.clone()
    fit_scale(plain, [torch.zeros(1, 3, 8, 8)])
    assert plain.training and not any(module._forward_hooks for module in plain.modules())
    for depth in (1, 2, 4, 7):
        assert plain[:depth](x).std().item() == pytest.approx(1, abs=0.5)
    kept = before != 0
    assert torch.equal(plain[0].weight != 0, kept) and (plain[0].weight / before)[kept].std() < 1e-6

    layer_norm: Any = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = layer_norm[0].weight.clone()
    assert torch.equal(fit_scale(layer_norm, [torch.zeros(1, 4)])[0].weight, before)  # type: ignore[index]


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_several_outputs(kind: type) -> None:
    class Several(nn.Module):
        def __init__(self, off: float) -> None:
            super().__init__()
            self.off = off

        def forward(self, x: Tensor) -> Any:
            y, z = x * 2, x.sum(1) + self.off
            return {"boxes": y, "more": (z, None)} if kind is dict else kind((y, [z]))

    result = benchmark(Several(0), torch.ones(1, 3, 4), sparse=Several(0.5), baselines=("eager",), **QUICK)
    assert result.timings[0].max_abs_error == 0 and result.sparse.max_abs_error == 0.5


# --- the command -----------------------------------------------------------------------------------------------------

FACTORY = """
import torch
def net(): return torch.nn.Linear(4, 2)
def text(): return "no model"
def broken(): raise KeyError("lost")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "beside_here.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("beside_here", None)
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "required: COMMAND"),
        ("benchmark", "required: MODEL"),
        ("benchmark resnet99", "'resnet99' is neither one of resnet18-32, resnet18, resnet50, vgg16"),
        ("benchmark resnet18-32 --sparsity 1.5", "'1.5' is not in [0, 1)"),
        ("benchmark resnet18-32 --sparsity nan", "'nan' is not in [0, 1)"),
        ("benchmark resnet18-32 --batch 0", "'0' is not a positive whole number"),
        ("benchmark resnet18-32 --threads two", "'two' is not a positive whole number"),
        ("benchmark resnet18-32 --input-shape 1,x", "'x' is not a positive whole number"),
        ("benchmark resnet18-32 --input-shape 1,4,32,32", "resnet18-32 fails on inputs of shape [(1, 4, 32, 32)]"),
        ("benchmark resnet18-32 --json no/out.json", "no is not a folder"),
        ("benchmark resnet18-32 --weights no.pt", "no.pt is not a file"),
        ("benchmark resnet18-32 --weights beside_here.py", "--weights beside_here.py: "),
        ("benchmark resnet18-32 --baselines quick", "'quick' is not one of eager"),
        ("benchmark beside_here:net", "needs --input-shape"),
        ("benchmark nowhere:net --input-shape 1,4", "No module named 'nowhere'"),
        ("benchmark beside_here:other --input-shape 1,4", "no attribute 'other'"),
        ("benchmark beside_here:text --input-shape 1,4", "returned str, not a torch.nn.Module"),
        ("benchmark beside_here:broken --input-shape 1,4", "KeyError: 'lost'"),
        ("benchmark beside_here:net --input-shape 1,3", "beside_here:net fails on inputs of shape [(1, 3)]"),
        ("inspect nothing.spr", "nothing.spr is not a file"),
        ("inspect beside_here.py", "neither a sparseprune program"),
    ],
)
def test_a_mistake_is_one_line(argv: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(argv.split())
    except SystemExit as exc:  # argparse's
        status = int(exc.code or 0)
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and message in captured.err


def test_a_module_beside_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def eager_only(model: nn.Module, inputs: list[Tensor], **given: object) -> BenchmarkResult:
        assert given["threads"] == 1 and given["baselines"] == ["eager"] and inputs[0].shape == (3, 4)
        return benchmark(model, inputs, sparse=model, baselines=("eager",), name=str(given["name"]), **QUICK)

    monkeypatch.setattr(benchmarking, "benchmark", eager_only)
    argv = "benchmark beside_here:net --input-shape 1,4 --batch 3 --sparsity 0.5 --threads 1 --baselines eager"
    assert cli.main([*argv.split(), "--json", "out.json"]) == 0
    assert "beside_here:net, input 3×4, 50.0 % of the weights zero" in capsys.readouterr().out
    data = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert data["sparsity"] == 0.5 and data["model"] == "beside_here:net"
    assert sorted(os.listdir(folder))[-2:] == ["beside_here.py", "out.json"]  # nothing left beside it


def test_inspect_of_plain_safetensors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    save_file({"fc.weight": torch.zeros(2, 3)}, "plain.safetensors")
    assert cli.main(["inspect", "plain.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "fc.weight" in out and "F32" in out and "2×3" in out


def test_report_of_a_program(tmp_path: Path) -> None:
    layers = [{"name": "c", "op": "conv", "shape": [4, 3, 3, 3], "kept": 27, "total": 108}, {"name": "p", "op": "add"}]
    (tmp_path / "x.spr").write_bytes(b"")
    about = {"inputs": [{"name": "x", "shape": ["s0", 3, 8, 8]}], "layers": layers, "nbytes": 1234}
    report = cli._program_report(about, tmp_path / "x.spr")
    for text in ("input x: (s0, 3, 8, 8) float32", "4×3×3×3", "27 of 108 weights kept, 75.0 % zero", "1,234 bytes"):
        assert text in report


def test_inspect_of_sparse_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparseprune.files import save_weights

    save_weights(prune_uniform(tiny(), 0.75, exclude=()), "sparse.safetensors")
    assert cli.main(["inspect", "sparse.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "sparseprune weights" in out and "0.weight" in out and "75.0 %" in out


@pytest.mark.parametrize("header", [{"x": 1}, {"x": {}}, {"__metadata__": {"sparseprune.weights": "{"}}, []])
def test_inspect_of_a_damaged_file(folder: Path, capsys: pytest.CaptureFixture[str], header: object) -> None:
    raw = json.dumps(header).encode()
    (folder / "damaged").write_bytes(len(raw).to_bytes(8, "little") + raw)
    assert cli.main(["inspect", "damaged"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_needs_no_torch(folder: Path) -> None:
    code = "import sys; from sparseprune import cli; cli._parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
