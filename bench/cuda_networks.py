"""Whole networks on a GPU: `sparseprune.convert` against dense torch at its best, at several sparsities and batches.

    python bench/networks.py --device cuda --json networks.json
    python bench/networks.py --device cuda resnet50 --sparsity 0.95 --batch 64 --tf32 off --compile
    python bench/networks.py --device cuda resnet50,vgg16 --dtype float16,bfloat16 --batch 1,16,64

Each candidate has its batch normalisation folded and is replayed as a CUDA graph, inputs copied in and outputs cloned
out, as a converted model does; one that cannot be captured runs as it is, and its row says so. Dense is eager torch,
contiguous and channels_last, with `cudnn.benchmark`, and with `--compile` both as `torch.compile` makes them
(max-autotune, frozen; minutes). Ours are models converted contiguous and channels_last. All take turns, between events,
with the second-level cache as the last replay left it (`median ms`, `min ms`) and flushed (`cold ms`). Float32 is
measured without TF32 and with, for all candidates alike. Errors are to the same network in float64; ours fails beyond
the bound that `convert` verifies.

The first case is issue 6's: ResNet-50, 95 %, batch 64, float32 without TF32, asked at least 2 times. Needs a CUDA
device and the extension `_cuda`; exits with 2 where there is none.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cuda_timing
import torch
from bench_options import positive, positives, refuse, shares, some_of
from cuda_timing import KINDS, Events, Sample, Way, device_facts, precision, precision_name, precisions
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.utils._pytree import tree_leaves

import sparseprune
from sparseprune.cli_common import write
from sparseprune.cuda_conversion import TOLERANCE
from sparseprune.cuda_graphs import GraphReplay
from sparseprune.synthetic import fit_scale
from sparseprune.zoo import NETWORKS as ZOO

NETWORKS = ("resnet50", "resnet18-32", "yolov4-tiny", "vgg16", "mobilenetv2")
DENSE = ("eager", "channels_last")
COMPILED = ("compile_max_autotune", "compile_max_autotune_channels_last")
OURS = ("sparseprune", "sparseprune_channels_last")


@dataclass(frozen=True)
class Case:
    network: str
    sparsity: float
    batch: int
    dtype: str
    tf32: bool

    @property
    def asked(self) -> float | None:
        """The ratio that issue 6 asks for."""
        return 2.0 if self == Case("resnet50", 0.95, 64, "float32", False) else None

    @property
    def title(self) -> str:
        about = precision_name(self.dtype, self.tf32)
        return f"{self.network}, {100 * self.sparsity:g} % zeros, batch {self.batch}, {about}"


def main(arguments: list[str] | None = None, program: str | None = None) -> int:
    """Exit status: 0 where all was measured, whatever came out; 2 where nothing can be, or options are wrong."""
    parser = _parser(program)
    options = parser.parse_args(arguments)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"{options.json.parent} is not a folder")
    if why := cuda_timing.unready():
        print(why, file=sys.stderr)
        return 2
    results, sample, machine = [], Events(), device_facts()
    for case in cases(options):
        results.append(measure(case, options.compile, options.rounds, sample) | {"machine": machine})
        print(table(case, results[-1]), flush=True)
        if options.json:
            write(options.json, json.dumps(results, indent=2, allow_nan=False) + "\n")
        torch.cuda.empty_cache()
    return 0


def _parser(program: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="?", type=some_of(*ZOO), default=list(NETWORKS), help="names, separated by "
                        f"commas (default {','.join(NETWORKS)})")  # fmt: skip
    parser.add_argument("--sparsity", type=shares, default=[0.95, 0.98], help="default 0.95,0.98")
    parser.add_argument("--batch", type=positives, default=[64, 1], help="default 64,1")
    parser.add_argument("--dtype", type=some_of(*cuda_timing.DTYPES), default=["float32"], help="of "
                        f"{', '.join(cuda_timing.DTYPES)} some; default float32")  # fmt: skip
    parser.add_argument("--tf32", type=some_of("off", "on"), default=["off", "on"], help="for float32; default off,on")
    parser.add_argument("--compile", action="store_true", help="torch.compile's max-autotune too; takes minutes")
    parser.add_argument("--rounds", type=positive, default=30)
    parser.add_argument("--json", type=Path, help="written after each case")
    refuse(parser, "cpu", "--threads", "--only", "--seconds")
    return parser


def cases(options: argparse.Namespace) -> list[Case]:
    """All combinations, the one that issue 6 asks for first where it is among them."""
    found = [
        Case(network, sparsity, batch, dtype, tf32)
        for network in options.networks
        for batch in options.batch
        for dtype, tf32 in precisions(options.dtype, options.tf32)
        for sparsity in options.sparsity
    ]
    return sorted(found, key=lambda case: case.asked is None)


def measure(case: Case, compiled: bool, rounds: int, sample: Sample) -> dict[str, Any]:
    """Milliseconds of all candidates, and their largest differences to float64; why those failed that did."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in (*DENSE, *(COMPILED if compiled else ()), *OURS)}
    ways: dict[str, Way] = {}
    with precision(case.tf32):
        model, x = pruned(case)
        expected = tree_leaves(copy.deepcopy(model).double()(x.double()))
        if compiled:
            torch._dynamo.reset()  # type: ignore[no-untyped-call]  # it gives up on a function compiled for many shapes
        for name, row in rows.items():
            print(f"\rprepare {name:40}", end="", file=sys.stderr, flush=True)
            try:
                way, facts = prepare(name, model, x)
                row["max_abs_error"] = difference(way(), expected, _bound(case) if name in OURS else math.inf)
                row |= facts()
                ways[name] = way
            except Exception as error:  # the others are worth measuring all the same
                row["failure"] = cuda_timing.line(error)
        print(f"\r{rounds} rounds of {case.title:60}", end="", file=sys.stderr, flush=True)
        taken = cuda_timing.take_turns(ways, rounds, sample)
    print("\r" + " " * 80, end="\r", file=sys.stderr)
    for name, times in taken.items():
        warm, cold = (times[kind] for kind in KINDS)
        rows[name] |= {"median_ms": statistics.median(warm), "min_ms": min(warm), "cold_ms": statistics.median(cold),
                       "samples": len(warm)}  # fmt: skip
    return {**asdict(case), "asked": case.asked, **summary(rows, case.asked), "rows": rows}


