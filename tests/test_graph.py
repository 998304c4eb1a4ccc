"""Capture, lowering, passes and the reference: graphs of small models, against the models in float64."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.utils._pytree import tree_leaves

from sparseprune.errors import UnsupportedError
from sparseprune.graph.capture import Captured, capture
from sparseprune.graph.ir import Graph, Input, Node, Weight, pack_csr
from sparseprune.graph.reference import EPS, run_reference
from sparseprune.runtime import Program

l1_unstructured: Any = prune.l1_unstructured
random_unstructured: Any = prune.random_unstructured


def tensors(item: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(item) if isinstance(leaf, Tensor)]


def wide(item: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) else x, item)


def agree(captured: Captured, oracle: nn.Module, args: tuple[Any, ...]) -> None:
    """The reference of the (folded, rounded) graph is within its own bound of `oracle` in float64."""
    with torch.no_grad():
        expected = tensors(oracle(*wide(args)))
    got, bounds = run_reference(captured.graph, tensors(args), bounds=True)
    assert len(got) == len(expected)
    for y, want, bound in zip(got, expected, bounds, strict=True):
        assert y.shape == want.shape
        assert torch.all((y - want).abs() <= bound)
        assert torch.all(bound <= 0.1 * (1 + want.abs().max()))  # a bound that says something


def check(model: nn.Module, *args: Any, other: tuple[Any, ...] = ()) -> Graph:
    """Captures with `args`, compares on `args` and on arguments of `other` sizes."""
    oracle = copy.deepcopy(model).eval().double()
    captured = capture(model, args)
    agree(captured, oracle, args)
    if other:
        agree(captured, oracle, other)
    captured.graph.to_bytes()
    return captured.graph


def ops(graph: Graph) -> dict[str, int]:
    return dict(Counter(node.op for node in graph.nodes))


class Function(nn.Module):
    """A model of one function, with modules to call as keyword arguments."""

    def __init__(self, function: Any, **modules: Any) -> None:
        super().__init__()
        for name, module in modules.items():
            if isinstance(module, Tensor) and not isinstance(module, nn.Parameter):
                self.register_buffer(name, module)
            else:
                setattr(self, name, module)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def randomized(model: nn.Module) -> nn.Module:
    """Batch norms with statistics that matter."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            for tensor in (module.running_mean, module.weight, module.bias):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(y)
        return result


def small_resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(12, 5)]
    return randomized(nn.Sequential(*stem, Block(8, 8, 1), Block(8, 12, 2), *head))


X = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1))


# ---- whole networks and sizes


def test_residual_network_fuses_to_convs_and_keeps_sizes_open() -> None:
    graph = check(small_resnet(), torch.randn(1, 3, 32, 32), other=(torch.randn(3, 3, 41, 32),))
    assert ops(graph) == {"conv": 6, "max_pool": 1, "adaptive_avg_pool": 1, "flatten": 1, "linear": 1}
    assert graph.inputs[0].shape == ("s0", 3, "s1", "s2")
    convs = {node.name: node for node in graph.nodes if node.op == "conv"}
    assert sorted(convs) == ["0", "4.conv1", "4.conv2", "5.conv1", "5.conv2", "5.downsample.0"]
    assert {name for name, node in convs.items() if len(node.inputs) == 2} == {"4.conv2", "5.downsample.0"}
    assert [node.act for node in convs.values()] == ["relu", "relu", "relu", "relu", "none", "relu"]
    assert all(node.inputs[i] < len(graph.inputs) + n for n, node in enumerate(graph.nodes) for i in (0, -1))


def test_one_dimensional_network() -> None:
    layers = [nn.Conv1d(2, 4, 4, padding="same"), nn.BatchNorm1d(4), nn.ReLU6(),
              nn.Conv1d(4, 4, 3, dilation=2, groups=2), nn.AvgPool1d(2, ceil_mode=True),
              nn.AdaptiveMaxPool1d(3), nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3)]  # fmt: skip
    graph = check(randomized(nn.Sequential(*layers)), torch.randn(1, 2, 30), other=(torch.randn(2, 2, 25),))
    assert graph.inputs[0].shape == ("s0", 2, "s1")
    assert ops(graph) == {"conv": 2, "avg_pool": 1, "adaptive_max_pool": 1, "flatten": 1, "linear": 1}
    conv = graph.nodes[0]
    assert conv.attrs == {"dims": 1, "stride": [1, 1], "padding": [0, 0, 1, 2], "dilation": [1, 1], "groups": 1,
                          "act": "relu6"}  # fmt: skip


