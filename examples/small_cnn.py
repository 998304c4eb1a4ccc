"""A small CNN loses 20 % of its filters, truly (after a tutorial, *Structured pruning in PyTorch*).

    python examples/small_cnn.py --data DIR        # all 60,000 images of Fashion-MNIST: about half an hour on one core
    python examples/small_cnn.py                   # the 10,000 images here: five minutes
    python examples/small_cnn.py --fast            # seconds: does it run?

The tutorial masks 20 % random *weights*, calls them filters, and leaves it there. Here that is one row of the table;
the others prune filters, finetune what is left, and `compact` takes them out: 51 of 64 filters stay, and the linear
layer shrinks from 65,536 to 52,224 inputs. What is done already is not done again: the same command goes on after an
interruption. DIR holds Fashion-MNIST's four IDX files, raw or .gz; without it the subset in examples/data is used.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import sparseprune
from sparseprune import timing

sys.path.insert(0, str(Path(__file__).parent / "data"))
from make_subset import load as load_images  # noqa: E402  (it lies beside the images)

Loaders = tuple["DataLoader[Any]", "DataLoader[Any]"]


class SimpleCNN(nn.Module):
    """The tutorial's network: `(N, 3, 32, 32)` to logits `(N, 10)`."""

    def __init__(self, filters: int = 64) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, filters, 3, padding=1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(filters * 32 * 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.flatten(self.relu(self.conv(x)), 1))
        return logits


# how 20 % of the convolution are pruned; None: not at all, only trained as long as the others
STAGES: dict[str, dict[str, Any] | None] = {
    "dense, trained on": None,
    "random weights": {"criterion": "random", "seed": 0},  # what the tutorial does
    "random filters": {"criterion": "random", "pattern": "filter", "seed": 0},
    "smallest filters": {"pattern": "filter"},  # by their L1 norm
}


