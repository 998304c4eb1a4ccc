"""What every handler needs: an operator's arguments, as numbers, sizes and values of the program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ...errors import UnsupportedError
from ..naming import describe
from ..shapes import ShapeDependentError, static

if TYPE_CHECKING:
    from ..lower import Lowering

__all__ = [
    "Arguments", "BATCHED", "COPIES", "Entry", "FACTORIES", "FIXED", "Handler", "IDENTITIES", "POOLED", "VIEWS",
    "axes_of", "bind", "entries", "input_of", "integer_of", "integers_of", "number_of", "pair_of", "refuse",
    "spatial_input", "with_size",
]  # fmt: skip

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


def bind(node: fx.Node) -> Arguments:
    """The arguments by schema name, with the schema's defaults."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound: Arguments = {}
    for index, argument in enumerate(node.target._schema.arguments):
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        bound[argument.name] = given
    return bound


def refuse(node: fx.Node, why: str) -> UnsupportedError:
    return UnsupportedError(f"{describe(node)}: {why}")


def input_of(a: Arguments) -> Any:
    return a["self"] if "self" in a else a["input"]


def number_of(ctx: Lowering, node: fx.Node, item: Any) -> float:
    """A number that is known now; an int stays one."""
    found = ctx.scalar(item)
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    if isinstance(found, torch.SymInt | torch.SymFloat):
        raise ShapeDependentError(f"{describe(node)}: computes with the number {found}, which depends on sizes")
    if not isinstance(found, int | float):
        raise refuse(node, f"expected a number, got {item}")
    return found


def integer_of(ctx: Lowering, node: fx.Node, item: Any) -> int:
    number = static(size) if isinstance(size := ctx.scalar(item), torch.SymInt) else size
    if number is None:
        raise ShapeDependentError(f"{describe(node)}: a size that depends on the input's size is not supported")
    if not isinstance(number, int):
        raise refuse(node, f"expected an integer, got {item}")
    return number


def integers_of(ctx: Lowering, node: fx.Node, items: Any) -> list[int]:
    return [integer_of(ctx, node, item) for item in (items if isinstance(items, list | tuple) else [items])]


def pair_of(ctx: Lowering, node: fx.Node, values: Any, dims: int, neutral: int) -> list[int]:
    """Two numbers `[h, w]`; a single one counts for each dimension, the h of one-dimensional operators is neutral."""
    numbers = integers_of(ctx, node, values)
    numbers = numbers * dims if len(numbers) == 1 else numbers
    return [neutral] * (2 - dims) + numbers


def axes_of(ctx: Lowering, value: int, dims: Any) -> list[int]:
    """Dimensions, counted from 0 and sorted; none given are all."""
    rank = len(ctx.shapes[value])
    dims = dims if isinstance(dims, list | tuple) else [dims] if dims is not None else []
    return sorted(int(dim) % rank for dim in dims) or list(range(rank))


def spatial_input(ctx: Lowering, node: fx.Node, item: Any, dims: int) -> int:
    value = ctx.value(item, node)
    if (rank := len(ctx.shapes[value])) != dims + 2:
        raise refuse(node, f"expected an input of {dims + 2} dimensions (batched), got {rank}")
    return value


def with_size(shape: Sequence[Any], axis: int, size: Any) -> list[Any]:
    return [*shape[:axis], size, *shape[axis + 1 :]]


def entries(names: str, handler: Handler, becomes: str, limits: str = "") -> dict[str, Entry]:
    return dict.fromkeys(names.split(), Entry(handler, becomes, limits))


BATCHED = "batched inputs only"
POOLED = f"no indices; {BATCHED}"
FIXED = "sizes must be known where they are not the inputs' own"
