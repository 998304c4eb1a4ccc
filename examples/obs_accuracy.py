"""How much accuracy one-shot pruning costs, by magnitude and by OBS: no training, a few hundred unlabelled images.

    python examples/obs_accuracy.py                       # ResNet-18 of width 16, 10,000 images, three seeds
    python examples/obs_accuracy.py --scope local         # every layer to the same sparsity
    python examples/obs_accuracy.py --parallel            # OBS without the layers' compensating each other's errors
    python examples/obs_accuracy.py --data DIR            # all of Fashion-MNIST: DIR holds its four IDX files
    python examples/obs_accuracy.py --fast                # seconds: does it run?

Trains one dense network for each seed and keeps it, prunes copies of it, and measures test accuracy as pruned and after
BatchNorm is recalibrated on the same images. What is done is skipped, so that the same command goes on after an
interruption.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sparseprune
from sparseprune.pruning import OBS, Magnitude
from sparseprune.zoo import ResNet, resnet18_32

sys.path.insert(0, str(Path(__file__).parent))
from demo import datasets, train  # noqa: E402  (it lies beside)


def dense(seed: int, args: argparse.Namespace, train_data: TensorDataset) -> ResNet:
    """The trained network, from its file where there is one."""
    path = args.output / f"dense-{seed}.safetensors"
    model = resnet18_32(width=args.width, in_channels=1, seed=seed)
    if not path.exists():
        torch.manual_seed(seed)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch trains faster so
        train(model, DataLoader(train_data, batch_size=64, shuffle=True), args.epochs)
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        sparseprune.save_weights(model, path)
    sparseprune.load_weights(model, path)
    return model.eval()


def accuracy(model: nn.Module, test_data: TensorDataset) -> float:
    """In per cent."""
    return 100 * sparseprune.evaluate(model, DataLoader(test_data, 500)).accuracy


def pruned(
    model: nn.Module, sparsity: float, method: str, args: argparse.Namespace, images: list[Tensor]
) -> tuple[nn.Module, float]:
    """A pruned copy, and how many seconds it took."""
    result = copy.deepcopy(model)
    criterion = Magnitude() if method == "magnitude" else OBS(images, sequential=not args.parallel)
    start = time.process_time()
    sparseprune.prune(result, sparsity, criterion=criterion, scope=args.scope, exclude=("conv1",))
    return result, time.process_time() - start


def run_seed(seed: int, args: argparse.Namespace, results: dict[str, Any], path: Path) -> None:
    train_data, test_data = datasets(args.data)
    if args.fast:
        train_data, test_data = (TensorDataset(*(t[:200] for t in data.tensors)) for data in (train_data, test_data))
    model = dense(seed, args, train_data)
    chosen = torch.randperm(len(train_data), generator=torch.Generator().manual_seed(seed))[: args.images]
    images = list(torch.split(train_data.tensors[0][chosen], 128))  # without their labels
    results.setdefault(f"{seed} dense", {"accuracy": accuracy(model, test_data)})
    for sparsity in args.sparsity:
        for method in ("magnitude", "obs"):
            key = f"{seed} {sparsity:g} {method}"
            if key not in results:
                cut, seconds = pruned(model, sparsity, method, args, images)
                row = {"seconds": seconds, "accuracy": accuracy(cut, test_data)}
                sparseprune.recalibrate_bn(cut, images)
                results[key] = row | {"recalibrated": accuracy(cut, test_data)}
                beside = path.with_suffix(".tmp")  # then renamed: never half a table
                beside.write_text(json.dumps(results, indent=1))
                beside.replace(path)


def table(results: dict[str, Any], args: argparse.Namespace) -> str:
    """Mean over the seeds, and the lowest and highest of them, as Markdown."""

    def cell(rows: list[dict[str, float]], key: str) -> str:
        found = [row[key] for row in rows]
        return f"{statistics.mean(found):.1f} ({min(found):.1f}-{max(found):.1f})"

    base = [results[f"{seed} dense"] for seed in range(args.seeds)]
    lines = [
        f"dense: {cell(base, 'accuracy')} %; {args.images} images, scope {args.scope}", "",
        "| zeros | magnitude | magnitude, BN | OBS | OBS, BN | lost by OBS / by magnitude | same, BN |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for sparsity in args.sparsity:
        rows = {m: [results[f"{s} {sparsity:g} {m}"] for s in range(args.seeds)] for m in ("magnitude", "obs")}
        cells = [cell(rows[m], key) for m in rows for key in ("accuracy", "recalibrated")]
        losses = {
            (m, key): statistics.mean(b["accuracy"] - row[key] for b, row in zip(base, rows[m], strict=True))
            for m in rows for key in ("accuracy", "recalibrated")
        }  # fmt: skip
        ratios = [f"{losses['obs', k]:.1f} / {losses['magnitude', k]:.1f}" for k in ("accuracy", "recalibrated")]
        lines.append(f"| {sparsity:.0%} | {' | '.join(cells + ratios)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's IDX files (default: the subset here)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=16, help="channels of the first convolution (64: ResNet-18)")
    parser.add_argument("--epochs", type=int, default=6, help="of dense training")
    parser.add_argument("--images", type=int, default=256, help="unlabelled training images that OBS and BatchNorm see")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 0.95])
    parser.add_argument("--scope", default="global", choices=("global", "local", "erk"))
    parser.add_argument("--parallel", action="store_true", help="OBS(sequential=False)")
    parser.add_argument("--output", type=Path, default=Path("obs_out"), help="where weights and results go")
    parser.add_argument("--fast", action="store_true", help="a tiny network, 200 images, one seed")
    args = parser.parse_args()
    if args.fast:
        args.seeds, args.width, args.epochs, args.images, args.sparsity = 1, 2, 1, 32, [0.5, 0.8]
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.scope}-{'parallel' if args.parallel else 'sequential'}-{args.images}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for seed in range(args.seeds):
        run_seed(seed, args, results, path)
    print(table(results, args))


if __name__ == "__main__":
    main()
