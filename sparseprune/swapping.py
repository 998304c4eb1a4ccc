"""Single sparse layers inside a torch model: for models that `torch.export` cannot follow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _native
from .bsr import BlockCSR
from .nn import SparseConv2d, SparseLinear
from .report import LayerReport

__all__ = ["Swapped", "swap_layers"]

_MOST_DENSITY = 0.4  # above, dense layers are kept where nothing is timed
_WORTH_TIMING = 0.9  # nothing is timed above this density


@dataclass(frozen=True)
class Swapped:
    """What to swap.

    Attributes:
        sparse: The sparse layer for each qualified name.
        layers: Every convolution and linear layer that ran.
    """

    sparse: dict[str, nn.Module]
    layers: tuple[LayerReport, ...]

    @property
    def count(self) -> int:
        return len(self.sparse)

    def apply(self, model: nn.Module) -> nn.Module:
        """Puts the layers into a copy of the model; returns it."""
        by_id = {id(model.get_submodule(name)): layer for name, layer in self.sparse.items()}
        for parent in list(model.modules()):
            for key, child in parent._modules.items():
                if id(child) in by_id:
                    parent._modules[key] = by_id[id(child)]
        return by_id.get(id(model), model)


def swap_layers(model: nn.Module, args: tuple[Any, ...], measure: bool, min_gain: float, verify: bool) -> Swapped:
    """Runs `model` once and decides for each plain `nn.Conv2d` and `nn.Linear` in it, on its actual input.

    Layers of a subclass or with hooks, and those that the example does not reach by a call, stay as they are.
    """
    decide = _Decider(measure, min_gain, verify)
    hooks = []
    for name, layer in model.named_modules():
        if type(layer) in (nn.Conv2d, nn.Linear):
            hooked = layer._forward_hooks or layer._forward_pre_hooks
            if not hooked and layer.weight.dtype == torch.float32:
                hooks.append(layer.register_forward_hook(decide.hook(name)))
    threads = torch.get_num_threads()
    torch.set_num_threads(_native.num_threads())
    try:
        with torch.no_grad():
            model(*args)
    finally:
        torch.set_num_threads(threads)
        for hook in hooks:
            hook.remove()
    return Swapped(decide.sparse, tuple(decide.layers))


class _Decider:
    def __init__(self, measure: bool, min_gain: float, verify: bool) -> None:
        self.measure, self.min_gain, self.verify = measure, min_gain, verify
        self.sparse: dict[str, nn.Module] = {}
        self.layers: list[LayerReport] = []
        self.packed: dict[int, BlockCSR] = {}  # by the parameter: tied ones are packed once

    def hook(self, name: str) -> Callable[..., None]:
        seen: list[str] = []

        def note(layer: Any, args: tuple[Any, ...], output: Any) -> None:
            if not seen and len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                seen.append(name)
                self._decide(name, layer, args[0])

        return note

    def _decide(self, name: str, layer: Any, x: Tensor) -> None:
        weight = layer.weight
        packed = self.packed.setdefault(id(weight), BlockCSR.from_dense(weight))
        dense_ms = sparse_ms = error = None
        sparse: nn.Module | None = None
        if not isinstance(layer, nn.Conv2d):
            sparse = SparseLinear.from_linear(layer, packed)
        elif layer.padding_mode == "zeros":
            sparse = SparseConv2d.from_conv2d(layer, packed)
        if sparse is None:
            reason = f"padding_mode={layer.padding_mode!r}"
        elif x.dtype != torch.float32 or x.numel() == 0:
            sparse, reason = None, f"its input is {x.dtype}, {tuple(x.shape)}"
        elif self.measure and packed.density <= _WORTH_TIMING:
            candidate = sparse
            dense_ms, sparse_ms = _times([lambda: layer.forward(x), lambda: candidate(x)])
            wins = dense_ms >= self.min_gain * sparse_ms
            reason = f"{dense_ms / sparse_ms:.2f} times torch's layer; min_gain is {self.min_gain}"
            sparse = sparse if wins else None
        elif packed.density > (_WORTH_TIMING if self.measure else _MOST_DENSITY):
            sparse, reason = None, f"{packed.density:.0%} of its weights are kept"
        else:
            reason = f"at most {_MOST_DENSITY:.0%} of its weights are kept; nothing was timed"
        if sparse is not None:
            self.sparse[name] = sparse
            if self.verify:
                error = _error(layer, sparse, x)
        self.layers.append(
            LayerReport(
                name=name,
                op="conv" if isinstance(layer, nn.Conv2d) else "linear",
                shape=tuple(weight.shape),
                sparsity=1 - packed.density,
                block_density=packed.block_density,
                dense_ms=dense_ms,
                sparse_ms=sparse_ms,
                choice="torch" if sparse is None else "sparse layer",
                reason=reason,
                error=error,
            )
        )


def _times(calls: list[Callable[[], Any]], blocks: int = 3, runs: int = 5) -> list[float]:
    """Median milliseconds of each, in short blocks by turns, with pauses for others' threads to stop spinning."""
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(blocks):
        for call, taken in zip(calls, samples, strict=True):
            time.sleep(0.002)
            call()
            for _ in range(runs):
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
    return [1e3 * statistics.median(taken) for taken in samples]


def _error(layer: Any, sparse: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        bias = None if layer.bias is None else layer.bias.double()
        if isinstance(layer, nn.Linear):
            expected = nn.functional.linear(x.double(), layer.weight.double(), bias)
        else:
            expected = layer._conv_forward(x.double(), layer.weight.double(), bias)
        return float((sparse(x).double() - expected).abs().max())
