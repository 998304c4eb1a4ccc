"""The ATen operators that are known: a table from name to handler.

A handler takes the lowering, the fx node and the node's arguments by schema name (defaults filled in), emits operators
of ours and returns the number of the result's value. In-place variants share the handler: `lower.py` does the writing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import UnsupportedError
from .naming import describe
from .shapes import ShapeDependentError, known_equal, known_same

if TYPE_CHECKING:
    from .lower import Lowering

__all__ = ["COPIES", "TABLE", "VIEWS", "bind"]

Arguments = dict[str, Any]
Handler = Callable[["Lowering", fx.Node, Arguments], int]

# Names of the same memory. What comes of them is decided where they are read, by shape.
_SURE = ("view", "_unsafe_view", "squeeze", "unsqueeze", "unflatten", "detach", "detach_", "alias")
_UNSURE = ("flatten", "reshape", "contiguous", "to")
VIEWS = dict.fromkeys(_SURE, "view") | dict.fromkeys(_UNSURE, "perhaps a copy")
COPIES = {"clone", "_to_copy", "lift_fresh_copy"}


def bind(node: fx.Node) -> Arguments:
    """The arguments by schema name, with the schema's defaults."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound: Arguments = {}
    for index, argument in enumerate(node.target._schema.arguments):
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        bound[argument.name] = given
    return bound


def _refuse(node: fx.Node, why: str) -> UnsupportedError:
    return UnsupportedError(f"{describe(node)}: {why}")


def _pair(ctx: Lowering, node: fx.Node, values: Any, dims: int, neutral: int) -> list[int]:
    """Two numbers `[h, w]`; a single one counts for each dimension, the h of one-dimensional operators is neutral."""
    numbers = [ctx.scalar(item) for item in (values if isinstance(values, list | tuple) else [values])]
    if not all(isinstance(number, int) for number in numbers):
        raise ShapeDependentError(f"{describe(node)}: a size that depends on the input's size is not supported")
    numbers = numbers * dims if len(numbers) == 1 else numbers
    return [neutral] * (2 - dims) + [int(number) for number in numbers]  # type: ignore[call-overload]


def _spatial_input(ctx: Lowering, node: fx.Node, item: Any, dims: int) -> int:
    value = ctx.value(item, node)
    if (rank := len(ctx.shapes[value])) != dims + 2:
        raise _refuse(node, f"expected an input of {dims + 2} dimensions (batched), got {rank}")
    return value


# ---- convolution, linear, batch norm


