"""Padding, resizing, and moves between channels and space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from ..naming import describe
from ..shapes import ShapeDependentError, known_same, ratio, static
from .arguments import (
    BATCHED,
    FIXED,
    Arguments,
    Entry,
    Handler,
    entries,
    input_of,
    integer_of,
    integers_of,
    number_of,
    refuse,
    spatial_input,
)
from .movements import _TO_THE_END, cut

if TYPE_CHECKING:
    from ..lower import Lowering

__all__ = ["RESIZING"]


def _pad(mode: str | None = None) -> Handler:
    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        value = ctx.value(a["self"], node)
        kind, fill = mode or a["mode"], float(number_of(ctx, node, a.get("value") or 0))
        sides = integers_of(ctx, node, a["pad"] if "pad" in a else a["padding"])
        rank = len(ctx.shapes[value])
        pairs = [(0, 0)] * (rank - len(sides) // 2) + list(zip(sides[-2::-2], sides[::-2], strict=True))
        if not math.isfinite(fill) or (kind != "constant" and min(sides) < 0):
            raise refuse(node, f"padding {sides} of mode {kind} with {fill} is not supported")
        for axis, (before, after) in enumerate(pairs):
            if before < 0 or after < 0:
                size = ctx.shapes[value][axis] + min(before, 0) + min(after, 0)
                start, end = max(-before, 0), after if after < 0 else _TO_THE_END
                value = cut(ctx, node, value, axis, start, end, 1, size)
        padding = [max(side, 0) for pair in pairs for side in pair]
        if not any(padding):
            return value
        attrs = {"padding": padding, "mode": kind, "value": fill}
        return ctx.emit(node, "pad", [value], attrs=attrs)

    return handler


def _resize(mode: str, dims: int) -> Handler:
    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        value = spatial_input(ctx, node, input_of(a), dims)
        shape, full = ctx.shapes[value], node.meta["val"].shape
        if "scale_factors" in a:
            scales = a["scale_factors"] or [None] * dims
        else:
            scales = [a["scales"]] if dims == 1 else [a["scales_h"], a["scales_w"]]
        scale = [0.0 if item is None else float(number_of(ctx, node, item)) for item in scales]
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
    factor = integer_of(ctx, node, a["upscale_factor"])
    value = spatial_input(ctx, node, a["self"], 2)
    return ctx.emit(node, "pixel_shuffle", [value], attrs={"factor": [factor, factor], "crop": [0, 0]})


def _pixel_unshuffle(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    r = integer_of(ctx, node, a["downscale_factor"])
    value = spatial_input(ctx, node, a["self"], 2)
    batch, channels, height, width = ctx.shapes[value]
    full = node.meta["val"].shape
    split = [batch, channels, full[2], r, full[3], r]
    if static(full[2]) is None or static(full[3]) is None:  # one size that depends on others for each reshape
        value = ctx.reshape(value, [batch, channels, full[2], r, width], node)
        attrs = {"shape": [-2, integer_of(ctx, node, channels), -4, r, -1, r]}
        value = ctx.emit(node, "reshape", [value], split, helper=True, attrs=attrs)
    else:
        value = ctx.reshape(value, split, node)
    return ctx.reshape(ctx.permute(value, [0, 1, 3, 5, 2, 4], node), full, node)


def _channel_shuffle(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    groups = integer_of(ctx, node, a["groups"])
    return ctx.emit(node, "channel_shuffle", [ctx.value(a["self"], node)], attrs={"groups": groups})


RESIZING: dict[str, Entry] = {
    **entries("pad", _pad(), "pad, slice; zeros before a convolution become its padding", "finite values"),
    **entries("constant_pad_nd", _pad("constant"), "pad, slice; zeros before a convolution become its padding",
               "finite values"),
    **entries("reflection_pad1d reflection_pad2d", _pad("reflect"), "pad"),
    **entries("replication_pad1d replication_pad2d", _pad("replicate"), "pad"),
    **entries("_pad_circular", _pad("circular"), "pad"),
    **entries("upsample_nearest1d", _resize("nearest", 1), "resize", FIXED),
    **entries("upsample_nearest2d", _resize("nearest", 2), "resize", FIXED),
    **entries("upsample_linear1d", _resize("bilinear", 1), "resize", FIXED),
    **entries("upsample_bilinear2d", _resize("bilinear", 2), "resize", FIXED),
    **entries("pixel_shuffle", _pixel_shuffle, "pixel_shuffle", BATCHED),
    **entries("pixel_unshuffle", _pixel_unshuffle, "reshape, permute", BATCHED),
    **entries("channel_shuffle native_channel_shuffle", _channel_shuffle, "channel_shuffle"),
}  # fmt: skip
