"""What could be removed, said beforehand."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from test_compact import BLOCKED, Function, randomize
from torch import Tensor, nn

from sparseprune import testing, zoo
from sparseprune.testing import PrunableLayer, check_prunable


def layers(model: nn.Module, *shape: int) -> dict[str, PrunableLayer]:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dtype = next(model.parameters()).dtype
    report = check_prunable(model, torch.randn(shape, dtype=dtype))
    assert report.failure is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return {layer.name: layer for layer in report.layers}


def test_a_residual_network() -> None:
    found = layers(zoo.resnet18_32(width=8, blocks=(1, 2)), 1, 3, 8, 8)
    assert found["layer1.0.conv1"] == PrunableLayer("layer1.0.conv1", 8, 7, (), None)
    assert found["conv1"].coupled == ("layer1.0.conv2",) and found["conv1"].removable == 7
    coupled = ("layer2.0.downsample.0", "layer2.0.conv2", "layer2.1.conv2")
    for name in coupled:
        assert set(found[name].coupled) == set(coupled) - {name}
    assert found["fc"] == PrunableLayer("fc", 10, 0, (), "it is an output of the model")


def test_detectors_can_lose_all_but_their_outputs() -> None:
    yolo, unet = zoo.YOLOv4Tiny(3, width=4), zoo.UNet(width=4, depth=1)
    for model, outputs in ((yolo, {"coarse.1", "fine.1"}), (unet, {"head"})):
        found = layers(model, 1, 3, 32, 32)
        assert {name for name, layer in found.items() if layer.removable == 0} == outputs
        assert all(layer.removable >= layer.filters - 2 for name, layer in found.items() if name not in outputs)


@pytest.mark.parametrize("case", BLOCKED)
def test_what_is_in_the_way_is_named(case: str) -> None:
    function, parts, reason = BLOCKED[case]

    def forward(m: Any, x: Tensor) -> Any:
        m.x = x
        return function(m, m.after(m.other(x)))

    model = randomize(Function(forward, **parts, other=nn.Conv2d(3, 3, 1), after=nn.Conv2d(3, 3, 1)))
    report = check_prunable(model, torch.randn(2, 3, 8, 8).double())
    found = {layer.name: layer for layer in report.layers}
    assert found["a"].removable == 0 and found["other"].removable == 2
    assert re.search(reason, str(found["a"].reason))
    assert str(found["a"].reason) in str(report)


def test_the_zeros_there_are_do_not_matter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    nn.init.zeros_(model[0].weight)  # type: ignore[arg-type]
    assert layers(model, 1, 3, 8, 8)["0"].removable == 7


def test_one_channel_and_unused_layers_and_failures() -> None:
    model = Function(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(3, 1, 3), b=nn.Conv2d(1, 4, 3), c=nn.Linear(3, 3))
    report = check_prunable(model, torch.randn(1, 3, 8, 8))
    assert report.layers[0].reason == "it has only one" and report.unreached == ("c",)
    assert "c: not reached by the example" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["name"] == "a"
    failed = check_prunable(model, torch.randn(1, 2, 8, 8))
    assert failed.layers == () and "RuntimeError" in str(failed.failure) and "nothing can be removed" in str(failed)
    wrong: Any = 3
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got int"):
        testing.check_prunable(wrong, torch.randn(1))
