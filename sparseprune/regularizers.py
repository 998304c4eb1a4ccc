"""Penalties for `finetune(regularizer=...)`: plain shrinkage, and sparse training before structured pruning."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .pruning.selection import Selector, find_weights

__all__ = ["L1", "L2", "BNScaleL1", "GroupLasso", "Regularizer"]

_LAYERS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._BatchNorm,)


class Regularizer(ABC):
    """A penalty that is added to the loss. Subclass it for another one, or pass `finetune` any function of the model.

    Args:
        strength: factor of the penalty, positive; None is the class's `default_strength`, a beginning to tune from.
        include, exclude: which layers, as in `sparseprune.prune`.

    Raises:
        ValueError: `strength` is not positive and finite.
    """

    default_strength = 1e-4
    _layers: tuple[type[nn.Module], ...] = _LAYERS

    def __init__(
        self, strength: float | None = None, *, include: tuple[Selector, ...] | Selector | None = None,
        exclude: tuple[Selector, ...] | Selector = (),
    ) -> None:  # fmt: skip
        strength = self.default_strength if strength is None else strength
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength < float("inf"):
            raise ValueError(f"strength must be a positive number, got {strength!r}")
        self.strength = float(strength)
        self._include = self._layers if include is None else include
        self._exclude = exclude

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty, a scalar with a gradient.

        Raises:
            ValueError: the model has no layer to penalise.
        """
        parts = [self.penalty(weight).float() for weight in self._weights(model)]
        return self.strength * torch.stack(parts).sum()

    @abstractmethod
    def penalty(self, weight: Tensor) -> Tensor:
        """The penalty of one parameter, before `strength`: a scalar."""

    def _weights(self, model: nn.Module) -> Iterator[Tensor]:
        for found in find_weights(model, self._include, self._exclude):
            module, name = found.sites[0]
            value = getattr(module, name)  # through the mask: pruned weights are zero and have no gradient
            assert isinstance(value, Tensor)
            yield value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.strength:g})"


class L1(Regularizer):
    """strength * sum |w| (lasso; Tibshirani 1996): draws weights to zero. Try 1e-6 to 1e-4.

    Example:
        >>> finetune(model, loader, epochs=3, regularizer=L1(1e-5))
    """

    default_strength = 1e-5

    def penalty(self, weight: Tensor) -> Tensor:
        return weight.abs().sum()


class L2(Regularizer):
    """strength * sum w**2: weight decay, for chosen layers. The optimizer's `weight_decay=d` is L2(d / 2) everywhere.

    Example:
        >>> finetune(model, loader, epochs=3, regularizer=L2(1e-4))
    """

    def penalty(self, weight: Tensor) -> Tensor:
        return weight.square().sum()


class BNScaleL1(Regularizer):
    """strength * sum |gamma| over the scales of batch norms: network slimming. Try 1e-5 to 1e-3.

    Liu et al., Learning Efficient Convolutional Networks through Network Slimming, 2017 (arXiv:1708.06519).

    Example:
        >>> finetune(model, loader, epochs=3, regularizer=BNScaleL1(1e-4))
        >>> prune(model, 0.5, criterion=BNScale(example), pattern="filter")
    """

    _layers = _NORMS

    def penalty(self, weight: Tensor) -> Tensor:
        return weight.abs().sum()


class GroupLasso(Regularizer):
    """strength * sum over filters of sqrt(weights in it) * ||filter||_2: whole filters shrink to zero together.

    Wen et al., Learning Structured Sparsity in Deep Neural Networks, 2016 (arXiv:1608.03665). Try 1e-5 to 1e-3.

    Args:
        dim: the dimension of a weight (out, in, ...) whose slices are the groups: 0 filters (neurons), 1 channels.

    Example:
        >>> finetune(model, loader, epochs=3, regularizer=GroupLasso(1e-4))
        >>> prune(model, 0.5, pattern="filter")
    """

    def __init__(
        self, strength: float | None = None, *, dim: int = 0, include: tuple[Selector, ...] | Selector | None = None,
        exclude: tuple[Selector, ...] | Selector = (),
    ) -> None:  # fmt: skip
        super().__init__(strength, include=include, exclude=exclude)
        if dim not in (0, 1):
            raise ValueError(f"dim must be 0 (filters) or 1 (channels), got {dim!r}")
        self.dim = dim

    def penalty(self, weight: Tensor) -> Tensor:
        groups = weight.transpose(0, self.dim).flatten(1)
        # The norm's gradient at a filter of zeros is undefined; the tiny constant makes it zero.
        norms = groups.square().sum(1).add(1e-12).sqrt()
        return norms.sum() * math.sqrt(groups.shape[1])
