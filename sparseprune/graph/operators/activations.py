"""Element by element: activations and powers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from .arguments import Arguments, Entry, Handler, entries, input_of, integer_of, number_of, refuse
from .arithmetic import binary_of, times_number
from .movements import cut

if TYPE_CHECKING:
    from ..lower import Lowering

__all__ = ["ACTIVATIONS", "activated"]


def activated(ctx: Lowering, node: fx.Node, value: int, act: str, **numbers: float) -> int:
    """Before a movement of elements rather than after it, so that it meets what computes them."""
    before = ctx.producer(value)
    if before is not None and before.op in ("reshape", "flatten", "permute", "pixel_shuffle"):
        return ctx.again(value, activated(ctx, node, before.inputs[0], act, **numbers), node)
    return ctx.emit(node, "act", [value], ctx.shapes[value], attrs={"act": act, **numbers})


def _act(*acts: str) -> Handler:
    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        value = ctx.value(input_of(a), node)
        for act in acts:
            value = activated(ctx, node, value, act)
        return value

    return handler


def _clamp(low: Any, high: Any) -> Handler:
    """A bound that is a string names an argument."""

    def handler(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
        bounds = [a[bound] if isinstance(bound, str) else bound for bound in (low, high)]
        return _clamped(ctx, node, ctx.value(input_of(a), node), *bounds)

    return handler


def _clamped(ctx: Lowering, node: fx.Node, value: int, low: Any, high: Any) -> int:
    if not any(_is_tensor(ctx, bound) for bound in (low, high)):
        # None and infinities bound nothing.
        least = -math.inf if low is None else float(number_of(ctx, node, low))
        most = math.inf if high is None else float(number_of(ctx, node, high))
        if least == 0 and most in (6, math.inf):
            return activated(ctx, node, value, "relu6" if most == 6 else "relu")
        if math.isfinite(least) and math.isfinite(most):
            return activated(ctx, node, value, "clamp", alpha=min(least, most), beta=most)  # torch: the upper one wins
        low, high = (bound if math.isfinite(bound) else None for bound in (least, most))
    for op, bound in (("maximum", low), ("minimum", high)):
        if bound is not None:
            value = binary_of(ctx, node, op, value, ctx.value(bound, node))
    return value


def _is_tensor(ctx: Lowering, item: Any) -> bool:
    found = ctx.constants.get(item) if isinstance(item, fx.Node) else item
    return ctx.is_value(item) or (isinstance(found, Tensor) and found.numel() > 1)


def _leaky_relu(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    slope = float(number_of(ctx, node, a["negative_slope"]))
    return activated(ctx, node, ctx.value(a["self"], node), "leaky_relu", alpha=slope)


def _rrelu(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if a["training"]:
        raise refuse(node, "draws random slopes (training=True)")
    slope = (number_of(ctx, node, a["lower"]) + number_of(ctx, node, a["upper"])) / 2
    return activated(ctx, node, ctx.value(a["self"], node), "leaky_relu", alpha=slope)


def _threshold(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if a["threshold"] != 0 or a["value"] != 0:
        raise refuse(node, "only a threshold of 0 with value 0 is supported")
    return activated(ctx, node, ctx.value(a["self"], node), "relu")


def _prelu(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    scale = ctx.add_bias(ctx.constant(a["weight"], node, "weight"))
    return ctx.emit(node, "prelu", [ctx.value(a["self"], node)], scale=scale)


def _scaled_elu(ctx: Lowering, node: fx.Node, value: int, alpha: float, scale: float, inner: float) -> int:
    """scale·x, or scale·alpha·(exp(inner·x) - 1) where x < 0."""
    if inner != 1:  # scale·x = (scale / inner)·(inner·x)
        if alpha == 0 or inner <= 0:
            raise refuse(node, f"alpha={alpha}, input_scale={inner} is not supported")
        value, alpha, scale = times_number(ctx, node, value, inner), alpha * inner, scale / inner
    return times_number(ctx, node, activated(ctx, node, value, "elu", alpha=float(alpha)), scale)


def _elu(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    numbers = (number_of(ctx, node, a[name]) for name in ("alpha", "scale", "input_scale"))
    return _scaled_elu(ctx, node, ctx.value(a["self"], node), *numbers)


def _celu(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    alpha = number_of(ctx, node, a["alpha"])
    return _scaled_elu(ctx, node, ctx.value(a["self"], node), alpha, 1, 1 / alpha)


def _selu(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return _scaled_elu(ctx, node, ctx.value(a["self"], node), alpha, scale, 1)


def _gelu(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    act = {"none": "gelu", "tanh": "gelu_tanh"}[a["approximate"]]
    return activated(ctx, node, ctx.value(a["self"], node), act)


def _softplus(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    beta, threshold = number_of(ctx, node, a["beta"]), number_of(ctx, node, a["threshold"])
    if threshold < 15:  # beyond 15, float32 does not see it
        raise refuse(node, f"threshold={threshold} is not supported, only 15 and more")
    value = times_number(ctx, node, ctx.value(a["self"], node), beta)
    return times_number(ctx, node, activated(ctx, node, value, "softplus"), 1 / beta)


def _glu(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    value = ctx.value(a["self"], node)
    axis = int(a["dim"]) % len(ctx.shapes[value])
    half = integer_of(ctx, node, ctx.shapes[value][axis]) // 2
    first, second = (cut(ctx, node, value, axis, start, start + half) for start in (0, half))
    return binary_of(ctx, node, "mul", first, activated(ctx, node, second, "sigmoid"))


def _pow(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if not ctx.is_value(a["self"]):
        raise refuse(node, "only a constant exponent is supported")
    value, exponent = ctx.value(a["self"], node), number_of(ctx, node, a["exponent"])
    acts: dict[float, tuple[str, ...]] = {
        1: (), 2: ("square",), 4: ("square", "square"), 0.5: ("sqrt",), -0.5: ("rsqrt",), -1: ("reciprocal",),
        -2: ("square", "reciprocal"),
    }  # fmt: skip
    if exponent == 3:
        return binary_of(ctx, node, "mul", activated(ctx, node, value, "square"), value)
    if exponent not in acts:
        raise refuse(node, f"the exponent {exponent} is not supported, only {sorted([*acts, 3])}")
    for act in acts[exponent]:
        value = activated(ctx, node, value, act)
    return value


_ACTS = ("sigmoid", "silu", "hardsigmoid", "hardswish", "tanh", "mish", "exp", "sqrt", "rsqrt", "reciprocal", "abs",
         "neg", "square")  # fmt: skip


ACTIVATIONS: dict[str, Entry] = {
    **entries("relu", _act("relu"), "act"),
    **entries("relu6", _act("relu6"), "act"),
    **entries("hardtanh", _clamp("min_val", "max_val"), "act"),
    **entries("clamp clip", _clamp("min", "max"), "act, maximum, minimum"),
    **entries("clamp_min", _clamp("min", None), "act, maximum"),
    **entries("clamp_max", _clamp(None, "max"), "minimum"),
    **{name: Entry(_act(name), "act") for name in _ACTS},
    **entries("log_sigmoid", _act("neg", "softplus", "neg"), "act"),
    **entries("leaky_relu", _leaky_relu, "act"),
    **entries("rrelu", _rrelu, "act", "training=False only"),
    **entries("threshold", _threshold, "act", "threshold 0 and value 0 only"),
    **entries("prelu", _prelu, "prelu", "constant weight"),
    **entries("elu", _elu, "act, mul"),
    **entries("celu", _celu, "act, mul"),
    **entries("selu", _selu, "act, mul"),
    **entries("gelu", _gelu, "act"),
    **entries("softplus", _softplus, "act, mul", "thresholds of 15 and more"),
    **entries("glu", _glu, "slice, act, mul"),
    **entries("pow", _pow, "act, mul", "exponents -2, -1, -0.5, 0.5, 1, 2, 3, 4"),
}  # fmt: skip
