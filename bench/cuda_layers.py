"""Single layers on a GPU: our kernels against every dense and sparse way that torch has, in one run.

    python bench/cuda_layers.py [--json FILE] [--cases REGEX] [--compile]

Every way is captured in a CUDA graph and replayed between events, with the second-level cache flushed before a replay
and without. Dense ways run with `cudnn.benchmark`, contiguous and channels_last; each case states whether TF32 is
allowed. Ratios are to the fastest way that is not ours of the same precision. Needs a CUDA device and the extension.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparseprune import BlockCSR
from sparseprune.cli_common import write
from sparseprune.cuda_layers import Activation, CudaLayer, Window, two_of_four

Way = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A layer, its zeros (whole blocks of rows x columns input channels of a tap) and its precision."""

    name: str
    weight: tuple[int, ...]
    x: tuple[int, ...]
    sparsity: float
    dtype: str = "float32"
    block: tuple[int, int] = (1, 1)
    padding: int = 0
    tf32: bool = False
    at_least: float | None = None  # the ratio that issue 6 asks for, cold where `cold`
    cold: bool = False


def cases() -> list[Case]:
    found = []
    for dtype, asked in (("float32", (2.5, 4, 6)), ("float16", (1.5, 2, 2.5))):
        for sparsity, ratio in zip((0.8, 0.9, 0.95), asked, strict=True):
            name = f"linear 4096-4096, batch 1, {dtype}, {sparsity:.0%}"
            found.append(Case(name, (4096, 4096), (1, 4096), sparsity, dtype, at_least=ratio, cold=True))
    conv = (256, 256, 3, 3), (64, 256, 14, 14)
    for sparsity, ratio in zip((0.9, 0.95, 0.98), (1.8, 3, 5), strict=True):
        found.append(Case(f"conv 3x3 256, float32, {sparsity:.0%}", *conv, sparsity, padding=1, at_least=ratio))
    for sparsity, ratio in zip((0.8, 0.9, 0.95), (1.3, 2.3, 3.5), strict=True):
        name = f"conv 3x3 256, bfloat16, 32x32 blocks, {sparsity:.0%}"
        found.append(Case(name, *conv, sparsity, "bfloat16", (32, 32), 1, at_least=ratio))
    found.append(Case("conv 3x3 256, TF32, 16x1 vectors, 90%", *conv, 0.9, "float32", (16, 1), 1, tf32=True))
    found.append(Case("conv 3x3 256, strict float32, 16x1 vectors, 90%", *conv, 0.9, "float32", (16, 1), 1))
    found.append(Case("conv 3x3 256, float32, 4x1, 90%", *conv, 0.9, "float32", (4, 1), 1))
    found.append(Case("conv 1x1 256-64 at 56, bfloat16, 90%", (64, 256, 1, 1), (64, 256, 56, 56), 0.9, "bfloat16"))
    found.append(Case("linear 768-3072, 128 inputs, float16, 95%", (3072, 768), (128, 768), 0.95, "float16"))
    return found


