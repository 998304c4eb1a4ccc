"""Knowledge distillation: a sparse student learns from the dense model's outputs as well as from the labels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .evaluation import Loss

__all__ = ["Distillation"]


class Distillation:
    """(1 - alpha) * loss(student, targets) + alpha * T**2 * KL(softmax(teacher / T) || softmax(student / T)).

    Hinton et al., Distilling the Knowledge in a Neural Network, 2015 (arXiv:1503.02531).

    Args:
        teacher: takes the student's inputs, gives class scores (N, C) or (N, C, ...); run in eval mode, never trained.
        temperature: T, above 0.
        alpha: share of the teacher, in (0, 1].

    Raises:
        ValueError: `temperature` or `alpha` out of range.
        TypeError: `teacher` is no module, or student or teacher give something else than one tensor of scores.

    Example:
        >>> finetune(pruned, loader, epochs=5, teacher=Distillation(dense, temperature=2))
    """

    def __init__(self, teacher: nn.Module, *, temperature: float = 4.0, alpha: float = 0.9) -> None:
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be a torch.nn.Module or a Distillation, got {type(teacher).__name__}")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be above 0, got {temperature!r}")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {alpha!r}")
        self.teacher, self.temperature, self.alpha = teacher, float(temperature), float(alpha)

    @torch.no_grad()
    def scores(self, inputs: list[Any]) -> Tensor:
        """What the teacher says of a batch."""
        modes = [(module, module.training) for module in self.teacher.modules()]
        self.teacher.eval()
        try:
            result = self.teacher(*inputs)
        finally:
            for module, training in modes:
                module.training = training
        return _scores(result, "teacher")

    def loss(self, outputs: Any, inputs: list[Any], targets: Any, loss: Loss) -> Tensor:
        """The combined loss of one batch: a scalar."""
        student, wanted = _scores(outputs, "model"), self.scores(inputs)
        if student.shape != wanted.shape:
            raise ValueError(f"teacher gives {tuple(wanted.shape)}, the model {tuple(student.shape)}: they must agree")
        student, wanted = ((each.float() / self.temperature).log_softmax(1) for each in (student, wanted))
        divergence = F.kl_div(student, wanted, reduction="none", log_target=True).sum(1).mean()
        result = self.alpha * self.temperature**2 * divergence
        return result + (1 - self.alpha) * loss(outputs, targets) if self.alpha < 1 else result


def _scores(outputs: Any, whose: str) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.ndim < 2:
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"distillation needs class scores (N, C) from the {whose}, got {got}")
    return outputs
