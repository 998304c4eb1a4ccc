"""The ATen operators that are known: a table from name to handler, and what it becomes.

A handler takes the lowering, the fx node and the node's arguments by schema name (defaults filled in), emits operators
of ours and returns the number of the result's value, or one for each result. In-place variants share the handler:
`lower.py` does the writing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import UnsupportedError
from .naming import describe
from .shapes import ShapeDependentError, known_equal, known_same, ratio, static

if TYPE_CHECKING:
    from .lower import Lowering

__all__ = ["COPIES", "FACTORIES", "IDENTITIES", "TABLE", "VIEWS", "Entry", "bind", "operator_table"]

Arguments = dict[str, Any]
Handler = Callable[["Lowering", fx.Node, Arguments], "int | list[int]"]


@dataclass(frozen=True)
class Entry:
    """A known ATen operator: what lowers it, what it becomes in the program, and what of it is not supported."""

    handler: Handler
    becomes: str
    limits: str = ""


# Names of the same memory, its elements in the same order. What comes of them is decided where they are read, by shape.
_SURE = ("view", "_unsafe_view", "view_as", "squeeze", "unsqueeze", "unflatten", "detach", "detach_", "alias")
_UNSURE = ("flatten", "reshape", "reshape_as", "ravel", "contiguous", "to", "type_as")
VIEWS = dict.fromkeys(_SURE, "view") | dict.fromkeys(_UNSURE, "perhaps a copy")
COPIES = {"clone", "_to_copy", "lift_fresh_copy"}
# What depends on the first argument's shape only.
FACTORIES = {"new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like"}
# These may give back their input itself.
IDENTITIES = {"dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"}

_TO_THE_END = 2**31 - 1
_MASKED = -(2.0**126)  # e to this is 0, and adding to it stays finite


def bind(node: fx.Node) -> Arguments:
    """The arguments by schema name, with the schema's defaults."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound: Arguments = {}
    for index, argument in enumerate(node.target._schema.arguments):
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        bound[argument.name] = given
    return bound


def operator_table() -> list[tuple[str, str, str]]:
    """`(ATen operator, program operators, limits)` of every operator that is lowered, sorted; for documentation."""
    rows = [(name, entry.becomes, entry.limits) for name, entry in TABLE.items()]
    rows += [(name, "reshape, or nothing", "") for name in VIEWS]
    rows += [(name, "nothing", "") for name in COPIES]
    return sorted(rows, key=lambda row: row[0].lstrip("_"))


def _refuse(node: fx.Node, why: str) -> UnsupportedError:
    return UnsupportedError(f"{describe(node)}: {why}")


def _input(a: Arguments) -> Any:
    return a["self"] if "self" in a else a["input"]


def _number(ctx: Lowering, node: fx.Node, item: Any) -> float:
    """A number that is known now; an int stays one."""
    found = ctx.scalar(item)
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    if isinstance(found, torch.SymInt | torch.SymFloat):
        raise ShapeDependentError(f"{describe(node)}: computes with the number {found}, which depends on sizes")
    if not isinstance(found, int | float):
        raise _refuse(node, f"expected a number, got {item}")
    return found


def _integer(ctx: Lowering, node: fx.Node, item: Any) -> int:
    number = static(size) if isinstance(size := ctx.scalar(item), torch.SymInt) else size
    if number is None:
        raise ShapeDependentError(f"{describe(node)}: a size that depends on the input's size is not supported")
    if not isinstance(number, int):
        raise _refuse(node, f"expected an integer, got {item}")
    return number


def _integers(ctx: Lowering, node: fx.Node, items: Any) -> list[int]:
    return [_integer(ctx, node, item) for item in (items if isinstance(items, list | tuple) else [items])]


def _pair(ctx: Lowering, node: fx.Node, values: Any, dims: int, neutral: int) -> list[int]:
    """Two numbers `[h, w]`; a single one counts for each dimension, the h of one-dimensional operators is neutral."""
    numbers = _integers(ctx, node, values)
    numbers = numbers * dims if len(numbers) == 1 else numbers
    return [neutral] * (2 - dims) + numbers


def _axes(ctx: Lowering, value: int, dims: Any) -> list[int]:
    """Dimensions, counted from 0 and sorted; none given are all."""
    rank = len(ctx.shapes[value])
    dims = dims if isinstance(dims, list | tuple) else [dims] if dims is not None else []
    return sorted(int(dim) % rank for dim in dims) or list(range(rank))


def _spatial_input(ctx: Lowering, node: fx.Node, item: Any, dims: int) -> int:
    value = ctx.value(item, node)
    if (rank := len(ctx.shapes[value])) != dims + 2:
        raise _refuse(node, f"expected an input of {dims + 2} dimensions (batched), got {rank}")
    return value


def _with(shape: Sequence[Any], axis: int, size: Any) -> list[Any]:
    return [*shape[:axis], size, *shape[axis + 1 :]]


# ---- convolution


