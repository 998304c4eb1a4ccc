"""Which units go: the lowest scores first, until the count is met, with a floor in every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .patterns import NofM, Pattern
from .scopes import floor_count

__all__ = ["choose", "prune_units"]


def choose(
    held: Sequence[Tensor], scores: Sequence[Tensor], patterns: Sequence[Pattern], count: int, min_density: float,
    where: str,
) -> list[Tensor]:  # fmt: skip
    """Prune `count` more weights of a group of parameters that are ranked together.

    Args:
        held: what each parameter keeps so far: bool, of its shape, on the CPU.
        scores: (units,) float of each.
        patterns: of each, bound to it. N:M ones say themselves how many go, whatever `count` is.
        count: how many more weights to prune; with units of more than one, the nearest number of them.
        min_density: the share of its weights that each parameter keeps at least. One that has fewer already, stays.
        where: names the group in messages.

    Returns:
        The new masks, like `held`.

    Raises:
        ValueError: the floors leave fewer than `count` weights to prune.
    """
    live = [p.reduce(kept.to(torch.float32)).to(torch.int64) for kept, p in zip(held, patterns, strict=True)]
    keep: list[Tensor] = []
    if patterns and isinstance(patterns[0], NofM):
        for kept, score, size, pattern in zip(held, scores, live, patterns, strict=True):
            assert isinstance(pattern, NofM)
            keep.append(pattern.keep(score, size, tuple(kept.shape)))
    else:
        prunable = [
            _above_floor(score, size, floor_count(kept.numel(), min_density))
            for kept, score, size in zip(held, scores, live, strict=True)
        ]
        _check_possible(live, prunable, count, min_density, where)
        units = prune_units(torch.cat(list(scores)), torch.cat(prunable), count)
        keep += torch.split(units, [len(size) for size in live])
    expanded = (p.expand(part, tuple(kept.shape)) for part, kept, p in zip(keep, held, patterns, strict=True))
    return [kept & mask for kept, mask in zip(held, expanded, strict=True)]


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


def _above_floor(scores: Tensor, sizes: Tensor, floor: int) -> Tensor:
    """`sizes` with 0 for the best units, those that keep `floor` weights between them."""
    if floor <= 0:
        return sizes
    live = sizes.nonzero().squeeze(1)
    scores, weights = scores[live], sizes[live]
    spare = int(weights.sum()) - floor
    prunable = torch.zeros_like(sizes)
    if spare <= 0:
        return prunable
    size = int(weights[0])
    if bool((weights == size).all()):
        chosen = _lowest(scores, spare // size)
    else:
        order = torch.argsort(scores, stable=True)
        chosen = order[weights[order].cumsum(0) <= spare]
    prunable[live[chosen]] = weights[chosen]
    return prunable


def _check_possible(
    live: Sequence[Tensor], prunable: Sequence[Tensor], count: int, min_density: float, where: str
) -> None:
    available = sum(int(sizes.sum()) for sizes in prunable)
    unit = max((int(sizes.max()) for sizes in live if len(sizes)), default=1)
    if count - available >= max(unit, 1):
        raise ValueError(
            f"min_density={min_density} leaves {available} weights in {where} that may still be pruned, but the amount "
            f"asks for {count}: lower one of them"
        )


def _lowest(scores: Tensor, number: int) -> Tensor:
    """Indices of the `number` lowest scores, ties in order. Linear time: a network has tens of millions."""
    if number == 0:
        return torch.zeros(0, dtype=torch.int64)
    threshold = torch.kthvalue(scores, number).values
    below = (scores < threshold).nonzero().squeeze(1)
    ties = (scores == threshold).nonzero().squeeze(1)
    return torch.cat([below, ties[: number - len(below)]])
