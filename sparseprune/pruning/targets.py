"""How many weights go: what is pruned already, and what each group of layers still has to lose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .patterns import NofM, Pattern
from .scopes import Amount, Global, Local, Scope, check_amount, target_count
from .selection import PrunableWeight, matches_name

__all__ = ["STRAY_ZEROS", "State", "check_pattern_amounts", "follow_filters", "held", "split_groups"]

STRAY_ZEROS = 1e-3  # a smaller share of zeros without a mask is chance (random initialisation), not pruning


@dataclass
class State:
    """What of one parameter is pruned before the call; bool tensors on the CPU, True = kept."""

    masked: bool
    by_mask: Tensor
    by_zeros: Tensor  # masks and plain zeros

    @classmethod
    def of(cls, weight: PrunableWeight, values: Tensor) -> State:
        mask, nonzero = weight.mask(), (values != 0).cpu()
        kept = torch.ones_like(nonzero) if mask is None else mask.cpu()
        return cls(mask is not None, kept, kept & nonzero)


def check_pattern_amounts(
    pattern: Pattern, amount: Amount, amounts: Mapping[str, float | int], scope: Scope, min_density: float
) -> None:
    """N:M patterns fix the sparsity themselves: whatever else is asked for contradicts them.

    Raises:
        TypeError: `amounts` is no mapping, whatever the pattern is.
        ValueError: an amount is not `1 - N / M`, `min_density` is above `N / M`, or `scope` gives layers different
            sparsities.
    """
    if not isinstance(amounts, Mapping):
        raise TypeError(f"amounts must map layer names or globs to amounts, got {type(amounts).__name__}")
    if not isinstance(pattern, NofM):
        return
    text = f'pattern "{pattern.n}:{pattern.m}"'
    named = {"amount": amount} | {f"amounts[{key!r}]": value for key, value in amounts.items()}
    for name, value in named.items():
        if not isinstance(value, float) or not math.isclose(value, pattern.sparsity, abs_tol=1e-6):
            raise ValueError(f"{text} fixes the sparsity: {name} must be {pattern.sparsity:g}, got {value!r}")
    if min_density > pattern.n / pattern.m:
        raise ValueError(f"{text} keeps {pattern.n / pattern.m:g} of every layer, below min_density={min_density}")
    if not isinstance(scope, (Global, Local)):
        raise ValueError(f'{text} gives every layer one sparsity: scope must be "global" or "local"')


def follow_filters(weights: Sequence[PrunableWeight]) -> dict[str, str]:
    """Which parameters go with another's filters: bias -> weight, by name.

    A parameter of one dimension follows the first one with more (or the first of all) of the same layer that has as
    many output channels.
    """
    followed: dict[str, str] = {}
    for weight in weights:
        if weight.values().ndim != 1:
            continue
        modules = {id(module) for module, _ in weight.sites}
        layer = [other for other in weights if modules & {id(module) for module, _ in other.sites}]
        leader = max((w for w in layer if _filters(w) == _filters(weight)), key=lambda w: w.values().ndim)
        if leader is not weight:
            followed[weight.name] = leader.name
    return followed


def _filters(weight: PrunableWeight) -> int:
    module = weight.sites[0][0]
    if isinstance(module, torch.nn.modules.conv._ConvTransposeNd):  # its weight is (in, out / groups, kh, kw)
        return module.out_channels
    shape = weight.values().shape
    return shape[0] if shape else 1


def split_groups(
    weights: Sequence[PrunableWeight], amount: Amount, scope: Scope, amounts: Mapping[str, float | int],
    min_density: float,
) -> list[tuple[list[PrunableWeight], Amount]]:  # fmt: skip
    """Groups of parameters that are ranked together, and the amount of each.

    Raises:
        TypeError, ValueError: an entry of `amounts` is no amount or matches no layer.
    """
    own = {key: check_amount(value, f"amounts[{key!r}]") for key, value in amounts.items()}
    unused, groups, rest = set(own), [], []
    for weight in weights:
        keys = [key for key in own if matches_name(key, weight)]
        unused -= set(keys)
        exact = [key for key in keys if key in weight.names]
        if keys:
            groups.append(([weight], own[(exact or keys)[0]]))
        else:
            rest.append(weight)
    for key in (key for key in own if key in unused):
        raise ValueError(f"amounts[{key!r}] matches no eligible layer; they are {[w.layer for w in weights][:8]}")
    shapes = [tuple(weight.values().shape) for weight in rest]
    spread = scope.groups(shapes, amount, min_density) if rest else []
    return groups + [([rest[index] for index in members], share) for members, share in spread]


def held(
    states: Sequence[State], patterns: Sequence[Pattern], amount: Amount, where: str
) -> tuple[list[Tensor], int]:
    """What a group keeps so far, and how many more weights have to go.

    Raises:
        ValueError: more is pruned already than `amount` asks for.
    """
    if patterns and isinstance(patterns[0], NofM):  # at most N of M: a sparser layer is no contradiction
        return [state.by_zeros for state in states], 0
    total = sum(state.by_mask.numel() for state in states)
    masked = total - sum(int(state.by_mask.sum()) for state in states)
    pruned = total - sum(int(state.by_zeros.sum()) for state in states)
    target = target_count(amount, total, where, pruned=pruned)
    # With units the count reached last time is the nearest one, not the target: less than a unit is not "below".
    pairs = ((torch.ones(s.by_mask.shape), p) for s, p in zip(states, patterns, strict=True) if s.by_mask.numel())
    slack = max((int(pattern.reduce(ones).max()) for ones, pattern in pairs), default=1)
    if pruned - target < slack:
        return [state.by_zeros for state in states], target - pruned
    if masked <= target and pruned - masked < STRAY_ZEROS * total:
        return [state.by_mask for state in states], target - masked
    raise ValueError(
        f"amount={amount} asks for {target} of the {total} weights in {where} to be pruned, but {pruned} already are "
        f"(sparsity {pruned / total:.4f}): an amount is the final sparsity and cannot go below the present one"
    )
