"""VGG-16 with batch norm loses half of its work by Taylor filter pruning (Molchanov et al. 2017, arXiv:1611.06440).

    python examples/vgg16_taylor.py                      # width 16, 10,000 images of Fashion-MNIST, three seeds
    python examples/vgg16_taylor.py --data DIR --width 64     # VGG-16's own width, all 60,000 images
    python examples/vgg16_taylor.py --fast               # seconds: does it run?

A dense network is trained for each seed. Then, for each criterion, rounds of pruning and a little finetuning take its
multiply-adds down to each of `--macs`, shares of the dense ones, the same for every criterion; after each a longer
finetuning follows, and `sparseprune.compact` removes the filters for good. Nothing of it is particular to VGG but
`macs` and `macs_of_a_filter`, which count.

Every training is checkpointed and what is done is skipped, so that the same command goes on after an interruption. DIR
holds Fashion-MNIST's four IDX files, raw or .gz; without it the subset in examples/data is used.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset

import sparseprune
from sparseprune.pruning import Criterion, Magnitude, Pattern, Random, Taylor

sys.path.insert(0, str(Path(__file__).parent / "data"))
from make_subset import load as load_images  # noqa: E402  (it lies beside the images)

STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))  # channels of the convolutions, in widths; then pooling
CRITERIA = ("taylor", "random", "taylor_plain", "magnitude")  # the first is divided by what a filter costs
Batches = list[tuple[Tensor, Tensor]]


def network(width: int, seed: int) -> nn.Sequential:
    """VGG-16's convolutions for 32×32 images of one channel, and one linear layer; width 64 is the original's."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 1
    for stage in STAGES:
        for widths in stage:
            layers += [nn.Conv2d(channels, widths * width, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(widths * width), nn.ReLU(inplace=True)]
            channels = widths * width
        layers += [nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]  # trains faster so


def macs(model: nn.Module) -> int:
    """Multiply-adds of one image in the convolutions, without the filters that are zero and what reads them."""
    total, pixels, channels = 0, 32 * 32, 1
    for layer in model.children():
        if isinstance(layer, nn.Conv2d):
            filters = int((layer.weight != 0).flatten(1).any(1).sum())
            total += channels * filters * 9 * pixels
            channels = filters
        elif isinstance(layer, nn.MaxPool2d):
            pixels //= 4
    return total


def macs_of_a_filter(model: nn.Module) -> dict[str, float]:
    """Multiply-adds that go with one filter, its own and those that read it, by the weight's name."""
    found: dict[str, float] = {}
    pixels, channels, before = 32 * 32, 1, ""
    for name, layer in model.named_children():
        if isinstance(layer, nn.Conv2d):
            filters = int((layer.weight != 0).flatten(1).any(1).sum())
            found[f"{name}.weight"] = channels * 9 * pixels
            if before:
                found[before] += filters * 9 * pixels
            channels, before = filters, f"{name}.weight"
        elif isinstance(layer, nn.MaxPool2d):
            pixels //= 4
    return found


class Once(Criterion):
    """A criterion's scores of the first call, given again later: to try several amounts without new gradients.

    With `per_mac` they are divided by the multiply-adds that go with the filter. As it is the multiply-adds that are to
    be halved, those filters go first that matter least for what they cost; else it is nearly always the last layers'
    filters, which cost little (Molchanov et al. regularise by what a filter costs, section 3.1).
    """

    def __init__(self, criterion: Criterion, per_mac: bool) -> None:
        self._criterion = criterion
        self._per_mac = per_mac
        self._scores: Mapping[str, Tensor] | None = None

    def unit_scores(
        self, model: nn.Module, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor],
        patterns: Mapping[str, Pattern], generator: torch.Generator | None,
    ) -> Mapping[str, Tensor]:  # fmt: skip
        if self._scores is None:
            scores = self._criterion.unit_scores(model, weights, kept, patterns, generator)
            costs = macs_of_a_filter(model) if self._per_mac else dict.fromkeys(scores, 1.0)
            self._scores = {name: score / costs[name] for name, score in scores.items()}
        return self._scores


def prune_to(model: nn.Module, goal: float, criterion: Criterion, seed: int, per_mac: bool) -> None:
    """Prune filters until at most `goal` multiply-adds are left; every layer keeps 3 % of its own at least."""
    options: dict[str, Any] = {
        "criterion": Once(criterion, per_mac), "pattern": "filter", "include": nn.Conv2d, "min_density": 0.03,
        "seed": seed,
    }  # fmt: skip
    low, high = sparseprune.summary(model).sparsity * 0.99, 0.96
    for _ in range(12):
        middle = (low + high) / 2
        trial = copy.deepcopy(model)
        try:
            sparseprune.prune(trial, middle, **options)
            low, high = (middle, high) if macs(trial) > goal else (low, middle)
        except ValueError:  # less than is pruned already
            low = middle
    sparseprune.prune(model, high, **options)


