"""COCO's mean average precision, as pycocotools computes it."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from torch import Tensor

from .boxes import Detections, corners_to_centres
from .canvases import CLASSES

__all__ = ["mean_average_precision"]


def mean_average_precision(found: Detections, targets: Tensor) -> dict[str, float]:
    """Average precision over the classes: `mAP`, averaged over IoU .50, .55 ... .95, and `mAP50` at .50.

    Args:
        found: on N canvases.
        targets: float (N, M, 5): x1, y1, x2, y2 and the class; rows of class -1 hold none.

    Raises:
        ModuleNotFoundError: pycocotools is missing.

    Example:
        >>> mean_average_precision(detections, targets)["mAP"]
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("mAP needs pycocotools: pip install 'sparseprune[examples]'") from error
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        truth = COCO()
        truth.dataset = _ground_truth(targets)
        truth.createIndex()
        rows = _results(found)
        if not len(rows):
            return {"mAP": 0.0, "mAP50": 0.0}
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"mAP": float(evaluation.stats[0]), "mAP50": float(evaluation.stats[1])}


def _ground_truth(targets: Tensor) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for image, row in (targets[..., 4] >= 0).nonzero().tolist():
        x1, y1, x2, y2, kind = targets[image, row].tolist()
        annotations.append({
            "id": len(annotations) + 1, "image_id": image, "category_id": int(kind), "iscrowd": 0,
            "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1),
        })  # fmt: skip
    return {
        "info": {}, "images": [{"id": image} for image in range(len(targets))], "annotations": annotations,
        "categories": [{"id": kind, "name": name} for kind, name in enumerate(CLASSES)],
    }  # fmt: skip


def _results(found: Detections) -> Any:
    """(detections, 7) of canvas, x, y, width, height, score, class."""
    image, place = (found.scores > 0).nonzero(as_tuple=True)
    boxes = found.boxes[image, place]
    sides = corners_to_centres(boxes)[:, 2:]
    columns = [image, *boxes[:, :2].T, *sides.T, found.scores[image, place], found.classes[image, place]]
    return np.stack([np.asarray(column.double()) for column in columns], 1)
