"""Running a model to learn about it, without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, BatchNorm's statistics unchanged); afterwards every layer's mode, every parameter's
    `requires_grad` and torch's random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, wanted in flags:
                parameter.requires_grad_(wanted)
