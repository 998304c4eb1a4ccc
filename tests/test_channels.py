"""Removing channels that are constant or that nobody reads: the numbers stay, and channels do go."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from old_torch import fixes_another_size
from test_random_graphs import ACTS, Builder
from test_random_graphs import check as check_native
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sparseprune
from sparseprune import _native, runtime, zoo
from sparseprune.graph import passes
from sparseprune.graph.capture import capture
from sparseprune.graph.channels import remove_channels, savings
from sparseprune.graph.ir import Graph, Weight
from sparseprune.graph.reference import run_reference

IMAGE = (2, 3, 9, 8)


class Function(nn.Module):
    """A model of one function, with modules to use as keyword arguments."""

    def __init__(self, function: Any, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def width(graph: Graph, name: str) -> int:
    """Channels that a layer computes; 0 where it is gone."""
    weights = [graph.weights[node.weight] for node in graph.nodes if node.name == name and node.weight is not None]
    return weights[0].shape[0] if weights else 0


def channels(graph: Graph) -> int:
    return sum(graph.weights[node.weight].shape[0] for node in graph.nodes if node.weight is not None)


def randomize(model: nn.Module, dead: float = 0.4) -> nn.Module:
    """Numbers that matter everywhere, and a share of filters without weights."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.5, generator=generator)
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            nn.init.normal_(module.running_mean, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 2, generator=generator)
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Conv1d):
            with torch.no_grad():
                module.weight[torch.rand(len(module.weight), generator=generator) < dead] = 0
    return model.eval()


def compare(
    model: nn.Module, *shapes: tuple[int, ...], others: Any = (), least: int = 1, converted: bool = False
) -> Graph:
    """Before, after, the model, and the native program; `least` channels have to go. Returns the graph after.

    Large models are `converted`, which has its own bounds.
    """
    args = tuple(torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes)
    whole = passes.optimize(capture(model, args, optimize=False).graph)
    graph = remove_channels(whole)
    assert channels(whole) - channels(graph) >= least, (channels(whole), channels(graph))
    oracle, program = copy.deepcopy(model).eval().double(), runtime.Program(graph.to_bytes())
    fast = sparseprune.convert(model, args, tune="fixed") if converted else None
    for sizes in [shapes, *others]:
        if fixes_another_size(graph, sizes):
            continue
        args = tuple(torch.randn(size, generator=torch.Generator().manual_seed(2)) for size in sizes)
        with torch.no_grad():
            expected = tree_leaves(oracle(*(x.double() for x in args)))
        before, after = run_reference(whole, args), run_reference(graph, args)
        if fast is None:
            before, bounds = run_reference(whole, args, bounds=True)
            assert all(bool(((y - want).abs() <= e).all()) for y, want, e in zip(after, before, bounds, strict=True))
        ours = program.run([x.numpy() for x in args]) if fast is None else tree_leaves(fast(*args))
        for y, want, y64, y32 in zip(after, before, expected, ours, strict=True):
            assert y.shape == want.shape == y64.shape
            largest = float(y64.abs().max())
            torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6 * largest)
            torch.testing.assert_close(y, y64, rtol=1e-5, atol=1e-5 * largest)
            torch.testing.assert_close(torch.as_tensor(y32).double(), y64, rtol=2e-5, atol=2e-5 * largest)
    return graph


def conv(inputs: int, outputs: int, kernel: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2, **more})


def filters(layer: nn.Conv2d, biases: list[float]) -> nn.Conv2d:
    """The first ones become constants."""
    with torch.no_grad():
        layer.weight[: len(biases)] = 0
        assert layer.bias is not None
        layer.bias[: len(biases)] = torch.tensor(biases)
    return layer


# ---- constants


def test_constants_of_zero_go() -> None:
    model = randomize(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)), dead=0)
    filters(model[0], [-1.0, 0.0, -0.5])  # type: ignore[index]
    graph = compare(model, IMAGE, others=[((1, 3, 5, 12),)])
    assert width(graph, "0") == 5 and graph.weights["w1"].shape == (4, 5, 3, 3)


