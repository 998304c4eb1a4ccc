"""Training that a pruned model survives: `finetune`."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from . import distributed, resuming
from .distillation import Distillation
from .errors import SparsepruneError
from .evaluation import (
    Evaluation,
    Loss,
    Meter,
    casting,
    check_loader,
    check_loss,
    evaluate_loader,
    length,
    mode,
    place_of,
    scalar,
    unpack,
)
from .pruning.masks import effective_weight, get_mask, iter_masked
from .pruning.schedule import Pruner
from .pruning.statistics import summary

__all__ = ["History", "finetune"]

Penalty = Callable[[nn.Module], Tensor]


@dataclass
class History:
    """What `finetune` saw, one entry per epoch. Accuracies are NaN where outputs are not class scores."""

    train_loss: list[float] = field(default_factory=list)  # with its penalty, and the teacher's part
    train_accuracy: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)  # empty without val_loader
    val_accuracy: list[float] = field(default_factory=list)
    sparsity: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)  # at the epoch's first step
    seconds: list[float] = field(default_factory=list)
    best_epoch: int | None = None  # counted from 0; the one whose weights the model holds; None without val_loader


def finetune(
    model: nn.Module, train_loader: Iterable[Any], *, epochs: int, val_loader: Iterable[Any] | None = None,
    loss: Loss | None = None, optimizer: Optimizer | Callable[[Iterator[nn.Parameter]], Optimizer] | None = None,
    scheduler: Any = None, regularizer: Penalty | None = None, teacher: nn.Module | Distillation | None = None,
    pruner: Pruner | None = None, checkpoint_dir: str | Path | None = None, autocast: torch.dtype | None = None,
    device: torch.device | str | None = None, seed: int | None = 0, progress: bool = True,
) -> History:  # fmt: skip
    """Train a model further, in place, with its masks held.

    Masks (ours, or `torch.nn.utils.prune`'s) hold through momentum and weight decay, which is checked at the end. Plain
    zeros do not: call `hold_zeros(model)` first; a warning says so where it looks forgotten. With `val_loader` the
    model ends with the weights of its best epoch (by accuracy, then loss) among those of the final sparsity. Every
    layer's train/eval mode is restored.

    Started by `torchrun`, every process takes its share of the examples and gradients are averaged
    (DistributedDataParallel, given or made here); masks and statistics are those of rank 0.

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
        regularizer: added to the loss: `regularizers.L1`, `L2`, `BNScaleL1`, `GroupLasso`, or a function of the model.
        teacher: a module to learn from, or a `Distillation` that says how.
        pruner: prunes the model step by step, before epochs or batches.
        checkpoint_dir: a folder, made if missing. After every epoch the whole state is written there; called again
            with the same arguments, training goes on after the last whole epoch, with the same results to the bit as
            without the interruption (on one machine and number of threads). Each epoch that pruned also leaves
            `pruned-<epoch>-<sparsity>.safetensors`, for `load_weights`.
        autocast: dtype to compute in, such as torch.bfloat16; weights stay as they are.
        device: moves the model there first; None leaves it where it is.
        seed: seeds torch for shuffling and dropout, and restores its state afterwards; None leaves it alone.
        progress: show a bar with loss, accuracy and sparsity.

    Returns:
        A `History`.

    Raises:
        ValueError: an empty loader; `epochs` below 1; an optimizer of some other model; a `checkpoint_dir` of another
            training; a scheduler of another optimizer; a loss without a gradient.
        TypeError: a batch is not a tuple of inputs and targets; or an argument or the loss is of the wrong kind.
        FloatingPointError: the loss is NaN or infinite; the message names epoch and step. That step is not applied, but
            batch norms have seen its inputs.
        SparsepruneError: a pruned weight is not zero, or a mask changed, at the end.

    Example:
        >>> prune(model, 0.95)
        >>> history = finetune(model, train_loader, epochs=5, val_loader=val_loader)
    """
    _check(epochs, train_loader, val_loader, loss, regularizer, pruner, distributed.unwrap(model))
    place = place_of(model, device)
    distributed.start(place)
    inner = distributed.unwrap(model)
    _warn_unheld(inner)
    with mode(model, training=True), _seeded(seed, place):
        shared = distributed.shard(train_loader, seed)
        steps = _Steps(inner, optimizer, scheduler, epochs, length(shared))
        distributed.broadcast_model(inner)
        run = _Run(
            inner, distributed.wrap(model, place), shared, val_loader, steps, place, pruner, autocast, seed,
            _Objective(loss or F.cross_entropy, regularizer, _distillation(teacher)), epochs,
            progress and distributed.is_main(),
        )  # fmt: skip
        folder = None if checkpoint_dir is None else Path(checkpoint_dir)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            run.resume(folder)
        while run.epoch < epochs:
            run.one_epoch(folder)
    run.best.restore(inner)
    run.history.best_epoch = run.best.epoch
    _check_masks(inner, run.masks)
    return run.history


@dataclass
class _Objective:
    """What training minimises."""

    loss: Loss
    regularizer: Penalty | None
    teacher: Distillation | None

    def __call__(self, model: nn.Module, outputs: Any, inputs: list[Any], targets: Any) -> Tensor:
        if self.teacher is not None:
            value = self.teacher.loss(outputs, inputs, targets, self.loss)
        else:
            value = self.loss(outputs, targets)
        return value if self.regularizer is None else value + self.regularizer(model)


@dataclass
class _Run:
    """One training: what is fixed, and how far it is."""

    model: nn.Module
    called: nn.Module  # the model, or DistributedDataParallel around it
    loader: Iterable[Any]
    val_loader: Iterable[Any] | None
    steps: _Steps
    place: torch.device | None
    pruner: Pruner | None
    autocast: torch.dtype | None
    seed: int | None
    objective: _Objective
    epochs: int
    progress: bool
    epoch: int = 0
    history: History = field(default_factory=History)
    best: _Best = field(default_factory=lambda: _Best())
    masks: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.masks = _snapshot_masks(self.model)

    def one_epoch(self, folder: Path | None) -> None:
        """Train, evaluate, and write the state where there is a folder."""
        start = time.perf_counter()
        pruned = self.pruner is not None and self.pruner.per == "epoch" and self._prune()
        self.history.learning_rate.append(float(self.steps.optimizer.param_groups[0]["lr"]))
        distributed.set_epoch(self.loader, self.epoch)
        trained, pruned_inside = self._train()
        distributed.broadcast_model(self.model)
        sparsity = summary(self.model).sparsity
        self.history.sparsity.append(sparsity)
        self.history.train_loss.append(trained.loss)
        self.history.train_accuracy.append(trained.accuracy)
        checked = None
        if self.val_loader is not None:
            checked = evaluate_loader(
                self.model, self.val_loader, "val_loader", self.objective.loss, self.place, self.autocast
            )
            self.history.val_loss.append(checked.loss)
            self.history.val_accuracy.append(checked.accuracy)
            self.best.offer(self.model, checked, self.epoch, _masked_share(self.model, self.masks))
        self.steps.end_epoch(checked or trained)
        self.history.seconds.append(time.perf_counter() - start)
        self.epoch += 1
        if folder is not None and distributed.is_main():
            self._save(folder, pruned or pruned_inside)

    def _train(self) -> tuple[Evaluation, bool]:
        """One pass over the loader -> means over it, and whether a batch pruned."""
        meter, pruned, step = Meter(), False, -1
        sparsity = summary(self.model).sparsity
        by_batch = self.pruner is not None and self.pruner.per == "batch"
        with _bar(self.loader, f"epoch {self.epoch + 1}/{self.epochs}", self.progress) as bar:
            for step, batch in enumerate(bar):
                if by_batch and self._prune():
                    pruned, sparsity = True, summary(self.model).sparsity
                inputs, targets = unpack(batch, self.place, "train_loader")
                with casting(self.place, self.autocast):
                    outputs = self.called(*inputs)
                    value = self.objective(self.model, outputs, inputs, targets)
                number = distributed.total([scalar(value)], self.place)[0] / distributed.world_size()
                self._check_finite(number, step)
                _check_gradient(value)
                self.steps.optimizer.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]
                self.steps.optimizer.step()
                self.steps.end_batch()
                meter.add(outputs, targets, number)
                seen = meter.result()
                shown = {"loss": seen.loss, "acc": seen.accuracy, "sparsity": sparsity}
                bar.set_postfix({key: f"{number:.4f}" for key, number in shown.items()}, refresh=False)
        if step < 0:
            raise ValueError(f"train_loader is empty: it yielded no batch in epoch {self.epoch + 1}")
        meter.set_totals(distributed.total(meter.totals(), self.place))
        return meter.result(), pruned

    def _check_finite(self, number: float, step: int) -> None:
        if not math.isfinite(number):
            rate = self.steps.optimizer.param_groups[0]["lr"]
            raise FloatingPointError(
                f"loss is {number} at epoch {self.epoch + 1}, step {step + 1} (learning rate {rate:.3g}): "
                "lower the learning rate, or look for NaN in the inputs"
            )

    def _prune(self) -> bool:
        assert self.pruner is not None
        with mode(self.model, training=False):  # for criteria that run the model
            pruned = self.pruner.step()
        if pruned:
            distributed.broadcast_model(self.model)
            self.masks = _snapshot_masks(self.model)
        return pruned

    # --- interruption and resumption ---

    def _save(self, folder: Path, pruned: bool) -> None:
        if pruned:
            from .files import save_weights

            save_weights(self.model, folder / f"pruned-{self.epoch:03d}-{self.history.sparsity[-1]:.4f}.safetensors")
        generator = getattr(self.loader, "generator", None)
        resuming.save_training(
            folder / resuming.LAST,
            {
                "settings": self._settings(), "epoch": self.epoch, "model": self.model.state_dict(),
                "masked": resuming.masked_names(self.model), "history": dataclasses.asdict(self.history),
                "steps": self.steps.state_dict(), "best": self.best.state_dict(), "rng": resuming.rng_state(),
                "pruner": None if self.pruner is None else self.pruner.state_dict(),
                "generator": None if generator is None else generator.get_state(),
            },
        )  # fmt: skip

    def resume(self, folder: Path) -> None:
        """Go on where the folder's state ends, if there is one."""
        path = folder / resuming.LAST
        state = resuming.load_training(path)
        if state is None:
            return
        for key, value in self._settings().items():
            if state["settings"].get(key) != value:
                had = state["settings"].get(key)
                raise ValueError(
                    f"checkpoint_dir: {path} is of a training with {key}={had!r}, not {value!r}; "
                    "use another folder, or remove it to start again"
                )
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])  # first: it raises, and changes nothing, if it is of another
        resuming.restore_model(self.model, state["model"], [(layer, name) for layer, name in state["masked"]])
        self.steps.load_state_dict(state["steps"])
        self.best.load_state_dict(state["best"])
        self.history = History(**state["history"])
        self.epoch = state["epoch"]
        resuming.restore_rng(state["rng"])
        if state["generator"] is not None:
            self.loader.generator.set_state(state["generator"])  # type: ignore[attr-defined]
        self.masks = _snapshot_masks(self.model)

    def _settings(self) -> dict[str, Any]:
        return {
            "epochs": self.epochs, "seed": self.seed, "optimizer": type(self.steps.optimizer).__name__,
            "batches": length(self.loader), "processes": distributed.world_size(), "pruner": self.pruner is not None,
        }  # fmt: skip


