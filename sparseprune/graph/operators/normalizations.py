"""Batch, layer, group and instance norm; softmax."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from ..shapes import known_equal, known_same
from .arguments import Arguments, Entry, entries, input_of, integer_of, refuse
from .convolutions import bias_of

if TYPE_CHECKING:
    from ..lower import Lowering

__all__ = ["NORMALIZATIONS", "scale_shift"]


def _batch_norm(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if a.get("training") or a["running_mean"] is None or a["running_var"] is None:
        raise refuse(node, "batch statistics (track_running_stats=False) are not supported, only running ones")
    mean, var = (ctx.constant(a[name], node, name).double() for name in ("running_mean", "running_var"))
    gamma, beta = (None if a[n] is None else ctx.constant(a[n], node, n).double() for n in ("weight", "bias"))
    scale = torch.rsqrt(var + a["eps"]) * (1.0 if gamma is None else gamma)
    gain, shift = scale, (0.0 if beta is None else beta) - mean * scale
    return scale_shift(ctx, node, ctx.value(a["input"], node), _numpy(gain), _numpy(shift))


def _numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    return np.array(tensor.detach().cpu().numpy())


def scale_shift(
    ctx: Lowering, node: fx.Node, value: int, gain: np.ndarray[Any, Any], shift: np.ndarray[Any, Any]
) -> int:
    """x·gain + shift for each channel, both float64 `(C,)`; the passes fold it into a neighbour."""
    rank = len(ctx.shapes[value])
    if rank not in (2, 3, 4):
        raise refuse(node, f"expected an input of 2 to 4 dimensions, got {rank}")
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
                      scale=bias_of(ctx, node, a["weight"]), bias=bias_of(ctx, node, a["bias"]))  # fmt: skip
    return ctx.reshape(result, shape, node)


def _group_norm(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value = ctx.value(input_of(a), node)
    groups = a.get("num_groups", a.get("group"))
    return _normalize_groups(ctx, node, value, integer_of(ctx, node, groups), a)


def _instance_norm(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if not a["use_input_stats"]:
        return _batch_norm(ctx, node, a)
    value = ctx.value(a["input"], node)
    return _normalize_groups(ctx, node, value, integer_of(ctx, node, ctx.shapes[value][1]), a)


def _normalize_groups(ctx: Lowering, node: fx.Node, value: int, groups: int, a: Arguments) -> int:
    return ctx.emit(node, "group_norm", [value], attrs={"groups": groups, "eps": float(a["eps"])},
                    scale=bias_of(ctx, node, a["weight"]), bias=bias_of(ctx, node, a["bias"]))  # fmt: skip


def _softmax(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value = ctx.value(a["self"], node)
    return ctx.emit(node, "softmax", [value], attrs={"axis": int(a["dim"]) % len(ctx.shapes[value])})


NORMALIZATIONS: dict[str, Entry] = {
    **entries("batch_norm _native_batch_norm_legit_no_training", _batch_norm,
               "nothing after a convolution or linear layer; else conv, or mul and add", "running statistics only"),
    **entries("layer_norm native_layer_norm", _layer_norm, "layer_norm", "the result only, not the statistics"),
    **entries("group_norm native_group_norm", _group_norm, "group_norm", "the result only, not the statistics"),
    **entries("instance_norm", _instance_norm, "group_norm, or as batch_norm with running statistics"),
    **entries("softmax _softmax _safe_softmax", _softmax, "softmax"),
}  # fmt: skip