def _convolution(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    weight = ctx.constant(a["weight"], node, "weight")
    dims = weight.ndim - 2
    if a.get("transposed") or dims not in (1, 2):
        raise _refuse(node, "only 1-D and 2-D convolutions that are not transposed are supported")
    dilation = _pair(ctx, node, a["dilation"], dims, 1)
    padding = a["padding"]
    if padding == "valid":
        padding = [0, 0, 0, 0]
    elif padding == "same":
        # torch pads the odd element of an even kernel on the right.
        total = [d * (k - 1) for d, k in zip(dilation, [1, *weight.shape[2:]][-2:], strict=True)]
        padding = [side for t in total for side in (t // 2, t - t // 2)]
    else:
        padding = [side for side in _pair(ctx, node, padding, dims, 0) for _ in range(2)]
    attrs = {"dims": dims, "stride": _pair(ctx, node, a["stride"], dims, 1), "padding": padding,
             "dilation": dilation, "groups": int(a["groups"])}  # fmt: skip
    inputs = [_spatial_input(ctx, node, a["input"], dims)]
    return ctx.emit(node, "conv", inputs, attrs=attrs, weight=ctx.add_weight(weight), bias=_bias(ctx, node, a["bias"]))


def _bias(ctx: Lowering, node: fx.Node, item: Any) -> str | None:
    return None if item is None else ctx.add_bias(ctx.constant(item, node, "bias"))


def _matrix(ctx: Lowering, node: fx.Node, item: Any, weight: Tensor, bias: Any) -> int:
    """x `(N, F)`, weight `(out, F)`."""
    rank = len(item.meta["val"].shape) if isinstance(item, fx.Node) else 0
    if rank != 2 or weight.ndim != 2:
        raise _refuse(node, f"expected an input of 2 dimensions (N, F) and a weight of 2, got {rank} and {weight.ndim}")
    value = ctx.value(item, node)
    return ctx.emit(node, "linear", [value], weight=ctx.add_weight(weight), bias=_bias(ctx, node, bias))


def _linear(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    return _matrix(ctx, node, a["input"], ctx.constant(a["weight"], node, "weight"), a["bias"])


def _matmul(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    other = ctx.constant(a["mat2"] if "mat2" in a else a["other"], node, "right operand")
    return _matrix(ctx, node, a["self"], other.mT if other.ndim == 2 else other, None)


def _addmm(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if a["alpha"] != 1 or a["beta"] != 1 or len(ctx.constant(a["self"], node, "bias").shape) != 1:
        raise _refuse(node, "expected alpha=1, beta=1 and a bias of 1 dimension")
    return _matrix(ctx, node, a["mat1"], ctx.constant(a["mat2"], node, "weight").mT, a["self"])


def _batch_norm(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if a.get("training") or a["running_mean"] is None or a["running_var"] is None:
        raise _refuse(node, "batch statistics (track_running_stats=False) are not supported, only running ones")
    mean, var = (ctx.constant(a[name], node, name).double() for name in ("running_mean", "running_var"))
    gamma, beta = (None if a[n] is None else ctx.constant(a[n], node, n).double() for n in ("weight", "bias"))
    scale = torch.rsqrt(var + a["eps"]) * (1.0 if gamma is None else gamma)
    return _scale_shift(ctx, node, a["input"], scale, (0.0 if beta is None else beta) - mean * scale)


def _scale_shift(ctx: Lowering, node: fx.Node, item: Any, scale: Tensor, shift: Tensor) -> int:
    """x·scale + shift for each channel, both float64 `(C,)`; the passes fold it into a neighbour."""
    value = ctx.value(item, node)
    rank = len(ctx.shapes[value])
    if rank not in (2, 3, 4):
        raise _refuse(node, f"expected an input of 2 to 4 dimensions, got {rank}")
    arrays = {"scale": scale.detach().cpu().numpy().copy(), "shift": shift.detach().cpu().numpy().copy()}
    return ctx.emit(node, "scale_shift", [value], attrs={"dims": rank - 2}, **arrays)


# ---- element by element


def _activation(ctx: Lowering, node: fx.Node, item: Any, low: Any, high: Any) -> int:
    low, high = ctx.scalar(low), ctx.scalar(high)
    numbers = all(bound is None or isinstance(bound, int | float) for bound in (low, high))
    if not numbers or low != 0 or high not in (None, 6, float("inf")):
        raise _refuse(node, f"clamping to [{low}, {high}] is not supported, only [0, ∞) and [0, 6]")
    act = "relu6" if high == 6 else "relu"
    return ctx.emit(node, "act", [ctx.value(item, node)], attrs={"act": act})


def _act(low: str | float, high: str | float | None) -> Handler:
    """A handler for a clamp; a bound that is a string names an argument."""

    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        bounds = [a[bound] if isinstance(bound, str) else bound for bound in (low, high)]
        return _activation(ctx, node, a["self"], *bounds)

    return handler


def _arithmetic(name: str) -> Handler:
    """add, sub, mul, div: of a value with a constant for each channel; add of two values."""

    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        left, right, alpha = a["self"], a["other"], ctx.scalar(a.get("alpha", 1))
        if a.get("rounding_mode") is not None or not isinstance(alpha, int | float):
            raise _refuse(node, f"rounding_mode={a.get('rounding_mode')} or alpha={alpha} is not supported")
        if ctx.is_value(left) and ctx.is_value(right):
            return _add_values(ctx, node, name, alpha)
        swapped = not ctx.is_value(left)
        if swapped and (name not in ("add", "mul") or alpha != 1):
            raise _refuse(node, "a constant as left operand is supported for add and mul only")
        value, constant = (right, left) if swapped else (left, right)
        channels = _per_channel(ctx, node, value, constant)
        one, zero = np.ones_like(channels), np.zeros_like(channels)
        scale, shift = {"add": (one, channels * alpha), "sub": (one, -channels * alpha), "mul": (channels, zero),
                        "div": (one / channels, zero)}[name]  # fmt: skip
        return _scale_shift(ctx, node, value, torch.from_numpy(scale), torch.from_numpy(shift))

    return handler


def _add_values(ctx: Lowering, node: fx.Node, name: str, alpha: object) -> int:
    if name != "add" or alpha != 1:
        raise _refuse(node, "two computed tensors can only be added, with alpha=1")
    left, right = (ctx.value(item, node) for item in node.args[:2])
    if not known_same(ctx.shapes[left], ctx.shapes[right]):
        shapes = f"{tuple(ctx.shapes[left])} and {tuple(ctx.shapes[right])}"
        raise ShapeDependentError(f"{describe(node)}: expected equal shapes, got {shapes}")
    return ctx.emit(node, "add", [left, right], attrs={})


def _per_channel(ctx: Lowering, node: fx.Node, value: fx.Node, constant: Any) -> np.ndarray[Any, Any]:
    """A scalar, or a tensor that broadcasts along dimension 1 only, as float64 `(C,)`."""
    shape = value.meta["val"].shape
    number = ctx.scalar(constant)
    if isinstance(number, Tensor):
        tensor = number if number.ndim == 0 else ctx.constant(constant, node, "operand")
        sizes = [1] * (len(shape) - tensor.ndim) + list(tensor.shape)
        fits = len(sizes) == len(shape) and all(size == 1 for dim, size in enumerate(sizes) if dim != 1)
    else:
        tensor, fits = torch.tensor(number), isinstance(number, int | float)
    if not fits or len(shape) < 2 or not isinstance(shape[1], int):
        raise _refuse(node, "its constant operand is not a number or one number for each channel")
    return np.asarray(tensor.detach().double().cpu().reshape(-1).expand(shape[1]).clone().numpy())


def _dropout(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if a["train"] and a["p"] != 0:
        raise _refuse(node, "drops at inference too (training=True)")
    return ctx.value(a["input"], node)


# ---- pooling


def _pool(op: str, dims: int) -> Handler:
    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        kernel = _pair(ctx, node, a["kernel_size"], dims, 1)
        stride = _pair(ctx, node, a["stride"], dims, 1) if a["stride"] else kernel
        padding = [side for side in _pair(ctx, node, a["padding"], dims, 0) for _ in range(2)]
        attrs = {"dims": dims, "kernel": kernel, "stride": stride, "padding": padding}
        if op == "max_pool":
            attrs |= {"dilation": _pair(ctx, node, a["dilation"], dims, 1), "ceil_mode": bool(a["ceil_mode"])}
        else:
            attrs |= {"ceil_mode": bool(a["ceil_mode"]), "count_include_pad": bool(a["count_include_pad"]),
                      "divisor": a.get("divisor_override") or 0}  # fmt: skip
        return ctx.emit(node, op, [_spatial_input(ctx, node, a["self"], dims)], attrs=attrs)

    return handler


def _adaptive(op: str, dims: int) -> Handler:
    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        value = _spatial_input(ctx, node, a["self"], dims)
        # A symbolic size that is the input's own is `None` in the module: keep.
        asked = [ctx.scalar(size) for size in a["output_size"]]
        sizes = zip(asked, ctx.shapes[value][2:], strict=True)
        kept = [0 if not isinstance(size, int) and known_equal(size, own) else size for size, own in sizes]
        attrs = {"dims": dims, "output_size": _pair(ctx, node, kept, dims, 1)}
        return ctx.emit(node, op, [value], attrs=attrs)

    return handler


def _reduce(op: str) -> Handler:
    """mean or amax over every spatial dimension: an adaptive pooling to one place, flattened unless `keepdim`."""

    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        item = a["self"]
        shape = item.meta["val"].shape
        value, own = ctx.underlying(item)
        dims = sorted(int(dim) % len(shape) for dim in a.get("dim") or ())
        # (N, C, H·W), a view of (N, C, H, W), has the same mean.
        if len(shape) < 3 or dims != list(range(2, len(shape))) or not known_same(shape[:2], own[:2]) or len(own) > 4:
            raise _refuse(node, "only a reduction over all spatial dimensions (dimension 2 and up) is supported")
        attrs = {"dims": len(own) - 2, "output_size": [1, 1]}
        return ctx.emit(node, op, [value], [*own[:2], *[1] * (len(own) - 2)], attrs=attrs)

    return handler


TABLE: dict[str, Handler] = {
    "conv1d": _convolution,
    "conv2d": _convolution,
    "convolution": _convolution,
    "linear": _linear,
    "mm": _matmul,
    "matmul": _matmul,
    "addmm": _addmm,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "relu": _act(0, None),
    "relu6": _act(0, 6),
    "hardtanh": _act("min_val", "max_val"),
    "clamp": _act("min", "max"),
    "clamp_min": _act("min", None),
    "add": _arithmetic("add"),
    "sub": _arithmetic("sub"),
    "mul": _arithmetic("mul"),
    "div": _arithmetic("div"),
    "dropout": _dropout,
    "alpha_dropout": _dropout,
    "feature_dropout": _dropout,
    "feature_alpha_dropout": _dropout,
    "max_pool1d": _pool("max_pool", 1),
    "max_pool2d": _pool("max_pool", 2),
    "max_pool2d_with_indices": _pool("max_pool", 2),
    "avg_pool1d": _pool("avg_pool", 1),
    "avg_pool2d": _pool("avg_pool", 2),
    "adaptive_avg_pool1d": _adaptive("adaptive_avg_pool", 1),
    "adaptive_avg_pool2d": _adaptive("adaptive_avg_pool", 2),
    "_adaptive_avg_pool2d": _adaptive("adaptive_avg_pool", 2),
    "adaptive_max_pool1d": _adaptive("adaptive_max_pool", 1),
    "adaptive_max_pool2d": _adaptive("adaptive_max_pool", 2),
    "mean": _reduce("adaptive_avg_pool"),
    "amax": _reduce("adaptive_max_pool"),
}
