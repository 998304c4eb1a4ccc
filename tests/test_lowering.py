"""Every lowered operator: the graph in float64 is the model in float64, and float32 is within the reference's bound."""

from __future__ import annotations

import copy
import json
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from old_torch import fixes_another_size, open_sizes
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparseprune.errors import UnsupportedError
from sparseprune.graph.capture import capture
from sparseprune.graph.ir import Graph
from sparseprune.graph.operators import TABLE, operator_table
from sparseprune.graph.reference import run_reference

EXACT, FOLDED = 1e-12, 1e-5


class Function(nn.Module):
    """A model of one function, with modules and constants to use as keyword arguments."""

    def __init__(self, function: Any, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def lower(model: nn.Module, *shapes: tuple[int, ...], others: Any = (), tolerance: float = EXACT) -> Graph:
    """Captures for inputs of `shapes`; compares for these and for `others`, a list of tuples of shapes.

    Where `others` is given, the program must leave those sizes open.
    """
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.InstanceNorm2d) and module.running_var is not None:
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.eval()
    graph = capture(model, tuple(torch.randn(shape) for shape in shapes)).graph
    oracle = copy.deepcopy(model).double()
    for sizes in [shapes, *others]:
        if fixes_another_size(graph, sizes):
            continue
        inputs = [torch.randn(size) for size in sizes]
        with torch.no_grad():
            expected = tree_leaves(oracle(*(x.double() for x in inputs)))
        got, bounds = run_reference(graph, inputs, bounds=True)
        narrow = run_reference(graph, inputs, torch.float32)
        assert len(got) == len(expected)
        for y, y32, want, bound in zip(got, narrow, expected, bounds, strict=True):
            assert y.shape == want.shape
            torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
            assert not bound.isnan().any() and torch.all((y32.double() - y).abs() <= bound)
    graph.to_bytes()
    json.loads(graph.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return graph


def f(function: Any, *shapes: tuple[int, ...], others: Any = (), tolerance: float = EXACT, **parts: Any) -> Graph:
    return lower(Function(function, **parts), *shapes, others=others, tolerance=tolerance)


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


IMAGE = (2, 4, 6, 8)
OTHER = [((3, 4, 9, 5),)]


# ---- transposed convolution


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_transposed_convolutions(kernel: int, stride: int) -> None:
    for padding in range(min(kernel, 3)):
        for dilation in (1, 2):
            for output_padding in {0, max(stride, dilation) - 1}:
                layer = nn.ConvTranspose2d(4, 6, (kernel, 3), (stride, 2), (padding, 1), (output_padding, 1), 2,
                                           dilation=(dilation, 1))  # fmt: skip
                graph = lower(layer, IMAGE, others=OTHER)
                assert ops(graph) == ["conv", "pixel_shuffle"]
    layer_1d: Any = nn.ConvTranspose1d(4, 3, kernel, stride)
    graph = lower(layer_1d, (2, 4, 7), others=[((1, 4, 5),)])
    assert ops(graph) == ["conv"] if stride == 1 else ["conv", "reshape", "pixel_shuffle", "reshape"]


def test_a_transposed_convolution_keeps_zeros_and_takes_what_follows() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 3, 2, 2), nn.BatchNorm2d(3), nn.SiLU())
    graph = lower(model, IMAGE, others=OTHER, tolerance=FOLDED)
    assert ops(graph) == ["conv", "pixel_shuffle"]
    conv = graph.nodes[0]
    assert conv.name == "0" and conv.act == "silu" and graph.weights["w0"].shape == (12, 4, 1, 1)
    graph = lower(nn.ConvTranspose2d(4, 3, 3, 2, 1, 1), IMAGE)
    assert graph.weights["w0"].dense.size == 12 * 4 * 4
    assert (graph.weights["w0"].dense != 0).sum() == 4 * 3 * 9
    line = nn.Sequential(nn.ConvTranspose1d(4, 3, 4, 2, 1), nn.BatchNorm1d(3), nn.ReLU())
    graph = lower(line, (2, 4, 7), others=[((1, 4, 5),)], tolerance=FOLDED)
    assert ops(graph) == ["conv", "reshape", "pixel_shuffle", "reshape"] and graph.nodes[0].act == "relu"


