"""SSD's anchors, matching, loss and decoding (Liu et al. 2016, arXiv 1512.02325)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import Detections, centres_to_corners, corners_to_centres, iou, non_maximum_suppression

__all__ = ["SSDCoder", "anchors"]

_SCALES = (0.28, 0.4, 0.52, 0.64, 0.76, 0.88, 1.0)  # of the canvas: one a map, and the one after the last map's
_VARIANCES = (0.1, 0.1, 0.2, 0.2)  # offsets are divided by these, which makes them about as large as scores


def anchors(size: int) -> Tensor:
    """The anchors of `sparseprune.zoo.SSD300` on size × size images, in its order: (A, 4) of centre and sides, pixels.

    Maps of strides 16, 32, 64, 128, 256 and 512, odd sizes rounded up. At each place, sides by `_SCALES`: the aspect
    ratios 1, 2, 1/2, and on all maps but the first 3, 1/3 and a larger square.
    """
    found: list[list[float]] = []
    places = size
    for level in range(-3, 6):  # three convolutions of stride 2 come before the first map
        places = -(-places // 2)
        if level < 0:
            continue
        scale, after = _SCALES[level] * size, _SCALES[level + 1] * size
        shapes = [(scale * math.sqrt(ratio), scale / math.sqrt(ratio)) for ratio in (1, 2, 1 / 2)]
        if level:
            shapes += [(scale * math.sqrt(ratio), scale / math.sqrt(ratio)) for ratio in (3, 1 / 3)]
            shapes.append((math.sqrt(scale * after), math.sqrt(scale * after)))
        for row in range(places):
            for column in range(places):
                centre = ((column + 0.5) * size / places, (row + 0.5) * size / places)
                found += [[*centre, *shape] for shape in shapes]
    return torch.tensor(found)


class SSDCoder:
    """From targets to a loss, and from the network's outputs to boxes.

    Args:
        size: pixels a side of the canvases.
        negatives: background anchors in the loss for each matched one: those with the largest loss (hard negatives).

    Example:
        >>> coder = SSDCoder(128)
        >>> sparseprune.finetune(model, loader, epochs=1, loss=coder.loss)
        >>> coder.decode(model(images))
    """

    def __init__(self, size: int, *, negatives: int = 3) -> None:
        self.size = size
        self.negatives = negatives
        self.anchors = anchors(size)
        self._corners = centres_to_corners(self.anchors)
        self._variances = torch.tensor(_VARIANCES)

    def match(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Which box each anchor stands for: the one it overlaps most, by an IoU of at least a half; every box has at
        least the anchor that fits it best.

        Args:
            targets: float (N, M, 5).

        Returns:
            boxes (N, A, 4) in pixels and labels int64 (N, A): 0 for the background, else 1 + class.
        """
        boxes, valid = targets[..., :4], targets[..., 4] >= 0
        overlap = iou(boxes, self._corners).masked_fill(~valid.unsqueeze(-1), -1)  # (N, M, A)
        value, chosen = overlap.max(1)
        for row in range(targets.shape[1]):  # in order, so that of two boxes with one best anchor the later has it
            best = overlap[:, row].argmax(1)
            index = valid[:, row].nonzero().squeeze(1)
            value[index, best[index]] = 2.0
            chosen[index, best[index]] = row
        labels = targets[..., 4].gather(1, chosen).long() + 1
        return boxes.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 4)), torch.where(value >= 0.5, labels, 0)

    def encode(self, boxes: Tensor) -> Tensor:
        """Boxes (..., A, 4) in pixels, one for each anchor, as the offsets that the network is to give."""
        wanted, given = corners_to_centres(boxes), self.anchors
        shift = (wanted[..., :2] - given[:, :2]) / given[:, 2:]
        stretch = (wanted[..., 2:].clamp(min=1e-6) / given[:, 2:]).log()
        return torch.cat([shift, stretch], -1) / self._variances

    def boxes(self, offsets: Tensor) -> Tensor:
        """The inverse of `encode`."""
        scaled, given = offsets.float() * self._variances, self.anchors
        centre = given[:, :2] + scaled[..., :2] * given[:, 2:]
        sides = given[:, 2:] * scaled[..., 2:].clamp(max=4).exp()
        return centres_to_corners(torch.cat([centre, sides], -1))

    def loss(self, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """Cross entropy and smooth L1 a matched anchor, of the outputs (N, A, 4) and (N, A, 11) and of targets."""
        offsets, logits = outputs[0].float(), outputs[1].float()
        boxes, labels = self.match(targets)
        matched = labels > 0
        entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        hardness = entropy.detach().masked_fill(matched, -1)
        rank = hardness.argsort(1, descending=True).argsort(1)
        chosen = matched | (rank < self.negatives * matched.sum(1, keepdim=True))
        place = F.smooth_l1_loss(offsets[matched], self.encode(boxes)[matched], reduction="sum")
        total: Tensor = (entropy[chosen].sum() + place) / matched.sum().clamp(min=1)
        return total

    def decode(self, outputs: tuple[Tensor, Tensor]) -> Detections:
        """Box decoding and non-maximum suppression of the outputs (N, A, 4) and (N, A, 11)."""
        scores = outputs[1].float().softmax(-1)[..., 1:]
        return non_maximum_suppression(self.boxes(outputs[0]).clamp(0, self.size), scores)