def test_constants_go_into_the_bias_where_nothing_is_padded() -> None:
    for bias in (True, False):
        layers = [conv(3, 8), nn.ReLU(), conv(8, 4, padding=0, stride=2, bias=bias), nn.ReLU(), conv(4, 2, 1)]
        model = randomize(nn.Sequential(*layers), dead=0)
        filters(model[0], [1.0, 0.25, 2.0])  # type: ignore[index]
        assert width(compare(model, IMAGE, least=3), "0") == 5


@pytest.mark.parametrize("padding", [(1, 1), (0, 1), "same"])
def test_constants_at_a_padded_border_become_one(padding: Any) -> None:
    model = randomize(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4, padding=padding, dilation=2)), dead=0)
    filters(model[0], [0.25, 1.0, -1.0, 2.0])  # type: ignore[index]
    assert width(compare(model, IMAGE, others=[((1, 3, 7, 6),)]), "0") == 8 - 3
    filters(model[0], [0.25])  # type: ignore[index]
    with torch.no_grad():
        model[0].bias[1:4] = -1  # type: ignore[index, union-attr]
    assert width(compare(model, IMAGE), "0") == 5


def test_one_reader_with_a_border_and_one_without() -> None:
    parts = {"first": filters(conv(3, 8), [0.5, 1.0, -1.0]), "padded": conv(8, 4), "plain": conv(8, 4, 1)}
    model = Function(lambda m, x: (lambda y: m.padded(y) + m.plain(y))(F.relu(m.first(x))), **parts)
    assert width(compare(model, IMAGE), "first") == 6


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.Sigmoid(), nn.SiLU(), nn.Hardswish(), nn.Hardsigmoid(), nn.Tanh(),
    nn.GELU(), nn.Mish(), nn.ELU(0.7), nn.SELU(), nn.Softplus(), nn.Hardtanh(0.25, 0.5), nn.PReLU(6), nn.PReLU(),
    nn.Identity(), nn.Sequential(nn.BatchNorm2d(6), nn.SiLU()),
]  # fmt: skip


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_activations(act: nn.Module) -> None:
    for padding in (0, 1):
        model = nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), copy.deepcopy(act), conv(6, 4, padding=padding), nn.ReLU(),
                              conv(4, 3, 1))  # fmt: skip
        compare(randomize(model, dead=0.6), IMAGE, least=2)


BETWEEN = [
    nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1, dilation=2), nn.MaxPool2d(3, 2, ceil_mode=True),
    nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(2, ceil_mode=True),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2, divisor_override=3), nn.AdaptiveAvgPool2d((3, 2)),
    nn.AdaptiveMaxPool2d(3), nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=1.5, mode="bilinear"),
    nn.ZeroPad2d((1, 0, 2, 1)), nn.ReflectionPad2d(2), nn.ReplicationPad2d(1), nn.CircularPad2d(1),
    nn.ConstantPad2d(1, 0.5), nn.Dropout(), nn.PixelShuffle(2), conv(8, 8, groups=8), conv(8, 16, groups=8),
    conv(8, 8, 1, groups=8), conv(8, 8, groups=8, padding=0), nn.BatchNorm2d(8),
    nn.Sequential(conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.SiLU(), conv(8, 8, groups=8)),
    Function(lambda m, x: x.sum(2, keepdim=True)), Function(lambda m, x: x.sum((0, 3), keepdim=True)),
    nn.ConvTranspose2d(8, 4, 2, 2), nn.Sequential(nn.ConvTranspose2d(8, 4, 3, 2, 1, 1), nn.ReLU(), conv(4, 4, 1)),
]  # fmt: skip


@pytest.mark.parametrize("layer", BETWEEN, ids=str)
@pytest.mark.parametrize(("act", "kernel"), [(nn.ReLU(), 3), (nn.SiLU(), 1)], ids=str)
def test_layers_between(layer: nn.Module, act: nn.Module, kernel: int) -> None:
    body = nn.Sequential(conv(3, 8), act, copy.deepcopy(layer))
    last = [conv(body(torch.zeros(IMAGE)).shape[1], 6, kernel), nn.ReLU(), conv(6, 2, 1)]
    compare(randomize(nn.Sequential(*body, *last), dead=0.5), IMAGE, others=[((1, 3, 13, 10),)])


