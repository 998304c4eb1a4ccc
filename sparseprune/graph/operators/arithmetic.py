"""Two operands: sums, products and quotients, broadcast as torch does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from ..shapes import known_same, static
from .arguments import Arguments, Entry, Handler, entries, input_of, number_of, refuse
from .normalizations import scale_shift

if TYPE_CHECKING:
    from ..lower import Lowering

__all__ = ["ARITHMETIC", "binary_of", "broadcast_to", "times_number"]


def broadcast_to(node: fx.Node, left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
    rank = max(len(left), len(right))
    shapes = [[1] * (rank - len(shape)) + list(shape) for shape in (left, right)]
    result = []
    for a, b in zip(*shapes, strict=True):
        # Sizes that differ and are not 1 are equal by the model's own guards.
        result.append(b if static(a) == 1 else a)
    return result


def times_number(ctx: Lowering, node: fx.Node, value: int, number: float) -> int:
    return value if number == 1 else binary_of(ctx, node, "mul", value, ctx.value(float(number), node))


def _unexpanded(ctx: Lowering, value: int, other: int, shape: Sequence[Any]) -> int:
    """What a value was expanded from, where the other operand has the result's shape anyway."""
    before = ctx.producer(value)
    if before is not None and before.op == "expand" and known_same(ctx.shapes[other], shape):
        return before.inputs[0]
    return value


def binary_of(ctx: Lowering, node: fx.Node, op: str, a: int, b: int, shape: Sequence[Any] | None = None) -> int:
    """a ∘ b of two values, which broadcast."""
    shape = broadcast_to(node, ctx.shapes[a], ctx.shapes[b]) if shape is None else shape
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
    alpha = number_of(ctx, node, a.get("alpha", 1))
    if a.get("rounding_mode") is not None:
        raise refuse(node, f"rounding_mode={a['rounding_mode']} is not supported")
    if (folded := _foldable(ctx, node, name, left, right, alpha)) is not None:
        return folded
    number = ctx.scalar(right)
    if name in ("mul", "div") and isinstance(number, int | float) and number == 1:
        return ctx.value(left, node)
    second = times_number(ctx, node, ctx.value(right, node), alpha)
    return binary_of(ctx, node, name, ctx.value(left, node), second, node.meta["val"].shape)


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
    return scale_shift(ctx, node, value, gain, shift)


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


def _dropout(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if a["train"] and a["p"] != 0:
        raise refuse(node, "drops at inference too (training=True)")
    return ctx.value(input_of(a), node)


ARITHMETIC: dict[str, Entry] = {
    **entries("add", _arithmetic("add"), "add, mul; a constant folds into a layer before it"),
    **entries("sub", _arithmetic("sub"), "sub, mul; a constant folds into a layer before it"),
    **entries("mul", _arithmetic("mul"), "mul; a constant folds into a layer before it"),
    **entries("div", _arithmetic("div"), "div; a constant folds into a layer before it", "no rounding_mode"),
    **entries("rsub", _rsub, "sub, mul"),
    **entries("dropout alpha_dropout feature_dropout feature_alpha_dropout", _dropout, "nothing", "train=False only"),
}  # fmt: skip
