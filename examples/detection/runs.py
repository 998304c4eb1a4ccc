"""Training, scores, rows that are done once, and timing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import sparseprune
from sparseprune.timing import take_turns

from .boxes import Detections
from .score import mean_average_precision

__all__ = ["Coder", "Results", "milliseconds", "score", "train"]


class Coder(Protocol):
    """What `SSDCoder` and `YOLOCoder` have in common."""

    def loss(self, outputs: Any, targets: Tensor) -> Tensor: ...

    def decode(self, outputs: Any) -> Detections: ...


class Results:
    """Rows of figures by name, in a JSON file that is written anew (beside, then renamed) with every row.

    Example:
        >>> results = Results(Path("results.json"))
        >>> row = results.once("dense", lambda: {"mAP": measure()})
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of that name; `work` makes it if an earlier run has not."""
        if name not in self.rows:
            print(f"{name}:", flush=True)
            self.rows[name] = work()
            beside = self.path.with_suffix(".tmp")
            beside.write_text(json.dumps(self.rows, indent=1))
            beside.replace(self.path)
        return self.rows[name]


def train(
    model: nn.Module, loss: Callable[[Any, Any], Tensor], data: Dataset[Any], *, epochs: int, rate: float, folder: Path,
    regularizer: Callable[[nn.Module], Tensor] | None = None, autocast: torch.dtype | None = None, batch: int = 16,
) -> None:  # fmt: skip
    """AdamW with one cycle of the learning rate (Smith 2018, arXiv:1803.09820); masks are held.

    Goes on where it was interrupted: after the last whole epoch in `folder`.
    """
    loader = DataLoader(data, batch, shuffle=True, drop_last=True)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch trains faster so
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * len(loader), pct_start=0.2)
    sparseprune.finetune(
        model, loader, epochs=epochs, loss=loss, optimizer=optimizer, scheduler=cycle, regularizer=regularizer,
        checkpoint_dir=folder, autocast=autocast,
    )  # fmt: skip


@torch.inference_mode()
def score(model: nn.Module, coder: Coder, data: tuple[Tensor, Tensor]) -> dict[str, float]:
    """COCO's mAP on canvases (N, 3, size, size) with targets (N, M, 5)."""
    model.eval()
    images, targets = data
    batches = tqdm(torch.split(images, 50), desc="scoring", mininterval=_often())
    found = [coder.decode(model(batch.contiguous(memory_format=torch.channels_last))) for batch in batches]
    parts = zip(*((each.boxes, each.scores, each.classes) for each in found), strict=True)
    return mean_average_precision(Detections(*(torch.cat(part) for part in parts)), targets)


@torch.inference_mode()
def milliseconds(calls: dict[str, Callable[[], Any]], *, rounds: int) -> dict[str, float]:
    """Median milliseconds of each call; they take turns, so that a busy machine slows them alike."""
    with tqdm(total=rounds * len(calls), desc="timing", mininterval=_often()) as bar:
        samples = take_turns(calls, rounds, 0.1, bar)
    return {name: float(torch.tensor(taken.ms).median()) for name, taken in samples.items()}


def _often() -> float:
    """Seconds between two states of a progress bar: a log file wants few."""
    return 0.2 if sys.stderr.isatty() else 30.0