def test_constants_keep_their_border_through_pooling() -> None:
    """An average over padding is smaller at the border; over -inf a maximum is not."""
    for pool, left in ((nn.AvgPool2d(3, 1, 1), 8), (nn.AvgPool2d(3, 1, 1, count_include_pad=False), 5),
                       (nn.MaxPool2d(3, 1, 1), 5), (nn.AvgPool2d(3, 1), 5), (nn.ZeroPad2d(1), 6)):  # fmt: skip
        model = randomize(nn.Sequential(conv(3, 8), pool, conv(8, 4, 1)), dead=0)
        filters(model[0], [0.5, 1.0, 2.0])  # type: ignore[index]
        assert width(compare(model, IMAGE, least=0), "0") == left


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.last(F.relu(m.a(x)) + m.b(x)),
        lambda m, x: m.last(F.silu(m.a(x)) - F.silu(m.b(x))),
        lambda m, x: m.last(F.relu(m.a(x)) * torch.sigmoid(m.b(x))),
        lambda m, x: m.last(F.relu(m.a(x)) * F.hardsigmoid(m.b(x).mean((2, 3), keepdim=True))),
        lambda m, x: m.last(torch.maximum(m.a(x), m.b(x))),
        lambda m, x: m.last(m.a(x).exp() / m.b(x).exp()),
        lambda m, x: m.last(F.relu(m.a(x)) * 2.5 + 1),
        lambda m, x: m.last((F.relu(m.a(x)) - m.row) / m.row.exp()),
        lambda m, x: m.last(F.relu(m.a(x)) * m.plane + m.b(x)),
        lambda m, x: m.last(F.relu(m.a(x)) * m.b(x)[:, :1]),
        lambda m, x: m.last(F.silu(m.a(x)).flip(3) + m.b(x).roll(2, 2)),
        lambda m, x: m.last(F.relu(m.a(x))[:, :, 1:-1] - F.relu(m.a(x))[:, :, 2:]),
        lambda m, x: m.last(F.relu(m.a(x)).mean(3, keepdim=True).expand(-1, -1, -1, x.shape[3]) * m.a(x)),
        lambda m, x: m.last(F.interpolate(F.max_pool2d(m.a(x), 2), size=x.shape[2:]) + m.b(x)),
        lambda m, x: m.last((m.a(x) * m.b(x).amax((2, 3), keepdim=True)).transpose(2, 3)),
        lambda m, x: m.last(F.silu(m.a(x)).sum(2, keepdim=True) + F.relu(m.b(x)).sum(2, keepdim=True)),
        lambda m, x: m.last(torch.cat([m.a(x), F.relu(m.b(x))], 2)),
        lambda m, x: m.last(m.a(x).reshape(x.shape[0], 6, -1, 2).relu()),
    ],
)
def test_two_operands(function: Any) -> None:
    parts: dict[str, Any] = {"a": conv(3, 6), "b": conv(3, 6), "last": nn.Sequential(conv(6, 3), nn.ReLU(), conv(3, 2))}
    for seed in range(2):
        model = randomize(Function(function, **parts), dead=0.5)
        torch.manual_seed(seed)
        model.register_buffer("row", torch.randn(6, 1, 1))
        model.register_buffer("plane", torch.randn(1, 6, 9, 8))
        for name in ("a", "b"):  # other ones die
            order = torch.randperm(6)
            with torch.no_grad():
                layer: Any = model.get_submodule(name)
                layer.weight.copy_(layer.weight[order])
                layer.bias.copy_(layer.bias[order])
        compare(model, (2, 3, 10, 8) if "roll" in str(function) else IMAGE, least=0)


def test_a_gate_of_zero_closes() -> None:
    parts = {"a": conv(3, 6), "gate": filters(conv(3, 6, 1), [-4.0] * 4), "last": conv(6, 3)}
    model = Function(lambda m, x: m.last(F.relu(m.a(x)) * F.hardsigmoid(m.gate(x.mean((2, 3), keepdim=True)))), **parts)
    graph = compare(model, IMAGE, least=8)
    assert width(graph, "a") == width(graph, "gate") == 2


# ---- what nobody reads


def unread(layer: nn.Conv2d | nn.Linear, count: int) -> Any:
    with torch.no_grad():
        layer.weight[:, :count] = 0
    return layer


