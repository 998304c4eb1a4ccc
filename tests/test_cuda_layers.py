"""The CUDA path. What needs a device skips without one; choosing, packing and errors are tested wherever that goes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import sparseprune
from sparseprune import BlockCSR, CudaError, cuda_layers, ops
from sparseprune.cuda_layers import Activation, CudaLayer, Window, choose, output_shape, two_of_four

BUILT = importlib.util.find_spec("sparseprune._cuda") is not None
DEVICE = BUILT and torch.cuda.is_available()
needs_extension = pytest.mark.skipif(not BUILT, reason="sparseprune was built without its CUDA kernels")
needs_device = pytest.mark.skipif(not DEVICE, reason="no CUDA device, or no CUDA kernels")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fixed(times: dict[str, float]) -> tuple[dict[str, Callable[[], str]], Callable[[Callable[[], Any]], float]]:
    """Candidates, and a timer that gives these times."""
    return {name: partial(str, name) for name in times}, lambda call: times[call()]


# ---- choosing ----


def test_the_fastest_runs() -> None:
    choice = choose(*fixed({"dense": 3.0, "spmm/1x1/4": 1.0, "blocks/32/half": 2.0}))
    assert choice.name == "spmm/1x1/4" and choice.times_ms["dense"] == 3.0
    assert choice.reason == "3.00 times dense, fastest of 3 timed"


def test_dense_runs_where_it_is_fastest() -> None:
    choice = choose(*fixed({"dense": 1.0, "gemv": 1.5, "spmm/1x1/1": 4.0}))
    assert choice.name == "dense" and choice.reason == "dense is fastest; gemv takes 1.50 times as long"


def test_a_gain_below_min_gain_is_none() -> None:
    candidates, timer = fixed({"dense": 1.04, "gemv": 1.0})
    assert choose(candidates, timer, 1.05).name == "dense"
    assert "min_gain is 1.05" in choose(candidates, timer, 1.05).reason
    assert choose(candidates, timer, 1.0).name == "gemv"


def test_nothing_is_timed_where_there_is_one_way() -> None:
    def timer(call: Callable[[], Any]) -> float:
        raise AssertionError("timed")

    choice = choose({"dense": lambda: None}, timer)
    assert choice.name == "dense" and choice.times_ms == {}


def test_dense_is_always_a_candidate() -> None:
    with pytest.raises(ValueError, match="'dense' among them, got \\['gemv'\\]"):
        choose(*fixed({"gemv": 1.0}))


def test_two_of_four() -> None:
    assert two_of_four(np.array([[1, 0, 2, 0, 0, 0, 0, 0]], np.float32))
    assert not two_of_four(np.array([[1, 1, 2, 0, 0, 0, 0, 0]], np.float32))
    assert not two_of_four(np.array([[1, 0, 2, 0, 0, 0]], np.float32))


@pytest.mark.parametrize("window", [Window(), Window((2, 1), (1, 2), (1, 2), 2)])
def test_output_shape(window: Window) -> None:
    x, w = torch.zeros(2, 4, 9, 11), torch.zeros(6, 4 // window.groups, 3, 3)
    y = functional.conv2d(x, w, None, window.stride, window.padding, window.dilation, window.groups)
    assert output_shape(tuple(x.shape), tuple(w.shape), window) == tuple(y.shape)


ACTS = (Activation(), Activation("relu"), Activation("leaky_relu", 0.1), Activation("clamp", 0, 6))


@pytest.mark.parametrize("act", ACTS)
def test_activations(act: Activation) -> None:
    x = torch.tensor([-2.0, 0.5, 9.0])
    expected = {"none": x, "relu": x.relu(), "leaky_relu": functional.leaky_relu(x, 0.1), "clamp": x.clamp(0, 6)}
    assert torch.equal(act.apply(x), expected[act.kind])


# ---- packing: needs the extension, no device ----


def pruned(shape: tuple[int, ...], density: float, rows: int = 1, columns: int = 1) -> BlockCSR:
    """Whole blocks of `rows` x `columns` input channels of a tap."""
    r = np.random.default_rng(1)
    places = (-(-shape[0] // rows), -(-shape[1] // columns), *shape[2:])
    kept = (r.random(places) < density).repeat(rows, 0).repeat(columns, 1)[: shape[0], : shape[1]]
    return BlockCSR.from_dense(np.where(kept, r.standard_normal(shape), 0).astype(np.float32))


def named(weight: BlockCSR, x: Tensor, window: Window | None = None, tf32: bool = False) -> set[str]:
    module = importlib.import_module("sparseprune._cuda")
    arrays = weight.crow_indices, weight.col_indices, weight.masks, weight.values
    native = module.Weight(list(weight.shape), weight.block_shape, *arrays)
    return {name for name, _ in cuda_layers.kernels(native, x, window or Window(), tf32, 132, 227 << 10)}


@needs_extension
def test_which_kernels_are_tried() -> None:
    conv, same = torch.zeros(2, 64, 14, 14), Window(padding=(1, 1))
    core = {"spmm/1x1/1", "spmm/1x1/4"}
    assert named(pruned((64, 64, 3, 3), 0.1), conv, same) == core
    assert named(pruned((64, 64, 3, 3), 0.1, 4), conv, same) == core | {"spmm/4x1/1", "spmm/4x1/4"}
    found = named(pruned((64, 64, 3, 3), 0.2, 32, 32), conv.bfloat16(), same)
    assert found >= core | {"blocks/32/bfloat", "vectors/32/bfloat"} and "blocks/16/bfloat" not in found
    assert "vectors/16/tf32x3" in named(pruned((64, 64, 3, 3), 0.1, 16), conv, same)
    assert "vectors/8/tf32" in named(pruned((64, 64, 3, 3), 0.1, 8), conv, same, tf32=True)
    assert named(pruned((64, 32), 0.1), torch.zeros(4, 32)) == core | {"gemv"}
    assert named(pruned((64, 32), 0.1), torch.zeros(5, 32)) == core
    assert named(pruned((64, 70000), 0.001), torch.zeros(1, 70000)) == core  # beyond 16-bit columns
    assert named(pruned((64, 32, 3, 3), 0.3, 32, 32), conv, Window(groups=2)) >= core


@needs_extension
@pytest.mark.skipif(DEVICE, reason="there is a device")
def test_without_a_driver_the_first_use_says_so() -> None:
    with pytest.raises(CudaError, match="driver"):
        cuda_layers.extension()


@needs_extension
def test_a_driver_too_old() -> None:
    module = importlib.import_module("sparseprune._cuda")
    assert "too old: it supports CUDA 12.8" in module.driver_problem(12080, 13000)
    assert module.driver_problem(13020, 13000) == ""


@pytest.mark.skipif(BUILT, reason="it was built with them")
def test_without_the_extension_the_first_use_says_so() -> None:
    with pytest.raises(CudaError, match="without its CUDA kernels.*SPARSEPRUNE_CUDA=ON"):
        cuda_layers.extension()


# ---- on a device ----

LAYERS = [  # weight, blocks (rows, columns), x, window
    ((96, 70), (1, 1), (1, 70), Window()),
    ((96, 70), (1, 1), (3, 70), Window()),
    ((130, 64), (4, 1), (77, 64), Window()),
    ((128, 64), (32, 32), (77, 64), Window()),
    ((40, 24, 3, 3), (1, 1), (2, 24, 13, 15), Window((1, 1), (1, 1))),
    ((40, 12, 3, 2), (1, 1), (2, 24, 13, 15), Window((2, 1), (1, 0), (1, 2), 2)),
    ((64, 32, 3, 3), (16, 16), (3, 32, 14, 14), Window((1, 1), (1, 1))),
    ((64, 32, 3, 3), (32, 32), (2, 32, 15, 9), Window((2, 2), (1, 1))),
    ((72, 40, 1, 1), (8, 1), (2, 40, 7, 7), Window()),
    ((72, 40, 3, 3), (16, 1), (1, 40, 7, 7), Window((1, 1), (2, 2), (2, 2))),
    ((33, 8, 3, 3), (1, 1), (2, 8, 1, 1), Window((1, 1), (1, 1))),
]


def exact(weight: BlockCSR, x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """The layer in float64, and of absolute values."""
    w, x = torch.from_numpy(weight.to_dense()).double().to(x.device), x.double()

    def run(w: Tensor, x: Tensor) -> Tensor:
        if w.dim() == 2:
            return functional.linear(x, w)
        return functional.conv2d(x, w, None, window.stride, window.padding, window.dilation, window.groups)

    return run(w, x), run(w.abs(), x.abs())


def check(name: str, y: Tensor, weight: BlockCSR, x: Tensor, window: Window, bias: Tensor, residual: Tensor) -> None:
    """Within the CPU's bound, with the rounding of 16-bit weights, inputs of TF32, and the output added."""
    expected, magnitude = exact(weight, x, window)
    shape = (-1, *(1,) * (expected.dim() - 2))
    b, r = bias.double().reshape(shape), residual.double()
    expected, magnitude = expected + b + r, magnitude + b.abs() + r.abs()
    unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[x.dtype]
    kept = int((torch.from_numpy(weight.to_dense()).flatten(1) != 0).sum(1).max())
    each = (kept + 4) * 2.0**-23 + (unit if x.dtype != torch.float32 else 0)
    each += 2.0**-10 if name.endswith("/tf32") else 2.0**-20 if name.endswith("/tf32x3") else 0
    worst = ((y.double() - expected).abs() - (each * magnitude + unit * expected.abs() + 1e-37)).max()
    assert worst <= 0, (name, float(worst))