def _convolution(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    weight = ctx.constant(a["weight"], node, "weight")
    dims = weight.ndim - 2
    if dims not in (1, 2):
        raise _refuse(node, "only 1-D and 2-D convolutions are supported")
    if a.get("transposed"):
        return _transposed_convolution(ctx, node, a)
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


@dataclass(frozen=True)
class _Phases:
    """One axis of a transposed convolution of stride s as a convolution with s outputs a place, `y[s·q + r]`.

    `y[s·q + r]` is the sum over k of `x[q + t] w[k]`, `t = (r + p - k·d) / s`, of those k whose t is an integer.
    `taps` maps (r, k) to t - low, a place in a kernel of `size`.
    """

    taps: dict[tuple[int, int], int]
    size: int
    padding: tuple[int, int]
    crop: int
    places: int  # how many more outputs of the convolution than inputs

    @staticmethod
    def of(kernel: int, stride: int, padding: int, output_padding: int, dilation: int) -> _Phases:
        offsets = {(r, k): r + padding - k * dilation for r in range(stride) for k in range(kernel)}
        taps = {phase: offset // stride for phase, offset in offsets.items() if offset % stride == 0}
        longer = dilation * (kernel - 1) + output_padding + 1 - stride - 2 * padding  # len(y) - s·len(x)
        places = -(-longer // stride)
        # Zero taps at the ends keep the padding from being negative.
        low, high = min(0, *taps.values()), max(-places, *taps.values())
        taps = {phase: t - low for phase, t in taps.items()}
        return _Phases(taps, high - low + 1, (-low, high + places), stride * places - longer, places)


def _transposed_convolution(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    """A convolution that computes all s·s outputs of a place as channels, and a pixel shuffle."""
    weight = ctx.constant(a["weight"], node, "weight")
    dims, groups = weight.ndim - 2, int(a["groups"])
    kernel = [1, *weight.shape[2:]][-2:]
    stride = _pair(ctx, node, a["stride"], dims, 1)
    arguments = [_pair(ctx, node, a[name], dims, neutral)
                 for name, neutral in (("padding", 0), ("output_padding", 0), ("dilation", 1))]  # fmt: skip
    rows, columns = (_Phases.of(*axis) for axis in zip(kernel, stride, *arguments, strict=True))
    value = _spatial_input(ctx, node, a["input"], dims)
    shape = ctx.shapes[value]

    outputs = weight.shape[1] * groups
    w = weight.detach().reshape(groups, -1, weight.shape[1], *kernel).transpose(1, 2)
    dense = w.new_zeros(groups, w.shape[1], *stride, w.shape[2], rows.size, columns.size)
    for ((i, k), t), ((j, m), u) in itertools.product(rows.taps.items(), columns.taps.items()):
        dense[:, :, i, j, :, t, u] = w[..., k, m]
    factor = stride[0] * stride[1]
    dense = dense.reshape(outputs * factor, -1, *(rows.size, columns.size)[-dims:])
    bias = None if a["bias"] is None else ctx.constant(a["bias"], node, "bias").repeat_interleave(factor)

    attrs = {"dims": dims, "stride": [1, 1], "padding": [*rows.padding, *columns.padding], "dilation": [1, 1],
             "groups": groups}  # fmt: skip
    places = [size + phases.places for size, phases in zip(shape[2:], (rows, columns)[-dims:], strict=True)]
    phased = [shape[0], outputs * factor, *places]
    result = ctx.emit(node, "conv", [value], phased, attrs=attrs, weight=ctx.add_weight(dense),
                      bias=None if bias is None else ctx.add_bias(bias))  # fmt: skip
    if factor == 1:
        return result
    if dims == 1:
        result = ctx.reshape(result, [*phased[:2], 1, phased[2]], node)
    full = list(node.meta["val"].shape)
    shuffle = {"factor": stride, "crop": [rows.crop, columns.crop]}
    result = ctx.emit(node, "pixel_shuffle", [result], [*full[:2], *[1] * (2 - dims), *full[2:]], helper=True,
                      attrs=shuffle)  # fmt: skip
    return ctx.reshape(result, full, node)


# ---- products


def _linear(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if not ctx.is_value(a["weight"]):
        return _matrix(ctx, node, ctx.value(a["input"], node), ctx.constant(a["weight"], node, "weight"), a["bias"])
    shape = node.meta["val"].shape
    product = _product(ctx, node, ctx.value(a["input"], node), ctx.value(a["weight"], node), shape, transpose=True)
    return product if a["bias"] is None else _binary(ctx, node, "add", product, ctx.value(a["bias"], node), shape)


def _matrix(ctx: Lowering, node: fx.Node, value: int, weight: Tensor, bias: Any = None) -> int:
    """x `(…, F)`, weight `(out, F)`."""
    shape = ctx.shapes[value]
    if weight.ndim != 2:
        raise _refuse(node, f"expected a weight of 2 dimensions, got {weight.ndim}")
    full = [*shape[:-1], weight.shape[0]]
    if len(shape) == 4 and _is_image(ctx, value, full):
        image = ctx.permute(value, [0, 3, 1, 2], node)
        attrs = {"dims": 2, "stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1}
        result = ctx.emit(node, "conv", [image], [full[0], *full[3:], *full[1:3]], attrs=attrs,
                          weight=ctx.add_weight(weight[:, :, None, None]), bias=_bias(ctx, node, bias))  # fmt: skip
        return ctx.permute(result, [0, 2, 3, 1], node)
    flat = ctx.reshape(value, [math.prod(shape[:-1]), shape[-1]], node)
    result = ctx.emit(node, "linear", [flat], [ctx.shapes[flat][0], weight.shape[0]], weight=ctx.add_weight(weight),
                      bias=_bias(ctx, node, bias))  # fmt: skip
    return ctx.reshape(result, full, node)


def _is_image(ctx: Lowering, value: int, full: Sequence[Any]) -> bool:
    """Whether (N, H, W, C) was (N, C, H, W) before, so that 1×1 convolutions need no reordering; or no reshape could
    restore `full`."""
    before = ctx.producer(value)
    if before is not None and before.op == "layer_norm":
        before = ctx.producer(before.inputs[0])
    last = before is not None and before.op == "permute" and before.attrs["axes"] == [0, 2, 3, 1]
    return last or ctx.symbols.encode(full, [math.prod(full[:-1]), full[-1]], infer=True) is None


def _matmul(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    return _multiply(ctx, node, a["self"], a["mat2"] if "mat2" in a else a["other"])


def _multiply(ctx: Lowering, node: fx.Node, left: Any, right: Any) -> int:
    if ctx.is_value(left) and not ctx.is_value(right):
        constant = ctx.constant(right, node, "right operand")
        if constant.ndim == 2:
            return _matrix(ctx, node, ctx.value(left, node), constant.mT)
    a, b = ctx.value(left, node), ctx.value(right, node)
    vectors = len(ctx.shapes[a]) == 1, len(ctx.shapes[b]) == 1
    if vectors[0]:
        a = ctx.reshape(a, [1, ctx.shapes[a][0]], node)
    if vectors[1]:
        b = ctx.reshape(b, [ctx.shapes[b][0], 1], node)
    lead = _broadcast(node, ctx.shapes[a][:-2], ctx.shapes[b][:-2])
    rows, columns = ctx.shapes[a][-2], ctx.shapes[b][-1]
    result = _product(ctx, node, a, b, [*lead, rows, columns])
    return ctx.reshape(result, [*lead, *[rows] * (not vectors[0]), *[columns] * (not vectors[1])], node)


def _product(ctx: Lowering, node: fx.Node, a: int, b: int, shape: Sequence[Any], transpose: bool = False) -> int:
    """Where b is a transposed matrix, what it was transposed from is read."""
    before = ctx.producer(b)
    rank = len(ctx.shapes[b])
    if before is not None and before.op == "permute" and before.attrs["axes"] == [*range(rank - 2), rank - 1, rank - 2]:
        b, transpose = before.inputs[0], not transpose
    return ctx.emit(node, "matmul", [a, b], shape, attrs={"transpose_b": transpose})


def _addmm(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    """beta·self + alpha·(mat1 @ mat2)"""
    left, right = (a["mat1"], a["mat2"]) if "mat1" in a else (a["batch1"], a["batch2"])
    alpha, beta = _number(ctx, node, a["alpha"]), _number(ctx, node, a["beta"])
    bias = None if ctx.is_value(a["self"]) else ctx.constant(a["self"], node, "bias")
    plain = alpha == beta == 1 and bias is not None and bias.ndim == 1 and ctx.is_value(left)
    if plain and not ctx.is_value(right) and (weight := ctx.constant(right, node, "weight")).ndim == 2:
        if bias is not None and bias.shape[0] == weight.shape[1]:
            return _matrix(ctx, node, ctx.value(left, node), weight.mT, a["self"])
    product = _times(ctx, node, _multiply(ctx, node, left, right), alpha)
    return _binary(ctx, node, "add", product, _times(ctx, node, ctx.value(a["self"], node), beta))


def _attention(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    """softmax(q kᵀ·scale + mask) v"""
    if a["dropout_p"] or a.get("enable_gqa"):
        raise _refuse(node, f"dropout_p={a['dropout_p']} or enable_gqa={a.get('enable_gqa')} is not supported")
    q, k, v = (ctx.value(a[name], node) for name in ("query", "key", "value"))
    features = static(ctx.shapes[q][-1])
    if a["scale"] is None and features is None:
        raise ShapeDependentError(f"{describe(node)}: its scale depends on the size of the query")
    scale = 1 / math.sqrt(features or 1) if a["scale"] is None else _number(ctx, node, a["scale"])
    lead = _broadcast(node, ctx.shapes[q][:-2], ctx.shapes[k][:-2])
    shape = [*lead, ctx.shapes[q][-2], ctx.shapes[k][-2]]
    scores = _product(ctx, node, _times(ctx, node, q, scale), k, shape, transpose=True)
    if (mask := _attention_mask(ctx, node, a, shape)) is not None:
        scores = _binary(ctx, node, "add", scores, mask, shape)
    weights = ctx.emit(node, "softmax", [scores], shape, attrs={"axis": len(shape) - 1})
    return _product(ctx, node, weights, v, [*lead, shape[-2], ctx.shapes[v][-1]])


def _attention_mask(ctx: Lowering, node: fx.Node, a: Arguments, shape: Sequence[Any]) -> int | None:
    mask = a["attn_mask"]
    if a["is_causal"]:
        rows, columns = _integers(ctx, node, list(shape[-2:]))
        mask = torch.ones(rows, columns, dtype=torch.bool).tril()
    if mask is None or ctx.is_value(mask):
        return None if mask is None else ctx.value(mask, node)
    constant = ctx.scalar(mask)
    if isinstance(constant, Tensor) and constant.dtype == torch.bool:
        constant = torch.zeros(constant.shape).masked_fill(~constant.cpu(), _MASKED)
    return ctx.value(constant, node)


# ---- normalization


def _batch_norm(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if a.get("training") or a["running_mean"] is None or a["running_var"] is None:
        raise _refuse(node, "batch statistics (track_running_stats=False) are not supported, only running ones")
    mean, var = (ctx.constant(a[name], node, name).double() for name in ("running_mean", "running_var"))
    gamma, beta = (None if a[n] is None else ctx.constant(a[n], node, n).double() for n in ("weight", "bias"))
    scale = torch.rsqrt(var + a["eps"]) * (1.0 if gamma is None else gamma)
    gain, shift = scale, (0.0 if beta is None else beta) - mean * scale
    return _scale_shift(ctx, node, ctx.value(a["input"], node), _numpy(gain), _numpy(shift))


def _numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    return np.array(tensor.detach().cpu().numpy())


def _scale_shift(
    ctx: Lowering, node: fx.Node, value: int, gain: np.ndarray[Any, Any], shift: np.ndarray[Any, Any]
) -> int:
    """x·gain + shift for each channel, both float64 `(C,)`; the passes fold it into a neighbour."""
    rank = len(ctx.shapes[value])
    if rank not in (2, 3, 4):
        raise _refuse(node, f"expected an input of 2 to 4 dimensions, got {rank}")
    source = value
    behind = [source]  # shuffles move whole channels' places, so the factors may go before them
    while (before := ctx.producer(source)) is not None and before.op in ("reshape", "pixel_shuffle"):
        source = before.inputs[0]
        if before.op == "reshape" and not known_same(ctx.shapes[source][:2], ctx.shapes[behind[-1]][:2]):
            break
        behind.append(source)
    shuffles = [ctx.producer(item) for item in behind[:-1]]
    factors = [math.prod(item.attrs["factor"]) for item in shuffles if item is not None and item.op == "pixel_shuffle"]
    if not factors:
        behind = [value]
    gain, shift = (np.repeat(array, math.prod(factors)) for array in (gain, shift))
    result = behind[-1]
    shape = ctx.shapes[result]
    result = ctx.emit(node, "scale_shift", [result], shape, attrs={"dims": len(shape) - 2}, gain=gain, shift=shift)
    for item in reversed(behind[:-1]):
        result = ctx.again(item, result, node)
    return result


def _layer_norm(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value, axes = ctx.value(a["input"], node), len(a["normalized_shape"])
    shape, before = ctx.shapes[value], ctx.producer(value)
    if axes == 1 and before is not None and before.op == "reshape":
        # The rows are the same: the reshape may come after, and perhaps meet another.
        source = before.inputs[0]
        value = source if known_equal(ctx.shapes[source][-1], shape[-1]) else value
    result = ctx.emit(node, "layer_norm", [value], ctx.shapes[value], attrs={"axes": axes, "eps": float(a["eps"])},
                      scale=_bias(ctx, node, a["weight"]), bias=_bias(ctx, node, a["bias"]))  # fmt: skip
    return ctx.reshape(result, shape, node)


def _group_norm(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value = ctx.value(_input(a), node)
    groups = a.get("num_groups", a.get("group"))
    return _normalize_groups(ctx, node, value, _integer(ctx, node, groups), a)


def _instance_norm(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if not a["use_input_stats"]:
        return _batch_norm(ctx, node, a)
    value = ctx.value(a["input"], node)
    return _normalize_groups(ctx, node, value, _integer(ctx, node, ctx.shapes[value][1]), a)


def _normalize_groups(ctx: Lowering, node: fx.Node, value: int, groups: int, a: Arguments) -> int:
    return ctx.emit(node, "group_norm", [value], attrs={"groups": groups, "eps": float(a["eps"])},
                    scale=_bias(ctx, node, a["weight"]), bias=_bias(ctx, node, a["bias"]))  # fmt: skip


def _softmax(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value = ctx.value(a["self"], node)
    return ctx.emit(node, "softmax", [value], attrs={"axis": int(a["dim"]) % len(ctx.shapes[value])})


# ---- element by element


def _activate(ctx: Lowering, node: fx.Node, value: int, act: str, **numbers: float) -> int:
    """Before a movement of elements rather than after it, so that it meets what computes them."""
    before = ctx.producer(value)
    if before is not None and before.op in ("reshape", "flatten", "permute", "pixel_shuffle"):
        return ctx.again(value, _activate(ctx, node, before.inputs[0], act, **numbers), node)
    return ctx.emit(node, "act", [value], ctx.shapes[value], attrs={"act": act, **numbers})


def _act(*acts: str) -> Handler:
    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        value = ctx.value(_input(a), node)
        for act in acts:
            value = _activate(ctx, node, value, act)
        return value

    return handler


def _clamp(low: Any, high: Any) -> Handler:
    """A bound that is a string names an argument."""

    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        bounds = [a[bound] if isinstance(bound, str) else bound for bound in (low, high)]
        return _clamped(ctx, node, ctx.value(_input(a), node), *bounds)

    return handler


def _clamped(ctx: Lowering, node: fx.Node, value: int, low: Any, high: Any) -> int:
    if not any(_is_tensor(ctx, bound) for bound in (low, high)):
        # None and infinities bound nothing.
        least = -math.inf if low is None else float(_number(ctx, node, low))
        most = math.inf if high is None else float(_number(ctx, node, high))
        if least == 0 and most in (6, math.inf):
            return _activate(ctx, node, value, "relu6" if most == 6 else "relu")
        if math.isfinite(least) and math.isfinite(most):
            return _activate(ctx, node, value, "clamp", alpha=min(least, most), beta=most)  # torch: the upper one wins
        low, high = (bound if math.isfinite(bound) else None for bound in (least, most))
    for op, bound in (("maximum", low), ("minimum", high)):
        if bound is not None:
            value = _binary(ctx, node, op, value, ctx.value(bound, node))
    return value


def _is_tensor(ctx: Lowering, item: Any) -> bool:
    found = ctx.constants.get(item) if isinstance(item, fx.Node) else item
    return ctx.is_value(item) or (isinstance(found, Tensor) and found.numel() > 1)


def _leaky_relu(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    slope = float(_number(ctx, node, a["negative_slope"]))
    return _activate(ctx, node, ctx.value(a["self"], node), "leaky_relu", alpha=slope)


def _rrelu(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if a["training"]:
        raise _refuse(node, "draws random slopes (training=True)")
    slope = (_number(ctx, node, a["lower"]) + _number(ctx, node, a["upper"])) / 2
    return _activate(ctx, node, ctx.value(a["self"], node), "leaky_relu", alpha=slope)


def _threshold(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if a["threshold"] != 0 or a["value"] != 0:
        raise _refuse(node, "only a threshold of 0 with value 0 is supported")
    return _activate(ctx, node, ctx.value(a["self"], node), "relu")


def _prelu(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    scale = ctx.add_bias(ctx.constant(a["weight"], node, "weight"))
    return ctx.emit(node, "prelu", [ctx.value(a["self"], node)], scale=scale)


def _scaled_elu(ctx: Lowering, node: fx.Node, value: int, alpha: float, scale: float, inner: float) -> int:
    """scale·x, or scale·alpha·(exp(inner·x) - 1) where x < 0."""
    if inner != 1:  # scale·x = (scale / inner)·(inner·x)
        if alpha == 0 or inner <= 0:
            raise _refuse(node, f"alpha={alpha}, input_scale={inner} is not supported")
        value, alpha, scale = _times(ctx, node, value, inner), alpha * inner, scale / inner
    return _times(ctx, node, _activate(ctx, node, value, "elu", alpha=float(alpha)), scale)


def _elu(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    numbers = (_number(ctx, node, a[name]) for name in ("alpha", "scale", "input_scale"))
    return _scaled_elu(ctx, node, ctx.value(a["self"], node), *numbers)


def _celu(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    alpha = _number(ctx, node, a["alpha"])
    return _scaled_elu(ctx, node, ctx.value(a["self"], node), alpha, 1, 1 / alpha)


def _selu(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return _scaled_elu(ctx, node, ctx.value(a["self"], node), alpha, scale, 1)


def _gelu(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    act = {"none": "gelu", "tanh": "gelu_tanh"}[a["approximate"]]
    return _activate(ctx, node, ctx.value(a["self"], node), act)


def _softplus(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    beta, threshold = _number(ctx, node, a["beta"]), _number(ctx, node, a["threshold"])
    if threshold < 15:  # beyond 15, float32 does not see it
        raise _refuse(node, f"threshold={threshold} is not supported, only 15 and more")
    value = _times(ctx, node, ctx.value(a["self"], node), beta)
    return _times(ctx, node, _activate(ctx, node, value, "softplus"), 1 / beta)


def _glu(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value = ctx.value(a["self"], node)
    axis = int(a["dim"]) % len(ctx.shapes[value])
    half = _integer(ctx, node, ctx.shapes[value][axis]) // 2
    first, second = (_cut(ctx, node, value, axis, start, start + half) for start in (0, half))
    return _binary(ctx, node, "mul", first, _activate(ctx, node, second, "sigmoid"))


def _pow(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if not ctx.is_value(a["self"]):
        raise _refuse(node, "only a constant exponent is supported")
    value, exponent = ctx.value(a["self"], node), _number(ctx, node, a["exponent"])
    acts: dict[float, tuple[str, ...]] = {
        1: (), 2: ("square",), 4: ("square", "square"), 0.5: ("sqrt",), -0.5: ("rsqrt",), -1: ("reciprocal",),
        -2: ("square", "reciprocal"),
    }  # fmt: skip
    if exponent == 3:
        return _binary(ctx, node, "mul", _activate(ctx, node, value, "square"), value)
    if exponent not in acts:
        raise _refuse(node, f"the exponent {exponent} is not supported, only {sorted([*acts, 3])}")
    for act in acts[exponent]:
        value = _activate(ctx, node, value, act)
    return value


# ---- two operands


def _broadcast(node: fx.Node, left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
    rank = max(len(left), len(right))
    shapes = [[1] * (rank - len(shape)) + list(shape) for shape in (left, right)]
    result = []
    for a, b in zip(*shapes, strict=True):
        # Sizes that differ and are not 1 are equal by the model's own guards.
        result.append(b if static(a) == 1 else a)
    return result


def _times(ctx: Lowering, node: fx.Node, value: int, number: float) -> int:
    return value if number == 1 else _binary(ctx, node, "mul", value, ctx.value(float(number), node))


def _unexpanded(ctx: Lowering, value: int, other: int, shape: Sequence[Any]) -> int:
    """What a value was expanded from, where the other operand has the result's shape anyway."""
    before = ctx.producer(value)
    if before is not None and before.op == "expand" and known_same(ctx.shapes[other], shape):
        return before.inputs[0]
    return value


def _binary(ctx: Lowering, node: fx.Node, op: str, a: int, b: int, shape: Sequence[Any] | None = None) -> int:
    """a ∘ b of two values, which broadcast."""
    shape = _broadcast(node, ctx.shapes[a], ctx.shapes[b]) if shape is None else shape
    a, b = _unexpanded(ctx, a, b, shape), _unexpanded(ctx, b, a, shape)
    same = known_same(ctx.shapes[a], ctx.shapes[b])
    if op == "add" and same:
        # A linear layer's output before it is reshaped can have the other operand as residual.
        for value, other in ((b, a), (a, b)):
            before = ctx.producer(value)
            layer = ctx.producer(before.inputs[0]) if before is not None and before.op == "reshape" else None
            if before is not None and layer is not None and layer.op == "linear":
                flat = before.inputs[0]
                pair = [ctx.reshape(other, ctx.shapes[flat], node), flat]
                return ctx.again(value, ctx.emit(node, op, pair, ctx.shapes[flat]), node)
    return ctx.emit(node, op, [a, b], shape, broadcasts=not same)


def _arithmetic(name: str) -> Handler:
    return lambda ctx, node, a: _operate(ctx, node, name, a["self"], a["other"], a)


def _rsub(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    return _operate(ctx, node, "sub", a["other"], a["self"], a)


def _operate(ctx: Lowering, node: fx.Node, name: str, left: Any, right: Any, a: Arguments) -> int:
    """add, sub, mul, div: of two values, or of a value with a constant."""
    alpha = _number(ctx, node, a.get("alpha", 1))
    if a.get("rounding_mode") is not None:
        raise _refuse(node, f"rounding_mode={a['rounding_mode']} is not supported")
    if (folded := _foldable(ctx, node, name, left, right, alpha)) is not None:
        return folded
    number = ctx.scalar(right)
    if name in ("mul", "div") and isinstance(number, int | float) and number == 1:
        return ctx.value(left, node)
    second = _times(ctx, node, ctx.value(right, node), alpha)
    return _binary(ctx, node, name, ctx.value(left, node), second, node.meta["val"].shape)


def _foldable(ctx: Lowering, node: fx.Node, name: str, left: Any, right: Any, alpha: float) -> int | None:
    """As a `scale_shift`, where a layer that the passes can fold it into comes before."""
    swapped = not ctx.is_value(left)
    item, other = (right, left) if swapped else (left, right)
    if ctx.is_value(other) or (swapped and name == "div"):
        return None
    value = ctx.value(item, node)
    source = value
    while (before := ctx.producer(source)) is not None and before.op == "pixel_shuffle":
        source = before.inputs[0]
    if before is None or before.op not in ("conv", "linear", "scale_shift"):
        return None
    if (channels := _per_channel(ctx, ctx.shapes[value], other)) is None:
        return None
    one, zero = np.ones_like(channels), np.zeros_like(channels)
    if swapped:  # constant ± alpha·value
        gain, shift = {"add": (one * alpha, channels), "sub": (-one * alpha, channels), "mul": (channels, zero)}[name]
    else:
        gain, shift = {"add": (one, channels * alpha), "sub": (one, -channels * alpha), "mul": (channels, zero),
                       "div": (one / channels if name == "div" else one, zero)}[name]  # fmt: skip
    return _scale_shift(ctx, node, value, gain, shift)


def _per_channel(ctx: Lowering, shape: Sequence[Any], constant: Any) -> np.ndarray[Any, Any] | None:
    """A scalar, or a tensor that broadcasts along dimension 1 only, as float64 `(C,)`; None where it is neither."""
    number = ctx.scalar(constant)
    if isinstance(number, int | float):
        number = torch.tensor(float(number), dtype=torch.float64)
    if not isinstance(number, Tensor) or len(shape) not in (2, 3, 4) or number.ndim > len(shape):
        return None
    channels = static(shape[1])
    sizes = [1] * (len(shape) - number.ndim) + list(number.shape)
    fits = sizes[1] in (1, channels) and all(size == 1 for dim, size in enumerate(sizes) if dim != 1)
    if channels is None or not fits:
        return None
    return np.array(number.detach().double().cpu().reshape(-1).expand(channels).numpy())


def _extremum(op: str, kind: str) -> Handler:
    """`max` and `min`: of two operands, or along an axis."""
    reduce = _reduce(kind)

    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int | list[int]:
        if "other" not in a:
            return reduce(ctx, node, a)
        return _binary(ctx, node, op, ctx.value(a["self"], node), ctx.value(a["other"], node))

    return handler


def _dropout(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if a["train"] and a["p"] != 0:
        raise _refuse(node, "drops at inference too (training=True)")
    return ctx.value(_input(a), node)


# ---- pooling and reduction


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


def _reduce(kind: str) -> Handler:
    """A mean or maximum over every spatial dimension is an adaptive pooling to one place."""
    pool = {"mean": "adaptive_avg_pool", "max": "adaptive_max_pool"}.get(kind)

    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        item = a["self"]
        shape = item.meta["val"].shape
        dims = a.get("dim")
        if ctx.is_value(item) and dims not in (None, []) and pool is not None:
            value, own = ctx.underlying(item)
            axes = sorted(int(dim) % len(shape) for dim in (dims if isinstance(dims, list | tuple) else [dims]))
            # (N, C, H·W), a view of (N, C, H, W), has the same mean.
            spatial = 3 <= len(shape) <= 4 and axes == list(range(2, len(shape))) and static(shape[1]) is not None
            if spatial and known_same(shape[:2], own[:2]) and len(own) in (3, 4):
                attrs = {"dims": len(own) - 2, "output_size": [1, 1]}
                return ctx.emit(node, pool, [value], [*own[:2], *[1] * (len(own) - 2)], attrs=attrs)
        value = ctx.value(item, node)
        return _reduced(ctx, node, value, kind, _axes(ctx, value, dims), bool(a.get("keepdim", False)))

    return handler


def _reduced(ctx: Lowering, node: fx.Node, value: int, kind: str, axes: list[int], keepdim: bool) -> int:
    shape = [1 if axis in axes else size for axis, size in enumerate(ctx.shapes[value])]
    if not keepdim:
        shape = [size for axis, size in enumerate(shape) if axis not in axes]
    return ctx.emit(node, "reduce", [value], shape, attrs={"kind": kind, "axes": axes, "keepdim": keepdim})


def _variance(root: bool, mean_too: bool) -> Handler:
    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int | list[int]:
        value = ctx.value(a["self"], node)
        axes, keepdim = _axes(ctx, value, a.get("dim")), bool(a.get("keepdim", False))
        correction = a.get("correction", a.get("unbiased", True))
        correction = 1 if correction is None else _number(ctx, node, correction)
        mean = _reduced(ctx, node, value, "mean", axes, True)
        squares = _activate(ctx, node, _binary(ctx, node, "sub", value, mean), "square")
        variance = _reduced(ctx, node, squares, "mean", axes, keepdim)
        if correction:
            count = math.prod(_integers(ctx, node, [ctx.shapes[value][axis] for axis in axes]))
            variance = _times(ctx, node, variance, count / (count - correction))
        result = _activate(ctx, node, variance, "sqrt") if root else variance
        return [result, ctx.reshape(mean, ctx.shapes[variance], node)] if mean_too else result

    return handler


def _vector_norm(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value = ctx.value(a["self"], node)
    order = a["ord"] if "ord" in a else a["p"]
    order = 2 if order is None else _number(ctx, node, order)
    if order not in (1, 2, math.inf):
        raise _refuse(node, f"only the norms of order 1, 2 and inf are supported, not {order}")
    axes, keepdim = _axes(ctx, value, a.get("dim")), bool(a.get("keepdim", False))
    value = _activate(ctx, node, value, "square" if order == 2 else "abs")
    value = _reduced(ctx, node, value, "max" if order == math.inf else "sum", axes, keepdim)
    return _activate(ctx, node, value, "sqrt") if order == 2 else value


# ---- views that are not in order, and other movements


def _permute(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    """Any reordering of dimensions: torch itself says what it does to sizes that all differ."""
    value = ctx.value(node.args[0], node)
    sizes = torch.empty(tuple(range(1, len(ctx.shapes[value]) + 1)), device="meta")
    target: Any = node.target
    return ctx.permute(value, [size - 1 for size in target(sizes, *node.args[1:], **node.kwargs).shape], node)


def _expand(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    item = _input(a)
    return _expanded(ctx, node, ctx.value(item, node), node.meta["val"].shape)


def _expanded(ctx: Lowering, node: fx.Node, value: int, shape: Sequence[Any]) -> int:
    own = ctx.shapes[value]
    value = ctx.reshape(value, [1] * (len(shape) - len(own)) + list(own), node)
    if known_same(ctx.shapes[value], shape):
        return value
    # A size of 1 of the operand is none to refer to.
    sizes = ctx.symbols.encode(shape, ctx.shapes[value], infer=False)
    if sizes is None:
        raise ShapeDependentError(f"{describe(node)}: expands to {tuple(shape)}, which depends on the inputs' sizes")
    return ctx.emit(node, "expand", [value], shape, attrs={"shape": sizes})


def _repeat(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value = ctx.value(a["self"], node)
    repeats = [ctx.scalar(item) for item in a["repeats" if "repeats" in a else "dims"]]
    rank = len(ctx.shapes[value])
    repeats = [1] * (rank - len(repeats)) + repeats
    value = ctx.reshape(value, [1] * (len(repeats) - rank) + list(ctx.shapes[value]), node)
    ones = [static(size) == 1 for size in ctx.shapes[value]]
    value = _expanded(ctx, node, value, [count if one else size for count, one, size
                                         in zip(repeats, ones, ctx.shapes[value], strict=True)])  # fmt: skip
    for axis, (count, one) in enumerate(zip(repeats, ones, strict=True)):
        if not one and (number := _integer(ctx, node, count)) != 1:
            value = _concatenated(ctx, node, [value] * number, axis)
    return value


def _repeat_interleave(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if a.get("dim") is None or "self" not in a:
        raise _refuse(node, "only one count for all places along a dimension is supported")
    value, count = ctx.value(a["self"], node), _integer(ctx, node, a["repeats"])
    axis = int(a["dim"]) % len(ctx.shapes[value])
    shape = ctx.shapes[value]
    value = ctx.reshape(value, [*shape[: axis + 1], 1, *shape[axis + 1 :]], node)
    value = _expanded(ctx, node, value, _with(ctx.shapes[value], axis + 1, count))
    return ctx.reshape(value, _with(shape, axis, shape[axis] * count), node)


def _bound(ctx: Lowering, node: fx.Node, item: Any, size: Any, default: int) -> int:
    """A slice's bound: from the end where it depends on the size that way."""
    number = ctx.scalar(item)
    if number is None or known_equal(number, size):
        return default if number is None else _TO_THE_END
    if isinstance(number, torch.SymInt) and (fixed := static(number - size)) is not None and fixed < 0:
        return fixed
    return max(-_TO_THE_END, min(_integer(ctx, node, number), _TO_THE_END))


def _cut(
    ctx: Lowering, node: fx.Node, value: int, axis: int, start: int, end: int, step: int = 1, size: Any = None
) -> int:
    """x[start:end:step] along an axis; `size` is the result's where the axis has no fixed one."""
    own = static(ctx.shapes[value][axis])
    if own is not None:
        start, end, step = slice(start, end, step).indices(own)
        size = len(range(start, end, step))
        end = start + (size - 1) * step + 1
        if size == own:
            return value
    elif start == 0 and end == _TO_THE_END and step == 1:
        return value
    shape = _with(ctx.shapes[value], axis, size)
    return ctx.emit(node, "slice", [value], shape, attrs={"axis": axis, "start": start, "end": end, "step": step})


def _slice(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value = ctx.value(a["self"], node)
    axis = int(a["dim"]) % len(ctx.shapes[value])
    size = ctx.shapes[value][axis]
    start, end = _bound(ctx, node, a["start"], size, 0), _bound(ctx, node, a["end"], size, _TO_THE_END)
    return _cut(ctx, node, value, axis, start, end, _integer(ctx, node, a["step"]), node.meta["val"].shape[axis])


def _narrow(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    start: Any = ctx.scalar(a["start"])
    length: Any = ctx.scalar(a["length"])
    end = None if isinstance(start, int) and start < 0 and known_equal(start + length, 0) else start + length
    return _slice(ctx, node, {**a, "end": end, "step": 1})


def _select(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value = ctx.value(a["self"], node)
    axis = int(a["dim"]) % len(ctx.shapes[value])
    return _selected(ctx, node, value, axis, _bound(ctx, node, a["index"], ctx.shapes[value][axis], 0))


def _selected(ctx: Lowering, node: fx.Node, value: int, axis: int, index: int) -> int:
    one = _cut(ctx, node, value, axis, index, _TO_THE_END if index == -1 else index + 1, 1, 1)
    shape = ctx.shapes[one]
    return ctx.reshape(one, [*shape[:axis], *shape[axis + 1 :]], node)


def _split(ctx: Lowering, node: fx.Node, a: Arguments) -> list[int]:
    """Every way to split: torch has said how long the parts are."""
    value = ctx.value(a["self"], node)
    axis = int(a["dim"]) % len(ctx.shapes[value])
    sizes = [part.shape[axis] for part in node.meta["val"]]
    starts = [0, *itertools.accumulate(_integers(ctx, node, sizes[:-1]))]
    ends = [*starts[1:], _TO_THE_END]
    return [_cut(ctx, node, value, axis, start, end, 1, size)
            for start, end, size in zip(starts, ends, sizes, strict=True)]  # fmt: skip


def _unbind(ctx: Lowering, node: fx.Node, a: Arguments) -> list[int]:
    value = ctx.value(a["self"], node)
    axis = int(a["dim"]) % len(ctx.shapes[value])
    return [_selected(ctx, node, value, axis, index) for index in range(len(node.meta["val"]))]


def _concatenated(ctx: Lowering, node: fx.Node, values: list[int], axis: int) -> int:
    if len(values) == 1:
        return values[0]
    shape = _with(ctx.shapes[values[0]], axis, sum(ctx.shapes[value][axis] for value in values))
    return ctx.emit(node, "concat", values, shape, attrs={"axis": axis})


def _concat(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    values = [ctx.value(item, node) for item in a["tensors"]]
    return _concatenated(ctx, node, values, int(a["dim"]) % len(ctx.shapes[values[0]]))


def _stack(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    values = [ctx.value(item, node) for item in a["tensors"]]
    axis = int(a["dim"]) % (len(ctx.shapes[values[0]]) + 1)
    shapes = [[*ctx.shapes[value][:axis], 1, *ctx.shapes[value][axis:]] for value in values]
    return _concatenated(ctx, node, [ctx.reshape(*pair, node) for pair in zip(values, shapes, strict=True)], axis)


def _replaced(ctx: Lowering, node: fx.Node, value: int, part: int, axis: int, start: int, end: int) -> int:
    """value with [start:end] along axis replaced by part."""
    parts = [part]
    if start != 0:
        size = start if start > 0 else ctx.shapes[value][axis] + start
        parts.insert(0, _cut(ctx, node, value, axis, 0, start, 1, size))
    if end != _TO_THE_END:
        size = -end if end < 0 else ctx.shapes[value][axis] - end
        parts.append(_cut(ctx, node, value, axis, end, _TO_THE_END, 1, size))
    return _concatenated(ctx, node, parts, axis)


def _slice_scatter(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value, part = ctx.value(a["self"], node), ctx.value(a["src"], node)
    axis = int(a["dim"]) % len(ctx.shapes[value])
    size = ctx.shapes[value][axis]
    if known_same(ctx.shapes[part], ctx.shapes[value]):
        return part
    if _integer(ctx, node, a["step"]) != 1:
        raise _refuse(node, "writes to every other place are not supported")
    start, end = _bound(ctx, node, a["start"], size, 0), _bound(ctx, node, a["end"], size, _TO_THE_END)
    if (own := static(size)) is not None:
        start, end, _ = slice(start, end).indices(own)
        end = _TO_THE_END if end == own else end
    return _replaced(ctx, node, value, part, axis, start, end)


def _select_scatter(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value, part = ctx.value(a["self"], node), ctx.value(a["src"], node)
    axis = int(a["dim"]) % len(ctx.shapes[value])
    index, own = _integer(ctx, node, a["index"]), static(ctx.shapes[value][axis])
    part = ctx.reshape(part, _with(ctx.shapes[value], axis, 1), node)
    last = index == -1 or (own is not None and index == own - 1)
    return _replaced(ctx, node, value, part, axis, index, _TO_THE_END if last else index + 1)


def _copy(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    return _expanded(ctx, node, ctx.value(a["src"], node), node.meta["val"].shape)


def _filled(number: float | None) -> Handler:
    """zeros, ones, full, and what has another tensor's shape."""

    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        fill = a.get("fill_value", a.get("value")) if number is None else number
        return _expanded(ctx, node, ctx.value(fill, node), node.meta["val"].shape)

    return handler


def _index_select(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    index = ctx.scalar(a["index"])
    if not isinstance(index, Tensor):
        raise _refuse(node, "its index is computed from the inputs, expected a constant")
    value = ctx.value(a["self"], node)
    return _gathered(ctx, node, value, int(a["dim"]) % len(ctx.shapes[value]), index.reshape(-1))


def _gathered(ctx: Lowering, node: fx.Node, value: int, axis: int, index: Tensor) -> int:
    places = [int(place) for place in index.tolist()]
    if min(places) < 0:
        size = _integer(ctx, node, ctx.shapes[value][axis])
        places = [place % size for place in places]
    if places == list(range(places[0], places[0] + len(places))):
        return _cut(ctx, node, value, axis, places[0], places[-1] + 1, 1, len(places))
    shape = _with(ctx.shapes[value], axis, len(places))
    return ctx.emit(node, "index_select", [value], shape, attrs={"axis": axis, "index": places})


def _index(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    """x[:, index] with constants: indices of neighbouring dimensions count places of these dimensions as one."""
    value = ctx.value(a["self"], node)
    shape = list(ctx.shapes[value])
    given = [(axis, ctx.scalar(item)) for axis, item in enumerate(a["indices"]) if item is not None]
    tensors = [index for _, index in given if isinstance(index, Tensor)]
    if len(tensors) != len(given):
        raise _refuse(node, "its index is computed from the inputs, expected a constant")
    first, last = given[0][0], given[-1][0]
    if last - first + 1 != len(given):
        raise _refuse(node, "indices with other dimensions between them are not supported")
    if any(index.dtype == torch.bool for index in tensors):
        if len(tensors) > 1 or tensors[0].ndim != 1:
            raise _refuse(node, "only one boolean index of 1 dimension is supported")
        tensors = [tensors[0].nonzero().reshape(-1)]
    flat, size = tensors[0].long(), shape[first]
    if len(tensors) > 1:
        sizes = _integers(ctx, node, shape[first : last + 1])
        wrapped = [index.long() % own for index, own in zip(torch.broadcast_tensors(*tensors), sizes, strict=True)]  # type: ignore[no-untyped-call]
        flat, size = wrapped[0], math.prod(sizes)
        for index, own in zip(wrapped[1:], sizes[1:], strict=True):
            flat = flat * own + index
        value = ctx.reshape(value, [*shape[:first], size, *shape[last + 1 :]], node)
    result = _gathered(ctx, node, value, first, flat.reshape(-1))
    return ctx.reshape(result, [*shape[:first], *flat.shape, *shape[last + 1 :]], node)


def _flip(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value = ctx.value(a["self"], node)
    for axis in _axes(ctx, value, a["dims"]) if a["dims"] else ():
        size = _integer(ctx, node, ctx.shapes[value][axis])
        value = _gathered(ctx, node, value, axis, torch.arange(size - 1, -1, -1))
    return value


def _roll(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value = ctx.value(a["self"], node)
    shape = ctx.shapes[value]
    shifts, axes = _integers(ctx, node, a["shifts"]), [int(dim) % len(shape) for dim in a["dims"]]
    if not axes:
        value, axes = ctx.reshape(value, [math.prod(shape)], node), [0]
    for axis, shift in zip(axes, shifts, strict=True):
        if shift:
            attrs = {"axis": axis, "shift": shift}
            value = ctx.emit(node, "roll", [value], ctx.shapes[value], attrs=attrs)
    return ctx.reshape(value, shape, node)


def _pad(mode: str | None = None) -> Handler:
    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        value = ctx.value(a["self"], node)
        kind, fill = mode or a["mode"], float(_number(ctx, node, a.get("value") or 0))
        sides = _integers(ctx, node, a["pad"] if "pad" in a else a["padding"])
        rank = len(ctx.shapes[value])
        pairs = [(0, 0)] * (rank - len(sides) // 2) + list(zip(sides[-2::-2], sides[::-2], strict=True))
        if not math.isfinite(fill) or (kind != "constant" and min(sides) < 0):
            raise _refuse(node, f"padding {sides} of mode {kind} with {fill} is not supported")
        for axis, (before, after) in enumerate(pairs):
            if before < 0 or after < 0:
                size = ctx.shapes[value][axis] + min(before, 0) + min(after, 0)
                start, end = max(-before, 0), after if after < 0 else _TO_THE_END
                value = _cut(ctx, node, value, axis, start, end, 1, size)
        padding = [max(side, 0) for pair in pairs for side in pair]
        if not any(padding):
            return value
        attrs = {"padding": padding, "mode": kind, "value": fill}
        return ctx.emit(node, "pad", [value], attrs=attrs)

    return handler


def _resize(mode: str, dims: int) -> Handler:
    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        value = _spatial_input(ctx, node, _input(a), dims)
        shape, full = ctx.shapes[value], node.meta["val"].shape
        if "scale_factors" in a:
            scales = a["scale_factors"] or [None] * dims
        else:
            scales = [a["scales"]] if dims == 1 else [a["scales_h"], a["scales_w"]]
        scale = [0.0 if item is None else float(_number(ctx, node, item)) for item in scales]
        sizes = a.get("output_size")
        size, inputs = [0] * dims, [value]
        if sizes is not None:
            fixed = [static(number) for number in full[2:]]
            factors = [ratio(number, own) for number, own in zip(full[2:], shape[2:], strict=True)]
            if all(number is not None for number in fixed):
                size = [number or 0 for number in fixed]
            elif (like := _like(ctx, node, sizes, full)) is not None:
                inputs.append(like)
            elif all(number is not None for number in factors):
                scale = [float(factor or 0) for factor in factors]
            else:
                raise ShapeDependentError(f"{describe(node)}: the size {tuple(full[2:])} depends on the inputs' sizes")
        image = [*shape[:2], *[1] * (2 - dims), *shape[2:]]
        inputs[0] = ctx.reshape(value, image, node)
        result = ctx.emit(
            node, "resize", inputs, [*full[:2], *[1] * (2 - dims), *full[2:]],
            attrs={"mode": mode, "size": [1] * (2 - dims) + size, "scale": [0.0] * (2 - dims) + scale,
                   "align_corners": bool(a.get("align_corners", False))},
        )  # fmt: skip
        return ctx.reshape(result, full, node)

    return handler


def _like(ctx: Lowering, node: fx.Node, sizes: Any, full: Sequence[Any]) -> int | None:
    """A value with the spatial sizes of `full`: the one that they were read from, else the latest."""
    sources = [size.args[0] for size in sizes if isinstance(size, fx.Node) and size.args]
    read = [ctx.cells[item].value for item in sources if isinstance(item, fx.Node) and item in ctx.cells]
    for value in [*read, *reversed(range(len(ctx.shapes)))]:
        shape = ctx.shapes[value]
        if len(shape) != len(full) or not known_same(shape[2:], full[2:]):
            continue
        # What is read here cannot be fused with what follows it; a layer's input of the same size does as well.
        while (before := ctx.producer(value)) is not None and before.op in ("conv", "scale_shift"):
            if not known_same(ctx.shapes[before.inputs[0]][2:], full[2:]):
                break
            value = before.inputs[0]
        return ctx.reshape(value, [*ctx.shapes[value][:2], *[1] * (4 - len(full)), *full[2:]], node)
    return None


def _pixel_shuffle(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    factor = _integer(ctx, node, a["upscale_factor"])
    value = _spatial_input(ctx, node, a["self"], 2)
    return ctx.emit(node, "pixel_shuffle", [value], attrs={"factor": [factor, factor], "crop": [0, 0]})


def _pixel_unshuffle(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    r = _integer(ctx, node, a["downscale_factor"])
    value = _spatial_input(ctx, node, a["self"], 2)
    batch, channels, height, width = ctx.shapes[value]
    full = node.meta["val"].shape
    split = [batch, channels, full[2], r, full[3], r]
    if static(full[2]) is None or static(full[3]) is None:  # one size that depends on others for each reshape
        value = ctx.reshape(value, [batch, channels, full[2], r, width], node)
        attrs = {"shape": [-2, _integer(ctx, node, channels), -4, r, -1, r]}
        value = ctx.emit(node, "reshape", [value], split, helper=True, attrs=attrs)
    else:
        value = ctx.reshape(value, split, node)
    return ctx.reshape(ctx.permute(value, [0, 1, 3, 5, 2, 4], node), full, node)


def _channel_shuffle(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    groups = _integer(ctx, node, a["groups"])
    return ctx.emit(node, "channel_shuffle", [ctx.value(a["self"], node)], attrs={"groups": groups})


def _entries(names: str, handler: Handler, becomes: str, limits: str = "") -> dict[str, Entry]:
    return dict.fromkeys(names.split(), Entry(handler, becomes, limits))


_BATCHED = "batched inputs only"
_POOLED = f"no indices; {_BATCHED}"
_FIXED = "sizes must be known where they are not the inputs' own"
_ACTS = ("sigmoid", "silu", "hardsigmoid", "hardswish", "tanh", "mish", "exp", "sqrt", "rsqrt", "reciprocal", "abs",
         "neg", "square")  # fmt: skip

TABLE: dict[str, Entry] = {
    **_entries("conv1d conv2d convolution", _convolution, "conv", f"1-D and 2-D, constant weight; {_BATCHED}"),
    **_entries("conv_transpose1d conv_transpose2d", _transposed_convolution, "conv, pixel_shuffle", _BATCHED),
    **_entries("linear", _linear, "linear, reshape; matmul where the weight is computed"),
    **_entries("mm matmul bmm", _matmul, "linear where the right operand is a constant matrix, else matmul"),
    **_entries("addmm baddbmm", _addmm, "linear, or matmul and add"),
    **_entries("scaled_dot_product_attention", _attention, "matmul, mul, add, softmax",
               "no dropout, no grouped queries; a boolean mask must be constant"),
    **_entries("batch_norm _native_batch_norm_legit_no_training", _batch_norm,
               "nothing after a convolution or linear layer; else conv, or mul and add", "running statistics only"),
    **_entries("layer_norm native_layer_norm", _layer_norm, "layer_norm", "the result only, not the statistics"),
    **_entries("group_norm native_group_norm", _group_norm, "group_norm", "the result only, not the statistics"),
    **_entries("instance_norm", _instance_norm, "group_norm, or as batch_norm with running statistics"),
    **_entries("softmax _softmax _safe_softmax", _softmax, "softmax"),
    **_entries("relu", _act("relu"), "act"),
    **_entries("relu6", _act("relu6"), "act"),
    **_entries("hardtanh", _clamp("min_val", "max_val"), "act"),
    **_entries("clamp clip", _clamp("min", "max"), "act, maximum, minimum"),
    **_entries("clamp_min", _clamp("min", None), "act, maximum"),
    **_entries("clamp_max", _clamp(None, "max"), "minimum"),
    **{name: Entry(_act(name), "act") for name in _ACTS},
    **_entries("log_sigmoid", _act("neg", "softplus", "neg"), "act"),
    **_entries("leaky_relu", _leaky_relu, "act"),
    **_entries("rrelu", _rrelu, "act", "training=False only"),
    **_entries("threshold", _threshold, "act", "threshold 0 and value 0 only"),
    **_entries("prelu", _prelu, "prelu", "constant weight"),
    **_entries("elu", _elu, "act, mul"),
    **_entries("celu", _celu, "act, mul"),
    **_entries("selu", _selu, "act, mul"),
    **_entries("gelu", _gelu, "act"),
    **_entries("softplus", _softplus, "act, mul", "thresholds of 15 and more"),
    **_entries("glu", _glu, "slice, act, mul"),
    **_entries("pow", _pow, "act, mul", "exponents -2, -1, -0.5, 0.5, 1, 2, 3, 4"),
    **_entries("add", _arithmetic("add"), "add, mul; a constant folds into a layer before it"),
    **_entries("sub", _arithmetic("sub"), "sub, mul; a constant folds into a layer before it"),
    **_entries("mul", _arithmetic("mul"), "mul; a constant folds into a layer before it"),
    **_entries("div", _arithmetic("div"), "div; a constant folds into a layer before it", "no rounding_mode"),
    **_entries("rsub", _rsub, "sub, mul"),
    **_entries("maximum", _extremum("maximum", "max"), "maximum"),
    **_entries("minimum", _extremum("minimum", "min"), "minimum"),
    **_entries("max", _extremum("maximum", "max"), "maximum, or reduce", "values only, no indices"),
    **_entries("min", _extremum("minimum", "min"), "minimum, or reduce", "values only, no indices"),
    **_entries("dropout alpha_dropout feature_dropout feature_alpha_dropout", _dropout, "nothing", "train=False only"),
    **_entries("max_pool1d", _pool("max_pool", 1), "max_pool", _POOLED),
    **_entries("max_pool2d max_pool2d_with_indices", _pool("max_pool", 2), "max_pool", _POOLED),
    **_entries("avg_pool1d", _pool("avg_pool", 1), "avg_pool", _BATCHED),
    **_entries("avg_pool2d", _pool("avg_pool", 2), "avg_pool", _BATCHED),
    **_entries("adaptive_avg_pool1d", _adaptive("adaptive_avg_pool", 1), "adaptive_avg_pool", _BATCHED),
    **_entries("adaptive_avg_pool2d _adaptive_avg_pool2d", _adaptive("adaptive_avg_pool", 2), "adaptive_avg_pool",
               _BATCHED),
    **_entries("adaptive_max_pool1d", _adaptive("adaptive_max_pool", 1), "adaptive_max_pool", _POOLED),
    **_entries("adaptive_max_pool2d", _adaptive("adaptive_max_pool", 2), "adaptive_max_pool", _POOLED),
    **_entries("mean", _reduce("mean"), "reduce, or adaptive_avg_pool over all of H and W", "not to a single number"),
    **_entries("sum", _reduce("sum"), "reduce", "not to a single number"),
    **_entries("amax", _reduce("max"), "reduce, or adaptive_max_pool over all of H and W", "not to a single number"),
    **_entries("amin", _reduce("min"), "reduce", "not to a single number"),
    **_entries("var", _variance(False, False), "reduce, sub, act, mul", "not to a single number"),
    **_entries("std", _variance(True, False), "reduce, sub, act, mul", "not to a single number"),
    **_entries("var_mean", _variance(False, True), "reduce, sub, act, mul", "not to a single number"),
    **_entries("std_mean", _variance(True, True), "reduce, sub, act, mul", "not to a single number"),
    **_entries("linalg_vector_norm norm", _vector_norm, "act, reduce", "orders 1, 2 and inf; not to a single number"),
    **_entries("permute transpose t mT numpy_T swapaxes swapdims movedim moveaxis", _permute, "permute"),
    **_entries("expand expand_as broadcast_to", _expand, "expand", _FIXED),
    **_entries("repeat tile", _repeat, "expand, concat", _FIXED),
    **_entries("repeat_interleave", _repeat_interleave, "reshape, expand", "one count along one dimension"),
    **_entries("zeros empty new_zeros new_empty zeros_like empty_like", _filled(0), "constant, expand", _FIXED),
    **_entries("ones new_ones ones_like", _filled(1), "constant, expand", _FIXED),
    **_entries("full new_full full_like fill", _filled(None), "constant, expand", _FIXED),
    **_entries("copy", _copy, "expand, or nothing"),
    **_entries("slice", _slice, "slice", "bounds that are fixed, or fixed from the end"),
    **_entries("narrow", _narrow, "slice", "bounds that are fixed, or fixed from the end"),
    **_entries("select", _select, "slice, reshape"),
    **_entries("split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk tensor_split", _split,
               "slice", "the parts but the last must have fixed sizes"),
    **_entries("unbind", _unbind, "slice, reshape"),
    **_entries("cat concat concatenate", _concat, "concat"),
    **_entries("stack", _stack, "reshape, concat"),
    **_entries("slice_scatter", _slice_scatter, "slice, concat", "step 1"),
    **_entries("select_scatter", _select_scatter, "slice, reshape, concat"),
    **_entries("index_select", _index_select, "index_select, or slice", "constant index"),
    **_entries("index", _index, "index_select, reshape", "constant indices, of neighbouring dimensions"),
    **_entries("flip", _flip, "index_select", "along dimensions of fixed size"),
    **_entries("roll", _roll, "roll"),
    **_entries("pad", _pad(), "pad, slice; zeros before a convolution become its padding", "finite values"),
    **_entries("constant_pad_nd", _pad("constant"), "pad, slice; zeros before a convolution become its padding",
               "finite values"),
    **_entries("reflection_pad1d reflection_pad2d", _pad("reflect"), "pad"),
    **_entries("replication_pad1d replication_pad2d", _pad("replicate"), "pad"),
    **_entries("_pad_circular", _pad("circular"), "pad"),
    **_entries("upsample_nearest1d", _resize("nearest", 1), "resize", _FIXED),
    **_entries("upsample_nearest2d", _resize("nearest", 2), "resize", _FIXED),
    **_entries("upsample_linear1d", _resize("bilinear", 1), "resize", _FIXED),
    **_entries("upsample_bilinear2d", _resize("bilinear", 2), "resize", _FIXED),
    **_entries("pixel_shuffle", _pixel_shuffle, "pixel_shuffle", _BATCHED),
    **_entries("pixel_unshuffle", _pixel_unshuffle, "reshape, permute", _BATCHED),
    **_entries("channel_shuffle native_channel_shuffle", _channel_shuffle, "channel_shuffle"),
}  # fmt: skip