def test_a_flatten_to_a_written_number_leaves_the_batch_open() -> None:
    model = Function(lambda m, x: m.fc(m.conv(x).view(-1, 4 * 10 * 8)), conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(320, 2))
    graph = check(model, X[:1], other=(X,))
    assert graph.inputs[0].shape[:2] == ("s0", 3)


def test_a_size_that_the_code_asks_about_is_fixed() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return m.conv(x) if x.shape[2] > 11 else m.conv(x).relu()

    captured = capture(Function(forward, conv=nn.Conv2d(3, 2, 1)), (X,))
    assert captured.graph.inputs[0].shape == ("s0", 3, 12, "s1")
    assert "dimension 2" in captured.notes[0] and "test_graph.py" in captured.notes[0]


def test_padding_by_a_formula_of_the_sizes_fixes_them_at_once() -> None:
    padded: list[Any] = []

    def forward(m: Any, x: Tensor) -> Any:
        y = F.pad(x, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8))
        padded.append(y.shape[3])
        return m.conv(y)

    graph = check(Function(forward, conv=nn.Conv2d(3, 2, 1)), X, other=(X[:1],))
    assert graph.inputs[0].shape == ("s0", 3, 12, 10)
    assert set(padded) == {16}  # nothing was traced beyond the padding while that was a formula


def test_sizes_are_fixed_where_export_takes_too_long_with_open_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseprune.graph.capture._OPEN_SECONDS", 0.0)
    assert check(nn.Conv2d(3, 2, 1), X).inputs[0].shape == (2, 3, 12, 10)


def test_a_model_of_one_sample_is_captured_as_such() -> None:
    model = Function(lambda m, x: m.fc(m.conv(x).reshape(1, -1)), conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(320, 2))
    assert check(model, X[:1]).inputs[0].shape == (1, 3, 12, 10)


def test_a_size_that_export_fixes_is_noted() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.MaxPool1d(2, padding=1))
    captured = capture(model, (torch.ones(2, 2, 9),))
    agree(captured, model.double(), (torch.randn(3, 2, 9),))
    if captured.graph.inputs[0].shape != ("s0", 2, "s1"):
        assert captured.notes == ("inputs[0], dimension 2: torch.export fixes it",)


def test_equal_sizes_have_equal_names() -> None:
    graph = check(Function(lambda m, x, y: m.conv(x) + y, conv=nn.Conv2d(3, 3, 1)), X, X + 1)
    assert graph.inputs[0].shape == ("s0", 3, "s1", "s2") == graph.inputs[1].shape


# ---- operators


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, (2, 4), padding="same", dilation=(1, 2)),
        nn.Conv2d(3, 4, 3, stride=2, padding="valid"),
        nn.Conv2d(3, 6, 3, padding=(2, 1), dilation=2, groups=3, bias=False),
        nn.MaxPool2d(3, 2, 1, dilation=2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d((2, 3), divisor_override=5),
        nn.AdaptiveAvgPool2d((3, None)),
        nn.AdaptiveMaxPool2d(2),
        nn.Hardtanh(0, 6),
        nn.BatchNorm2d(3),
        nn.Sequential(nn.ReLU6(), nn.ReLU()),
        nn.Sequential(nn.Identity(), nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.ReLU()),
    ],
    ids=str,
)
def test_layers(layer: nn.Module) -> None:
    assert len(check(randomized(nn.Sequential(layer)), X).nodes) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.hardtanh_(F.conv2d(x, m.weight), 0, 6),
        lambda m, x: torch.clamp(m.conv(x), min=0),
        lambda m, x: m.conv(x).clamp_(0, 6).contiguous().clone().detach().to(torch.float32),
        lambda m, x: m.conv(x).mean((2, 3)),
        lambda m, x: m.conv(x).mean([-1, -2], keepdim=True),
        lambda m, x: m.conv(x).flatten(2).mean(2),
        lambda m, x: m.conv(x).amax((2, 3)),
        lambda m, x: F.avg_pool2d(m.conv(x), x.shape[2:]).squeeze(-1).squeeze(-1),
        lambda m, x: F.conv2d(x, m.weight * m.mask, m.conv.bias * 2),
        lambda m, x: m.conv((x - m.mean) / m.std),
        lambda m, x: m.conv(x) * 2.5 + 1 - 0.5,
        lambda m, x: F.relu(m.conv(x).flatten(1) @ m.matrix + m.row),
        lambda m, x: m.conv(x).add(m.conv(x)),
        lambda m, x: (lambda y: y + y)(m.conv(x)),
        lambda m, x: F.dropout(m.conv(x), training=m.training).reshape(x.shape[0], -1),
        lambda m, x: torch.nn.functional.adaptive_avg_pool2d(x, 1).view(x.size(0), x.size(1)),
    ],
)
def test_functions(function: Any) -> None:
    torch.manual_seed(0)
    parts = {"conv": nn.Conv2d(3, 4, 1), "weight": nn.Parameter(torch.randn(4, 3, 1, 1)),
             "mask": (torch.rand(4, 3, 1, 1) > 0.5).float(), "mean": torch.rand(1, 3, 1, 1), "std": torch.rand(3, 1, 1),
             "matrix": torch.randn(480, 3), "row": torch.randn(3)}  # fmt: skip
    check(Function(function, **parts), X, other=(X[:1],))


