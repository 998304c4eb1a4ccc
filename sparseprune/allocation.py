"""Which sparsity each layer gets: the least error within a latency budget, by dynamic programming.

Frantar, Alistarh, SPDY: Accurate Pruning with Speedup Guarantees, 2022 (arXiv 2201.13096).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["allocate", "quadratic_prior", "search_coefficients", "search_length"]

Array = NDArray[np.float64]

_RESAMPLED = 0.1  # share of the coefficients that the neighbourhood search draws anew at first


def allocate(errors: Array, costs: Array, budget: float, *, buckets: int = 10_000) -> list[int]:
    """One option for each layer: the least sum of errors whose sum of costs is within the budget.

    Costs are rounded up to `budget / buckets`, so the budget is never exceeded, and the answer is the best of all that
    would still fit if every layer cost up to one such step more.

    Args:
        errors: (layers, options), at least 0; infinite where an option is not to be had.
        costs: (layers, options), at least 0 and finite: milliseconds, say.
        budget: In the unit of `costs`.
        buckets: Steps that the budget is cut into; time and memory grow with it.

    Returns:
        An option's number for each layer. Of equal ones the first.

    Raises:
        ValueError: Arrays that do not fit or hold NaN; a budget below the cheapest options' sum, which it names.
    """
    if errors.ndim != 2 or errors.shape != costs.shape or not errors.size:
        raise ValueError(f"errors {errors.shape} and costs {costs.shape} must be of one shape (layers, options)")
    if not (np.all(errors >= 0) and np.all(costs >= 0) and np.all(np.isfinite(costs))):  # NaN compares as False
        raise ValueError("errors must be at least 0, costs at least 0 and finite")
    allowed = np.where(np.isfinite(errors), costs, np.inf)
    cheapest = allowed.argmin(axis=1)
    least = float(allowed.min(axis=1).sum())
    if not least <= budget:
        raise ValueError(f"budget={budget:.4g} is below the lowest reachable sum of costs, {least:.4g}")
    unit = budget / buckets
    steps = np.ceil(costs / unit - 1e-9).astype(np.int64) if unit > 0 else (costs > 0) * (buckets + 1)
    best, picks = np.zeros(buckets + 1), []  # best[b]: least error of the layers so far within b steps
    for layer_errors, layer_steps in zip(errors, steps, strict=True):
        totals = np.full((len(layer_errors), buckets + 1), np.inf)
        for option, (error, step) in enumerate(zip(layer_errors, layer_steps, strict=True)):
            if step <= buckets:
                totals[option, step:] = best[: buckets + 1 - step] + error
        picks.append(totals.argmin(axis=0).astype(np.int32))
        best = totals.min(axis=0)
    if not np.isfinite(best[-1]):  # only rounding up is in the way
        return [int(option) for option in cheapest]
    chosen, left = [], buckets
    for pick, layer_steps in zip(reversed(picks), reversed(steps), strict=True):
        chosen.append(int(pick[left]))
        left -= int(layer_steps[chosen[-1]])
    return chosen[::-1]


def quadratic_prior(sparsities: Array, most: float) -> Array:
    """SPDY's prior: the error grows with the square of the logarithm of the density, and is 1 at sparsity `most`.

    Args:
        sparsities: any shape, in [0, 1).
        most: in (0, 1).
    """
    scaled: Array = np.square(np.log1p(-sparsities) / np.log1p(-most))
    return scaled


def search_coefficients(
    score: Callable[[Sequence[int]], float], prior: Array, costs: Array, budget: float, *, trials: int,
    generator: np.random.Generator, step: Callable[[float], None] = lambda best: None,
) -> Array:  # fmt: skip
    """How sensitive each layer is, in [0, 1]: the coefficients of `prior` whose allocation scores lowest.

    SPDY's search: `trials` random vectors, then for k from a tenth of the layers down to 1, `trials` times k
    coefficients of the best so far are drawn anew and kept where that scores lower.

    Args:
        score: An allocation (an option's number for each layer) -> a number to make small, such as a loss; NaN is
            taken as infinite. Called once for each different allocation.
        prior, costs, budget: As `errors` (finite), `costs` and `budget` of `allocate`.
        trials: Of each round.
        generator: What draws.
        step: Called after every trial with the lowest score so far; see `search_length` for how many there are.

    Returns:
        (layers,) coefficients; `allocate(coefficients[:, None] * prior, costs, budget)` is the allocation.
    """
    seen: dict[tuple[int, ...], float] = {}

    def value(coefficients: Array) -> float:
        chosen = tuple(allocate(coefficients[:, None] * prior, costs, budget))
        if chosen not in seen:
            found = float(score(chosen))
            seen[chosen] = found if found == found else np.inf
        return seen[chosen]

    layers = len(prior)
    best, lowest = np.ones(layers), value(np.ones(layers))
    for resampled in _rounds(layers):
        for _ in range(trials):
            places = generator.choice(layers, resampled, replace=False)
            tried = best.copy()
            tried[places] = generator.random(resampled)
            if (found := value(tried)) < lowest:
                best, lowest = tried, found
            step(lowest)
    return best


def search_length(layers: int, trials: int) -> int:
    """How many trials `search_coefficients` makes."""
    return trials * len(_rounds(layers))


def _rounds(layers: int) -> list[int]:
    """How many coefficients each round draws anew: all of them, then a tenth, and fewer down to one."""
    return [layers, *range(max(1, int(np.ceil(_RESAMPLED * layers))), 0, -1)]
