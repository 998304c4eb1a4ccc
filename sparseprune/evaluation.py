"""How good a model is on a data set: accuracy, loss, and a report by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "ClassReport", "Evaluation", "Loss", "Meter", "casting", "check_loader", "check_loss", "evaluate",
    "evaluate_loader", "length", "mode", "place_of", "scalar", "unpack",
]  # fmt: skip

Loss = Callable[[Any, Any], Tensor]

_MOST_CLASSES = 2000  # a confusion matrix of more would take more memory than it is worth


@dataclass(frozen=True)
class ClassReport:
    """One class: shares in [0, 1]; NaN where there is nothing to take a share of."""

    label: int
    precision: float  # of the examples predicted to be of this class, how many are
    recall: float  # of the examples of this class, how many were found
    f1: float  # harmonic mean of the two
    examples: int


@dataclass(frozen=True)
class Evaluation:
    """Means over all examples; `accuracy` in [0, 1], NaN where outputs are not class scores. `str()` is a table."""

    accuracy: float
    loss: float
    examples: int
    classes: tuple[ClassReport, ...] = ()  # one a class; empty where outputs are not class scores

    def report(self, names: Sequence[str] | None = None) -> str:
        """The table by class, with `names` instead of numbers where given.

        Raises:
            ValueError: not one name a class.
        """
        if names is not None and len(names) != len(self.classes):
            raise ValueError(f"names has {len(names)} entries, the model {len(self.classes)} classes")
        labels = [str(each.label) if names is None else names[each.label] for each in self.classes]
        width = max([len(label) for label in labels] + [8])
        lines = [f"{'class':{width}}  precision  recall      f1  examples"]
        for label, each in zip(labels, self.classes, strict=True):
            shares = f"{each.precision:9.4f}  {each.recall:6.4f}  {each.f1:6.4f}"
            lines.append(f"{label:{width}}  {shares}  {each.examples:8,}")
        total = f"accuracy {self.accuracy:.4f}, loss {self.loss:.4f}, {self.examples:,} examples"
        return "\n".join([*lines, total] if self.classes else [total])

    def __str__(self) -> str:
        return self.report()


def evaluate(
    model: nn.Module, loader: Iterable[Any], *, loss: Loss | None = None, device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
) -> Evaluation:  # fmt: skip
    """Accuracy, mean loss and a report by class over a loader, in eval mode without gradients; the mode is restored.

    Args:
        model: any module; class scores (N, C) or (N, C, ...) give an accuracy.
        loader: yields (inputs, targets), or (input1, input2, ..., targets); targets int64 (N) or (N, ...).
        loss: `(outputs, targets) -> scalar`; cross entropy if None.
        device: moves the model there first; None leaves it where it is.
        autocast: dtype to compute in, such as torch.bfloat16; None for the model's own.

    Raises:
        ValueError: the loader yields nothing.
        TypeError: `loader` is no iterable, a batch is not a tuple of inputs and targets, or the loss is no scalar.

    Example:
        >>> print(evaluate(model, test_loader))
    """
    check_loader(loader, "loader")
    check_loss(loss)
    return evaluate_loader(model, loader, "loader", loss, place_of(model, device), autocast)


def evaluate_loader(
    model: nn.Module, loader: Iterable[Any], argument: str, loss: Loss | None, place: torch.device | None,
    autocast: torch.dtype | None,
) -> Evaluation:  # fmt: skip
    """`evaluate` on the device where the model is; `argument` names the loader in errors."""
    meter = Meter(per_class=True)
    with mode(model, training=False), torch.no_grad():
        for batch in loader:
            inputs, targets = unpack(batch, place, argument)
            with casting(place, autocast):
                outputs = model(*inputs)
                value = (loss or F.cross_entropy)(outputs, targets)
            meter.add(outputs, targets, scalar(value))
    if not meter.examples:
        raise ValueError(f"{argument} is empty: it yielded no batch (or was used up: a generator gives its once)")
    return meter.result()


class Meter:
    """Running means over examples, and which class was taken for which."""

    def __init__(self, *, per_class: bool = False) -> None:
        self.examples = 0
        self._loss = 0.0
        self._correct = 0
        self._judged = 0
        self._per_class = per_class
        self._confusion: Tensor | None = None  # (classes, classes): true class, predicted class

    def add(self, outputs: Any, targets: Any, loss: float) -> None:
        count = len(targets) if isinstance(targets, Tensor) and targets.ndim else 1
        self.examples += count
        self._loss += loss * count
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or outputs.ndim < 2:
            return
        if not targets.is_floating_point() and targets.shape == outputs.shape[:1] + outputs.shape[2:]:
            predicted, classes = outputs.argmax(1), outputs.shape[1]
            self._correct += int((predicted == targets).sum())
            self._judged += targets.numel()
            if self._per_class and classes <= _MOST_CLASSES:
                self._add_classes(predicted.reshape(-1), targets.reshape(-1).long(), classes)

    def totals(self) -> list[float]:
        """What processes add up to get their common result; `set_totals` takes the sum back."""
        return [self.examples, self._loss, self._correct, self._judged]

    def set_totals(self, totals: Sequence[float]) -> None:
        self.examples, self._correct, self._judged = int(totals[0]), int(totals[2]), int(totals[3])
        self._loss = totals[1]

    def result(self) -> Evaluation:
        accuracy = self._correct / self._judged if self._judged else math.nan
        return Evaluation(accuracy, self._loss / max(1, self.examples), self.examples, self._classes())

    def _add_classes(self, predicted: Tensor, targets: Tensor, classes: int) -> None:
        known = (targets >= 0) & (targets < classes)  # an ignored target (-100, say) is of no class
        pairs = targets[known] * classes + predicted[known]
        found = torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes).cpu()
        self._confusion = found if self._confusion is None else self._confusion + found

    def _classes(self) -> tuple[ClassReport, ...]:
        if self._confusion is None:
            return ()
        reports = []
        for label, row in enumerate(self._confusion):
            hits, there, taken = int(row[label]), int(row.sum()), int(self._confusion[:, label].sum())
            precision, recall = (hits / n if n else math.nan for n in (taken, there))
            f1 = 2 * hits / (there + taken) if there + taken else math.nan
            reports.append(ClassReport(label, precision, recall, f1, there))
        return tuple(reports)


# --- what `evaluate` and `finetune` share ----------------------------------------------------------------------------


def check_loader(loader: Any, argument: str) -> None:
    """Raises TypeError unless `loader` can be iterated over."""
    if isinstance(loader, Tensor) or not (isinstance(loader, Iterable) or hasattr(loader, "__getitem__")):
        raise TypeError(f"{argument} must yield batches of (inputs, targets), got {type(loader).__name__}")


def check_loss(loss: Any) -> None:
    """Raises TypeError unless `loss` is None or a function; a class (`nn.MSELoss` without brackets) is none."""
    if loss is not None and (isinstance(loss, type) or not callable(loss)):
        raise TypeError(f"loss must be a function of (outputs, targets), such as nn.CrossEntropyLoss(), got {loss!r}")


def scalar(loss: Any) -> float:
    """What a loss function returned, as a number. Raises TypeError where it is not one."""
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return float(loss.detach())
    if isinstance(loss, (int, float)):
        return float(loss)
    got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise TypeError(f"loss must return a scalar tensor, got {got}")


def unpack(batch: Any, place: torch.device | None, argument: str) -> tuple[list[Any], Any]:
    """Inputs and targets of one batch, on the model's device."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(f"{argument} must yield (inputs, targets), got {type(batch).__name__}")
    moved = [_moved(item, place) for item in batch]
    return moved[:-1], moved[-1]


def _moved(item: Any, place: torch.device | None) -> Any:
    if isinstance(item, Tensor):
        return item.to(place, non_blocking=True) if place else item
    if isinstance(item, (list, tuple)) and all(isinstance(each, Tensor) for each in item):  # targets of a detector, say
        return type(item)(each.to(place, non_blocking=True) if place else each for each in item)
    return item


def place_of(model: nn.Module, device: torch.device | str | None) -> torch.device | None:
    """The model's device, moved to `device` first if there is one; None for a model without parameters."""
    if device is not None:
        model.to(device)
    parameter = next(model.parameters(), None)
    return None if parameter is None else parameter.device


def casting(place: torch.device | None, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype` on the model's device; does nothing for None."""
    return torch.autocast(place.type if place else "cpu", dtype=dtype, enabled=dtype is not None)


def length(loader: Any) -> int | None:
    """Batches that a loader has, if it knows."""
    try:
        return len(loader)
    except TypeError:  # no length, or an IterableDataset behind a DataLoader
        return None


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or eval mode, every layer's own restored afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was