def test_unknown_operators_are_decomposed() -> None:
    model = Function(lambda m, x: torch.multiply(m.net(x), 2), net=small_resnet())
    graph = check(model, torch.randn(2, 3, 32, 32), other=(torch.randn(1, 3, 39, 39),))
    assert ops(graph) == {"conv": 6, "max_pool": 1, "adaptive_avg_pool": 1, "flatten": 1, "linear": 1}


def test_a_weight_computed_in_forward_keeps_its_zeros() -> None:
    mask = (torch.rand(4, 3, 1, 1) > 0.5).float()
    parts = {"weight": nn.Parameter(torch.randn(4, 3, 1, 1)), "mask": mask}
    graph = check(Function(lambda m, x: F.conv2d(x, m.weight.clone().mul_(m.mask)), **parts), X)
    np.testing.assert_array_equal(graph.weights["w0"].dense != 0, mask.numpy() != 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (lambda y: F.relu_(y) + y)(m.conv(x)),  # y, read later, is the rectified one
        lambda m, x: (lambda y: (F.relu(y), y))(m.conv(x)),
        lambda m, x: (lambda y: (y.view(y.shape[0], -1), F.relu_(y)))(m.conv(x)),  # a view is written through
        lambda m, x: (lambda y: (y.clone(), F.relu_(y)))(m.conv(x)),
        lambda m, x: (lambda y: (F.dropout(y, training=False), F.relu_(y)))(m.conv(x)),  # dropout gives y itself
        lambda m, x: (lambda y: (y.add_(1), y.mul_(2), y + x))(m.conv(x)),
        lambda m, x: (lambda y: F.relu_(y.flatten(1)))(m.conv(x)),
    ],
)
def test_in_place(function: Any) -> None:
    check(Function(function, conv=nn.Conv2d(3, 3, 1)), X)


def test_writing_what_may_be_a_copy_is_refused() -> None:
    model = Function(lambda m, x: (lambda y: (y.flatten(1), F.relu_(y)))(m.conv(x)), conv=nn.Conv2d(3, 3, 1))
    with pytest.raises(UnsupportedError, match="may share or may have copied"):
        capture(model, (X,))


def test_unfoldable_batch_norm_becomes_a_depthwise_conv() -> None:
    model = Function(lambda m, x: (lambda y: (y, F.relu(m.bn(y))))(m.conv(x)), conv=nn.Conv2d(3, 4, 1),
                     bn=nn.BatchNorm2d(4))  # fmt: skip
    graph = check(randomized(model), X)
    assert [(node.name, node.attrs["groups"], node.act) for node in graph.nodes] == [
        ("conv", 1, "none"),
        ("bn", 4, "relu"),
    ]


def test_batch_norm_is_rounded_once() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    conv, bn = model[0], model[1]  # type: ignore[index]
    scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
    exact = (conv.weight.double() * scale.reshape(-1, 1, 1, 1)).float()
    weight = capture(model, (X,)).graph.weights["w0"].dense
    assert np.abs(weight - exact.detach().numpy()).max() <= 2.0**-24 * np.abs(weight).max() * 2