@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape, block, x_shape, window", LAYERS)
def test_every_kernel(
    shape: tuple[int, ...],
    block: tuple[int, int],
    x_shape: tuple[int, ...],
    window: Window,
    last: bool,
    dtype: torch.dtype,
) -> None:
    weight = pruned(shape, 0.3, *block)
    x = torch.randn(x_shape, device="cuda", dtype=dtype)
    if last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(shape[0], device="cuda", dtype=dtype)
    layer = CudaLayer(weight, window)
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        calls = layer.candidates(x)
        residual = torch.randn(output_shape(x_shape, shape, window), device="cuda", dtype=dtype)
        for name, call in calls.items():
            if name not in ("dense", "2:4"):
                check(name, call(x, bias, residual, Activation()), weight, x, window, bias, residual)
                relu = call(x, bias, residual, Activation("relu"))
                assert torch.equal(relu, call(x, bias, residual, Activation()).relu())
                assert cuda_layers.is_channels_last(relu) == cuda_layers.is_channels_last(x) or relu.shape[2:] == (1, 1)
    assert len(calls) > 2


@needs_device
def test_empty_rows_and_no_weights() -> None:
    x = torch.randn(2, 16, 9, 9, device="cuda")
    dense = torch.randn(24, 16, 3, 3)
    dense[::2] = 0
    for w in (dense, torch.zeros(24, 16, 3, 3)):
        weight = BlockCSR.from_dense(w)
        for name, call in CudaLayer(weight, Window()).candidates(x).items():
            expected = functional.conv2d(x.double(), w.double().cuda()).float()
            assert torch.allclose(call(x, None, None, Activation()), expected, atol=1e-2 if name == "dense" else 1e-4)


