"""Autoprune against uniform and global pruning of equal measured latency: ResNet-18 for 32×32 images, Fashion-MNIST.

    python examples/autoprune.py --data DIR     # DIR: Fashion-MNIST's four IDX files, raw or .gz
    python examples/autoprune.py                # without them: the subset here, 2,000 test images instead of 10,000

A network of reduced width is trained on 10,000 images, once for each seed. Then each of these prunes it in one shot
until the *converted* network takes the same time on this machine (`--speedup` times less than the fastest dense torch):

    autoprune                     sparsities by dynamic programming over measured times; errors by SPDY's search
    autoprune, magnitude          the same with the share of the squared weights that goes as error: no data needed
    autoprune, output             the same with the change of each layer's output
    uniform                       one sparsity in all layers but the first and the last, which stay dense
    uniform, all layers           one sparsity in all layers
    global                        one threshold of magnitude over all layers but the first and the last

Accuracy is measured with recalibrated batch norms, and after finetuning all in the same way. `results.json` in
`--output` holds every figure; what is there is not done again, so the script may be stopped at any time. `--only`
does one part: `train`, `prune` (which measures times: best on an idle machine) or `finetune`. `--fast` makes everything
tiny.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparseprune
from sparseprune.latency import SPARSITIES
from sparseprune.profiling import profile_models
from sparseprune.timing import thread_count
from sparseprune.zoo import resnet18_32

sys.path.insert(0, str(Path(__file__).parent / "data"))
from make_subset import load as load_images  # noqa: E402  (it lies beside the images)

ENDS = ("conv1", "fc")
OURS, UNIFORM = "autoprune", "uniform"


def datasets(directory: Path | None, images: int) -> tuple[TensorDataset, TensorDataset]:
    """The first `images` for training, equally many of each class, and all for testing: float32 (N, 1, 32, 32)."""
    arrays = load_images(directory)

    def part(name: str, most: int | None) -> TensorDataset:
        labels = arrays[f"{name}_labels"]
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[: most and most // 10] for c in range(10)]))
        padded = np.pad(arrays[f"{name}_images"][chosen], ((0, 0), (2, 2), (2, 2)))  # 28×28 to 32×32
        pixels = torch.from_numpy(padded).unsqueeze(1).float() / 255
        return TensorDataset((pixels - 0.2195) / 0.3327, torch.from_numpy(labels[chosen]).long())

    return part("train", images), part("test", None if images >= 10_000 else images)


def train(model: nn.Module, data: TensorDataset, epochs: int, rate: float, seed: int) -> None:
    """Ordinary training in bfloat16; masks, where the model has some, are held."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch trains faster so
    loader = DataLoader(data, batch_size=128, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(loader))
    sparseprune.finetune(
        model, loader, epochs=epochs, optimizer=optimizer, scheduler=scheduler, autocast=torch.bfloat16, seed=seed
    )
    model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    return sparseprune.evaluate(model, DataLoader(data, batch_size=250), autocast=torch.bfloat16).accuracy


# ---- pruning to one latency ----


def prune_uniform(model: nn.Module, sparsity: float, exclude: Iterable[str] = ENDS) -> nn.Module:
    return sparseprune.prune(model, sparsity, scope="local", exclude=exclude)


def prune_all(model: nn.Module, sparsity: float) -> nn.Module:
    return prune_uniform(model, sparsity, ())


def prune_global(model: nn.Module, sparsity: float) -> nn.Module:
    return sparseprune.prune(model, sparsity, exclude=ENDS)


BY_SPARSITY: dict[str, Callable[[nn.Module, float], nn.Module]] = {
    UNIFORM: prune_uniform, "uniform, all layers": prune_all, "global": prune_global,
}  # fmt: skip
BY_ERRORS = {OURS: "search", "autoprune, magnitude": "magnitude", "autoprune, output": "output"}
VARIANTS = (*BY_ERRORS, *BY_SPARSITY)


def match(
    fresh: Callable[[], nn.Module], prune: Callable[[nn.Module, float], nn.Module],
    measure: Callable[[nn.Module], float], target: float, guess: float, tolerance: float, rounds: int,
) -> tuple[nn.Module, float, float]:  # fmt: skip
    """The model pruned to the sparsity whose measured time is nearest to `target`: model, sparsity, milliseconds."""
    low, high, tried = math.log(1 - 0.9995), math.log(1 - 0.5), []  # of the density
    place = math.log(1 - guess)
    for _ in range(rounds):
        sparsity = 1 - math.exp(place)
        model = prune(fresh(), sparsity)
        ms = measure(model)
        tried.append((abs(ms / target - 1), sparsity, ms, model))
        if tried[-1][0] <= tolerance:
            break
        low, high = (low, place) if ms > target else (place, high)
        place = (low + high) / 2 if len(tried) > 2 else min(max(place + 1.3 * math.log(target / ms), low), high)
    _, sparsity, ms, model = min(tried, key=lambda found: found[0])
    return model, sparsity, ms


