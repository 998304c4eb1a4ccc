from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from old_torch import open_sizes
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparseprune import SparsepruneWarning, cli, cli_common, convert, zoo
from sparseprune.synthetic import fit_scale, prune_uniform

# The usual counts: torchvision's for its networks, darknet's yolov4-tiny.cfg, the common PyTorch U-Net. The 32×32
# ResNet has a smaller stem and ten classes.
PARAMETERS = {
    "resnet18-32": 11_173_962,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "vgg16": 138_357_544,
    "vgg16-bn": 138_365_992,
    "mobilenetv2": 3_504_872,
    "yolov4-tiny": 6_056_606,
    "ssd300-mobilenetv2": 8_185_721,
    "unet": 31_037_698,
    "tutorial-cnn": 62_006,
    "lenet-300-100": 266_610,
}

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "resnet18-32": [(1, 10)],
    "yolov4-tiny": [(1, 255, 13, 13), (1, 255, 26, 26)],
    "ssd300-mobilenetv2": [(1, 1917, 4), (1, 1917, 21)],
    "unet": [(1, 2, 256, 256)],
    "tutorial-cnn": [(1, 10)],
    "lenet-300-100": [(1, 10)],
}


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_network_table(name: str) -> None:
    network = zoo.NETWORKS[name]
    model = network.factory()
    assert model.training and sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    for layer in network.keep_dense:
        stem = model.get_submodule(layer)
        assert isinstance(stem, nn.Conv2d) and stem.in_channels == network.input_shape[0]
    inputs = [torch.randn(1, *network.input_shape, generator=torch.Generator().manual_seed(0))]
    # As the benchmark does it, but for what takes seconds: scales from smaller images, zeros of 103 M weights.
    small = [x[..., :64, :64] for x in inputs] if name.startswith(("unet", "vgg")) else inputs
    dense = (*network.keep_dense, "classifier.0") if name.startswith("vgg") else network.keep_dense
    fit_scale(prune_uniform(model.eval(), 0.95, exclude=dense), small)
    with torch.no_grad():
        outputs = tree_leaves(model(*inputs))
    assert [tuple(y.shape) for y in outputs] == SHAPES.get(name, [(1, 1000)])
    for y in outputs:
        assert y.isfinite().all() and 1e-3 < y.std() < 1e3  # neither lost nor overflowing: worth comparing


# What keeps the tests short: smaller images, and narrower ones of the networks that take long to verify in float64.
SIZES = {"resnet18": 64, "resnet50": 64, "vgg16": 32, "vgg16-bn": 32, "mobilenetv2": 64, "yolov4-tiny": 64,
         "ssd300-mobilenetv2": 96, "unet": 32}  # fmt: skip
NARROWER: dict[str, Callable[[], nn.Module]] = {
    "vgg16": lambda: zoo.VGG(hidden=64, seed=0),  # the convolutions are as they are
    "vgg16-bn": lambda: zoo.VGG(batch_norm=True, hidden=64, seed=0),
    "ssd300-mobilenetv2": lambda: zoo.SSD300(width=0.5, seed=0),
    "unet": lambda: zoo.UNet(width=16, seed=0),
}
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)

WITHOUT_TORCH = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "tqdm"):
            raise ImportError(f"{name} is hidden")
