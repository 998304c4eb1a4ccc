"""Linear layers, matrix products, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ..naming import describe
from ..shapes import ShapeDependentError, static
from .arguments import Arguments, Entry, entries, integers_of, number_of, refuse
from .arithmetic import binary_of, broadcast_to, times_number
from .convolutions import bias_of

if TYPE_CHECKING:
    from ..lower import Lowering

__all__ = ["PRODUCTS"]

_MASKED = -(2.0**126)  # e to this is 0, and adding to it stays finite


def _linear(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    if not ctx.is_value(a["weight"]):
        return _matrix(ctx, node, ctx.value(a["input"], node), ctx.constant(a["weight"], node, "weight"), a["bias"])
    shape = node.meta["val"].shape
    product = _product(ctx, node, ctx.value(a["input"], node), ctx.value(a["weight"], node), shape, transpose=True)
    return product if a["bias"] is None else binary_of(ctx, node, "add", product, ctx.value(a["bias"], node), shape)


def _matrix(ctx: Lowering, node: fx.Node, value: int, weight: Tensor, bias: Any = None) -> int:
    """x `(…, F)`, weight `(out, F)`."""
    shape = ctx.shapes[value]
    if weight.ndim != 2:
        raise refuse(node, f"expected a weight of 2 dimensions, got {weight.ndim}")
    full = [*shape[:-1], weight.shape[0]]
    if len(shape) == 4 and _is_image(ctx, value, full):
        image = ctx.permute(value, [0, 3, 1, 2], node)
        attrs = {"dims": 2, "stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1}
        result = ctx.emit(node, "conv", [image], [full[0], *full[3:], *full[1:3]], attrs=attrs,
                          weight=ctx.add_weight(weight[:, :, None, None]), bias=bias_of(ctx, node, bias))  # fmt: skip
        return ctx.permute(result, [0, 2, 3, 1], node)
    flat = ctx.reshape(value, [math.prod(shape[:-1]), shape[-1]], node)
    result = ctx.emit(node, "linear", [flat], [ctx.shapes[flat][0], weight.shape[0]], weight=ctx.add_weight(weight),
                      bias=bias_of(ctx, node, bias))  # fmt: skip
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
    lead = broadcast_to(node, ctx.shapes[a][:-2], ctx.shapes[b][:-2])
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
    alpha, beta = number_of(ctx, node, a["alpha"]), number_of(ctx, node, a["beta"])
    bias = None if ctx.is_value(a["self"]) else ctx.constant(a["self"], node, "bias")
    plain = alpha == beta == 1 and bias is not None and bias.ndim == 1 and ctx.is_value(left)
    if plain and not ctx.is_value(right) and (weight := ctx.constant(right, node, "weight")).ndim == 2:
        if bias is not None and bias.shape[0] == weight.shape[1]:
            return _matrix(ctx, node, ctx.value(left, node), weight.mT, a["self"])
    product = times_number(ctx, node, _multiply(ctx, node, left, right), alpha)
    return binary_of(ctx, node, "add", product, times_number(ctx, node, ctx.value(a["self"], node), beta))


def _attention(ctx: Lowering, node: fx.Node, a: Arguments) -> int:
    """softmax(q kᵀ·scale + mask) v"""
    if a["dropout_p"] or a.get("enable_gqa"):
        raise refuse(node, f"dropout_p={a['dropout_p']} or enable_gqa={a.get('enable_gqa')} is not supported")
    q, k, v = (ctx.value(a[name], node) for name in ("query", "key", "value"))
    features = static(ctx.shapes[q][-1])
    if a["scale"] is None and features is None:
        raise ShapeDependentError(f"{describe(node)}: its scale depends on the size of the query")
    scale = 1 / math.sqrt(features or 1) if a["scale"] is None else number_of(ctx, node, a["scale"])
    lead = broadcast_to(node, ctx.shapes[q][:-2], ctx.shapes[k][:-2])
    shape = [*lead, ctx.shapes[q][-2], ctx.shapes[k][-2]]
    scores = _product(ctx, node, times_number(ctx, node, q, scale), k, shape, transpose=True)
    if (mask := _attention_mask(ctx, node, a, shape)) is not None:
        scores = binary_of(ctx, node, "add", scores, mask, shape)
    weights = ctx.emit(node, "softmax", [scores], shape, attrs={"axis": len(shape) - 1})
    return _product(ctx, node, weights, v, [*lead, shape[-2], ctx.shapes[v][-1]])


def _attention_mask(ctx: Lowering, node: fx.Node, a: Arguments, shape: Sequence[Any]) -> int | None:
    mask = a["attn_mask"]
    if a["is_causal"]:
        rows, columns = integers_of(ctx, node, list(shape[-2:]))
        mask = torch.ones(rows, columns, dtype=torch.bool).tril()
    if mask is None or ctx.is_value(mask):
        return None if mask is None else ctx.value(mask, node)
    constant = ctx.scalar(mask)
    if isinstance(constant, Tensor) and constant.dtype == torch.bool:
        constant = torch.zeros(constant.shape).masked_fill(~constant.cpu(), _MASKED)
    return ctx.value(constant, node)


PRODUCTS: dict[str, Entry] = {
    **entries("linear", _linear, "linear, reshape; matmul where the weight is computed"),
    **entries("mm matmul bmm", _matmul, "linear where the right operand is a constant matrix, else matmul"),
    **entries("addmm baddbmm", _addmm, "linear, or matmul and add"),
    **entries("scaled_dot_product_attention", _attention, "matmul, mul, add, softmax",
               "no dropout, no grouped queries; a boolean mask must be constant"),
}  # fmt: skip