# ---- activations


@pytest.mark.parametrize(
    ("layer", "act"),
    [
        (nn.LeakyReLU(0.25), {"act": "leaky_relu", "alpha": 0.25}),
        (nn.RReLU(0.25, 0.75), {"act": "leaky_relu", "alpha": 0.5}),
        (nn.Hardtanh(-1, 0.5), {"act": "clamp", "alpha": -1.0, "beta": 0.5}),
        (nn.ReLU6(), {"act": "relu6"}),
        (nn.Threshold(0, 0), {"act": "relu"}),
        (nn.Hardsigmoid(), {"act": "hardsigmoid"}),
        (nn.Hardswish(), {"act": "hardswish"}),
        (nn.Sigmoid(), {"act": "sigmoid"}),
        (nn.SiLU(inplace=True), {"act": "silu"}),
        (nn.Tanh(), {"act": "tanh"}),
        (nn.ELU(0.5), {"act": "elu", "alpha": 0.5}),
        (nn.GELU(), {"act": "gelu"}),
        (nn.GELU("tanh"), {"act": "gelu_tanh"}),
        (nn.Mish(), {"act": "mish"}),
        (nn.Softplus(), {"act": "softplus"}),
        (Function(lambda m, x: x.exp()), {"act": "exp"}),
        (Function(lambda m, x: x.abs()), {"act": "abs"}),
        (Function(lambda m, x: -x), {"act": "neg"}),
        (Function(lambda m, x: x**2), {"act": "square"}),
        (Function(lambda m, x: torch.square(x)), {"act": "square"}),
    ],
    ids=str,
)
def test_activations(layer: nn.Module, act: dict[str, Any]) -> None:
    graph = lower(nn.Sequential(layer), IMAGE, others=OTHER)
    assert [(node.op, node.attrs) for node in graph.nodes] == [("act", act)]
    graph = lower(nn.Sequential(nn.Conv2d(4, 2, 3), layer), IMAGE, others=OTHER)
    assert ops(graph) == ["conv"] and act.items() <= graph.nodes[0].attrs.items()
    graph = lower(nn.Sequential(nn.Linear(8, 2), layer), IMAGE, others=[((3, 4, 9, 8),)])
    assert ops(graph) == ["reshape", "linear", "reshape"] and act.items() <= graph.nodes[1].attrs.items()


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda m, x: (x.abs() + 1).sqrt(), ["act", "constant", "add"]),
        (lambda m, x: (x.abs() + 1).rsqrt(), ["act", "constant", "add"]),
        (lambda m, x: 1 / (x.abs() + 1), ["act", "constant", "add"]),
        (lambda m, x: (x.abs() + 1) ** -1, ["act", "constant", "add"]),
        (lambda m, x: x**3 + x**4, ["act", "mul", "act", "act", "add"]),
        (lambda m, x: F.celu(x, 2.0), ["constant", "mul", "constant", "mul"]),
        (lambda m, x: F.softplus(x, 2.0), ["constant", "mul", "constant", "mul"]),
        (lambda m, x: F.logsigmoid(x), ["act", "act", "act"]),
        (lambda m, x: F.glu(x, 1), ["slice", "slice", "act", "mul"]),
        (lambda m, x: x.clamp(min=0.5), ["constant", "maximum"]),
        (lambda m, x: x.clamp(max=0.5).clamp(min=0), ["constant", "minimum"]),
        (lambda m, x: x.clamp(-torch.ones(8), torch.ones(8)), ["constant", "maximum", "constant", "minimum"]),
        (lambda m, x: x.clamp(2, 1), ["act"]),
        (lambda m, x: torch.maximum(x, x.flip(1)) - torch.min(x, -x), None),
        (lambda m, x: F.softmax(x, 1) + x.softmax(-1), ["softmax", "softmax", "add"]),
        (lambda m, x: F.tanhshrink(x) + F.softsign(x), None),
    ],
)
def test_functions_of_one_tensor(function: Any, names: list[str] | None) -> None:
    graph = f(function, IMAGE, others=[((3, 4, 9, 8),)])
    assert names is None or ops(graph) == names


