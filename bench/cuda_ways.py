"""One layer on a GPU: its zeros, torch's ways of running it, our kernels', what `convert` makes of it, all checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import cuda_timing
import numpy as np
import torch
from cuda_timing import KINDS, Timer, Way, precision
from torch import Tensor, nn
from torch.nn import functional as F

from sparseprune import BlockCSR
from sparseprune.cuda_conversion import decide_layers
from sparseprune.cuda_layers import Activation, CudaLayer, Window, two_of_four

__all__ = ["Case", "check", "converted_ways", "measure", "measure_converted", "our_ways", "pruned", "summary",
           "torch_ways"]  # fmt: skip

MIN_GAIN = 1.05  # as convert's
LAST = " channels_last"

Times = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Case:
    """A layer, its zeros (whole blocks of rows x columns input channels of a tap) and its precision."""

    name: str
    weight: tuple[int, ...]
    x: tuple[int, ...]
    sparsity: float
    dtype: str = "float32"
    block: tuple[int, int] = (1, 1)
    window: Window = Window()
    tf32: bool = False
    at_least: float | None = None  # the ratio that issue 6 asks for, cold where `cold`
    cold: bool = False

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """The dense layer, without a bias: torch may run that as a kernel of its own, ours adds it on the way."""
        if weight.dim() == 2:
            return F.linear(x, weight)
        w = self.window
        return F.conv2d(x, weight, None, w.stride, w.padding, w.dilation, w.groups)


def pruned(case: Case) -> Tensor:
    """The float32 weight on the CPU."""
    random = np.random.default_rng(0)
    rows, columns = case.block
    places = (-(-case.weight[0] // rows), -(-case.weight[1] // columns), *case.weight[2:])
    order = random.random(places, np.float32)
    kept = order >= np.quantile(order, case.sparsity)
    kept = kept.repeat(rows, 0).repeat(columns, 1)[: case.weight[0], : case.weight[1]]
    return torch.from_numpy(np.where(kept, random.standard_normal(case.weight, np.float32), np.float32(0)))


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The input as torch lies by default and, where it has images, channels_last; by what a way's name ends in."""
    return {"": x} if x.dim() == 2 else {"": x, LAST: x.contiguous(memory_format=torch.channels_last)}


def torch_ways(case: Case, weight: Tensor, x: Tensor, compiled: bool) -> dict[str, Way]:
    """Everything of torch's; `weight` has the dtype and device of `x`. Sparse weights are made at the first call."""
    dense = {f"dense{note}": (given, layouts(weight)[note]) for note, given in layouts(x).items()}
    ways: dict[str, Way] = {name: partial(case.run, *tensors) for name, tensors in dense.items()}
    if weight.dim() == 2:
        ways |= _sparse_ways(weight, x)
    if compiled:
        torch._dynamo.reset()  # type: ignore[no-untyped-call]  # it gives up on a function compiled for many shapes
        # its own CUDA graphs are not needed: every way is captured
        fast = torch.compile(case.run, mode="max-autotune-no-cudagraphs", dynamic=False)
        ways |= {f"{name}, max-autotune": partial(fast, *tensors) for name, tensors in dense.items()}
    return ways


def _sparse_ways(weight: Tensor, x: Tensor) -> dict[str, Way]:
    column = x.t().contiguous()
    csr = cache(weight.to_sparse_csr)
    ways: dict[str, Way] = {"torch.sparse CSR": lambda: csr() @ column}
    if weight.shape[0] % 32 == 0 and weight.shape[1] % 32 == 0:
        bsr = cache(partial(weight.to_sparse_bsr, (32, 32)))
        ways["torch BSR 32x32"] = lambda: F.linear(x, bsr())
    if x.dtype != torch.float32 and two_of_four(weight.float().cpu().numpy()):
        semi = cache(partial(torch.sparse.to_sparse_semi_structured, weight))
        ways["torch 2:4"] = lambda: F.linear(x, semi())
    return ways


def our_ways(case: Case, weight: Tensor, x: Tensor) -> dict[str, Way]:
    """Every kernel of ours that takes the layer, in each layout; `weight` is float32."""
    layer = CudaLayer(BlockCSR.from_dense(weight), case.window)
    ways: dict[str, Way] = {}
    for note, given in layouts(x).items():
        for name, call in layer.candidates(given).items():
            if name not in ("dense", "2:4"):
                ways[name + note] = partial(call, given, None, None, Activation())
    return ways


