"""Convolutions, transposed ones too."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from .arguments import BATCHED, Arguments, Entry, entries, pair_of, refuse, spatial_input

if TYPE_CHECKING:
    from ..lower import Lowering

__all__ = ["CONVOLUTIONS", "bias_of"]


def _convolution(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    weight = ctx.constant(a["weight"], node, "weight")
    dims = weight.ndim - 2
    if dims not in (1, 2):
        raise refuse(node, "only 1-D and 2-D convolutions are supported")
    if a.get("transposed"):
        return _transposed_convolution(ctx, node, a)
    dilation = pair_of(ctx, node, a["dilation"], dims, 1)
    padding = a["padding"]
    if padding == "valid":
        padding = [0, 0, 0, 0]
    elif padding == "same":
        # torch pads the odd element of an even kernel on the right.
        total = [d * (k - 1) for d, k in zip(dilation, [1, *weight.shape[2:]][-2:], strict=True)]
        padding = [side for t in total for side in (t // 2, t - t // 2)]
    else:
        padding = [side for side in pair_of(ctx, node, padding, dims, 0) for _ in range(2)]
    attrs = {"dims": dims, "stride": pair_of(ctx, node, a["stride"], dims, 1), "padding": padding,
             "dilation": dilation, "groups": int(a["groups"])}  # fmt: skip
    inputs = [spatial_input(ctx, node, a["input"], dims)]
    bias = bias_of(ctx, node, a["bias"])
    return ctx.emit(node, "conv", inputs, attrs=attrs, weight=ctx.add_weight(weight), bias=bias)


def bias_of(ctx: Lowering, node: fx.Node, item: Any) -> str | None:
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
    stride = pair_of(ctx, node, a["stride"], dims, 1)
    arguments = [pair_of(ctx, node, a[name], dims, neutral)
                 for name, neutral in (("padding", 0), ("output_padding", 0), ("dilation", 1))]  # fmt: skip
    rows, columns = (_Phases.of(*axis) for axis in zip(kernel, stride, *arguments, strict=True))
    value = spatial_input(ctx, node, a["input"], dims)
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


CONVOLUTIONS: dict[str, Entry] = {
    **entries("conv1d conv2d convolution", _convolution, "conv", f"1-D and 2-D, constant weight; {BATCHED}"),
    **entries("conv_transpose1d conv_transpose2d", _transposed_convolution, "conv, pixel_shuffle", BATCHED),
}  # fmt: skip
