from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparseprune
from sparseprune.zoo import SSD300

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import filter_pruning_ssd  # noqa: E402
import prune_yolo  # noqa: E402
from detection import canvases as canvases_module  # noqa: E402
from detection.boxes import Detections, ciou, corners_to_centres, iou, non_maximum_suppression  # noqa: E402
from detection.canvases import MOST_ITEMS, Canvases, canvases, load  # type: ignore[attr-defined]  # noqa: E402
from detection.filters import channels_left, prune_filters  # noqa: E402
from detection.runs import Results  # noqa: E402
from detection.score import mean_average_precision  # noqa: E402
from detection.ssd import SSDCoder  # noqa: E402
from detection.yolo import YOLOCoder  # noqa: E402

SIZE = 96


def targets_of(count: int) -> Tensor:
    return canvases("train", count, size=SIZE).all()[1]


def random_boxes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * 60
    return torch.cat([corner, corner + 4 + torch.rand(*shape, 2, generator=generator) * 30], -1)


# --- canvases ---------------------------------------------------------------------------------------------------------


def test_canvases_are_the_same_every_time_and_differ_by_seed_and_part() -> None:
    first, again = canvases("train", 3, size=SIZE), canvases("train", 3, size=SIZE)
    for index in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first[index], again[index], strict=True))
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], canvases("train", 3, size=SIZE, seed=1)[0][0])
    with pytest.raises(IndexError, match="0 to 2"):
        first[3]


@pytest.mark.parametrize("part", ["train", "test"])
def test_items_come_from_one_part_only(part: str) -> None:
    made, arrays = canvases(part, 1, size=SIZE), load()
    assert np.array_equal(made.images, arrays[f"{part}_images"])
    assert np.array_equal(made.labels, arrays[f"{part}_labels"])


def test_targets_fit_the_canvas_and_overlap_little() -> None:
    images, targets = canvases("train", 40, size=SIZE).all()
    assert images.shape == (40, 3, SIZE, SIZE) and images.dtype == torch.float32
    assert targets.shape == (40, MOST_ITEMS, 5)
    assert -1 <= float(images.min()) and float(images.max()) <= 1
    assert set(targets[..., 4].flatten().tolist()) == set(range(-1, 10))
    for boxes in (rows[rows[:, 4] >= 0, :4] for rows in targets):
        assert len(boxes) >= 1
        assert bool((boxes >= 0).all()) and bool((boxes <= SIZE).all())
        sides = corners_to_centres(boxes)[:, 2:]
        assert bool((sides.amax(1) >= 0.2 * SIZE).all()) and bool((sides.amax(1) <= 0.56 * SIZE).all())
        assert bool((iou(boxes, boxes) - torch.eye(len(boxes)) <= 0.1).all())


def test_a_box_is_where_its_item_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canvases_module, "_background", lambda random, size: np.zeros((3, size, size), np.float32))
    arrays = load()
    found = 0
    for image, targets in (Canvases(arrays["train_images"], arrays["train_labels"], 30, SIZE)[i] for i in range(30)):
        if int((targets[:, 4] >= 0).sum()) == 1:
            seen = (image.amax(0) > -0.98).nonzero()
            low, high = seen.amin(0), seen.amax(0) + 1
            box = torch.stack([low[1], low[0], high[1], high[0]])
            assert float((box - targets[0, :4]).abs().max()) <= 2  # edges of the item fade out
            found += 1
    assert found >= 2


# --- boxes ------------------------------------------------------------------------------------------------------------


def test_iou_of_known_boxes() -> None:
    a = torch.tensor([[0.0, 0, 10, 10], [0, 0, 5, 10]])
    b = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]])
    assert torch.allclose(iou(a, b), torch.tensor([[1.0, 1 / 3, 0], [0.5, 0, 0]]))


