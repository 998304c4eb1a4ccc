"""The front door: convert, SparseModule and its report, against the model in float64."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.utils._pytree import tree_leaves, tree_map

import sparseprune
from sparseprune import (
    SparseModule,
    SparsepruneError,
    SparsepruneWarning,
    UnsupportedError,
    VerificationError,
    conversion,
    verification,
)
from sparseprune.graph.capture import Captured, capture
from sparseprune.synthetic import fit_batch_norm
from sparseprune.zoo import resnet18_32

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
KINDS = ("zeros", "hooks", "parametrized", "dense")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Next to no time for tuning and racing; threads put back."""
    monkeypatch.setattr(conversion, "TUNE_SECONDS", 0.05)
    before = sparseprune.num_threads()
    yield
    sparseprune.set_num_threads(before)


def network(kind: str = "zeros") -> Any:
    """A narrow ResNet-18 for 32x32 images, 90 % zeros, pruned in one of the ways there are."""
    model: Any = fit_batch_norm(resnet18_32(width=8, seed=0), (X,))
    if kind == "zeros":
        sparseprune.prune_uniform(model, 0.9)
    elif kind == "hooks":
        prune_randomly: Any = torch_prune.random_unstructured
        torch.manual_seed(0)
        layers = [m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and name != "conv1"]
        layer: Any
        for layer in layers:
            prune_randomly(layer, "weight", 0.9)
            with torch.no_grad():  # as an optimizer does: `layer.weight` is stale from here on
                layer.weight_orig.mul_(1.5)
    elif kind == "parametrized":
        sparseprune.prune(model, 0.9, scope="local", exclude=("conv1",))
    return model


def effective(model: nn.Module) -> dict[str, Tensor]:
    """The weights that the model computes with, under plain names: the oracle's state."""
    state, result = model.state_dict(), {}
    for key in resnet18_32(width=8).state_dict():
        if f"{key}_mask" in state:
            result[key] = state[f"{key}_orig"] * state[f"{key}_mask"]
        elif key in state:
            result[key] = state[key]
        else:
            result[key] = model.get_submodule(key.rpartition(".")[0]).weight  # type: ignore[assignment]
    return {key: value.detach().clone() for key, value in result.items()}


def oracle(model: nn.Module, x: Tensor) -> Tensor:
    plain = resnet18_32(width=8).eval()
    plain.load_state_dict(effective(model))
    with torch.no_grad():
        return plain.double()(x.double())  # type: ignore[no-any-return]


def close(y: Tensor, y64: Tensor, tolerance: float = 2e-5) -> bool:
    return y.shape == y64.shape and float((y.double() - y64).abs().max()) <= tolerance * float(y64.abs().max())


@pytest.fixture(scope="module")
def model() -> Any:
    return network()


@pytest.fixture(scope="module")
def fast(model: nn.Module) -> SparseModule:
    return sparseprune.convert(model, X, tune="fixed")


