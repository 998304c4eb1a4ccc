"""The choices that `autoprune` has: each layer's sparsities, what they cost by a latency table, and what they hurt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .allocation import allocate
from .latency import LatencyTable, pruned_count
from .pruning.selection import PrunableWeight, find_weights

__all__ = ["Choices"]


@dataclass(frozen=True, eq=False)
class Choices:
    """A grid of options for each layer, option 0 the densest.

    Attributes:
        names: The layers', as the table and `prune`'s `amounts` call them.
        parameters: Their weights', `conv1.weight`.
        shapes: Their weights'.
        grid: The sparsities asked for.
        counts: (layers, options) int64, pruned weights; never below what is pruned already, and one is always kept.
        sparsities: (layers, options), those of the counts.
        costs: (layers, options), milliseconds.
        fixed_ms: All that does not depend on the choice.
    """

    names: tuple[str, ...]
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    grid: tuple[float, ...]
    counts: NDArray[np.int64]
    sparsities: NDArray[np.float64]
    costs: NDArray[np.float64]
    fixed_ms: float

    @classmethod
    def of(
        cls, model: nn.Module, weights: Sequence[PrunableWeight], table: LatencyTable, grid: tuple[float, ...]
    ) -> Choices:
        """The choices for those of `weights` that the table has; its other layers stay as they are in `model`.

        Raises:
            ValueError: The table is not this model's, or has none of these layers.
        """
        known = {layer: weight for weight in weights for layer in weight.names if layer in table.layers}
        if not known:
            raise ValueError(f"the latency table has none of the layers to prune; it has {list(table.layers)[:8]}")
        others = [layer for layer in table.layers if layer not in known]
        resting = find_weights(model, tuple(others)) if others else []
        for layer, weight in [*known.items(), *((x, w) for w in resting for x in w.names if x in others)]:
            if tuple(weight.values().shape) != table.layers[layer].shape:
                raise ValueError(
                    f"table: was measured with a weight of shape {table.layers[layer].shape} in layer {layer!r}, "
                    f"the model has {tuple(weight.values().shape)}"
                )
        zeros = {layer: int((weight.values() == 0).sum()) for layer, weight in known.items()}
        sizes = {layer: weight.values().numel() for layer, weight in known.items()}
        counts = np.array([[max(pruned_count(s, sizes[x]), zeros[x]) for s in grid] for x in known], np.int64)
        sparsities = counts / np.array([[sizes[layer]] for layer in known])
        present = {x: float((w.values() == 0).double().mean()) for w in resting for x in w.names if x in others}
        return cls(
            names=tuple(known),
            parameters=tuple(weight.name for weight in known.values()),
            shapes=tuple(table.layers[layer].shape for layer in known),
            grid=grid,
            counts=counts,
            sparsities=sparsities,
            costs=np.array([[table.layer_ms(x, s) for s in row] for x, row in zip(known, sparsities, strict=True)]),
            fixed_ms=table.rest_ms + sum(table.layer_ms(layer, share) for layer, share in present.items()),
        )

    @property
    def least_ms(self) -> float:
        """Of all choices together."""
        return self.fixed_ms + float(self.costs.min(axis=1).sum())

    @property
    def most_ms(self) -> float:
        """With option 0 everywhere."""
        return self.fixed_ms + float(self.costs[:, 0].sum())

    def ms(self, chosen: Sequence[int]) -> float:
        """Predicted milliseconds of the whole network with one option for each layer."""
        return self.fixed_ms + float(self.costs[range(len(chosen)), chosen].sum())

    def solve(self, errors: NDArray[np.float64], budget_ms: float) -> list[int]:
        """The options with the least sum of errors (layers, options) whose predicted time is within the budget."""
        return allocate(errors, self.costs, max(budget_ms, self.least_ms) - self.fixed_ms)

    def counts_of(self, chosen: Sequence[int]) -> list[int]:
        """How many weights each layer has pruned then."""
        return [int(row[option]) for row, option in zip(self.counts, chosen, strict=True)]

    def given_errors(self, errors: Mapping[str, Mapping[float, float]]) -> NDArray[np.float64]:
        """The user's error of each layer and sparsity of the grid -> (layers, options).

        Raises:
            ValueError: One is missing, negative or NaN.
        """
        for name in self.names:
            missing = "" if name not in errors else [s for s in self.grid if s not in errors[name]]
            if missing or name not in errors:
                what = f"sparsity {missing[0]} of layer {name!r}" if missing else f"layer {name!r}"
                raise ValueError(f"errors: {what} is missing; the sparsities are {list(self.grid)}")
        found = np.array([[float(errors[name][s]) for s in self.grid] for name in self.names])
        if not (found >= 0).all():
            raise ValueError("errors: every one must be at least 0, and a number")
        return found