@needs_device
def test_strides_dtypes_and_devices_follow_the_input() -> None:
    layer = sparseprune.nn.SparseConv2d.from_conv2d(torch.nn.Conv2d(16, 32, 3, padding=1)).cuda()
    x = torch.randn(2, 14, 16, 9, device="cuda").transpose(1, 2)
    expected = functional.conv2d(x, layer.weight.cuda(), layer.bias, padding=1)
    assert torch.allclose(layer(x), expected, atol=1e-2)
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.allclose(last, expected, atol=1e-2)
    assert layer.half()(x.half()).dtype == torch.float16
    for index in range(torch.cuda.device_count()):
        assert layer.float().to(f"cuda:{index}")(x.to(f"cuda:{index}")).device.index == index
    assert layer.cpu()(x.cpu()).device.type == "cpu"


@needs_device
def test_graph_capture_replays_and_refuses_the_unmeasured() -> None:
    weight, bias = pruned((256, 128), 0.05), torch.randn(256, device="cuda")
    x = torch.randn(2, 128, device="cuda")
    expected = ops.linear(x, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear(x, weight, bias)
    x.copy_(2 * x)
    graph.replay()
    assert torch.allclose(y - bias, 2 * (expected - bias), atol=1e-3)
    with pytest.raises(CudaError, match="never measured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.linear(x[:1], weight, bias)


@needs_device
def test_opcheck() -> None:
    x, weight = torch.randn(2, 16, 9, 9, device="cuda"), pruned((24, 16, 3, 3), 0.2)
    arrays = weight.crow_indices, weight.col_indices, weight.masks.view("int64"), weight.values
    tensors = [torch.from_numpy(a) for a in arrays]
    args = (x, *tensors, list(weight.shape), list(weight.block_shape), None, [1, 1], [1, 1], [1, 1], 1)
    torch.library.opcheck(torch.ops.sparseprune.conv2d, args)


@needs_device
def test_wrong_dtypes_and_devices() -> None:
    weight, x = pruned((8, 16), 0.5), torch.randn(2, 16, device="cuda")
    with pytest.raises(TypeError, match="x: expected dtype float32, float16 or bfloat16, got torch.float64"):
        ops.linear(x.double(), weight)
    with pytest.raises(TypeError, match="bias: expected dtype float16"):
        ops.linear(x.half(), weight, torch.zeros(8, device="cuda"))
    with pytest.raises(ValueError, match="bias: expected a tensor on cuda:0, where x is, got one on cpu"):
        ops.linear(x, weight, torch.zeros(8))
