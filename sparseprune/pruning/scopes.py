"""Over what: a scope turns one amount into groups of parameters that are ranked together, each with an exact count."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Real
from typing import SupportsFloat, SupportsIndex, cast

__all__ = [
    "SCOPES", "Amount", "ErdosRenyi", "Global", "Local", "Scope", "check_amount", "check_density", "floor_count",
    "resolve_scope", "target_count",
]  # fmt: skip

Amount = int | float


class Scope(ABC):
    """How an amount is spread. Subclass it for another rule."""

    @abstractmethod
    def groups(
        self, shapes: Sequence[tuple[int, ...]], amount: Amount, min_density: float
    ) -> list[tuple[list[int], Amount]]:
        """Split parameters into groups that are ranked together.

        Args:
            shapes: of each eligible parameter.
            amount: float, the final sparsity; int, the number of weights pruned.
            min_density: the share of its weights that each parameter keeps at least. Whoever selects inside a group
                sees to it; a scope that spreads the amount over groups itself must leave room for it.

        Returns:
            (indices into `shapes`, amount of that group), each parameter in one group.
        """


class Global(Scope):
    """One ranking over all parameters, so that layers end up with different sparsities."""

    def groups(
        self, shapes: Sequence[tuple[int, ...]], amount: Amount, min_density: float
    ) -> list[tuple[list[int], Amount]]:
        return [(list(range(len(shapes))), amount)] if shapes else []


class Local(Scope):
    """Every parameter by itself, each to the same amount ("uniform")."""

    def groups(
        self, shapes: Sequence[tuple[int, ...]], amount: Amount, min_density: float
    ) -> list[tuple[list[int], Amount]]:
        return [([index], amount) for index in range(len(shapes))]


class ErdosRenyi(Scope):
    """Erdos-Renyi-Kernel: every layer keeps weights in proportion to the sum of its dimensions, out + in + kh + kw.

    Small layers stay dense and wide ones become sparsest, whatever their weights are; the total is exact. A layer
    keeps one weight at least, all of them at most, and what it cannot take goes to the others. Parameters of one
    dimension (biases) stay dense. Where `amount` grows from call to call, no layer's share ever shrinks.

    Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity, 2018
    (arXiv:1707.04780); Evci et al., Rigging the Lottery, 2020 (arXiv:1911.11134).

    Raises:
        ValueError: the floors of all layers together keep more than `amount` leaves.
    """

    def groups(
        self, shapes: Sequence[tuple[int, ...]], amount: Amount, min_density: float
    ) -> list[tuple[list[int], Amount]]:
        sizes = [math.prod(shape) for shape in shapes]
        total = sum(sizes)
        kept = total - target_count(amount, total, f"{len(shapes)} layers")
        floors = [max(min(size, 1), floor_count(size, min_density)) for size in sizes]
        if sum(floors) > kept:
            raise ValueError(
                f"amount={amount} keeps {kept} of {total} weights, but scope='erk' with min_density={min_density} "
                f"keeps {sum(floors)} at least"
            )
        counts = _proportional([sum(shape) for shape in shapes], floors, sizes, kept)
        return [([index], sizes[index] - count) for index, count in enumerate(counts)]


SCOPES: dict[str, Callable[[], Scope]] = {"global": Global, "local": Local, "erk": ErdosRenyi}


def resolve_scope(scope: str | Scope) -> Scope:
    """A name in `SCOPES` or a `Scope` -> a `Scope`."""
    if isinstance(scope, Scope):
        return scope
    if not isinstance(scope, str) or scope not in SCOPES:
        raise ValueError(f"scope must be one of {sorted(SCOPES)} or a Scope, got {scope!r}")
    return SCOPES[scope]()


def check_amount(amount: object, argument: str = "amount") -> Amount:
    """`amount` as int or float, if it is a number in range.

    Raises:
        TypeError: it is no number, or a bool.
        ValueError: a float outside [0, 1), or a negative int.
    """
    if isinstance(amount, bool) or not isinstance(amount, Real):
        raise TypeError(f"{argument} must be a float (final sparsity) or an int (weights pruned), got {amount!r}")
    if hasattr(amount, "__index__"):
        count = operator.index(cast(SupportsIndex, amount))
        if count < 0:
            raise ValueError(f"{argument} must be at least 0, got {count}")
        return count
    fraction = float(cast(SupportsFloat, amount))
    if not 0 <= fraction < 1:
        raise ValueError(f"{argument} as a float is the final sparsity and must be in [0, 1), got {fraction}")
    return fraction


def check_density(min_density: object) -> float:
    """`min_density` as float, if it is a share.

    Raises:
        TypeError: it is no number, or a bool.
        ValueError: outside [0, 1].
    """
    if isinstance(min_density, bool) or not isinstance(min_density, Real):
        raise TypeError(f"min_density must be a float (share of a layer's weights), got {min_density!r}")
    share = float(cast(SupportsFloat, min_density))
    if not 0 <= share <= 1:
        raise ValueError(f"min_density is the share of its weights that a layer keeps, in [0, 1], got {share}")
    return share


def floor_count(size: int, min_density: float) -> int:
    """The fewest weights that are `min_density` of `size`; 0.1 of 10 is 1, whatever floating point makes of it."""
    return math.ceil(min_density * size - 1e-6)


def target_count(amount: Amount, total: int, where: str, *, pruned: int = 0) -> int:
    """How many of `total` weights are pruned in the end: `round(amount * total)`, or `amount` itself if an int.

    Raises:
        ValueError: an int that is all of them, unless all of them are `pruned` already.
    """
    if isinstance(amount, float):
        return round(amount * total)
    if amount >= total > 0 and not amount == total == pruned:
        raise ValueError(f"amount={amount} would prune all of the {total} weights in {where}; it must be below that")
    return amount


def _proportional(shares: Sequence[int], floors: Sequence[int], caps: Sequence[int], total: int) -> list[int]:
    """Whole numbers in proportion to `shares`, each within its floor and cap, that add up to `total`.

    One scale is searched for all (a divisor method), so that a smaller total gives nobody more.
    """

    def counts(scale: float) -> list[int]:
        triples = zip(shares, floors, caps, strict=True)
        return [min(cap, max(floor, round(scale * share))) for share, floor, cap in triples]

    low, high = 0.0, 1.0 + max((cap / share for share, cap in zip(shares, caps, strict=True) if share), default=0.0)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if sum(counts(middle)) < total else (low, middle)
    result, lower = counts(high), counts(low)
    for index, fewer in enumerate(lower):  # equal layers step up together: the first of them wait
        result[index] -= min(result[index] - fewer, max(0, sum(result) - total))
    return result
