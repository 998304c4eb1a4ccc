"""ResNet-18 to 98 % zeros and further, and what becomes of its latency (after Lei Mao's *PyTorch Pruning*).

    python examples/resnet18.py --data DIR                        # full size, all 60,000 images of Fashion-MNIST
    python examples/resnet18.py --width 16 --stages all           # a sixteenth of the weights, 10,000 images: minutes
    python examples/resnet18.py --fast                            # seconds: does it run?

Every stage is trained with checkpoints and skipped once done, so that the same command goes on after an interruption.
`--stages` picks some of: dense, one_shot, cubic (98 %), global_94, local_94, global_99, global_995 (the last two go on
from one_shot). examples/weights/resnet18-32-98.safetensors is what cubic left at full size, after five epochs. DIR
holds Fashion-MNIST's four IDX files, raw or .gz; without it the subset in examples/data is used.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparseprune
from sparseprune import Pruner
from sparseprune.zoo import ResNet, resnet18_32

sys.path.insert(0, str(Path(__file__).parent / "data"))
from make_subset import load as load_images  # noqa: E402  (it lies beside the images)

# stage -> final sparsity, scope, schedule, and the stage whose weights it starts from
STAGES: dict[str, tuple[float, str, str, str]] = {
    "one_shot": (0.98, "global", "one_shot", "dense"),
    "cubic": (0.98, "global", "cubic", "dense"),
    "global_94": (0.94, "global", "one_shot", "dense"),
    "local_94": (0.94, "local", "one_shot", "dense"),
    "global_99": (0.99, "global", "one_shot", "one_shot"),
    "global_995": (0.995, "global", "one_shot", "global_99"),
}
Loaders = tuple["DataLoader[Any]", "DataLoader[Any]"]


def loaders(directory: Path | None, batch: int, few: bool) -> Loaders:
    """Train and test images as float32 (N, 3, 32, 32), mean 0 and deviation 1, with their labels; 256 if `few`."""
    arrays = load_images(directory)
    if few:
        arrays = {name: array[:: max(1, len(array) // 256)] for name, array in arrays.items()}

    def part(name: str) -> TensorDataset:
        images = np.pad(arrays[f"{name}_images"], ((0, 0), (2, 2), (2, 2)))  # 28×28 to 32×32
        pixels = (torch.from_numpy(images).unsqueeze(1).float() / 255 - 0.2195) / 0.3327
        return TensorDataset(pixels.expand(-1, 3, -1, -1), torch.from_numpy(arrays[f"{name}_labels"]).long())

    return DataLoader(part("train"), batch, shuffle=True, drop_last=True), DataLoader(part("test"), 500)


def network(width: int) -> ResNet:
    """The zoo's ResNet-18 for 32×32 images; torch trains it faster in channels_last."""
    model = resnet18_32(width=width, seed=0)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def train(model: nn.Module, data: Loaders, epochs: int, rate: float, folder: Path, pruner: Pruner | None) -> None:
    """SGD with one cycle of the learning rate (Smith 2018, arXiv:1803.09820), in bfloat16; the masks are held."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * len(data[0]))
    sparseprune.finetune(
        model, data[0], epochs=epochs, optimizer=optimizer, scheduler=cycle, pruner=pruner, checkpoint_dir=folder,
        autocast=torch.bfloat16,
    )  # fmt: skip


def dense(args: argparse.Namespace, data: Loaders) -> dict[str, Any]:
    model = network(args.width)
    train(model, data, args.epochs, 0.1, args.output / "dense", None)
    return finish(args, "dense", model, data)


def stage(name: str, args: argparse.Namespace, data: Loaders) -> dict[str, Any]:
    """Prune and finetune from an earlier stage's weights."""
    sparsity, scope, schedule, origin = STAGES[name]
    model = network(args.width)
    sparseprune.load_weights(model, weights(args, origin))
    if origin != "dense":
        sparseprune.hold_zeros(model)
    epochs = args.finetune_epochs
    batches = epochs * len(data[0])
    many = max(1, min(50, batches // 3))  # prunings over the first two thirds
    slow = {"steps": many, "every": max(1, 2 * batches // (3 * many)), "per": "batch"} if schedule == "cubic" else {}
    pruner = Pruner(model, sparsity, scope=scope, schedule=schedule, **slow)  # type: ignore[arg-type]
    cut = None
    if schedule == "one_shot":
        trial = sparseprune.prune(copy.deepcopy(model), sparsity, scope=scope)
        cut = sparseprune.evaluate(trial, data[1], autocast=torch.bfloat16).accuracy
    train(model, data, epochs, 0.05, args.output / name, pruner)
    return finish(args, name, model, data) | {"before_finetuning": cut}


def finish(args: argparse.Namespace, name: str, model: nn.Module, data: Loaders) -> dict[str, Any]:
    """Save the weights, and say how good they are (in float32)."""
    sparseprune.finalize(model)
    path = weights(args, name)
    sparseprune.save_weights(model, path)
    found = sparseprune.evaluate(model, data[1])
    about = sparseprune.summary(model)
    return {"accuracy": found.accuracy, "loss": found.loss, "sparsity": about.sparsity, "bytes": path.stat().st_size}


def weights(args: argparse.Namespace, name: str) -> Path:
    path: Path = args.output / f"{name}.safetensors"
    return path


def latency(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Milliseconds of one image, converted and by the fastest of torch's dense ways (of the same weights)."""
    model = resnet18_32(width=args.width).eval()
    sparseprune.load_weights(model, weights(args, name))
    example = torch.zeros(1, 3, 32, 32).normal_(generator=torch.Generator().manual_seed(0))
    result = sparseprune.benchmark(model, [example], name=f"resnet18-32 {name}")
    (args.output / f"{name}.benchmark.txt").write_text(str(result))
    return {"benchmark": json.loads(result.to_json())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's IDX files (default: the subset here)")
    parser.add_argument("--width", type=int, default=64, help="channels of the first convolution (64: ResNet-18)")
    parser.add_argument("--epochs", type=int, default=4, help="of dense training")
    parser.add_argument("--finetune-epochs", type=int, default=3, help="of every stage after it")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--stages", default="dense,one_shot,cubic", help="comma-separated, or all")
    parser.add_argument("--output", type=Path, default=Path("resnet18_out"), help="where checkpoints and tables go")
    parser.add_argument("--no-latency", action="store_true", help="do not convert and time")
    parser.add_argument("--fast", action="store_true", help="a tiny network, 256 images, one epoch, no timing")
    args = parser.parse_args()
    if args.fast:
        args.width, args.epochs, args.finetune_epochs, args.batch, args.no_latency = 4, 1, 1, 32, True
    chosen = ["dense", *STAGES] if args.stages == "all" else args.stages.split(",")
    for name in chosen:
        if name != "dense" and name not in STAGES:
            parser.error(f"--stages: {name!r} is none of dense, {', '.join(STAGES)}")
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data = loaders(args.data, args.batch, args.fast)
    results_path = args.output / "results.json"
    results = json.loads(results_path.read_text()) if results_path.exists() else {}
    for name in chosen:
        if name not in results:
            print(f"{name}:", flush=True)
            results[name] = dense(args, data) if name == "dense" else stage(name, args, data)
        if "benchmark" not in results[name] and not args.no_latency:
            results[name] |= latency(args, name)
        beside = results_path.with_suffix(".tmp")  # then renamed: never half a table
        beside.write_text(json.dumps(results, indent=1))
        beside.replace(results_path)
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """The stages done, one a row."""
    lines = [f"{'stage':12} {'zeros':>7} {'cut':>7} {'accuracy':>9} {'file':>10}  latency"]
    for name, row in results.items():
        cut = row.get("before_finetuning")
        lines.append(
            f"{name:12} {row['sparsity']:7.2%} {'' if cut is None else format(cut, '7.2%'):>7} {row['accuracy']:9.2%} "
            f"{row['bytes'] / 1000:7.0f} kB  {row.get('benchmark', {}).get('speedup', '')}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