def test_channels_that_nobody_reads_go_all_the_way() -> None:
    last = unread(conv(8, 4), 6)
    model = nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.SiLU(), conv(8, 8, groups=8), nn.GELU(),
                          nn.MaxPool2d(2), nn.PReLU(8), last)  # fmt: skip
    graph = compare(model.eval(), IMAGE)
    assert width(graph, "0") == width(graph, "3") == 2
    assert [node.attrs["groups"] for node in graph.nodes if node.op == "conv"] == [1, 2, 1]


def test_a_chain_of_what_nobody_reads() -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), unread(conv(8, 4), 7))
    with torch.no_grad():
        model[2].weight[7, :5] = 0  # type: ignore[index, operator]
    graph = compare(model, IMAGE)
    assert (width(graph, "0"), width(graph, "2")) == (3, 1)


def test_features_after_flatten() -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), nn.Flatten(), unread(nn.Linear(8 * 72, 16), 5 * 72 - 1), nn.ReLU(),
                          unread(nn.Linear(16, 4), 11))  # fmt: skip
    graph = compare(model, IMAGE, others=[((5, 3, 9, 8),)])
    assert (width(graph, "0"), width(graph, "3")) == (4, 5)  # one feature of the fifth channel is read
    filters(model[0], [0.0, 0.0, 0.0, 0.0, -1.0, 1.5])  # type: ignore[arg-type]
    assert width(compare(model, IMAGE), "0") == 2


def test_a_sum_keeps_what_one_of_its_readers_needs() -> None:
    parts = {"a": conv(3, 8), "b": conv(3, 8), "last": unread(conv(8, 4), 5), "other": unread(conv(8, 2), 3)}
    model = Function(lambda m, x: (lambda a: m.last(a + m.b(x)) + m.other(F.relu(a)).sum(1, True))(m.a(x)), **parts)
    graph = compare(model, IMAGE)
    assert (width(graph, "a"), width(graph, "b")) == (5, 5)
    b = next(graph.weights[node.weight].dense for node in graph.nodes if node.name == "b" and node.weight)
    assert np.count_nonzero(b.reshape(5, -1).any(1)) == 3  # the sum has five, of which `other` reads two from `a`


def test_outputs_keep_their_channels() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = F.relu(m.first(x))
        z = m.second(y)
        return {"all": y, "last": m.last(z), "again": y + 1, "x": x}

    parts = {"first": filters(conv(3, 8), [0.5, -1.0]), "second": filters(conv(8, 8), [0.5, -1.0]),
             "last": unread(conv(8, 2), 5)}  # fmt: skip
    graph = compare(Function(forward, **parts), IMAGE)
    assert (width(graph, "first"), width(graph, "second")) == (8, 3)


def test_concatenations_and_slices() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        a, b = F.silu(m.a(x)), F.relu(m.b(x))
        y = torch.cat([a, m.pool(b), a[:, 2:5]], 1)
        first, second = y.chunk(2, 1)
        return m.last(torch.cat([second, first.sigmoid() * 2, b], 1))

    parts: dict[str, nn.Module] = {"a": filters(conv(3, 7), [0.5, 0.75, -1.0, 2.0]), "pool": nn.MaxPool2d(3, 1, 1),
                                   "b": filters(conv(3, 6), [-1.0, -0.5, -2.0]), "last": conv(22, 4)}  # fmt: skip
    compare(Function(forward, **parts), IMAGE, others=[((1, 3, 4, 7),)], least=3)
    unread(parts["last"], 15)  # type: ignore[arg-type]
    compare(Function(forward, **parts), IMAGE, least=5)
    parts["last"] = unread(conv(22, 4), 16)  # only `b` is read directly
    graph = compare(Function(forward, **parts), IMAGE, least=10)
    assert [node.op for node in graph.nodes] == ["conv", "conv"]


def test_a_residual_branch_without_weights_is_no_layer() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = F.relu(m.stem(x))
        y = F.relu(y + m.bn(m.b(F.relu(m.a(y)))))
        return m.last(y + m.d(F.silu(m.c(y))))

    parts = {"stem": conv(3, 6), "a": conv(6, 8), "b": conv(8, 6), "bn": nn.BatchNorm2d(6), "c": conv(6, 8),
             "d": conv(8, 6), "last": conv(6, 2)}  # fmt: skip
    model = randomize(Function(forward, **parts), dead=0)
    for name in "bd":
        filters(model.get_submodule(name), [0.0] * 6)  # type: ignore[arg-type]
    graph = compare(model, IMAGE, others=[((1, 3, 5, 5),)], least=8 + 6 + 8 + 6)
    assert [node.name for node in graph.nodes if node.op == "conv"] == ["stem", "last"]


