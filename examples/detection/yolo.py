"""YOLO's anchors, targets, loss and decoding.

Redmon, Farhadi, YOLOv3, 2018 (arXiv:1804.02767); CIoU as in Bochkovskiy et al., YOLOv4, 2020 (arXiv:2004.10934).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import Detections, centres_to_corners, ciou, corners_to_centres, non_maximum_suppression

__all__ = ["YOLOCoder"]

# (width, height) as parts of the canvas, of the coarse map's and the fine map's three anchors: the six medians
# that 1,500 training canvases give (k-means by IoU, as in YOLOv2).
_ANCHORS = (((0.25, 0.41), (0.45, 0.27), (0.38, 0.47)), ((0.14, 0.27), (0.31, 0.16), (0.23, 0.29)))


class YOLOCoder:
    """From targets to a loss, and from the two raw maps of `sparseprune.zoo.YOLOv4Tiny` to boxes.

    The maps are (N, 3·(5 + classes), H, W), coarse then fine. An anchor at a place gives a box whose centre is that
    place's corner plus a sigmoid stretched to -0.1 … 1.1 (so that 0 and 1 can be reached), times the stride, and whose
    sides are the anchor's times exp(w), exp(h).

    Args:
        size: pixels a side of the canvases.
        classes: how many.

    Example:
        >>> coder = YOLOCoder(128)
        >>> sparseprune.finetune(model, loader, epochs=1, loss=coder.loss)
        >>> coder.decode(model(images))
    """

    def __init__(self, size: int, *, classes: int = 10) -> None:
        self.size = size
        self.classes = classes
        self.anchors = torch.tensor(_ANCHORS) * size  # (2, 3, 2)
        self._weights = {"box": 2.0, "object": 2.0, "class": 1.0}
        self._places: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def flatten(self, maps: tuple[Tensor, Tensor]) -> Tensor:
        """The raw maps as (N, A, 5 + classes): of the coarse map then the fine, by row, column and anchor."""
        parts = []
        for raw in maps:
            batch, _, rows, columns = raw.shape
            parts.append(raw.float().view(batch, 3, -1, rows, columns).permute(0, 3, 4, 1, 2).flatten(1, 3))
        return torch.cat(parts, 1)

    def places(self, coarse: int, fine: int) -> tuple[Tensor, Tensor, Tensor]:
        """For maps of so many cells: corner (A, 2) in cells, anchor's sides (A, 2) and stride (A, 1) in pixels."""
        if (coarse, fine) not in self._places:
            corners, sides, strides = [], [], []
            for level, cells in enumerate((coarse, fine)):
                row, column = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
                corner = torch.stack([column, row], -1).reshape(-1, 1, 2).float()
                corners.append(corner.expand(-1, 3, -1).reshape(-1, 2))
                sides.append(self.anchors[level].repeat(cells * cells, 1))
                strides.append(torch.full((3 * cells * cells, 1), self.size / cells))
            self._places[coarse, fine] = (torch.cat(corners), torch.cat(sides), torch.cat(strides))
        return self._places[coarse, fine]

    def boxes(self, flat: Tensor, cells: tuple[int, int]) -> Tensor:
        """(N, A, 5 + classes) -> corners (N, A, 4) in pixels."""
        corner, sides, stride = self.places(*cells)
        centre = (corner + flat[..., :2].sigmoid() * 1.2 - 0.1) * stride
        return centres_to_corners(torch.cat([centre, flat[..., 2:4].clamp(max=4).exp() * sides], -1))

    def assign(self, targets: Tensor, cells: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Which anchors are to find which box: of the six whose cell holds the centre, the one of the most similar
        shape, and all others above an IoU of shapes of a half.

        Args:
            targets: float (N, M, 5).
            cells: cells a side of the two maps.

        Returns:
            canvas, anchor and row of `targets` of each pair, int64 (P,).
        """
        centres = corners_to_centres(targets[..., :4])
        kinds = self.anchors.reshape(6, 2)
        common = torch.minimum(centres[..., None, 2:], kinds).prod(-1)
        similar = common / (centres[..., None, 2:].prod(-1) + kinds.prod(-1) - common).clamp(min=1e-9)  # (N, M, 6)
        wanted = (similar > 0.5) | (similar == similar.amax(-1, keepdim=True))
        canvas, row, kind = (wanted & (targets[..., 4:] >= 0)).nonzero(as_tuple=True)
        count = torch.tensor(cells)[kind // 3]
        cell = (centres[canvas, row, :2] * count.unsqueeze(1) / self.size).long()
        cell = torch.minimum(cell.clamp(min=0), count.unsqueeze(1) - 1)
        start = torch.where(kind < 3, 0, 3 * cells[0] ** 2)
        return canvas, start + (cell[:, 1] * count + cell[:, 0]) * 3 + kind % 3, row

    def loss(self, maps: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """1 - CIoU of the boxes, binary cross entropies of objectness (towards the CIoU reached) and of the classes."""
        flat, cells = self.flatten(maps), (maps[0].shape[-1], maps[1].shape[-1])
        canvas, anchor, row = self.assign(targets, cells)
        pairs = max(1, len(canvas))
        good = ciou(self.boxes(flat, cells)[canvas, anchor], targets[canvas, row, :4])
        objectness = torch.zeros_like(flat[..., 4])
        objectness[canvas, anchor] = good.detach().clamp(0, 1)
        kinds = F.one_hot(targets[canvas, row, 4].long(), self.classes).float()
        parts = {
            "box": (1 - good).sum() / pairs,
            "object": F.binary_cross_entropy_with_logits(flat[..., 4], objectness, reduction="sum") / pairs,
            "class": F.binary_cross_entropy_with_logits(flat[canvas, anchor, 5:], kinds, reduction="sum") / pairs,
        }
        return torch.stack([self._weights[name] * part for name, part in parts.items()]).sum()

    def decode(self, maps: tuple[Tensor, Tensor]) -> Detections:
        """Box decoding and non-maximum suppression; a score is objectness times the class's probability."""
        flat = self.flatten(maps)
        boxes = self.boxes(flat, (maps[0].shape[-1], maps[1].shape[-1]))
        scores = flat[..., 4:5].sigmoid() * flat[..., 5:].sigmoid()
        return non_maximum_suppression(boxes.clamp(0, self.size), scores)
