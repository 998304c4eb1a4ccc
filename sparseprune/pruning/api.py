"""The front door of pruning: `prune`, `hold_zeros` and `finalize`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from .criteria import Criterion, ScoreFunction, compute_scores, resolve_criterion
from .masks import iter_masked, remove_mask
from .patterns import Pattern, resolve_pattern
from .scopes import Amount, Scope, check_amount, prune_units, resolve_scope, target_count
from .selection import PrunableWeight, Selector, find_weights, matches_name

__all__ = ["finalize", "hold_zeros", "prune"]

_Model = TypeVar("_Model", bound=nn.Module)

DEFAULT_LAYERS: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear)
STRAY_ZEROS = 1e-3  # a smaller share of zeros without a mask is chance (random initialisation), not pruning


def prune(
    model: _Model, amount: float | int, *,
    criterion: str | Criterion | ScoreFunction | Mapping[str, Tensor] = "magnitude",
    pattern: str | Pattern = "1x1", scope: str | Scope = "global",
    include: Iterable[Selector] | Selector = DEFAULT_LAYERS, exclude: Iterable[Selector] | Selector = (),
    parameters: Iterable[str] | str = ("weight",), amounts: Mapping[str, float | int] | None = None,
    seed: int | None = None,
) -> _Model:  # fmt: skip
    """Prune `model` in place to a final sparsity, by masks that training cannot undo.

    Weights that are pruned already (masks, `torch.nn.utils.prune` hooks, which are taken over, or plain zeros) count
    and stay pruned, so calling this twice with one amount changes nothing. Tied parameters count and are masked once.
    Nothing is changed if an error is raised.

    Args:
        model: any module, on any device, of any floating dtype.
        amount: a float in [0, 1) is the final sparsity of the eligible weights: exactly `round(amount * eligible)` are
            pruned in the end. An int is that number itself (with `scope="local"`, in every layer). With blocks, the
            nearest number of whole blocks.
        criterion: what ranks: "magnitude", "random", a `Criterion`, a function `(name, weight) -> scores`, or a dict
            from parameter or layer name to scores of the weight's shape; the lowest are pruned first.
        pattern: what shape goes: "1x1" (unstructured), "4x1", "RxC": blocks of the matrix out x (in/groups * kh * kw).
        scope: "global" ranks all layers together, "local" prunes each to `amount`.
        include: layer types, names of layers or of modules around them, or globs. Normalisation layers are selected
            by exact name or by type only.
        exclude: what `include` selects but must stay as it is; the same vocabulary.
        parameters: names of the parameters to prune in those layers.
        amounts: layer names or globs -> an amount for each such layer alone (an exact name wins over a glob, an earlier
            glob over a later one); `amount` then governs the other layers.
        seed: for random criteria; None draws from torch's global generator.

    Returns:
        `model` itself.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an amount outside its range or below the present sparsity; a name that matches nothing; NaN or
            infinite weights; tied layers with different masks.

    Warns:
        UserWarning: a layer was pruned to nothing.

    Example:
        >>> prune(model, 0.95, exclude=("fc",), amounts={"conv1": 0.5})
        >>> finetune(model, loader, epochs=5)

    Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015 (arXiv:1506.02626).
    """
    amount = check_amount(amount)
    ranking, shape, spread = resolve_criterion(criterion), resolve_pattern(pattern), resolve_scope(scope)
    weights = find_weights(model, include, exclude, parameters)
    groups = _groups(weights, amount, spread, amounts or {})
    values = {weight.name: _checked_values(weight) for weight in weights}
    states = {weight.name: _State.of(weight, values[weight.name]) for weight in weights}
    chosen = [_held(group, [states[weight.name] for weight in group], share, shape) for group, share in groups]

    generator = None if seed is None else torch.Generator().manual_seed(seed)
    scores = compute_scores(ranking, model, values, generator)
    masks: list[tuple[PrunableWeight, Tensor]] = []
    for (group, _), (held, remaining) in zip(groups, chosen, strict=True):
        masks += zip(group, _select(held, [scores[weight.name] for weight in group], remaining, shape), strict=True)
    for weight, mask in masks:
        if states[weight.name].masked or not bool(mask.all()):
            weight.set_mask(mask)
    _warn_empty([weight.name for weight, mask in masks if mask.numel() and not bool(mask.any())])
    return model


def hold_zeros(
    model: _Model, *, include: Iterable[Selector] | Selector = DEFAULT_LAYERS,
    exclude: Iterable[Selector] | Selector = (), parameters: Iterable[str] | str = ("weight",),
) -> _Model:  # fmt: skip
    """Make the zeros that the weights hold now into masks, in place, so that training keeps them.

    For a sparse model that came with plain zeros and is to be finetuned, on a second data set say. Parameters without
    a zero get no mask; existing masks grow by the zeros among their kept weights. A layer *initialised* to zero would
    be held at zero for good: `exclude` it.

    Args:
        model: any module.
        include, exclude, parameters: as in `prune`.

    Returns:
        `model` itself.

    Raises:
        TypeError, ValueError: as `prune` for the same arguments.

    Example:
        >>> hold_zeros(load_pruned(model, "pruned.pt"))
    """
    for weight in find_weights(model, include, exclude, parameters):
        kept = weight.values() != 0
        if weight.mask() is not None or not bool(kept.all()):
            weight.set_mask(kept)
    return model


def finalize(model: _Model) -> _Model:
    """Bake every mask in place: plain parameters with zeros, plain `state_dict` keys, nothing left to hold them.

    `torch.nn.utils.prune` hooks are baked as well. Parameters stay the same objects. Parametrizations without a mask
    (weight_norm, say) stay; one that shares its parameter with a mask is baked with it.

    Args:
        model: any module.

    Returns:
        `model` itself.

    Example:
        >>> torch.save(finalize(model).state_dict(), "pruned.pt")
    """
    for _, module, name in list(iter_masked(model)):
        remove_mask(module, name)
    return model


@dataclass
class _State:
    """What of one parameter is pruned before the call; bool tensors on the CPU, True = kept."""

    masked: bool
    by_mask: Tensor
    by_zeros: Tensor  # masks and plain zeros

    @classmethod
    def of(cls, weight: PrunableWeight, values: Tensor) -> _State:
        mask, nonzero = weight.mask(), (values != 0).cpu()
        kept = torch.ones_like(nonzero) if mask is None else mask.cpu()
        return cls(mask is not None, kept, kept & nonzero)


def largest_unit(pattern: Pattern, shapes: Iterable[tuple[int, ...]]) -> int:
    """Weights in the largest unit of parameters of these shapes."""
    ones = (torch.ones(shape) for shape in shapes if math.prod(shape))
    return max((int(pattern.reduce(each).max()) for each in ones), default=1)


def _checked_values(weight: PrunableWeight) -> Tensor:
    values = weight.values()
    if not values.is_floating_point():
        raise ValueError(f"{weight.name} must have a floating dtype to be pruned, got {values.dtype}")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{weight.name} holds NaN or infinite values; pruning it would hide that")
    return values


def _groups(
    weights: Sequence[PrunableWeight], amount: Amount, scope: Scope, amounts: Mapping[str, float | int]
) -> list[tuple[list[PrunableWeight], Amount]]:
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
    sizes = [weight.values().numel() for weight in rest]
    groups += [([rest[index] for index in members], share) for members, share in scope.groups(sizes, amount)]
    return groups


def _held(
    group: Sequence[PrunableWeight], states: Sequence[_State], amount: Amount, pattern: Pattern
) -> tuple[list[Tensor], int]:
    """What the group keeps so far, and how many more weights have to go."""
    where = group[0].name if len(group) == 1 else f"{len(group)} layers"
    total = sum(state.by_mask.numel() for state in states)
    target = target_count(amount, total, where)
    masked = total - sum(int(state.by_mask.sum()) for state in states)
    pruned = total - sum(int(state.by_zeros.sum()) for state in states)
    # With blocks the count reached last time is the nearest one, not the target: less than a block is not "below".
    if pruned - target < largest_unit(pattern, [tuple(state.by_mask.shape) for state in states]):
        return [state.by_zeros for state in states], target - pruned
    if masked <= target and pruned - masked < STRAY_ZEROS * total:
        return [state.by_mask for state in states], target - masked
    raise ValueError(
        f"amount={amount} asks for {target} of the {total} weights in {where} to be pruned, but {pruned} already are "
        f"(sparsity {pruned / total:.4f}): an amount is the final sparsity and cannot go below the present one"
    )


def _select(held: Sequence[Tensor], scores: Sequence[Tensor], count: int, pattern: Pattern) -> list[Tensor]:
    """Prune `count` more weights over a group -> the masks, on the CPU."""
    live = [pattern.reduce(kept.to(torch.float32)).to(torch.int64) for kept in held]
    sums = [pattern.reduce(torch.where(kept, score, 0)) for kept, score in zip(held, scores, strict=True)]
    keep = prune_units(torch.cat(sums), torch.cat(live), count)
    parts = torch.split(keep, [len(units) for units in live])
    return [kept & pattern.expand(part, tuple(kept.shape)) for kept, part in zip(held, parts, strict=True)]


def _warn_empty(names: list[str]) -> None:
    if names:
        warnings.warn(f"pruned to nothing: {', '.join(names)}; exclude them or use scope='local'", stacklevel=3)
