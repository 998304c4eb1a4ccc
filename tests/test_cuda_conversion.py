"""`convert` on CUDA. Folding, swapping, replaying and the race run here on the CPU, with a stand-in for the kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparseprune
from sparseprune import SparseModule, VerificationError, cuda_conversion, cuda_graphs, cuda_layers
from sparseprune.cuda_conversion import FusedLayer, check_outputs, convert_on_device
from sparseprune.cuda_graphs import MOST_GRAPHS, GraphReplay
from sparseprune.cuda_layers import Activation, CudaLayer, preferred

CPU = torch.device("cpu")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        for bn in (self.bn1, self.bn2):
            nn.init.uniform_(bn.weight, 0.5, 2), nn.init.normal_(bn.bias), nn.init.normal_(bn.running_mean)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        z: Tensor = self.fc(functional.relu6(y).mean((2, 3)))
        return z


class Branches(nn.Module):
    """torch.fx cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.conv(x) if x.sum() > -1e9 else x)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Activation]:
    """The kernels are dense torch by another name, always faster; a graph is the call itself. What kernels end in."""
    ends: list[Activation] = []

    class Kernel:
        def __init__(self, layer: CudaLayer) -> None:
            self.layer = layer

        def __call__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, act: Activation) -> Tensor:
            ends.append(act)
            return self.layer._run_dense(x, bias, residual, act)

    def timer(device: torch.device) -> Callable[[Any], float]:
        def sparse(run: Any) -> bool:
            return isinstance(run, Kernel) or any(isinstance(m, FusedLayer) for m in getattr(run, "modules", list)())

        return lambda call: 1.0 if sparse(call.func) else 3.0

    def capture(run: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        outputs = run()
        return lambda: outputs.copy_(run()), outputs

    monkeypatch.setattr(CudaLayer, "candidates", lambda self, x: {"dense": self._run_dense, "spmm/1x1/4": Kernel(self)})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for module in (cuda_layers, cuda_conversion):
        monkeypatch.setattr(module, "event_timer", timer)
    monkeypatch.setattr(cuda_graphs, "capture_graph", capture)
    return ends


def model_and_input(model: nn.Module) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return sparseprune.prune_uniform(model.eval(), 0.7), torch.randn(2, 4, 6, 6)


@pytest.mark.parametrize("tune", ["measure", "fixed"])
def test_a_model_with_everything_folded(stand_in: list[Activation], tune: str) -> None:
    model, x = model_and_input(Residual())
    fast = SparseModule(convert_on_device(model, (x,), tune, 1.05, True, CPU))
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)
        assert torch.allclose(fast(2 * x), model(2 * x), atol=1e-5)
    stand_in.clear()
    fast(x[:1])
    stem = ["spmm/1x1/4" if tune == "measure" else "torch"]  # it has no zeros: without a measurement, it stays
    assert {act.kind for act in stand_in} == {"clamp", "none", *(["relu"] if tune == "measure" else [])}
    assert fast.report.runs == "sparse"
    assert [layer.choice for layer in fast.report.layers] == stem + ["spmm/1x1/4"] * 2
    assert fast.report.max_error is not None
    assert f"{3 if tune == 'measure' else 2} of 3 layers are sparse" in str(fast.report)
    assert bool(fast.report.times_ms) == (tune == "measure")
    with pytest.raises(sparseprune.SparsepruneError, match="cannot be saved"):
        fast.save("model.spr")


def test_where_nothing_wins_dense_runs(stand_in: list[Activation], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cuda_layers, cuda_conversion):
        monkeypatch.setattr(module, "event_timer", lambda device: lambda call: 1.0)
    model, x = model_and_input(Residual())
    fast = SparseModule(convert_on_device(model, (x,), "measure", 1.05, True, CPU))
    assert fast.report.runs == "eager" and {layer.choice for layer in fast.report.layers} == {"torch"}
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)


def test_a_model_that_fx_cannot_follow(stand_in: list[Activation]) -> None:
    model, x = model_and_input(Branches())
    fast = SparseModule(convert_on_device(model, (x,), "measure", 1.05, True, CPU))
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert "torch.fx cannot follow the model" in str(fast.report)


