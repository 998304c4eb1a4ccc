"""Which parameters of a model are pruned: by type, name or glob, tied ones once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from .masks import Mask, effective_weight, get_mask, has_only_masks, set_mask, stored_parameter

__all__ = ["PrunableWeight", "Selector", "find_weights", "matches_name"]

Selector = type[nn.Module] | str

_NORMALIZATIONS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)  # fmt: skip


@dataclass
class PrunableWeight:
    """One parameter, with every layer that holds it (more than one if it is tied)."""

    layer: str
    parameter: str
    sites: list[tuple[nn.Module, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of layers and parameters, all aliases

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.parameter}" if self.layer else self.parameter

    def values(self) -> Tensor:
        """The effective weight, detached."""
        return effective_weight(*self.sites[0])

    def mask(self) -> Tensor | None:
        """What is kept, or None without a mask. Tied layers with different masks have no common answer."""
        masks = [mask for mask in (get_mask(*site) for site in self.sites) if mask is not None]
        for other in masks[1:]:
            if not torch.equal(masks[0], other):
                raise ValueError(f"the layers tied to {self.name} carry different masks; untie them")
        return masks[0] if masks else None

    def set_mask(self, mask: Tensor) -> None:
        """Mask the parameter in every layer that holds it, through one shared `Mask`."""
        holder: Mask | None = None
        for module, parameter in self.sites:
            holder = set_mask(module, mask, parameter, holder=holder)

    def is_plain(self) -> bool:
        """Whether layers compute with the stored values themselves, but for masks: no weight_norm or the like."""
        parametrized = [site for site in self.sites if parametrize.is_parametrized(*site)]
        stored = all(isinstance(stored_parameter(*site), Tensor) for site in self.sites)
        return stored and all(has_only_masks(*site) for site in parametrized)

    def write(self, values: Tensor) -> None:
        """Change the stored values in place; only where `is_plain()`."""
        for site in self.sites:
            stored = stored_parameter(*site)
            assert isinstance(stored, Tensor)
            with torch.no_grad():
                stored.copy_(values)


def find_weights(
    model: nn.Module, include: Iterable[Selector] | Selector, exclude: Iterable[Selector] | Selector = (),
    parameters: Iterable[str] | str = ("weight",), *, required: bool = True,
) -> list[PrunableWeight]:  # fmt: skip
    """The parameters named `parameters` of the layers that `include` selects and `exclude` does not.

    A selector is a layer type, a layer's or parameter's name, the name of a module around it, or a glob. Names around
    and globs leave normalisation layers out: those must be named exactly, or by type.

    Raises:
        TypeError: a selector is neither a module type nor a string; `parameters` holds no names; the model is scripted.
        ValueError: a name or glob matches nothing; nothing is selected at all (unless not `required`); a parameter
            that has no values yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError("model is a torch.jit.ScriptModule, whose parameters cannot be masked: prune it first")
    included = _selectors(include, "include")
    excluded = _selectors(exclude, "exclude")
    wanted = _parameter_names(parameters)
    unused = {selector for selector in (*included, *excluded) if isinstance(selector, str)}
    chosen: list[PrunableWeight] = []
    for weight in _all_weights(model, wanted):
        hits = {s for s in included if _matches(s, weight, strict=True)}
        misses = {s for s in excluded if _matches(s, weight, strict=False)}
        unused -= hits | misses
        if hits and not misses:
            _check_usable(weight)
            chosen.append(weight)
    for selector in (s for s in (*included, *excluded) if s in unused):
        argument = "include" if selector in included else "exclude"
        raise ValueError(f"{argument}={selector!r} matches no layer with a parameter named {' or '.join(wanted)}")
    if required and not chosen:
        names = ", ".join(s if isinstance(s, str) else s.__name__ for s in included)
        raise ValueError(f"no parameter to prune: the model has no {' or '.join(wanted)} in include=({names})")
    return chosen


def matches_name(pattern: str, weight: PrunableWeight) -> bool:
    """Whether `pattern` is a name of the layer or its parameter, or a glob that fits one."""
    return any(name == pattern or fnmatchcase(name, pattern) for name in weight.names)


def _selectors(value: Iterable[Selector] | Selector, argument: str) -> tuple[Selector, ...]:
    items: Sequence[object]
    items = (value,) if isinstance(value, (str, type)) or not isinstance(value, Iterable) else tuple(value)
    for item in items:
        if not isinstance(item, str) and not (isinstance(item, type) and issubclass(item, nn.Module)):
            raise TypeError(f"{argument} must hold layer types, names or globs, got {item!r}")
    return tuple(items)  # type: ignore[arg-type]  # checked above


def _parameter_names(parameters: object) -> tuple[str, ...]:
    names = (parameters,) if isinstance(parameters, str) or not isinstance(parameters, Iterable) else tuple(parameters)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"parameters must hold names, such as ('weight', 'bias'), got {parameters!r}")
    return names


def _matches(selector: Selector, weight: PrunableWeight, *, strict: bool) -> bool:
    if isinstance(selector, type):
        return any(isinstance(module, selector) for module, _ in weight.sites)
    if selector in weight.names:
        return True
    if strict and any(isinstance(module, _NORMALIZATIONS) for module, _ in weight.sites):
        return False
    return matches_name(selector, weight) or any(name.startswith(f"{selector}.") for name in weight.names)


def _all_weights(model: nn.Module, parameters: tuple[str, ...]) -> Iterator[PrunableWeight]:
    found: dict[int, PrunableWeight] = {}
    for layer, module, parameter in _all_sites(model, parameters):
        stored = stored_parameter(module, parameter)
        key = id(stored) if stored is not None else id(module)
        weight = found.setdefault(key, PrunableWeight(layer, parameter))
        if not any(module is other and parameter == name for other, name in weight.sites):
            weight.sites.append((module, parameter))
        weight.names += [layer, f"{layer}.{parameter}"] if layer else [parameter]
    for module in model.modules():  # the same Parameter under another name, say `self.decoder = embedding.weight`
        for parameter, value in module._parameters.items():
            tied = found.get(id(value))
            if tied and not isinstance(module, parametrize.ParametrizationList) and not parameter.endswith("_orig"):
                if not any(module is other for other, _ in tied.sites):
                    tied.sites.append((module, parameter))
    yield from found.values()


def _all_sites(model: nn.Module, parameters: tuple[str, ...]) -> Iterator[tuple[str, nn.Module, str]]:
    for layer, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (parametrize.ParametrizationList, Mask)) or ".parametrizations." in f".{layer}.":
            continue
        for parameter in parameters:
            if isinstance(getattr(module, parameter, None), Tensor):
                yield layer, module, parameter


def _check_usable(weight: PrunableWeight) -> None:
    for module, parameter in weight.sites:
        if isinstance(getattr(module, parameter), UninitializedParameter):
            raise ValueError(f"{weight.name} is not initialised yet: run the model once before pruning it")
        if getattr(module, parameter).is_meta:
            raise ValueError(f"{weight.name} is on the meta device, where it has no values: load the model first")
        if stored_parameter(module, parameter) is None:
            raise ValueError(
                f"{weight.name} of {type(module).__name__} is computed by a hook, not a Parameter; use "
                "torch.nn.utils.parametrizations (weight_norm, spectral_norm) or remove the hook first"
            )