# ---- the same numbers, from every kind of pruned model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_every_kind_of_model(kind: str, training: bool) -> None:
    model = network(kind).train(training)
    fast = sparseprune.convert(model, X, tune="fixed")
    expected = oracle(model, X)
    assert close(fast(X), expected)
    report, weights = fast.report, effective(model)
    assert [layer.name for layer in report.layers if layer.op == "linear"] == ["fc"]
    assert {layer.name for layer in report.layers} == {key[:-7] for key, w in weights.items() if w.dim() in (2, 4)}
    for layer in report.layers:
        weight = weights[f"{layer.name}.weight"]
        assert layer.shape == tuple(weight.shape)
        # Rows that nobody reads are zeros too, though here no channel is gone.
        assert layer.sparsity >= float((weight == 0).float().mean()) - 1e-6
        assert layer.block_density == pytest.approx(1 - layer.sparsity)  # blocks of one
        assert layer.sparsity == 0 if kind == "dense" or layer.name == "conv1" else layer.sparsity > 0.85
    assert report.max_error is not None and report.bound is not None
    assert report.max_error == pytest.approx(float((fast(X).double() - expected).abs().max()), rel=1e-3)
    assert 0 < report.max_error <= report.bound == pytest.approx(1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_untouched(kind: str) -> None:
    model = network(kind)
    model.layer1.eval()  # flags that differ

    def state() -> Any:
        modules = [
            (name, type(m), m.training, list(m._forward_pre_hooks), list(m._forward_hooks), sorted(vars(m)))
            for name, m in model.named_modules()
        ]
        tensors = [(n, id(t), t._version, t.requires_grad, t.grad) for n, t in model.named_parameters()]
        return modules, tensors, {n: id(t) for n, t in model.named_buffers()}

    before, values = state(), {key: value.clone() for key, value in model.state_dict().items()}
    sparseprune.convert(model, X)
    sparseprune.convert(model, tune="fixed")(X)
    assert state() == before
    after = model.state_dict()
    assert list(after) == list(values) and all(torch.equal(after[key], values[key]) for key in values)


@pytest.mark.parametrize("when", ["at once", "at the first call", "eager", "channels_last"])
def test_weights_are_snapshot(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    expected = oracle(model, X)
    if when in ("eager", "channels_last"):
        times = {"sparse": 3.0, "eager": 2.0, "channels_last": 2.0, when: 1.0}
        monkeypatch.setattr(conversion, "_take_turns", lambda *_: times)
        fast = sparseprune.convert(model, X)
        assert fast.report.runs == when
    else:
        fast = sparseprune.convert(model, None if when == "at the first call" else X, tune="fixed")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    assert close(fast(X), expected)


def test_nothing_of_the_model_is_kept_alive_by_a_loaded_or_fixed_program(fast: SparseModule) -> None:
    assert list(fast.parameters()) == [] and list(fast.buffers()) == [] and fast.state_dict() == {}


# ---- the report


def test_report_of_fixed(fast: SparseModule) -> None:
    report = fast.report
    assert report.runs == "sparse" and report.times_ms == {} and "nothing was timed" in report.reason
    assert report.input_shapes == ((2, 3, 32, 32),) and report.threads == sparseprune.num_threads()
    assert report.torch == torch.__version__
    for layer in report.layers:
        assert layer.dense_ms is None and layer.sparse_ms is None and layer.reason == "default for its shape"
        assert layer.error is not None and 0 < layer.error < 1e-4
    data = report.to_dict()
    assert json.loads(json.dumps(data))["layers"][0]["name"] == "conv1" and data["runs"] == "sparse"
    text = str(report)
    assert all(layer.name in text and layer.choice in text for layer in report.layers)
    assert "runs: sparse" in text and "largest error against float64" in text and "None" not in text


def test_report_of_measure(model: nn.Module) -> None:
    fast = sparseprune.convert(model, X, min_gain=1e-9)
    report = fast.report
    assert set(report.times_ms) == {"sparse", "eager", "channels_last"} and min(report.times_ms.values()) > 0
    assert report.runs == "sparse" and "min_gain is 1e-09" in report.reason
    for layer in report.layers:
        assert layer.dense_ms is not None and layer.dense_ms > 0 and layer.error is not None
        if layer.op == "conv":  # a linear layer of this size has one variant: there is nothing to time
            assert layer.sparse_ms is not None and layer.sparse_ms > 0 and layer.reason.startswith("fastest of")
    assert all(f"{ms:.3f}" in str(report) for ms in report.times_ms.values())
    assert json.loads(json.dumps(report.to_dict()))["times_ms"] == report.times_ms
    assert close(fast(X), oracle(model, X))


def test_what_loses_is_not_used(model: Any) -> None:
    fast = sparseprune.convert(model, X, min_gain=1e9)
    report = fast.report
    assert report.runs in ("eager", "channels_last") and f"runs: {report.runs}" in str(report)
    best = min(("eager", "channels_last"), key=lambda name: report.times_ms[name])
    assert report.runs == best and "min_gain is 1000000000.0" in report.reason
    dense = copy.deepcopy(model).eval()
    inputs = X
    if report.runs == "channels_last":
        dense, inputs = dense.to(memory_format=torch.channels_last), X.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(fast(X), dense(inputs))
    y = fast(X)
    assert not y.requires_grad and not y.is_inference()
    with pytest.raises(TypeError, match="float32"):
        fast(X.double())


def test_without_verification(model: nn.Module) -> None:
    report = sparseprune.convert(model, X, tune="fixed", verify=False).report
    assert report.max_error is None and all(layer.error is None for layer in report.layers)
    assert "largest error" not in str(report)


def test_a_model_without_zeros_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("dense")
    fast = sparseprune.convert(model, X)  # measured: whatever runs, the numbers are the same
    assert all(layer.sparsity == 0 and layer.block_density == 1 for layer in fast.report.layers)
    assert close(fast(X), oracle(model, X))


# ---- bitwise


def test_fixed_is_deterministic(model: nn.Module, fast: SparseModule, tmp_path: Path) -> None:
    again = sparseprune.convert(model, X, tune="fixed")
    assert torch.equal(again(X), fast(X))
    assert [layer.choice for layer in again.report.layers] == [layer.choice for layer in fast.report.layers]
    again.save(tmp_path / "again.spr")
    fast.save(tmp_path / "fast.spr")
    assert (tmp_path / "again.spr").read_bytes() == (tmp_path / "fast.spr").read_bytes()


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 3, 40, 24), (1, 3, 7, 9)], ids=str)
def test_threads_and_repeats_change_no_bit(fast: SparseModule, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    sparseprune.set_num_threads(1)
    expected = fast(x)
    for threads in (1, 2, 4, 3):
        sparseprune.set_num_threads(threads)
        for _ in range(3):
            assert torch.equal(fast(x), expected)


def test_threads_change_no_bit_of_a_tuned_program(model: nn.Module) -> None:
    fast = sparseprune.convert(model, X, min_gain=1e-9)
    outputs = []
    for threads in (1, 2, 4):
        sparseprune.set_num_threads(threads)
        outputs.append(fast(X))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_memory_format_changes_no_bit(fast: SparseModule) -> None:
    assert torch.equal(fast(X.contiguous(memory_format=torch.channels_last)), fast(X))
    wide = torch.randn(2, 3, 32, 64)
    assert torch.equal(fast(wide[..., ::2]), fast(wide[..., ::2].contiguous()))


# ---- sizes


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (5, 3, 32, 32), (2, 3, 41, 17), (1, 3, 9, 64)], ids=str)
def test_batch_and_size_may_differ(model: nn.Module, fast: SparseModule, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    assert close(fast(x), oracle(model, x))


def test_an_example_of_one_leaves_the_batch_open(model: nn.Module) -> None:
    fast = sparseprune.convert(model, X[:1], tune="fixed")
    assert close(fast(X), oracle(model, X)) and fast.program.inputs[0][1] == ("s0", 3, "s1", "s2")


def test_a_fixed_size_is_noted_and_held() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu() if x.shape[2] > 4 else x

    fast = sparseprune.convert(Fixed(), X, tune="fixed")
    assert any("the model's code depends on it" in note for note in fast.report.notes)
    assert any("note: " in line for line in str(fast.report).splitlines())
    with pytest.raises(ValueError, match="expected size 32 in dimension 2"):
        fast(X[:, :, :4])


def test_a_new_shape_is_planned_not_tuned(fast: SparseModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "tune_program", lambda *_: pytest.fail("tuned at inference"))
    monkeypatch.setattr("sparseprune.runtime.Program.tune", lambda *_: pytest.fail("tuned at inference"))
    fast(torch.randn(1, 3, 20, 20))


def test_warmup_tunes(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = sparseprune.convert(model, X, tune="fixed")
    tuned, tune = [], conversion.tune_program

    def noted(program: Any, shapes: list[tuple[int, ...]]) -> Any:
        tuned.append(shapes)
        return tune(program, shapes)

    monkeypatch.setattr(conversion, "tune_program", noted)
    x = torch.randn(1, 3, 24, 24)
    assert fast.warmup(x) is fast and tuned == [[(1, 3, 24, 24)]]
    assert close(fast(x), oracle(model, x))


# ---- without example inputs


def test_the_first_call_converts(model: nn.Module) -> None:
    fast = sparseprune.convert(model, tune="fixed")
    assert repr(fast) == "SparseModule(converts at the first call)"
    for wants in (lambda: fast.report, lambda: fast.save("never.spr"), lambda: fast.program):
        with pytest.raises(SparsepruneError, match="nothing is converted yet"):
            wants()
    assert close(fast(X), oracle(model, X))
    assert fast.report.input_shapes == ((2, 3, 32, 32),) and "x: ('s0', 3, 's1', 's2')" in repr(fast)


def test_a_race_of_first_calls_captures_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []

    def noted(*args: Any) -> Captured:
        captured.append(args)
        return capture(*args)

    monkeypatch.setattr(conversion, "capture", noted)
    fast = sparseprune.convert(model, tune="fixed")
    assert not captured
    barrier, outputs = threading.Barrier(8), []

    def call() -> None:
        barrier.wait()
        outputs.append(fast(X))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(captured) == 1 and len(outputs) == 8
    assert all(torch.equal(y, outputs[0]) for y in outputs) and close(outputs[0], oracle(model, X))


def test_a_failed_first_call_may_be_repeated(model: nn.Module) -> None:
    fast = sparseprune.convert(model, tune="fixed")
    with pytest.raises(UnsupportedError, match="float64"):
        fast(X.double())
    assert close(fast(X), oracle(model, X))


# ---- verification


def test_a_wrong_capture_is_found(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def tampered(*args: Any) -> Captured:
        captured = capture(*args)
        graph = captured.graph
        weight = next(node.weight for node in graph.nodes if node.op == "linear")
        assert weight is not None
        wrong = dataclasses.replace(graph.weights[weight], dense=graph.weights[weight].dense * np.float32(1.01))
        return dataclasses.replace(captured, graph=dataclasses.replace(graph, weights={**graph.weights, weight: wrong}))

    monkeypatch.setattr(conversion, "capture", tampered)
    with pytest.raises(VerificationError, match=r"output 0: .* differ from float64 by more than allowed"):
        sparseprune.convert(model, X, tune="fixed")
    assert not close(sparseprune.convert(model, X, tune="fixed", verify=False)(X), oracle(model, X))


@pytest.mark.parametrize("by", [1e-5, float("nan")])
def test_a_wrong_kernel_is_found(model: nn.Module, monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    values = verification._all_values

    def tampered(graph: Any, *args: Any) -> list[Tensor]:
        found = values(graph, *args)
        place = next(place for place, node in enumerate(graph.nodes) if node.name == "layer3.0.conv1")
        found[len(graph.inputs) + place][1, 2, 3, 4] += by  # far below what the outputs would show
        return found

    monkeypatch.setattr(verification, "_all_values", tampered)
    with pytest.raises(VerificationError, match=r"layer 'layer3.0.conv1' \(conv\): 1 of \d+ elements differ"):
        sparseprune.convert(model, X, tune="fixed")


# ---- inputs and outputs


class Nested(nn.Module):
    """Nested inputs, a constant among them; dict, tuple, list, None and repeated outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: dict[str, Tensor], scale: int) -> Any:
        y = self.conv(x["a"] + x["b"])
        z = y.relu() if scale == 2 else y
        return {"y": y, "more": (z, [x["a"], None, y])}


def test_nested_inputs_and_outputs(tmp_path: Path) -> None:
    model = Nested().eval()
    args = ({"a": X, "b": X.flip(0)}, 2)
    fast = sparseprune.convert(model, args, tune="fixed")
    got, expected = fast(*args), model(*args)
    assert tree_map(lambda _: 0, got) == tree_map(lambda _: 0, expected) and list(got) == ["y", "more"]
    assert isinstance(got["more"], tuple) and isinstance(got["more"][1], list) and got["more"][1][1] is None
    for y, want in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert y is None or torch.allclose(y, want, atol=1e-5)
    pointers = [y.data_ptr() for y in tree_leaves(got) if y is not None]
    assert len(set(pointers)) == 4 and X.data_ptr() not in pointers  # no output is a view of another, or of an input
    fast.save(tmp_path / "nested.spr")
    loaded = sparseprune.load(tmp_path / "nested.spr")(X, X.flip(0))  # a program has no nested inputs
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(tree_leaves(loaded), tree_leaves(got), strict=True))

    again = fast({"b": X.flip(0), "a": X}, 2)  # keys in any order
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(tree_leaves(again), tree_leaves(got), strict=True))
    keys = r"inputs\[0\]: expected a dict with the keys \['a', 'b'\], got "
    wrong: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        (({"a": X}, 2), TypeError, keys + r"the keys \['a'\]"),
        (({"a": X, "b": X, "c": X}, 2), TypeError, keys + r"the keys \['a', 'b', 'c'\]"),
        ((X, 2), TypeError, keys + "a Tensor"),
        (({"a": X, "b": [X]}, 2), TypeError, r"inputs\[0\]\['b'\]: expected a torch.Tensor, got a list"),
        (({"a": X, "b": X}, {"c": 2}), TypeError, r"inputs\[1\]: expected 2, got a dict"),
        (({"a": X, "b": X},), TypeError, r"inputs: expected 2 positional argument\(s\), got 1"),
        (({"a": X, "b": X}, 3), ValueError, r"inputs\[1\]: was 2 at conversion, which fixed it; got 3"),
        (({"a": X, "b": X}, 2.0), ValueError, r"inputs\[1\]: was 2"),
        (({"a": X, "b": None}, 2), TypeError, "input 'x_b': expected a torch.Tensor, got NoneType"),
        (({"a": X, "b": X[0]}, 2), ValueError, "input 'x_b': expected 4 dimensions"),
    ]
    for given, error, message in wrong:
        with pytest.raises(error, match=message):
            fast(*given)
    with pytest.raises(ValueError, match="equal|same|s0"):
        fast({"a": X, "b": X[:1]}, 2)


def test_outputs_are_fresh(fast: SparseModule) -> None:
    before = X.clone()
    first = fast(X)
    kept = first.clone()
    second = fast(X)
    first.fill_(torch.nan)
    assert torch.equal(second, kept) and torch.equal(fast(X), kept) and torch.equal(X, before)


def test_a_default_device_is_no_matter(fast: SparseModule) -> None:
    expected = fast(X)
    with torch.device("meta"):
        assert torch.equal(fast(X), expected)


def test_it_runs_among_compiled_code(fast: SparseModule) -> None:
    compiled = torch.compile(nn.Sequential(fast, nn.Softmax(1)).eval(), backend="aot_eager")
    assert torch.allclose(compiled(X), fast(X).softmax(1))


def test_not_a_number_stays_one(fast: SparseModule) -> None:
    x = X.clone()
    x[0, 0, 3, 3] = torch.nan
    assert bool(fast(x)[0].isnan().all()) and torch.equal(fast(x)[1], fast(X)[1])


def test_an_output_may_take_part_in_a_gradient(fast: SparseModule) -> None:
    y = fast(X.clone().requires_grad_())
    assert not y.requires_grad and not y.is_inference()
    head = nn.Linear(10, 1)
    head(y).sum().backward()
    assert head.weight.grad is not None and torch.allclose(head.weight.grad, y.sum(0, keepdim=True))


def test_wrong_inputs(fast: SparseModule) -> None:
    with pytest.raises(TypeError, match="keyword arguments are not supported by a converted model: x"):
        fast(x=X)
    with pytest.raises(
        TypeError, match=r"inputs: expected 1 positional argument\(s\), got 2|expected 1 tensors, got 2"
    ):
        fast(X, X)
    with pytest.raises(
        TypeError, match=r"inputs: expected 1 positional argument\(s\), got 0|expected 1 tensors, got 0"
    ):
        fast()
    with pytest.raises(TypeError, match=r"inputs\[0\]: expected a torch.Tensor, got a list"):
        fast([X])
    with pytest.raises(TypeError, match=r"input 'x': expected a torch.Tensor, got ndarray"):
        fast(X.numpy())
    with pytest.raises(TypeError, match=r"input 'x': expected dtype float32, got torch.float64"):
        fast(X.double())
    with pytest.raises(ValueError, match=r"input 'x': expected a tensor on the CPU, got one on meta"):
        fast(X.to("meta"))
    with pytest.raises(ValueError, match=r"input 'x': expected 4 dimensions .*, got shape \(3, 32, 32\)"):
        fast(X[0])
    with pytest.raises(ValueError, match=r"input 'x': expected size 3 in dimension 1, got \(2, 2, 32, 32\)"):
        fast(X[:, :2])
    with pytest.raises(ValueError, match=r"extent 0 of \(0, 3, 32, 32\)"):
        fast(X[:0])
    assert fast(X).shape == (2, 10)  # none of them did harm


def test_wrong_arguments(model: nn.Module, fast: SparseModule) -> None:
    with pytest.raises(TypeError, match="model: is converted already"):
        sparseprune.convert(fast, X)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got function"):
        sparseprune.convert(lambda x: x, X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tune='maximum': expected 'measure' or 'fixed'"):
        sparseprune.convert(model, X, tune="maximum")  # type: ignore[arg-type]
    for gain in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"min_gain={gain} must be positive"):
            sparseprune.convert(model, X, min_gain=gain)
    with pytest.raises(TypeError, match="min_gain: expected a number, got str"):
        sparseprune.convert(model, X, min_gain="1")  # type: ignore[arg-type]
    for nothing, got in (((), "none"), ("x", "str"), ((1, 2.0, None), "int, float, NoneType")):
        with pytest.raises(ValueError, match=f"inputs: expected at least one torch.Tensor, got {got}"):
            sparseprune.convert(model, nothing)
    with pytest.raises(UnsupportedError, match=r"inputs\[0\]: is on the meta device"):
        sparseprune.convert(model, X.to("meta"))
    with pytest.raises(UnsupportedError, match="parameter 'weight' is on the meta device"):
        sparseprune.convert(nn.Linear(3, 3, device="meta"), torch.randn(2, 3))
    with pytest.raises(UnsupportedError, match=r"torch.float64"):
        sparseprune.convert(model, X.double())
    with pytest.raises(UnsupportedError, match=r"parameter 'weight' is torch.float64"):
        sparseprune.convert(nn.Linear(3, 3).double(), torch.randn(2, 3))


def test_an_unknown_operator_is_named_with_its_layer() -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort(1)[0]

    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 4, 3))
    model.add_module("odd", nn.Sequential(Sorted()))
    with pytest.warns(SparsepruneWarning, match=r"layer 'odd\.0'.*aten\.sort"):  # tests/test_segments.py has more
        fast = sparseprune.convert(model, X, tune="fixed")
    assert [segment.kind for segment in fast.report.segments] == ["native", "torch"]


# ---- a module among modules


def test_it_is_a_module_in_evaluation_mode(fast: SparseModule) -> None:
    with pytest.raises(SparsepruneError, match="cannot be trained"):
        fast.train()
    assert fast.eval() is fast and not fast.training
    outer = nn.Sequential(fast, nn.Softmax(1)).eval()
    assert torch.equal(outer(X), fast(X).softmax(1))


def test_deepcopy(fast: SparseModule, model: nn.Module) -> None:
    twin = copy.deepcopy(fast)
    assert twin is not fast and torch.equal(twin(X), fast(X)) and twin.report == fast.report
    later = copy.deepcopy(sparseprune.convert(model, tune="fixed"))
    assert torch.equal(later(X), fast(X))


def test_it_is_not_pickled(fast: SparseModule) -> None:
    with pytest.raises(SparsepruneError, match="save"):
        pickle.dumps(fast)


# ---- save and load


def test_load_gives_the_same_bits(model: nn.Module, fast: SparseModule, tmp_path: Path) -> None:
    tuned = sparseprune.convert(model, X, min_gain=1e-9)
    for name, module in (("fixed", fast), ("tuned", tuned)):
        path = tmp_path / f"{name}.spr"
        module.save(path)
        for loaded in (sparseprune.load(path), sparseprune.load(str(path))):
            assert torch.equal(loaded(X), module(X)) and torch.equal(loaded(X[:1]), module(X[:1]))
        program = sparseprune.runtime.load(path)
        assert np.array_equal(program(X.numpy()), module(X).numpy())
        loaded.save(tmp_path / "again.spr")
        assert (tmp_path / "again.spr").read_bytes() == path.read_bytes()
    with pytest.raises(SparsepruneError, match="carries no report"):
        _ = loaded.report
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.spr", "fixed.spr", "tuned.spr"]


def test_a_file_is_as_small_as_the_non_zeros(fast: SparseModule, tmp_path: Path) -> None:
    fast.save(tmp_path / "model.spr")
    kept = sum(round(np.prod(layer.shape) * (1 - layer.sparsity)) for layer in fast.report.layers)
    rows = sum(layer.shape[0] for layer in fast.report.layers)
    assert (tmp_path / "model.spr").stat().st_size <= 6 * kept + 8 * rows + 20_000  # values, u16 columns, rows, graph


def test_save_replaces_whole_or_not_at_all(fast: SparseModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.spr"
    path.write_bytes(b"the old file")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # the disk is full half-way
    try:
        with pytest.raises(OSError):
            fast.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"the old file" and list(tmp_path.iterdir()) == [path]

    def fail(*_: Any) -> None:
        raise OSError("no rename")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="no rename"):
            fast.save(path)
    assert path.read_bytes() == b"the old file" and list(tmp_path.iterdir()) == [path]
    fast.save(path)
    assert torch.equal(sparseprune.load(path)(X), fast(X)) and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        fast.save(tmp_path / "no folder" / "model.spr")


def test_load_of_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sparseprune.load(tmp_path / "none.spr")
    for content in (b"", b"not a program", b"\x08" + b"\0" * 7 + b"{}      "):
        (tmp_path / "bad.spr").write_bytes(content)
        with pytest.raises(sparseprune.FormatError):
            sparseprune.load(tmp_path / "bad.spr")


def test_numbers_too_small_for_their_digits_are_no_error() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(self.layer(x) * 1e-23, (x * 1e-23).transpose(-1, -2))

    fast = sparseprune.convert(Tiny().eval(), X[:, 0, :5, :8])
    assert fast(X[:, 0, :5, :8]).abs().max() < 1e-44