def pruned(case: Case) -> Tensor:
    """The float32 weight on the CPU."""
    random = np.random.default_rng(0)
    rows, columns = case.block
    places = (-(-case.weight[0] // rows), -(-case.weight[1] // columns), *case.weight[2:])
    order = random.random(places, np.float32)
    kept = order >= np.quantile(order, case.sparsity)
    kept = kept.repeat(rows, 0).repeat(columns, 1)[: case.weight[0], : case.weight[1]]
    return torch.from_numpy(np.where(kept, random.standard_normal(case.weight, np.float32), np.float32(0)))


def torch_ways(case: Case, weight: Tensor, x: Tensor, compiled: bool) -> dict[str, Way]:
    """Everything of torch's; `weight` has the dtype and device of `x`."""
    if weight.dim() == 2:
        ways: dict[str, Way] = {"dense": lambda: F.linear(x, weight)}
        column = x.t().contiguous()
        csr = weight.to_sparse_csr()
        ways["torch.sparse CSR"] = lambda: csr @ column
        if weight.shape[0] % 32 == 0 and weight.shape[1] % 32 == 0:
            bsr = weight.to_sparse_bsr((32, 32))
            ways["torch BSR 32x32"] = lambda: F.linear(x, bsr)
        if x.dtype != torch.float32 and two_of_four(weight.float().cpu().numpy()):
            semi = torch.sparse.to_sparse_semi_structured(weight)
            ways["torch 2:4"] = lambda: F.linear(x, semi)
    else:
        last = torch.channels_last
        x_last, weight_last = x.contiguous(memory_format=last), weight.contiguous(memory_format=last)
        ways = {
            "dense": lambda: F.conv2d(x, weight, None, 1, case.padding),
            "dense channels_last": lambda: F.conv2d(x_last, weight_last, None, 1, case.padding),
        }
    if compiled:
        for name in [name for name in ways if name.startswith("dense")]:
            ways[f"{name}, max-autotune"] = torch.compile(ways[name], mode="max-autotune-no-cudagraphs")
    return ways


def our_ways(case: Case, weight: Tensor, x: Tensor) -> dict[str, Way]:
    layer = CudaLayer(BlockCSR.from_dense(weight), Window(padding=(case.padding, case.padding)))
    inputs = {"": x}
    if x.dim() == 4:
        inputs[" channels_last"] = x.contiguous(memory_format=torch.channels_last)
    ways: dict[str, Way] = {}
    for note, given in inputs.items():
        for name, call in layer.candidates(given).items():
            if name not in ("dense", "2:4"):
                ways[name + note] = partial(call, given, None, None, Activation())
    return ways


def check(case: Case, way: Way, weight: Tensor, x: Tensor) -> float:
    """The largest error relative to the largest output, against float64; raises where it is wrong."""
    w, x = weight.double().to(x.device), x.double()
    expected = F.linear(x, w) if w.dim() == 2 else F.conv2d(x, w, None, 1, case.padding)
    error = float((way().double() - expected).abs().max() / expected.abs().max())
    if not error < (1e-4 if case.dtype == "float32" and not case.tf32 else 2e-2):
        raise AssertionError(f"{case.name}: relative error {error}")
    return error


def graph_times(way: Way, rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of a replay: `warm`, right after another one, and `cold`, after the cache was flushed."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            way()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            way()
        scratch = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # beyond any second-level cache
        times: dict[str, float] = {}
        for kind in ("warm", "cold"):
            taken = []
            for _ in range(rounds):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")  # type: ignore[no-untyped-call]
                if kind == "cold":
                    scratch.zero_()
                else:
                    graph.replay()
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                taken.append(start.elapsed_time(end))
            times[kind] = statistics.median(taken)
    return times


def measure(case: Case, compiled: bool, timer: Callable[[Way], dict[str, float]] = graph_times) -> dict[str, Any]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case.tf32
    torch.backends.cudnn.benchmark = True
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.x, device="cuda").to(dtype)
    weight = pruned(case).to(dtype).float()
    ours = our_ways(case, weight, x)
    errors = {name: check(case, way, weight, x) for name, way in ours.items()}
    failed: dict[str, str] = {}
    times: dict[str, dict[str, float]] = {}
    theirs = torch_ways(case, weight.to(x.device, dtype), x, compiled)
    for name, way in (ours | theirs).items():
        try:
            times[name] = timer(way)
        except Exception as error:  # a way of torch's that this shape, build or a capture does not take
            if name in ours:
                raise
            failed[name] = f"{type(error).__name__}: {error}"
    return summary(case, times, set(ours)) | {"errors": errors, "failed": failed}


def summary(case: Case, times: dict[str, dict[str, float]], ours: set[str]) -> dict[str, Any]:
    """The fastest of each side, cold and warm, and whether the case reaches what was asked."""
    result: dict[str, Any] = {"case": asdict(case), "times_ms": times}
    for kind in ("warm", "cold"):
        mine = min(ours, key=lambda name: times[name][kind])
        other = min((name for name in times if name not in ours), key=lambda name: times[name][kind])
        ratio = times[other][kind] / times[mine][kind]
        result[kind] = {"ours": mine, "other": other, "ratio": ratio}
    asked = case.at_least
    result["reached"] = None if asked is None else bool(result["cold" if case.cold else "warm"]["ratio"] >= asked)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", default="", help="a regular expression: only the cases whose name has it")
    parser.add_argument("--compile", action="store_true", help="torch.compile's max-autotune too; takes minutes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing can be measured", file=sys.stderr)
        return 2
    results = []
    for case in cases():
        if re.search(options.cases, case.name):
            results.append(measure(case, options.compile))
            ends = [f"{k} {results[-1][k]['ratio']:.2f}x ({results[-1][k]['ours']})" for k in ("warm", "cold")]
            asked = "" if case.at_least is None else f"; asked {case.at_least}x {'cold' if case.cold else 'warm'}"
            print(f"{case.name}: {', '.join(ends)}{asked}", flush=True)
    if options.json:
        device = torch.cuda.get_device_name()
        write(options.json, json.dumps({"device": device, "torch": torch.__version__, "layers": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
