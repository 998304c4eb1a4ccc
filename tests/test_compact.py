"""Physical removal: the numbers stay, the zeros go, and what cannot go is named."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.utils._pytree import tree_leaves

import sparseprune
from sparseprune import SparsepruneWarning, UnsupportedError, VerificationError, compact, set_num_threads, zoo
from sparseprune.pruning import CompactReport, get_mask, removal, set_mask, shrinking
from sparseprune.synthetic import fit_batch_norm

ln_structured: Any = torch_prune.ln_structured
CONVS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
LAYERS = (*CONVS, nn.Linear)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Function(nn.Module):
    """A model of one function, with modules to use as keyword arguments."""

    def __init__(self, function: Any, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def randomize(model: nn.Module, seed: int = 0) -> Any:
    """float64, numbers that matter everywhere, evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.5, generator=generator)
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 2, generator=generator)
    return model.double().eval()


def zero(layer: nn.Module, *filters: int) -> None:
    """Filters without weights; their bias stays."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        (weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight)[list(filters)] = 0


def zero_random(model: nn.Module, share: float = 0.4, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, LAYERS):
            width = layer.weight.shape[1 if isinstance(layer, nn.ConvTranspose2d) else 0]
            zero(layer, *torch.nonzero(torch.rand(width, generator=generator) < share).flatten().tolist())
    return model


def check(model: nn.Module, *shapes: tuple[int, ...], **options: Any) -> Any:
    """Compacts and compares in evaluation mode, on another example than the one given; returns the small model."""
    generator = torch.Generator().manual_seed(3)
    example, other = (
        tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes) for _ in range(2)
    )
    before = copy.deepcopy(model.state_dict())
    small = compact(model, example, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # left untouched
    assert type(small) is type(model) and small.training == model.training
    with torch.no_grad():
        ours, theirs = tree_leaves(small.eval()(*other)), tree_leaves(model.eval()(*other))
    for y, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(y, want, rtol=0, atol=1e-10 * float(want.abs().max()))
    return small


def widths(model: Any) -> list[int]:
    return [
        layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        for layer in model.modules()
        if isinstance(layer, LAYERS)
    ]


def stayed(small: Any) -> dict[str, str]:
    return {each.layer: each.reason for each in small.compact_report.stayed}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "resnet18-32": (lambda: zoo.resnet18_32(width=8), (1, 3, 16, 16), 0.6),
    "resnet18": (lambda: zoo.ResNet(zoo.BasicBlock, (2, 2, 1), width=8), (1, 3, 32, 32), 0.6),
    "resnet50": (lambda: zoo.ResNet(zoo.Bottleneck, (1, 2, 1), width=8), (1, 3, 32, 32), 0.6),
    "vgg16": (lambda: zoo.VGG((8, 8, 0, 16, 16, 0, 24, 24, 0), hidden=32, num_classes=10), (1, 3, 32, 32), 0.45),
    "vgg16-bn": (
        lambda: zoo.VGG((8, 8, 0, 16, 0, 24, 0), batch_norm=True, hidden=32, num_classes=10), (1, 3, 32, 32), 0.5
    ),
    "mobilenetv2": (lambda: zoo.MobileNetV2(10, width=0.35), (1, 3, 32, 32), 0.5),
    "yolov4-tiny": (lambda: zoo.YOLOv4Tiny(3, width=8), (1, 3, 32, 32), 0.5),
    "ssd300-mobilenetv2": (lambda: zoo.SSD300(3, width=0.25), (1, 3, 64, 64), 0.5),
    "unet": (lambda: zoo.UNet(width=8, depth=2), (1, 3, 16, 16), 0.4),
    "tutorial-cnn": (zoo.tutorial_cnn, (1, 3, 32, 32), 0.4),
    "lenet-300-100": (zoo.lenet_300_100, (2, 1, 28, 28), 0.6),
}  # fmt: skip


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_networks(name: str) -> None:
    factory, shape, left = NETWORKS[name]
    model = zero_random(randomize(factory()))
    fit_batch_norm(model, [torch.randn(shape, dtype=torch.float64)])
    small = check(model, shape)
    before, after = small.compact_report.parameters
    assert before == sum(p.numel() for p in model.parameters()) and after == sum(p.numel() for p in small.parameters())
    assert after < left * before
    text = str(small.compact_report)
    assert f"{after:,} after" in text and all(layer.name in text for layer in small.compact_report.layers)


def test_twenty_percent_of_the_filters_take_the_columns_of_the_linear_layer_along() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 10)))
    zero(model[0], *range(5, 18))
    small = check(model, (2, 3, 4, 4))
    assert small[0].weight.shape == (51, 3, 3, 3) and small[3].weight.shape == (10, 51 * 16)
    assert small[3].in_features == 51 * 16 and torch.equal(small[0].weight[5:], model[0].weight[18:])
    report = small.compact_report
    assert isinstance(report, CompactReport) and report.stayed == () and report.dropped == ()
    assert report.to_dict()["layers"][0] == {"name": "0", "before": [64, 3, 3, 3], "after": [51, 3, 3, 3]}


def test_under_inference_mode_too() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10)))
    zero(model[0], 2, 3)
    with torch.inference_mode():
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        small = compact(model, x)
        assert torch.allclose(small(x), model(x)) and small[0].weight.shape[0] == 6
    small(torch.randn(2, 3, 4, 4, dtype=torch.float64)).sum().backward()  # what comes out can be trained
    assert small[0].weight.grad is not None


@pytest.mark.parametrize("way", ["zeros", "masks", "hooks"])
def test_zeros_from_anywhere(way: str) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False)))
    gone = [0, 5]
    if way == "zeros":
        zero(model[0], *gone)
    elif way == "masks":
        mask = torch.ones(8, 3, 3, 3, dtype=torch.bool)
        mask[gone] = False
        set_mask(model[0], mask)
    else:
        with torch.no_grad():
            model[0].weight[gone] *= 1e-3
        ln_structured(model[0], "weight", 0.25, n=2, dim=0)
    small = check(model, (1, 3, 8, 8))
    assert widths(small) == [6, 4] and get_mask(small[0]) is None
    assert set(small.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}  # a bias took the constants in


def test_the_shift_of_a_removed_channel_is_not_lost() -> None:
    parts = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    model = randomize(nn.Sequential(*parts))
    zero(model[0], 1, 2)
    model[1].bias.data[1:3] = 40.0
    small = check(model, (1, 3, 8, 8))
    assert widths(small) == [6, 4] and small[1].num_features == 6
    assert (small[3].bias - model[3].bias).abs().min() > 1  # naive removal would be that far off


def test_a_batch_norm_takes_the_constant_in_where_there_is_no_bias() -> None:
    parts = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
    model = randomize(nn.Sequential(*parts))
    zero(model[0], 1, 2)
    model[0].bias.data[1:3] = 40.0
    small = check(model, (1, 3, 8, 8))
    assert small[2].bias is None and (small[3].running_mean - model[3].running_mean).abs().min() > 1
    assert set(small.state_dict()) == set(model.state_dict())


def test_a_constant_stays_for_all_at_a_padded_border() -> None:
    parts = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)
    model = randomize(nn.Sequential(*parts))
    zero(model[0], 1, 2, 5, 6)
    with torch.no_grad():
        model[1].weight.fill_(1)
        model[1].running_mean.zero_()
        model[1].bias[[1, 2, 5, 6]] = torch.tensor([2.0, 3.0, -1.0, 0.5]).double()
    small = check(model, (1, 3, 8, 8))
    assert widths(small) == [5, 4]  # of 2, 3, 0 and 0.5 the largest
    assert "padded border" in stayed(small)["0"]
    model[1].bias.data[[1, 2, 5, 6]] = -1.0
    assert widths(check(model, (1, 3, 8, 8))) == [4, 4]  # zeros are no different at the border


@pytest.mark.parametrize(("padding", "mode"), [("same", "zeros"), ("valid", "zeros"), (1, "reflect"), (1, "circular")])
def test_kinds_of_padding(padding: Any, mode: Any) -> None:
    second = nn.Conv2d(8, 4, 3, padding=padding, padding_mode=mode)
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), second))
    zero(model[0], 1, 2, 5)
    assert widths(check(model, (1, 3, 8, 8))) == [6 if padding == "same" else 5, 4]


def test_transposed_convolutions() -> None:
    up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1)
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), up, nn.ReLU(), nn.Conv2d(6, 2, 1)))
    zero(model[0], 1, 2, 5)
    zero(model[1], 0, 4)
    assert widths(check(model, (1, 3, 8, 8))) == [6, 4, 2]


def residual(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.bn1(m.conv1(x)))
    y = F.relu(m.bn2(m.conv2(y)) + y)
    logits: Tensor = m.fc(F.adaptive_avg_pool2d(y, 1).flatten(1))
    return logits


def test_residual_only_where_all_allow_it() -> None:
    model = randomize(Function(
        residual, conv1=nn.Conv2d(3, 8, 3), bn1=nn.BatchNorm2d(8), conv2=nn.Conv2d(8, 8, 3, padding=1),
        bn2=nn.BatchNorm2d(8), fc=nn.Linear(8, 3),
    ))  # fmt: skip
    zero(model.conv1, 1, 2, 3)
    zero(model.conv2, 2, 3, 7)
    model.bn1.bias.data[1:4] = -9.0
    small = check(model, (2, 3, 8, 8))
    assert widths(small) == [6, 6, 3] and small.bn1.num_features == small.bn2.num_features == 6
    assert "coupled with those of conv2" in stayed(small)["conv1"]


def test_concatenation() -> None:
    model = randomize(Function(
        lambda m, x: m.last(torch.cat([F.relu(m.a(x)), x, F.relu(m.b(x))], 1)),
        a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(3, 6, 3, padding=1), last=nn.Conv2d(13, 5, 1),
    ))  # fmt: skip
    zero(model.a, 0, 3)
    zero(model.b, 1, 5)
    small = check(model, (1, 3, 6, 6))
    assert widths(small) == [2, 4, 5] and small.last.in_channels == 9


def test_a_tensor_against_itself() -> None:
    model = randomize(Function(lambda m, x: m.b(torch.cat([m.a(x), m.a2(x).flip(3)], 1) * 2),
                               a=nn.Conv2d(3, 4, 1), a2=nn.Conv2d(3, 4, 1), b=nn.Conv2d(8, 2, 1)))  # fmt: skip
    zero(model.a, 1)
    zero(model.a2, 2)
    assert check(model, (1, 3, 4, 4)).b.in_channels == 6
    twice = randomize(Function(lambda m, x: m.b(torch.cat([y := m.a(x), F.relu(y)], 1)),
                               a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(8, 2, 1)))  # fmt: skip
    zero(twice.a, 1)
    assert check(twice, (1, 3, 4, 4)).b.in_channels == 6


@pytest.mark.parametrize("cut", ["half", "chunk", "sum of chunks"])
def test_a_tensor_that_is_cut_loses_as_much_on_either_side(cut: str) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        if cut == "half":
            return m.last(torch.cat([m.b(y[:, y.shape[1] // 2 :]), y], 1))
        one, other = y.chunk(2, 1)
        return m.last(torch.cat([m.b(one), other, one], 1) if cut == "chunk" else m.b(one + other))

    last = nn.Conv2d(3, 2, 1) if cut == "sum of chunks" else nn.Conv2d(11, 2, 1)
    model = randomize(Function(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(4, 3, 1), last=last))
    zero(model.a, 0, 2, 3, 4, 6, 7)
    zero(model.b, 0)
    small = check(model, (1, 3, 5, 5))
    assert widths(small) == [2, 2, 2]
    zero(model.b, 0)
    model.a.weight.data[[4, 6]] = 1.0
    small = check(model, (1, 3, 5, 5))
    assert widths(small)[0] == 6
    assert "as many have to go" in stayed(small)["a"] or "coupled" in stayed(small)["a"] or cut == "sum of chunks"


def test_depthwise() -> None:
    parts = (nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
             nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1))  # fmt: skip
    model = randomize(nn.Sequential(*parts))
    with torch.no_grad():
        model[1].running_mean.zero_()
        model[1].bias.fill_(1)
        model[1].weight.fill_(1)
        model[0].bias.zero_()
        model[1].bias[4] = -2
        model[4].bias.fill_(3)
        model[4].weight.fill_(0.1)
    zero(model[3], 1, 2)  # gives a constant, whatever it reads
    zero(model[0], 2, 4, 5)  # 4 gives 0; 5 gives 1, which is another number at the border of the depthwise layer
    small = check(model, (1, 3, 6, 6))
    assert widths(small) == [5, 5, 4] and small[3].groups == small[3].in_channels == small[4].num_features == 5
    assert stayed(small) == {"0": "coupled with those of 3, which are not all zero"}


def test_grouped() -> None:
    model = randomize(nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 4, 1)
    ))  # fmt: skip
    zero(model[0], 0, 5, 6)  # one of the first group, two of the second
    zero(model[2], 1, 2, 3, 7, 8)
    small = check(model, (1, 3, 6, 6))
    assert small[2].weight.shape == (8, 3, 3, 3) and small[2].groups == 2 and widths(small) == [6, 8, 4]
    assert "grouped" in stayed(small)["0"] and "grouped" in stayed(small)["2"]
    model[2].padding = (1, 1)
    assert widths(check(model, (1, 3, 6, 6)))[0] in (7, 8)  # only where the constant is 0
    multiplied = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1)))
    zero(multiplied[1], 0, 3, 4, 6)
    zero(multiplied[0], 1)
    assert widths(check(multiplied, (1, 3, 6, 6))) == [4, 4, 2]


def test_norms_and_slopes_lose_channels_too() -> None:
    norm, one = nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.BatchNorm1d(6)
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.PReLU(8), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                                    nn.Linear(32, 6), one, nn.PReLU(), nn.Linear(6, 4)))  # fmt: skip
    zero(model[0], 1, 4)
    zero(model[5], 3)
    small = check(model, (1, 3, 8, 8))
    assert small[1].num_features == small[2].num_parameters == 6 and small[5].in_features == 24
    assert small[6].num_features == 5 and widths(small) == [6, 5, 4]


def test_group_norm_computes_over_all_channels() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    zero(model[0], 1, 4)
    with pytest.warns(SparsepruneWarning, match=r"2 of 0 \(1, a GroupNorm, computes over all channels\)"):
        small = check(model, (1, 3, 8, 8))
    assert widths(small) == [8, 4]


def squeeze(m: Any, x: Tensor) -> Any:
    y = m.bn(m.conv(x))
    gate = torch.sigmoid(m.up(F.relu(m.down(y.mean((2, 3), keepdim=True)))))
    return m.last(y * gate)


def test_squeeze_and_excitation() -> None:
    model = randomize(Function(squeeze, conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), down=nn.Conv2d(8, 4, 1),
                               up=nn.Conv2d(4, 8, 1), last=nn.Conv2d(8, 5, 3)))  # fmt: skip
    zero(model.conv, 0, 1, 2)
    with torch.no_grad():
        model.conv.bias[:2] = model.bn.running_mean[:2] = model.bn.bias[:2] = 0  # 0 times any gate is 0
    zero(model.down, 3)
    small = check(model, (1, 3, 8, 8))
    assert widths(small) == [6, 3, 6, 5] and stayed(small)["conv"].startswith("coupled with those of up")


def test_inputs_nobody_reads() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    with torch.no_grad():
        model[4].weight[:, :4] = 0
        model[2].weight[4:, 6:] = 0  # the rest of the filters that read 6 and 7 goes, so these go as well
    small = check(model, (1, 3, 12, 12))
    assert widths(small) == [6, 4, 4]


def test_batch_norm_without_scale_makes_constants() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    model[1].weight.data[[1, 2, 7]] = 0
    assert widths(check(model, (1, 3, 8, 8))) == [5, 4]


def test_layers_pruned_to_nothing_keep_one_channel() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)))
    zero(model[0], *range(8))
    assert widths(check(model, (1, 3, 12, 12))) == [1, 1, 4]  # what reads only constants is a constant


def test_an_output_of_the_model_stays() -> None:
    model = randomize(Function(lambda m, x: {"features": (y := m.a(x)), "logits": m.b(y)},
                               a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 3)))  # fmt: skip
    zero(model.a, 1, 2)
    zero(model.b, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an output's zeros are nobody's fault
        small = check(model, (1, 3, 8, 8))
    assert widths(small) == [8, 4] and stayed(small) == dict.fromkeys("ab", "it is an output of the model")


def times_mean(y: Tensor) -> Tensor:
    return y * torch.sigmoid(y.mean(1, keepdim=True))


BLOCKED: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, Any], str]] = {
    "a hard-coded view": (
        lambda m, x: m.b(m.a(x).view(-1, 8 * 36)),
        {"a": nn.Conv2d(3, 8, 3), "b": nn.Linear(8 * 36, 4)},
        r"test_compact.py, line \d+: `lambda m, x: m.b\(m.a\(x\).view\(-1, 8 \* 36\)\),`",
    ),
    "a layer used twice": (
        lambda m, x: m.b(m.a(F.pad(m.a(x), (1, 1, 1, 1)))),
        {"a": nn.Conv2d(3, 3, 3), "b": nn.Conv2d(3, 4, 1)},
        "a is used 2 times in one call",
    ),
    "tied weights": (
        lambda m, x: m.c(F.relu(m.b(x)) - m.a(x)),
        {"a": (tied := nn.Conv2d(3, 8, 1)), "b": tied, "c": nn.Conv2d(8, 4, 1)},
        "a is used 2 times in one call",
    ),
    "an input added": (
        lambda m, x: m.b(m.a(x) + m.x),
        {"a": nn.Conv2d(3, 3, 3, padding=1), "b": nn.Conv2d(3, 4, 1)},
        "an input of the model meets it",
    ),
    "a parameter": (
        lambda m, x: m.b(m.a(x) * m.scale),
        {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 4, 1), "scale": nn.Parameter(torch.ones(1, 8, 1, 1))},
        "the parameter scale meets it",
    ),
    "a shuffle of channels": (
        lambda m, x: m.b(m.a(x).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)),
        {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 4, 1)},
        "an output|Error",
    ),
    "a mean over channels": (
        lambda m, x: m.b(times_mean(F.relu(m.a(x)))),
        {"a": nn.Conv2d(3, 8, 3, bias=False), "b": nn.Conv2d(8, 4, 1)},
        "an output differs by",
    ),
    "a split of fixed sizes": (
        lambda m, x: m.b(torch.mul(*m.a(x).split(4, 1))),
        {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(4, 4, 1)},
        r"test_compact.py, line \d+",
    ),
}


@pytest.mark.parametrize("case", BLOCKED)
def test_what_is_in_the_way_is_named(case: str) -> None:
    function, parts, reason = BLOCKED[case]
    other = nn.Conv2d(3, 3, 1)  # goes on being removable
    after = nn.Conv2d(3, 3, 1)

    def forward(m: Any, x: Tensor) -> Any:
        m.x = x
        return function(m, m.after(m.other(x)))

    model = randomize(Function(forward, **parts, other=other, after=after))
    zero(model.other, 1)
    zero(model.a, 1, *({5} & set(range(len(model.a.weight)))))
    with pytest.warns(SparsepruneWarning, match=reason):
        small = check(model, (2, 3, 8, 8))
    assert small.a.weight.shape == model.a.weight.shape and small.other.out_channels == 2


def test_tied_parameters_of_two_layers() -> None:
    model = randomize(Function(lambda m, x: m.c(F.relu(m.a(x)) + F.relu(m.b(x))),
                               a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 4, 1)))  # fmt: skip
    model.b.weight = model.a.weight
    zero(model.a, 1)
    with pytest.warns(SparsepruneWarning, match="shares a parameter with"):
        small = check(model, (1, 3, 8, 8))
    assert small.a.weight is small.b.weight


def test_a_border_inside_average_pooling_is_seen() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 4, 1)))
    zero(model[0], 1, 2)
    small = check(model, (1, 3, 8, 8))
    assert widths(small) == [8, 4] and "not the same everywhere where 2 reads it" in stayed(small)["0"]
    model[1].count_include_pad = False
    assert widths(check(model, (1, 3, 8, 8))) == [6, 4]


def test_relu_that_is_dead_on_the_example_only() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    model[0].bias.data[3] = -1e3  # constant for ordinary images, but not a constant
    assert widths(check(model, (1, 3, 8, 8))) == [8, 4]


def test_multiples_of_channels() -> None:
    model = zero_random(randomize(zoo.MobileNetV2(10, width=0.35)), 0.5)
    small = check(model, (1, 3, 32, 32), multiple_of=8)
    assert all(width % 8 == 0 for width in widths(small)[:-1])
    assert small.compact_report.parameters[1] < 0.6 * small.compact_report.parameters[0]
    assert "multiple_of=8, or" in str(small.compact_report)
    odd = randomize(nn.Sequential(nn.Conv2d(3, 13, 1), nn.ReLU(), nn.Conv2d(13, 4, 1)))
    zero(odd[0], 1, 2, 3)
    assert [widths(check(odd, (1, 3, 4, 4), multiple_of=n))[0] for n in (1, 4, 6, 16)] == [10, 12, 12, 13]
    with pytest.raises(ValueError, match="multiple_of must be a positive whole number, got 0"):
        compact(odd, torch.zeros(1, 3, 4, 4).double(), multiple_of=0)


def test_drop_blocks() -> None:
    model = randomize(zoo.resnet18_32(width=4, blocks=(2, 2)))
    kept = copy.deepcopy(model)
    kept.layer1[1], kept.layer2[0] = nn.Identity(), model.layer2[0].downsample
    small = compact(model, torch.randn(1, 3, 8, 8).double(), drop_blocks=("layer1.1", "layer2.0"))
    x = torch.randn(2, 3, 8, 8).double()
    torch.testing.assert_close(small(x), kept(x))
    assert isinstance(small.layer1[1], nn.Identity) and isinstance(model.layer1[1], zoo.BasicBlock)
    assert small.compact_report.dropped == ("layer1.1", "layer2.0") and "left out: layer1.1" in str(
        small.compact_report
    )
    for name, message in (("layer9", "no module"), ("", "no module"), ("fc", "has no module that does the same")):
        with pytest.raises(ValueError, match=message):
            compact(model, x, drop_blocks=name)
    unused = Function(lambda m, x: m.a(x), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="do not reach 'b'"):
        compact(unused, torch.randn(1, 3, 4, 4), drop_blocks="b")


def test_flags_and_training() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    zero(model[0], 1, 2)
    small = compact(model, torch.zeros(1, 3, 8, 8).double())
    assert [module.training for module in small] == [True, False, True, True] and small.training
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    optimizer = torch.optim.SGD([p for p in small.parameters() if p.requires_grad], 0.1)
    before = small[3].weight.clone()
    small(torch.randn(2, 3, 8, 8).double()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, small[3].weight)


def test_convert_gains_from_both() -> None:
    model = zero_random(randomize(zoo.resnet18_32(width=8, blocks=(1, 1))).float())
    sparseprune.prune(model, 0.7)
    x = torch.randn(1, 3, 16, 16)
    fit_batch_norm(model, [x])
    small = compact(model, x)
    set_num_threads(1)
    fast = sparseprune.convert(small, x, tune="fixed")
    torch.testing.assert_close(fast(x), model.eval()(x), rtol=1e-3, atol=1e-3)
    assert sparseprune.summary(small).kept < sparseprune.summary(small).total


def test_nested_inputs_and_integers() -> None:
    def forward(m: Any, inputs: Any, scale: int) -> Any:
        return m.b(F.relu(m.a(m.words(inputs["words"])) + m.c(inputs["features"]))) * scale

    model = randomize(Function(forward, words=nn.Embedding(9, 4), a=nn.Linear(4, 8), c=nn.Linear(3, 8),
                               b=nn.Linear(8, 2)))  # fmt: skip
    zero(model.a, 1, 2)
    zero(model.c, 2, 1)
    inputs = {"words": torch.arange(5), "features": torch.randn(5, 3).double()}
    small = compact(model, (inputs, 3))
    assert widths(small) == [6, 6, 2]
    torch.testing.assert_close(small(inputs, 3), model(inputs, 3))


def test_channels_last_stays() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)))
    zero(model[0], 1)
    small = compact(model.to(memory_format=torch.channels_last), torch.randn(1, 3, 8, 8).double())
    assert small[0].weight.is_contiguous(memory_format=torch.channels_last) and not small[0].weight.is_contiguous()


def test_a_wrong_result_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)))
    zero(model[0], 1, 2)
    right = shrinking.shrink

    def wrong(*args: Any) -> Any:
        small: Any = right(*args)
        small[0].bias.data += 1e-3
        return small

    monkeypatch.setattr(removal, "shrink", wrong)
    with pytest.raises(VerificationError, match="an output differs by"):
        compact(model, torch.zeros(1, 3, 8, 8).double())


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)), torch.randn(1, 3, 8, 8)
    wrong: Any = "resnet"
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got str"):
        compact(wrong, x)
    with pytest.raises(UnsupportedError, match="cannot be traced on example_inputs: RuntimeError"):
        compact(model, torch.randn(1, 4, 8, 8))
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'sparseprune\[compact\]'"):
        compact(model, x)


# ---- random networks


class Part(nn.Module):
    """A random piece that keeps the size of the image."""

    def __init__(self, inputs: int, outputs: int, pick: Callable[[int], int]) -> None:
        super().__init__()
        self.kind = pick(7)
        groups = 2 if self.kind == 4 and inputs % 2 == outputs % 2 == 0 else 1
        kernel = (1, 3)[pick(2)]
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bool(pick(2)))
        self.norm = nn.BatchNorm2d(outputs) if pick(3) else nn.Identity()
        self.act: nn.Module = (nn.ReLU(), nn.LeakyReLU(0.1), nn.PReLU(outputs), nn.Hardswish(), nn.Sigmoid())[pick(5)]
        self.other = nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs if self.kind == 1 else 1)
        self.pool: nn.Module = (nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1))[pick(2)]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.norm(self.conv(x)))
        if self.kind in (0, 5):  # residual
            return torch.relu(self.other(y) + y)
        if self.kind == 1:  # depthwise
            return F.relu6(self.other(y))
        if self.kind == 2:
            half = y.shape[1] // 2
            return torch.cat([self.other(y)[:, half:], y, x], 1)
        if self.kind == 3:
            return torch.cat([self.pool(y), self.other(y)], 1)
        if self.kind == 6:  # a gate
            return y * torch.sigmoid(self.other(y).mean((2, 3), keepdim=True))
        pooled: Tensor = self.pool(y)
        return pooled


@pytest.mark.parametrize("seed", range(12))
def test_random_networks(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    parts: list[nn.Module] = []
    width = 3
    for _ in range(3 + pick(3)):
        parts.append(Part(width, 2 * (2 + pick(4)), pick))
        width = nn.Sequential(*parts)(torch.zeros(1, 3, 6, 6)).shape[1]
    parts += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 6), nn.ReLU(), nn.Linear(6, 3)]
    model = zero_random(randomize(nn.Sequential(*parts), seed), 0.5, seed)
    if pick(2):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.zeros_(module.bias)
                module.reset_running_stats()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsepruneWarning)
        small = check(model, (2, 3, 6, 6))
    before, after = small.compact_report.parameters
    assert after < before
