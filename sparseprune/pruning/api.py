"""The front door of pruning: `prune`, `hold_zeros`, `apply_masks` and `finalize`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from .criteria import Criterion, ScoreFunction, compute_scores, compute_updates, resolve_criterion
from .masks import iter_masked, remove_mask
from .patterns import Pattern, Slice, resolve_pattern
from .ranking import choose
from .scopes import Scope, check_amount, check_density, resolve_scope
from .selection import PrunableWeight, Selector, find_weights
from .targets import State, check_pattern_amounts, follow_filters, held, split_groups

__all__ = ["apply_masks", "finalize", "hold_zeros", "prune"]

_Model = TypeVar("_Model", bound=nn.Module)

DEFAULT_LAYERS: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear)


def prune(
    model: _Model, amount: float | int, *,
    criterion: str | Criterion | ScoreFunction | Mapping[str, Tensor] = "magnitude",
    pattern: str | Pattern = "1x1", scope: str | Scope = "global",
    include: Iterable[Selector] | Selector = DEFAULT_LAYERS, exclude: Iterable[Selector] | Selector = (),
    parameters: Iterable[str] | str = ("weight",), amounts: Mapping[str, float | int] | None = None,
    min_density: float = 0.0, seed: int | None = None,
) -> _Model:  # fmt: skip
    """Prune `model` in place to a final sparsity, by masks that training cannot undo.

    Weights that are pruned already (masks, `torch.nn.utils.prune` hooks, which are taken over, or plain zeros) count
    and stay pruned, so calling this twice with one amount changes nothing. Tied parameters count and are masked once.
    Nothing is changed if an error is raised.

    Args:
        model: any module, on any device, of any floating dtype.
        amount: a float in [0, 1) is the final sparsity of the eligible weights: exactly `round(amount * eligible)` are
            pruned in the end. An int is that number itself (with `scope="local"`, in every layer). With units of more
            than one weight, the nearest number of whole units; with "N:M" it must be `1 - N / M`.
        criterion: what ranks: "magnitude", "random", a `Criterion` (`Magnitude`, `Random`, `Taylor`, `BNScale`, `OBS`,
            your own), a function `(name, weight) -> scores`, or a dict from parameter or layer name to scores of the
            weight's shape; the lowest are pruned first. For masks of your own see `apply_masks`.
        pattern: what shape goes. "1x1" (unstructured); "RxC", such as "4x1": blocks of the matrix
            out x (in / groups * kh * kw); "N:M", such as "2:4": at most N kept of every M along its rows (`NofM`);
            "filter", "channel", "kernel_row", "kernel_col": whole slices (`Slice`). Units of different sizes compare
            by their mean score. With "filter", parameters of one dimension (biases) go with the filters of their
            layer, and are not counted.
        scope: "global" ranks all layers together, "local" prunes each to `amount`, "erk" each to its Erdos-Renyi-Kernel
            share (`ErdosRenyi`).
        include: layer types, names of layers or of modules around them, or globs. Normalisation layers are selected
            by exact name or by type only.
        exclude: what `include` selects but must stay as it is; the same vocabulary.
        parameters: names of the parameters to prune in those layers.
        amounts: layer names or globs -> an amount for each such layer alone (an exact name wins over a glob, an earlier
            glob over a later one); `amount` then governs the other layers.
        min_density: a floor against layer collapse: no layer keeps less than this share of its weights, in whole
            units, and the others make up for it; a layer that is below it already stays as it is. 0 by default, as
            the papers rank: whether a layer may vanish (a residual branch, say, which is pure speed) is for the user
            to say.
        seed: for random criteria; None draws from torch's global generator.

    Returns:
        `model` itself.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an amount outside its range, below the present sparsity, or beyond what `min_density` leaves; a
            name that matches nothing; a pattern that a parameter cannot have; NaN or infinite weights; tied layers
            with different masks.

    Warns:
        UserWarning: a layer was pruned to nothing.

    Example:
        >>> prune(model, 0.95, exclude=("fc",), amounts={"conv1": 0.5})
        >>> prune(model, 0.3, criterion=Taylor(batches), pattern="filter", include=nn.Conv2d, min_density=0.1)
        >>> finetune(model, loader, epochs=5)

    Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015 (arXiv:1506.02626).
    """
    amount, floor = check_amount(amount), check_density(min_density)
    ranking, shape, spread = resolve_criterion(criterion), resolve_pattern(pattern), resolve_scope(scope)
    check_pattern_amounts(shape, amount, amounts or {}, spread, floor)
    weights = find_weights(model, include, exclude, parameters)
    values = {weight.name: _checked_values(weight) for weight in weights}
    states = {weight.name: State.of(weight, values[weight.name]) for weight in weights}
    followed = follow_filters(weights) if isinstance(shape, Slice) and shape.dim == 0 else {}
    leaders = [weight for weight in weights if weight.name not in followed]
    patterns = {w.name: shape.bind(w.name, w.sites[0][0], tuple(values[w.name].shape)) for w in leaders}
    groups = []
    for group, share in split_groups(leaders, amount, spread, amounts or {}, floor):
        names = [weight.name for weight in group]
        where = names[0] if len(names) == 1 else f"{len(names)} layers"
        groups.append((names, where, *held([states[n] for n in names], [patterns[n] for n in names], share, where)))

    kept = {name: mask for names, _, before, _ in groups for name, mask in zip(names, before, strict=True)}
    ranked = {weight.name: values[weight.name] for weight in leaders}
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    scores = compute_scores(ranking, model, ranked, kept, patterns, generator)
    masks: dict[str, Tensor] = {}
    for names, where, before, remaining in groups:
        chosen = choose(before, [scores[n] for n in names], [patterns[n] for n in names], remaining, floor, where)
        masks |= zip(names, chosen, strict=True)
    for name, leader in followed.items():
        masks[name] = states[name].by_mask & (patterns[leader].reduce(masks[leader].to(torch.float32)) > 0)
    updates = compute_updates(ranking, model, ranked, {name: masks[name] for name in ranked})
    for weight in weights:
        mask = masks[weight.name]
        if states[weight.name].masked or not bool(mask.all()):
            weight.set_mask(mask)
        if weight.name in updates:
            weight.write(updates[weight.name])
    _warn_empty([n for n, mask in masks.items() if bool(states[n].by_zeros.any()) and not bool(mask.any())])
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


def apply_masks(model: _Model, masks: Mapping[str, Tensor]) -> _Model:
    """Give layers the user's own masks, in place: a winning ticket's, another model's, another tool's.

    Weights that are pruned already stay pruned. Tied layers share the mask that one of them is given. Nothing is
    changed if an error is raised.

    Args:
        model: any module.
        masks: parameter name, or layer name (its weight), -> bool tensor of the parameter's shape, True = kept.

    Returns:
        `model` itself.

    Raises:
        TypeError: a mask is not a bool tensor.
        ValueError: a name that matches no parameter, or two that match one; a mask of another shape.

    Example:
        >>> masks = {name: p.abs() > 1e-3 for name, p in trained.named_parameters() if p.ndim > 1}
        >>> apply_masks(model, masks)
    """
    chosen: dict[str, tuple[PrunableWeight, Tensor]] = {}
    for name, mask in masks.items():
        weight = _weight_named(model, name)
        shape = tuple(weight.values().shape)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"masks[{name!r}] must be a bool tensor (True = kept), got {got}")
        if mask.shape != shape:
            raise ValueError(f"masks[{name!r}] has shape {tuple(mask.shape)}, expected {weight.name}'s shape {shape}")
        if weight.name in chosen:
            raise ValueError(f"masks[{name!r}] is a second mask for {weight.name}")
        before = weight.mask()
        chosen[weight.name] = weight, mask if before is None else before & mask.to(before.device)
    for weight, mask in chosen.values():
        weight.set_mask(mask)
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


def _checked_values(weight: PrunableWeight) -> Tensor:
    values = weight.values()
    if values.is_inference():
        raise ValueError(f"{weight.name} was made under torch.inference_mode(), where nothing may change it: copy it")
    if not values.is_floating_point():
        raise ValueError(f"{weight.name} must have a floating dtype to be pruned, got {values.dtype}")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{weight.name} holds NaN or infinite values; pruning it would hide that")
    return values


def _weight_named(model: nn.Module, name: str) -> PrunableWeight:
    """The parameter called `name`, or the weight of the layer called so."""
    layers = dict(model.named_modules(remove_duplicate=False))
    layer, _, parameter = (name, ".", "weight") if name in layers and name else name.rpartition(".")
    if not isinstance(getattr(layers.get(layer), parameter, None), Tensor):
        raise ValueError(f"masks[{name!r}] matches no parameter and no layer with a weight")
    return find_weights(model, f"{layer}.{parameter}" if layer else parameter, parameters=parameter)[0]


def _warn_empty(names: list[str]) -> None:
    if names:
        text = f"pruned to nothing: {', '.join(names)}; exclude them, set min_density, or use scope='local'"
        warnings.warn(text, stacklevel=3)