sys.meta_path.insert(0, Hidden())
import numpy as np
from sparseprune import runtime
program, data = runtime.load("model.spr"), np.load("data.npz")
outputs = program(data["x"])
outputs = outputs if isinstance(outputs, tuple) else (outputs,)
expected = [data[f"y{place}"] for place in range(len(data.files) - 1)]
assert [y.tobytes() for y in outputs] == [y.tobytes() for y in expected]
assert [y.shape for y in outputs] == [y.shape for y in expected]
assert not any(name.partition(".")[0] == "torch" for name in sys.modules)
print("equal")
"""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[open_sizes] if n == "yolov4-tiny" else []) for n in zoo.NETWORKS]
)
def test_one_native_program_that_runs_without_torch(name: str, tmp_path: Path) -> None:
    network = zoo.NETWORKS[name]
    model = NARROWER.get(name, network.factory)()
    channels, *size = network.input_shape
    size = [SIZES[name]] * 2 if name in SIZES else size
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
    fit_scale(prune_uniform(model.eval(), 0.95, exclude=network.keep_dense), [x])
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsepruneWarning)
        fast = convert(model, x[:1], tune="fixed")
    report = fast.report
    assert report.segments == () and report.runs == "sparse"
    assert sorted(layer.name for layer in report.layers) == sorted(
        layer for layer, module in model.named_modules() if isinstance(module, LAYERS)
    )
    assert all(layer.error is not None for layer in report.layers)  # each within its own bound, or an error
    assert report.max_error is not None and report.bound is not None and report.max_error < report.bound / 10
    outputs = tree_leaves(fast(x))
    with torch.no_grad():
        for y, want in zip(outputs, tree_leaves(model(x)), strict=True):
            assert y.shape == want.shape and (y - want).abs().max() < 1e-4 * want.abs().max()
    fast.save(tmp_path / "model.spr")
    np.savez(tmp_path / "data.npz", x=x.numpy(), **{f"y{place}": y.numpy() for place, y in enumerate(outputs)})
    run = [sys.executable, "-c", WITHOUT_TORCH]
    path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False, env=path)
    assert done.stdout == "equal\n", done.stderr


def test_networks_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["benchmark", "--help"])
    text = capsys.readouterr().out.replace("\n", " ")
    assert cli_common.NETWORKS == tuple(zoo.NETWORKS)
    for name, network in zoo.NETWORKS.items():
        assert f"`{name}`" in str(zoo.__doc__) and name in text.split("MODEL")[-1].replace(",", " ").split()
        assert network.about and network.factory.__doc__
    for name in zoo.__all__:
        assert getattr(zoo, name).__doc__ or name == "NETWORKS"


def test_usual_layer_names() -> None:
    names = dict(zoo.resnet50().named_modules())
    for name in ("conv1", "bn1", "layer1.0.conv3", "layer4.2.bn2", "layer2.0.downsample.0", "fc"):
        assert name in names
    assert names["layer2.0.conv1"].stride == (1, 1)  # version 1.5: the 3×3 has the stride
    assert names["layer2.0.conv2"].stride == (2, 2)
    names = dict(zoo.VGG(batch_norm=True, hidden=8).named_modules())
    for name in ("features.0", "features.41", "classifier.6"):
        assert name in names
    names = dict(zoo.MobileNetV2().named_modules())
    for name in ("features.0.0", "features.1.conv.1", "features.17.conv.3", "features.18.1", "classifier.1"):
        assert name in names


def test_small_relatives() -> None:
    model: Any = zoo.resnet18_32(7, width=8, in_channels=1, blocks=(1, 1, 1))
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert model.layer3[0].conv2.weight.shape == (32, 32, 3, 3)
    assert model(torch.zeros(2, 1, 45, 33)).shape == (2, 7)
    assert zoo.VGG((4, 0, 8, 0), hidden=8, num_classes=3, in_channels=1)(torch.zeros(2, 1, 28, 28)).shape == (2, 3)
    mobile: Any = zoo.MobileNetV2(7, width=0.35, in_channels=1).eval()
    assert mobile(torch.zeros(2, 1, 64, 96)).shape == (2, 7)
    widths = [mobile.features[index].conv[-1].num_features for index in (1, 2, 4, 7, 11, 14, 17)]
    assert widths == [8, 8, 16, 24, 32, 56, 112] and mobile.last_channels == 1280  # torchvision's for 0.35
    coarse, fine = zoo.YOLOv4Tiny(2, width=4).eval()(torch.zeros(2, 3, 64, 96))
    assert coarse.shape == (2, 21, 2, 3) and fine.shape == (2, 21, 4, 6)
    boxes, classes = zoo.SSD300(81, width=0.35).eval()(torch.zeros(2, 3, 300, 300))
    assert boxes.shape == (2, 1917, 4) and classes.shape == (2, 1917, 81)
    assert zoo.UNet(3, in_channels=1, width=4, depth=2)(torch.zeros(2, 1, 20, 36)).shape == (2, 3, 20, 36)
    assert zoo.MLP((6, 5, 4))(torch.zeros(2, 2, 3)).shape == (2, 4)


def test_ssd_orders_anchors_by_map_row_column_and_kind() -> None:
    model: Any = zoo.SSD300(2, width=0.35).eval()
    for head, anchors in zip(model.boxes, zoo._ANCHORS, strict=True):
        nn.init.zeros_(head.weight)
        head.bias.data = torch.arange(4.0 * anchors)
    boxes = model(torch.randn(1, 3, 300, 300))[0][0]
    assert boxes[0].tolist() == [0, 1, 2, 3] and boxes[2].tolist() == [8, 9, 10, 11] and torch.equal(boxes[3], boxes[0])
    assert boxes[19 * 19 * 3 + 5].tolist() == [20, 21, 22, 23]


def test_yolo_blocks_pass_on_the_second_half() -> None:
    block: Any = zoo.CSPBlock(4).eval()
    x = torch.randn(1, 4, 8, 8)
    seen: list[Tensor] = []
    for layer in (block.conv1, block.conv2):
        layer.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    joined, tap = block(x)
    assert torch.equal(seen[2], seen[1][:, 2:]) and joined.shape == (1, 8, 4, 4) and tap.shape == (1, 4, 8, 8)
    assert torch.equal(joined, nn.functional.max_pool2d(torch.cat([seen[1], tap], 1), 2))


def test_seed() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (zoo.resnet18_32(width=4, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_seeds_of_the_table(name: str) -> None:
    before = torch.random.get_rng_state()
    with torch.device("meta"):  # shapes only: quick
        zoo.NETWORKS[name].factory()
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("wrong", [{"width": 0}, {"num_classes": 0}, {"in_channels": -1}])
def test_sizes_that_are_not_positive(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        zoo.resnet18_32(**wrong)


@pytest.mark.parametrize("blocks", [(), (1, 0), (1, 1, 1, 1, 1)])
def test_wrong_blocks(blocks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="blocks="):
        zoo.resnet18_32(blocks=blocks)


def test_wrong_sizes() -> None:
    for make, message in (
        (lambda: zoo.VGG((0, 4)), r"channels=\(0, 4\)"),
        (lambda: zoo.VGG((4, -1)), r"channels=\(4, -1\)"),
        (lambda: zoo.VGG(hidden=0), "hidden=0"),
        (lambda: zoo.mobilenetv2(0), "num_classes=0"),
        (lambda: zoo.MobileNetV2(width=0.0), "width=0.0"),
        (lambda: zoo.YOLOv4Tiny(width=5), "width=5 is odd"),
        (lambda: zoo.ssd300_mobilenetv2(-1), "num_classes=-1"),
        (lambda: zoo.UNet(depth=0), "depth=0"),
        (lambda: zoo.tutorial_cnn(in_channels=0), "in_channels=0"),
        (lambda: zoo.lenet_300_100(0), "num_classes=0"),
        (lambda: zoo.MLP((3,)), r"sizes=\(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