class _Steps:
    """The optimizer, and when its scheduler steps."""

    def __init__(self, model: nn.Module, optimizer: Any, scheduler: Any, epochs: int, batches: int | None) -> None:
        default = optimizer is None
        if optimizer is None:
            trainable = [p for p in model.parameters() if p.requires_grad]
            if not trainable:
                raise ValueError("model has no parameter that requires a gradient: nothing to finetune")
            optimizer = torch.optim.SGD(trainable, lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
        elif not isinstance(optimizer, Optimizer) and callable(optimizer):
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
            if not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
                if not callable(scheduler):
                    raise TypeError(f"scheduler must be a torch scheduler or make one, got {scheduler!r}")
                scheduler = scheduler(optimizer)
            if getattr(scheduler, "optimizer", optimizer) is not optimizer:
                raise ValueError(
                    "scheduler is of another optimizer: pass that one as optimizer, or a function from optimizer to "
                    "scheduler"
                )
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

    def state_dict(self) -> dict[str, Any]:
        scheduler = None
        if self._scheduler is not None:
            scheduler = {key: value for key, value in self._scheduler.state_dict().items() if _plain(value)}
        return {"optimizer": self.optimizer.state_dict(), "scheduler": scheduler}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self._scheduler is not None and state["scheduler"] is not None:
            self._scheduler.load_state_dict(state["scheduler"])


def _plain(value: Any) -> bool:
    """Whether `torch.load(weights_only=True)` reads it back: no functions, as LambdaLR and others keep."""
    if isinstance(value, (list, tuple)):
        return all(_plain(each) for each in value)
    if isinstance(value, dict):
        return all(_plain(key) and _plain(each) for key, each in value.items())
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def _warm_cosine(optimizer: Optimizer, total: int) -> LambdaLR:
    warm = total // 20

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))

    return LambdaLR(optimizer, factor)