def test_parametric_slopes_and_selu() -> None:
    assert ops(lower(nn.Sequential(nn.PReLU(4)), IMAGE, others=OTHER)) == ["prelu"]
    assert ops(lower(nn.Sequential(nn.PReLU()), (3, 5), others=[((2, 5),)])) == ["prelu"]
    assert ops(lower(nn.Sequential(nn.SELU()), IMAGE, others=OTHER, tolerance=1e-6)) == ["act", "constant", "mul"]


# ---- arithmetic


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda m, x: 1 - x, ["constant", "sub"]),
        (lambda m, x: torch.rsub(x, 2, alpha=3), ["constant", "mul", "constant", "sub"]),
        (lambda m, x: x / 4 + m.row, ["constant", "div", "constant", "add"]),
        (lambda m, x: x * x.mean((2, 3), keepdim=True), ["adaptive_avg_pool", "mul"]),
        (lambda m, x: x - x[:, :1], ["slice", "sub"]),
        (lambda m, x: torch.add(x, x.exp(), alpha=0.5), ["act", "constant", "mul", "add"]),
        (lambda m, x: x / (x.abs() + 1), ["act", "constant", "add", "div"]),
        (lambda m, x: (x + m.channels) * m.plane, ["constant", "add", "constant", "mul"]),
        (lambda m, x: F.relu(x + x.flip(1)), ["index_select", "add"]),
        (lambda m, x: F.normalize(x, dim=1), ["act", "reduce", "act", "constant", "maximum", "div"]),
        (lambda m, x: x.addcmul(x, x, value=2), None),
    ],
)
def test_arithmetic(function: Any, names: list[str] | None) -> None:
    parts: dict[str, Any] = {"row": torch.randn(8), "channels": torch.randn(4, 1, 1), "plane": torch.randn(1, 1, 6, 8)}
    others = [((3, 4, 6, 8),)]
    graph = f(function, IMAGE, others=others, **parts)
    assert names is None or ops(graph) == names


def test_a_broadcast_sum_is_no_residual() -> None:
    model: dict[str, Any] = {"conv": nn.Conv2d(4, 4, 1)}
    graph = f(lambda m, x: m.conv(x) + m.conv(x).mean((2, 3), keepdim=True), IMAGE, others=OTHER, **model)
    assert "add" in ops(graph) and all(len(node.inputs) == 1 for node in graph.nodes if node.op == "conv")
    graph = f(lambda m, x: F.relu(m.conv(x) + x), IMAGE, others=OTHER, **model)
    assert ops(graph) == ["conv"] and len(graph.nodes[0].inputs) == 2 and graph.nodes[0].act == "relu"
    graph = f(lambda m, x: m.conv(x) * x.exp() + 1, IMAGE, **model)
    assert ops(graph) == ["conv", "act", "mul", "constant", "add"]


def test_constants_after_a_layer_fold() -> None:
    parts = {"conv": nn.Conv2d(4, 3, 1), "channels": torch.randn(3, 1, 1)}
    for function in (lambda m, x: 1 - m.conv(x), lambda m, x: (m.conv(x) - m.channels) / 2,
                     lambda m, x: m.channels * m.conv(x) - 1):  # fmt: skip
        assert ops(f(function, IMAGE, others=OTHER, tolerance=FOLDED, **parts)) == ["conv"]


# ---- normalization


@pytest.mark.parametrize(
    ("layer", "shape", "names"),
    [
        (nn.BatchNorm1d(5), (3, 5), ["constant", "constant", "mul", "add"]),
        (nn.BatchNorm1d(5), (3, 5, 7), ["conv"]),
        (nn.BatchNorm2d(4, affine=False), IMAGE, ["conv"]),
        (nn.GroupNorm(2, 4), IMAGE, ["group_norm"]),
        (nn.GroupNorm(2, 4, affine=False), (3, 4), ["group_norm"]),
        (nn.InstanceNorm2d(4), IMAGE, ["group_norm"]),
        (nn.InstanceNorm2d(4, affine=True), IMAGE, ["group_norm"]),
        (nn.InstanceNorm2d(4, track_running_stats=True), IMAGE, ["conv"]),
        (nn.LayerNorm(8), IMAGE, ["layer_norm"]),
        (nn.LayerNorm((6, 8), elementwise_affine=False), IMAGE, ["layer_norm"]),
        (nn.LayerNorm((4, 6, 8), bias=False), IMAGE, ["layer_norm"]),
        (nn.RMSNorm(8, eps=1e-5), IMAGE, None),
    ],
    ids=str,
)
def test_norms(layer: nn.Module, shape: tuple[int, ...], names: list[str] | None) -> None:
    exact = names is None or names[0].endswith("norm")
    tolerance = 1e-6 if names is None else EXACT if exact else FOLDED
    graph = lower(nn.Sequential(layer), shape, others=[((4, *shape[1:]),)], tolerance=tolerance)
    assert names is None or ops(graph) == names


