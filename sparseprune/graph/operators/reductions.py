"""Pooling, and reductions over dimensions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import fx

from ..shapes import known_equal, known_same, static
from .activations import activated
from .arguments import (
    BATCHED,
    POOLED,
    Arguments,
    Entry,
    Handler,
    axes_of,
    entries,
    integers_of,
    number_of,
    pair_of,
    refuse,
    spatial_input,
)
from .arithmetic import binary_of, times_number

if TYPE_CHECKING:
    from ..lower import Lowering

__all__ = ["REDUCTIONS"]


def _extremum(op: str, kind: str) -> Handler:
    """`max` and `min`: of two operands, or along an axis."""
    reduce = _reduce(kind)

    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int | list[int]:
        if "other" not in a:
            return reduce(ctx, node, a)
        return binary_of(ctx, node, op, ctx.value(a["self"], node), ctx.value(a["other"], node))

    return handler


def _pool(op: str, dims: int) -> Handler:
    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        kernel = pair_of(ctx, node, a["kernel_size"], dims, 1)
        stride = pair_of(ctx, node, a["stride"], dims, 1) if a["stride"] else kernel
        padding = [side for side in pair_of(ctx, node, a["padding"], dims, 0) for _ in range(2)]
        attrs = {"dims": dims, "kernel": kernel, "stride": stride, "padding": padding}
        if op == "max_pool":
            attrs |= {"dilation": pair_of(ctx, node, a["dilation"], dims, 1), "ceil_mode": bool(a["ceil_mode"])}
        else:
            attrs |= {"ceil_mode": bool(a["ceil_mode"]), "count_include_pad": bool(a["count_include_pad"]),
                      "divisor": a.get("divisor_override") or 0}  # fmt: skip
        return ctx.emit(node, op, [spatial_input(ctx, node, a["self"], dims)], attrs=attrs)

    return handler


def _adaptive(op: str, dims: int) -> Handler:
    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        value = spatial_input(ctx, node, a["self"], dims)
        # A symbolic size that is the input's own is `None` in the module: keep.
        asked = [ctx.scalar(size) for size in a["output_size"]]
        sizes = zip(asked, ctx.shapes[value][2:], strict=True)
        kept = [0 if not isinstance(size, int) and known_equal(size, own) else size for size, own in sizes]
        attrs = {"dims": dims, "output_size": pair_of(ctx, node, kept, dims, 1)}
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
        return _reduced(ctx, node, value, kind, axes_of(ctx, value, dims), bool(a.get("keepdim", False)))

    return handler


def _reduced(ctx: Lowering, node: fx.Node, value: int, kind: str, axes: list[int], keepdim: bool) -> int:
    shape = [1 if axis in axes else size for axis, size in enumerate(ctx.shapes[value])]
    if not keepdim:
        shape = [size for axis, size in enumerate(shape) if axis not in axes]
    return ctx.emit(node, "reduce", [value], shape, attrs={"kind": kind, "axes": axes, "keepdim": keepdim})


def _variance(root: bool, mean_too: bool) -> Handler:
    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int | list[int]:
        value = ctx.value(a["self"], node)
        axes, keepdim = axes_of(ctx, value, a.get("dim")), bool(a.get("keepdim", False))
        correction = a.get("correction", a.get("unbiased", True))
        correction = 1 if correction is None else number_of(ctx, node, correction)
        mean = _reduced(ctx, node, value, "mean", axes, True)
        squares = activated(ctx, node, binary_of(ctx, node, "sub", value, mean), "square")
        variance = _reduced(ctx, node, squares, "mean", axes, keepdim)
        if correction:
            count = math.prod(integers_of(ctx, node, [ctx.shapes[value][axis] for axis in axes]))
            variance = times_number(ctx, node, variance, count / (count - correction))
        result = activated(ctx, node, variance, "sqrt") if root else variance
        return [result, ctx.reshape(mean, ctx.shapes[variance], node)] if mean_too else result

    return handler


def _vector_norm(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value = ctx.value(a["self"], node)
    order = a["ord"] if "ord" in a else a["p"]
    order = 2 if order is None else number_of(ctx, node, order)
    if order not in (1, 2, math.inf):
        raise refuse(node, f"only the norms of order 1, 2 and inf are supported, not {order}")
    axes, keepdim = axes_of(ctx, value, a.get("dim")), bool(a.get("keepdim", False))
    value = activated(ctx, node, value, "square" if order == 2 else "abs")
    value = _reduced(ctx, node, value, "max" if order == math.inf else "sum", axes, keepdim)
    return activated(ctx, node, value, "sqrt") if order == 2 else value


REDUCTIONS: dict[str, Entry] = {
    **entries("maximum", _extremum("maximum", "max"), "maximum"),
    **entries("minimum", _extremum("minimum", "min"), "minimum"),
    **entries("max", _extremum("maximum", "max"), "maximum, or reduce", "values only, no indices"),
    **entries("min", _extremum("minimum", "min"), "minimum, or reduce", "values only, no indices"),
    **entries("max_pool1d", _pool("max_pool", 1), "max_pool", POOLED),
    **entries("max_pool2d max_pool2d_with_indices", _pool("max_pool", 2), "max_pool", POOLED),
    **entries("avg_pool1d", _pool("avg_pool", 1), "avg_pool", BATCHED),
    **entries("avg_pool2d", _pool("avg_pool", 2), "avg_pool", BATCHED),
    **entries("adaptive_avg_pool1d", _adaptive("adaptive_avg_pool", 1), "adaptive_avg_pool", BATCHED),
    **entries("adaptive_avg_pool2d _adaptive_avg_pool2d", _adaptive("adaptive_avg_pool", 2), "adaptive_avg_pool",
               BATCHED),
    **entries("adaptive_max_pool1d", _adaptive("adaptive_max_pool", 1), "adaptive_max_pool", POOLED),
    **entries("adaptive_max_pool2d", _adaptive("adaptive_max_pool", 2), "adaptive_max_pool", POOLED),
    **entries("mean", _reduce("mean"), "reduce, or adaptive_avg_pool over all of H and W", "not to a single number"),
    **entries("sum", _reduce("sum"), "reduce", "not to a single number"),
    **entries("amax", _reduce("max"), "reduce, or adaptive_max_pool over all of H and W", "not to a single number"),
    **entries("amin", _reduce("min"), "reduce", "not to a single number"),
    **entries("var", _variance(False, False), "reduce, sub, act, mul", "not to a single number"),
    **entries("std", _variance(True, False), "reduce, sub, act, mul", "not to a single number"),
    **entries("var_mean", _variance(False, True), "reduce, sub, act, mul", "not to a single number"),
    **entries("std_mean", _variance(True, True), "reduce, sub, act, mul", "not to a single number"),
    **entries("linalg_vector_norm norm", _vector_norm, "act, reduce", "orders 1, 2 and inf; not to a single number"),
}  # fmt: skip