class _Best:
    """The weights of the best epoch so far, among those of the highest sparsity by masks."""

    def __init__(self) -> None:
        self.epoch: int | None = None
        self._key = (-math.inf, -math.inf, -math.inf)
        self._state: dict[str, Any] = {}

    def offer(self, model: nn.Module, seen: Evaluation, epoch: int, masked: float) -> None:
        accuracy = 0.0 if math.isnan(seen.accuracy) else seen.accuracy
        key = (masked, accuracy, -math.inf if math.isnan(seen.loss) else -seen.loss)
        if self.epoch is None or key > self._key:
            self.epoch, self._key = epoch, key
            state = model.state_dict()
            self._state = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}

    def restore(self, model: nn.Module) -> None:
        if self.epoch is not None:
            model.load_state_dict(self._state)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "key": list(self._key), "state": self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self._key, self._state = state["epoch"], tuple(state["key"]), state["state"]


def _check(
    epochs: int, train_loader: Any, val_loader: Any, loss: Any, regularizer: Any, pruner: Pruner | None,
    model: nn.Module,
) -> None:  # fmt: skip
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs must be an int of at least 1, got {epochs!r}")
    loaders = {"train_loader": train_loader} | ({} if val_loader is None else {"val_loader": val_loader})
    for name, loader in loaders.items():
        check_loader(loader, name)
        if length(loader) == 0:
            raise ValueError(f"{name} is empty: len({name}) is 0")
    check_loss(loss)
    if regularizer is not None and (isinstance(regularizer, type) or not callable(regularizer)):
        raise TypeError(f"regularizer must be a function of the model, such as L1(1e-5), got {regularizer!r}")
    if pruner is not None and not isinstance(pruner, Pruner):
        raise TypeError(f"pruner must be a Pruner, got {type(pruner).__name__}")
    if pruner is not None and distributed.unwrap(pruner.model) is not model:
        raise ValueError("pruner is of another model: make it from the one that is trained")


def _distillation(teacher: nn.Module | Distillation | None) -> Distillation | None:
    return teacher if teacher is None or isinstance(teacher, Distillation) else Distillation(teacher)


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


def _masked_share(model: nn.Module, masks: Mapping[Any, Tensor]) -> float:
    """Of the weights that `summary` counts, those that a mask prunes: not what is zero by itself, which may change."""
    total = summary(model).total
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    return 1 - (total - pruned) / total if total else 0.0


def _check_gradient(value: Any) -> None:
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise ValueError(
            "loss has no gradient: it does not depend on the model's parameters, was detached, or finetune was called "
            "under torch.no_grad() or torch.inference_mode()"
        )


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
