"""Filter pruning by magnitude of an SSD detector, down to a tenth of the channels, removed for real.

    python examples/filter_pruning_ssd.py              # trains, prunes row by row, compacts, converts, times
    python examples/filter_pruning_ssd.py --fast       # the same in miniature, under a minute: shows only that it runs

After Li et al., *Pruning Filters for Efficient ConvNets*, 2017 (arXiv:1608.08710): in every layer the filters with the
smallest L1 norms go, then the network is finetuned; each row goes on from the one before. The detector is SSD (Liu et
al. 2016) on MobileNetV2, the task ten classes of clothes on canvases (`detection/canvases.py`). What is done is kept in
`--output` and skipped the next time, so the same command goes on after an interruption; only the timing is repeated.
Needs `pip install 'sparseprune[torch,compact,examples]'`.

Pruned are the filters whose channels nothing else is added to: the expansions of the inverted residual blocks (their
depthwise filters go along), MobileNetV2's last convolution and the extra maps. Stem, linear bottlenecks and heads stay.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from detection.canvases import Canvases, canvases, items
from detection.filters import channels_left, prune_filters
from detection.runs import Results, milliseconds, score, train
from detection.ssd import SSDCoder
from torch import Tensor, nn

import sparseprune
from sparseprune.zoo import SSD300

SHARES = (1.0, 0.96, 0.83, 0.60, 0.26, 0.24, 0.23, 0.19, 0.17, 0.10)  # channels left, of the original's table


@dataclass(frozen=True)
class Plan:
    """How large and how long."""

    width: float = 0.5  # MobileNetV2's multiplier
    size: int = 96  # pixels a side
    items: int = 25_600  # single ones, to train the base on
    train_canvases: int = 16_000
    epochs: int = 2
    finetune_canvases: int = 24_000
    test_canvases: int = 1_000
    shares: tuple[float, ...] = SHARES
    tune: Literal["measure", "fixed"] = "measure"  # how `convert` chooses
    rounds: int = 10  # of timing, a tenth of a second for each call


FAST = Plan(0.1, 64, 64, 32, 1, 16, 8, (1.0, 0.60), "fixed", 1)


@dataclass(frozen=True)
class Task:
    """What every row needs."""

    plan: Plan
    data: Path | None
    output: Path
    coder: SSDCoder

    def canvases(self, part: str, count: int) -> Canvases:
        return canvases(part, count, size=self.plan.size, directory=self.data)

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        return self.canvases("test", self.plan.test_canvases).all()

    def example(self) -> Tensor:
        return self.test[0][:1]

    def weights(self, name: str) -> Path:
        return self.output / f"{name}.safetensors"


def network(plan: Plan) -> SSD300:
    """Ten classes and the background. Heads start near zero: their He initialisation is meant for hidden layers."""
    model = SSD300(11, width=plan.width, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for head in (*model.boxes, *model.classes):
            nn.init.normal_(head.weight, std=0.01)  # type: ignore[arg-type]
    return model


def prunable(model: SSD300) -> tuple[str, ...]:
    """Names of the convolutions whose filters go."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d) and layer.groups == 1]
    chosen = [name for name in names if name.startswith("extras.") or name.endswith(".conv.0.0")]
    last = f"features.{len(model.features) - 1}.0"
    return (*chosen, last)


