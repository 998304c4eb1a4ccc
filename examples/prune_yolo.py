"""YOLOv4-tiny pruned in every way of torch's prune interface, and what becomes of it once zeros are really left out.

    python examples/prune_yolo.py              # trains, prunes sixteen ways, finetunes, converts, times
    python examples/prune_yolo.py --fast       # the same in miniature, under a minute: shows only that it runs

Unstructured L1 pruning of the convolutions, of convolutions and batch norms together, of batch norms alone; whole
filters by their L2 norm, with and without sparse training before (group lasso, Wen et al. 2016, arXiv:1608.03665),
removed for real by `compact`. Each is scored just cut and finetuned; as in the usual demonstrations, the confidence in
every object of one picture is shown too. The network has half the usual width. What is done is kept in `--output` and
skipped the next time, so the same command goes on after an interruption; only the timing is repeated.
Needs `pip install 'sparseprune[torch,compact,examples]'`.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from detection.boxes import Detections, iou
from detection.canvases import CLASSES, Canvases, canvases
from detection.filters import prune_filters
from detection.runs import Results, milliseconds, score, train
from detection.yolo import YOLOCoder
from torch import Tensor, nn

import sparseprune
from sparseprune.pruning import Magnitude
from sparseprune.regularizers import GroupLasso
from sparseprune.zoo import YOLOv4Tiny

FILTERS = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Plan:
    """How large and how long."""

    width: int = 16  # of the first convolution; YOLOv4-tiny has 32
    size: int = 96  # pixels a side
    train_canvases: int = 8_000
    epochs: int = 5  # and one more, plain or sparse
    finetune_canvases: int = 2_000
    test_canvases: int = 1_000
    picture: int = 43  # the test canvas whose objects' confidences are shown
    filters: tuple[float, ...] = FILTERS
    tune: Literal["measure", "fixed"] = "measure"  # how `convert` chooses
    rounds: int = 6  # of timing, a tenth of a second for each call


FAST = Plan(4, 64, 32, 1, 16, 8, 0, (0.5,), "fixed", 1)


@dataclass(frozen=True)
class Task:
    """What every row needs."""

    plan: Plan
    data: Path | None
    output: Path
    coder: YOLOCoder

    def canvases(self, part: str, count: int) -> Canvases:
        return canvases(part, count, size=self.plan.size, directory=self.data)

    @cached_property
    def test(self) -> tuple[Tensor, Tensor]:
        return self.canvases("test", self.plan.test_canvases).all()

    def picture(self) -> tuple[Tensor, Tensor]:
        image, targets = (part[self.plan.picture] for part in self.test)
        return image.unsqueeze(0), targets[targets[:, 4] >= 0]

    def weights(self, name: str) -> Path:
        return self.output / f"{name}.safetensors"


def network(plan: Plan) -> YOLOv4Tiny:
    """Ten classes. Outputs start near zero, and objects unlikely: nearly all places hold none."""
    model = YOLOv4Tiny(10, width=plan.width, seed=0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for head in (model.coarse[-1], model.fine[-1]):
            nn.init.normal_(head.weight, std=0.01)  # type: ignore[arg-type]
            head.bias.view(3, -1)[:, 4] = -4.0  # type: ignore[operator,union-attr]
    return model


def filters_of(model: nn.Module) -> tuple[str, ...]:
    """Every convolution but the two that give the outputs."""
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    return tuple(name for name in names if name not in ("coarse.1", "fine.1"))


def cases(plan: Plan) -> dict[str, tuple[str, Callable[[nn.Module], Any]]]:
    """Row -> the stage it starts from, and how it is pruned."""
    norms = (nn.BatchNorm2d,)
    found: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
        "convolutions 50 %": ("dense", lambda m: sparseprune.prune(m, 0.5, include=filters_of(m))),
        "convolutions 95 %": ("dense", lambda m: sparseprune.prune(m, 0.95, include=filters_of(m))),
        "convolutions and BN 20 %": ("dense", lambda m: sparseprune.prune(m, 0.2, include=filters_of(m) + norms)),
        "BN 20 %": ("dense", lambda m: sparseprune.prune(m, 0.2, include=norms)),
        "BN 50 %": ("dense", lambda m: sparseprune.prune(m, 0.5, include=norms)),
    }
    for start, label in (("dense", "filters"), ("sparse", "sparse training, filters")):
        for amount in plan.filters:
            found[f"{label} {amount:.0%}".replace("%", " %")] = (start, partial(cut_filters, amount=amount))
    return found


def cut_filters(model: nn.Module, *, amount: float) -> None:
    prune_filters(model, amount, filters_of(model), Magnitude(p=2))


def fit(task: Task, model: nn.Module, name: str, canvases: int, epochs: int, rate: float, **options: Any) -> None:
    """In bfloat16: half as long again would float32 take."""
    data = task.canvases("train", canvases)
    folder = task.output / name
    train(model, task.coder.loss, data, epochs=epochs, rate=rate, folder=folder, autocast=torch.bfloat16, **options)


def base(task: Task) -> dict[str, Any]:
    """Train from scratch."""
    model, plan = network(task.plan), task.plan
    fit(task, model, "base", plan.train_canvases, plan.epochs, 2e-3)
    sparseprune.save_weights(model, task.weights("base"))
    return {"finetuned": figures(task, model)}


def longer(task: Task, name: str) -> dict[str, Any]:
    """One more epoch: "dense" as before, "sparse" with group lasso on the filters."""
    model, plan = network(task.plan), task.plan
    sparseprune.load_weights(model, task.weights("base"))
    penalty = GroupLasso(1e-4, include=filters_of(model)) if name == "sparse" else None
    fit(task, model, name, plan.train_canvases, 1, 1e-3, regularizer=penalty)
    sparseprune.save_weights(model, task.weights(name))
    return {"finetuned": figures(task, model)}


def case(task: Task, name: str, start: str, prune: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """Prune and finetune."""
    model, plan = network(task.plan), task.plan
    sparseprune.load_weights(model, task.weights(start))
    prune(model)
    cut = figures(task, model)
    fit(task, model, name, plan.finetune_canvases, 1, 5e-4)
    sparseprune.finalize(model)
    sparseprune.save_weights(model, task.weights(name))
    return {"cut": cut, "finetuned": figures(task, model)}


def figures(task: Task, model: nn.Module) -> dict[str, Any]:
    """mAP, and the confidence in every object of the picture."""
    image, targets = task.picture()
    with torch.inference_mode():
        seen = task.coder.decode(model.eval()(image))
    return {**score(model, task.coder, task.test), "confidences": confidences(seen, targets)}


def confidences(found: Detections, targets: Tensor) -> list[float]:
    """Of each object (K, 5): the best score of a detection of its class that overlaps it by a half; 0: not found."""
    overlap = iou(targets[:, :4], found.boxes[0])  # (K, detections)
    right = (overlap >= 0.5) & (found.classes[0] == targets[:, 4:].long())
    best: list[float] = torch.where(right, found.scores[0], 0).amax(1).tolist()
    return best


def timing(task: Task, names: list[str]) -> dict[str, dict[str, float]]:
    """Of each row milliseconds of one canvas (zeros in place, compact, converted), and bytes of files."""
    calls: dict[str, Callable[[], Any]] = {}
    bytes_of: dict[str, dict[str, float]] = {}
    image, _ = task.picture()
    for name in names:
        model = network(task.plan).eval()
        sparseprune.load_weights(model, task.weights(name))
        small = sparseprune.compact(model, image)
        fast = sparseprune.convert(small, image, tune=task.plan.tune)
        program = task.output / f"{name}.spr"
        fast.save(program)
        stored = io.BytesIO()
        torch.save(small.state_dict(), stored)
        bytes_of[name] = {"torch_bytes": len(stored.getvalue()), "program_bytes": program.stat().st_size}
        calls[f"{name} masked"] = partial(model, image)
        calls[f"{name} compact"] = partial(small, image)
        calls[f"{name} converted"] = partial(fast, image)
    taken = milliseconds(calls, rounds=task.plan.rounds)
    kinds = ("masked", "compact", "converted")
    return {name: {kind: taken[f"{name} {kind}"] for kind in kinds} | bytes_of[name] for name in names}


def table(rows: dict[str, dict[str, Any]], times: dict[str, dict[str, float]], objects: list[str]) -> str:
    """Markdown."""
    lines = [
        f"| pruned | mAP just cut | {' / '.join(objects)} | mAP finetuned | {' / '.join(objects)} | "
        "ms zeros in place | ms compact | ms converted | file, torch | file, program |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, took in times.items():
        cut, after = rows[name].get("cut"), rows[name]["finetuned"]
        before = f"{cut['mAP']:.3f} | {_confidences(cut)}" if cut else "|"
        lines.append(
            f"| {name} | {before} | {after['mAP']:.3f} | {_confidences(after)} | {took['masked']:.2f} | "
            f"{took['compact']:.2f} | {took['converted']:.2f} | {took['torch_bytes'] / 1e6:.2f} MB | "
            f"{took['program_bytes'] / 1e6:.2f} MB |"
        )
    return "\n".join(lines)


def _confidences(found: dict[str, Any]) -> str:
    return " / ".join(f"{value:.2f}".lstrip("0") if value else "–" for value in found["confidences"])


def run(task: Task) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """Everything that is not done yet -> figures of the rows, and their times."""
    task.output.mkdir(parents=True, exist_ok=True)
    results = Results(task.output / "results.json")
    results.once("base", partial(base, task))
    for name in ("dense", "sparse"):
        results.once(name, partial(longer, task, name))
    for name, (start, prune) in cases(task.plan).items():
        results.once(name, partial(case, task, name, start, prune))
    return results.rows, timing(task, [name for name in results.rows if name != "base"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's IDX files (default: the subset here)")
    parser.add_argument("--output", type=Path, default=Path("prune_yolo_out"), help="where the files go")
    parser.add_argument("--fast", action="store_true", help="in miniature")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sparseprune.set_num_threads(args.threads)
    plan = FAST if args.fast else Plan()
    task = Task(plan, args.data, args.output, YOLOCoder(plan.size))
    rows, times = run(task)
    (args.output / "times.json").write_text(json.dumps(times, indent=1))
    print("\n" + table(rows, times, [CLASSES[int(kind)] for kind in task.picture()[1][:, 4]]))


if __name__ == "__main__":
    main()