@pytest.mark.parametrize("partial", [lambda y, u: y.reciprocal(), lambda y, u: u / y])
def test_what_stays_unread_is_finite(partial: Any) -> None:
    """0 times Inf would be NaN in a dense kernel."""

    def forward(m: Any, x: Tensor) -> Any:
        y, u = m.a(x * x + 1), m.b(x)
        return m.c(y + u) + m.d(u) + m.e(partial(y, u))

    parts = {"a": conv(3, 6, bias=False), "b": conv(3, 6), "c": unread(conv(6, 4), 3), "d": conv(6, 4),
             "e": unread(conv(6, 4), 3)}  # fmt: skip
    with torch.no_grad():
        parts["a"].weight.abs_()
    compare(Function(forward, **parts), IMAGE, least=0)


def test_a_model_that_does_nothing() -> None:
    model: Any = Function(lambda m, x: (x + m.conv(x), x + m.conv(x + 1)), conv=conv(3, 3, bias=False))
    with torch.no_grad():
        model.conv.weight.zero_()
    assert compare(model, IMAGE, least=6, converted=True).nodes == ()


# ---- what is not understood stays


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.Softmax(1), nn.Softmax(3), nn.ChannelShuffle(2),
        nn.PixelUnshuffle(2), conv(8, 8, groups=4), nn.LayerNorm(10), nn.Flatten(2), nn.Unflatten(1, (2, 4)),
        Function(lambda m, x: x.permute(0, 2, 3, 1)), Function(lambda m, x: x.mean(1)),
        Function(lambda m, x: x.amax((1, 2))), Function(lambda m, x: x[:, [3, 1, 2, 0, 0]]),
        Function(lambda m, x: x[:, ::2]), Function(lambda m, x: x.roll(3, 1)), Function(lambda m, x: x @ x.mT),
        Function(lambda m, x: x.reshape(x.shape[0], 4, 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2)),
        Function(lambda m, x: x.view(x.shape[0], 16, -1)), Function(lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 2))),
        Function(lambda m, x: x / (x.abs() + 1)), Function(lambda m, x: (x.abs() + 0.1).rsqrt()),
        Function(lambda m, x: F.scaled_dot_product_attention(x / 8, x / 8, x)), Function(lambda m, x: x.var(1)),
        Function(lambda m, x: torch.cat([x, x.flip(1)], 0)), Function(lambda m, x: x[:, 1:2] * x),
        Function(lambda m, x: x.norm(dim=1, keepdim=True) * x),
        Function(lambda m, x: x.unsqueeze(1).expand(-1, 2, -1, -1, -1)),
    ],
    ids=lambda layer: str(layer).replace("\n", ""),
)  # fmt: skip
def test_everything_else(layer: nn.Module) -> None:
    body = nn.Sequential(conv(3, 8), nn.SiLU(), conv(8, 8), nn.ReLU(), copy.deepcopy(layer))
    model = randomize(body, dead=0.5)
    compare(model, (2, 3, 8, 10), others=[((1, 3, 8, 10),)], least=1)
    shape = model(torch.zeros(2, 3, 8, 10)).shape
    if len(shape) == 4:
        compare(randomize(nn.Sequential(*body, conv(shape[1], 4), nn.ReLU(), conv(4, 2))), (2, 3, 8, 10))


def test_a_dimension_that_is_not_the_channels() -> None:
    functions = (lambda m, x: m.last(m.first(x).mean(0)), lambda m, x: m.last(m.first(x).permute(0, 2, 1, 3)[0]),
                 lambda m, x: m.last(m.first(x).reshape(-1, 8, 10)))  # fmt: skip
    for function in functions:
        parts: dict[str, Any] = {"first": conv(3, 8), "last": unread(nn.Conv1d(8, 4, 1), 5)}  # type: ignore[arg-type]
        assert width(compare(Function(function, **parts), (2, 3, 8, 10), least=0), "first") == 8


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True, activation="gelu")
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layer(self.patch(x).flatten(2).transpose(1, 2)).mean(1))
        return y