def dense(task: Task) -> dict[str, Any]:
    """Train the base as a classifier of single items, then the detector.

    In float32: bfloat16 is no faster here, and torch's gives NaN where maps are one pixel.
    """
    model, plan = network(task.plan), task.plan
    channels = model.features[-1][0].out_channels  # type: ignore[index]
    base = nn.Sequential(model.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    singles = items("train", plan.items, size=plan.size // 2, directory=task.data)
    train(base, F.cross_entropy, singles, epochs=1, rate=3e-3, folder=task.output / "base", batch=min(64, plan.items))
    data = task.canvases("train", plan.train_canvases)
    train(model, task.coder.loss, data, epochs=plan.epochs, rate=2e-3, folder=task.output / "dense")
    sparseprune.save_weights(model, task.weights("dense"))
    return score(model, task.coder, task.test)


def row(task: Task, name: str, share: float, before: str) -> dict[str, Any]:
    """Prune what the row before left, finetune, remove."""
    model, plan = network(task.plan), task.plan
    sparseprune.load_weights(model, task.weights(before))
    layers = prunable(model)
    cut = None
    if share < 1:
        prune_filters(model, 1 - share, layers, "magnitude")
        cut = score(model, task.coder, task.test)["mAP"]
    data = task.canvases("train", plan.finetune_canvases)
    train(model, task.coder.loss, data, epochs=1, rate=1e-3, folder=task.output / name)
    sparseprune.finalize(model.eval())
    sparseprune.save_weights(model, task.weights(name))
    small = sparseprune.compact(model, task.example())
    return {
        "channels": channels_left(model, layers), "parameters": sum(p.numel() for p in small.parameters()),
        "before_finetuning": cut, **score(small, task.coder, task.test),
    }  # fmt: skip


def timing(task: Task, names: list[str]) -> dict[str, dict[str, float]]:
    """Milliseconds of one canvas, of each row: network in torch, converted, and box decoding and suppression."""
    calls: dict[str, Callable[[], Any]] = {}
    image = task.example()
    for name in names:
        model = network(task.plan).eval()
        sparseprune.load_weights(model, task.weights(name))
        small = sparseprune.compact(model, image)
        fast = sparseprune.convert(small, image, tune=task.plan.tune)
        with torch.inference_mode():
            outputs = small(image)
        calls[f"{name} network"] = partial(small, image)
        calls[f"{name} converted"] = partial(fast, image)
        calls[f"{name} decoding"] = partial(task.coder.decode, outputs)
    taken = milliseconds(calls, rounds=task.plan.rounds)
    kinds = ("network", "converted", "decoding")
    return {name: {kind: taken[f"{name} {kind}"] for kind in kinds} for name in names}


def table(rows: dict[str, dict[str, Any]], times: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = [
        "| channels left | parameters | mAP (just cut) | mAP50 | network ms | fps | converted ms | fps | decoding ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, ms in times.items():
        found = rows[name]
        cut = "" if found["before_finetuning"] is None else f" ({found['before_finetuning']:.3f})"
        lines.append(
            f"| {found['channels']:.1%} | {found['parameters'] / 1e6:.2f} M | {found['mAP']:.3f}{cut} | "
            f"{found['mAP50']:.3f} | {ms['network']:.2f} | {1e3 / ms['network']:.0f} | {ms['converted']:.2f} | "
            f"{1e3 / ms['converted']:.0f} | {ms['decoding']:.2f} |"
        )
    return "\n".join(lines)


def run(task: Task) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """Everything that is not done yet -> figures of the rows, and their times."""
    task.output.mkdir(parents=True, exist_ok=True)
    results, before = Results(task.output / "results.json"), "dense"
    results.once("dense", partial(dense, task))
    names = []
    for share in task.plan.shares:
        name = f"channels-{share:.0%}"
        results.once(name, partial(row, task, name, share, before))
        names.append(name)
        before = name
    return results.rows, timing(task, names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's IDX files (default: the subset here)")
    parser.add_argument("--output", type=Path, default=Path("filter_pruning_ssd_out"), help="where the files go")
    parser.add_argument("--fast", action="store_true", help="in miniature")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sparseprune.set_num_threads(args.threads)
    plan = FAST if args.fast else Plan()
    rows, times = run(Task(plan, args.data, args.output, SSDCoder(plan.size)))
    (args.output / "times.json").write_text(json.dumps(times, indent=1))
    print(f"\ndense, before any finetuning: mAP {rows['dense']['mAP']:.3f}\n\n{table(rows, times)}")


if __name__ == "__main__":
    main()
