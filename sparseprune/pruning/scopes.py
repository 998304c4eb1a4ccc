"""Over what: a scope turns one amount into groups of parameters that are ranked together, each with an exact count."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Real
from typing import SupportsFloat, SupportsIndex, cast

import torch
from torch import Tensor

__all__ = [
    "SCOPES", "Amount", "Global", "Local", "Scope", "check_amount", "prune_units", "resolve_scope", "target_count",
]  # fmt: skip

Amount = int | float


class Scope(ABC):
    """How an amount is spread. Subclass it for another rule."""

    @abstractmethod
    def groups(self, sizes: Sequence[int], amount: Amount) -> list[tuple[list[int], Amount]]:
        """Split parameters into groups that are ranked together.

        Args:
            sizes: number of weights of each eligible parameter.
            amount: float, the final sparsity; int, the number of weights pruned.

        Returns:
            (indices into `sizes`, amount of that group), each parameter in one group.
        """


class Global(Scope):
    """One ranking over all parameters, so that layers end up with different sparsities."""

    def groups(self, sizes: Sequence[int], amount: Amount) -> list[tuple[list[int], Amount]]:
        return [(list(range(len(sizes))), amount)] if sizes else []


class Local(Scope):
    """Every parameter by itself, each to the same amount ("uniform")."""

    def groups(self, sizes: Sequence[int], amount: Amount) -> list[tuple[list[int], Amount]]:
        return [([index], amount) for index in range(len(sizes))]


SCOPES: dict[str, Callable[[], Scope]] = {"global": Global, "local": Local}


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


def target_count(amount: Amount, total: int, where: str) -> int:
    """How many of `total` weights are pruned in the end: `round(amount * total)`, or `amount` itself if an int."""
    if isinstance(amount, float):
        return round(amount * total)
    if amount >= total > 0:
        raise ValueError(f"amount={amount} would prune all of the {total} weights in {where}; it must be below that")
    return amount


def prune_units(scores: Tensor, sizes: Tensor, count: int) -> Tensor:
    """Keep or prune whole units, the lowest scores first, equal scores in order.

    Args:
        scores: (units,) float on the CPU.
        sizes: (units,) int64, weights that the unit would still prune; units of size 0 are left alone.
        count: weights to prune: met exactly if units have one weight, else by the nearest number of units.

    Returns:
        (units,) bool, True = kept.
    """
    keep = torch.ones_like(sizes, dtype=torch.bool)
    live = sizes.nonzero().squeeze(1)
    if count <= 0 or not len(live):
        return keep
    scores, sizes = scores[live], sizes[live]
    size = int(sizes[0])
    if bool((sizes == size).all()):
        keep[live[_lowest(scores, min(round(count / size), len(live)))]] = False
        return keep
    order = torch.argsort(scores, stable=True)
    pruned = torch.cat([sizes.new_zeros(1), sizes[order].cumsum(0)])
    keep[live[order[: int((pruned - count).abs().argmin())]]] = False
    return keep


def _lowest(scores: Tensor, number: int) -> Tensor:
    """Indices of the `number` lowest scores, ties in order. Linear time: a network has tens of millions."""
    if number == 0:
        return torch.zeros(0, dtype=torch.int64)
    threshold = torch.kthvalue(scores, number).values
    below = (scores < threshold).nonzero().squeeze(1)
    ties = (scores == threshold).nonzero().squeeze(1)
    return torch.cat([below, ties[: number - len(below)]])
