"""Every layer pruned in one shot to every sparsity of a grid, and how much each such choice hurts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .dense import plain_copy
from .evaluation import Loss, casting, unpack
from .pruning.masks import stored_parameter
from .pruning.selection import PrunableWeight, find_weights

__all__ = ["Candidates"]

Counts = NDArray[np.int64]
Errors = NDArray[np.float64]
Batches = Sequence[Any]


class Candidates:
    """A model's layers, each pruned to several counts of weights; the counts are numbered: option 0 prunes fewest.

    Masks that grow from option to option take a byte per weight in all: the number of options that keep it. An option
    whose kept weights were updated as well (Optimal Brain Surgeon) is held as it is.

    Args:
        model: Copied, not changed; with its present zeros.
        names: The parameters, by qualified name (`conv1.weight`).
        counts: (layers, options) int64, pruned weights of each, never falling along a row.
        prune: Prunes a model in place to one count for each name.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], counts: Counts, prune: Callable[[nn.Module, list[int]], object]
    ) -> None:
        self.model, self.options = plain_copy(model), counts.shape[1]
        self._weights = _find(self.model, names)
        self._dense = [weight.values().clone() for weight in self._weights]
        self._levels = [torch.zeros(w.shape, dtype=torch.uint8, device=w.device) for w in self._dense]
        self._updated: dict[tuple[int, int], Tensor] = {}
        for option in range(self.options):
            twin = plain_copy(model)
            prune(twin, counts[:, option].tolist())
            for layer, weight in enumerate(_find(twin, names)):
                self._hold(layer, option, weight.values())

    def _hold(self, layer: int, option: int, values: Tensor) -> None:
        kept = values != 0
        grows = not bool((kept & (self._levels[layer] < option)).any())
        if grows and torch.equal(values, torch.where(kept, self._dense[layer], 0)):
            self._levels[layer] += kept
        else:
            self._updated[layer, option] = values.clone()

    def _weight(self, layer: int, option: int) -> Tensor:
        if (layer, option) in self._updated:
            return self._updated[layer, option]
        return torch.where(self._levels[layer] > option, self._dense[layer], 0)

    def magnitude_errors(self) -> Errors:
        """(layers, options): the squared weights that go, of all of the layer's."""
        errors = np.zeros((len(self._weights), self.options))
        for layer, weight in enumerate(self._dense):
            squares = weight.double().square()
            for option in range(self.options):
                gone = float(squares[self._weight(layer, option) == 0].sum())
                errors[layer, option] = gone / max(float(squares.sum()), np.finfo(np.float64).tiny)
        return errors

    def output_errors(self, batches: Batches) -> Errors:
        """(layers, options): squared change of a layer's output, of all that its weight contributes, on dense inputs.

        Args:
            batches: (inputs, ..., targets) each; targets are not looked at.
        """
        changes = np.zeros((len(self._weights), self.options + 1))  # the last: without the weight
        hooks = []
        for layer, weight in enumerate(self._weights):
            hook = self._measure_change(layer, changes)
            hooks += [module.register_forward_hook(hook) for module, _ in weight.sites]
        try:
            with torch.no_grad():
                for batch in batches:
                    self.model(*unpack(batch, self._place, "batches")[0])
        finally:
            for handle in hooks:
                handle.remove()
        return np.asarray(changes[:, :-1] / np.maximum(changes[:, -1:], np.finfo(np.float64).tiny))

    def _measure_change(self, layer: int, changes: Errors) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            for option in range(self.options + 1):
                last = option == self.options
                self._set(layer, torch.zeros_like(self._dense[layer]) if last else self._weight(layer, option))
                changes[layer, option] += float((module.forward(*args) - output).double().square().sum())
            self._set(layer, self._dense[layer])

        return hook

    def loss(
        self, chosen: Sequence[int], batches: Batches, loss: Loss | None = None, autocast: torch.dtype | None = None
    ) -> float:
        """Mean loss (None: cross entropy) over batches with one option for each layer, before any finetuning.

        Batch norms use each batch's own statistics: those of the dense model say nothing about a pruned one.
        """
        total, examples = 0.0, 0
        with self._applied(chosen), torch.no_grad():
            for batch in batches:
                inputs, targets = unpack(batch, self._place, "batches")
                count = len(targets) if isinstance(targets, Tensor) and targets.ndim else 1
                with casting(self._place, autocast):
                    value = (loss or F.cross_entropy)(self.model(*inputs), targets)
                total += float(value) * count
                examples += count
        return total / examples

    @contextmanager
    def _applied(self, chosen: Sequence[int]) -> Iterator[None]:
        for module in self.model.modules():
            module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
        try:
            for layer, option in enumerate(chosen):
                self._set(layer, self._weight(layer, option))
            yield
        finally:
            for layer, weight in enumerate(self._dense):
                self._set(layer, weight)
            self.model.eval()

    def _set(self, layer: int, values: Tensor) -> None:
        parameter = stored_parameter(*self._weights[layer].sites[0])
        assert isinstance(parameter, Tensor)
        parameter.data.copy_(values)

    @property
    def _place(self) -> torch.device:
        return self._dense[0].device


def _find(model: nn.Module, names: Sequence[str]) -> list[PrunableWeight]:
    """The weights of these names, in the order of the names."""
    found = {weight.name: weight for weight in find_weights(model, tuple(names))}
    return [found[name] for name in names]
