"""Detection of clothes on canvases: what `examples/filter_pruning_ssd.py` and `examples/prune_yolo.py` share.

- `canvases`: the images, with boxes and classes known.
- `boxes`: intersection over union, CIoU, non-maximum suppression.
- `ssd`, `yolo`: anchors, targets, losses and decoding of the two detectors.
- `score`: COCO's mean average precision, by pycocotools.
- `runs`: training, stages that are skipped once done, and timing.

Boxes are float tensors (..., 4) of x1, y1, x2, y2 in pixels unless said otherwise. The targets of a batch are one float
tensor (N, M, 5): for each canvas up to M boxes and their classes 0 to 9, rows that hold none with class -1.
"""
