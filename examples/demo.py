"""The whole way of a model, on real images: train, prune, finetune, convert, save, reload without torch.

    python examples/demo.py                    # about two minutes on two cores; `make demo` runs this
    python examples/demo.py --data DIR         # all of Fashion-MNIST: DIR holds its four IDX files, raw or .gz

Reads top to bottom as a tutorial; everything of sparseprune that it uses is in `main()`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sparseprune
from sparseprune.zoo import resnet18_32

sys.path.insert(0, str(Path(__file__).parent / "data"))
from make_subset import load as load_images  # noqa: E402  (it lies beside the images)

# What a machine without torch would run: the saved program on a NumPy array.
WITHOUT_TORCH = """
import sys
import numpy as np
import sparseprune.runtime

program = sparseprune.runtime.load(sys.argv[1])
images = np.load(sys.argv[2])
logits = np.concatenate([program(images[i : i + 100]) for i in range(0, len(images), 100)])
assert "torch" not in sys.modules
np.save(sys.argv[3], logits.argmax(axis=1))
"""


def datasets(directory: Path | None) -> tuple[TensorDataset, TensorDataset]:
    """Train and test images as float32 (N, 1, 32, 32), mean 0 and deviation 1, with their labels."""
    arrays = load_images(directory)

    def part(name: str) -> TensorDataset:
        images = np.pad(arrays[f"{name}_images"], ((0, 0), (2, 2), (2, 2)))  # 28×28 to 32×32
        pixels = torch.from_numpy(images).unsqueeze(1).float() / 255
        return TensorDataset((pixels - 0.2195) / 0.3327, torch.from_numpy(arrays[f"{name}_labels"]).long())

    return part("train"), part("test")


def train(model: nn.Module, train_set: DataLoader[Any], epochs: int) -> None:
    """Ordinary training; masks, where the model has some, are held."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    sparseprune.finetune(model, train_set, epochs=epochs, optimizer=optimizer, scheduler=scheduler)


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> NDArray[Any]:
    """The predicted class of each image, (N,) int64."""
    return torch.cat([model(batch).argmax(1) for batch in torch.split(images, 100)]).numpy()


@torch.inference_mode()
def latencies(models: dict[str, nn.Module], image: Tensor) -> dict[str, float]:
    """Median milliseconds of one image, the models taking turns so that a busy machine slows them alike."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(10):
        for name, model in models.items():
            time.sleep(0.02)  # let the threads of the model before go to sleep
            for repeat in range(40):
                start = time.perf_counter()
                model(image)
                if repeat >= 10:  # the first ones warm up
                    taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(times)) for name, times in taken.items()}


def predict_without_torch(program: Path, images: Tensor) -> NDArray[Any]:
    """Predictions of the saved program in a new Python that never imports torch."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "images.npy"), Path(folder, "classes.npy")
        np.save(given, images.numpy())
        subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(program), str(given), str(found)], check=True)
        classes: NDArray[Any] = np.load(found)
        return classes


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, prune, finetune, convert and save a small residual network.")
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's IDX files (default: the subset here)")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of dense training; finetuning takes 2/3 of them")
    parser.add_argument("--sparsity", type=float, default=0.95, help="share of the weights that become zero")
    parser.add_argument("--output", type=Path, default=Path("demo_out"), help="where the files go")
    parser.add_argument("--threads", type=int, default=min(4, len(os.sched_getaffinity(0))))
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    sparseprune.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)

    train_data, test_data = datasets(args.data)
    images, labels = test_data.tensors
    train_set = DataLoader(train_data, batch_size=64, shuffle=True)

    print(f"1. Train a residual network on {len(train_data):,} images of clothes")
    model = resnet18_32(width=16, blocks=(1, 1, 1, 1), in_channels=1, seed=0)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch trains faster so
    train(model, train_set, args.epochs)
    accuracy_dense = float(np.mean(predict(model.eval(), images) == labels.numpy()))
    torch.save(model.state_dict(), args.output / "dense.pt")

    print(f"2. Make {args.sparsity:.0%} of the weights zero: the smallest, wherever they are but in the first layer")
    sparseprune.prune(model, args.sparsity, scope="global", exclude=("conv1",))
    accuracy_cut = float(np.mean(predict(model.eval(), images) == labels.numpy()))

    print("3. Finetune what is left")
    train(model, train_set, max(1, args.epochs * 2 // 3))
    sparseprune.finalize(model)  # masks become plain zeros
    model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    masked = predict(model, images)

    print("4. Convert, and compare with the masked model on every test image")
    fast = sparseprune.convert(model, images[:1])
    fast.save(args.output / "model.spr")
    converted = predict(fast, images)

    print("5. Reload the file in a Python without torch")
    reloaded = predict_without_torch(args.output / "model.spr", images)

    channels_last = resnet18_32(width=16, blocks=(1, 1, 1, 1), in_channels=1).eval()
    channels_last.load_state_dict(model.state_dict())
    channels_last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    times = latencies({"eager": model, "channels_last": channels_last, "converted": fast}, images[:1])

    size_dense, size_fast = ((args.output / name).stat().st_size for name in ("dense.pt", "model.spr"))
    rows = [
        ("dense, eager torch", accuracy_dense, size_dense, times["eager"]),
        ("dense, channels_last", accuracy_dense, size_dense, times["channels_last"]),
        (f"{args.sparsity:.0%} zeros, converted", float(np.mean(converted == labels.numpy())), size_fast,
         times["converted"]),
    ]  # fmt: skip
    print(f"\n{fast.report}\n\nJust pruned, before finetuning: {accuracy_cut:.1%} correct\n")
    print(f"{'':24} {'accuracy':>9} {'file':>10} {'one image':>11}   ({args.threads} threads)")
    for name, accuracy, size, milliseconds in rows:
        print(f"{name:24} {accuracy:9.1%} {size / 1000:7.0f} kB {milliseconds:8.3f} ms")
    agree, same = np.mean(converted == masked), np.mean(reloaded == converted)
    print(f"\npredictions equal: converted and masked torch {agree:.2%}; reloaded without torch {same:.2%}")
    if agree < 0.999 or same < 0.999:  # a near tie between two classes may fall the other way after rounding
        sys.exit("the predictions do not agree")


if __name__ == "__main__":
    main()
