"""The single operators: against torch in float64, inside torch.compile and torch.export, and their errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from old_torch import traced_weights
from torch import Tensor, nn

from sparseprune import BlockCSR, ops

EPS = float(np.finfo(np.float32).eps)


def sparse_weight(*shape: int, density: float = 0.3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    weight[torch.rand(*shape, generator=generator) >= density] = 0
    return weight


KERNEL = BlockCSR.from_dense(sparse_weight(4, 3, 3, 3))
MATRIX = BlockCSR.from_dense(sparse_weight(4, 6))


def check(y: Tensor, apply: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """|y - y64| <= (kept + 4) eps (sum |w x| + |b|), with the kept weights of the row."""
    y64 = apply(x.double(), weight.double(), None if bias is None else bias.double())
    magnitude = apply(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    kept = weight.flatten(1).count_nonzero(1).double()
    kept = kept if weight.dim() == 2 else kept[:, None, None]
    assert y.dtype == torch.float32 and y.shape == y64.shape and y.is_contiguous()
    assert torch.all((y.double() - y64).abs() <= (kept + 4) * EPS * magnitude)


# ---- numbers


@st.composite
def convolutions(draw: Callable[..., Any]) -> dict[str, Any]:
    pair = st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3)))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    depthwise = draw(st.integers(0, 4)) == 0
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    padding = draw(st.one_of(st.integers(0, 3), st.tuples(st.integers(0, 3), st.integers(0, 3))))
    dilation = draw(pair)
    d, p = (v if isinstance(v, tuple) else (v, v) for v in (dilation, padding))
    size = [draw(st.integers(max(1, d[a] * (kernel[a] - 1) + 1 - 2 * p[a]), 12)) for a in (0, 1)]
    if depthwise:
        groups = draw(st.integers(1, 9))
    outputs = groups * draw(st.integers(1, 4))
    return {
        "x": (draw(st.integers(1, 3)), groups * (1 if depthwise else draw(st.integers(1, 4))), *size),
        "weight": (outputs, *kernel),
        "bias": draw(st.booleans()),
        "density": draw(st.sampled_from([0.0, 0.05, 0.3, 1.0])),
        "block_rows": draw(st.sampled_from([r for r in (1, 2, 4) if outputs % r == 0])),
        "options": {"stride": draw(pair), "padding": padding, "dilation": dilation, "groups": groups},
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=120, deadline=None)
@given(convolutions())
def test_conv2d(case: dict[str, Any]) -> None:
    options, seed = case["options"], case["seed"]
    x = torch.randn(case["x"], generator=torch.Generator().manual_seed(seed))
    outputs, kh, kw = case["weight"]
    weight = sparse_weight(outputs, x.shape[1] // options["groups"], kh, kw, density=case["density"], seed=seed)
    bias = torch.linspace(-1, 1, outputs) if case["bias"] else None
    y = ops.conv2d(x, BlockCSR.from_dense(weight, block_shape=(case["block_rows"], 1)), bias, **options)
    check(y, lambda x, w, b: F.conv2d(x, w, b, **options), x, weight, bias)


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_linear(lead: list[int], inputs: int, outputs: int, density: float, bias: bool, seed: int) -> None:
    x = torch.randn(*lead, inputs, generator=torch.Generator().manual_seed(seed))
    weight = sparse_weight(outputs, inputs, density=density, seed=seed)
    b = torch.linspace(-1, 1, outputs) if bias else None
    check(ops.linear(x, BlockCSR.from_dense(weight), b), F.linear, x, weight, b)


def test_an_empty_batch() -> None:
    weight, bias = BlockCSR.from_dense(sparse_weight(5, 7)), torch.ones(5)
    assert ops.linear(torch.zeros(0, 7), weight, bias).shape == (0, 5)
    assert ops.linear(torch.zeros(3, 0, 7), weight, bias).shape == (3, 0, 5)


def test_inputs_need_not_be_contiguous() -> None:
    weight = sparse_weight(6, 4, 3, 3)
    packed = BlockCSR.from_dense(weight)
    x = torch.randn(2, 4, 9, 8)
    expected = ops.conv2d(x, packed)
    assert torch.equal(ops.conv2d(x.contiguous(memory_format=torch.channels_last), packed), expected)
    assert torch.equal(ops.conv2d(x.transpose(2, 3).contiguous().transpose(2, 3), packed), expected)
    wide = torch.randn(3, 14)
    matrix = BlockCSR.from_dense(sparse_weight(5, 7))
    assert torch.equal(ops.linear(wide[:, ::2], matrix), ops.linear(wide[:, ::2].contiguous(), matrix))


def test_outputs_are_fresh_and_inputs_unchanged() -> None:
    x, weight = torch.randn(1, 3, 6, 6), BlockCSR.from_dense(sparse_weight(4, 3, 3, 3))
    before = x.clone()
    first = ops.conv2d(x, weight)
    kept = first.clone()
    first.fill_(7)
    assert torch.equal(ops.conv2d(x, weight), kept) and torch.equal(x, before)


def test_a_default_device_is_no_matter() -> None:
    x, weight = torch.randn(2, 6), BlockCSR.from_dense(sparse_weight(4, 6))
    with torch.device("meta"):
        y = ops.linear(x, weight)
    assert torch.equal(y, ops.linear(x, weight))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=traced_weights)])
def test_outputs_carry_no_gradient(compiled: bool) -> None:
    weight, bias = BlockCSR.from_dense(sparse_weight(4, 6)), torch.ones(4, requires_grad=True)
    x = torch.randn(2, 6, requires_grad=True)
    call: Any = torch.compile(ops.linear, backend="aot_eager") if compiled else ops.linear
    y = call(x, weight, bias)
    assert not y.requires_grad and y.grad_fn is None
    check(y, F.linear, x.detach(), torch.from_numpy(weight.to_dense()), bias.detach())


# ---- torch.library, torch.compile, torch.export


@pytest.mark.parametrize("bias", [None, torch.ones(4)])
def test_opcheck(bias: Tensor | None) -> None:
    matrix = ops._tensors(BlockCSR.from_dense(sparse_weight(4, 6), block_shape=(2, 2)))
    torch.library.opcheck(torch.ops.sparseprune.linear.default, (torch.randn(2, 3, 6), *matrix, bias))
    kernel = ops._tensors(BlockCSR.from_dense(sparse_weight(4, 3, 3, 2)))
    attributes = [1, 2], [2, 1], [1, 2], 1
    torch.library.opcheck(torch.ops.sparseprune.conv2d.default, (torch.randn(2, 3, 8, 9), *kernel, bias, *attributes))


class Network(nn.Module):
    """A convolution and a linear layer on sparse weights, with ordinary operators around them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.kernel = BlockCSR.from_dense(sparse_weight(8, 3, 3, 3, seed=seed), block_shape=(4, 1))
        self.matrix = BlockCSR.from_dense(sparse_weight(5, 8 * 4 * 4, seed=seed))
        self.bias = nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = ops.conv2d(x + 1, self.kernel, stride=2, padding=1).relu()
        return ops.linear(y.flatten(1), self.matrix, self.bias) * 2


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@traced_weights
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    torch.compiler.reset()
    model = Network().eval()
    with torch.no_grad():
        expected = model(X)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for _ in range(2):
            assert torch.allclose(compiled(X), expected, rtol=1e-6, atol=1e-6)
        model.kernel, model.matrix = Network(seed=1).kernel, Network(seed=1).matrix
        assert torch.allclose(compiled(X), model(X), rtol=1e-6, atol=1e-6)  # no weight is baked in
        assert not torch.allclose(model(X), expected)


