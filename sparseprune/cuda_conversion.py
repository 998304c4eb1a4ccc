"""`convert` for a model on a CUDA device: sparse layers where they win, normalisation, residuals and activations folded
into them, and the whole replayed as a CUDA graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from .bsr import BlockCSR
from .cuda_graphs import GraphReplay
from .cuda_layers import DTYPES, NONE, Activation, Choice, CudaLayer, Window, event_timer, output_shape
from .errors import UnsupportedError, VerificationError
from .graph.capture import unwrap
from .graph.snapshot import snapshot
from .module import Converted
from .report import LayerReport, Report

__all__ = ["FusedLayer", "convert_on_device"]

# Of the largest output, what may differ from float64.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
MOST_DENSITY = 0.4  # where nothing is timed, denser layers stay dense

_RELU: dict[Any, Activation] = {
    nn.ReLU: Activation("relu"),
    nn.ReLU6: Activation("clamp", 0.0, 6.0),
    functional.relu: Activation("relu"),
    functional.relu6: Activation("clamp", 0.0, 6.0),
    torch.relu: Activation("relu"),
    "relu": Activation("relu"),
    "relu_": Activation("relu"),
}
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")


class FusedLayer(nn.Module):
    """A sparse convolution or linear layer with what ends it: `act(layer(x) + bias + residual)`."""

    bias: Tensor | None

    def __init__(self, layer: CudaLayer, bias: Tensor | None, act: Activation = NONE) -> None:
        super().__init__()
        self.layer, self.act = layer, act
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        weight = self.layer.weight
        if len(weight.shape) == 2:
            rows = x.reshape(-1, x.shape[-1])
            shape: tuple[int, ...] = (*x.shape[:-1], weight.shape[0])
        else:
            rows = x.unsqueeze(0) if x.dim() == 3 else x
            full = output_shape(tuple(rows.shape), weight.shape, self.layer.window)
            shape = full[1:] if x.dim() == 3 else full
        if residual is not None and (residual.shape != shape or residual.dtype != x.dtype):  # it is broadcast
            return self.act.apply(self.layer(rows, self.bias).reshape(shape) + residual)
        if residual is not None and residual.dim() != rows.dim():
            residual = residual.reshape(-1, shape[-1]) if len(weight.shape) == 2 else residual.unsqueeze(0)
        y = self.layer(rows, self.bias, residual, self.act)
        return y if y.shape == shape else y.reshape(shape)

    def extra_repr(self) -> str:
        return f"{self.layer.weight!r}, {self.layer.window}, {self.act.kind}"


@dataclass(frozen=True)
class _Decided:
    report: LayerReport
    fused: FusedLayer | None  # None: the layer stays


def convert_on_device(
    model: nn.Module, args: tuple[Any, ...], tune: str, min_gain: float, verify: bool, device: torch.device
) -> Converted:
    """As `convert`, for a model whose parameters are on a CUDA `device`.

    Raises:
        UnsupportedError: The model itself fails on the example.
        VerificationError: The outputs are beyond their bound.
        CudaError: The kernels, or a driver for them, are missing.
    """
    args = tree_map(lambda a: a.detach().to(device) if isinstance(a, Tensor) else a, args)
    inner, notes = _folded(snapshot(unwrap(model), own=True))
    with torch.no_grad():
        decided = decide_layers(inner, args, tune == "measure", min_gain)
        runs = GraphReplay(_swapped(inner, decided), device)
        outputs = runs(*args)
    if runs.failure:
        notes.append(f"no CUDA graph, each call launches its kernels one by one: {runs.failure}")
    count = sum(d.fused is not None for d in decided.values())
    notes.insert(0, f"on {device}; {count} of {len(decided)} layers are sparse, the rest runs in torch")
    report = Report(
        layers=tuple(d.report for d in decided.values()),
        runs="sparse",
        reason="tune='fixed': nothing was timed",
        input_shapes=tuple(tuple(x.shape) for x in tree_leaves(args) if isinstance(x, Tensor)),
        threads=1,
        isa=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        torch=torch.__version__,
        notes=tuple(notes),
    )
    if verify:
        error, allowed = check_outputs(outputs, snapshot(unwrap(model), own=True), args)
        report = replace(report, max_error=error, bound=allowed)
    converted = Converted(runs, None, None, report)
    if tune == "measure":
        _race(converted, runs, model, args, min_gain, device)
    return converted


def decide_layers(
    model: nn.Module, args: tuple[Any, ...], measure: bool, min_gain: float
) -> dict[str, _Decided]:
    """Runs `model` once; each plain `nn.Conv2d` and `nn.Linear` is timed on its own input, or judged by its density."""
    decided: dict[str, _Decided] = {}
    hooks = []

    def hook(name: str) -> Callable[..., None]:
        def note(layer: Any, inputs: tuple[Any, ...], _: Any) -> None:
            if name not in decided and len(inputs) == 1 and isinstance(inputs[0], Tensor):
                decided[name] = _decide(name, layer, inputs[0], measure, min_gain)

        return note

    for name, layer in model.named_modules():
        if type(layer) in (nn.Conv2d, nn.Linear) and not layer._forward_hooks and not layer._forward_pre_hooks:
            hooks.append(layer.register_forward_hook(hook(name)))
    try:
        model(*args)
    except UnsupportedError:
        raise
    except Exception as error:
        if decided or "CUDA" in type(error).__name__:
            raise
        raise UnsupportedError(f"the model itself fails on the example inputs: {error}") from error
    finally:
        for handle in hooks:
            handle.remove()
    return decided


def _decide(name: str, layer: Any, x: Tensor, measure: bool, min_gain: float) -> _Decided:
    weight = BlockCSR.from_dense(layer.weight.detach().float())
    conv = isinstance(layer, nn.Conv2d)
    fused: FusedLayer | None = None
    choice = Choice("torch", "")
    if conv and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        choice = Choice("torch", f"padding={layer.padding!r}, padding_mode={layer.padding_mode!r}")
    elif x.dtype not in DTYPES or x.dtype != layer.weight.dtype or x.numel() == 0:
        choice = Choice("torch", f"its input is {x.dtype}, {tuple(x.shape)}")
    elif not measure and weight.density > MOST_DENSITY:
        choice = Choice("torch", f"{weight.density:.0%} of its weights are kept; nothing was timed")
    else:
        window = Window(layer.stride, layer.padding, layer.dilation, layer.groups) if conv else None
        candidate = FusedLayer(CudaLayer(weight, window, min_gain, measure), layer.bias)
        candidate(x)
        found = list(candidate.layer.choices.values())[-1]
        choice = Choice("torch" if found.name == "dense" else found.name, found.reason, found.times_ms)
        fused = candidate if found.name != "dense" else None
    times = choice.times_ms
    report = LayerReport(
        name=name,
        op="conv" if conv else "linear",
        shape=tuple(layer.weight.shape),
        sparsity=1 - weight.density,
        block_density=weight.block_density,
        dense_ms=times.get("dense"),
        sparse_ms=min((ms for other, ms in times.items() if other != "dense"), default=None),
        choice=choice.name,
        reason=choice.reason,
        error=None,
    )
    return _Decided(report, fused)


def _folded(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """With batch normalisation in the convolutions before it, as a graph, where torch.fx can follow the model."""
    try:
        return fuse(model), []
    except Exception as error:  # fx runs the model's own code, which may raise anything
        why = str(error).strip().split("\n")[0]
        return model, [f"nothing was folded into the layers: torch.fx cannot follow the model: {why}"]


def _swapped(model: nn.Module, decided: dict[str, _Decided]) -> nn.Module:
    """The model with its sparse layers; in a graph, with the sum and the activation behind each in it."""
    for name, d in decided.items():
        if d.fused is not None:
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent)._modules[key] = d.fused
    if isinstance(model, fx.GraphModule):
        modules = dict(model.named_modules())
        calls = [node.target for node in model.graph.nodes if node.op == "call_module"]
        for node in list(model.graph.nodes):
            if node.op == "call_module" and isinstance(modules[node.target], FusedLayer):
                if calls.count(node.target) == 1:  # a layer called twice may end in two ways
                    _absorb(model, modules, node)
        model.graph.lint()
        model.recompile()
    return model


def _absorb(model: fx.GraphModule, modules: dict[str, nn.Module], node: fx.Node) -> None:
    """The sum and the activation that alone read `node` become part of it."""
    after = _only_user(node)
    if after is not None and after.op in ("call_function", "call_method") and after.target in _ADD:
        others = [arg for arg in after.args if arg is not node]
        if len(after.args) == 2 and not after.kwargs and len(others) == 1 and isinstance(others[0], fx.Node):
            with model.graph.inserting_before(after):
                summed = model.graph.call_module(str(node.target), (node.args[0], others[0]))
            after.replace_all_uses_with(summed)
            model.graph.erase_node(after)
            model.graph.erase_node(node)
            node, after = summed, _only_user(summed)
    if after is None:
        return
    kind = type(modules[str(after.target)]) if after.op == "call_module" else after.target
    act = _RELU.get(kind) if after.op.startswith("call_") else None
    if act is not None and after.args and after.args[0] is node:
        layer = modules[str(node.target)]
        assert isinstance(layer, FusedLayer)
        layer.act = act
        after.replace_all_uses_with(node)
        model.graph.erase_node(after)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def check_outputs(outputs: Any, model: nn.Module, args: tuple[Any, ...]) -> tuple[float, float]:
    """The largest difference from `model` in float64 on the CPU, and what was allowed there.

    Raises:
        VerificationError: It is more.
    """

    def doubled(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        return a.cpu().double() if a.is_floating_point() else a.cpu()

    with torch.no_grad():
        expected = model.cpu().double()(*tree_map(doubled, args))
    worst = (0.0, 0.0)
    for place, (y, want) in enumerate(zip(tree_leaves(outputs), tree_leaves(expected), strict=True)):
        if not isinstance(y, Tensor) or not y.is_floating_point():
            continue
        tf32 = y.dtype == torch.float32 and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
        each = TOLERANCE[torch.float16] if tf32 else TOLERANCE.get(y.dtype, TOLERANCE[torch.float32])
        allowed = each * float(want.abs().max()) if want.numel() else 0.0
        error = float((y.cpu().double() - want).abs().max()) if want.numel() else 0.0
        if not error <= allowed:
            raise VerificationError(f"output {place}: differs by {error:.3g} from float64, allowed are {allowed:.3g}")
        worst = max(worst, (error, allowed))
    return worst


def _race(
    converted: Converted,
    sparse: GraphReplay,
    model: nn.Module,
    args: tuple[Any, ...],
    min_gain: float,
    device: torch.device,
) -> None:
    """The converted model against dense torch, both as CUDA graphs, contiguous and channels_last."""
    assert converted.report is not None

    def last(a: Any) -> Any:
        return a.contiguous(memory_format=torch.channels_last) if isinstance(a, Tensor) and a.dim() == 4 else a

    eager = GraphReplay(_folded(snapshot(unwrap(model), own=True))[0], device)
    moved: Any = _folded(snapshot(unwrap(model), own=True))[0]
    channels_last = GraphReplay(moved.to(memory_format=torch.channels_last), device)
    args_last = tree_map(last, args)
    timer = event_timer(device)
    with torch.no_grad():
        times = {
            "sparse": timer(partial(sparse, *args)),
            "eager": timer(partial(eager, *args)),
            "channels_last": timer(partial(channels_last, *args_last)),
        }
    best = min(("eager", "channels_last"), key=lambda name: times[name])
    gain = times[best] / times["sparse"]
    runs = "sparse" if gain >= min_gain else best
    reason = f"{gain:.2f} times the fastest of dense torch, all as CUDA graphs; min_gain is {min_gain}"
    converted.report = replace(converted.report, times_ms=times, runs=runs, reason=reason)
    if runs == "eager":
        converted.dense = eager
    elif runs == "channels_last":
        converted.dense = _LastCall(channels_last, last)


class _LastCall:
    def __init__(self, module: nn.Module, last: Callable[[Any], Any]) -> None:
        self.module, self.last = module, last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*tree_map(self.last, args), **kwargs)