def converted_ways(case: Case, weight: Tensor, x: Tensor) -> tuple[dict[str, Way], list[dict[str, Any]]]:
    """What `convert` decides for the layer in a network of either layout, by its own code and timer.

    Returns:
        Its sparse ways, and of each layout the way's name (`dense` in that layout: the layer stays torch's), the
        choice, why, and the milliseconds that it was chosen by.
    """
    ways: dict[str, Way] = {}
    choices: list[dict[str, Any]] = []
    for note, given in layouts(x).items():
        network = nn.Sequential(_module(case, layouts(weight)[note]))
        decided = decide_layers(network, (given,), True, MIN_GAIN)["0"]
        name = f"dense{note}" if decided.fused is None else f"{decided.report.choice}{note}"
        if decided.fused is not None:
            ways[name] = partial(decided.fused, given)
        told = {"choice": decided.report.choice, "reason": decided.report.reason}
        chosen_by = {"dense_ms": decided.report.dense_ms, "sparse_ms": decided.report.sparse_ms}
        choices.append({"way": name, "layout": note.strip() or "contiguous", **told, **chosen_by})
    return ways, choices


def _module(case: Case, weight: Tensor) -> nn.Module:
    module: nn.Conv2d | nn.Linear
    if weight.dim() == 2:
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        w, inputs = case.window, weight.shape[1] * case.window.groups
        kernel = (weight.shape[2], weight.shape[3])
        window = w.stride, w.padding, w.dilation, w.groups
        module = nn.Conv2d(inputs, weight.shape[0], kernel, *window, bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module.eval()


def check(case: Case, way: Way, weight: Tensor, x: Tensor) -> float:
    """The largest error relative to the largest output, against float64; raises where it is wrong.

    Of a convolution's images the first and the last are looked at: in float64 all would take longer than the rest.
    """
    rows = slice(None) if x.dim() == 2 else [0, -1]
    expected = case.run(x[rows].double(), weight.to(x.device).double())
    error = float((way()[rows].double() - expected).abs().max() / expected.abs().max())
    if not error < (1e-4 if case.dtype == "float32" and not case.tf32 else 2e-2):
        raise AssertionError(f"{case.name}: relative error {error}")
    return error


Prepared = Callable[[Tensor, Tensor], dict[str, Way]]


def _race(case: Case, ours: Prepared, compiled: bool, timer: Timer) -> tuple[Times, dict[str, Any]]:
    """Milliseconds of all ways, ours and torch's, and the facts beside: errors of ours, why some of torch's failed."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.x, device=cuda_timing.DEVICE).to(dtype)
    weight = pruned(case).to(x.device, dtype)
    with precision(case.tf32):
        mine = ours(weight, x)
        errors = {name: check(case, way, weight, x) for name, way in mine.items()}
        times, failed = timer(mine | torch_ways(case, weight, x, compiled))
    for name in failed:
        if name in mine or name == "dense":  # without these there is nothing to compare
            raise RuntimeError(f"{case.name}: {name}: {failed[name]}")
    return times, {"times_ms": times, "errors": errors, "failed": failed}


def measure(case: Case, compiled: bool, timer: Timer) -> dict[str, Any]:
    """All our kernels against all of torch's ways."""
    names: set[str] = set()

    def ours(weight: Tensor, x: Tensor) -> dict[str, Way]:
        ways = our_ways(case, weight.float(), x)
        names.update(ways)
        return ways

    times, facts = _race(case, ours, compiled, timer)
    return summary(case, times, names) | facts


def summary(case: Case, times: Times, ours: set[str]) -> dict[str, Any]:
    """The fastest of each side, cold and warm, and whether the case reaches what was asked."""
    result: dict[str, Any] = {"case": asdict(case)}
    for kind in KINDS:
        mine, other = fastest(times, ours, kind), fastest(times, set(times) - ours, kind)
        result[kind] = {"ours": mine, "other": other, "ratio": times[other][kind] / times[mine][kind]}
    asked = case.at_least
    result["reached"] = None if asked is None else bool(result["cold" if case.cold else "warm"]["ratio"] >= asked)
    return result


def measure_converted(case: Case, compiled: bool, timer: Timer) -> dict[str, Any]:
    """What `convert` makes of the layer against the fastest dense way: each side in the layout that suits it."""
    choices: list[dict[str, Any]] = []

    def ours(weight: Tensor, x: Tensor) -> dict[str, Way]:
        ways, found = converted_ways(case, weight, x)
        choices.extend(found)
        return ways

    times, facts = _race(case, ours, compiled, timer)
    result: dict[str, Any] = {"choices": choices}
    for kind in KINDS:
        mine = fastest(times, {choice["way"] for choice in choices} & set(times), kind)
        dense = fastest(times, {name for name in times if name.startswith("dense")}, kind)
        other = fastest(times, set(times) - set(facts["errors"]), kind)
        ms, dense_ms = times[mine][kind], times[dense][kind]
        result[kind] = {"ours": mine, "ms": ms, "dense": dense, "dense_ms": dense_ms, "ratio": dense_ms / ms,
                        "other": other, "other_ms": times[other][kind]}  # fmt: skip
    return result | facts


def fastest(times: Times, names: set[str], kind: str) -> str:
    return min(sorted(names), key=lambda name: times[name][kind])
