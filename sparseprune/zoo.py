"""Residual networks to prune, convert and measure, written from the papers.

He, Zhang, Ren, Sun: *Deep Residual Learning for Image Recognition*, 2015 (arXiv 1512.03385). Layer names follow the
usual ones (`conv1`, `layer1.0.conv1`, `layer2.0.downsample.0`, `fc`), so common checkpoints load as they are.

Every factory takes `seed`: weights are drawn with that seed (He initialisation for convolutions, arXiv 1502.01852) and
the global random state is left as it was. `seed=None` draws from the global state. Models come in training mode, as
torch's do. Inputs are float32 `(N, in_channels, H, W)`, outputs float32 logits `(N, num_classes)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "Network", "ResNet", "resnet18", "resnet18_32", "resnet50"]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: `(N, inputs, H, W)` to `(N, width, H/stride, W/stride)`."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += shortcut
        result: Tensor = self.relu(y)
        return result


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 and a shortcut: `(N, inputs, H, W)` to `(N, 4·width, H/stride, W/stride)`.

    The stride sits on the 3×3 convolution ("version 1.5"), not on the first 1×1 as in the paper: it is what today's
    checkpoints use, and half a point more accurate on ImageNet.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, 4 * width, 1)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += shortcut
        result: Tensor = self.relu(y)
        return result


class ResNet(nn.Module):
    """A residual network: stem, stages of blocks (each after the first halves H and W), average, linear.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        blocks: Blocks in each stage, one to four entries, for example `(2, 2, 2, 2)`.
        width: Channels of the first stage; each later stage has twice as many.
        num_classes: Outputs of the last linear layer.
        in_channels: Channels of the input.
        small_images: True for the 32×32 stem (3×3, stride 1, no max pooling), False for the 224×224 one (7×7, stride 2,
            then 3×3 max pooling of stride 2).
        seed: Seed of the weights; None draws from torch's global random state.

    Raises:
        ValueError: A size that is not positive, or not one to four stages.

    Example:
        >>> ResNet(BasicBlock, (1, 1, 1), width=16, small_images=True)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        *,
        width: int = 64,
        num_classes: int = 10,
        in_channels: int = 3,
        small_images: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= len(blocks) <= 4 or min(blocks) < 1:
            raise ValueError(f"blocks={tuple(blocks)}: expected one to four positive counts")
        for name, value in (("width", width), ("num_classes", num_classes), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"{name}={value} is not positive")
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.conv1 = _conv(in_channels, width, 3) if small_images else _conv(in_channels, width, 7, 2)
            self.bn1 = nn.BatchNorm2d(width)
            self.relu = nn.ReLU(inplace=True)
            self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, 2, 1)
            channels = width
            self.stages = len(blocks)
            for stage, count in enumerate(blocks):
                layers: list[nn.Module] = []
                for index in range(count):
                    stride = 2 if stage and index == 0 else 1
                    layers.append(block(channels, width << stage, stride))
                    channels = (width << stage) * block.expansion
                self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(channels, num_classes)
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def resnet18_32(
    num_classes: int = 10,
    *,
    width: int = 64,
    in_channels: int = 3,
    blocks: Sequence[int] = (2, 2, 2, 2),
    seed: int | None = 0,
) -> ResNet:
    """ResNet-18 for 32×32 images: a 3×3 stem of stride 1 and no pooling; 11.2 M parameters, 0.56 G multiply-adds.

    Smaller `width` (64) and `blocks` make small relatives of it: `width=16, blocks=(1, 1, 1)` is a ResNet-8.

    Example:
        >>> resnet18_32()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    return ResNet(BasicBlock, blocks, width=width, num_classes=num_classes, in_channels=in_channels,
                  small_images=True, seed=seed)  # fmt: skip


def resnet18(num_classes: int = 1000, *, in_channels: int = 3, seed: int | None = 0) -> ResNet:
    """ResNet-18 for 224×224 images: 11.7 M parameters, 1.8 G multiply-adds. Input `(N, in_channels, 224, 224)`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, in_channels=in_channels, seed=seed)


def resnet50(num_classes: int = 1000, *, in_channels: int = 3, seed: int | None = 0) -> ResNet:
    """ResNet-50 v1.5 for 224×224 images: 25.6 M parameters, 4.1 G multiply-adds. Input `(N, in_channels, 224, 224)`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, in_channels=in_channels, seed=seed)


@dataclass(frozen=True)
class Network:
    """An entry of `NETWORKS`: how to make a model, and what to feed it.

    Attributes:
        factory: Makes the model, weights seeded with 0.
        input_shape: Shape of one input without the batch, `(C, H, W)`.
        keep_dense: Names of the layers that pruning leaves alone: the stem, which has few weights and much to say.
        about: One line for `--help`.
    """

    factory: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    keep_dense: tuple[str, ...]
    about: str


NETWORKS: dict[str, Network] = {
    "resnet18-32": Network(resnet18_32, (3, 32, 32), ("conv1",), "ResNet-18 for 32×32 images"),
    "resnet18": Network(resnet18, (3, 224, 224), ("conv1",), "ResNet-18 for 224×224 images"),
    "resnet50": Network(resnet50, (3, 224, 224), ("conv1",), "ResNet-50 v1.5 for 224×224 images"),
}