def test_variances() -> None:
    for function in (lambda m, x: x.var((1, 2)), lambda m, x: x.std(3, correction=0, keepdim=True),
                     lambda m, x: (lambda v: v[0] - v[1])(torch.var_mean(x, (1, 3), correction=0)),
                     lambda m, x: torch.linalg.vector_norm(x, 1, dim=2) + x.norm(dim=2)):  # fmt: skip
        f(function, IMAGE, others=[((3, *IMAGE[1:]),)], tolerance=1e-6)


# ---- movements


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda m, x: x.permute(0, 2, 3, 1), ["permute"]),
        (lambda m, x: x.transpose(1, 2).transpose(2, 3), ["permute"]),
        (lambda m, x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2) + 1, ["constant", "add"]),
        (lambda m, x: x.mT, ["permute"]),
        (lambda m, x: x.movedim(1, -1).swapaxes(0, 1), ["permute"]),
        (lambda m, x: x.flatten(2).transpose(1, 2), ["reshape", "permute"]),
        (lambda m, x: x.reshape(x.shape[0], 2, 2, *x.shape[2:]), ["reshape"]),
        (lambda m, x: x.flatten(1), ["flatten"]),
        (lambda m, x: x.flatten(0, 1), ["reshape"]),
        (lambda m, x: x.unflatten(1, (2, 2)).flatten(1, 2).unsqueeze(1).squeeze(1) * x, ["mul"]),
        (lambda m, x: x.unsqueeze(2).expand(-1, -1, 3, -1, -1), ["reshape", "expand"]),
        (lambda m, x: x[:, :1].expand_as(x) * x, ["slice", "mul"]),
        (lambda m, x: m.token.expand(x.shape[0], -1, -1), ["constant", "expand"]),
        (lambda m, x: x.repeat(1, 2, 1, 1), ["concat"]),
        (lambda m, x: x.mean((2, 3), keepdim=True).repeat(1, 1, 2, 3), ["adaptive_avg_pool", "expand"]),
        (lambda m, x: x.repeat_interleave(2, 1), ["reshape", "expand", "reshape"]),
        (lambda m, x: torch.cat([x, x.exp()], 2), ["act", "concat"]),
        (lambda m, x: torch.stack([x, -x], 1), ["act", "reshape", "reshape", "concat"]),
        (lambda m, x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2]], 1), None),
        (lambda m, x: x[:, 1:-1, 2:, :-1], ["slice", "slice", "slice"]),
        (lambda m, x: x[:, -1], ["slice", "reshape"]),
        (lambda m, x: x[:, :, : x.shape[2] - 1], ["slice"]),
        (lambda m, x: x.narrow(1, 1, 2), ["slice"]),
        (lambda m, x: x.split([1, 3], 1), ["slice", "slice"]),
        (lambda m, x: (lambda a, b: a * b.sigmoid())(*x.chunk(2, 1)), ["slice", "slice", "act", "mul"]),
        (lambda m, x: x.tensor_split(3, 1), ["slice", "slice", "slice"]),
        (lambda m, x: x.unbind(1)[1:3], ["slice", "reshape", "slice", "reshape"]),
        (lambda m, x: x.index_select(1, m.index), ["index_select"]),
        (lambda m, x: x[:, m.index], ["index_select"]),
        (lambda m, x: x[:, m.index.reshape(2, 2)], ["index_select", "reshape"]),
        (lambda m, x: x[:, [1, 2]], ["slice"]),
        (lambda m, x: x[:, m.index > 1], None),
        (lambda m, x: x.roll((1, -2), (2, 3)), ["roll", "roll"]),
        (lambda m, x: x.flip(1), ["index_select"]),
        (lambda m, x: F.pad(x, (1, 2, 3, 0), value=0.5), ["pad"]),
        (lambda m, x: F.pad(x, (1, 2, 3, 0), mode="reflect"), ["pad"]),
        (lambda m, x: F.pad(x, (1, 2, 3, 0), mode="replicate"), ["pad"]),
        (lambda m, x: F.pad(x, (1, 2, 3, 0), mode="circular"), ["pad"]),
        (lambda m, x: F.pad(x, (-1, 2, 0, -2)), ["slice", "slice", "pad"]),
        (lambda m, x: F.pixel_shuffle(x, 2), ["pixel_shuffle"]),
        (lambda m, x: F.channel_shuffle(x, 2), None),
        (lambda m, x: x.amax((2, 3)), ["adaptive_max_pool", "flatten"]),
        (lambda m, x: x.mean(1), ["reduce"]),
        (lambda m, x: x.mean((1, 2), keepdim=True), ["reduce"]),
        (lambda m, x: x.sum((2, 3)), ["reduce"]),
        (lambda m, x: x.max(1)[0], ["reduce"]),
        (lambda m, x: x.amin(-1), ["reduce"]),
        (lambda m, x: torch.zeros_like(x[:, 0]) + x[:, 1] + torch.ones(x.shape[0], 1, 1), None),
    ],
)
def test_movements(function: Any, names: list[str] | None) -> None:
    graph = f(function, IMAGE, others=[((3, 4, 8, 10),)], token=torch.randn(1, 1, 8), index=torch.tensor([2, 0, 3, 3]))
    assert names is None or ops(graph) == names


