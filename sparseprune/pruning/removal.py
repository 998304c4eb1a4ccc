"""The front door of physical removal: `compact`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..dense import plain_args, plain_copy
from ..errors import SparsepruneWarning, VerificationError
from ..tables import aligned
from .blocks import drop_residual_blocks
from .constancy import find_constants
from .coupling import OUTPUT, Coupling, couple
from .masks import stored_parameter
from .removal_plan import Planner, flags_of
from .shrinking import shrink
from .trials import find_trouble, outputs_of, removal_trouble

__all__ = ["CompactLayer", "CompactReport", "Stayed", "compact"]

_Model = TypeVar("_Model", bound=nn.Module)
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class CompactLayer:
    """A convolution or linear layer: the shape of its weight before and after."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Stayed:
    """`filters` wholly zero filters of a layer that could not go, and why."""

    layer: str
    filters: int
    reason: str


@dataclass(frozen=True)
class CompactReport:
    """What `compact` did; `str()` is a table.

    Attributes:
        layers: Every convolution and linear layer that the example reaches.
        stayed: Wholly zero filters that are still there, with the reason.
        dropped: The blocks that were left out.
        parameters: Elements of all parameters, before and after.
    """

    layers: tuple[CompactLayer, ...]
    stayed: tuple[Stayed, ...]
    dropped: tuple[str, ...]
    parameters: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "layers": [{"name": n.name, "before": list(n.before), "after": list(n.after)} for n in self.layers],
            "stayed": [vars(each) for each in self.stayed],
            "dropped": list(self.dropped), "parameters": list(self.parameters),
        }  # fmt: skip

    def __str__(self) -> str:
        rows = [(layer.name, _shape(layer.before), _shape(layer.after)) for layer in self.layers]
        lines = aligned([("layer", "before", "after"), *rows], "<<<")
        lines += [f"left out: {name}" for name in self.dropped]
        lines += [f"{each.layer}: {each.filters} zero filters stay: {each.reason}" for each in self.stayed]
        before, after = self.parameters
        return "\n".join([*lines, f"{before:,} parameters before, {after:,} after"])