# ---- where weights come from


def sparse(graph: Graph, name: str = "w0") -> float:
    return float((graph.weights[name].dense == 0).mean())


def test_pruned_model_is_captured_fresh_and_left_alone() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 80, 4))
    l1_unstructured(model[0], "weight", 0.5)
    random_unstructured(model[0], "weight", 0.5)  # now a PruningContainer
    random_unstructured(model[3], "bias", 0.5)
    model.train()
    model[1].eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X).square().mean().backward()
    optimizer.step()  # `weight` is stale now
    stale = model[0].weight
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    captured = capture(model, (X,))
    effective = model[0].weight_orig * model[0].weight_mask
    assert not torch.equal(stale, effective)
    np.testing.assert_array_equal(captured.graph.weights["w0"].dense, effective.detach().numpy())
    np.testing.assert_array_equal(
        captured.graph.biases["b1"], (model[3].bias_orig * model[3].bias_mask).detach().numpy()
    )
    assert model[0].weight is stale and len(model[0]._forward_pre_hooks) == 1
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert 0.7 < sparse(captured.graph) < 0.8
    oracle = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 80, 4))
    model(X)  # refreshes `weight`
    oracle.load_state_dict({f"{i}.{name}": getattr(model[i], name) for i in (0, 3) for name in ("weight", "bias")})
    agree(captured, oracle.double(), (X,))


class Mask(nn.Module):
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def test_parametrized_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), parametrizations.spectral_norm(nn.Conv2d(4, 2, 1)))
    parametrize.register_parametrization(model[0], "weight", Mask((torch.rand(4, 3, 3, 3) > 0.8).float()))
    parametrize.register_parametrization(model[0], "bias", Mask(torch.zeros(4)))
    kind, state = type(model[0]), copy.deepcopy(model.state_dict())
    captured = capture(model, (X,))  # in training mode, in which spectral_norm would iterate
    assert type(model[0]) is kind and parametrize.is_parametrized(model[0])
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert sparse(captured.graph) > 0.6 and not captured.graph.biases["b0"].any()
    agree(captured, copy.deepcopy(model).eval().double(), (X,))


def test_weight_norm_hooks_are_traced() -> None:
    model = Function(lambda m, x: m.conv(x), conv=weight_norm(nn.Conv2d(3, 4, 3)))
    captured = capture(model, (X,))
    with torch.no_grad():
        torch.testing.assert_close(run_reference(captured.graph, [X])[0].float(), model(X))


def test_tied_weights_are_stored_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3))
    model[2].weight = model[0].weight
    shared = nn.Linear(4, 4)
    assert list(check(model, X).weights) == ["w0"]
    graph = check(Function(lambda m, x: m.fc(m.fc(x).relu()), fc=shared), torch.randn(2, 4))
    assert [node.name for node in graph.nodes] == ["fc", "fc@1"] and list(graph.weights) == ["w0"]


def test_captured_weights_do_not_follow_the_model() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 3, 3))
    graph = capture(model, (X,)).graph
    before = graph.weights["w0"].dense.copy(), graph.biases["b0"].copy()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    np.testing.assert_array_equal(before[0], graph.weights["w0"].dense)
    np.testing.assert_array_equal(before[1], graph.biases["b0"])


def test_forward_hooks_and_unregistered_modules_are_kept() -> None:
    hidden = [nn.BatchNorm2d(3)]
    model: Any = Function(lambda m, x: m.hidden[0](m.conv(x)), conv=nn.Conv2d(3, 3, 1))
    model.hidden = hidden
    model.conv.register_forward_hook(lambda module, args, output: output.relu())
    graph = capture(model, (X,)).graph
    assert hidden[0].training and len(graph.nodes) == 2 and graph.nodes[0].act == "relu"


# ---- inputs and outputs


