"""Which components go: those that every layer reads as a constant, or does not read at all.

A constant moves into the bias of the layer that reads it. Where zeros are padded around the image that would be wrong
at the border (of a constant that is not 0), so there one constant channel stays and stands for all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .coupling import Coupling
from .layer_weights import get_taps, is_padded

__all__ = ["Planner", "flags_of"]

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Doubles = NDArray[np.float64]


@dataclass(eq=False)
class Planner:
    """Decides which components go.

    Attributes:
        coupling: What goes together.
        constants: Each layer's input channels, NaN where they are no constants.
        multiple_of: How many channels are left in each layer: a multiple of this, where there are so many.
        held: Why a component stays that could go by itself.
    """

    coupling: Coupling
    constants: dict[str, Doubles]
    multiple_of: int = 1
    held: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = self.coupling.layers
        self.used = {name: (get_taps(layer) != 0).any(-1).cpu().numpy() for name, layer in layers.items()}
        self.padded = {name: is_padded(layer) for name, layer in layers.items()}

    def plan(self) -> Bools:
        """The components that go: a row that goes does not read any more, so this is repeated until nothing changes.

        What has been found to go stays gone unless that turns out inconsistent; so the end is reached.
        """
        removed = np.zeros(self.coupling.size, bool)
        for _ in range(2 * len(self.coupling.layers) + 2):
            before, removed = removed, self._candidates(removed)
            if np.array_equal(before, removed):
                return removed
        while not np.array_equal(removed, found := removed & self._candidates(removed)):
            removed = found
        return removed

    def feasible(self, removed: Bools) -> Bools:
        """As many of these as can go when no layer may lose everything and parts have to stay balanced."""
        return self._trim(removed.copy(), np.zeros_like(removed))

    def reads(self, name: str, removed: Bools) -> Bools:
        """Which input channels a layer has weights for, in rows that stay."""
        used, rows = self.used[name], flags_of(self.coupling.out[name], removed)
        staying = used & ~rows.reshape(*used.shape[:2], 1)
        return np.asarray(staying.any(1).reshape(-1), np.bool_)

    def _candidates(self, removed: Bools) -> Bools:
        own = self.coupling
        going = np.ones(own.size, bool)
        going[list(own.blocked)] = False
        going[list(self.held)] = False
        readers = own.readers()
        reads = {name: self.reads(name, removed) for name in readers}
        for name in readers:
            components, constants = own.into[name], self.constants[name]
            needed = reads[name] & np.isnan(constants)
            if self.padded[name] and len(self.used[name]) > 1:  # the constants of a group would need one in each
                needed |= reads[name] & (constants != 0)
            going[components[needed & (components >= 0)]] = False
        read = [ids[ids >= 0] for ids in (own.into[name] for name in readers)]
        going &= np.bincount(np.concatenate([np.zeros(0, np.int64), *read]), minlength=own.size) > 0
        for name in readers:
            if self.padded[name]:
                self._hold_constant(name, reads[name], going)
        return self._trim(going, removed)

    def _hold_constant(self, name: str, reads: Bools, going: Bools) -> None:
        """Of the constants that a padded layer reads, the largest stays."""
        components, constants = self.coupling.into[name], self.constants[name]
        telling = np.where(np.isnan(constants), 0, np.abs(constants)) * (components >= 0)
        leaving = flags_of(components, going)
        # One that stays anyway would do, were it not close to nothing, and so next to rounding.
        if np.max(telling, initial=0, where=leaving & reads) > 10 * np.max(telling, initial=0, where=~leaving):
            component = int(components[telling.argmax()])
            going[component] = False
            self.held[component] = f"the constant at the padded border of {name}: it stands for all of them"

    def _trim(self, going: Bools, before: Bools) -> Bools:
        last = None
        while last is None or not np.array_equal(last, going):
            last = going.copy()
            for parts in self.coupling.balanced:
                _balance(parts, going, before)
            for ids in self.coupling.out.values():
                leaving = ids[flags_of(ids, going)]
                short = (len(leaving) - len(ids)) % self.multiple_of
                going[_last(leaving, short, before)] = False
            for ids in [*self.coupling.out.values(), *self.coupling.into.values()]:
                if len(ids) and (ids >= 0).all() and going[ids].all():
                    going[ids[0]] = False
                    self.held.setdefault(int(ids[0]), "a layer needs one channel")
        return going


def flags_of(components: Ints, flags: Bools) -> Bools:
    """The flags of channels by those of components; False for channels of none."""
    known = components >= 0
    result = np.zeros(len(components), np.bool_)
    result[known] = flags[components[known]]
    return result


def _balance(parts: tuple[Ints, ...], going: Bools, before: Bools) -> None:
    """Keep some, so that each part loses the same share; those that were found to go earlier go first."""
    sizes = np.array([len(part) for part in parts])
    shares = sizes // np.gcd.reduce(sizes)
    times = min(int(flags_of(part, going).sum()) // share for part, share in zip(parts, shares, strict=True))
    for part, share in zip(parts, shares, strict=True):
        leaving = part[flags_of(part, going)]
        going[_last(leaving, len(leaving) - times * share, before)] = False


def _last(leaving: Ints, count: int, before: Bools) -> Ints:
    """The last so many, those first that were not found to go earlier."""
    order = np.argsort(~before[leaving], kind="stable")
    return leaving[order][max(len(leaving) - count, 0) :]
