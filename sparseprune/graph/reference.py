"""The graph in float64 torch, operator by operator: the oracle, and a bound on what float32 may differ from it.

The bound counts roundings. With eps = 2^-23 (`finfo(float32).eps`, twice the unit roundoff), a sum of n products in
any order, with or without fused multiply-add, is off by at most n·eps·Σ|w·x|; bias, residual and final rounding add a
few to n. The factor two left in eps also covers the single rounding of each folded weight, so a folded layer is within
its bound of the layer and batch norm in exact arithmetic too. An error that an operator's input has is carried along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

Arrays = Sequence["NDArray[Any] | Tensor"]


class _Value(NamedTuple):
    """A result, and a bound (same shape) on a float32 program's distance from it; None where no bound is wanted."""

    data: Tensor
    error: Tensor | None


@overload
def run_reference(
    graph: Graph, inputs: Arrays, dtype: torch.dtype = ..., *, bounds: Literal[False] = ...
) -> list[Tensor]: ...
@overload
def run_reference(
    graph: Graph, inputs: Arrays, dtype: torch.dtype = ..., *, bounds: Literal[True]
) -> tuple[list[Tensor], list[Tensor]]: ...
def run_reference(
    graph: Graph, inputs: Arrays, dtype: torch.dtype = torch.float64, *, bounds: bool = False
) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Runs `graph` on `inputs` (each of its input's shape), and returns its outputs, flat, in order.

    Args:
        dtype: What to compute in; the bounds are meant for float64.
        bounds: Also return, for each output, the largest |y32 - y| that a correct float32 program may show, by element.

    Raises:
        ValueError: Inputs that do not fit the graph's.
    """
    tensors = [torch.as_tensor(np.asarray(x) if isinstance(x, np.ndarray) else x).detach().to(dtype) for x in inputs]
    _check_inputs(graph.inputs, tensors)
    last = _last_reads(graph)
    values: list[_Value | None] = [_Value(x, torch.zeros_like(x) if bounds else None) for x in tensors]
    with torch.no_grad():
        for index, node in enumerate(graph.nodes):
            operands = [value for number in node.inputs if (value := values[number]) is not None]
            values.append(_OPS[node.op](graph, node, operands))
            for number in node.inputs:
                if last[number] == index:
                    values[number] = None  # a large network's planes need not all live at once
    results = [value for number in graph.outputs if (value := values[number]) is not None]
    if not bounds:
        return [value.data for value in results]
    return [value.data for value in results], [value.error for value in results if value.error is not None]


def _last_reads(graph: Graph) -> dict[int, int]:
    last = {number: index for index, node in enumerate(graph.nodes) for number in node.inputs}
    return last | {number: len(graph.nodes) for number in graph.outputs}


def _check_inputs(inputs: Sequence[Input], tensors: Sequence[Tensor]) -> None:
    if len(inputs) != len(tensors):
        raise ValueError(f"inputs: expected {len(inputs)}, got {len(tensors)}")
    sizes: dict[str, int] = {}
    for spec, tensor in zip(inputs, tensors, strict=True):
        expected = [sizes.setdefault(size, came) if isinstance(size, str) else size
                    for size, came in zip(spec.shape, tensor.shape, strict=False)]  # fmt: skip
        if len(spec.shape) != tensor.ndim or expected != list(tensor.shape):
            raise ValueError(f"input '{spec.name}': expected shape {spec.shape}, got {tuple(tensor.shape)}")


# ---- one-dimensional operators run as two-dimensional ones with H = 1, as the program has it


def _planes(node: Node, x: Tensor) -> Tensor:
    return x.unsqueeze(2) if node.attrs["dims"] == 1 else x


def _unplanes(node: Node, x: Tensor) -> Tensor:
    return x.squeeze(2) if node.attrs["dims"] == 1 else x


def _act(act: str, y: Tensor) -> Tensor:
    return {"none": lambda: y, "relu": lambda: F.relu(y), "relu6": lambda: F.relu6(y)}[act]()


def _layer(graph: Graph, node: Node, operands: list[_Value]) -> _Value:
    """conv and linear: act(w·x + bias + residual)."""
    x = operands[0]
    assert node.weight is not None
    weight = graph.weights[node.weight]
    w = torch.from_numpy(weight.dense).to(x.data.dtype)
    apply = _convolution(node) if node.op == "conv" else F.linear
    y = apply(x.data, w)
    offsets = [operand for operand in operands[1:]]
    if node.bias is not None:
        b = torch.from_numpy(graph.biases[node.bias]).to(y.dtype).reshape(-1, *[1] * (y.ndim - 2))
        offsets.append(_Value(b, torch.zeros_like(b)))
    data = sum((offset.data for offset in offsets), y)
    if x.error is None:
        return _Value(_act(node.act, data), None)
    # What the program multiplies is off already, so the magnitude of its products counts that too.
    magnitude, carried = apply(x.data.abs() + x.error, w.abs()), apply(x.error, w.abs())
    for offset in offsets:
        assert offset.error is not None
        magnitude = magnitude + offset.data.abs() + offset.error
        carried = carried + offset.error
    terms = torch.from_numpy(weight.kept_per_row + _SLACK).to(y.dtype).reshape(-1, *[1] * (y.ndim - 2))
    return _Value(_act(node.act, data), terms * EPS * magnitude + carried)


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


def _max_pool(graph: Graph, node: Node, operands: list[_Value]) -> _Value:
    a, padding = node.attrs, _symmetric(node)
    return _maximum(
        lambda x: F.max_pool2d(x, a["kernel"], a["stride"], padding, a["dilation"], a["ceil_mode"]), node, operands[0]
    )


def _avg_pool(graph: Graph, node: Node, operands: list[_Value]) -> _Value:
    a, padding = node.attrs, _symmetric(node)

    def run(x: Tensor) -> Tensor:
        divisor = a["divisor"] or None
        return F.avg_pool2d(x, a["kernel"], a["stride"], padding, a["ceil_mode"], a["count_include_pad"], divisor)

    return _mean(run, node, operands[0], a["kernel"][0] * a["kernel"][1])


def _adaptive_sizes(node: Node, x: Tensor) -> tuple[int, int]:
    height, width = node.attrs["output_size"]
    own = _planes(node, x).shape
    return height or own[2], width or own[3]


def _adaptive_avg_pool(graph: Graph, node: Node, operands: list[_Value]) -> _Value:
    x = operands[0]
    height, width = _adaptive_sizes(node, x.data)
    shape = _planes(node, x.data).shape
    # Windows of uneven splits overlap, and hold up to one more than the ceiling.
    terms = (-(-shape[2] // height) + 1) * (-(-shape[3] // width) + 1)
    return _mean(lambda t: F.adaptive_avg_pool2d(t, (height, width)), node, x, terms)


def _adaptive_max_pool(graph: Graph, node: Node, operands: list[_Value]) -> _Value:
    sizes = _adaptive_sizes(node, operands[0].data)

    def run(x: Tensor) -> Tensor:
        pooled: Tensor = F.adaptive_max_pool2d(x, sizes)
        return pooled

    return _maximum(run, node, operands[0])


def _add(graph: Graph, node: Node, operands: list[_Value]) -> _Value:
    a, b = operands
    total = a.data + b.data
    y = _act(node.act, total)
    if a.error is None or b.error is None:
        return _Value(y, None)
    carried = a.error + b.error
    return _Value(y, carried + EPS * (total.abs() + carried))


def _activation(graph: Graph, node: Node, operands: list[_Value]) -> _Value:
    return _Value(_act(node.act, operands[0].data), operands[0].error)  # 1-Lipschitz


def _flatten(graph: Graph, node: Node, operands: list[_Value]) -> _Value:
    data, error = operands[0]
    return _Value(data.flatten(1), None if error is None else error.flatten(1))


_OPS: dict[str, Callable[[Graph, Node, list[_Value]], _Value]] = {
    "conv": _layer,
    "linear": _layer,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "adaptive_avg_pool": _adaptive_avg_pool,
    "adaptive_max_pool": _adaptive_max_pool,
    "add": _add,
    "act": _activation,
    "flatten": _flatten,
}