def test_nested_outputs_and_constants() -> None:
    def forward(m: Any, x: dict[str, Tensor], power: int) -> Any:
        y = m.conv(x["b"])
        return OrderedDict(b=[y, None, (x["a"],)], a={"c": y.relu() if power == 2 else y})

    args = ({"a": X, "b": X + 1}, 2)
    model = Function(forward, conv=nn.Conv2d(3, 2, 1))
    captured = capture(model, args)
    assert [spec.shape[1] for spec in captured.graph.inputs] == [3, 3]
    assert captured.constants == {2: 2}
    tensor = {"kind": "tensor"}
    nested = {"kind": "list", "items": [tensor, {"kind": "none"}, {"kind": "tuple", "items": [tensor]}]}
    assert captured.graph.tree == {
        "kind": "dict", "keys": ["b", "a"], "items": [nested, {"kind": "dict", "keys": ["c"], "items": [tensor]}],
    }  # fmt: skip
    assert len(captured.graph.outputs) == 3 and captured.graph.outputs[1] == 0
    assert captured.out_spec.num_leaves == 4
    agree(captured, model.double(), args)


# ---- errors


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.LogSoftmax(1), ["'inner.0'", "LogSoftmax", "aten.log_softmax", "decompositions"]),
        (nn.Conv3d(2, 3, 3), ["'inner.0'", "aten.conv3d"]),
        (nn.BatchNorm2d(3, track_running_stats=False), ["'inner.0'", "batch statistics"]),
        (nn.Sequential(nn.MaxPool2d(2, return_indices=True)), ["'inner.0.0'", "indices"]),
        (Function(lambda m, x: F.dropout(x, training=True)), ["dropout", "training=True"]),
        (Function(lambda m, x: x.sort(1)[0]), ["aten.sort"]),
        (Function(lambda m, x: torch.fft.rfft(x).real), ["aten.fft_rfft"]),
        (Function(lambda m, x: x.double()), ["torch.float64"]),
        (Function(lambda m, x: torch.rand(3, 1, 1) * 0 + x), ["aten.rand"]),
        (Function(lambda m, x: torch.ones(3)), ["output 0", "constant"]),
        (Function(lambda m, x: (x, 3)), ["output[1]", "constant 3"]),
        (Function(lambda m, x: m.count.add_(1) * x, count=torch.zeros(())), ["aten.add_", "writes a parameter"]),
        (Function(lambda m, x: x if x.sum() > 0 else -x), ["torch.export could not capture"]),
        (Function(lambda m, x: m.nothing(x)), ["torch.export could not capture", "nothing"]),
    ],
    ids=str,
)
def test_unsupported(layer: nn.Module, words: list[str]) -> None:
    model = nn.Sequential(OrderedDict(inner=nn.Sequential(layer))).train()
    with pytest.raises(UnsupportedError) as caught:
        capture(model, (X,))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert all(module.training for module in model.modules())