def test_pixel_unshuffle_takes_two_reshapes_where_sizes_are_open() -> None:
    assert ops(f(lambda m, x: F.pixel_unshuffle(x, 2), IMAGE)) in (
        ["reshape", "permute", "reshape"],
        ["reshape", "reshape", "permute", "reshape"],
    )


@open_sizes
def test_sizes_are_written_as_the_program_has_them() -> None:
    graph = f(lambda m, x: x.flatten(2).transpose(1, 2), IMAGE, others=OTHER)
    assert graph.nodes[0].attrs == {"shape": [-2, 4, -1]}
    graph = f(lambda m, x: m.fc(x), (2, 3, 8), others=[((3, 3, 8),)], fc=nn.Linear(8, 5))
    assert [node.attrs.get("shape") for node in graph.nodes] == [[-1, 8], None, ["s0", 3, 5]]
    assert [node.name for node in graph.nodes] == ["fc.reshape", "fc", "fc.reshape@1"]
    graph = f(lambda m, x: x[:, 1:], IMAGE)
    assert graph.nodes[0].attrs == {"axis": 1, "start": 1, "end": 4, "step": 1}
    graph = f(lambda m, x: x[:, :, 1:], IMAGE, others=OTHER)
    assert graph.nodes[0].attrs["end"] == 2**31 - 1


def test_padding_before_a_convolution_becomes_its_own() -> None:
    graph = f(lambda m, x: m.conv(F.pad(x, (0, 1, 2, 3))), IMAGE, others=OTHER, conv=nn.Conv2d(4, 3, 3, 2, 1))
    assert ops(graph) == ["conv"] and graph.nodes[0].attrs["padding"] == [3, 4, 1, 2]
    reflected = nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect")
    assert ops(lower(nn.Sequential(reflected), IMAGE, others=OTHER)) == ["pad", "conv"]


@pytest.mark.parametrize(
    ("function", "others"),
    [
        (lambda m, x: F.interpolate(x, scale_factor=2), OTHER),
        (lambda m, x: F.interpolate(x, scale_factor=(1.5, 2.5), mode="bilinear"), OTHER),
        (lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True), OTHER),
        (lambda m, x: F.interpolate(x, size=(5, 11)), OTHER),
        (lambda m, x: F.interpolate(x, size=(5, 11), mode="bilinear", align_corners=True), OTHER),
        (lambda m, x: F.interpolate(x, size=[2 * s for s in x.shape[2:]], mode="bilinear"), OTHER),
        (lambda m, x: F.interpolate(x, scale_factor=1.5, recompute_scale_factor=True), ()),
        (lambda m, x: F.interpolate(F.max_pool2d(x, 2), size=x.shape[2:], mode="bilinear") + x, OTHER),
        (lambda m, x: F.interpolate(x[..., ::2], size=x.shape[2:]), OTHER),
    ],
)
def test_resizing(function: Any, others: Any) -> None:
    assert "resize" in ops(f(function, IMAGE, others=others))