def test_ciou_is_one_for_equal_boxes_and_pulls_apart_ones_together() -> None:
    boxes = random_boxes(20)
    assert torch.allclose(ciou(boxes, boxes), torch.ones(20), atol=1e-5)
    far = torch.tensor([[0.0, 0, 10, 10]], requires_grad=True)
    measure = ciou(far, torch.tensor([[50.0, 0, 60, 10]]))
    assert float(measure.detach()) < 0
    measure.sum().backward()  # type: ignore[no-untyped-call]
    assert far.grad is not None and float(far.grad[0, 0] + far.grad[0, 2]) > 0  # to the right it would be larger


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5])
def test_suppression_is_the_greedy_algorithms(threshold: float) -> None:
    generator = torch.Generator().manual_seed(1)
    boxes, scores = random_boxes(3, 60), torch.rand(3, 60, 2, generator=generator)
    found = non_maximum_suppression(boxes, scores, threshold=threshold, candidates=120, keep=120, least_score=0.2)
    for canvas in range(3):
        expected: set[tuple[int, int]] = set()  # (anchor, class)
        for place in scores[canvas].flatten().argsort(descending=True).tolist():
            anchor, kind = divmod(place, 2)
            rivals = [a for a, k in expected if k == kind]
            overlaps = iou(boxes[canvas, anchor : anchor + 1], boxes[canvas, rivals])
            if float(scores[canvas, anchor, kind]) >= 0.2 and not bool((overlaps > threshold).any()):
                expected.add((anchor, kind))
        kept = found.scores[canvas] > 0
        assert int(kept.sum()) == len(expected)
        for box, kind in zip(found.boxes[canvas, kept], found.classes[canvas, kept].tolist(), strict=True):
            anchor = int((boxes[canvas] - box).abs().sum(1).argmin())
            assert torch.equal(boxes[canvas, anchor], box) and (anchor, kind) in expected
    assert bool((found.scores.diff(dim=1) <= 0).all())


def test_suppression_keeps_at_most_so_many() -> None:
    found = non_maximum_suppression(random_boxes(2, 50), torch.rand(2, 50, 3), candidates=40, keep=5)
    assert found.boxes.shape == (2, 5, 4) and found.scores.shape == found.classes.shape == (2, 5)


# --- score ------------------------------------------------------------------------------------------------------------


def as_found(targets: Tensor, shift: float = 0.0) -> Detections:
    valid = targets[..., 4] >= 0
    return Detections(targets[..., :4] + shift, valid.float(), targets[..., 4].clamp(min=0).long())


def test_perfect_predictions_score_one() -> None:
    pytest.importorskip("pycocotools")
    targets = targets_of(20)
    assert mean_average_precision(as_found(targets), targets) == {"mAP": pytest.approx(1), "mAP50": pytest.approx(1)}


def test_imprecise_wrong_and_missing_predictions_score_less() -> None:
    pytest.importorskip("pycocotools")
    targets = targets_of(20)
    shifted = mean_average_precision(as_found(targets, shift=3.0), targets)
    assert 0.1 < shifted["mAP"] < 0.9 and shifted["mAP"] < shifted["mAP50"]
    wrong = dataclasses.replace(as_found(targets), classes=(targets[..., 4].long() + 1) % 10)
    assert mean_average_precision(wrong, targets)["mAP"] < 0.2
    nothing = dataclasses.replace(as_found(targets), scores=torch.zeros(targets.shape[:2]))
    assert mean_average_precision(nothing, targets) == {"mAP": 0.0, "mAP50": 0.0}


# --- SSD --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 96, 100, 300])
def test_ssd_has_an_anchor_for_every_output(size: int) -> None:
    with torch.inference_mode():
        offsets, _ = SSD300(11, width=0.1).eval()(torch.zeros(1, 3, size, size))
    anchors = SSDCoder(size).anchors
    assert anchors.shape == offsets.shape[1:]
    assert bool((anchors[:, :2] > 0).all()) and bool((anchors[:, :2] < size).all())


