"""The weights of convolutions and linear layers in one shape, whatever their kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["channel_axis", "get_taps", "is_padded", "set_taps"]

_CONVS = nn.modules.conv._ConvNd


def get_taps(layer: nn.Module) -> Tensor:
    """The weight as `(groups, out / groups, in / groups, places)`, detached."""
    parameter = layer._parameters["weight"]
    assert parameter is not None
    weight = parameter.detach()
    if isinstance(layer, nn.Linear):
        return weight[None, :, :, None]
    assert isinstance(layer, _CONVS)
    if layer.transposed:
        return weight.reshape(layer.groups, -1, *weight.shape[1:2], weight[0, 0].numel()).transpose(1, 2)
    return weight.reshape(layer.groups, -1, *weight.shape[1:2], weight[0, 0].numel())


def set_taps(layer: nn.Module, taps: Tensor) -> None:
    """Make `taps` the weight, and the layer as large as it; the bias is the caller's."""
    old = layer._parameters["weight"]
    assert old is not None
    groups, outputs, inputs, _ = taps.shape
    if isinstance(layer, nn.Linear):
        weight = taps[0, :, :, 0].contiguous()
        layer.out_features, layer.in_features = outputs, inputs
    else:
        assert isinstance(layer, _CONVS)
        taps = taps.transpose(1, 2) if layer.transposed else taps
        weight = taps.reshape(groups * taps.shape[1], taps.shape[2], *old.shape[2:])
        if old.dim() == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last):
            weight = weight.contiguous(memory_format=torch.channels_last)
        layer.groups, layer.out_channels, layer.in_channels = groups, groups * outputs, groups * inputs
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=old.requires_grad)


def is_padded(layer: nn.Module) -> bool:
    """Whether a constant channel is read as something else than a constant by some places of the output."""
    if not isinstance(layer, _CONVS):
        return False
    if layer.transposed:
        return True
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    return max(layer.kernel_size) > 1 if layer.padding == "same" else any(int(size) > 0 for size in layer.padding)


def channel_axis(layer: nn.Module) -> int:
    """Which dimension of the layer's input and output is that of its channels, counted from the end."""
    return -1 if not isinstance(layer, _CONVS) else -1 - len(layer.kernel_size)