def test_resizing_a_line() -> None:
    for mode in ("nearest", "linear"):
        f(lambda m, x, mode=mode: F.interpolate(x, scale_factor=2.0, mode=mode), (2, 3, 7), others=[((1, 3, 9),)])
        f(lambda m, x, mode=mode: F.interpolate(x[..., :3], size=x.shape[2:], mode=mode), (2, 3, 7),
          others=[((1, 3, 9),)])  # fmt: skip


# ---- products


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda m, x: x @ m.matrix, ["reshape", "linear", "reshape"]),
        (lambda m, x: m.left @ x, ["constant", "matmul"]),
        (lambda m, x: x @ m.stack, ["constant", "matmul"]),
        (lambda m, x: x @ x.transpose(-2, -1), ["matmul"]),
        (lambda m, x: x.mT @ x, ["permute", "matmul"]),
        (lambda m, x: torch.bmm(x.flatten(0, 1), x.flatten(0, 1).mT), ["reshape", "matmul"]),
        (lambda m, x: torch.baddbmm(x[:, 0] @ x[:, 0].mT, x[:, 0], x[:, 1].mT, beta=0.5, alpha=2), None),
        (lambda m, x: torch.einsum("nchw,ncvw->nhv", x, x), None),
        (lambda m, x: F.linear(x, x[0, 0], x[0, 0, :, 0]), None),
        (lambda m, x: x @ x[0, 0, 0], None),
    ],
)
def test_products(function: Any, names: list[str] | None) -> None:
    parts: dict[str, Any] = {"matrix": torch.randn(8, 3), "left": torch.randn(5, 6), "stack": torch.randn(4, 8, 2)}
    graph = f(function, IMAGE, others=[((3, 4, 6, 8),)], **parts)
    assert names is None or ops(graph) == names


def test_layers_of_other_ranks() -> None:
    graph = f(lambda m, x: m.fc(x[0]), (2, 8), fc=nn.Linear(8, 3))
    assert ops(graph) == ["slice", "linear", "reshape"]
    graph = f(lambda m, x: torch.addmm(m.bias, x, m.weight), (2, 8), bias=torch.randn(3), weight=torch.randn(8, 3))
    assert ops(graph) == ["linear"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, q: F.scaled_dot_product_attention(q, q.exp(), q.sigmoid()),
        lambda m, q: F.scaled_dot_product_attention(q, q, q, attn_mask=m.mask, scale=0.5),
        lambda m, q: F.scaled_dot_product_attention(q, q, q, attn_mask=m.mask > 0),
        lambda m, q: F.scaled_dot_product_attention(q, q, q, attn_mask=q @ q.mT),
        lambda m, q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
    ],
)
def test_attention(function: Any) -> None:
    mask = torch.randn(6, 6) + 5 * torch.eye(6)
    graph = f(function, (2, 3, 6, 16), others=[((4, 3, 6, 16),)], mask=mask)
    names = Counter(ops(graph))
    assert names["matmul"] in (2, 3) and names["softmax"] == 1 and names["permute"] == 0


# ---- writes in place


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (lambda y: (y[:, :1].mul_(2), y)[1])(x * 1.5),
        lambda m, x: (lambda y: (y[:, 1:3].copy_(x[:, :2]), y + x)[1])(x.exp()),
        lambda m, x: (lambda y: (y[:, 2].fill_(3.0), y)[1])(x.exp()),
        lambda m, x: (lambda y: (y.permute(0, 2, 3, 1)[..., :2].sigmoid_(), y)[1])(x.exp()),
        lambda m, x: (lambda y: (y.chunk(2, 1)[0].relu_(), y)[1])(x - 1),
        lambda m, x: (lambda y: (y.add_(1), y[:, 1:])[1])(x.exp()),
        lambda m, x: (lambda y: (x.view(x.shape[0], -1).clone().relu_(), y))(x.exp()),
    ],
)
def test_writes(function: Any) -> None:
    f(function, IMAGE, others=OTHER)


