"""The graph in float64 torch, operator by operator: the oracle, and a bound on what float32 may differ from it.

The bound counts roundings. With eps = 2^-23 (`finfo(float32).eps`, twice the unit roundoff), a sum of n products in
any order, with or without fused multiply-add, is off by at most n·eps·Σ|w·x|; bias, residual and final rounding add a
few to n. The factor two left in eps also covers the single rounding of each folded weight, so a folded layer is within
its bound of the layer and batch norm in exact arithmetic too. An error that an operator's input has is carried along.

Beyond sums and products, an operator's own rounding is taken to be:

- of `exp`, `reciprocal`, `rsqrt` 8 eps |y|, of `sqrt`, `square`, a product or a slope eps |y|, of a quotient 4 eps |y|;
- of `sigmoid`, `tanh`, `hardsigmoid` 8 eps; of `silu`, `mish`, `gelu`, `hardswish` 8 eps |x|; of `elu` 8 eps |alpha|
  below 0; of `softplus` 8 eps max(1, y). Not tight where y is tiny, as no approximation of them promises that;
- of `softmax` eps p (n + 16 + (m - x) + Σ p (m - x)), m the maximum: the differences m - x are rounded once, and the
  exponential makes that a relative error; n for the sum;
- of norms what follows from n-term sums for the mean and then the variance of the differences from it (two passes);
- of bilinear `resize` eps (16 + 4 (H + W)) times the largest of the neighbours: the places of the samples are rounded;
- none where elements are moved or compared.

Carried errors are multiplied by the activation's largest slope (1.1 for `silu`, 1.13 for `gelu`, 1.5 for `hardswish`),
or where it has none, by how far the result moves when the input moves that much; a quotient by what may be 0 has no
bound. Every own rounding also allows a few of the smallest normal numbers, which may be flushed to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .ir import Graph, Input, Node

__all__ = ["EPS", "run_reference"]

EPS = 2.0**-23
_SLACK = 4  # bias, residual, the final rounding and the activation's store
_TINY = 4 * 2.0**-126

Arrays = Sequence["NDArray[Any] | Tensor"]


class _Value(NamedTuple):
    """A result, and a bound (same shape) on a float32 program's distance from it; None where no bound is wanted."""

    data: Tensor
    error: Tensor | None


class _Context(NamedTuple):
    """What operators use besides their operands."""

    graph: Graph
    dtype: torch.dtype
    bounds: bool

    def array(self, name: str) -> Tensor:
        return torch.from_numpy(self.graph.biases[name]).to(self.dtype)

    def exact(self, data: Tensor) -> _Value:
        return _Value(data, torch.zeros_like(data) if self.bounds else None)