def pruned(case: Case) -> tuple[nn.Module, Tensor]:
    """The network with its zeros and an input, in the case's precision on the device."""
    network = ZOO[case.network]
    torch.manual_seed(0)
    x = torch.randn(case.batch, *network.input_shape)
    model = sparseprune.prune_uniform(network.factory(), case.sparsity, exclude=network.keep_dense).eval()
    fit_scale(model, (x[:8],))
    to = {"device": cuda_timing.DEVICE, "dtype": getattr(torch, case.dtype)}
    return model.requires_grad_(False).to(**to), x.to(**to)


def prepare(name: str, model: nn.Module, x: Tensor) -> tuple[Way, Callable[[], dict[str, Any]]]:
    """A candidate's call, and what is to be told of it after the first call, why there is no CUDA graph too."""
    fast: nn.Module
    told: dict[str, Any]
    if name.endswith("channels_last"):
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    if name in OURS:
        fast = module = sparseprune.convert(model, x, verify=False)
        report = module.report
        sparse = sum(layer.choice not in ("torch", "dense") for layer in report.layers)
        told = {"runs": report.runs, "reason": report.reason, "notes": list(report.notes), "sparse_layers": sparse,
                "layers": len(report.layers)}  # fmt: skip
        replay = module._converted.runs if module._converted is not None else None
    else:
        dense, told = folded(model), {}
        fast = replay = GraphReplay(_compiled(dense, x) if name in COMPILED else dense, x.device)
    assert isinstance(replay, GraphReplay), f"convert made {type(replay).__name__}, no module on {x.device}"
    return partial(fast, x), lambda: told | {"no_graph": replay.failure}


