"""Boxes: overlap, the CIoU loss's measure, and non-maximum suppression, all in whole tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Detections", "centres_to_corners", "ciou", "corners_to_centres", "iou", "non_maximum_suppression"]


@dataclass(frozen=True)
class Detections:
    """What was found on N canvases, K places each, best first; a place is empty where its score is 0.

    Attributes:
        boxes: float (N, K, 4), x1, y1, x2, y2 in pixels.
        scores: float (N, K).
        classes: int64 (N, K), 0 to 9.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor


def corners_to_centres(boxes: Tensor) -> Tensor:
    """(..., 4) of x1, y1, x2, y2 -> (..., 4) of centre x, centre y, width, height."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def centres_to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) of centre x, centre y, width, height -> (..., 4) of x1, y1, x2, y2."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def _common(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of the intersections and of the unions of boxes that broadcast."""
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    intersection = sides.clamp(min=0).prod(-1)
    areas = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
    return intersection, areas - intersection


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of `a` (..., A, 4) with every one of `b` (..., B, 4) -> (..., A, B)."""
    intersection, union = _common(a.unsqueeze(-2), b.unsqueeze(-3))
    return intersection / union.clamp(min=1e-9)


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU of pairs of boxes (..., 4) -> (...), at most 1; its gradient moves boxes that do not even touch.

    Zheng et al., Distance-IoU Loss, 2020 (arXiv:1911.08287).
    """
    intersection, union = _common(a, b)
    overlap = intersection / union.clamp(min=1e-9)
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    ca, cb = corners_to_centres(a), corners_to_centres(b)
    distance = (ca[..., :2] - cb[..., :2]).square().sum(-1) / around.square().sum(-1).clamp(min=1e-9)
    angles = [torch.atan2(c[..., 2], c[..., 3].clamp(min=1e-9)) for c in (ca, cb)]
    aspect = 4 / math.pi**2 * (angles[1] - angles[0]).square()
    with torch.no_grad():
        weight = aspect / (1 - overlap + aspect).clamp(min=1e-9)
    return overlap - distance - weight * aspect


def non_maximum_suppression(
    boxes: Tensor, scores: Tensor, *, threshold: float = 0.5, candidates: int = 200, keep: int = 100,
    least_score: float = 0.01,
) -> Detections:  # fmt: skip
    """Of boxes that overlap a better one of their class, only the better one stays.

    The greedy algorithm's result, for all canvases at once: suppression is repeated on the whole matrix of overlaps
    until nothing changes, which takes as many rounds as the longest chain of suppressed suppressors (Cluster-NMS,
    Zheng et al. 2020, arXiv:2005.03572).

    Args:
        boxes: float (N, A, 4), corners in pixels.
        scores: float (N, A, classes), 0 to 1, without the background.
        threshold: IoU above which a box is suppressed.
        candidates: only that many best (box, class) pairs of each canvas are looked at.
        keep: so many at most stay on a canvas.
        least_score: what scores less is no candidate.

    Returns:
        `Detections` with at most `keep` places.
    """
    classes = scores.shape[-1]
    flat = scores.flatten(1)
    best, where = flat.topk(min(candidates, flat.shape[1]))
    anchors, kinds = where // classes, where % classes
    found = boxes.gather(1, anchors.unsqueeze(-1).expand(-1, -1, 4))
    same = kinds.unsqueeze(-1) == kinds.unsqueeze(-2)
    rivals = ((iou(found, found) > threshold) & same).triu(1)  # row suppresses column: earlier ones are better
    alive = candidate = best >= least_score
    while True:
        after = candidate & ~(rivals & alive.unsqueeze(-1)).any(1)
        if torch.equal(after, alive):
            break
        alive = after
    kept, order = torch.where(alive, best, 0).topk(min(keep, best.shape[1]))
    return Detections(found.gather(1, order.unsqueeze(-1).expand(-1, -1, 4)), kept, kinds.gather(1, order))