def test_a_written_view_is_read_whole() -> None:
    graph = f(lambda m, x: (lambda y: (y.view(y.shape[0], -1).relu_(), y + 1)[1])(x.exp()), IMAGE, others=OTHER)
    assert ops(graph) == ["act", "act", "constant", "add"]


# ---- whole networks


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = conv(3, 8), conv(8, 16)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, 2), conv(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        b = self.middle(F.max_pool2d(a, 2))
        y: Tensor = self.head(self.last(torch.cat([a, self.up(b)], 1)))
        return y


def test_unet() -> None:
    graph = lower(UNet(), (1, 3, 16, 24), tolerance=FOLDED)
    assert ops(graph) == ["conv", "max_pool", "conv", "conv", "pixel_shuffle", "concat", "conv", "conv"]


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.project = conv(4, 8), nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
        self.reduce, self.expand = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        gate = F.hardsigmoid(self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(y, 1)))))
        result: Tensor = x + self.project(y * gate)
        return result


def test_squeeze_and_excite() -> None:
    graph = lower(SqueezeExcite(), IMAGE, others=OTHER, tolerance=FOLDED)
    assert ops(graph) == ["conv", "adaptive_avg_pool", "conv", "conv", "mul", "conv"]
    assert [node.act for node in graph.nodes if node.op == "conv"] == ["relu", "silu", "hardsigmoid", "none"]


class ShuffleUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv(4, 4, 1), conv(4, 4, 3, groups=4), conv(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        y = torch.cat((first, self.branch(second)), 1)
        batch, channels, height, width = y.shape
        y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return y.view(batch, channels, height, width)


def test_shufflenet_unit() -> None:
    graph = lower(nn.Sequential(ShuffleUnit(), ShuffleUnit()), (2, 8, 6, 8), others=[((3, 8, 9, 5),)], tolerance=FOLDED)
    assert ops(graph) == ["slice", "slice", "conv", "conv", "conv", "concat", "channel_shuffle"] * 2
    assert graph.nodes[6].attrs == {"groups": 2}


class YoloHead(nn.Module):
    """Boxes from a map: offsets to a grid, times anchors; the map's size is that of the example."""

    anchors: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 3 * 7, 1)
        self.register_buffer("anchors", torch.rand(1, 3, 1, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        batch, _, height, width = y.shape
        y = y.view(batch, 3, 7, height, width).permute(0, 1, 3, 4, 2).contiguous().sigmoid()
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        grid = torch.stack((columns, rows), 2).view(1, 1, height, width, 2).to(x.dtype)
        y[..., 0:2] = (y[..., 0:2] * 2 - 0.5 + grid) * 8
        y[..., 2:4] = (y[..., 2:4] * 2) ** 2 * self.anchors
        boxes: Tensor = y.view(batch, -1, 7)
        return boxes


def test_yolo_head() -> None:
    graph = lower(YoloHead(), IMAGE, others=[((3, 4, 6, 8),)])
    assert graph.inputs[0].shape == ("s0", 4, 6, 8)
    assert {"conv", "permute", "constant", "concat", "slice"} <= set(ops(graph))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.proj(y.transpose(1, 2).reshape(batch, length, width))
        return result


class TransformerBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 64, 4, 4), nn.Parameter(torch.zeros(1, 1, 64))
        self.position = nn.Parameter(torch.zeros(1, 10, 64))
        self.blocks = nn.Sequential(TransformerBlock(64), TransformerBlock(64))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], 1) + self.position
        result: Tensor = self.head(self.norm(self.blocks(y))[:, 0])
        return result