def perfect_ssd(coder: SSDCoder, targets: Tensor) -> tuple[Tensor, Tensor]:
    boxes, labels = coder.match(targets)
    return coder.encode(boxes), nn.functional.one_hot(labels, 11).float() * 20


def test_ssd_encoding_and_decoding_are_inverse() -> None:
    coder = SSDCoder(SIZE)
    boxes = random_boxes(4, len(coder.anchors))
    assert torch.allclose(coder.boxes(coder.encode(boxes)), boxes, atol=1e-3)


def test_ssd_matching() -> None:
    coder, targets = SSDCoder(SIZE), targets_of(20)
    boxes, labels = coder.match(targets)
    overlap = iou(targets[..., :4], coder._corners)
    for canvas, rows in enumerate(targets):
        for row in (rows[:, 4] >= 0).nonzero().flatten().tolist():
            mine = (boxes[canvas] == rows[row, :4]).all(1) & (labels[canvas] == rows[row, 4] + 1)
            assert bool(mine[overlap[canvas, row].argmax()])  # the anchor that fits best
        matched = labels[canvas] > 0
        pairs = torch.diagonal(iou(boxes[canvas, matched], coder._corners[matched]))
        best = overlap[canvas][rows[:, 4] >= 0].amax(0)
        assert bool((best[~matched] < 0.5).all()) and int((pairs >= 0.5).sum()) == int((best >= 0.5).sum())


def test_ssd_perfect_outputs_decode_to_the_targets_and_cost_nothing() -> None:
    pytest.importorskip("pycocotools")
    coder, targets = SSDCoder(SIZE), targets_of(20)
    outputs = perfect_ssd(coder, targets)
    assert mean_average_precision(coder.decode(outputs), targets)["mAP"] > 0.99
    assert float(coder.loss(outputs, targets)) < 1e-3
    assert float(coder.loss((outputs[0] + 1, outputs[1]), targets)) > 1


def test_ssd_loss_takes_three_negatives_for_each_match() -> None:
    coder, targets = SSDCoder(SIZE), targets_of(2)
    logits = torch.randn(2, len(coder.anchors), 11, requires_grad=True)
    coder.loss((torch.zeros(2, len(coder.anchors), 4), logits), targets).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    used = logits.grad.abs().sum(2) > 0
    matched = coder.match(targets)[1] > 0
    assert bool(used[matched].all())
    assert torch.equal(used.sum(1), 4 * matched.sum(1))
    entropy = nn.functional.cross_entropy(logits.flatten(0, 1), torch.zeros(matched.numel()).long(), reduction="none")
    background = entropy.view_as(used)
    for canvas in range(2):  # the hardest of the background
        assert float(background[canvas, used[canvas] & ~matched[canvas]].min()) >= float(
            background[canvas, ~used[canvas]].max()
        )


# --- YOLO -------------------------------------------------------------------------------------------------------------