def loaders(directory: Path | None, batch: int, few: bool) -> Loaders:
    """Train and test images as float32 (N, 3, 32, 32), mean 0 and deviation 1, with their labels; 256 if `few`."""
    arrays = load_images(directory)
    if few:
        arrays = {name: array[:: max(1, len(array) // 256)] for name, array in arrays.items()}

    def part(name: str) -> TensorDataset:
        images = np.pad(arrays[f"{name}_images"], ((0, 0), (2, 2), (2, 2)))  # 28×28 to 32×32
        pixels = (torch.from_numpy(images).unsqueeze(1).float() / 255 - 0.2195) / 0.3327
        return TensorDataset(pixels.expand(-1, 3, -1, -1), torch.tensor(arrays[f"{name}_labels"], dtype=torch.int64))

    return DataLoader(part("train"), batch, shuffle=True, drop_last=True), DataLoader(part("test"), 500)


def train(model: nn.Module, data: Loaders, epochs: int, rate: float, folder: Path) -> None:
    """SGD with one cycle of the learning rate (Smith 2018, arXiv:1803.09820); masks, where there are any, are held."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=2e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * len(data[0]))
    sparseprune.finetune(model, data[0], epochs=epochs, optimizer=optimizer, scheduler=cycle, checkpoint_dir=folder)


def dense(args: argparse.Namespace, data: Loaders) -> dict[str, Any]:
    torch.manual_seed(0)
    model = SimpleCNN(args.filters)
    train(model, data, args.epochs, 0.02, args.output / "dense")
    return finish(args, "dense", model, None, data)


def stage(name: str, args: argparse.Namespace, data: Loaders) -> dict[str, Any]:
    """Prune the dense network's convolution, finetune, compact."""
    model = sparseprune.load_weights(SimpleCNN(args.filters), path(args, "dense"))
    choices, cut = STAGES[name], None
    if choices is not None:
        sparseprune.prune(model, 0.2, include="conv", **choices)
        cut = sparseprune.evaluate(model, data[1]).accuracy
    train(model, data, args.finetune_epochs, 0.005, path(args, name).with_suffix(""))
    return finish(args, name, model, cut, data)


def finish(args: argparse.Namespace, name: str, model: nn.Module, cut: float | None, data: Loaders) -> dict[str, Any]:
    """Save the weights and the compacted model, and say how good and how large they are."""
    sparseprune.save_weights(model, path(args, name))
    small: Any = sparseprune.compact(model, example())
    masked, compacted = (sparseprune.evaluate(each, data[1]).accuracy for each in (model, small))
    counts = sparseprune.summary(small, example(), file_size=True)
    return {
        "pruned": cut, "finetuned": masked, "compacted": compacted, "parameters": counts.total, "macs": counts.macs,
        "bytes": counts.file_bytes, "filters": small.conv.out_channels, "inputs": small.fc.in_features,
    }  # fmt: skip


def path(args: argparse.Namespace, name: str) -> Path:
    found: Path = args.output / f"{name.replace(' ', '_').replace(',', '')}.safetensors"
    return found


def example() -> Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def latencies(args: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of one image, in turns; batches of 16 beside them."""
    calls: dict[str, Callable[[], Any]] = {}
    for name in ("dense", "random weights", "smallest filters"):
        masked = sparseprune.load_weights(SimpleCNN(args.filters), path(args, name)).eval()
        for batch in (1, 16):
            x = example().expand(batch, -1, -1, -1).contiguous()
            forms: dict[str, nn.Module] = {"": masked}
            if name == "smallest filters":
                forms[", compacted"] = sparseprune.compact(masked, x)
                forms[", compacted and converted"] = sparseprune.convert(copy.deepcopy(forms[", compacted"]), x)
            for form, model in forms.items():
                calls[f"{name}{form}, batch {batch}"] = partial(model, x)
    with timing.thread_count(args.threads), tqdm(total=8 * len(calls), desc="latency", leave=False) as bar:
        taken = timing.take_turns(calls, 8, 0.1, bar)
    return {name: statistics.median(samples.ms) for name, samples in taken.items()}


def table(results: dict[str, dict[str, Any]]) -> str:
    rows = ["| 20 % of the convolution | just pruned | finetuned | filters | inputs of the linear layer | parameters | "
            "multiply-adds | file |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, row in results.items():
        cut = "" if row["pruned"] is None else f"{row['pruned']:.2%}"
        rows.append(f"| {name} | {cut} | {row['compacted']:.2%} | {row['filters']} | {row['inputs']:,} | "
                    f"{row['parameters']:,} | {row['macs']:,} | {row['bytes'] / 1000:,.0f} kB |")  # fmt: skip
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's IDX files (default: the subset here)")
    parser.add_argument("--filters", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=8, help="of dense training")
    parser.add_argument("--finetune-epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2, help="for the latencies")
    parser.add_argument("--output", type=Path, default=Path("small_cnn_out"), help="where weights and tables go")
    parser.add_argument("--no-latency", action="store_true", help="do not convert and time")
    parser.add_argument("--fast", action="store_true", help="10 filters, 256 images, one epoch, no timing")
    args = parser.parse_args()
    if args.fast:
        args.filters, args.epochs, args.finetune_epochs, args.batch, args.no_latency = 10, 1, 1, 32, True
    args.output.mkdir(parents=True, exist_ok=True)
    data = loaders(args.data, args.batch, args.fast)
    kept = args.output / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name in ("dense", *STAGES):
        if name not in results:
            print(f"{name} ...", flush=True)
            results[name] = dense(args, data) if name == "dense" else stage(name, args, data)
            beside = kept.with_suffix(".tmp")
            beside.write_text(json.dumps(results, indent=1))
            beside.replace(kept)
    print(table(results))
    if not args.no_latency:
        for name, ms in latencies(args).items():
            print(f"{name}: {ms:.3f} ms")


if __name__ == "__main__":
    main()
