"""A detection task of real images: items of Fashion-MNIST on dark canvases, boxes and classes known.

Backgrounds are dark and nearly even, because there are minutes to train in: on bright and noisy ones a small network
knows no class from another after 20,000 images.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from make_subset import CLASSES, load  # noqa: E402  (it lies beside the images)

__all__ = ["CLASSES", "MOST_ITEMS", "Canvases", "Items", "canvases", "items"]

MOST_ITEMS = 6
_TRIES = 30  # places to try for an item before it is left out
_OVERLAP = 0.1  # the largest part of the smaller of two boxes that the other may cover

Random = np.random.Generator
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Canvases(Dataset[tuple[Tensor, Tensor]]):
    """`count` canvases of one to six items each, made when they are asked for, always the same for one seed and index.

    An item is scaled to 22 to 55 % of the canvas (its longer side), squeezed by up to a fifth, perhaps mirrored,
    tinted, and laid over a dark background of colour gradients and noise where it covers little of the others. Its box
    is the bounding box of its pixels that are not black.

    Args:
        images: (K, 28, 28) uint8, of Fashion-MNIST.
        labels: (K,) uint8, 0 to 9.
        count: how many canvases.
        size: pixels a side.
        seed: together with the index, of everything random.

    Returns:
        From `self[index]`: the image, float32 (3, size, size), about -1 to 1, and its targets, float32
        (`MOST_ITEMS`, 5): x1, y1, x2, y2 in pixels and the class; unused rows have class -1.

    Example:
        >>> image, targets = canvases("test", 100, size=128)[0]
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    count: int
    size: int = 128
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"index must be 0 to {self.count - 1}, got {index}")
        random = np.random.default_rng((self.seed, index))
        canvas = _background(random, self.size)
        targets = np.full((MOST_ITEMS, 5), -1, np.float32)
        placed = 0
        for _ in range(random.integers(1, MOST_ITEMS + 1)):
            chosen = int(random.integers(len(self.images)))
            item = _item(self.images[chosen], random, self.size * random.uniform(0.22, 0.55))
            corner = _free_place(item.shape, targets[:placed], random, self.size)
            if corner is not None:
                _paint(canvas, item, corner, random)
                left, top = corner
                targets[placed] = left, top, left + item.shape[1], top + item.shape[0], self.labels[chosen]
                placed += 1
        return torch.from_numpy(canvas * 2 - 1), torch.from_numpy(targets)

    def all(self) -> tuple[Tensor, Tensor]:
        """Every canvas, (count, 3, size, size), and their targets, (count, `MOST_ITEMS`, 5)."""
        images, targets = zip(*(self[index] for index in range(self.count)), strict=True)
        return torch.stack(images), torch.stack(targets)