def folded(model: nn.Module) -> nn.Module:
    """Batch normalisation in the convolutions before it, where torch.fx can follow the model; else a copy."""
    try:
        return fuse(model)
    except Exception:  # fx runs the model's own code, which may raise anything
        return copy.deepcopy(model)


def _compiled(model: nn.Module, x: Tensor) -> nn.Module:
    from torch._inductor import config

    # without its own CUDA graphs: the call is captured as all others are
    fast: Any = torch.compile(model, mode="max-autotune-no-cudagraphs", dynamic=False)
    with config.patch(freezing=True):
        for _ in range(2):  # the first call compiles
            fast(x)
    assert isinstance(fast, nn.Module)
    return fast


def difference(found: Any, expected: list[Tensor], bound: float) -> float:
    """The largest one. Raises where it is no number, or beyond `bound` of an output's largest."""
    worst = 0.0
    for y, want in zip(tree_leaves(found), expected, strict=True):
        error, largest = float((y.double() - want).abs().max()), float(want.abs().max())
        if not (math.isfinite(error) and error <= bound * largest):
            raise AssertionError(f"outputs differ by {error:.3g} from float64, where {largest:.3g} is the largest")
        worst = max(worst, error)
    return worst


def _bound(case: Case) -> float:
    return TOLERANCE[torch.float16 if case.tf32 else getattr(torch, case.dtype)]  # as convert verifies


def summary(rows: dict[str, dict[str, Any]], asked: float | None) -> dict[str, Any]:
    """The fastest of each side and the ratio, warm and flushed, and whether that asked for is reached."""

    def fastest(names: tuple[str, ...], key: str) -> str | None:
        times = {name: float(rows[name][key]) for name in names if key in rows.get(name, {})}
        return min(times, key=lambda name: times[name], default=None)

    found: dict[str, Any] = {}
    for prefix, key in (("", "median_ms"), ("cold_", "cold_ms")):
        dense, ours = fastest((*DENSE, *COMPILED), key), fastest(OURS, key)
        ratio = rows[dense][key] / rows[ours][key] if dense and ours else None
        found |= {f"{prefix}fastest_dense": dense, f"{prefix}fastest_ours": ours, f"{prefix}ratio": ratio}
    found["reached"] = None if asked is None or found["ratio"] is None else bool(found["ratio"] >= asked)
    return found


def table(case: Case, result: dict[str, Any]) -> str:
    lines = [case.title, f"  {'':36} {'median ms':>10} {'min ms':>10} {'cold ms':>10} {'max abs error':>14}"]
    for name, row in result["rows"].items():
        if "median_ms" not in row:
            lines.append(f"  {name:36} failed: {row.get('failure', 'no sample')}")
            continue
        times = " ".join(f"{row[key]:10.3f}" for key in ("median_ms", "min_ms", "cold_ms"))
        note = f"  {row['sparse_layers']} of {row['layers']} layers sparse; runs {row['runs']}" if "runs" in row else ""
        note += f"  no CUDA graph: {row['no_graph']}" if row["no_graph"] else ""
        lines.append(f"  {name:36} {times} {row['max_abs_error']:14.2e}{note}")
    if result["ratio"]:
        asked = f"; asked {case.asked:g}: {'reached' if result['reached'] else 'missed'}" if case.asked else ""
        cold = f"cold {result['cold_ratio']:.2f} times {result['cold_fastest_dense']}"
        lines.append(f"  {result['fastest_ours']} is {result['ratio']:.2f} times the fastest dense, "
                     f"{result['fastest_dense']} ({cold}){asked}")  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
