"""Which input channels of which layers are constants, whatever the model is given, and which constants.

Found by running the model on noise: every filter that reads something not constant gives random numbers instead of its
own, of both signs and of very different size, at every place. What comes out the same at every place and in every run
does not depend on them. All that lies between the layers (batch norm, activations, sums, pooling) is the model's own
code, so a constant is exactly what the model itself computes with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .coupling import Coupling
from .layer_weights import channel_axis, get_taps

__all__ = ["find_constants"]

Bools = NDArray[np.bool_]
Doubles = NDArray[np.float64]

_NOISE = (1.0, -1.0, 1e6, -1e6)  # its sign and size in each run
_ROUNDING = 64  # in units of the dtype's epsilon: what a mean or an interpolation of equal numbers may be off


def find_constants(model: nn.Module, args: tuple[Any, ...], coupling: Coupling) -> dict[str, Doubles]:
    """Each layer's input channels: the constant, or NaN where it is none.

    A filter without weights gives its bias; so does, in the end, one that reads nothing but constants, so this is
    repeated until nothing is found any more.
    """
    used = {name: (get_taps(layer) != 0).any(-1).cpu().numpy() for name, layer in coupling.layers.items()}
    constants = {name: np.full(_inputs(taps), np.nan) for name, taps in used.items()}
    live = {name: _live(used[name], constants[name]) for name in used}
    while True:
        for name, (low, high, rounding) in _Probe(coupling, live).run(model, args).items():
            with np.errstate(invalid="ignore"):
                same = high - low <= rounding * np.maximum(np.abs(low), np.abs(high))
            constants[name] = np.where(same & _trusted(name, coupling), (low + high) / 2, np.nan)
        before, live = live, {name: live[name] & _live(used[name], constants[name]) for name in used}
        if all(np.array_equal(before[name], live[name]) for name in used):
            return constants


def _inputs(used: Bools) -> int:
    return int(used.shape[0] * used.shape[2])


def _live(used: Bools, constants: Doubles) -> Bools:
    """Which outputs read a channel that is not known to be constant."""
    unknown = np.isnan(constants).reshape(len(used), 1, -1)
    return np.asarray((used & unknown).any(2).reshape(-1), np.bool_)


def _trusted(name: str, coupling: Coupling) -> Bools:
    """Channels that come from layers alone: an input or a parameter is the same in every run, yet no constant."""
    foreign = np.array(sorted(coupling.foreign), np.int64)
    components = coupling.into[name]
    return np.asarray((components >= 0) & ~np.isin(components, foreign), np.bool_)


class _Probe:
    """Runs the model on noise, and notes each layer's smallest and largest input, by channel, and its rounding."""

    def __init__(self, coupling: Coupling, live: dict[str, Bools]) -> None:
        self.coupling, self.live = coupling, live
        self.seen: dict[str, tuple[Doubles, Doubles, float]] = {}
        self.generator = torch.Generator().manual_seed(0)
        self.noise = 1.0

    def run(self, model: nn.Module, args: tuple[Any, ...]) -> dict[str, tuple[Doubles, Doubles, float]]:
        hooks = [
            layer.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, layer in self.coupling.layers.items()
        ]
        try:
            with torch.no_grad():
                for self.noise in _NOISE:
                    model(*tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, args))
        finally:
            for hook in hooks:
                hook.remove()
        return self.seen

    def _hook(self, name: str) -> Callable[..., Tensor]:
        rows = torch.from_numpy(self.live[name])

        def replace(layer: nn.Module, given: Any, keywords: Any, output: Tensor) -> Tensor:
            axis = channel_axis(layer)
            low, high, rounding = _range(given[0] if given else keywords["input"], axis)
            if name in self.seen:
                low, high = np.minimum(low, self.seen[name][0]), np.maximum(high, self.seen[name][1])
            self.seen[name] = low, high, rounding
            fake = (0.5 + torch.rand(output.shape, generator=self.generator)) * self.noise
            return torch.where(rows.reshape(-1, *[1] * (-1 - axis)).to(output.device), fake.to(output), output)

        return replace


def _range(x: Tensor, axis: int) -> tuple[Doubles, Doubles, float]:
    """Of each channel; NaN where it holds one."""
    flat = x.detach().movedim(axis, 0).flatten(1)
    rounding = _ROUNDING * torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0
    low, high = (value.double().cpu().numpy() for value in flat.aminmax(dim=1))
    return low, high, rounding
