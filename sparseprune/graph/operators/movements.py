"""Reordering, filling, cutting, joining and indexing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ..naming import describe
from ..shapes import ShapeDependentError, known_equal, known_same, static
from .arguments import (
    FIXED,
    Arguments,
    Entry,
    Handler,
    axes_of,
    entries,
    input_of,
    integer_of,
    integers_of,
    refuse,
    with_size,
)

if TYPE_CHECKING:
    from ..lower import Lowering

__all__ = ["MOVEMENTS", "_TO_THE_END", "cut"]

_TO_THE_END = 2**31 - 1


def _permute(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    """Any reordering of dimensions: torch itself says what it does to sizes that all differ."""
    value = ctx.value(node.args[0], node)
    sizes = torch.empty(tuple(range(1, len(ctx.shapes[value]) + 1)), device="meta")
    target: Any = node.target
    return ctx.permute(value, [size - 1 for size in target(sizes, *node.args[1:], **node.kwargs).shape], node)


def _expand(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    item = input_of(a)
    return expanded(ctx, node, ctx.value(item, node), node.meta["val"].shape)


def expanded(ctx: Lowering, node: fx.Node, value: int, shape: Sequence[Any]) -> int:
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
    value = expanded(ctx, node, value, [count if one else size for count, one, size
                                         in zip(repeats, ones, ctx.shapes[value], strict=True)])  # fmt: skip
    for axis, (count, one) in enumerate(zip(repeats, ones, strict=True)):
        if not one and (number := integer_of(ctx, node, count)) != 1:
            value = _concatenated(ctx, node, [value] * number, axis)
    return value


def _repeat_interleave(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if a.get("dim") is None or "self" not in a:
        raise refuse(node, "only one count for all places along a dimension is supported")
    value, count = ctx.value(a["self"], node), integer_of(ctx, node, a["repeats"])
    axis = int(a["dim"]) % len(ctx.shapes[value])
    shape = ctx.shapes[value]
    value = ctx.reshape(value, [*shape[: axis + 1], 1, *shape[axis + 1 :]], node)
    value = expanded(ctx, node, value, with_size(ctx.shapes[value], axis + 1, count))
    return ctx.reshape(value, with_size(shape, axis, shape[axis] * count), node)


def _bound(ctx: Lowering, node: fx.Node, item: Any, size: Any, default: int) -> int:
    """A slice's bound: from the end where it depends on the size that way."""
    number = ctx.scalar(item)
    if number is None or known_equal(number, size):
        return default if number is None else _TO_THE_END
    if isinstance(number, torch.SymInt) and (fixed := static(number - size)) is not None and fixed < 0:
        return fixed
    return max(-_TO_THE_END, min(integer_of(ctx, node, number), _TO_THE_END))


