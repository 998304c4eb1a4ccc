"""Real layers one by one, at many sparsities: what we reach of what the machine can do, and from where on it pays.

    pip install '.[torch,bench]'
    python bench/layers.py --json layers.json --plot layers.png             # about ten minutes
    python bench/layers.py --full --json layers.json --resume               # every pattern at every sparsity
    python bench/layers.py --shapes '3x3 s1 64-64' --sparsity 0,0.9 --patterns 1x1,8x1
    python bench/layers.py --device cuda                                    # the same layers on a GPU: cuda_layers.py

`layer_shapes.py` says which layers. Ours is timed where it stands in a network: in a program between two cheap
operators, tuned as `convert` tunes it, its own time taken out. The dense ways, in torch: contiguous, channels_last, and
with the weight reordered beforehand, as `torch.compile` with freezing runs it (oneDNN; MKL too for linear layers); what
a call of a tiny layer takes is taken off their time. All take turns in short blocks, and the ratio to the fastest dense
is the median over the rounds. Zeros are random; a pattern Rx1 has them in R rows together.

Useful GFLOP/s: 2 x kept weights x output pixels / time / threads. `percent`: of the FMAs in registers (`fma`), of those
that load an operand (`l1`, `l2`, `l3`: from there, aligned), and how fast the packed weight goes by against reading a
buffer of the nearest size (`read`) and one of 1 GiB (`memory`). `bench/ceilings.cpp` measures them about ten times in
the same run. `packed_bytes` is what the plan holds (`Plan.weight_bytes`); packing has a time of its own, `pack_ms`. A
layer is `disturbed` where our threads and torch's waited for a core for over 3 % of the time: do not rely on it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import ceilings
import layer_summary
import numpy as np
import torch
import torch.nn.functional as F
from bench_options import need_json, positive, refuse, regex, resumed, shares, split_device
from layer_shapes import Layer, table
from numpy.typing import NDArray
from torch import Tensor

from sparseprune import _native, timing
from sparseprune.graph.ir import Graph, Input, Node, Weight

SPARSITIES = "0,0.5,0.6,0.7,0.8,0.9,0.95,0.98,0.99"
BLOCK_SPARSITIES = "0.5,0.7,0.95"
PATTERNS = "1x1,8x1"
ALL_PATTERNS = "1x1,4x1,8x1,16x1"
MIN_GAIN = 1.05  # as convert's
FEW = 8  # csrc/layout.h's kFewImages
DISTURBED = 0.03  # as benchmark's

Array = NDArray[np.float32]
Sample = Callable[[], float]  # runs once; milliseconds


def main(arguments: list[str] | None = None) -> int:
    device, arguments = split_device(sys.argv[1:] if arguments is None else arguments)
    if device == "cuda":
        import cuda_layers

        return cuda_layers.main(arguments, "layers.py --device cuda")
    parser = _parser()
    options = _options(parser, arguments)
    settings = {name: getattr(options, name) for name in
                ("sparsity", "block_sparsity", "patterns", "batch", "threads", "rounds", "seconds")}  # fmt: skip
    layers = {layer: networks for layer, networks in table(options.batch).items()
              if options.shapes.search(f"{layer.name} ({layer.group}: {', '.join(networks)})")}  # fmt: skip
    if not layers:
        parser.error(f"--shapes finds none of {len(table(options.batch))} layers")
    print(f"{len(layers)} distinct layers of {len({n for networks in layers.values() for n in networks})} networks")
    document = _begin(options, settings)
    done = {layer["name"] for layer in document["layers"]}
    every = max(1, len(layers) // 10)
    with timing.thread_count(options.threads), torch.inference_mode():
        for index, (layer, networks) in enumerate(layers.items()):
            if layer.name in done:
                continue
            if index % every == 0:
                _measure_ceilings(document, options.threads)
            cells = measure(layer, options)
            document["layers"].append(_record(layer, networks) | {"cells": cells})
            _save(document, options.json)
            print(f"{index + 1:3} of {len(layers)}  {_line(layer, cells)}", flush=True)
        _measure_ceilings(document, options.threads)
    _save(document, options.json)
    print(f"\n{layer_summary.summary(document)[1]}")
    if options.plot:
        layer_summary.plot(document, options.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda: cuda_layers.py runs, which has options of its "
                        "own (--device cuda --help)")  # fmt: skip
    parser.add_argument("--shapes", type=regex, default=re.compile(""), help="regular expression: layers whose name, "
                        "group or network it finds")  # fmt: skip
    parser.add_argument("--sparsity", type=shares, help=f"default {SPARSITIES}")
    parser.add_argument("--block-sparsity", type=shares, help="of the patterns but 1x1; default what is given as "
                        f"--sparsity, else {BLOCK_SPARSITIES}")  # fmt: skip
    parser.add_argument("--patterns", type=_patterns, help=f"default {PATTERNS}")
    parser.add_argument("--full", action="store_true", help=f"{ALL_PATTERNS}, all at every sparsity")
    parser.add_argument("--batch", type=positive, default=1, help="images, and inputs of linear layers (BERT: x 128)")
    parser.add_argument("--threads", type=positive, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--seconds", type=float, default=0.02, help="of a block (default 0.02)")
    parser.add_argument("--json", type=Path, help="written after each layer")
    parser.add_argument("--resume", action="store_true", help="keep what --json holds, measure the layers it lacks")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="speed-up against sparsity (needs matplotlib)")
    refuse(parser, "cuda", "--only", "--cases", "--dtype", "--tf32", "--compile")
    return parser


def _options(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    options.block_sparsity = options.block_sparsity or options.sparsity or shares(
        SPARSITIES if options.full else BLOCK_SPARSITIES
    )  # fmt: skip
    options.sparsity = options.sparsity or shares(SPARSITIES)
    options.patterns = options.patterns or _patterns(ALL_PATTERNS if options.full else PATTERNS)
    if not (options.seconds > 0 and math.isfinite(options.seconds)):
        parser.error(f"--seconds {options.seconds} must be positive")
    need_json(parser, options)
    if options.plot:
        if not options.plot.absolute().parent.is_dir():
            parser.error(f"{options.plot.parent} is not a folder")
        try:
            layer_summary.matplotlib()
        except RuntimeError as error:
            parser.error(str(error))
    return options


def _patterns(text: str) -> list[str]:
    for part in text.split(","):
        if not re.fullmatch(r"[1-9]\d?x1", part):
            raise argparse.ArgumentTypeError(f"{part!r} is no pattern: 1x1, or rows x 1 such as 8x1")
    return list(dict.fromkeys(text.split(",")))


# ---- the file ----


def _begin(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    fresh = {"settings": settings, "machine": timing.machine(), "ceilings": [], "layers": []}
    return resumed(options, settings) or fresh


def _save(document: dict[str, Any], path: Path | None) -> None:
    layer_summary.add_percents(document)
    document["summary"] = layer_summary.summary(document)[0]
    if path:
        beside = path.with_name(path.name + ".part")
        beside.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        beside.replace(path)


def _measure_ceilings(document: dict[str, Any], threads: int) -> None:
    timing.settle()
    try:
        document["ceilings"].append(ceilings.measure(threads))
    except RuntimeError as error:
        document["no_ceilings"] = str(error)
        print(error, file=sys.stderr)


def _record(layer: Layer, networks: list[str]) -> dict[str, Any]:
    return {"name": layer.name, "group": layer.group, "networks": networks, "pixels": layer.pixels, **asdict(layer)}


def _line(layer: Layer, cells: list[dict[str, Any]]) -> str:
    ratios = ", ".join(f"{c['pattern']} {100 * c['sparsity']:g} % {c['ratio']:.2f}" for c in cells)
    mark = "! " if any(c["disturbed"] for c in cells) else ""
    return f"{mark}{layer.name:32} {cells[0]['dense_ms']:8.3f} ms dense ({cells[0]['fastest_dense']}); times: {ratios}"


# ---- one layer ----


def measure(layer: Layer, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Its cells. All of one pattern take turns, with the dense ways, which therefore run once a pattern."""
    random = np.random.default_rng(0)
    weight = random.standard_normal(layer.weight_shape, np.float32)
    weight[weight == 0] = 1  # of many millions some are: a layer without zeros is stored otherwise than one with few
    bias = random.standard_normal(layer.outputs, np.float32)
    dense = dense_ways(layer, torch.from_numpy(weight), torch.from_numpy(bias))
    cells: list[dict[str, Any]] = []
    for pattern in options.patterns:
        rows = int(pattern.partition("x")[0])
        if rows > 1 and layer.group == "depthwise":
            continue  # a row has no company in its group
        order = np.repeat(random.random((-(-layer.outputs // rows), weight[0].size), np.float32), rows, axis=0)
        order = order[: layer.outputs].reshape(weight.shape)
        ours: list[Ours] = []
        for sparsity in options.sparsity if rows == 1 else options.block_sparsity:
            if sparsity > 0 or not any(cell["sparsity"] == 0 for cell in cells):  # without zeros all patterns are one
                kept = np.where(order >= sparsity, weight, np.float32(0))
                ours.append(Ours(layer, pattern if sparsity else layer_summary.DENSE, sparsity, kept, bias))
        if ours:
            cells += take_turns(layer, dense, ours, options)
    return cells


class Ours:
    """The layer with these zeros, as a node of a tuned program."""

    def __init__(self, layer: Layer, pattern: str, sparsity: float, weight: Array, bias: Array) -> None:
        graph, self.node = surrounded(layer, weight, bias)
        shape = tuple(int(size) for size in graph.inputs[0].shape)
        program = _native.Program(graph.to_bytes())
        start = time.perf_counter()
        dot = not layer.size and layer.rows < FEW  # has no variants, and tuning would pack it several times
        tuned = [] if dot else program.tune([shape], 2.0, MIN_GAIN)
        tuned_at = time.perf_counter()
        self.plan = program.plan([shape])  # tuning leaves none behind
        packed_at = time.perf_counter()
        self.x = np.random.default_rng(1).standard_normal(shape, np.float32)
        self.out = np.empty(self.plan.output_shapes[0], np.float32)
        self.plan.run([self.x], [self.out])
        error = check(layer, weight, bias, self.x, self.out)
        choice = self.plan.choices[self.node]
        assert choice is not None
        kept = int(np.count_nonzero(weight))
        # a dot product with all weights reads them where they are; the plan packs nothing
        packed = self.plan.weight_bytes or 4 * weight.size
        mine = next((t for t in tuned if t["node"] == self.node), None)
        own_dense = mine["dense_seconds"] if mine else None
        self.facts: dict[str, Any] = {
            "pattern": pattern,
            "sparsity": sparsity,
            "kept": kept,
            "choice": f"{choice['form']}/{choice['kind']}/{choice['vectors']}",
            "candidates": mine["candidates"] if mine else 1,
            "own_dense_ms": None if own_dense is None else 1e3 * own_dense,
            "tune_ms": 1e3 * (tuned_at - start),
            "pack_ms": 1e3 * (packed_at - tuned_at),
            "packed_bytes": packed,
            "bytes_per_kept": packed / max(kept, 1),
            "error": error,
        }

    def __call__(self) -> float:
        return 1e3 * self.plan.profile([self.x], [self.out])[self.node]


def surrounded(layer: Layer, weight: Array, bias: Array) -> tuple[Graph, int]:
    """A program around the layer, and its node's number.

    What comes before leaves its output as it lies inside a network; what comes after reads it so. Neither runs depth
    first with the layer. A stem reads the caller's array, as it does in a network.
    """
    weights, biases = {"w": Weight(weight)}, {"b": bias}
    if not layer.size:
        narrow = np.random.default_rng(2).standard_normal((8, layer.inputs + layer.outputs), np.float32)
        weights["before"] = Weight(np.ascontiguousarray(narrow[:, : layer.inputs].T))
        weights["after"] = Weight(np.ascontiguousarray(narrow[:, layer.inputs :]))
        names = (("before", None), ("w", "b"), ("after", None))
        nodes = [Node("linear", name, (i,), {}, name, b) for i, (name, b) in enumerate(names)]
        return _graph((layer.rows, 8), nodes, weights, biases), 1
    one = {"kernel": [1, 1], "stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "ceil_mode": False}
    before = [Node("max_pool", "plane", (0,), {"dims": 2, **one}), Node("maximum", "before", (1, 1))]
    nodes = [] if layer.group == "stem" else before
    sides = [p for p in layer.padding for _ in "ab"]
    attrs = {"dims": 2, "stride": [*layer.stride], "padding": sides, "dilation": [1, 1], "groups": layer.groups}
    nodes = [*nodes, Node("conv", "layer", (len(nodes),), attrs, "w", "b")]
    after = Node("maximum", "after", (len(nodes), len(nodes)))
    return _graph((layer.rows, layer.inputs, *layer.size), [*nodes, after], weights, biases), len(nodes) - 1


def _graph(shape: tuple[int, ...], nodes: list[Node], weights: dict[str, Weight], biases: dict[str, Array]) -> Graph:
    return Graph((Input("x", shape),), tuple(nodes), (len(nodes),), {"kind": "tensor"}, weights, biases)


def check(layer: Layer, weight: Array, bias: Array, x: Array, found: Array) -> float:
    """The largest error against torch, relative to the largest output. Raises where it is wrong."""
    w, b, expected = torch.from_numpy(weight), torch.from_numpy(bias), torch.from_numpy(x)
    if layer.size:
        expected = F.conv2d(expected, w, b, layer.stride, layer.padding, 1, layer.groups)
    else:
        graph, _ = surrounded(layer, weight, bias)
        for node in graph.nodes:
            used = b if node.bias else None
            expected = F.linear(expected, torch.from_numpy(graph.weights[str(node.weight)].dense), used)
    error = float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())
    if not error < 1e-3:
        raise AssertionError(f"{layer.name}: relative error {error}")
    return error


def dense_ways(layer: Layer, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Any]]:
    """Torch's calls of the layer, weights prepared."""
    if not layer.size:
        x, rows = torch.randn(layer.rows, layer.inputs), layer.rows
        onednn = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        ways: dict[str, Callable[[], Any]] = {
            "contiguous": lambda: F.linear(x, weight, bias),
            "onednn": lambda: torch.ops.mkldnn._linear_pointwise(x, onednn, bias, "none", [], ""),
        }
        if hasattr(torch.ops.mkl, "_mkl_linear"):
            mkl = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
            ways["mkl"] = lambda: torch.ops.mkl._mkl_linear(x, mkl, weight, bias, rows)
        return ways
    window = layer.stride, layer.padding, (1, 1), layer.groups
    x = torch.randn(layer.rows, layer.inputs, *layer.size)
    last = x.contiguous(memory_format=torch.channels_last)
    weight_last = weight.contiguous(memory_format=torch.channels_last)
    lists = [*layer.padding], [*layer.stride], [1, 1], layer.groups
    onednn = torch.ops.mkldnn._reorder_convolution_weight(weight, *lists, [*last.shape])
    return {
        "contiguous": lambda: F.conv2d(x, weight, bias, *window),
        "channels_last": lambda: F.conv2d(last, weight_last, bias, *window),
        "onednn": lambda: torch.ops.mkldnn._convolution_pointwise(last, onednn, bias, *lists, "none", [], ""),
    }


@cache
def call_ms(convolution: bool) -> float:
    """The least that a call takes: of a layer with next to nothing to do."""
    x, weight, bias = torch.randn(1, 4, 1, 1), torch.randn(4, 4, 1, 1), torch.randn(4)
    flat, matrix = x.flatten(1), weight.flatten(1)
    sample = _timed((lambda: F.conv2d(x, weight, bias)) if convolution else (lambda: F.linear(flat, matrix, bias)))
    return min(sample() for _ in range(1000))


def take_turns(
    layer: Layer, dense: dict[str, Callable[[], Any]], ours: list[Ours], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The cells of these; each candidate has one block a round, in rotating order."""
    candidates: list[Sample] = [*map(_timed, dense.values()), *ours]
    medians: list[list[float]] = [[] for _ in candidates]  # by candidate, of each round
    waits, start = sum(timing.run_queue_waits().values()), time.perf_counter()
    for turn in range(options.rounds):
        note = f"round {turn + 1} of {options.rounds}"
        print(f"{layer.name}: {ours[0].facts['pattern']}, {note:30}", end="\r", file=sys.stderr)
        for step in range(len(candidates)):
            number = (step + turn) % len(candidates)
            timing.settle()
            medians[number].append(block(candidates[number], options.seconds))
    waited = (sum(timing.run_queue_waits().values()) - waits) / 1e9 / (time.perf_counter() - start) / options.threads
    call = call_ms(bool(layer.size))
    overall = {name: statistics.median(rounds) for name, rounds in zip(dense, medians, strict=False)}
    fastest = min(overall, key=lambda name: overall[name])
    against = [max(ms - call, 0.0) for ms in medians[list(dense).index(fastest)]]
    return [own.facts | _figures(layer, own.facts["kept"], medians[len(dense) + index], against, options.threads)
            | {"dense_ms": statistics.median(against), "fastest_dense": fastest, "dense": overall, "call_ms": call,
               "waited": waited, "disturbed": waited > DISTURBED}
            for index, own in enumerate(ours)]  # fmt: skip


def _figures(layer: Layer, kept: int, rounds: list[float], dense: list[float], threads: int) -> dict[str, float]:
    ms = statistics.median(rounds)
    ratio = statistics.median(theirs / mine for theirs, mine in zip(dense, rounds, strict=True))
    return {"ms": ms, "min_ms": min(rounds), "gflops": 2e-6 * kept * layer.pixels / ms / threads, "ratio": ratio}


def _timed(call: Callable[[], Any]) -> Sample:
    def sample() -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    return sample


def block(sample: Sample, seconds: float) -> float:
    """The median of about that many seconds, three samples at least, after a warm-up of a quarter of that."""
    end = time.perf_counter() + seconds / 4
    sample()
    while time.perf_counter() < end:
        sample()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < end:
        taken.append(sample())
    return statistics.median(taken)


if __name__ == "__main__":
    sys.exit(main())
