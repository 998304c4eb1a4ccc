"""Which channels can only go together, and which cannot go at all.

A *component* is a set of channels tied to each other: a filter, its batch norm, the filters of other layers that are
added to it, and the columns of all weights that read it. Components are numbered; -1 is a channel of none (a channel of
the model's input, say).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

__all__ = ["OUTPUT", "Coupling", "Union", "is_depthwise"]

Ints = NDArray[np.int64]

OUTPUT = "it is an output of the model"


@dataclass(eq=False)
class Coupling:
    """The components of a model.

    Attributes:
        layers: Convolutions and linear layers that the example reaches, by name, in the order of their first call.
        out: The component of each output channel of a layer.
        into: The component of each input channel of a layer; a depthwise layer's are those of its output.
        norms: The components of the channels of batch norms, instance norms and PReLUs.
        followers: The batch norm that alone reads a layer's output, where there is one.
        balanced: Parts of a tensor from which as many channels have to go, in proportion: `(components, ...)`.
        blocked: Why a component has to stay.
        foreign: Components whose values also come from something else than layers; they are never constants.
    """

    layers: dict[str, nn.Module]
    out: dict[str, Ints] = field(default_factory=dict)
    into: dict[str, Ints] = field(default_factory=dict)
    norms: dict[str, Ints] = field(default_factory=dict)
    followers: dict[str, str] = field(default_factory=dict)
    balanced: list[tuple[Ints, ...]] = field(default_factory=list)
    blocked: dict[int, str] = field(default_factory=dict)
    foreign: set[int] = field(default_factory=set)
    size: int = 0

    def readers(self) -> list[str]:
        """Layers that end a component: their input channels are not their output channels."""
        return [name for name, layer in self.layers.items() if not is_depthwise(layer)]

    def coupled(self, layer: str) -> list[str]:
        """The other layers whose filters go together with those of `layer`."""
        own = self.out[layer][self.out[layer] >= 0]
        return [name for name, ids in self.out.items() if name != layer and np.isin(ids, own).any()]

    def groups(self) -> list[Ints]:
        """Components that share a layer's output, or have to be balanced: those to be tried together."""
        joined = Union(self.size)
        for parts in [*((own,) for own in self.out.values()), *self.balanced]:
            members = np.concatenate(parts)
            for component in members[members >= 0].tolist():
                joined.join(int(members[members >= 0][0]), component)
        roots = joined.roots()
        return [np.flatnonzero(roots == root) for root in dict.fromkeys(roots.tolist())]


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each output channel reads the input channel of its own number, and no other."""
    return isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.in_channels == layer.out_channels > 1


class Union:
    """Which of some numbers are the same."""

    def __init__(self, size: int = 0) -> None:
        self.parents = list(range(size))

    def add(self) -> int:
        self.parents.append(len(self.parents))
        return self.parents[-1]

    def find(self, item: int) -> int:
        while self.parents[item] != item:
            self.parents[item] = self.parents[self.parents[item]]
            item = self.parents[item]
        return item

    def join(self, one: int, other: int) -> None:
        one, other = self.find(one), self.find(other)
        self.parents[max(one, other)] = min(one, other)

    def roots(self) -> Ints:
        return np.array([self.find(item) for item in range(len(self.parents))], np.int64)
