"""Checks to run beforehand: what of a model could be removed, and what is in the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .dense import plain_args, plain_copy
from .errors import UnsupportedError
from .pruning.coupling import Coupling, couple
from .pruning.removal_plan import Planner, flags_of
from .pruning.trials import removal_trouble
from .tables import aligned

__all__ = ["PrunableLayer", "PrunableReport", "check_prunable"]

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class PrunableLayer:
    """A convolution or linear layer.

    Attributes:
        name: Its name.
        filters: How many outputs (filters, neurons) it has.
        removable: How many of these could go; one always has to stay.
        coupled: The other layers whose filters have to go with its own: a filter goes when all of them are zero there.
        reason: What is in the way of the others; None where nothing is.
    """

    name: str
    filters: int
    removable: int
    coupled: tuple[str, ...]
    reason: str | None


@dataclass(frozen=True)
class PrunableReport:
    """What `check_prunable` found; `str()` is a table.

    Attributes:
        layers: Every convolution and linear layer that the example reaches, in the order of their calls.
        unreached: Those that it does not reach.
        failure: Why the model could not be followed at all; `layers` is empty then.
    """

    layers: tuple[PrunableLayer, ...]
    unreached: tuple[str, ...]
    failure: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "layers": [{**vars(layer), "coupled": list(layer.coupled)} for layer in self.layers],
            "unreached": list(self.unreached), "failure": self.failure,
        }  # fmt: skip

    def __str__(self) -> str:
        rows = [("layer", "filters", "removable", "goes with", "in the way")]
        for layer in self.layers:
            coupled = ", ".join(layer.coupled[:3])
            coupled += f" and {len(layer.coupled) - 3} more" if len(layer.coupled) > 3 else ""
            rows.append((layer.name, str(layer.filters), str(layer.removable), coupled, layer.reason or ""))
        lines = aligned(rows, "<>><<")
        lines += [f"{name}: not reached by the example" for name in self.unreached]
        return "\n".join([*lines, *([f"nothing can be removed: {self.failure}"] if self.failure else [])])


@torch.inference_mode(False)  # gradients are followed, also where the caller switched them off
def check_prunable(model: nn.Module, example_inputs: Any) -> PrunableReport:
    """Say, before any pruning, which filters `compact` could remove, and what is in the way of the others.

    The model is traced, and half of what could go is removed from a copy whose other layers do not read it, which must
    compute the same as before; where it does not, each group of coupled layers is tried by itself. So a hard-coded
    `view` is named with its line. The zeros that the model has do not matter.

    Args:
        model: any module; left untouched.
        example_inputs: the positional arguments of a typical call: a tensor or a tuple.

    Returns:
        A `PrunableReport`; print it for a table.

    Raises:
        ImportError: `torch-pruning` is not installed (`pip install 'sparseprune[compact]'`).
        TypeError: `model` is no module.

    Example:
        >>> print(sparseprune.testing.check_prunable(model, torch.randn(1, 3, 32, 32)))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    args = plain_args(example_inputs)
    whole = plain_copy(model)
    names = [n for n, m in whole.named_modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]
    try:
        coupling = couple(whole, args)
    except UnsupportedError as error:
        return PrunableReport((), tuple(names), str(error))
    possible = _possible(coupling)
    if (trouble := removal_trouble(whole, args, coupling, _half(coupling, possible))) is not None:
        for group in coupling.groups():
            own = np.zeros_like(possible)
            own[group] = possible[group]
            part = _half(coupling, own)
            if part.any() and (trouble := removal_trouble(whole, args, coupling, part)) is not None:
                coupling.blocked.update(dict.fromkeys(group.tolist(), trouble))
        possible = _possible(coupling)
    layers = tuple(_layer(coupling, possible, name) for name in coupling.layers)
    return PrunableReport(layers, tuple(name for name in names if name not in coupling.layers), None)


def _planner(coupling: Coupling) -> Planner:
    return Planner(coupling, {name: np.full(len(ids), np.nan) for name, ids in coupling.into.items()})


def _possible(coupling: Coupling) -> Bools:
    """All that may go at once, if nobody reads it."""
    read = np.concatenate([np.zeros(0, np.int64), *(coupling.into[name] for name in coupling.readers())])
    possible = np.bincount(read[read >= 0], minlength=coupling.size) > 0
    possible[list(coupling.blocked)] = False
    return _planner(coupling).feasible(possible)


def _half(coupling: Coupling, possible: Bools) -> Bools:
    """Every second of them."""
    chosen = possible.copy()
    for ids in coupling.out.values():
        chosen[ids[ids >= 0][1::2]] = False
    return _planner(coupling).feasible(chosen)


def _layer(coupling: Coupling, possible: Bools, name: str) -> PrunableLayer:
    ids = coupling.out[name]
    going = flags_of(ids, possible)
    reasons = [coupling.blocked[component] for component in ids[~going].tolist() if component in coupling.blocked]
    reason = max(reasons, key=reasons.count) if reasons else None
    if reason is None and not going.any():
        reason = "it has only one" if len(ids) == 1 else "nothing that is known reads it"
    return PrunableLayer(name, len(ids), int(going.sum()), tuple(coupling.coupled(name)), reason)