def perfect_yolo(coder: YOLOCoder, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The maps that say what `targets` say."""
    cells = (SIZE // 32, SIZE // 16)
    corner, sides, stride = coder.places(*cells)
    flat = torch.full((len(targets), len(corner), 15), -20.0)
    canvas, anchor, row = coder.assign(targets, cells)
    wanted = corners_to_centres(targets[canvas, row, :4])
    flat[canvas, anchor, :2] = torch.logit((wanted[:, :2] / stride[anchor] - corner[anchor] + 0.1) / 1.2)
    flat[canvas, anchor, 2:4] = (wanted[:, 2:] / sides[anchor]).log()
    flat[canvas, anchor, 4] = 20.0
    flat[canvas, anchor, 5 + targets[canvas, row, 4].long()] = 20.0
    split = torch.split(flat, [3 * count**2 for count in cells], 1)
    return tuple(  # type: ignore[return-value]
        part.view(-1, count, count, 3, 15).permute(0, 3, 4, 1, 2).reshape(-1, 45, count, count)
        for part, count in zip(split, cells, strict=True)
    )


def test_yolo_perfect_maps_decode_to_the_targets_and_cost_nothing() -> None:
    pytest.importorskip("pycocotools")
    coder, targets = YOLOCoder(SIZE), targets_of(20)
    maps = perfect_yolo(coder, targets)
    # Two items of one shape whose centres share a cell ask for one anchor: all but such are found.
    assert mean_average_precision(coder.decode(maps), targets)["mAP"] > 0.95
    assert float(coder.loss(maps, targets[:1] if len(targets) == 1 else targets)) < 1
    flat = coder.flatten(maps)
    assert flat.shape == (20, 3 * (3**2 + 6**2), 15)


def test_yolo_every_target_has_an_anchor_in_the_cell_of_its_centre() -> None:
    coder, targets = YOLOCoder(SIZE), targets_of(20)
    canvas, anchor, row = coder.assign(targets, (3, 6))
    pairs = set(zip(canvas.tolist(), row.tolist(), strict=True))
    assert pairs == {tuple(pair) for pair in (targets[..., 4] >= 0).nonzero().tolist()}
    corner, _, stride = coder.places(3, 6)
    inside = corners_to_centres(targets[canvas, row, :4])[:, :2] / stride[anchor] - corner[anchor]
    assert bool((inside >= 0).all()) and bool((inside <= 1).all())


def test_yolo_order_of_the_network_s_outputs() -> None:
    maps = tuple(torch.arange(45.0 * n * n).view(1, 45, n, n) for n in (2, 4))
    flat = YOLOCoder(64).flatten(maps)  # type: ignore[arg-type]
    row, column, kind, value = 1, 3, 2, 7  # of the fine map
    place = 12 + (row * 4 + column) * 3 + kind
    assert float(flat[0, place, value]) == float(maps[1][0, kind * 15 + value, row, column])


def test_yolo_loss_of_a_fresh_network_is_finite_and_falls() -> None:
    model, coder = prune_yolo.network(prune_yolo.FAST), YOLOCoder(64)
    images, targets = canvases("train", 4, size=64).all()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        loss = coder.loss(model(images), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] < 30


# --- filters and examples ---------------------------------------------------------------------------------------------


def test_filters_go_with_their_batch_norm_and_physically() -> None:
    pytest.importorskip("torch_pruning")
    model = filter_pruning_ssd.network(filter_pruning_ssd.FAST).eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.bias)
    layers = filter_pruning_ssd.prunable(model)
    assert channels_left(model, layers) == 1
    prune_filters(model, 0.4, layers, "magnitude")
    left = channels_left(model, layers)
    assert left == pytest.approx(0.6, abs=0.01)
    image = torch.randn(1, 3, 64, 64)
    small = sparseprune.compact(model, image)
    kept = sum(small.get_submodule(name).out_channels for name in layers)  # type: ignore[misc]
    total = sum(model.get_submodule(name).out_channels for name in layers)  # type: ignore[misc]
    assert kept / total == pytest.approx(left)  # all of them
    with torch.inference_mode():
        for before, after in zip(model(image), small(image), strict=True):
            assert torch.allclose(before, after, atol=1e-4)


def test_confidences() -> None:
    targets = torch.tensor([[0.0, 0, 10, 10, 3], [20, 20, 40, 40, 5], [50, 50, 60, 60, 1]])
    boxes = torch.tensor([[0.0, 0, 10, 9], [20, 20, 40, 40], [20, 20, 40, 38], [58, 58, 70, 70]])
    found = Detections(boxes[None], torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[3, 4, 5, 1]]))
    assert prune_yolo.confidences(found, targets) == pytest.approx([0.9, 0.7, 0])


def test_results_are_made_once(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    assert results.once("a", lambda: {"x": 1}) == {"x": 1}
    again = Results(tmp_path / "results.json")
    assert again.once("a", lambda: pytest.fail("made twice")) == {"x": 1}
    with pytest.raises(ZeroDivisionError):
        again.once("b", lambda: {"x": 1 // 0})
    assert list(Results(tmp_path / "results.json").rows) == ["a"] and list(tmp_path.iterdir()) == [again.path]


def one_width(table: str) -> bool:
    return len({line.count("|") for line in table.splitlines()}) == 1


def no_more(*args: Any, **options: Any) -> None:
    pytest.fail("done twice")


def test_filter_pruning_ssd_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocotools")
    pytest.importorskip("torch_pruning")
    monkeypatch.setattr(sparseprune, "convert", lambda model, example, tune: model)  # ten seconds, tested elsewhere
    plan = dataclasses.replace(filter_pruning_ssd.FAST, shares=(0.6,))
    task = filter_pruning_ssd.Task(plan, None, tmp_path, SSDCoder(64))
    rows, times = filter_pruning_ssd.run(task)
    assert set(rows) == {"dense", "channels-60%"} and set(times) == {"channels-60%"}
    row = rows["channels-60%"]
    assert row["channels"] == pytest.approx(0.6, abs=0.01)
    dense = sum(parameter.numel() for parameter in filter_pruning_ssd.network(plan).parameters())
    assert row["parameters"] < 0.6 * dense
    table = filter_pruning_ssd.table(rows, times)
    assert one_width(table) and f"| 60.1% | {row['parameters'] / 1e6:.2f} M |" in table
    monkeypatch.setattr(filter_pruning_ssd, "train", no_more)
    monkeypatch.setattr(filter_pruning_ssd, "timing", lambda task, names: times)
    assert filter_pruning_ssd.run(task) == (rows, times)


def test_prune_yolo_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocotools")
    pytest.importorskip("torch_pruning")
    every = prune_yolo.cases(prune_yolo.FAST)
    assert set(every) == {
        "convolutions 50 %", "convolutions 95 %", "convolutions and BN 20 %", "BN 20 %", "BN 50 %", "filters 50 %",
        "sparse training, filters 50 %",
    }  # fmt: skip
    chosen = {name: every[name] for name in ("BN 50 %", "sparse training, filters 50 %")}
    monkeypatch.setattr(prune_yolo, "cases", lambda plan: chosen)
    task = prune_yolo.Task(prune_yolo.FAST, None, tmp_path, YOLOCoder(64))
    rows, times = prune_yolo.run(task)
    assert set(rows) == {"base", *times} and set(times) == {"dense", "sparse", *chosen}
    objects = len(task.picture()[1])
    assert {len(row["finetuned"]["confidences"]) for row in rows.values()} == {objects}
    smaller = times["sparse training, filters 50 %"]
    assert smaller["torch_bytes"] < 0.5 * times["dense"]["torch_bytes"]
    assert smaller["program_bytes"] < 0.5 * times["dense"]["program_bytes"]
    model = sparseprune.load_weights(prune_yolo.network(prune_yolo.FAST), task.weights("BN 50 %"))
    norms = torch.cat([norm.weight.detach() for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)])
    assert float((norms == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert sparseprune.summary(model).sparsity < 0.01  # of the convolutions
    assert one_width(prune_yolo.table(rows, times, ["shirt"] * objects))
    monkeypatch.setattr(prune_yolo, "train", no_more)
    monkeypatch.setattr(prune_yolo, "timing", lambda task, names: times)
    assert prune_yolo.run(task) == (rows, times)


@pytest.mark.parametrize("amount", [0.5, 0.95])
def test_yolo_cases_without_retraining(amount: float) -> None:
    model = prune_yolo.network(prune_yolo.FAST)
    prune_yolo.cases(prune_yolo.FAST)[f"convolutions {amount:.0%}".replace("%", " %")][1](model)
    layers = sparseprune.summary(model).layers
    chosen = [layer for layer in layers if layer.name in prune_yolo.filters_of(model)]
    assert len(chosen) == len(layers) - 2  # the outputs
    kept, total = sum(layer.kept for layer in chosen), sum(layer.total for layer in chosen)
    assert kept == pytest.approx((1 - amount) * total, abs=1)