def test_the_registration_layer_is_bypassed_in_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_weight", lambda *_: pytest.fail("went through torch.library"))
    Network()(X)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=traced_weights)])
def test_export(strict: bool, tmp_path: Any) -> None:
    model = Network().eval()
    exported = torch.export.export(model, (X,), strict=strict)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert "sparseprune.conv2d.default" in targets and "sparseprune.linear.default" in targets
    torch.export.save(exported, tmp_path / "model.pt2")
    for program in (exported, torch.export.load(tmp_path / "model.pt2")):
        y = program.module()(X)
        assert type(y) is Tensor and torch.equal(y, model(X))


@traced_weights
def test_export_with_a_dynamic_batch() -> None:
    model = Network().eval()
    exported = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(exported(x), model(x))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=traced_weights)])
def test_an_exported_weight_is_packed_once(strict: bool) -> None:
    ops._weights.clear()
    program = torch.export.export(Network().eval(), (X,), strict=strict).module()
    program(X)
    packed = [weight for weight, _ in ops._weights.values()]
    assert len(packed) == 2
    program(X)
    assert [weight for weight, _ in ops._weights.values()] == packed  # the very same objects


def test_packed_weights_are_let_go_with_their_tensors() -> None:
    ops._weights.clear()
    x, (crow, col, masks, values, *shapes) = torch.ones(1, 6), ops._tensors(MATRIX)
    memory = values.numpy().copy()
    for factor in (1, 2, 3):  # another tensor in a dead one's memory
        memory[:] = factor * values.numpy()
        tensor = torch.from_numpy(memory)
        y = torch.ops.sparseprune.linear(x, crow, col, masks, tensor, *shapes, None)
        assert torch.allclose(y, factor * ops.linear(x, MATRIX))
        del tensor
        assert len(ops._weights) == 1


