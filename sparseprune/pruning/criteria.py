"""What ranks weights: a criterion gives every weight a score, and the lowest are pruned first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .patterns import Pattern, mean_over_units

__all__ = [
    "CRITERIA", "Criterion", "Magnitude", "Random", "Scores", "compute_scores", "compute_updates", "resolve_criterion",
]  # fmt: skip

ScoreFunction = Callable[[str, Tensor], Tensor]


class Criterion:
    """Subclass this, or pass `prune` a function or a dict of scores, to rank weights another way.

    Override `scores`; or `unit_scores`, if what a unit (block, filter, ...) is worth is not its weights' mean score.
    """

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
        raise NotImplementedError(f"{type(self).__name__} must define scores or unit_scores")

    def unit_scores(
        self, model: nn.Module, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor],
        patterns: Mapping[str, Pattern], generator: torch.Generator | None,
    ) -> Mapping[str, Tensor]:  # fmt: skip
        """Score every unit of every parameter; the mean of its weights' `scores` unless overridden.

        Args:
            model, weights, generator: as for `scores`.
            kept: parameter name -> bool of the weight's shape, on the CPU; False where it is pruned already.
            patterns: parameter name -> the pattern, bound to that weight; `reduce` and `expand` say what a unit is.

        Returns:
            parameter name -> scores (units,); the lowest are pruned first.
        """
        given = self.scores(model, weights, generator)
        scores = {name: _checked(given, name, weight.shape) for name, weight in weights.items()}
        return {name: mean_over_units(score, kept[name], patterns[name]) for name, score in scores.items()}

    def finish(
        self, model: nn.Module, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """New values for kept weights, now that it is decided which go; none unless overridden.

        Args:
            model, weights: as for `scores`; the model is not pruned yet, and `prune` writes what this returns.
            masks: parameter name -> bool of the weight's shape, on the CPU; True = kept.

        Returns:
            parameter name -> values of the weight's shape, for those that change; what is pruned becomes zero anyway.
        """
        return {}


class Magnitude(Criterion):
    """|w|**p. With 1x1 patterns p makes no difference; larger units rank by the mean of |w|**p.

    For filters of one size that is the order of their L1 or L2 norms (Li et al., Pruning Filters for Efficient
    ConvNets, 2017, arXiv:1608.08710, who rank inside a layer: `scope="local"`).

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
    """Uniform noise, one number a unit: the baseline to beat. Set `prune`'s `seed` to repeat it."""

    def unit_scores(
        self, model: nn.Module, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor],
        patterns: Mapping[str, Pattern], generator: torch.Generator | None,
    ) -> Mapping[str, Tensor]:  # fmt: skip
        # The mean of many weights' noise would be near a half in every large unit, and small ones would go first.
        units = {name: patterns[name].reduce(mask.to(torch.float32)) for name, mask in kept.items()}
        return {name: torch.rand(len(unit), generator=generator) for name, unit in units.items()}


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
_WITH_ARGUMENTS = {"taylor": "Taylor(batches)", "bnscale": "BNScale(example_inputs)", "obs": "OBS(batches)"}


def resolve_criterion(criterion: str | Criterion | ScoreFunction | Mapping[str, Tensor]) -> Criterion:
    """A name in `CRITERIA`, a `Criterion`, a function or a dict of scores -> a `Criterion`."""
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str):
        if criterion in _WITH_ARGUMENTS:
            raise ValueError(f"criterion={criterion!r} needs data: pass pruning.{_WITH_ARGUMENTS[criterion]}")
        if criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {sorted(CRITERIA)}, scores or a Criterion, got {criterion!r}")
        return CRITERIA[criterion]()
    if isinstance(criterion, type) or not (isinstance(criterion, Mapping) or callable(criterion)):
        raise TypeError(f"criterion must be a name, a Criterion, a function or a dict of scores, got {criterion!r}")
    return Scores(criterion)


def compute_scores(
    criterion: Criterion, model: nn.Module, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor],
    patterns: Mapping[str, Pattern], generator: torch.Generator | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Run the criterion and check what it gives: every name, (units,), no NaN. On the CPU, at least float32."""
    given = criterion.unit_scores(model, weights, kept, patterns, generator)
    counts = {name: len(patterns[name].reduce(mask.to(torch.float32))) for name, mask in kept.items()}
    return {name: _checked(given, name, (counts[name],)) for name in weights}


def compute_updates(
    criterion: Criterion, model: nn.Module, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What `finish` gives, checked: finite values of the weight's shape."""
    updates = dict(criterion.finish(model, weights, masks))
    for name, values in updates.items():
        if name not in weights or values.shape != weights[name].shape:
            raise ValueError(f"criterion's update of {name} has shape {tuple(values.shape)}, which is no weight's")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"criterion's update of {name} is NaN or infinite")
        updates[name] = torch.where(masks[name].to(values.device), values.detach(), 0)
    return updates


def _checked(given: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> Tensor:
    scores = given.get(name)
    if not isinstance(scores, Tensor):
        raise TypeError(f"criterion must give a tensor of scores for {name}, got {type(scores).__name__}")
    if tuple(scores.shape) != tuple(shape):
        raise ValueError(f"criterion's scores for {name} have shape {tuple(scores.shape)}, expected {tuple(shape)}")
    scores = scores.detach().cpu()
    scores = scores if scores.dtype == torch.float64 else scores.to(torch.float32)
    if torch.isnan(scores).any():
        raise ValueError(f"criterion's scores for {name} hold NaN")
    return scores
