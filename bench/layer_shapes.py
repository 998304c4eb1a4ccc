"""What `bench/layers.py` measures: every distinct layer of six networks of the zoo, and BERT-base's linears."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn

from sparseprune.zoo import NETWORKS as ZOO

__all__ = ["GROUPS", "Layer", "table"]

NETWORKS = ("resnet18-32", "resnet18", "resnet50", "vgg16", "mobilenetv2", "yolov4-tiny")
BERT = ((768, 768), (768, 3072), (3072, 768))
TOKENS = 128
GROUPS = ("convolution", "batched linear", "linear, batch 1", "depthwise", "stem")


@dataclass(frozen=True)
class Layer:
    """A convolution, or a linear layer (`size` is empty then) of `rows` inputs."""

    inputs: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    size: tuple[int, ...] = ()  # of the input, (H, W)
    rows: int = 1  # images, or inputs of a linear layer

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.outputs, self.inputs // self.groups, *(self.kernel if self.size else ()))

    @property
    def pixels(self) -> int:
        """Places of the output: what a kept weight is multiplied with."""
        ends = zip(self.size, self.kernel, self.stride, self.padding, strict=False)
        height, width = [(s + 2 * p - k) // d + 1 for s, k, d, p in ends] if self.size else (1, 1)
        return self.rows * height * width

    @property
    def group(self) -> str:
        if not self.size:
            return "linear, batch 1" if self.rows == 1 else "batched linear"
        if self.groups == self.inputs > 1:
            return "depthwise"
        return "stem" if self.inputs <= 4 else "convolution"

    @cached_property
    def name(self) -> str:
        batch = f" n{self.rows}" if self.rows > 1 else ""
        if not self.size:
            return f"linear {self.inputs}-{self.outputs}{batch}"
        groups = f" g{self.groups}" if self.groups > 1 else ""
        kernel, size = "x".join(map(str, self.kernel)), "x".join(map(str, self.size))
        return f"conv {kernel} s{self.stride[0]} {self.inputs}-{self.outputs}{groups} {size}{batch}"


@cache
def table(batch: int = 1) -> dict[Layer, list[str]]:
    """Each distinct layer, and the networks that have it."""
    found: dict[Layer, list[str]] = {}
    for network in NETWORKS:
        for layer in _layers(network, batch):
            if network not in found.setdefault(layer, []):
                found[layer].append(network)
    for rows in (TOKENS * batch, batch):
        for inputs, outputs in BERT:
            found.setdefault(Layer(inputs, outputs, rows=rows), []).append("bert-base")
    return found


def _layers(network: str, batch: int) -> list[Layer]:
    """In the order of a forward pass without data."""
    found: list[Layer] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        shape = args[0].shape
        if isinstance(module, nn.Linear):
            found.append(Layer(module.in_features, module.out_features, rows=shape[0]))
            return
        assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str) and module.dilation == (1, 1)
        kernel, stride, padding = ((a, b) for a, b in (module.kernel_size, module.stride, module.padding))
        size = tuple(shape[2:])
        found.append(Layer(shape[1], module.out_channels, kernel, stride, padding, module.groups, size, shape[0]))

    with torch.device("meta"), torch.no_grad():
        model = ZOO[network].factory().eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_pre_hook(note)
        model(torch.empty(batch, *ZOO[network].input_shape))
    return found