def test_hidden_units_of_a_transformer() -> None:
    model = randomize(Transformer(), dead=0.3)
    torch.manual_seed(0)
    graph = compare(model, (2, 3, 8, 8), others=[((1, 3, 8, 8),)], least=10)
    assert width(graph, "layer.linear1") < 60 and width(graph, "patch") == 32


# ---- weights, values and sizes that are shared


def test_layers_that_share_a_weight() -> None:
    shared = unread(filters(conv(6, 6), [0.5, -1.0]), 3)  # type: ignore[arg-type]
    model = Function(lambda m, x: m.last(F.relu(m.c(F.relu(m.c(F.relu(m.first(x))))))), first=conv(3, 6), c=shared,
                     last=conv(6, 2))  # fmt: skip
    graph = compare(model, IMAGE)
    assert width(graph, "c") <= 3
    heads = Function(lambda m, x: (m.c(F.relu(m.a(x))), m.c(F.relu(m.b(x)))), a=filters(conv(3, 6), [-1.0]),
                     b=filters(conv(3, 6), [-1.0]), c=conv(6, 6))  # fmt: skip
    graph = compare(heads, IMAGE, least=2)
    assert len(graph.weights) == 3  # what is left of a shared weight is the same, and stored once
    unchanged = Function(lambda m, x: m.c(m.c(x)), c=conv(3, 3))
    assert len(compare(unchanged, IMAGE, least=0).weights) == 1


def test_nothing_to_remove_changes_nothing() -> None:
    model = randomize(zoo.resnet18_32(width=4), dead=0)
    whole = passes.optimize(capture(model, (torch.zeros(1, 3, 32, 32),), optimize=False).graph)
    graph = remove_channels(whole)
    assert graph.to_json() == whole.to_json() and savings([(whole, graph)]) == ()
    assert all(graph.weights[name] is whole.weights[name] for name in whole.weights)
    assert sparseprune.convert(model, torch.zeros(1, 3, 32, 32), tune="fixed").report.notes == ()


def test_twice_is_once() -> None:
    model = randomize(zoo.UNet(width=8, depth=2), dead=0.4)
    once = capture(model, (torch.zeros(1, 3, 16, 16),)).graph
    assert remove_channels(once).to_bytes() == once.to_bytes()


# ---- networks