@torch.inference_mode(False)  # gradients are followed, also where the caller switched them off
def compact(
    model: _Model, example_inputs: Any, *, drop_blocks: Iterable[str] | str = (), multiple_of: int = 1
) -> _Model:
    """Remove pruned filters, channels and neurons physically, with all that depends on them.

    What goes are channels that are constant (a filter without weights gives its bias, which batch norm and activation
    turn into another constant) and channels that nobody reads; they go through batch norms, sums, concatenations,
    depthwise and grouped convolutions and from flattened maps to linear layers. A constant moves into the bias (or the
    following batch norm's mean) of what reads it; where a convolution pads zeros, one constant channel stays and stands
    for all. So the outputs in evaluation mode are the same but for rounding, and that is checked on the example and on
    noise like it. The couplings come from `torch-pruning`'s dependency graph (Fang et al., DepGraph: Towards Any
    Structural Pruning, 2023, arXiv:2301.12900), as traced on the example: a branch that it does not take is not seen.

    What cannot go (it is an output, its layer is used twice, the model's own code has its size written down) stays, and
    a warning names it. Scattered zeros stay too: `convert` the result to gain from both.

    Args:
        model: pruned by masks, `torch.nn.utils.prune` hooks or plain zeros; left untouched.
        example_inputs: the positional arguments of a typical call: a tensor or a tuple.
        drop_blocks: names of residual blocks to leave out, such as "layer3.1": identity takes their place, or, where
            shapes differ, the block's own module called downsample, shortcut, skip or projection. That changes the
            outputs; the removal of channels afterwards does not.
        multiple_of: leave some zero filters, so that each layer has a multiple of so many channels (or all it had):
            torch's kernels compute in blocks of 8 or 16, and depthwise convolutions gain from whole ones.

    Returns:
        A copy of the model with plain parameters: the same classes and names, smaller layers, modes and `requires_grad`
        as they were. Its attribute `compact_report` is a `CompactReport`. Its `state_dict` does not fit the original
        class any more: save the module itself, or `torch.export` it.

    Raises:
        ImportError: `torch-pruning` is not installed (`pip install 'sparseprune[compact]'`).
        TypeError: `model` is no module.
        ValueError: a name in `drop_blocks` is no block that can be left out; `multiple_of` is not positive.
        UnsupportedError: the model fails on the example, or cannot be traced.
        VerificationError: the smaller model computes something else (none is returned).

    Warns:
        SparsepruneWarning: wholly zero filters that had to stay, and what is in the way.

    Example:
        >>> small = compact(prune(model, 0.5, pattern="filter"), torch.randn(1, 3, 32, 32))
        >>> print(small.compact_report)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"multiple_of must be a positive whole number, got {multiple_of!r}")
    args = plain_args(example_inputs)
    whole = plain_copy(model)
    parameters = _count(whole)
    dropped = drop_residual_blocks(whole, args, drop_blocks)
    coupling = couple(whole, args)
    constants = find_constants(whole, args, coupling)
    planner = Planner(coupling, constants, multiple_of)
    removed = planner.plan()
    expected = outputs_of(whole, args)
    small = shrink(plain_copy(whole), planner, removed)
    if find_trouble(small, expected) is not None:  # which part of it is not possible?
        for group in coupling.groups():
            part = np.zeros_like(removed)
            part[group] = removed[group]
            if part.any() and (trouble := removal_trouble(whole, args, coupling, part)) is not None:
                coupling.blocked.update(dict.fromkeys(group.tolist(), trouble))
        planner = Planner(coupling, constants, multiple_of)
        removed = planner.plan()
        small = shrink(plain_copy(whole), planner, removed)
        if (trouble := find_trouble(small, expected)) is not None:
            raise VerificationError(f"the smaller model does not compute what the given one does: {trouble}")
    _restore_flags(small, model)
    stayed = _stayed(planner, removed)
    report = CompactReport(_layers(whole, small, coupling), stayed, dropped, (parameters, _count(small)))
    small.compact_report = report  # type: ignore[assignment]
    _warn(stayed, set(coupling.blocked.values()) - {OUTPUT})  # an output's own zeros are no surprise
    return small  # type: ignore[return-value]  # plain_copy keeps the class


def _restore_flags(small: nn.Module, model: nn.Module) -> None:
    """Modes, and which parameters are trained, as in the given model."""
    originals = dict(model.named_modules(remove_duplicate=False))
    for name, module in small.named_modules(remove_duplicate=False):
        original = originals.get(name, model)
        module.training = original.training
        for own, parameter in module._parameters.items():
            stored = stored_parameter(original, own)
            if parameter is not None and parameter.is_floating_point():
                parameter.requires_grad_(not isinstance(stored, nn.Parameter) or stored.requires_grad)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _layers(whole: nn.Module, small: nn.Module, coupling: Coupling) -> tuple[CompactLayer, ...]:
    def shape(model: nn.Module, name: str) -> tuple[int, ...]:
        weight = model.get_submodule(name).weight
        return tuple(weight.shape)  # type: ignore[arg-type]

    return tuple(CompactLayer(name, shape(whole, name), shape(small, name)) for name in coupling.layers)


def _stayed(planner: Planner, removed: Bools) -> tuple[Stayed, ...]:
    coupling, found = planner.coupling, dict[tuple[str, str], int]()
    varying: dict[int, str] = {}  # components that are no constants, and the layer that reads them
    for name in coupling.readers():
        ids = coupling.into[name][np.isnan(planner.constants[name])]
        varying.update(dict.fromkeys(ids.tolist(), name))
    for name, components in coupling.out.items():
        zero = ~planner.used[name].any(2).reshape(-1)
        staying = components[zero & ~flags_of(components, removed)].tolist()
        others = ", ".join(coupling.coupled(name)) if staying else ""
        for component in staying:
            reason = coupling.blocked.get(component) or planner.held.get(component)
            if reason is None and component not in varying:
                reason = "as many have to go from each part of a tensor that is cut, or of a grouped convolution"
                reason = reason if planner.multiple_of == 1 else f"multiple_of={planner.multiple_of}, or {reason}"
            elif reason is None and others:
                reason = f"coupled with those of {others}, which are not all zero"
            elif reason is None:
                reason = f"what it gives is not the same everywhere where {varying[component]} reads it"
            found[name, reason] = found.get((name, reason), 0) + 1
    return tuple(Stayed(name, filters, reason) for (name, reason), filters in found.items())


def _warn(stayed: tuple[Stayed, ...], reasons: set[str]) -> None:
    told = [f"{each.filters} of {each.layer} ({each.reason})" for each in stayed if each.reason in reasons]
    if told:
        more = f"; and of {len(told) - 6} more layers" if len(told) > 6 else ""
        warnings.warn(f"zero filters stay: {'; '.join(told[:6])}{more}", SparsepruneWarning, stacklevel=3)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