@overload
def run_reference(
    graph: Graph,
    inputs: Arrays,
    dtype: torch.dtype = ...,
    *,
    bounds: Literal[False] = ...,
    sizes: Mapping[str, int] | None = ...,
) -> list[Tensor]: ...
@overload
def run_reference(
    graph: Graph,
    inputs: Arrays,
    dtype: torch.dtype = ...,
    *,
    bounds: Literal[True],
    sizes: Mapping[str, int] | None = ...,
) -> tuple[list[Tensor], list[Tensor]]: ...
def run_reference(
    graph: Graph,
    inputs: Arrays,
    dtype: torch.dtype = torch.float64,
    *,
    bounds: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Runs `graph` on `inputs` (each of its input's shape), and returns its outputs, flat, in order.

    Args:
        dtype: What to compute in; the bounds are meant for float64.
        sizes: Of names that no input of `graph` has: for a part of a program.
        bounds: Also return, for each output, the largest |y32 - y| that a correct float32 program may show, by element.

    Raises:
        ValueError: Inputs that do not fit the graph's.
    """
    tensors = [torch.as_tensor(np.asarray(x) if isinstance(x, np.ndarray) else x).detach().to(dtype) for x in inputs]
    known = {**(sizes or {}), **_check_inputs(graph.inputs, tensors)}
    context = _Context(graph, dtype, bounds)
    last = _last_reads(graph)
    values: list[_Value | None] = [_Value(x, torch.zeros_like(x) if bounds else None) for x in tensors]
    with torch.no_grad():
        for index, node in enumerate(graph.nodes):
            operands = [value for number in node.inputs if (value := values[number]) is not None]
            values.append(_OPS[node.op](context, _sized(node, known, operands), operands))
            for number in node.inputs:
                if last[number] == index:
                    values[number] = None  # a large network's planes need not all live at once
    results = [value for number in graph.outputs if (value := values[number]) is not None]
    if not bounds:
        return [value.data for value in results]
    errors = [value.error for value in results if value.error is not None]
    return [value.data for value in results], [error.nan_to_num(math.inf, math.inf) for error in errors]


def _last_reads(graph: Graph) -> dict[int, int]:
    last = {number: index for index, node in enumerate(graph.nodes) for number in node.inputs}
    return last | {number: len(graph.nodes) for number in graph.outputs}


def _sized(node: Node, names: Mapping[str, int], operands: list[_Value]) -> Node:
    """With the sizes of its attributes as numbers; -1 stays."""
    if node.op not in ("reshape", "expand"):
        return node
    own = operands[0].data.shape
    shape = [names[size] if isinstance(size, str) else own[-2 - size] if size < -1 else size
             for size in node.attrs["shape"]]  # fmt: skip
    return replace(node, attrs=node.attrs | {"shape": shape})


def _check_inputs(inputs: Sequence[Input], tensors: Sequence[Tensor]) -> dict[str, int]:
    """The sizes that have names."""
    if len(inputs) != len(tensors):
        raise ValueError(f"inputs: expected {len(inputs)}, got {len(tensors)}")
    sizes: dict[str, int] = {}
    for spec, tensor in zip(inputs, tensors, strict=True):
        expected = [sizes.setdefault(size, came) if isinstance(size, str) else size
                    for size, came in zip(spec.shape, tensor.shape, strict=False)]  # fmt: skip
        if len(spec.shape) != tensor.ndim or expected != list(tensor.shape):
            raise ValueError(f"input '{spec.name}': expected shape {spec.shape}, got {tuple(tensor.shape)}")
    return sizes


# ---- one-dimensional operators run as two-dimensional ones with H = 1, as the program has it


def _planes(node: Node, x: Tensor) -> Tensor:
    return x.unsqueeze(2) if node.attrs["dims"] == 1 else x


def _unplanes(node: Node, x: Tensor) -> Tensor:
    return x.squeeze(2) if node.attrs["dims"] == 1 else x


# ---- activations


def _hardsigmoid(x: Tensor) -> Tensor:
    return torch.clamp(x + 3, 0, 6) / 6


_ACTS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "none": lambda x, alpha, beta: x,
    "relu": lambda x, alpha, beta: F.relu(x),
    "relu6": lambda x, alpha, beta: F.relu6(x),
    "leaky_relu": lambda x, alpha, beta: torch.where(x > 0, x, alpha * x),
    "clamp": lambda x, alpha, beta: torch.clamp(x, alpha, beta),
    "hardsigmoid": lambda x, alpha, beta: _hardsigmoid(x),
    "hardswish": lambda x, alpha, beta: x * _hardsigmoid(x),
    "sigmoid": lambda x, alpha, beta: torch.sigmoid(x),
    "silu": lambda x, alpha, beta: F.silu(x),
    "tanh": lambda x, alpha, beta: torch.tanh(x),
    "elu": lambda x, alpha, beta: torch.where(x > 0, x, alpha * torch.expm1(x)),
    "gelu": lambda x, alpha, beta: F.gelu(x),
    "gelu_tanh": lambda x, alpha, beta: F.gelu(x, approximate="tanh"),
    "mish": lambda x, alpha, beta: F.mish(x),
    "softplus": lambda x, alpha, beta: F.softplus(x),
    "exp": lambda x, alpha, beta: torch.exp(x),
    "sqrt": lambda x, alpha, beta: torch.sqrt(x),
    "rsqrt": lambda x, alpha, beta: torch.rsqrt(x),
    "reciprocal": lambda x, alpha, beta: torch.reciprocal(x),
    "abs": lambda x, alpha, beta: x.abs(),
    "neg": lambda x, alpha, beta: -x,
    "square": lambda x, alpha, beta: x * x,
}

_EXACT = ("none", "relu", "relu6", "clamp", "abs", "neg")
_SLOPES = {"hardsigmoid": 1 / 6, "hardswish": 1.5, "sigmoid": 0.25, "silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13,
           "mish": 1.09}  # fmt: skip


def _activated(node: Node, x: Tensor, error: Tensor | None) -> _Value:
    """act(x), where what the program has instead of x is off by at most `error`."""
    act, alpha, beta = node.act, float(node.attrs.get("alpha", 0)), float(node.attrs.get("beta", 0))
    y = _ACTS[act](x, alpha, beta)
    if error is None or act in _EXACT:
        return _Value(y, error)
    return _Value(y, _carried(act, alpha, x, y, error) + _own_rounding(act, alpha, x, y) + _TINY)


def _carried(act: str, alpha: float, x: Tensor, y: Tensor, error: Tensor) -> Tensor:
    if act in ("leaky_relu", "elu"):
        return max(1.0, abs(alpha)) * error
    if act == "exp":
        return y * torch.expm1(error)
    if act == "square":
        return (2 * x.abs() + error) * error
    if act == "sqrt":
        return y - torch.sqrt(torch.clamp(x - error, min=0))  # concave: the lower side is farther
    if act in ("rsqrt", "reciprocal"):
        nearest = x - error if act == "rsqrt" else x.abs() - error
        moved = _ACTS[act](nearest, 0, 0) - y.abs()
        return torch.where(error == 0, error, torch.where(nearest > 0, moved, torch.full_like(y, math.inf)))
    return _SLOPES.get(act, 1.0) * error


def _own_rounding(act: str, alpha: float, x: Tensor, y: Tensor) -> Tensor:
    if act in ("sigmoid", "tanh", "hardsigmoid"):
        return torch.full_like(y, 8 * EPS)
    if act in ("silu", "mish", "gelu", "gelu_tanh", "hardswish"):
        return 8 * EPS * x.abs()
    if act == "elu":
        return torch.where(x > 0, torch.zeros_like(x), 8 * EPS * abs(alpha))
    if act == "softplus":
        return 8 * EPS * torch.clamp(y, min=1)
    return (8 if act in ("exp", "rsqrt", "reciprocal") else 1) * EPS * y.abs()


# ---- layers


def _layer(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    """conv and linear: act(w·x + bias + residual)."""
    x = operands[0]
    assert node.weight is not None
    weight = context.graph.weights[node.weight]
    w = torch.from_numpy(weight.dense).to(x.data.dtype)
    apply = _convolution(node) if node.op == "conv" else F.linear
    y = apply(x.data, w)
    offsets = [operand for operand in operands[1:]]
    if node.bias is not None:
        offsets.append(context.exact(context.array(node.bias).reshape(-1, *[1] * (y.ndim - 2))))
    data = sum((offset.data for offset in offsets), y)
    if x.error is None:
        return _activated(node, data, None)
    # What the program multiplies is off already, so the magnitude of its products counts that too.
    magnitude, carried = apply(x.data.abs() + x.error, w.abs()), apply(x.error, w.abs())
    for offset in offsets:
        assert offset.error is not None
        magnitude = magnitude + offset.data.abs() + offset.error
        carried = carried + offset.error
    terms = torch.from_numpy(weight.kept_per_row + _SLACK).to(y.dtype).reshape(-1, *[1] * (y.ndim - 2))
    return _activated(node, data, terms * EPS * magnitude + carried)


def _convolution(node: Node) -> Callable[[Tensor, Tensor], Tensor]:
    a = node.attrs
    top, bottom, left, right = a["padding"]

    def apply(x: Tensor, w: Tensor) -> Tensor:
        padded = F.pad(_planes(node, x), (left, right, top, bottom))
        y = F.conv2d(padded, _planes(node, w), None, a["stride"], 0, a["dilation"], a["groups"])
        return _unplanes(node, y)

    return apply


def _symmetric(node: Node) -> list[int]:
    top, bottom, left, right = node.attrs["padding"]
    if (top, left) != (bottom, right):
        raise ValueError(f"layer '{node.name}': expected symmetric pool padding, got {node.attrs['padding']}")
    return [top, left]


def _maximum(run: Callable[[Tensor], Tensor], node: Node, x: _Value) -> _Value:
    """A maximum of numbers that are each off by some is off by at most the most of these."""
    y = _unplanes(node, run(_planes(node, x.data)))
    return _Value(y, None if x.error is None else _unplanes(node, run(_planes(node, x.error))))


def _mean(run: Callable[[Tensor], Tensor], node: Node, x: _Value, terms: int) -> _Value:
    y = _unplanes(node, run(_planes(node, x.data)))
    if x.error is None:
        return _Value(y, None)
    magnitude = _unplanes(node, run(_planes(node, x.data.abs() + x.error)))
    return _Value(y, (terms + _SLACK) * EPS * magnitude + _unplanes(node, run(_planes(node, x.error))))


def _max_pool(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    a, padding = node.attrs, _symmetric(node)
    return _maximum(
        lambda x: F.max_pool2d(x, a["kernel"], a["stride"], padding, a["dilation"], a["ceil_mode"]), node, operands[0]
    )


def _avg_pool(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    a, padding = node.attrs, _symmetric(node)

    def run(x: Tensor) -> Tensor:
        divisor = a["divisor"] or None
        return F.avg_pool2d(x, a["kernel"], a["stride"], padding, a["ceil_mode"], a["count_include_pad"], divisor)

    return _mean(run, node, operands[0], a["kernel"][0] * a["kernel"][1])


def _adaptive_sizes(node: Node, x: Tensor) -> tuple[int, int]:
    height, width = node.attrs["output_size"]
    own = _planes(node, x).shape
    return height or own[2], width or own[3]


def _adaptive_avg_pool(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    x = operands[0]
    height, width = _adaptive_sizes(node, x.data)
    shape = _planes(node, x.data).shape
    # Windows of uneven splits overlap, and hold up to one more than the ceiling.
    terms = (-(-shape[2] // height) + 1) * (-(-shape[3] // width) + 1)
    return _mean(lambda t: F.adaptive_avg_pool2d(t, (height, width)), node, x, terms)


def _adaptive_max_pool(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    sizes = _adaptive_sizes(node, operands[0].data)

    def run(x: Tensor) -> Tensor:
        pooled: Tensor = F.adaptive_max_pool2d(x, sizes)
        return pooled

    return _maximum(run, node, operands[0])


# ---- element by element


def _arithmetic(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    (a, ea), (b, eb) = operands
    operators: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "maximum": torch.maximum,
        "minimum": torch.minimum,
    }  # fmt: skip
    y = operators[node.op](a, b)
    if ea is None or eb is None:
        return _activated(node, y, None)
    if node.op in ("maximum", "minimum"):
        return _activated(node, y, torch.maximum(*torch.broadcast_tensors(ea, eb)))  # type: ignore[no-untyped-call]
    if node.op == "mul":
        carried = a.abs() * eb + b.abs() * ea + ea * eb
    elif node.op == "div":
        least = b.abs() - eb
        carried = torch.where(least > 0, (ea + y.abs() * eb) / least, torch.full_like(y, math.inf))
        carried = torch.where((ea == 0) & (eb == 0), torch.zeros_like(y), carried)
    else:
        carried = ea + eb
    own = (4 if node.op == "div" else 1) * EPS * (y.abs() + carried)
    return _activated(node, y, carried + own + (_TINY if node.op in ("mul", "div") else 0))


def _activation(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    return _activated(node, *operands[0])


def _prelu(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    x, error = operands[0]
    assert node.scale is not None
    slope = context.array(node.scale).reshape(-1, *[1] * (x.ndim - 2))
    y = torch.where(x > 0, x, slope * x)
    return _Value(y, None if error is None else torch.clamp(slope.abs(), min=1) * error + EPS * y.abs() + _TINY)


# ---- movements: of the errors as of the elements


def _moved(run: Callable[[Node, Tensor], Tensor]) -> Callable[[_Context, Node, list[_Value]], _Value]:
    def moved(context: _Context, node: Node, operands: list[_Value]) -> _Value:
        data, error = operands[0]
        return _Value(run(node, data), None if error is None else run(node, error))

    return moved


def _slice(node: Node, x: Tensor) -> Tensor:
    places = range(x.shape[node.attrs["axis"]])[node.attrs["start"] : node.attrs["end"] : node.attrs["step"]]
    return x.index_select(node.attrs["axis"], torch.tensor(list(places)))


def _pixel_shuffle(node: Node, x: Tensor) -> Tensor:
    (rows, columns), (bottom, right) = node.attrs["factor"], node.attrs["crop"]
    batch, channels, height, width = x.shape
    x = x.reshape(batch, -1, rows, columns, height, width).permute(0, 1, 4, 2, 5, 3)
    height, width = height * rows, width * columns
    return x.reshape(batch, -1, height, width)[:, :, : height - bottom, : width - right]


def _channel_shuffle(node: Node, x: Tensor) -> Tensor:
    split: Tensor = x.reshape(x.shape[0], node.attrs["groups"], -1, *x.shape[2:])
    return split.transpose(1, 2).reshape(x.shape)


def _constant(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    assert node.bias is not None
    return context.exact(context.array(node.bias).reshape(node.attrs["shape"]))


def _concat(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    errors = [error for _, error in operands if error is not None]
    data = torch.cat([data for data, _ in operands], node.attrs["axis"])
    return _Value(data, torch.cat(errors, node.attrs["axis"]) if errors else None)


def _pad(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    x, error = operands[0]
    return _Value(_padded(node, x, node.attrs["value"]), None if error is None else _padded(node, error, 0.0))


def _padded(node: Node, x: Tensor, fill: float) -> Tensor:
    sides, mode = node.attrs["padding"], node.attrs["mode"]
    if mode == "constant":
        reverse = [side for axis in reversed(range(x.ndim)) for side in sides[2 * axis : 2 * axis + 2]]
        return F.pad(x, reverse, value=fill)
    for axis, size in enumerate(x.shape):
        places = torch.arange(-sides[2 * axis], size + sides[2 * axis + 1])
        if mode == "reflect":
            places = (size - 1) - ((size - 1) - places.abs()).abs()
        else:
            places = places.clamp(0, size - 1) if mode == "replicate" else places % size
        x = x.index_select(axis, places)
    return x


def _resize(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    x, error = operands[0]
    a = node.attrs
    like = operands[1].data.shape[2:] if len(operands) > 1 else (0, 0)
    sizes = [same or size or math.floor(own * scale)
             for same, size, own, scale in zip(like, a["size"], x.shape[2:], a["scale"], strict=True)]  # fmt: skip
    scales = [scale or None for scale in a["scale"]]

    def run(t: Tensor) -> Tensor:
        if a["mode"] == "nearest":
            return torch.ops.aten.upsample_nearest2d(t, sizes, *scales)  # type: ignore[no-any-return]
        return torch.ops.aten.upsample_bilinear2d(t, sizes, a["align_corners"], *scales)  # type: ignore[no-any-return]

    if error is None or a["mode"] == "nearest":
        return _Value(run(x), None if error is None else run(error))
    neighbours = F.max_pool2d(x.abs() + error, 3, 1, 1)
    return _Value(run(x), run(error) + EPS * (16 + 4 * sum(x.shape[2:])) * run(neighbours) + _TINY)


# ---- sums


def _reduce(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    x, error = operands[0]
    kind, how = node.attrs["kind"], {"dim": node.attrs["axes"], "keepdim": node.attrs["keepdim"]}
    kinds: dict[str, Any] = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax, "min": torch.amin}
    y = kinds[kind](x, **how)
    if error is None:
        return _Value(y, None)
    if kind in ("max", "min"):
        return _Value(y, torch.amax(error, **how))
    run = kinds[kind]
    terms = math.prod(x.shape[axis] for axis in node.attrs["axes"])
    return _Value(y, (terms + _SLACK) * EPS * run(x.abs() + error, **how) + run(error, **how))


def _matmul(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    (a, ea), (b, eb) = operands
    if node.attrs["transpose_b"]:
        b, eb = b.mT, None if eb is None else eb.mT
    if ea is None or eb is None:
        return _Value(a @ b, None)
    magnitude = (a.abs() + ea) @ (b.abs() + eb)
    return _Value(a @ b, (a.shape[-1] + _SLACK) * EPS * magnitude + a.abs() @ eb + ea @ (b.abs() + eb) + _TINY)


def _softmax(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    x, error = operands[0]
    axis = node.attrs["axis"]
    p = torch.softmax(x, axis)
    if error is None:
        return _Value(p, None)
    depth = x.amax(axis, keepdim=True) - x
    own = EPS * p * (x.shape[axis] + 16 + depth + (p * depth).sum(axis, keepdim=True))
    # The most is where this one is as large as it may be and all others as small, the least the other way.
    top = (x + error).amax(axis, keepdim=True)
    high, low = torch.exp(x + error - top), torch.exp(x - error - top)
    most = high / (low.sum(axis, keepdim=True) - low + high)
    least = low / (high.sum(axis, keepdim=True) - high + low)
    moved = torch.maximum(most - p, p - least).nan_to_num(1.0)
    return _Value(p, moved + own + _TINY)


def _normalized(x: Tensor, error: Tensor | None, axes: list[int], eps: float) -> _Value:
    """(x - mean) / sqrt(variance + eps) over these dimensions, before scale and bias."""
    count = math.prod(x.shape[axis] for axis in axes)
    how = {"dim": axes, "keepdim": True}

    def mean(t: Tensor) -> Tensor:
        return t.mean(**how)  # type: ignore[call-overload, no-any-return]

    centered = x - mean(x)
    variance = mean(centered * centered)
    inverse = torch.rsqrt(variance + eps)
    if error is None:
        return _Value(centered * inverse, None)
    off = mean(error) + (count + 2) * EPS * mean(x.abs() + error)
    off = error + off + EPS * (centered.abs() + error + off)
    spread = mean((2 * centered.abs() + off) * off) + (count + _SLACK) * EPS * mean((centered.abs() + off) ** 2)
    least = variance + eps - spread
    moved = torch.where(least > 0, torch.rsqrt(least) - inverse, torch.full_like(inverse, math.inf)) + 8 * EPS * inverse
    result = centered * inverse
    return _Value(result, off * (inverse + moved) + centered.abs() * moved + 2 * EPS * result.abs() + _TINY)


def _scaled(context: _Context, node: Node, x: _Value, shape: Sequence[int]) -> _Value:
    data, error = x
    scale = context.array(node.scale).reshape(shape) if node.scale is not None else torch.ones((), dtype=data.dtype)
    bias = context.array(node.bias).reshape(shape) if node.bias is not None else torch.zeros((), dtype=data.dtype)
    y = data * scale + bias
    if error is None:
        return _Value(y, None)
    return _Value(y, error * scale.abs() + 2 * EPS * ((data.abs() + error) * scale.abs() + bias.abs()) + _TINY)


def _layer_norm(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    x, error = operands[0]
    axes = list(range(x.ndim - node.attrs["axes"], x.ndim))
    return _scaled(context, node, _normalized(x, error, axes, node.attrs["eps"]), x.shape[axes[0] :])


def _group_norm(context: _Context, node: Node, operands: list[_Value]) -> _Value:
    x, error = operands[0]
    split = (x.shape[0], node.attrs["groups"], -1)
    y = _normalized(x.reshape(split), None if error is None else error.reshape(split), [2], node.attrs["eps"])
    whole = _Value(y.data.reshape(x.shape), None if y.error is None else y.error.reshape(x.shape))
    return _scaled(context, node, whole, (-1, *[1] * (x.ndim - 2)))


_OPS: dict[str, Callable[[_Context, Node, list[_Value]], _Value]] = {
    "conv": _layer,
    "linear": _layer,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "adaptive_avg_pool": _adaptive_avg_pool,
    "adaptive_max_pool": _adaptive_max_pool,
    **dict.fromkeys(("add", "sub", "mul", "div", "maximum", "minimum"), _arithmetic),
    "act": _activation,
    "prelu": _prelu,
    "constant": _constant,
    "flatten": _moved(lambda node, x: x.flatten(1)),
    "reshape": _moved(lambda node, x: x.reshape(node.attrs["shape"])),
    "permute": _moved(lambda node, x: x.permute(node.attrs["axes"])),
    "expand": _moved(lambda node, x: x.expand(node.attrs["shape"])),
    "slice": _moved(_slice),
    "index_select": _moved(lambda node, x: x.index_select(node.attrs["axis"], torch.tensor(node.attrs["index"]))),
    "roll": _moved(lambda node, x: x.roll(node.attrs["shift"], node.attrs["axis"])),
    "pixel_shuffle": _moved(_pixel_shuffle),
    "channel_shuffle": _moved(_channel_shuffle),
    "concat": _concat,
    "pad": _pad,
    "resize": _resize,
    "reduce": _reduce,
    "matmul": _matmul,
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
}
