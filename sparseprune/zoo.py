"""Networks to prune, convert and measure, written from their papers.

Names for `sparseprune benchmark` (`NETWORKS`), what they are and where they come from:

- `resnet18-32`, `resnet18`, `resnet50`: He, Zhang, Ren, Sun, *Deep Residual Learning for Image Recognition*, 2015
  (arXiv 1512.03385).
- `vgg16`, `vgg16-bn`: Simonyan, Zisserman, *Very Deep Convolutional Networks for Large-Scale Image Recognition*, 2014
  (arXiv 1409.1556); batch norm from Ioffe, Szegedy, 2015 (arXiv 1502.03167).
- `mobilenetv2`: Sandler, Howard, Zhu, Zhmoginov, Chen, *MobileNetV2: Inverted Residuals and Linear Bottlenecks*, 2018
  (arXiv 1801.04381).
- `yolov4-tiny`: Wang, Bochkovskiy, Liao, *Scaled-YOLOv4*, 2020 (arXiv 2011.08036).
- `ssd300-mobilenetv2`: Liu et al., *SSD: Single Shot MultiBox Detector*, 2015 (arXiv 1512.02325), on MobileNetV2.
- `unet`: Ronneberger, Fischer, Brox, *U-Net: Convolutional Networks for Biomedical Image Segmentation*, 2015
  (arXiv 1505.04597).
- `tutorial-cnn`: the small classifier of 32×32 images that PyTorch's CIFAR-10 tutorial trains; after LeNet-5.
- `lenet-300-100`: LeCun, Bottou, Bengio, Haffner, *Gradient-Based Learning Applied to Document Recognition*, 1998.

Layer names follow the usual ones (torchvision's where it has the network), so common checkpoints load as they are.

Every factory takes `seed`: weights are drawn with that seed (He initialisation for convolutions, arXiv 1502.01852) and
the global random state is left as it was. `seed=None` draws from the global state. Models come in training mode, as
torch's do. Inputs are float32 `(N, in_channels, H, W)`; classifiers return float32 logits `(N, num_classes)`, detectors
and U-Net what their classes say. A size that is not positive is a `ValueError` that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "MLP",
    "NETWORKS",
    "SSD300",
    "VGG",
    "MobileNetV2",
    "Network",
    "ResNet",
    "TutorialCNN",
    "UNet",
    "YOLOv4Tiny",
    "lenet_300_100",
    "mobilenetv2",
    "resnet18",
    "resnet18_32",
    "resnet50",
    "ssd300_mobilenetv2",
    "tutorial_cnn",
    "unet",
    "vgg16",
    "vgg16_bn",
    "yolov4_tiny",
]


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Weights drawn inside come from this seed; the global random state is put back. None: from the global state."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _positive(**sizes: int | float) -> None:
    for name, value in sizes.items():
        if value <= 0:
            raise ValueError(f"{name}={value} is not positive")


def _he(model: nn.Module) -> None:
    """He initialisation of every convolution; biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# --- ResNet ----------------------------------------------------------------------------------------------------------


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
    """A residual network (arXiv 1512.03385): stem, stages of blocks (each after the first halves H and W), linear.

    Takes `(N, in_channels, H, W)`, returns logits `(N, num_classes)`.

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
        _positive(width=width, num_classes=num_classes, in_channels=in_channels)
        with _seeded(seed):
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
            _he(self)

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
    """ResNet-18 for 224×224 images: 11.7 M parameters, 1.8 G multiply-adds. Input `(N, in_channels, 224, 224)`.

    Example:
        >>> resnet18()(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, in_channels=in_channels, seed=seed)


