"""Running a model on a few batches without training it: batch-norm statistics, and what a batch's inputs are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["move_inputs", "recalibrate_bn"]

_Model = TypeVar("_Model", bound=nn.Module)


def recalibrate_bn(model: _Model, loader: Iterable[Any], *, batches: int | None = None) -> _Model:
    """Estimate the running statistics of every BatchNorm layer anew, in place, from a few batches.

    Pruning shifts the means and variances of activations; the old statistics then cost more accuracy than the lost
    weights do. The new ones are the plain average over the batches (each counts the same, whatever its size), found
    with the BatchNorm layers in training mode and all others, dropout say, in evaluation mode. Weights, gradients,
    every layer's mode and momentum stay. A BatchNorm that the batches never reach keeps its statistics, and so does one
    without (`track_running_stats=False`). Without any BatchNorm nothing is run and nothing happens.

    Args:
        model: any module.
        loader: yields inputs as tensors, or (inputs, targets), or (input1, input2, ..., targets), or dicts of keyword
            arguments; targets are not looked at. Some hundred examples are plenty; batches of 32 and more, since the
            variance of a small batch is noise. Inputs are moved to the model's device.
        batches: how many batches to use; None uses all.

    Returns:
        `model` itself.

    Raises:
        ValueError: an empty loader; `batches` below 1; statistics that come out NaN or infinite.
        TypeError: a batch of another kind.
        Nothing is changed then, nor if the model itself raises.

    Example:
        >>> prune(model, 0.8)
        >>> recalibrate_bn(model, train_loader, batches=20)

    Schneider et al., Improving robustness against common corruptions by covariate shift adaptation, 2020
    (arXiv:2006.16971); for pruned networks, Li et al., EagleEye, 2020 (arXiv:2007.02491).
    """
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise ValueError(f"batches must be None or an int of at least 1, got {batches!r}")
    norms = {name: module for name, module in model.named_modules() if _has_statistics(module)}
    if not norms:
        return model
    with _fresh_statistics(model, norms), torch.no_grad():
        seen = 0
        for batch in itertools.islice(loader, batches):
            args, kwargs = move_inputs(batch, model, "loader")
            model(*args, **kwargs)
            seen += 1
        if not seen:
            raise ValueError("loader is empty: it yielded no batch")
        for name, norm in norms.items():
            if not all(bool(torch.isfinite(norm.get_buffer(key)).all()) for key in ("running_mean", "running_var")):
                raise ValueError(f"the statistics of {name or 'the model'} are NaN or infinite: look at the inputs")
    return model


def move_inputs(batch: Any, model: nn.Module, argument: str) -> tuple[list[Any], dict[str, Any]]:
    """What to call the model with for one batch: a tensor, (inputs, ..., targets) without the targets, or a dict.

    Raises:
        TypeError: the batch is none of these; the message names `argument`.
    """
    parameter = next(itertools.chain(model.parameters(), model.buffers()), None)
    place = None if parameter is None else parameter.device

    def moved(item: Any) -> Any:
        return item.to(place) if isinstance(item, Tensor) and place is not None else item

    if isinstance(batch, Tensor):
        return [moved(batch)], {}
    if isinstance(batch, dict):
        return [], {str(key): moved(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)) and batch:
        return [moved(item) for item in (batch[:-1] if len(batch) > 1 else batch)], {}
    raise TypeError(f"{argument} must yield inputs, (inputs, targets) or dicts, got {type(batch).__name__}")


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and isinstance(module.running_mean, Tensor)


@contextmanager
def _fresh_statistics(model: nn.Module, norms: dict[str, nn.Module]) -> Iterator[None]:
    """Statistics from nothing, averaged plainly, inside; afterwards modes and momenta as before, and after an error the
    old statistics too."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms.values()]
    old = [(norm, {key: value.clone() for key, value in norm.named_buffers(recurse=False)}) for norm in norms.values()]
    failed = True
    try:
        model.eval()
        for norm in norms.values():
            norm.reset_running_stats()  # type: ignore[operator]
            norm.momentum = None  # type: ignore[assignment]  # torch's word for the plain average
            norm.training = True
        yield
        failed = False
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in momenta:
            norm.momentum = momentum
        for norm, buffers in old:
            if failed or not int(norm.get_buffer("num_batches_tracked")):
                for key, value in buffers.items():
                    norm.get_buffer(key).copy_(value)