@dataclass(frozen=True)
class Items(Dataset[tuple[Tensor, int]]):
    """`count` single items, made in the same way as those of `Canvases` but 37 to 94 % of `size` pixels long: to train
    a detector's base on before, as a classifier.

    Returns:
        From `self[index]`: the image, float32 (3, size, size), about -1 to 1, and its class.

    Example:
        >>> image, label = items("train", 100, size=48)[0]
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    count: int
    size: int = 48
    seed: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.count:
            raise IndexError(f"index must be 0 to {self.count - 1}, got {index}")
        random = np.random.default_rng((self.seed, index))
        canvas = _background(random, self.size)
        chosen = int(random.integers(len(self.images)))
        item = _item(self.images[chosen], random, self.size * random.uniform(0.37, 0.94))
        height, width = item.shape
        corner = int(random.integers(self.size - width + 1)), int(random.integers(self.size - height + 1))
        _paint(canvas, item, corner, random)
        return torch.from_numpy(canvas * 2 - 1), int(self.labels[chosen])


def items(part: str, count: int, *, size: int, seed: int = 0, directory: Path | None = None) -> Items:
    """Single items; arguments as of `canvases`."""
    arrays = load(directory)
    return Items(arrays[f"{part}_images"], arrays[f"{part}_labels"], count, size, seed + (part == "test") * 10**6)


def canvases(part: str, count: int, *, size: int, seed: int = 0, directory: Path | None = None) -> Canvases:
    """Canvases of training items only (`part="train"`) or of test items only (`"test"`).

    Args:
        part: "train" or "test".
        count, size, seed: as in `Canvases`.
        directory: folder with Fashion-MNIST's IDX files; None: the subset in examples/data.
    """
    arrays = load(directory)
    return Canvases(arrays[f"{part}_images"], arrays[f"{part}_labels"], count, size, seed + (part == "test") * 10**6)


def _resize(image: Array, height: int, width: int) -> Array:
    """(H, W) or (C, H, W) to that height and width."""
    layers = torch.from_numpy(image).reshape(1, -1, *image.shape[-2:])
    shrinks = height < image.shape[-2] or width < image.shape[-1]
    resized: Array = F.interpolate(layers, (height, width), mode="bilinear", antialias=shrinks).numpy()
    return resized.reshape(*image.shape[:-2], height, width)


def _background(random: Random, size: int) -> Array:
    """(3, size, size) in [0, 1]: colour patches of two coarsenesses, and noise."""
    canvas = random.standard_normal((3, size, size), np.float32)
    canvas *= np.float32(random.uniform(0.0, 0.02))
    canvas += random.uniform(0.0, 0.3, (3, 1, 1)).astype(np.float32)
    for cells in (3, 16):
        patches = random.uniform(0.02, 0.03) * random.standard_normal((3, cells, cells))
        canvas += _resize(patches.astype(np.float32), size, size)
    return np.clip(canvas, 0, 1, out=canvas)


def _item(image: NDArray[np.uint8], random: Random, longer: float) -> Array:
    """The item cut out, (h, w) in [0, 1], scaled to that longer side, squeezed and perhaps mirrored."""
    rows, columns = np.flatnonzero(image.max(1) > 20), np.flatnonzero(image.max(0) > 20)
    if not len(rows):  # an image of (nearly) nothing
        rows = columns = np.arange(28)
    cut = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32) / np.float32(255)
    if random.random() < 0.5:
        cut = np.ascontiguousarray(cut[:, ::-1])
    squeeze = random.uniform(0.8, 1.25)
    height, width = cut.shape[0] * squeeze, float(cut.shape[1])
    scale = longer / max(height, width)
    return _resize(cut, max(6, round(height * scale)), max(6, round(width * scale)))


def _free_place(shape: tuple[int, ...], taken: Array, random: Random, size: int) -> tuple[int, int] | None:
    """A random corner (left, top) where a box of that (height, width) covers little of the others; None: not found."""
    height, width = shape
    areas = (taken[:, 2] - taken[:, 0]) * (taken[:, 3] - taken[:, 1])
    for _ in range(_TRIES):
        left, top = int(random.integers(size - width + 1)), int(random.integers(size - height + 1))
        across = np.minimum(taken[:, 2], left + width) - np.maximum(taken[:, 0], left)
        down = np.minimum(taken[:, 3], top + height) - np.maximum(taken[:, 1], top)
        common = across.clip(0) * down.clip(0)
        if bool((common <= _OVERLAP * np.minimum(areas, width * height)).all()):
            return left, top
    return None


def _paint(canvas: Array, item: Array, corner: tuple[int, int], random: Random) -> None:
    """Lay the item over the canvas, in place: black is transparent, its greys become shades of one colour."""
    height, width = item.shape
    left, top = corner
    region = canvas[:, top : top + height, left : left + width]
    opacity = np.clip(item * 5, 0, 1)
    colour = random.uniform(0.7, 1.0, (3, 1, 1)).astype(np.float32)
    region[:] = region * (1 - opacity) + opacity * colour * (0.25 + 0.75 * item)
