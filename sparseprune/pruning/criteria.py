"""What ranks weights: a criterion gives every weight a score, and the lowest are pruned first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["CRITERIA", "Criterion", "Magnitude", "Random", "Scores", "compute_scores", "resolve_criterion"]

ScoreFunction = Callable[[str, Tensor], Tensor]


class Criterion(ABC):
    """Subclass this, or pass `prune` a function or a dict of scores, to rank weights another way."""

    @abstractmethod
    def scores(
        self, model: nn.Module, weights: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> Mapping[str, Tensor]:
        """Score every weight of every parameter.

        Args:
            model: the whole model, for criteria that run it.
            weights: parameter name -> effective weight, detached.
            generator: on the CPU; None for torch's global one.

        Returns:
            parameter name -> scores of the same shape; the lowest are pruned first.
        """


class Magnitude(Criterion):
    """|w|**p. With 1x1 patterns p makes no difference; in blocks the powers are summed.

    Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015 (arXiv:1506.02626).

    Raises:
        ValueError: `p` is neither 1 nor 2.
    """

    def __init__(self, p: int = 1) -> None:
        if p not in (1, 2):
            raise ValueError(f"p must be 1 or 2, got {p!r}")
        self.p = p

    def scores(
        self, model: nn.Module, weights: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> Mapping[str, Tensor]:
        return {name: weight.abs() if self.p == 1 else weight.float().square() for name, weight in weights.items()}


class Random(Criterion):
    """Uniform noise: the baseline that every other criterion must beat. Set `prune`'s `seed` to repeat it."""

    def scores(
        self, model: nn.Module, weights: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> Mapping[str, Tensor]:
        return {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}


class Scores(Criterion):
    """The user's own scores: a function of (name, weight), or a dict from parameter or layer name to scores.

    Bool tensors work as well: True is kept longest.
    """

    def __init__(self, source: ScoreFunction | Mapping[str, Tensor]) -> None:
        self.source = source

    def scores(
        self, model: nn.Module, weights: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> Mapping[str, Tensor]:
        if not isinstance(self.source, Mapping):
            return {name: self.source(name, weight) for name, weight in weights.items()}
        result = {}
        for name in weights:
            layer = name.rpartition(".")[0]
            if name not in self.source and layer not in self.source:
                raise ValueError(f"criterion holds no scores for {name!r}; it has {sorted(self.source)[:5]}")
            result[name] = self.source[name] if name in self.source else self.source[layer]
        return result


CRITERIA: dict[str, Callable[[], Criterion]] = {"magnitude": Magnitude, "random": Random}


def resolve_criterion(criterion: str | Criterion | ScoreFunction | Mapping[str, Tensor]) -> Criterion:
    """A name in `CRITERIA`, a `Criterion`, a function or a dict of scores -> a `Criterion`."""
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {sorted(CRITERIA)}, scores or a Criterion, got {criterion!r}")
        return CRITERIA[criterion]()
    if isinstance(criterion, type) or not (isinstance(criterion, Mapping) or callable(criterion)):
        raise TypeError(f"criterion must be a name, a Criterion, a function or a dict of scores, got {criterion!r}")
    return Scores(criterion)


def compute_scores(
    criterion: Criterion, model: nn.Module, weights: Mapping[str, Tensor], generator: torch.Generator | None
) -> dict[str, Tensor]:
    """Run the criterion and check what it gives: every name, its shape, no NaN. On the CPU, at least float32."""
    given = criterion.scores(model, weights, generator)
    result = {}
    for name, weight in weights.items():
        scores = given.get(name)
        if not isinstance(scores, Tensor):
            raise TypeError(f"criterion must give a tensor of scores for {name}, got {type(scores).__name__}")
        if scores.shape != weight.shape:
            raise ValueError(
                f"criterion's scores for {name} have shape {tuple(scores.shape)}, expected {tuple(weight.shape)}"
            )
        scores = scores.detach().cpu()
        scores = scores if scores.dtype == torch.float64 else scores.to(torch.float32)
        if torch.isnan(scores).any():
            raise ValueError(f"criterion's scores for {name} hold NaN")
        result[name] = scores
    return result