def uneven(model: nn.Module) -> nn.Module:
    """Filters of different sizes, as training makes them."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.3, generator=generator)
            nn.init.normal_(module.running_mean, std=0.1, generator=generator)  # type: ignore[arg-type]
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            with torch.no_grad():
                module.weight.mul_(torch.rand(len(module.weight), 1, 1, 1, generator=generator) ** 2 + 0.02)
    return model.eval()


def test_networks_with_a_global_mask() -> None:
    cases = [
        (zoo.resnet18_32(width=8), 0.98, (2, 3, 32, 32), [], ("fc",), 200),
        (zoo.ResNet(zoo.Bottleneck, (1, 1, 1, 1), width=8), 0.95, (1, 3, 64, 64), [], ("fc",), 200),
        (zoo.UNet(width=8, depth=3), 0.95, (1, 3, 24, 32), [((2, 3, 16, 40),)], ("head",), 150),
        (zoo.YOLOv4Tiny(3, width=8), 0.95, (1, 3, 64, 64), [], ("coarse.1", "fine.1"), 300),
        (zoo.MobileNetV2(10, width=0.35), 0.8, (1, 3, 64, 64), [], ("features.0.0", "classifier.1"), 1000),
        (zoo.VGG((8, 0, 16, 16, 0), hidden=32, num_classes=5), 0.9, (1, 3, 32, 32), [], (), 12),
        (zoo.tutorial_cnn(), 0.97, (1, 3, 32, 32), [], ("fc3",), 40),
        (zoo.lenet_300_100(), 0.99, (3, 1, 28, 28), [], (), 40),
    ]
    for model, amount, shape, others, exclude, least in cases:
        sparseprune.prune(uneven(model), amount, exclude=exclude)
        compare(model, shape, others=others, least=least, converted=True)


def test_everything_zero() -> None:
    cases = ((zoo.resnet18_32(width=4), (2, 3, 32, 32)), (zoo.UNet(width=4, depth=2), (1, 3, 16, 16)),
             (zoo.YOLOv4Tiny(1, width=2), (1, 3, 64, 64)))  # fmt: skip
    for model, shape in cases:
        uneven(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.zero_()
        graph = compare(model, shape, converted=True)
        outputs = sum(y.shape[1] for y in tree_leaves(model(torch.zeros(shape))))
        assert channels(graph) <= outputs + len(graph.nodes)


def test_the_report_says_so() -> None:
    model = nn.Sequential(filters(conv(3, 8), [-1.0, -1.0]), nn.ReLU(), conv(8, 4, bias=False))
    report = sparseprune.convert(model, torch.randn(IMAGE), tune="fixed").report
    weights = f"{2 * 9 * 4} of {6 * 27 + 8 * 9 * 4} weights"
    note = f"removed 2 of 12 channels and {weights}: they are constant, or nobody reads them"
    assert report.notes == (note,) and f"note: {note}" in str(report)
    assert [layer.shape for layer in report.layers] == [(6, 3, 3, 3), (4, 6, 3, 3)]


def test_segments_too() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(filters(conv(3, 8), [-1.0, -1.0]), nn.ReLU(), conv(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.body(x)[:, :3].sort(3)[0])  # type: ignore[no-any-return]

    model, x = Sorted().eval(), torch.randn(IMAGE)
    with pytest.warns(sparseprune.SparsepruneWarning):
        fast = sparseprune.convert(model, x, tune="fixed")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert any(re.match("removed 5 of 24 channels", note) for note in fast.report.notes)


# ---- random graphs


class Pruned(Builder):
    """Layers with dead filters and columns, and operators that channels go through."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.shapes[0] = (
            self.rng.choice([1, 2]),
            self.rng.randint(1, 4),
            self.rng.randint(4, 8),
            self.rng.randint(4, 9),
        )

    def kinds(self) -> list[Any]:
        through = [self.op_conv, self.op_linear, self.op_depthwise, self.op_pool, self.op_padded_pool, self.op_binary,
                   self.op_act, self.op_prelu, self.op_slice, self.op_concat, self.op_pad, self.op_resize,
                   self.op_pixel_shuffle, self.op_global_pool, self.op_spatial, self.op_gate]  # fmt: skip
        return [*self.rng.sample(super().kinds(), 4), *through, *10 * [self.op_plain]]

    def pick(self, *ranks: int) -> int:
        fitting = [i for i, shape in enumerate(self.shapes) if not ranks or len(shape) in ranks]
        return fitting[-1] if self.rng.random() < 0.8 else self.rng.choice(fitting)

    def grow(self, steps: int) -> Graph:
        graph = super().grow(steps)
        first = len(self.shapes)
        for last in (self.op_plain, self.op_act, self.rng.choice([self.op_plain, self.op_linear])):
            last()
        outputs = [len(self.shapes) - 1]  # few, so that there is something that nobody reads
        if self.rng.random() < 0.3:
            outputs.append(self.rng.randrange(first))
        tree = {"kind": "list", "items": [{"kind": "tensor"}] * len(outputs)}
        weights = {name: Weight(self.pruned(weight.dense)) for name, weight in self.weights.items()}
        biases = {name: self.shifted(bias) for name, bias in self.biases.items()}
        return passes.drop_dead(
            replace(graph, nodes=tuple(self.nodes), outputs=tuple(outputs), tree=tree, weights=weights, biases=biases)
        )

    def pruned(self, weight: Any) -> Any:
        weight = weight.copy()
        weight[self.numbers.random(len(weight)) < self.rng.choice([0, 0.3, 0.6, 0.9])] = 0
        weight[:, self.numbers.random(weight.shape[1]) < self.rng.choice([0, 0.3, 0.6])] = 0
        return weight

    def shifted(self, bias: Any) -> Any:
        """With numbers that are the same, and 0."""
        bias = bias.copy()
        bias[self.numbers.random(len(bias)) < 0.2] = 0
        bias[self.numbers.random(len(bias)) < 0.2] = 0.5
        return bias

    def op_plain(self) -> None:
        x = self.pick(4)
        n, c, h, w = self.shapes[x]
        same = [i for i, shape in enumerate(self.shapes) if len(shape) == 4 and (shape[0], *shape[2:]) == (n, h, w)]
        residual = [self.rng.choice(same)] if self.rng.random() < 0.4 else []
        out = self.shapes[residual[0]][1] if residual else self.rng.randint(3, 12)
        kernel = self.rng.choice([1, 3])
        name = f"w{len(self.weights)}"
        self.weights[name] = Weight(self.array(out, c, kernel, kernel) / np.float32(np.sqrt(c * kernel)))
        attrs = {"dims": 2, "stride": [1, 1], "padding": [kernel // 2] * 4, "dilation": [1, 1], "groups": 1}
        self.add(
            "conv", [x, *residual], (n, out, h, w), attrs | self.rng.choice(ACTS), weight=name, bias=self.store(out)
        )

    def op_depthwise(self) -> None:
        x = self.pick(4)
        n, c, h, w = self.shapes[x]
        out, padding = c * self.rng.choice([1, 1, 2]), self.rng.choice([0, 1])
        if h + 2 * padding < 3 or w + 2 * padding < 3:
            return
        name = f"w{len(self.weights)}"
        self.weights[name] = Weight(self.array(out, 1, 3, 3))
        attrs = {"dims": 2, "stride": [1, 1], "padding": [padding] * 4, "dilation": [1, 1], "groups": c}
        shape = (n, out, h - 2 + 2 * padding, w - 2 + 2 * padding)
        residual = [x] if shape == self.shapes[x] and self.rng.random() < 0.5 else []
        acts: list[dict[str, Any]] = [{}, {"act": "relu"}, {"act": "silu"}]
        self.add("conv", [x, *residual], shape, attrs | self.rng.choice(acts), weight=name, bias=self.store(out))

    def op_padded_pool(self) -> None:
        x = self.pick(4)
        n, c, h, w = self.shapes[x]
        attrs: dict[str, Any] = {"dims": 2, "kernel": [3, 3], "stride": [1, 1], "padding": [1] * 4, "ceil_mode": False}
        if self.rng.random() < 0.5:
            self.add("max_pool", [x], (n, c, h, w), attrs | {"dilation": [1, 1]})
        else:
            more = {"count_include_pad": self.rng.random() < 0.5, "divisor": self.rng.choice([0, 0, 5])}
            self.add("avg_pool", [x], (n, c, h, w), attrs | more)

    def op_spatial(self) -> None:
        """Reorderings that leave channels where they are."""
        x = self.pick(4)
        n, c, h, w = self.shapes[x]
        kind = self.rng.randrange(4)
        if kind == 0:
            self.add("permute", [x], (n, c, w, h), {"axes": [0, 1, 3, 2]})
        elif kind == 1:
            self.add("reshape", [x], (n, c, h * w, 1), {"shape": [-2, self.rng.choice([c, -3]), -1, 1]})
        elif kind == 2:
            self.add(
                "reduce",
                [x],
                (n, c, w),
                {"kind": self.rng.choice(["mean", "sum", "max"]), "axes": [2], "keepdim": False},
            )
        else:
            self.add("flatten", [x], (n, c * h * w), {})

    def op_gate(self) -> None:
        x = self.pick(4)
        pooled = self.add("adaptive_avg_pool", [x], (*self.shapes[x][:2], 1, 1), {"dims": 2, "output_size": [1, 1]})
        self.add("mul", self.rng.sample([x, pooled], 2), self.shapes[x], {})


def test_random_graphs() -> None:
    gone, all_channels, changed = 0, 0, 0
    for seed in range(300):
        builder = Pruned(seed)
        whole = builder.grow(builder.rng.randint(4, 24))
        graph = remove_channels(whole)
        x = builder.array(*builder.shapes[0])
        before, bounds = run_reference(whole, [x], bounds=True)
        for y, want, bound in zip(run_reference(graph, [x]), before, bounds, strict=True):
            off = (y - want).abs()
            assert y.shape == want.shape and torch.all(off <= bound + 1e-30), f"seed {seed}: {float(off.max())}"
            assert torch.all(off <= 1e-5 * (1 + want.abs().max())), f"seed {seed}: {float(off.max())}"
        gone, all_channels = gone + channels(whole) - channels(graph), all_channels + channels(whole)
        changed += channels(whole) > channels(graph)
        if seed % 5 == 0:
            check_native(graph, _native.supported_isas()[-1], seed)
    assert gone > 0.2 * all_channels and changed > 200, (gone, all_channels, changed)