def test_bad_arguments() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"got Tensor.*\(x,\)"):
        capture(model, X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got function"):
        capture(lambda x: x, (X,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one torch.Tensor, got int"):
        capture(model, (3,))
    with pytest.raises(ValueError, match=r"got shape \(0, 3\)"):
        capture(model, (torch.ones(0, 3),))
    with pytest.raises(UnsupportedError, match=r"inputs\[0\]: is torch.float64"):
        capture(model, (X.double(),))
    with pytest.raises(UnsupportedError, match="parameter '0.weight' is torch.float16"):
        capture(nn.Sequential(nn.Linear(3, 3).half()), (torch.ones(2, 3),))


# ---- bytes


def test_bytes_hold_the_documented_arrays() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(320, 2, bias=False))
    with torch.no_grad():
        model[0].weight[torch.rand(4, 3, 3, 3) < 0.7] = 0
    graph = capture(model, (X,)).graph
    data = graph.to_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    program = json.loads(header["__metadata__"]["sparseprune"])
    assert program["weights"] == {"w0": {"shape": [4, 3, 3, 3], "block_shape": [1, 1]}, "w1": {"shape": [2, 320]}}
    assert program["nodes"][0] == {
        "op": "conv", "name": "0", "inputs": [0], "weight": "w0", "bias": "b0",
        "attrs": {"dims": 2, "stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1, "act": "relu"},
    }  # fmt: skip
    arrays = load(data)
    names = ["b0", "checksum", "w0.col_gaps", "w0.crow_indices", "w0.values", "w1.values"]
    assert sorted(arrays) == names
    assert [arrays[name].dtype.name for name in names] == ["float32", "uint64", "uint8", "int32", "float32", "float32"]
    rebuilt, crow = np.zeros((4, 27), np.float32), arrays["w0.crow_indices"]
    for row in range(4):
        columns = np.cumsum(arrays["w0.col_gaps"][crow[row] : crow[row + 1]].astype(int) + 1) - 1
        rebuilt[row, columns] = arrays["w0.values"][crow[row] : crow[row + 1]]
    np.testing.assert_array_equal(rebuilt.reshape(4, 3, 3, 3), graph.weights["w0"].dense)


def test_packing_of_all_zeros_and_of_wide_rows() -> None:
    crow, columns, values = pack_csr(np.zeros((2, 3), np.float32))
    assert crow.tolist() == [0, 0, 0] and columns.size == values.size == 0
    wide_row = np.zeros((1, 65537), np.float32)
    wide_row[0, 65536] = 1
    assert pack_csr(wide_row)[1].dtype == np.int32 and pack_csr(wide_row)[1].tolist() == [65536]
    assert pack_csr(wide_row[:, 1:])[1].dtype == np.uint16


def gap_cases() -> list[tuple[Any, int]]:
    wide = np.zeros((3, 2000), np.float32)
    wide[0, [0, 255, 511, 767, 1999]] = 1  # gaps of 0, 254, 255, 255, 1231
    wide[2, 254] = 2
    lonely = np.zeros((1, 70000), np.float32)
    lonely[0, 69999] = 1  # 274 skips are more bytes than an I32
    return [(wide, 12), (lonely, 0), (np.zeros((2, 3), np.float32), 0), (np.ones((3, 4), np.float32), 0)]


def test_gaps_of_every_width_come_back() -> None:
    for dense, gap_bytes in gap_cases():
        node = Node("linear", "fc", (0,), {}, weight="w")
        graph = Graph((Input("x", (1, dense.shape[1])),), (node,), (1,), {"kind": "tensor"}, {"w": Weight(dense)}, {})
        data = graph.to_bytes()
        arrays = load(data)
        assert len(arrays.get("w.col_gaps", ())) == gap_bytes and ("w.col_indices" in arrays) == (dense.shape[0] == 1)
        x = np.arange(dense.shape[1], dtype=np.float32)[None] % 7
        np.testing.assert_array_equal(Program(data)(x), x @ dense.T)


def test_only_finished_float32_graphs_have_bytes() -> None:
    graph = capture(randomized(nn.Sequential(nn.BatchNorm2d(3))), (X,), optimize=False).graph
    with pytest.raises(ValueError, match="'0'.*no operator 'scale_shift'"):
        graph.to_bytes()
    wrong = Graph(
        (), (Node("linear", "fc", (0,), weight="w"),), (1,), {"kind": "tensor"}, {"w": Weight(np.ones((2, 2)))}, {}
    )
    with pytest.raises(ValueError, match="'w' is float64"):
        wrong.to_bytes()


def test_importing_the_ir_does_not_import_torch() -> None:
    code = "import sys, sparseprune.graph.ir; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the reference's bound


def test_float32_is_within_the_bound_and_the_bound_is_tight() -> None:
    model = small_resnet().eval()
    x = torch.randn(2, 3, 32, 32)
    y, bound = run_reference(capture(model, (x,)).graph, [x], bounds=True)
    with torch.no_grad():
        error = (model(x).double() - y[0]).abs()
    assert torch.all(error <= bound[0])
    linear: Any = nn.Sequential(nn.Linear(64, 8))
    x = torch.rand(4, 64)
    _, bound = run_reference(capture(linear, (x,)).graph, [x], bounds=True)
    magnitude = x.double() @ linear[0].weight.double().abs().T + linear[0].bias.double().abs()
    torch.testing.assert_close(bound[0], (64 + 4) * EPS * magnitude.detach())


def test_reference_refuses_other_inputs() -> None:
    graph = capture(nn.Sequential(nn.Conv2d(3, 2, 1)), (X,)).graph
    with pytest.raises(ValueError, match="expected 1, got 2"):
        run_reference(graph, [X, X])
    with pytest.raises(ValueError, match=r"expected shape \('s0', 3, 's1', 's2'\), got \(2, 4, 12, 10\)"):
        run_reference(graph, [torch.ones(2, 4, 12, 10)])