def test_the_model_is_left_as_it_was(stand_in: list[Activation]) -> None:
    model, x = model_and_input(Residual())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    convert_on_device(model, (x,), "fixed", 1.05, True, CPU)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.get_submodule("conv1")) is nn.Conv2d


def test_a_broadcast_residual_and_unbatched_inputs(stand_in: list[Activation]) -> None:
    w = sparseprune.BlockCSR.from_dense(torch.randn(6, 4, 3, 3))
    layer = FusedLayer(CudaLayer(w), torch.randn(6), Activation("relu"))
    x, dense = torch.randn(4, 8, 8), torch.from_numpy(w.to_dense())
    expected = functional.conv2d(x, dense, layer.bias)
    for residual in (torch.randn(6, 1, 1), torch.randn(6, 6, 6)):
        assert torch.allclose(layer(x, residual), (expected + residual).relu(), atol=1e-5)


def test_wrong_outputs_are_an_error() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    right = model(x).detach()
    assert check_outputs(right, copy.deepcopy(model), (x,))[0] < 1e-6
    with pytest.raises(VerificationError, match="output 0: differs by"):
        check_outputs(torch.zeros(4, 2), model, (x,))


def test_preferred() -> None:
    assert preferred(["dense", "spmm/1x1/1", "spmm/1x1/4"]) == "spmm/1x1/4"
    assert preferred(["dense", "spmm/1x1/4", "vectors/16/half", "blocks/16/half"]) == "blocks/16/half"
    assert preferred(["dense"]) == "dense"


# ---- replaying ----


class Recorder:
    """Captures by running again on the same memory."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        self.captured += 1
        outputs = run()

        def replay() -> None:
            self.replayed += 1
            for mine, new in zip(outputs, run(), strict=True):
                mine.copy_(new)

        return replay, outputs


class Twice(nn.Module):
    def forward(self, x: Tensor, by: float = 2.0) -> tuple[Tensor, Tensor]:
        return by * x, x + 1


def test_replay_copies_in_and_clones_out() -> None:
    recorder = Recorder()
    replay = GraphReplay(Twice(), CPU, recorder)
    first = replay(torch.ones(2))[0]
    second = replay(torch.full((2,), 5.0))[0]
    assert first.tolist() == [2, 2] and second.tolist() == [10, 10]  # the caller's, not the graph's
    assert recorder.captured == 1 and recorder.replayed == 2


def test_each_shape_and_constant_has_its_graph_up_to_a_number() -> None:
    recorder = Recorder()
    replay = GraphReplay(Twice(), CPU, recorder)
    assert replay(torch.ones(2), 3.0)[0].tolist() == [3, 3]
    assert replay(torch.ones(2), 4.0)[0].tolist() == [4, 4]
    for size in range(1, MOST_GRAPHS + 3):
        assert replay(torch.ones(size))[1].tolist() == [2] * size
    assert recorder.captured == MOST_GRAPHS


def test_what_cannot_be_captured_runs_itself() -> None:
    def refuse(run: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    replay = GraphReplay(Twice(), CPU, refuse)
    assert replay(torch.ones(2))[0].tolist() == [2, 2]
    assert replay.failure == "operation not permitted when stream is capturing"
    assert GraphReplay(Twice(), CPU, refuse)(torch.ones(2), by=3.0)[0].tolist() == [3, 3]


# ---- on a device ----


DEVICE = torch.cuda.is_available() and cuda_layers.built()


@pytest.mark.skipif(not DEVICE, reason="no CUDA device, or no CUDA kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_convert_on_a_device(dtype: torch.dtype) -> None:
    model = sparseprune.prune_uniform(sparseprune.zoo.resnet18_32(width=32).eval(), 0.95).cuda().to(dtype)
    x = torch.randn(16, 3, 32, 32, device="cuda", dtype=dtype)
    fast = sparseprune.convert(model, x)
    with torch.no_grad():
        expected = model(2 * x)
    found = fast(2 * x)
    assert found.device == x.device and torch.allclose(found, expected, atol=2e-2 * float(expected.abs().max()))
    assert fast.report.times_ms and not any("no CUDA graph" in note for note in fast.report.notes)
