"""What `compact` gains in plain torch when half of the multiply-adds go, by random filters of all coupled layers.

    python bench/compact_speed.py --models DIR --prepare      # minutes; makes DIR/<network>.pt, and skips what is there
    python bench/compact_speed.py --models DIR --json out.json

The same share of filters goes from every group of coupled layers (the filters that are added to each other, a depthwise
layer with the one before it), as many as halve the multiply-adds. Masked and compacted model, eager and channels_last,
take turns in short blocks; medians. The masked model is as fast as the dense one: it multiplies its zeros.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from sparseprune import timing, zoo
from sparseprune.pruning import compact, summary
from sparseprune.pruning.coupling import Coupling, couple
from sparseprune.pruning.removal_plan import flags_of
from sparseprune.synthetic import fit_scale

NETWORKS = "resnet18-32,resnet18,vgg16-bn,mobilenetv2"
Bools = NDArray[np.bool_]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=NETWORKS, help=f"names, separated by commas (default {NETWORKS})")
    parser.add_argument("--models", type=Path, required=True, help="folder of the prepared models")
    parser.add_argument("--prepare", action="store_true", help="make the models; nothing is timed")
    parser.add_argument("--left", type=float, default=0.5, help="share of the multiply-adds that is left")
    parser.add_argument("--multiple", type=int, default=1, help="compact's multiple_of")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.25, help="of each block")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.models.mkdir(parents=True, exist_ok=True)
    results = []
    for name in args.networks.split(","):
        path = args.models / f"{name}-{args.left:g}-{args.multiple}.pt"
        if args.prepare:
            if not path.exists():
                masked, small = prepared(name, args.left, args.multiple)
                beside = path.with_suffix(".tmp")
                torch.save((masked, small), beside)
                beside.rename(path)
            continue
        masked, small = torch.load(path, weights_only=False)
        results.append(measured(name, masked, small, args))
        print(line(results[-1]), flush=True)
    if args.json is not None and not args.prepare:
        args.json.write_text(json.dumps({"machine": timing.machine(), "results": results}, indent=1))


def example(name: str) -> torch.Tensor:
    return torch.randn(1, *zoo.NETWORKS[name].input_shape, generator=torch.Generator().manual_seed(0))


def prepared(name: str, left: float, multiple: int) -> tuple[nn.Module, nn.Module]:
    """The masked and the compacted model."""
    model, x = zoo.NETWORKS[name].factory().eval(), example(name)
    fit_scale(model, [x])
    macs = {layer.name: layer.macs or 0 for layer in summary(model, x).layers}
    coupling = couple(copy.deepcopy(model), (x,))
    target, small = left, None
    for _ in range(3):  # constants that stay are not foreseen
        removed = halved(coupling, macs, target, multiple)
        masked = copy.deepcopy(model)
        with torch.no_grad():
            for layer, components in coupling.out.items():
                weight = masked.get_submodule(layer).weight
                weight[flags_of(components, removed)] = 0  # type: ignore[operator, index]
        small = compact(masked, x, multiple_of=multiple)
        found = (summary(small, x).macs or 0) / sum(macs.values())
        if found <= left:
            break
        target -= found - left
    assert small is not None
    print(f"{name}\n{small.compact_report}", flush=True)
    return masked, small


def halved(coupling: Coupling, macs: dict[str, int], left: float, multiple: int) -> Bools:
    """As many components as leave this share of the multiply-adds."""
    low, high = 0.0, 1.0
    for _ in range(20):
        share = (low + high) / 2
        if counted(coupling, chosen(coupling, share, multiple), macs) > left * sum(macs.values()):
            low = share
        else:
            high = share
    return chosen(coupling, high, multiple)


def chosen(coupling: Coupling, share: float, multiple: int) -> Bools:
    """The same share of every group of components, at random; never all of them."""
    removed = np.zeros(coupling.size, bool)
    generator = np.random.default_rng(0)
    for group in coupling.groups():
        own = generator.permutation([component for component in group if component not in coupling.blocked])
        kept = max(multiple, round(len(own) * (1 - share) / multiple) * multiple)
        kept -= multiple > 1  # room for a constant that stays; without one, compact keeps another
        removed[own[kept:].astype(np.int64)] = True
    return removed


def counted(coupling: Coupling, removed: Bools, macs: dict[str, int]) -> float:
    """Multiply-adds that are left."""
    total = 0.0
    for name, layer in coupling.layers.items():
        outputs = 1 - flags_of(coupling.out[name], removed).mean()
        depthwise = int(getattr(layer, "groups", 1)) > 1
        inputs = 1.0 if depthwise else 1 - flags_of(coupling.into[name], removed).mean()
        total += macs[name] * outputs * inputs
    return total


def measured(name: str, masked: nn.Module, small: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    x = example(name)
    last = x.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], Any]] = {}
    for label, model in (("masked", masked), ("compact", small)):
        other: Any = copy.deepcopy(model)
        other.to(memory_format=torch.channels_last)
        calls[f"{label}, eager"] = partial(model, x)
        calls[f"{label}, channels_last"] = partial(other, last)
    with torch.inference_mode(), timing.thread_count(args.threads):
        with tqdm(total=args.rounds * len(calls), leave=False) as bar:
            taken = timing.take_turns(calls, args.rounds, args.seconds, bar)
    ms = {label: statistics.median(samples.ms) for label, samples in taken.items()}
    before, after = summary(masked, x), summary(small, x)
    with torch.inference_mode():
        y, want = small(x), masked(x)
    return {
        "network": name, "threads": args.threads, "ms": ms, "macs": [before.macs, after.macs],
        "parameters": [before.total, after.total],
        "difference": float((y - want).abs().max() / want.abs().max()),
    }  # fmt: skip


def line(result: dict[str, Any]) -> str:
    ms, (before, after) = result["ms"], result["macs"]
    pairs = [(ms[f"masked, {way}"], ms[f"compact, {way}"]) for way in ("eager", "channels_last")]
    ways = "; ".join(
        f"{way} {a:.2f} -> {b:.2f} ms, {a / b:.2f}x"
        for way, (a, b) in zip(("eager", "channels_last"), pairs, strict=True)
    )
    fastest = [min(column) for column in zip(*pairs, strict=True)]
    return (f"{result['network']}, {result['threads']} threads: {after / before:.1%} of the multiply-adds; {ways}; "
            f"fastest {fastest[0] / fastest[1]:.2f}x; outputs differ by {result['difference']:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
