from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sparseprune import zoo


@pytest.mark.parametrize(
    ("factory", "parameters"),
    # the usual counts of torchvision's networks of the same names; the 32×32 one has a smaller stem and ten classes
    [(zoo.resnet18_32, 11_173_962), (zoo.resnet18, 11_689_512), (zoo.resnet50, 25_557_032)],
)
def test_parameter_counts(factory: Callable[[], nn.Module], parameters: int) -> None:
    assert sum(p.numel() for p in factory().parameters()) == parameters


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_network_table(name: str) -> None:
    network = zoo.NETWORKS[name]
    model = network.factory().eval()
    for layer in network.keep_dense:
        assert isinstance(model.get_submodule(layer), nn.Conv2d)
    with torch.no_grad():
        logits = model(torch.zeros(1, *network.input_shape))
    assert logits.shape == (1, 10 if name == "resnet18-32" else 1000)


def test_usual_layer_names() -> None:
    names = dict(zoo.resnet50().named_modules())
    for name in ("conv1", "bn1", "layer1.0.conv3", "layer4.2.bn2", "layer2.0.downsample.0", "fc"):
        assert name in names
    assert names["layer2.0.conv1"].stride == (1, 1)  # version 1.5: the 3×3 has the stride
    assert names["layer2.0.conv2"].stride == (2, 2)


def test_small_relatives() -> None:
    model: Any = zoo.resnet18_32(7, width=8, in_channels=1, blocks=(1, 1, 1))
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert model.layer3[0].conv2.weight.shape == (32, 32, 3, 3)
    assert model(torch.zeros(2, 1, 45, 33)).shape == (2, 7)


def test_seed() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (zoo.resnet18_32(width=4, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize("wrong", [{"width": 0}, {"num_classes": 0}, {"in_channels": -1}])
def test_sizes_that_are_not_positive(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        zoo.resnet18_32(**wrong)


@pytest.mark.parametrize("blocks", [(), (1, 0), (1, 1, 1, 1, 1)])
def test_wrong_blocks(blocks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="blocks="):
        zoo.resnet18_32(blocks=blocks)