def resnet50(num_classes: int = 1000, *, in_channels: int = 3, seed: int | None = 0) -> ResNet:
    """ResNet-50 v1.5 for 224×224 images: 25.6 M parameters, 4.1 G multiply-adds. Input `(N, in_channels, 224, 224)`.

    Example:
        >>> resnet50()(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, in_channels=in_channels, seed=seed)


# --- VGG -------------------------------------------------------------------------------------------------------------

_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: 2×2 max pooling


class VGG(nn.Module):
    """3×3 convolutions and 2×2 max pooling, then three linear layers (arXiv 1409.1556).

    Takes `(N, in_channels, H, W)`, 224×224 in the paper; other sizes from 32 are pooled to 7×7. Layers are called
    `features.0` … `features.28` (`features.40` with batch norm) and `classifier.0`, `classifier.3`, `classifier.6`.

    Args:
        channels: Outputs of each convolution; 0 stands for a max pooling.
        batch_norm: Put batch norm after every convolution.
        hidden: Width of the two hidden linear layers.
        num_classes: Outputs of the last linear layer.
        in_channels: Channels of the input.
        seed: Seed of the weights; None draws from torch's global random state.

    Raises:
        ValueError: A size that is not positive, or no convolution first.

    Example:
        >>> VGG((8, 0, 16, 0), hidden=32)(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 1000])
    """

    def __init__(
        self,
        channels: Sequence[int] = _VGG16,
        *,
        batch_norm: bool = False,
        hidden: int = 4096,
        num_classes: int = 1000,
        in_channels: int = 3,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not channels or channels[0] < 1 or min(channels) < 0:
            raise ValueError(f"channels={tuple(channels)}: expected a positive number first and none below 0")
        _positive(hidden=hidden, num_classes=num_classes, in_channels=in_channels)
        with _seeded(seed):
            layers: list[nn.Module] = []
            width = in_channels
            for outputs in channels:
                if outputs == 0:
                    layers.append(nn.MaxPool2d(2))
                    continue
                layers.append(nn.Conv2d(width, outputs, 3, padding=1))
                layers += [nn.BatchNorm2d(outputs)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
                width = outputs
            self.features = nn.Sequential(*layers)
            self.avgpool = nn.AdaptiveAvgPool2d(7)
            self.classifier = nn.Sequential(
                nn.Linear(width * 7 * 7, hidden), nn.ReLU(inplace=True), nn.Dropout(),
                nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(),
                nn.Linear(hidden, num_classes),
            )  # fmt: skip
            _he(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def vgg16(num_classes: int = 1000, *, in_channels: int = 3, seed: int | None = 0) -> VGG:
    """VGG-16 (configuration D): 138.4 M parameters, 15.5 G multiply-adds. Input `(N, in_channels, 224, 224)`.

    Example:
        >>> vgg16()(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """
    return VGG(num_classes=num_classes, in_channels=in_channels, seed=seed)


def vgg16_bn(num_classes: int = 1000, *, in_channels: int = 3, seed: int | None = 0) -> VGG:
    """VGG-16 with batch norm after every convolution: 138.4 M parameters. Input `(N, in_channels, 224, 224)`.

    Example:
        >>> vgg16_bn()(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """
    return VGG(batch_norm=True, num_classes=num_classes, in_channels=in_channels, seed=seed)


# --- MobileNetV2 -----------------------------------------------------------------------------------------------------

# expansion, channels, blocks, stride of the first: table 2 of the paper
_INVERTED = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """1×1 to `expansion` times the channels, depthwise 3×3, linear 1×1; a shortcut where shapes allow it.

    `(N, inputs, H, W)` to `(N, outputs, H/stride, W/stride)`.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        expand = [_conv_bn_relu6(inputs, wide, 1)] if expansion != 1 else []
        self.conv = nn.Sequential(
            *expand,
            _conv_bn_relu6(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.shortcut else y


class MobileNetV2(nn.Module):
    """Inverted residuals: `features.0` is the stem, `features.1` … `features.17` the blocks, `features.18` a last 1×1.

    From arXiv 1801.04381. Takes `(N, in_channels, H, W)`, 224×224 in the paper; the features are 32 times smaller.

    Args:
        num_classes: Outputs of `classifier.1`.
        width: Multiplier of all channel counts, each rounded to a multiple of 8.
        in_channels: Channels of the input.
        seed: Seed of the weights; None draws from torch's global random state.

    Raises:
        ValueError: A size that is not positive.

    Example:
        >>> MobileNetV2(10, width=0.35)(torch.zeros(2, 3, 96, 96)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int = 1000, *, width: float = 1.0, in_channels: int = 3, seed: int | None = None
    ) -> None:
        super().__init__()
        _positive(num_classes=num_classes, width=width, in_channels=in_channels)
        with _seeded(seed):
            channels = _multiple_of_8(32 * width)
            layers: list[nn.Module] = [_conv_bn_relu6(in_channels, channels, 3, 2)]
            for expansion, base, count, stride in _INVERTED:
                outputs = _multiple_of_8(base * width)
                for index in range(count):
                    layers.append(InvertedResidual(channels, outputs, 1 if index else stride, expansion))
                    channels = outputs
            self.last_channels = _multiple_of_8(1280 * max(1.0, width))
            layers.append(_conv_bn_relu6(channels, self.last_channels, 1))
            self.features = nn.Sequential(*layers)
            self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(self.last_channels, num_classes))
            _he(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def _multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8, but not more than a tenth below."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def mobilenetv2(num_classes: int = 1000, *, in_channels: int = 3, seed: int | None = 0) -> MobileNetV2:
    """MobileNetV2 of width 1: 3.5 M parameters, 0.3 G multiply-adds. Input `(N, in_channels, 224, 224)`.

    Example:
        >>> mobilenetv2()(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """
    return MobileNetV2(num_classes, in_channels=in_channels, seed=seed)


# --- YOLOv4-tiny -----------------------------------------------------------------------------------------------------


def _conv_bn_leaky(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        _conv(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1, inplace=True)
    )


class CSPBlock(nn.Module):
    """The cross-stage partial block of CSPDarknet53-tiny, then 2×2 max pooling.

    Half of the channels pass two more 3×3 convolutions; everything is concatenated. `(N, channels, H, W)` to
    `(N, 2·channels, H/2, W/2)`, and the last convolution's output `(N, channels, H, W)`, which a head reads.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _conv_bn_leaky(channels, channels, 3)
        self.conv2 = _conv_bn_leaky(half, half, 3)
        self.conv3 = _conv_bn_leaky(half, half, 3)
        self.conv4 = _conv_bn_leaky(channels, channels, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        whole = self.conv1(x)
        first = self.conv2(whole[:, whole.shape[1] // 2 :])
        second = self.conv3(first)
        tap = self.conv4(torch.cat([second, first], 1))
        return self.pool(torch.cat([whole, tap], 1)), tap


class YOLOv4Tiny(nn.Module):
    """CSPDarknet53-tiny and two heads; leaky ReLU of slope 0.1 (arXiv 2011.08036).

    Takes `(N, in_channels, H, W)`, H and W multiples of 32 (416 as trained). Returns the two raw maps `(coarse, fine)`
    of shapes `(N, 3·(5 + num_classes), H/32, W/32)` and `(…, H/16, W/16)`: for each of 3 anchors x, y, w, h, objectness
    and the classes' scores, before any sigmoid.

    Args:
        num_classes: 80 for COCO, so 255 output channels.
        in_channels: Channels of the input.
        width: Channels of the first convolution; all others scale with it.
        seed: Seed of the weights; None draws from torch's global random state.

    Raises:
        ValueError: A size that is not positive, or an odd `width`.

    Example:
        >>> [tuple(y.shape) for y in YOLOv4Tiny(width=8)(torch.zeros(1, 3, 64, 64))]
        [(1, 255, 2, 2), (1, 255, 4, 4)]
    """

    def __init__(
        self, num_classes: int = 80, *, in_channels: int = 3, width: int = 32, seed: int | None = None
    ) -> None:
        super().__init__()
        _positive(num_classes=num_classes, in_channels=in_channels, width=width)
        if width % 2:
            raise ValueError(f"width={width} is odd: the blocks halve their channels")
        outputs = 3 * (5 + num_classes)
        with _seeded(seed):
            self.stem = _conv_bn_leaky(in_channels, width, 3, 2)
            self.conv2 = _conv_bn_leaky(width, 2 * width, 3, 2)
            self.csp1 = CSPBlock(2 * width)
            self.csp2 = CSPBlock(4 * width)
            self.csp3 = CSPBlock(8 * width)
            self.conv3 = _conv_bn_leaky(16 * width, 16 * width, 3)
            self.neck = _conv_bn_leaky(16 * width, 8 * width, 1)
            self.coarse = nn.Sequential(_conv_bn_leaky(8 * width, 16 * width, 3), nn.Conv2d(16 * width, outputs, 1))
            self.lateral = _conv_bn_leaky(8 * width, 4 * width, 1)
            self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
            self.fine = nn.Sequential(_conv_bn_leaky(12 * width, 8 * width, 3), nn.Conv2d(8 * width, outputs, 1))
            _he(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, _ = self.csp1(self.conv2(self.stem(x)))
        x, _ = self.csp2(x)
        x, tap = self.csp3(x)
        x = self.neck(self.conv3(x))
        up = self.upsample(self.lateral(x))
        return self.coarse(x), self.fine(torch.cat([up, tap], 1))


def yolov4_tiny(num_classes: int = 80, *, in_channels: int = 3, seed: int | None = 0) -> YOLOv4Tiny:
    """YOLOv4-tiny: 6.1 M parameters, 3.5 G multiply-adds. Input `(N, in_channels, 416, 416)`, two maps out.

    Example:
        >>> [tuple(y.shape) for y in yolov4_tiny()(torch.zeros(1, 3, 416, 416))]
        [(1, 255, 13, 13), (1, 255, 26, 26)]
    """
    return YOLOv4Tiny(num_classes, in_channels=in_channels, seed=seed)


# --- SSD -------------------------------------------------------------------------------------------------------------

_ANCHORS = (3, 6, 6, 6, 6, 6)  # boxes at each place of the six maps


class SSD300(nn.Module):
    """SSD's extra maps and 3×3 heads (arXiv 1512.02325) on MobileNetV2.

    The six maps have 19, 10, 5, 3, 2 and 1 places a side for 300×300 images: the expansion (576 channels, stride 16) of
    MobileNetV2's block 14, as in section 6.2 of its paper, its last features, and four pairs of 1×1 and 3×3
    convolutions of stride 2. With 3 anchors a place on the first and 6 on the others that is 1,917 anchors.

    Takes `(N, in_channels, 300, 300)`; returns box offsets `(N, 1917, 4)` and class scores `(N, 1917, num_classes)`,
    before any softmax. Other sizes give other numbers of anchors.

    Args:
        num_classes: With the background: 21 for Pascal VOC, 81 for the 80 classes of COCO.
        width: MobileNetV2's multiplier.
        in_channels: Channels of the input.
        seed: Seed of the weights; None draws from torch's global random state.

    Raises:
        ValueError: A size that is not positive.

    Example:
        >>> [tuple(y.shape) for y in SSD300(width=0.25).eval()(torch.zeros(1, 3, 300, 300))]
        [(1, 1917, 4), (1, 1917, 21)]
    """

    def __init__(
        self, num_classes: int = 21, *, width: float = 1.0, in_channels: int = 3, seed: int | None = None
    ) -> None:
        super().__init__()
        _positive(num_classes=num_classes, width=width, in_channels=in_channels)
        self.num_classes = num_classes
        with _seeded(seed):
            base = MobileNetV2(width=width, in_channels=in_channels)
            self.features = base.features
            channels = [_multiple_of_8(96 * width) * 6, base.last_channels]
            self.extras = nn.ModuleList()
            for outputs in (512, 256, 256, 128):
                middle = outputs // 2
                self.extras.append(
                    nn.Sequential(_conv_bn_relu6(channels[-1], middle, 1), _conv_bn_relu6(middle, outputs, 3, 2))
                )
                channels.append(outputs)
            pairs = list(zip(channels, _ANCHORS, strict=True))
            self.boxes = nn.ModuleList(nn.Conv2d(c, 4 * anchors, 3, padding=1) for c, anchors in pairs)
            self.classes = nn.ModuleList(nn.Conv2d(c, num_classes * anchors, 3, padding=1) for c, anchors in pairs)
            _he(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        block = self.features[14]  # of stride 2, so without a shortcut
        assert isinstance(block, InvertedResidual)
        maps: list[Tensor] = [block.conv[0](self.features[:14](x))]
        maps.append(self.features[15:](block.conv[1:](maps[0])))
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        return _heads(self.boxes, maps, 4), _heads(self.classes, maps, self.num_classes)


def _heads(layers: nn.ModuleList, maps: list[Tensor], values: int) -> Tensor:
    """`(N, anchors of all maps, values)`: anchors by map, row, column, and kind."""
    found = [layer(x).permute(0, 2, 3, 1) for layer, x in zip(layers, maps, strict=True)]
    return torch.cat([y.reshape(y.shape[0], -1, values) for y in found], 1)


def ssd300_mobilenetv2(num_classes: int = 21, *, in_channels: int = 3, seed: int | None = 0) -> SSD300:
    """SSD300 on MobileNetV2: 8.2 M parameters, 1.0 G multiply-adds. Input `(N, in_channels, 300, 300)`.

    Returns boxes and scores, as `SSD300` says.

    Example:
        >>> [tuple(y.shape) for y in ssd300_mobilenetv2(81).eval()(torch.zeros(1, 3, 300, 300))]
        [(1, 1917, 4), (1, 1917, 81)]
    """
    return SSD300(num_classes, in_channels=in_channels, seed=seed)


# --- U-Net -----------------------------------------------------------------------------------------------------------


def _double_conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        _conv(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        _conv(outputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    """A contracting and an expanding path, the former's maps concatenated into the latter (arXiv 1505.04597).

    Differs from the paper as today's implementations do: convolutions are padded, so that the output is as large as the
    input, and have batch norm. Up-sampling is a transposed 2×2 convolution of stride 2.

    Takes `(N, in_channels, H, W)`, H and W multiples of 2**depth; returns logits `(N, num_classes, H, W)`.

    Args:
        num_classes: Classes of a pixel; 2 in the paper.
        in_channels: Channels of the input: 3 here for colour images, 1 in the paper.
        width: Channels at full resolution; each level below has twice as many.
        depth: How often the resolution is halved.
        seed: Seed of the weights; None draws from torch's global random state.

    Raises:
        ValueError: A size that is not positive.

    Example:
        >>> UNet(width=8, depth=2)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 2, 32, 32])
    """

    def __init__(
        self,
        num_classes: int = 2,
        *,
        in_channels: int = 3,
        width: int = 64,
        depth: int = 4,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        _positive(num_classes=num_classes, in_channels=in_channels, width=width, depth=depth)
        widths = [width << level for level in range(depth + 1)]
        with _seeded(seed):
            self.downs = nn.ModuleList(
                _double_conv(inputs, outputs) for inputs, outputs in zip([in_channels, *widths], widths, strict=False)
            )
            self.pool = nn.MaxPool2d(2)
            self.ups = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
            self.merges = nn.ModuleList(_double_conv(2 * w, w) for w in reversed(widths[:-1]))
            self.head = nn.Conv2d(width, num_classes, 1)
            _he(self)

    def forward(self, x: Tensor) -> Tensor:
        maps: list[Tensor] = []
        for down in self.downs:
            maps.append(down(self.pool(maps[-1]) if maps else x))
        y = maps.pop()
        for up, merge in zip(self.ups, self.merges, strict=True):
            y = merge(torch.cat([maps.pop(), up(y)], 1))
        logits: Tensor = self.head(y)
        return logits


def unet(num_classes: int = 2, *, in_channels: int = 3, seed: int | None = 0) -> UNet:
    """U-Net of the paper's widths: 31.0 M parameters, 48.2 G multiply-adds. Input `(N, in_channels, 256, 256)`.

    Example:
        >>> unet()(torch.zeros(1, 3, 256, 256)).shape
        torch.Size([1, 2, 256, 256])
    """
    return UNet(num_classes, in_channels=in_channels, seed=seed)


# --- small ones ------------------------------------------------------------------------------------------------------


class TutorialCNN(nn.Module):
    """Two 5×5 convolutions (6 and 16 channels) with 2×2 max pooling, and linear layers of 120, 84 and `num_classes`.

    The network of PyTorch's CIFAR-10 tutorial: takes `(N, in_channels, 32, 32)`, returns logits `(N, num_classes)`.

    Args:
        num_classes: Outputs of the last linear layer.
        in_channels: Channels of the input.
        seed: Seed of the weights; None draws from torch's global random state.

    Raises:
        ValueError: A size that is not positive.

    Example:
        >>> TutorialCNN()(torch.zeros(4, 3, 32, 32)).shape
        torch.Size([4, 10])
    """

    def __init__(self, num_classes: int = 10, *, in_channels: int = 3, seed: int | None = None) -> None:
        super().__init__()
        _positive(num_classes=num_classes, in_channels=in_channels)
        with _seeded(seed):
            self.conv1 = nn.Conv2d(in_channels, 6, 5)
            self.pool = nn.MaxPool2d(2)
            self.conv2 = nn.Conv2d(6, 16, 5)
            self.fc1 = nn.Linear(16 * 5 * 5, 120)
            self.fc2 = nn.Linear(120, 84)
            self.fc3 = nn.Linear(84, num_classes)
            _he(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = torch.flatten(self.pool(F.relu(self.conv2(x))), 1)
        logits: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))
        return logits


def tutorial_cnn(num_classes: int = 10, *, in_channels: int = 3, seed: int | None = 0) -> TutorialCNN:
    """The CNN of PyTorch's CIFAR-10 tutorial: 62,006 parameters. Input `(N, in_channels, 32, 32)`.

    Example:
        >>> tutorial_cnn()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    return TutorialCNN(num_classes, in_channels=in_channels, seed=seed)


class MLP(nn.Module):
    """Linear layers `layers.0`, `layers.1`, … with ReLU between; everything but the batch is flattened first.

    Takes `(N, …)` with `sizes[0]` numbers an example, returns `(N, sizes[-1])`.

    Args:
        sizes: Widths, from the input's to the output's; two or more.
        seed: Seed of the weights; None draws from torch's global random state.

    Raises:
        ValueError: Fewer than two sizes, or one that is not positive.

    Example:
        >>> MLP((784, 300, 100, 10))(torch.zeros(1, 1, 28, 28)).shape
        torch.Size([1, 10])
    """

    def __init__(self, sizes: Sequence[int], *, seed: int | None = None) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes={tuple(sizes)}: expected two or more positive numbers")
        with _seeded(seed):
            pairs = zip(sizes, sizes[1:], strict=False)
            self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(x, 1)
        for index, layer in enumerate(self.layers):
            x = layer(F.relu(x) if index else x)
        return x


def lenet_300_100(num_classes: int = 10, *, in_channels: int = 1, seed: int | None = 0) -> MLP:
    """LeNet-300-100, the usual first network of pruning papers: 266,610 parameters. Input `(N, in_channels, 28, 28)`.

    Example:
        >>> lenet_300_100()(torch.zeros(1, 1, 28, 28)).shape
        torch.Size([1, 10])
    """
    _positive(num_classes=num_classes, in_channels=in_channels)
    return MLP((784 * in_channels, 300, 100, num_classes), seed=seed)


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """An entry of `NETWORKS`: how to make a model, and what to feed it.

    Attributes:
        factory: Makes the model, weights seeded with 0.
        input_shape: Shape of one input without the batch, `(C, H, W)`.
        keep_dense: Names of the layers that pruning leaves alone: the stem, which has few weights and much to say.
            Depthwise convolutions stay dense too (`sparseprune.prune_uniform`).
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
    "vgg16": Network(vgg16, (3, 224, 224), ("features.0",), "VGG-16 for 224×224 images"),
    "vgg16-bn": Network(vgg16_bn, (3, 224, 224), ("features.0",), "VGG-16 with batch norm"),
    "mobilenetv2": Network(mobilenetv2, (3, 224, 224), ("features.0.0",), "MobileNetV2 for 224×224 images"),
    "yolov4-tiny": Network(yolov4_tiny, (3, 416, 416), ("stem.0",), "YOLOv4-tiny detector: two raw maps, COCO"),
    "ssd300-mobilenetv2": Network(
        ssd300_mobilenetv2,
        (3, 300, 300),
        ("features.0.0",),
        "SSD300 detector on MobileNetV2: boxes and scores, Pascal VOC",
    ),
    "unet": Network(unet, (3, 256, 256), ("downs.0.0",), "U-Net for 256×256 images, two classes a pixel"),
    "tutorial-cnn": Network(tutorial_cnn, (3, 32, 32), ("conv1",), "the CNN of PyTorch's CIFAR-10 tutorial"),
    "lenet-300-100": Network(lenet_300_100, (1, 28, 28), (), "LeNet-300-100: three linear layers"),
}