def test_a_written_tensor_is_packed_again() -> None:
    x, tensors = torch.randn(3, 6), ops._tensors(BlockCSR.from_dense(sparse_weight(4, 6)))
    first = torch.ops.sparseprune.linear(x, *tensors, None)
    tensors[3] *= 2
    assert torch.equal(torch.ops.sparseprune.linear(x, *tensors, None), 2 * first)


def test_a_weight_is_copied_deeply() -> None:
    model = Network()
    model(X)  # with a program in it
    assert torch.equal(copy.deepcopy(model)(X), model(X))


# ---- errors


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "weight: expected a BlockCSR, got Tensor; see BlockCSR.from_dense", {"weight": torch.ones(4, 6)}),
        (ValueError, r"weight: expected 2 dimensions, got shape \(4, 3, 3, 3\)", {"weight": KERNEL}),
        (TypeError, "x: expected a torch.Tensor, got ndarray", {"x": np.ones((2, 6), np.float32)}),
        (TypeError, "x: expected dtype float32, got torch.float64", {"x": torch.ones(2, 6).double()}),
        (ValueError, "x: expected .* or a CUDA device, got one on meta", {"x": torch.ones(2, 6, device="meta")}),
        (ValueError, r"x: expected shape \(\.\.\., 6\), got \(2, 5\)", {"x": torch.ones(2, 5)}),
        (ValueError, r"x: expected shape \(\.\.\., 6\), got \(\)", {"x": torch.tensor(1.0)}),
        (TypeError, "bias: expected a torch.Tensor, got list", {"bias": [0.0] * 4}),
        (TypeError, "bias: expected dtype float32, got torch.float16", {"bias": torch.ones(4).half()}),
        (ValueError, r"bias: expected shape \(4,\), got \(6,\)", {"bias": torch.ones(6)}),
        (ValueError, r"bias: expected shape \(4,\), got \(1, 4\)", {"bias": torch.ones(1, 4)}),
    ],
)
def test_errors_of_linear(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        ops.linear(**{"x": torch.ones(2, 6), "weight": MATRIX, **arguments})


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"weight: expected 4 dimensions, got shape \(4, 6\)", {"weight": MATRIX}),
        (ValueError, r"x: expected shape \(N, C, H, W\), got \(3, 8, 8\)", {"x": torch.ones(3, 8, 8)}),
        (ValueError, r"expected size 3 in dimension 1, got \(1, 5, 8, 8\)", {"x": torch.ones(1, 5, 8, 8)}),
        (ValueError, "groups=3 does not divide out_channels=4", {"groups": 3}),
        (ValueError, "groups=0 ", {"groups": 0}),
        (ValueError, r"stride: expected an int or two of them, got \(1, 2, 3\)", {"stride": (1, 2, 3)}),
        (ValueError, "stride=0 must be in", {"stride": 0}),
        (ValueError, "dilation=-1 must be in", {"dilation": (1, -1)}),
        (ValueError, "padding=-1 must be in", {"padding": -1}),
        (ValueError, "a window of 11 does not fit 8 padded by 0 and 0 along h", {"dilation": 5}),
    ],
)
def test_errors_of_conv2d(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        ops.conv2d(**{"x": torch.ones(1, 3, 8, 8), "weight": KERNEL, **arguments})