def train(model: nn.Module, data: DataLoader[Any], epochs: int, rate: float, folder: Path, seed: int) -> None:
    """SGD with one cycle of the learning rate, in bfloat16; masks, where the model has some, are held."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * len(data))
    sparseprune.finetune(
        model, data, epochs=epochs, optimizer=optimizer, scheduler=cycle, seed=seed, checkpoint_dir=folder,
        autocast=torch.bfloat16,
    )  # fmt: skip


def pruned(args: argparse.Namespace, data: Data, name: str, share: float, seed: int) -> dict[str, Any]:
    """Prune and finetune in rounds from the share before, then remove the filters; what is left, and how good it is."""
    model = network(args.width, seed)
    full = macs(model)
    before = min(other for other in (1.0, *args.macs) if other > share)
    sparseprune.load_weights(model, weights(args, name if before < 1 else "dense", before, seed))
    sparseprune.hold_zeros(model, include=nn.Conv2d)
    path = weights(args, name, share, seed)
    cut = []
    for number in range(1, args.rounds + 1):
        goal = full * before * (share / before) ** (number / args.rounds)  # every round leaves the same share
        prune_to(model, goal, criterion(name, data.gradients), 100 * seed + number, name == "taylor")
        cut.append(sparseprune.evaluate(model, data.test).accuracy)
        last = number == args.rounds
        loader, epochs = (data.train, args.finetune_epochs) if last else (data.some, 1)
        train(model, loader, epochs, 0.02, path.with_suffix("") / f"round{number}", seed)
    masked = macs(model) / full
    sparseprune.save_weights(sparseprune.finalize(model), path)
    small = load_small(args, name, share, seed)
    return describe(small, data) | {"macs": macs(small) / full, "macs_masked": masked, "cut": cut}


def dense(args: argparse.Namespace, data: Data, seed: int) -> dict[str, Any]:
    model = network(args.width, seed)
    path = weights(args, "dense", 1.0, seed)
    train(model, data.train, args.epochs, 0.05, path.with_suffix(""), seed)
    sparseprune.save_weights(model, path)
    return describe(model, data) | {"macs": 1.0}


def load_small(args: argparse.Namespace, name: str, share: float, seed: int) -> nn.Module:
    """The network of a finished run, without the filters that were pruned."""
    model = network(args.width, seed).eval()
    sparseprune.load_weights(model, weights(args, name, share, seed))
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model if name == "dense" else sparseprune.compact(model, torch.zeros(1, 1, 32, 32))


def describe(model: nn.Module, data: Data) -> dict[str, Any]:
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    return {
        "accuracy": sparseprune.evaluate(model, data.test).accuracy,
        "filters": [layer.out_channels for layer in layers],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def criterion(name: str, gradients: Batches) -> Criterion:
    if name.startswith("taylor"):
        return Taylor(gradients, progress=False)
    return Random() if name == "random" else Magnitude(2)


def weights(args: argparse.Namespace, name: str, share: float, seed: int) -> Path:
    path: Path = args.output / f"{key_of(name, share, seed)}.safetensors"
    return path


def key_of(name: str, share: float, seed: int) -> str:
    return f"{name}-{seed}" if share == 1 else f"{name}-{round(100 * share):02}-{seed}"


class Data:
    """Images as float32 (N, 1, 32, 32), mean 0 and deviation 1, with their labels."""

    def __init__(self, directory: Path | None, batch: int, round_images: int, few: bool) -> None:
        arrays = load_images(directory)
        if few:
            arrays = {name: array[:: max(1, len(array) // 256)] for name, array in arrays.items()}

        def part(name: str) -> TensorDataset:
            images = np.pad(arrays[f"{name}_images"], ((0, 0), (2, 2), (2, 2)))  # 28×28 to 32×32
            pixels = (torch.from_numpy(images).unsqueeze(1).float() / 255 - 0.2195) / 0.3327
            return TensorDataset(pixels, torch.from_numpy(arrays[f"{name}_labels"]).long())

        images, test = part("train"), part("test")
        self.train = DataLoader(images, batch, shuffle=True, drop_last=True)
        sampler = RandomSampler(images, num_samples=min(round_images, len(images)))
        self.some = DataLoader(images, batch, sampler=sampler, drop_last=True)  # for the rounds between
        self.test = DataLoader(test, 500)
        self.gradients: Batches = list(DataLoader(Subset(images, range(min(512, len(images)))), 64))  # for Taylor


def latency(args: argparse.Namespace, name: str, share: float) -> dict[str, Any]:
    """Milliseconds of one image of the first seed's network: torch's dense ways, and converted."""
    model = load_small(args, name, share, 0)
    example = torch.zeros(1, 1, 32, 32).normal_(generator=torch.Generator().manual_seed(0))
    result = sparseprune.benchmark(model, [example], name=f"vgg16-bn {key_of(name, share, 0)}")
    (args.output / f"{key_of(name, share, 0)}.benchmark.txt").write_text(str(result))
    return {timing.name: timing.median_ms for timing in result.timings}


def table(results: dict[str, Any], runs: list[tuple[str, float]], seeds: int) -> str:
    """A row for each criterion and share: means and standard deviations over the seeds, in Markdown."""
    lines = ["| | MACs | weights | just pruned, mean of rounds | finetuned | points lost | ms, one image, first seed |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    figures: dict[tuple[str, float], tuple[list[float], list[float]]] = {}  # just pruned, finetuned; of each seed
    for name, share in runs:
        rows = [results[key_of(name, share, seed)] for seed in range(seeds)]
        cut = [100 * statistics.mean(row["cut"]) for row in rows if "cut" in row]
        accuracies = [100 * row["accuracy"] for row in rows]
        figures[name, share] = cut, accuracies
        lost = [100 * results[f"dense-{seed}"]["accuracy"] - accuracies[seed] for seed in range(seeds)]
        mean = {field: statistics.mean(row[field] for row in rows) for field in ("macs", "parameters")}
        times = ", ".join(f"{way} {ms:.3f}" for way, ms in rows[0].get("milliseconds", {}).items() if ms is not None)
        cells = (name, f"{mean['macs']:.1%}", f"{mean['parameters']:,.0f}", _spread(cut) if cut else "",
                 _spread(accuracies), _spread(lost), times)  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    for name, share in figures:
        if name == "taylor" and ("random", share) in figures and seeds > 1:
            for when, ours, random in zip(
                ("just pruned", "finetuned"), figures[name, share], figures["random", share], strict=True
            ):
                gain = statistics.mean(ours) - statistics.mean(random)
                lines.append(
                    f"\nAt {share:.0%} of the MACs, {when}, Taylor is {gain:.2f} points better than random filters; "
                    f"the larger standard deviation is {max(statistics.stdev(ours), statistics.stdev(random)):.2f}."
                )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's IDX files (default: the subset here)")
    parser.add_argument("--width", type=int, default=16, help="channels of the first convolution (64: VGG-16)")
    parser.add_argument("--epochs", type=int, default=6, help="of dense training")
    parser.add_argument("--rounds", type=int, default=4, help="prunings for each share")
    parser.add_argument("--round-images", type=int, default=3200, help="images seen between two prunings")
    parser.add_argument("--finetune-epochs", type=int, default=1, help="after the last pruning")
    parser.add_argument("--macs", default="0.5,0.25", help="shares of the multiply-adds that stay")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--criteria", default="taylor,random", help=f"some of {','.join(CRITERIA)}")
    parser.add_argument("--output", type=Path, default=Path("vgg16_out"), help="where checkpoints and tables go")
    parser.add_argument("--no-latency", action="store_true", help="do not convert and time")
    parser.add_argument("--fast", action="store_true", help="a tiny network, 256 images, one epoch, no timing")
    args = parser.parse_args()
    if args.fast:
        args.width, args.epochs, args.rounds, args.finetune_epochs, args.seeds, args.no_latency = 4, 1, 2, 1, 1, True
    chosen = args.criteria.split(",")
    for name in chosen:
        if name not in CRITERIA:
            parser.error(f"--criteria: {name!r} is none of {', '.join(CRITERIA)}")
    args.macs = sorted((float(share) for share in args.macs.split(",")), reverse=True)
    if not all(0 < share < 1 for share in args.macs):
        parser.error(f"--macs: {args.macs} are not shares between 0 and 1")
    args.output.mkdir(parents=True, exist_ok=True)
    data = Data(args.data, args.batch, args.round_images, args.fast)
    path = args.output / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    runs = [("dense", 1.0)] + [(name, share) for share in args.macs for name in chosen]
    for seed in range(args.seeds):
        for name, share in runs:
            key = key_of(name, share, seed)
            if key not in results:
                print(f"{key}:", flush=True)
                results[key] = dense(args, data, seed) if name == "dense" else pruned(args, data, name, share, seed)
            if seed == 0 and "milliseconds" not in results[key] and not args.no_latency:
                results[key]["milliseconds"] = latency(args, name, share)
            beside = path.with_suffix(".tmp")  # then renamed: never half a table
            beside.write_text(json.dumps(results, indent=1))
            beside.replace(path)
    print(table(results, runs, args.seeds))


if __name__ == "__main__":
    main()
