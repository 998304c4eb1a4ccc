"""`summary`: zeros, filters, multiply-adds and bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseprune import prune, save_weights, summary, zoo
from sparseprune.pruning import set_mask


def model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 6, 2),
        nn.Flatten(), nn.Linear(6 * 9, 5),
    )  # fmt: skip


X = torch.randn(2, 4, 8, 8)


def test_zero_filters_from_masks_and_from_weights() -> None:
    net = model()
    with torch.no_grad():
        net[0].weight[[1, 5]] = 0
        net[3].weight[:, 2] = 0  # (in, out, h, w)
    mask = torch.ones_like(net[2].weight, dtype=torch.bool)
    mask[7] = False
    set_mask(net[2], mask)
    found = {layer.name: layer for layer in summary(net).layers}
    assert [(found[n].zero_filters, found[n].filters) for n in "0235"] == [(2, 8), (1, 8), (1, 6), (0, 5)]
    assert found["2"].masked and found["2"].kept == 7 * 18 and not found["0"].masked
    whole = summary(net)
    assert whole.zero_filters == 4 and whole.filters == 27 and whole.macs is None
    text = str(whole)
    assert "2 of 8" in text and "4 of 27" in text and "MACs" not in text and "file" not in text


def test_grouped_transposed_filters() -> None:
    net = nn.ConvTranspose2d(4, 6, 3, groups=2)
    with torch.no_grad():
        net.weight[:2, 1] = 0  # the second filter of the first group
    (layer,) = summary(net).layers
    assert (layer.filters, layer.zero_filters) == (6, 1)


def test_multiply_adds() -> None:
    net = model()
    with torch.no_grad():
        net[0].weight[:4] = 0
    found = {layer.name: layer for layer in summary(net, X).layers}
    images, places = 2, {"0": 4 * 4, "2": 2 * 2, "3": 2 * 2, "5": 1}
    per_place = {"0": 8 * 4 * 9, "2": 8 * 2 * 9, "3": 8 * 6 * 4, "5": 54 * 5}
    for name in places:
        assert found[name].macs == images * places[name] * per_place[name]
    assert found["0"].kept_macs == images * 16 * 4 * 4 * 9 and found["2"].kept_macs == found["2"].macs
    whole = summary(net, X)
    assert whole.macs == sum(layer.macs or 0 for layer in found.values())
    data = json.loads(json.dumps(whole.to_dict()))
    assert data["layers"][0]["macs"] == found["0"].macs and data["kept_macs"] == whole.kept_macs
    assert f"{whole.macs:,}" in str(whole)


def test_multiply_adds_of_a_known_network() -> None:
    macs, net = 0, zoo.resnet18_32(width=8).train()
    counted = summary(net, torch.zeros(1, 3, 32, 32)).macs
    for stage, blocks in enumerate((4, 4, 4, 4)):  # 3×3 convolutions of each stage, by hand
        channels, side = 8 << stage, 32 >> stage
        before = channels // 2 if stage else channels
        macs += side * side * 9 * channels * (before + (blocks - 1) * channels)
        macs += side * side * before * channels if stage else 0  # the shortcut
    assert counted == macs + 32 * 32 * 9 * 3 * 8 + 64 * 10 and net.training


def test_layers_used_twice_unused_and_tied() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(self.a(input=x)))
            return y

    net = Net().train()
    first, unused = summary(net, torch.zeros(3, 4)).layers
    assert first.macs == 3 * 3 * 16 and unused.macs == 0 and net.training


def test_file_size(tmp_path: Path) -> None:
    net = prune(model(), 0.8)
    path = tmp_path / "w.safetensors"
    save_weights(net, path)
    found = summary(net, file_size=True)
    assert found.file_bytes == path.stat().st_size
    save_weights(model(), path)
    assert found.dense_bytes == path.stat().st_size > found.file_bytes > 0
    assert f"file: {found.file_bytes:,} bytes, {found.dense_bytes:,} if nothing were zero" in str(found)


def test_other_parameters_that_are_masked() -> None:
    net = prune(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), 1, include="1", parameters="weight")
    first, norm = summary(net, torch.zeros(2, 4)).layers
    assert norm.filters is norm.zero_filters is norm.macs is None and first.macs == 24
    assert len(str(summary(net)).splitlines()) == 6
    wrong: Any = "net"
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got str"):
        summary(wrong)