def cut(
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
    shape = with_size(ctx.shapes[value], axis, size)
    return ctx.emit(node, "slice", [value], shape, attrs={"axis": axis, "start": start, "end": end, "step": step})


def _slice(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value = ctx.value(a["self"], node)
    axis = int(a["dim"]) % len(ctx.shapes[value])
    size = ctx.shapes[value][axis]
    start, end = _bound(ctx, node, a["start"], size, 0), _bound(ctx, node, a["end"], size, _TO_THE_END)
    return cut(ctx, node, value, axis, start, end, integer_of(ctx, node, a["step"]), node.meta["val"].shape[axis])


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
    one = cut(ctx, node, value, axis, index, _TO_THE_END if index == -1 else index + 1, 1, 1)
    shape = ctx.shapes[one]
    return ctx.reshape(one, [*shape[:axis], *shape[axis + 1 :]], node)


def _split(ctx: Lowering, node: fx.Node, a: Arguments) -> list[int]:
    """Every way to split: torch has said how long the parts are."""
    value = ctx.value(a["self"], node)
    axis = int(a["dim"]) % len(ctx.shapes[value])
    sizes = [part.shape[axis] for part in node.meta["val"]]
    starts = [0, *itertools.accumulate(integers_of(ctx, node, sizes[:-1]))]
    ends = [*starts[1:], _TO_THE_END]
    return [cut(ctx, node, value, axis, start, end, 1, size)
            for start, end, size in zip(starts, ends, sizes, strict=True)]  # fmt: skip


def _unbind(ctx: Lowering, node: fx.Node, a: Arguments) -> list[int]:
    value = ctx.value(a["self"], node)
    axis = int(a["dim"]) % len(ctx.shapes[value])
    return [_selected(ctx, node, value, axis, index) for index in range(len(node.meta["val"]))]


def _concatenated(ctx: Lowering, node: fx.Node, values: list[int], axis: int) -> int:
    if len(values) == 1:
        return values[0]
    shape = with_size(ctx.shapes[values[0]], axis, sum(ctx.shapes[value][axis] for value in values))
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
        parts.insert(0, cut(ctx, node, value, axis, 0, start, 1, size))
    if end != _TO_THE_END:
        size = -end if end < 0 else ctx.shapes[value][axis] - end
        parts.append(cut(ctx, node, value, axis, end, _TO_THE_END, 1, size))
    return _concatenated(ctx, node, parts, axis)


def _slice_scatter(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value, part = ctx.value(a["self"], node), ctx.value(a["src"], node)
    axis = int(a["dim"]) % len(ctx.shapes[value])
    size = ctx.shapes[value][axis]
    if known_same(ctx.shapes[part], ctx.shapes[value]):
        return part
    if integer_of(ctx, node, a["step"]) != 1:
        raise refuse(node, "writes to every other place are not supported")
    start, end = _bound(ctx, node, a["start"], size, 0), _bound(ctx, node, a["end"], size, _TO_THE_END)
    if (own := static(size)) is not None:
        start, end, _ = slice(start, end).indices(own)
        end = _TO_THE_END if end == own else end
    return _replaced(ctx, node, value, part, axis, start, end)


def _select_scatter(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value, part = ctx.value(a["self"], node), ctx.value(a["src"], node)
    axis = int(a["dim"]) % len(ctx.shapes[value])
    index, own = integer_of(ctx, node, a["index"]), static(ctx.shapes[value][axis])
    part = ctx.reshape(part, with_size(ctx.shapes[value], axis, 1), node)
    last = index == -1 or (own is not None and index == own - 1)
    return _replaced(ctx, node, value, part, axis, index, _TO_THE_END if last else index + 1)


def _copy(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    return expanded(ctx, node, ctx.value(a["src"], node), node.meta["val"].shape)


def _filled(number: float | None) -> Handler:
    """zeros, ones, full, and what has another tensor's shape."""

    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        fill = a.get("fill_value", a.get("value")) if number is None else number
        return expanded(ctx, node, ctx.value(fill, node), node.meta["val"].shape)

    return handler


def _index_select(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    index = ctx.scalar(a["index"])
    if not isinstance(index, Tensor):
        raise refuse(node, "its index is computed from the inputs, expected a constant")
    value = ctx.value(a["self"], node)
    return _gathered(ctx, node, value, int(a["dim"]) % len(ctx.shapes[value]), index.reshape(-1))


def _gathered(ctx: Lowering, node: fx.Node, value: int, axis: int, index: Tensor) -> int:
    places = [int(place) for place in index.tolist()]
    if min(places) < 0:
        size = integer_of(ctx, node, ctx.shapes[value][axis])
        places = [place % size for place in places]
    if places == list(range(places[0], places[0] + len(places))):
        return cut(ctx, node, value, axis, places[0], places[-1] + 1, 1, len(places))
    shape = with_size(ctx.shapes[value], axis, len(places))
    return ctx.emit(node, "index_select", [value], shape, attrs={"axis": axis, "index": places})


def _index(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    """x[:, index] with constants: indices of neighbouring dimensions count places of these dimensions as one."""
    value = ctx.value(a["self"], node)
    shape = list(ctx.shapes[value])
    given = [(axis, ctx.scalar(item)) for axis, item in enumerate(a["indices"]) if item is not None]
    tensors = [index for _, index in given if isinstance(index, Tensor)]
    if len(tensors) != len(given):
        raise refuse(node, "its index is computed from the inputs, expected a constant")
    first, last = given[0][0], given[-1][0]
    if last - first + 1 != len(given):
        raise refuse(node, "indices with other dimensions between them are not supported")
    if any(index.dtype == torch.bool for index in tensors):
        if len(tensors) > 1 or tensors[0].ndim != 1:
            raise refuse(node, "only one boolean index of 1 dimension is supported")
        tensors = [tensors[0].nonzero().reshape(-1)]
    flat, size = tensors[0].long(), shape[first]
    if len(tensors) > 1:
        sizes = integers_of(ctx, node, shape[first : last + 1])
        wrapped = [index.long() % own for index, own in zip(torch.broadcast_tensors(*tensors), sizes, strict=True)]  # type: ignore[no-untyped-call]
        flat, size = wrapped[0], math.prod(sizes)
        for index, own in zip(wrapped[1:], sizes[1:], strict=True):
            flat = flat * own + index
        value = ctx.reshape(value, [*shape[:first], size, *shape[last + 1 :]], node)
    result = _gathered(ctx, node, value, first, flat.reshape(-1))
    return ctx.reshape(result, [*shape[:first], *flat.shape, *shape[last + 1 :]], node)


def _flip(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value = ctx.value(a["self"], node)
    for axis in axes_of(ctx, value, a["dims"]) if a["dims"] else ():
        size = integer_of(ctx, node, ctx.shapes[value][axis])
        value = _gathered(ctx, node, value, axis, torch.arange(size - 1, -1, -1))
    return value


def _roll(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value = ctx.value(a["self"], node)
    shape = ctx.shapes[value]
    shifts, axes = integers_of(ctx, node, a["shifts"]), [int(dim) % len(shape) for dim in a["dims"]]
    if not axes:
        value, axes = ctx.reshape(value, [math.prod(shape)], node), [0]
    for axis, shift in zip(axes, shifts, strict=True):
        if shift:
            attrs = {"axis": axis, "shift": shift}
            value = ctx.emit(node, "roll", [value], ctx.shapes[value], attrs=attrs)
    return ctx.reshape(value, shape, node)


MOVEMENTS: dict[str, Entry] = {
    **entries("permute transpose t mT numpy_T swapaxes swapdims movedim moveaxis", _permute, "permute"),
    **entries("expand expand_as broadcast_to", _expand, "expand", FIXED),
    **entries("repeat tile", _repeat, "expand, concat", FIXED),
    **entries("repeat_interleave", _repeat_interleave, "reshape, expand", "one count along one dimension"),
    **entries("zeros empty new_zeros new_empty zeros_like empty_like", _filled(0), "constant, expand", FIXED),
    **entries("ones new_ones ones_like", _filled(1), "constant, expand", FIXED),
    **entries("full new_full full_like fill", _filled(None), "constant, expand", FIXED),
    **entries("copy", _copy, "expand, or nothing"),
    **entries("slice", _slice, "slice", "bounds that are fixed, or fixed from the end"),
    **entries("narrow", _narrow, "slice", "bounds that are fixed, or fixed from the end"),
    **entries("select", _select, "slice, reshape"),
    **entries("split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk tensor_split", _split,
               "slice", "the parts but the last must have fixed sizes"),
    **entries("unbind", _unbind, "slice, reshape"),
    **entries("cat concat concatenate", _concat, "concat"),
    **entries("stack", _stack, "reshape, concat"),
    **entries("slice_scatter", _slice_scatter, "slice, concat", "step 1"),
    **entries("select_scatter", _select_scatter, "slice, reshape, concat"),
    **entries("index_select", _index_select, "index_select, or slice", "constant index"),
    **entries("index", _index, "index_select, reshape", "constant indices, of neighbouring dimensions"),
    **entries("flip", _flip, "index_select", "along dimensions of fixed size"),
    **entries("roll", _roll, "roll"),
}  # fmt: skip
