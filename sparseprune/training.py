"""Finetuning a pruned model with its masks held, and measuring it."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from .errors import SparsepruneError
from .pruning.masks import effective_weight, get_mask, iter_masked
from .pruning.statistics import summary

__all__ = ["Evaluation", "History", "evaluate", "finetune"]

Loss = Callable[[Any, Any], Tensor]


@dataclass
class History:
    """What `finetune` saw, one entry per epoch. Accuracies are NaN where outputs are not class scores."""

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)  # empty without val_loader
    val_accuracy: list[float] = field(default_factory=list)
    sparsity: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)  # at the epoch's first step
    seconds: list[float] = field(default_factory=list)
    best_epoch: int | None = None  # counted from 0; the one whose weights the model holds; None without val_loader


@dataclass(frozen=True)
class Evaluation:
    """Means over all examples; `accuracy` in [0, 1], NaN where outputs are not class scores."""

    accuracy: float
    loss: float
    examples: int


def evaluate(
    model: nn.Module, loader: Iterable[Any], *, loss: Loss | None = None, device: torch.device | str | None = None
) -> Evaluation:
    """Accuracy and mean loss over a loader, in eval mode and without gradients; the mode is restored.

    Args:
        model: any module; class scores (N, C) or (N, C, ...) give an accuracy.
        loader: yields (inputs, targets), or (input1, input2, ..., targets); targets int64 (N) or (N, ...).
        loss: `(outputs, targets) -> scalar`; cross entropy if None.
        device: moves the model there first; None leaves it where it is.

    Raises:
        ValueError: the loader yields nothing.
        TypeError: a batch is not a tuple of inputs and targets.

    Example:
        >>> evaluate(model, test_loader).accuracy
    """
    place = _place(model, device)
    meter = _Meter()
    with _mode(model, training=False), torch.no_grad():
        for batch in loader:
            inputs, targets = _unpack(batch, place, "loader")
            outputs = model(*inputs)
            meter.add(outputs, targets, float((loss or F.cross_entropy)(outputs, targets)))
    if not meter.examples:
        raise ValueError("loader is empty: it yielded no batch")
    return meter.result()


def finetune(
    model: nn.Module, train_loader: Iterable[Any], *, epochs: int, val_loader: Iterable[Any] | None = None,
    loss: Loss | None = None, optimizer: Optimizer | Callable[[Iterator[nn.Parameter]], Optimizer] | None = None,
    scheduler: Any = None, device: torch.device | str | None = None, seed: int | None = 0, progress: bool = True,
) -> History:  # fmt: skip
    """Train a pruned model further, in place, with its masks held.

    Masks (ours, or `torch.nn.utils.prune`'s) hold through momentum and weight decay, which is checked at the end. Plain
    zeros do not: call `hold_zeros(model)` first; a warning says so where it looks forgotten. With `val_loader` the
    model ends with the weights of its best epoch (by accuracy, then loss). Every layer's train/eval mode is restored.

    Args:
        model: any module.
        train_loader: yields (inputs, targets), or (input1, input2, ..., targets).
        epochs: at least 1.
        val_loader: evaluated after every epoch.
        loss: `(outputs, targets) -> scalar`; cross entropy if None.
        optimizer: an `Optimizer` of this model's parameters, or a function from parameters to one. None: SGD with
            lr 0.01, Nesterov momentum 0.9 and weight decay 5e-4.
        scheduler: a torch scheduler, or a function from optimizer to one; stepped once an epoch, but once a batch if it
            is a OneCycleLR or CyclicLR. None: with the default optimizer, a short warm-up and a cosine to zero,
            stepped once a batch; with your own optimizer, a constant rate.
        device: moves the model there first; None leaves it where it is.
        seed: seeds torch for shuffling and dropout, and restores its state afterwards; None leaves it alone.
        progress: show a bar with loss, accuracy and sparsity.

    Returns:
        A `History`.

    Raises:
        ValueError: an empty loader; `epochs` below 1; an optimizer of some other model.
        TypeError: a batch is not a tuple of inputs and targets.
        FloatingPointError: the loss is NaN or infinite; the message names epoch and step. That step is not applied.
        SparsepruneError: a pruned weight is not zero, or a mask changed, at the end.

    Example:
        >>> prune(model, 0.95)
        >>> history = finetune(model, train_loader, epochs=5, val_loader=val_loader)
    """
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs must be an int of at least 1, got {epochs!r}")
    for name, loader in (("train_loader", train_loader), ("val_loader", val_loader)):
        if _length(loader) == 0:
            raise ValueError(f"{name} is empty: len({name}) is 0")
    place = _place(model, device)
    _warn_unheld(model)
    masks = _snapshot_masks(model)
    steps = _Steps(model, optimizer, scheduler, epochs, _length(train_loader))
    history, best = History(), _Best()
    with _mode(model, training=True), _seeded(seed, place):
        for epoch in range(epochs):
            start = time.perf_counter()
            history.learning_rate.append(float(steps.optimizer.param_groups[0]["lr"]))
            history.sparsity.append(summary(model).sparsity)
            bar = _bar(train_loader, f"epoch {epoch + 1}/{epochs}", progress)
            trained = _train_epoch(model, bar, loss or F.cross_entropy, steps, place, epoch, history.sparsity[-1])
            history.train_loss.append(trained.loss)
            history.train_accuracy.append(trained.accuracy)
            checked = None if val_loader is None else evaluate(model, val_loader, loss=loss)
            if checked is not None:
                history.val_loss.append(checked.loss)
                history.val_accuracy.append(checked.accuracy)
                best.offer(model, checked, epoch)
            steps.end_epoch(checked or trained)
            history.seconds.append(time.perf_counter() - start)
    best.restore(model)
    history.best_epoch = best.epoch
    _check_masks(model, masks)
    return history


def _train_epoch(
    model: nn.Module, bar: Any, loss: Loss, steps: _Steps, place: torch.device | None, epoch: int, sparsity: float
) -> Evaluation:
    meter = _Meter()
    with bar:
        for step, batch in enumerate(bar):
            inputs, targets = _unpack(batch, place, "train_loader")
            outputs = model(*inputs)
            value = loss(outputs, targets)
            number = float(value.detach())
            if not math.isfinite(number):
                rate = steps.optimizer.param_groups[0]["lr"]
                raise FloatingPointError(
                    f"loss is {number} at epoch {epoch + 1}, step {step + 1} (learning rate {rate:.3g}): "
                    "lower the learning rate, or look for NaN in the inputs"
                )
            steps.optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            steps.optimizer.step()
            steps.end_batch()
            meter.add(outputs, targets, number)
            seen = meter.result()
            shown = {"loss": seen.loss, "acc": seen.accuracy, "sparsity": sparsity}
            bar.set_postfix({key: f"{number:.4f}" for key, number in shown.items()}, refresh=False)
    if not meter.examples:
        raise ValueError(f"train_loader is empty: it yielded no batch in epoch {epoch + 1}")
    return meter.result()


class _Steps:
    """The optimizer, and when its scheduler steps."""

    def __init__(self, model: nn.Module, optimizer: Any, scheduler: Any, epochs: int, batches: int | None) -> None:
        default = optimizer is None
        if optimizer is None:
            trainable = [p for p in model.parameters() if p.requires_grad]
            if not trainable:
                raise ValueError("model has no parameter that requires a gradient: nothing to finetune")
            optimizer = torch.optim.SGD(trainable, lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
        elif not isinstance(optimizer, Optimizer):
            optimizer = optimizer(model.parameters())
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch Optimizer or make one, got {type(optimizer).__name__}")
        own = {id(p) for p in model.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer holds no parameter of model: make it from model.parameters()")
        self.optimizer: Optimizer = optimizer
        self._per_batch = False
        if scheduler is None and default:
            scheduler = _warm_cosine(optimizer, epochs * (batches or 1))
            self._per_batch = batches is not None
        elif scheduler is not None:
            if not isinstance(scheduler, LRScheduler):
                scheduler = scheduler(optimizer)
            self._per_batch = isinstance(scheduler, (OneCycleLR, CyclicLR))
        self._scheduler = scheduler

    def end_batch(self) -> None:
        if self._per_batch:
            self._scheduler.step()

    def end_epoch(self, seen: Evaluation) -> None:
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(seen.loss)
        elif self._scheduler is not None and not self._per_batch:
            self._scheduler.step()


def _warm_cosine(optimizer: Optimizer, total: int) -> LambdaLR:
    warm = total // 20

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))

    return LambdaLR(optimizer, factor)


class _Meter:
    """Running means over examples."""

    def __init__(self) -> None:
        self.examples = 0
        self._loss = 0.0
        self._correct = 0
        self._judged = 0

    def add(self, outputs: Any, targets: Any, loss: float) -> None:
        count = len(targets) if isinstance(targets, Tensor) and targets.ndim else 1
        self.examples += count
        self._loss += loss * count
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or outputs.ndim < 2:
            return
        if not targets.is_floating_point() and targets.shape == outputs.shape[:1] + outputs.shape[2:]:
            self._correct += int((outputs.argmax(1) == targets).sum())
            self._judged += targets.numel()

    def result(self) -> Evaluation:
        accuracy = self._correct / self._judged if self._judged else math.nan
        return Evaluation(accuracy, self._loss / max(1, self.examples), self.examples)


class _Best:
    """The weights of the best epoch so far."""

    def __init__(self) -> None:
        self.epoch: int | None = None
        self._key = (-math.inf, -math.inf)
        self._state: dict[str, Any] = {}

    def offer(self, model: nn.Module, seen: Evaluation, epoch: int) -> None:
        key = (0.0 if math.isnan(seen.accuracy) else seen.accuracy, -math.inf if math.isnan(seen.loss) else -seen.loss)
        if self.epoch is None or key > self._key:
            self.epoch, self._key = epoch, key
            state = model.state_dict()
            self._state = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}

    def restore(self, model: nn.Module) -> None:
        if self.epoch is not None:
            model.load_state_dict(self._state)


def _unpack(batch: Any, place: torch.device | None, argument: str) -> tuple[list[Any], Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(f"{argument} must yield (inputs, targets), got {type(batch).__name__}")
    moved = [item.to(place, non_blocking=True) if isinstance(item, Tensor) and place else item for item in batch]
    return moved[:-1], moved[-1]


def _place(model: nn.Module, device: torch.device | str | None) -> torch.device | None:
    if device is not None:
        model.to(device)
    parameter = next(model.parameters(), None)
    return None if parameter is None else parameter.device


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # no length, or an IterableDataset behind a DataLoader
        return None


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def _seeded(seed: int | None, place: torch.device | None) -> Iterator[None]:
    devices = [place] if place is not None and place.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _bar(loader: Iterable[Any], label: str, progress: bool) -> Any:
    often = 0.2 if sys.stderr.isatty() else 30.0  # a log file wants few lines
    return tqdm(loader, desc=label, disable=not progress, mininterval=often, leave=True)


def _snapshot_masks(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    found = {(layer, name): get_mask(module, name) for layer, module, name in iter_masked(model)}
    return {key: mask for key, mask in found.items() if mask is not None}


def _check_masks(model: nn.Module, masks: dict[tuple[str, str], Tensor]) -> None:
    for (layer, name), mask in masks.items():
        module = model.get_submodule(layer)
        now = get_mask(module, name)
        if now is None or not torch.equal(now, mask.to(now.device)):
            raise SparsepruneError(f"the mask of {layer}.{name} changed while finetuning")
        revived = int((effective_weight(module, name)[~now] != 0).sum())
        if revived:
            raise SparsepruneError(f"{revived} pruned weights of {layer}.{name} are not zero after finetuning")


def _warn_unheld(model: nn.Module) -> None:
    loose = [layer.name for layer in summary(model).layers if not layer.masked and 0.1 < layer.sparsity < 1]
    if loose:
        warnings.warn(
            f"{len(loose)} layers hold zeros without a mask ({', '.join(loose[:3])} ...), which training will revive; "
            "call hold_zeros(model) first to keep them",
            stacklevel=3,
        )