# ---- the experiment ----


class Experiment:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.path = options, options.output / "results.json"
        self.train_data, self.test_data = datasets(options.data, options.images)
        self.variants = options.variants
        self.timed = torch.zeros(options.batch, 1, 32, 32)
        options.output.mkdir(parents=True, exist_ok=True)
        settings = {name: getattr(options, name) for name in
                    ("width", "images", "epochs", "finetune", "batch", "speedup", "threads", "tolerance")}  # fmt: skip
        self.results: dict[str, Any] = {"settings": settings, "runs": {}}
        if self.path.exists():
            self.results = json.loads(self.path.read_text())
            if self.results["settings"] != settings:
                raise SystemExit(f"{self.path} was made with other settings: {self.results['settings']}")

    def record(self, key: str, facts: dict[str, Any]) -> None:
        """Adds to what is in the file by now: another part of the script may be running."""
        if self.path.exists():
            self.results = json.loads(self.path.read_text())
        self.results["runs"].setdefault(key, {}).update(facts)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.results, indent=1) + "\n")
        beside.replace(self.path)

    def network(self, seed: int) -> nn.Module:
        blocks = (1, 1) if self.options.fast else (2, 2, 2, 2)
        model = resnet18_32(width=self.options.width, in_channels=1, blocks=blocks, seed=seed).eval()
        path = self.options.output / f"dense-{seed}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        return model

    def file(self, variant: str, seed: int) -> Path:
        path: Path = self.options.output / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}.pt"
        return path

    def train(self, seed: int) -> None:
        path = self.options.output / f"dense-{seed}.pt"
        if path.exists():
            return
        model = self.network(seed)
        train(model, self.train_data, self.options.epochs, 0.1, seed)
        torch.save(model.state_dict(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        self.record(f"dense/{seed}", {"finetuned": accuracy(model, self.test_data)})

    def table(self) -> sparseprune.LatencyTable:
        path = self.options.output / "table.json"
        if not path.exists():
            sparsities = (0.0, 0.9, 0.99) if self.options.fast else SPARSITIES
            sparseprune.LatencyTable.measure(
                self.network(0), self.timed, threads=self.options.threads, sparsities=sparsities
            ).save(path)
        return sparseprune.LatencyTable.load(path)

    def target(self, table: sparseprune.LatencyTable) -> float:
        if self.options.fast:  # whatever this machine reaches
            return (table.predict({}) + table.predict(dict.fromkeys(table.layers, 0.99))) / 2
        return table.dense_ms / float(self.options.speedup)

    def prune(self, variant: str, seed: int) -> None:
        key = f"{variant}/{seed}"
        if key in self.results["runs"]:
            return
        table, options = self.table(), self.options
        target = self.target(table)
        model = self.network(seed)
        if variant in BY_ERRORS:
            images, labels = (tensor[: options.calibration] for tensor in self.train_data.tensors)
            batches = list(zip(torch.split(images, 256), torch.split(labels, 256), strict=True))
            found = sparseprune.autoprune(
                model, self.timed, latency_ms=target, table=table, errors=BY_ERRORS[variant], batches=batches,
                tolerance=options.tolerance, trials=options.trials, autocast=torch.bfloat16, seed=seed,
                rounds=options.rounds,
            )  # fmt: skip
            print(f"{key}\n{found}", flush=True)
            ms = found.measured_ms
            facts: dict[str, Any] = {"predicted_ms": found.predicted_ms, "rounds": len(found.attempts)}
        else:
            before = self.results["runs"].get(f"{variant}/0", {}).get("sparsity", 0.98)
            measure = table.yardstick(model, self.timed, target).measure
            model, sparsity, ms = match(
                lambda: self.network(seed), BY_SPARSITY[variant], measure, target, before, options.tolerance,
                options.rounds,
            )
            facts = {"sparsity": sparsity}
        torch.save(model.state_dict(), self.file(variant, seed))
        density = sparseprune.summary(model).density
        print(f"{key}: {ms:.4f} ms for {target:.4f}, {density:.2%} of the weights", flush=True)
        self.record(key, {"ms": ms, "target_ms": target, "density": density, **facts})

    def compare(self, seed: int) -> None:
        """Converts every variant's network once more and times them by turns: a check that took no part in pruning."""
        keys = [f"{variant}/{seed}" for variant in self.variants]
        if any("by_turns_ms" in self.results["runs"][key] for key in keys):
            return
        models = (sparseprune.load_pruned(self.network(seed), self.file(variant, seed)) for variant in self.variants)
        profiles, _, _ = profile_models(models, (self.timed,))
        for key, profile in zip(keys, profiles, strict=True):
            self.record(key, {"by_turns_ms": profile.whole})

    def finetune(self, variant: str, seed: int) -> None:
        run = self.results["runs"].get(f"{variant}/{seed}")
        if run is None or "finetuned" in run:
            return
        model = sparseprune.load_pruned(self.network(seed), self.file(variant, seed))
        sparseprune.recalibrate_bn(model, torch.split(self.train_data.tensors[0][:2500], 250))
        one_shot = accuracy(model, self.test_data)
        sparseprune.hold_zeros(model)
        train(model, self.train_data, self.options.finetune, 0.03, seed)
        finetuned = accuracy(model, self.test_data)
        print(f"{variant}/{seed}: {one_shot:.4f} in one shot, {finetuned:.4f} finetuned", flush=True)
        self.record(f"{variant}/{seed}", {"one_shot": one_shot, "finetuned": finetuned})

    def report(self) -> str:
        """A Markdown table: means and standard deviations over seeds; differences are between one seed's networks."""
        head = ("", "ms", "weights kept", "in one shot", "finetuned", f"{OURS} is better by")
        rows = [head, ("---",) * len(head)]
        for variant in ["dense", *self.variants]:
            found = self.finished(variant)
            if not found:
                continue
            cells = ["-"] * 3
            if variant != "dense":
                cells = [f"{statistics.mean(r['by_turns_ms'] for r in found):.4f}",
                         f"{statistics.mean(r['density'] for r in found):.2%}",
                         spread([r["one_shot"] for r in found])]  # fmt: skip
            ours = self.finished(OURS) if variant not in ("dense", OURS) else []
            gaps = [a["finetuned"] - b["finetuned"] for a, b in zip(ours, found, strict=False)]
            rows.append((variant, *cells, spread([r["finetuned"] for r in found]), spread(gaps) if gaps else "-"))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def finished(self, variant: str) -> list[dict[str, Any]]:
        """Every seed's figures; nothing while one is missing."""
        found = [self.results["runs"].get(f"{variant}/{seed}", {}) for seed in range(self.options.seeds)]
        return found if all("finetuned" in run for run in found) else []


def spread(shares: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(shares):.2f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.2f}{deviation}"


def _flag(variant: str) -> str:
    return variant.replace(", ", "-").replace(" ", "-")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's IDX files (default: the subset here)")
    parser.add_argument("--output", type=Path, default=Path("autoprune_out"))
    parser.add_argument("--only", choices=("train", "prune", "finetune"), help="one part (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=16, help="of the first stage; 64 is the full ResNet-18")
    parser.add_argument("--images", type=int, default=10_000, help="to train on")
    parser.add_argument("--epochs", type=int, default=4, help="of dense training")
    parser.add_argument("--finetune", type=int, default=1, help="epochs after pruning")
    parser.add_argument("--batch", type=int, default=8, help="images in the call that is timed")
    parser.add_argument("--speedup", type=float, default=16.0, help="the target, against the fastest dense torch")
    parser.add_argument("--tolerance", type=float, default=0.03, help="how far from the target counts as equal latency")
    parser.add_argument("--rounds", type=int, default=7, help="conversions at most, to get there")
    parser.add_argument("--calibration", type=int, default=256, help="images for the search")
    parser.add_argument("--trials", type=int, default=50, help="of each round of the search")
    parser.add_argument("--threads", type=int, default=1, help="of the converted network")
    parser.add_argument("--train-threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--variants", default=",".join(map(_flag, VARIANTS)), help="some of %(default)s")
    parser.add_argument("--fast", action="store_true", help="tiny, in seconds: to see that it runs")
    options = parser.parse_args(arguments)
    if options.fast:
        options.width, options.images, options.epochs, options.seeds = 8, 200, 1, 1
        options.calibration, options.trials, options.rounds, options.variants = 64, 1, 1, f"{OURS},{UNIFORM}"
    known = {_flag(variant): variant for variant in VARIANTS}
    if unknown := set(options.variants.split(",")) - set(known):
        parser.error(f"--variants: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    options.variants = [known[name] for name in options.variants.split(",")]
    torch.set_num_threads(options.train_threads)
    experiment = Experiment(options)
    for seed in range(options.seeds):
        if options.only in (None, "train"):
            experiment.train(seed)
    for seed in range(options.seeds):
        if options.only in (None, "prune"):
            with thread_count(options.threads):
                for variant in experiment.variants:
                    experiment.prune(variant, seed)
                experiment.compare(seed)
    for seed in range(options.seeds):
        if options.only in (None, "finetune"):
            for variant in experiment.variants:
                experiment.finetune(variant, seed)
    print(experiment.report())


if __name__ == "__main__":
    main()
