"""Pruning whole filters so that nothing is left of their channels."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

import sparseprune
from sparseprune.pruning import Criterion, get_mask, set_mask
from sparseprune.pruning.masks import effective_weight

__all__ = ["channels_left", "prune_filters"]


def prune_filters(model: nn.Module, amount: float, layers: tuple[str, ...], criterion: str | Criterion) -> None:
    """Mask `amount` of the filters of each of those layers, ranked inside the layer, and the batch norm behind them.

    A filter of zeros still leaves a constant, its batch norm's shift, which is no constant any more once a depthwise
    convolution has padded zeros around it. With scale and shift masked too the channel is zero, and so all that
    depends on it can go.
    """
    sparseprune.prune(model, amount, criterion=criterion, pattern="filter", scope="local", include=layers)
    for conv, norm in _pairs(model):
        mask = get_mask(conv)
        if mask is not None and not bool((kept := _filters(mask)).all()):
            set_mask(norm, kept, "weight")
            set_mask(norm, kept, "bias")


def channels_left(model: nn.Module, layers: tuple[str, ...]) -> float:
    """The share of those layers' filters that hold a weight."""
    kept = torch.cat([_filters(effective_weight(model.get_submodule(name)) != 0) for name in layers])
    return float(kept.float().mean())


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and the batch norms right behind them."""
    for block in model.modules():
        if isinstance(block, nn.Sequential):
            for conv, norm in pairwise(block):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    yield conv, norm


def _filters(mask: Tensor) -> Tensor:
    return mask.flatten(1).any(1)