def test_vision_transformer() -> None:
    graph = lower(VisionTransformer(), (2, 3, 12, 12), others=[((1, 3, 12, 12),)])
    names = Counter(ops(graph))
    assert names["linear"] == 9 and names["matmul"] == 4 and names["layer_norm"] == 5 and names["softmax"] == 2
    layers = {node.name: node for node in graph.nodes if node.op == "linear"}
    assert layers["blocks.0.mlp.0"].act == "gelu"
    # Both sums of each block are residuals of the layer before them.
    assert sum(len(node.inputs) == 2 for node in layers.values()) == 4 and names["add"] == 1


def test_multihead_attention_module() -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
    graph = lower(nn.Sequential(layer), (2, 5, 32), others=[((3, 5, 32),)], tolerance=1e-6)
    assert {"linear", "matmul", "softmax", "layer_norm"} <= set(ops(graph))


class SwinBlock(nn.Module):
    """Shifted windows of 4×4 of a map of 8×8."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(64), Attention(64)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        y = torch.roll(self.norm(x), shifts=(-2, -2), dims=(1, 2))
        y = y.view(batch, height // 4, 4, width // 4, 4, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, channels)
        y = self.attention(y).view(-1, height // 4, width // 4, 4, 4, channels)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)
        return x + torch.roll(y, shifts=(2, 2), dims=(1, 2))


def test_swin_block() -> None:
    graph = lower(SwinBlock(), (2, 8, 8, 64), others=[((3, 8, 8, 64),)])
    assert graph.inputs[0].shape[0] == "s0" and Counter(ops(graph))["roll"] == 4


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv(3, 4, stride=2), conv(4, 6, stride=2), conv(6, 8, stride=2)])
        self.lateral = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(8, 4, 1)])
        self.output = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        y = self.lateral[2](maps[2])
        found = {"2": self.output[2](y)}
        for level in (1, 0):
            side = self.lateral[level](maps[level])
            y = side + F.interpolate(y, size=side.shape[-2:], mode="nearest")
            found[str(level)] = self.output[level](y)
        return found


def test_feature_pyramid() -> None:
    graph = lower(Pyramid(), (1, 3, 32, 48), others=[((2, 3, 37, 41),)], tolerance=FOLDED)
    assert Counter(ops(graph)) == {"conv": 9, "resize": 2}
    assert all(len(node.inputs) == 2 for node in graph.nodes if node.op == "resize")


class DetectionHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.classes = conv(4, 6, stride=2), nn.ModuleList([nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for features, layer in zip((x, self.down(x)), self.classes, strict=True):
            found.append(layer(features).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 3))
        scores = torch.cat(found, 1)
        return F.softmax(scores, -1), scores.transpose(1, 2)


def test_detection_head() -> None:
    graph = lower(DetectionHead(), (2, 4, 16, 24), others=[((1, 4, 19, 13),)], tolerance=FOLDED)
    assert ops(graph) == ["conv", "permute", "reshape", "conv", "conv", "permute", "reshape", "concat", "softmax",
                          "permute"] or Counter(ops(graph))["permute"] == 3  # fmt: skip


def test_super_resolution_activates_before_the_shuffle() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2), nn.Sigmoid())
    graph = lower(model, (1, 3, 6, 8), others=[((2, 3, 9, 7),)])
    assert ops(graph) == ["conv", "pixel_shuffle"] and graph.nodes[0].act == "sigmoid"


# ---- what is not


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda m, x: x.sort(1)[0], ["aten.sort"]),
        (lambda m, x: x.max(1)[1], ["aten.max", "indices"]),
        (lambda m, x: torch.where(x > 0, x, -x), ["aten"]),
        (lambda m, x: x.mean(), ["1 to 8 dimensions"]),
        (lambda m, x: x**2.5, ["exponent 2.5"]),
        (lambda m, x: F.softplus(x, threshold=1), ["threshold=1"]),
        (lambda m, x: torch.div(x, 2, rounding_mode="floor"), ["rounding_mode"]),
        (lambda m, x: torch.fft.rfft(x), ["aten.fft_rfft"]),
        (lambda m, x: x[:, :0], ["without elements"]),
    ],
)
def test_unsupported(function: Any, words: list[str]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        capture(Function(function), (torch.randn(IMAGE),))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_table_of_operators() -> None:
    rows = operator_table()
    assert len(rows) >= len(TABLE) and all(name and becomes for name, becomes, _ in rows)
    assert len({name for name, _, _ in rows}) == len(rows)
