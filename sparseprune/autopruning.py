"""`autoprune`: per-layer sparsities that reach a latency, chosen from measured times and verified by measuring."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import timing
from .allocation import quadratic_prior, search_coefficients, search_length
from .autoprune_results import Attempt, AutopruneResult, PrunedLayer
from .candidates import Candidates
from .choices import Choices
from .dense import plain_copy
from .errors import SparsepruneWarning
from .evaluation import Loss
from .latency import SPARSITIES, LatencyTable, check_pattern, check_sparsities, input_shapes, progress_bar
from .pruning import Criterion, Pattern, prune
from .pruning.criteria import ScoreFunction
from .pruning.selection import Selector, find_weights

__all__ = ["autoprune"]

Array = NDArray[np.float64]
Errors = str | Mapping[str, Mapping[float, float]]

_ERRORS = ("magnitude", "output", "search")


def autoprune(
    model: nn.Module, example_inputs: Any, *, latency_ms: float | None = None, speedup: float | None = None,
    criterion: str | Criterion | ScoreFunction | Mapping[str, Tensor] = "magnitude", pattern: str | Pattern = "1x1",
    errors: Errors | None = None, batches: Iterable[Any] | None = None,
    loss: Loss | None = None, autocast: torch.dtype | None = None, table: LatencyTable | None = None,
    sparsities: Sequence[float] | None = None, threads: int | None = None,
    include: Iterable[Selector] | Selector = (nn.Conv2d, nn.Linear), exclude: Iterable[Selector] | Selector = (),
    verify: bool = True, tolerance: float = 0.05, rounds: int = 6, trials: int = 100, seed: int = 0,
    progress: bool = True,
) -> AutopruneResult:  # fmt: skip
    """Prune `model` in place so that, converted, it takes `latency_ms` on this machine, at the least damage.

    Each layer gets a sparsity of its own: the least sum of error scores whose measured times fit into the budget, by
    dynamic programming. Then the pruned model is converted and measured; where it misses the target by more than
    `tolerance`, the budget is corrected and the problem solved again. Zeros that are there already stay and count.
    Masks hold while finetuning afterwards, as with `prune`. Nothing is changed if an error is raised.

    Args:
        model: Any float32 module of which at least a part converts to a native program.
        example_inputs: As for `convert`: a tensor or a tuple. Their batch is the one to deploy with.
        latency_ms: The target, at the machine's pace when the table was measured. Exactly one of this and `speedup`.
        speedup: The target as how many times faster than dense torch (eager or channels_last, whichever is faster, with
            as many threads), as measured with the latency table.
        criterion, pattern: What ranks within a layer and what shape goes, as in `prune`; N:M leaves no choice.
        errors: What a layer's sparsity costs. "magnitude": the squared weights that go, of all of the layer's.
            "output": the squared change of the layer's output on `batches`, of all of it. "search": SPDY's, a
            quadratic in the logarithm of the density times a coefficient for each layer; coefficients are searched
            that make the loss on `batches` low after pruning in one shot, batch norms with the batches' statistics.
            Or a dict from layer to a dict from each sparsity of the grid to its error, such as `Sensitivity.errors()`.
            None: "search" with `batches`, else "magnitude".
        batches: A few (inputs, targets), some hundred examples in all; each is held in memory.
        loss, autocast: For "search": `(outputs, targets) -> scalar`, None for cross entropy; and a dtype to compute in,
            such as torch.bfloat16, as `evaluate` takes them.
        table: A `LatencyTable` of this model; None measures one.
        sparsities: Those to choose from; None takes the table's, which interpolates others.
        threads: Threads to deploy with; None is the table's, or `num_threads()`.
        include, exclude: As in `prune`. Layers that the native program does not have are left alone.
        verify: Convert, measure and correct. False trusts the table, which may be another machine's.
        tolerance: How far from the target, as a share of it, needs no correction.
        rounds: At most so many conversions.
        trials: Of each round of the search: it takes `trials` times (1 + a tenth of the layers) passes over `batches`.
        seed: For the search and for random criteria.
        progress: Show progress bars on stderr.

    Returns:
        An `AutopruneResult`; print it.

    Raises:
        TypeError, ValueError: Arguments that do not fit; a target that cannot be reached (the lowest that can is
            named), or that dense torch reaches.
        UnsupportedError: The model cannot be converted, or only single layers of it.

    Warns:
        SparsepruneWarning: No round came within `tolerance`; the nearest one is taken.

    Example:
        >>> print(autoprune(model, images[:1], speedup=10, batches=[(images[:512], labels[:512])]))
        >>> finetune(model, loader, epochs=5)

    Frantar, Alistarh, SPDY: Accurate Pruning with Speedup Guarantees, 2022 (arXiv 2201.13096).
    """
    _check(latency_ms, speedup, tolerance, rounds, trials)
    check_pattern(pattern)
    held = None if batches is None else list(batches)
    method = _error_method(errors, held)
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    weights = find_weights(model, include, exclude)
    if table is None:
        table = LatencyTable.measure(
            model, args, sparsities=SPARSITIES if sparsities is None else sparsities, threads=threads, pattern=pattern,
            include=include, exclude=exclude, progress=progress,
        )  # fmt: skip
    _check_table(table, args, threads, verify)
    target = _target(table, latency_ms, speedup)
    choices = Choices.of(model, weights, table, _grid(table, sparsities, method))
    if target < choices.least_ms:
        raise ValueError(
            f"the target of {target:.4g} ms cannot be reached: the lowest that the latency table predicts is "
            f"{choices.least_ms:.4g} ms, with {max(choices.grid):.2%} zeros in every layer"
        )

    def apply(other: nn.Module, counts: Sequence[int]) -> nn.Module:
        amounts = dict(zip(choices.parameters, counts, strict=True))
        return prune(
            other, 0, criterion=criterion, pattern=pattern, include=tuple(amounts), amounts=amounts, seed=seed
        )

    def measure() -> Callable[[Sequence[int]], float]:
        with timing.thread_count(table.threads):
            yardstick = table.yardstick(model, args, target, pattern)

        def ms(chosen: Sequence[int]) -> float:
            with timing.thread_count(table.threads):
                return yardstick.measure(apply(plain_copy(model).cpu(), choices.counts_of(chosen)))

        return ms

    if isinstance(method, str):
        candidates = Candidates(model, choices.parameters, choices.counts, apply)
        scores = _scores(method, candidates, choices, target, held or [], loss, autocast, trials, seed, progress)
    else:
        scores = choices.given_errors(method)
    attempts = _meet(choices, scores, target, measure() if verify else None, tolerance, rounds, progress)
    best = _chosen(attempts, target, tolerance, choices)
    apply(model, choices.counts_of(best.chosen))
    rows = zip(choices.names, choices.shapes, choices.sparsities, scores, choices.costs, best.chosen, strict=True)
    layers = [PrunedLayer(name, shape, float(s[j]), float(e[j]), float(c[j])) for name, shape, s, e, c, j in rows]
    times = (target, best.predicted_ms, best.measured_ms, table.dense_ms)
    return AutopruneResult(tuple(layers), *times, tuple(attempts), table)


def _grid(table: LatencyTable, sparsities: Sequence[float] | None, method: Errors) -> tuple[float, ...]:
    """The user's; else the table's, with a point between each two, by the density's logarithm, where errors allow."""
    if sparsities is not None:
        return check_sparsities(sparsities)
    known = table.sparsities
    if not isinstance(method, str):
        return known
    between = [1 - math.sqrt((1 - a) * (1 - b)) for a, b in zip(known, known[1:], strict=False)]
    return tuple(sorted({*known, *between}))


def _check(latency_ms: float | None, speedup: float | None, tolerance: float, rounds: int, trials: int) -> None:
    if (latency_ms is None) == (speedup is None):
        raise ValueError(f"expected exactly one of latency_ms and speedup, got {latency_ms!r} and {speedup!r}")
    given = {"latency_ms": latency_ms, "speedup": speedup}
    numbers = {name: value for name, value in given.items() if value is not None} | {"tolerance": tolerance}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}")
    for name, count in (("rounds", rounds), ("trials", trials)):
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name}={count!r}: expected a whole number, got {type(count).__name__}")
    if latency_ms is not None and not (latency_ms > 0 and math.isfinite(latency_ms)):
        raise ValueError(f"latency_ms={latency_ms} must be positive and finite")
    if speedup is not None and not (speedup > 1 and math.isfinite(speedup)):
        raise ValueError(f"speedup={speedup} must be above 1 and finite: it is relative to dense torch")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance} is not between 0 and 1")
    if rounds < 1 or trials < 1:
        raise ValueError(f"rounds={rounds} and trials={trials} must be positive")


def _error_method(errors: Errors | None, batches: list[Any] | None) -> Errors:
    if batches is not None and not batches:
        raise ValueError("batches is empty: it yielded no batch")
    if errors is None:
        return "magnitude" if batches is None else "search"
    if not isinstance(errors, str | Mapping):
        raise TypeError(f"errors must be one of {', '.join(_ERRORS)} or a dict, got {type(errors).__name__}")
    if isinstance(errors, str) and errors not in _ERRORS:
        raise ValueError(f"errors={errors!r} is not one of {', '.join(_ERRORS)}")
    if errors in ("output", "search") and batches is None:
        raise ValueError(f"errors={errors!r} needs batches=[(inputs, targets), ...]")
    return errors


def _check_table(table: LatencyTable, args: tuple[Any, ...], threads: int | None, verify: bool) -> None:
    if threads not in (None, table.threads):
        raise ValueError(f"threads={threads}, but the latency table was measured with {table.threads}")
    if input_shapes(args) != table.input_shapes:
        raise ValueError(
            f"example_inputs have shapes {input_shapes(args)}, but the latency table was measured with "
            f"{table.input_shapes}"
        )
    here = timing.machine()
    if verify and (table.machine.get("cpu"), table.machine.get("isa")) != (here["cpu"], here["isa"]):
        raise ValueError(
            f"the latency table is of another machine ({table.machine.get('cpu')}, {table.machine.get('isa')}): "
            "what is measured here says nothing about it; pass verify=False"
        )


def _target(table: LatencyTable, latency_ms: float | None, speedup: float | None) -> float:
    if speedup is not None:
        return table.dense_ms / speedup
    assert latency_ms is not None
    if latency_ms >= table.dense_ms:
        raise ValueError(f"latency_ms={latency_ms:.4g} needs no pruning: dense torch takes {table.dense_ms:.4g} ms")
    return latency_ms


def _scores(
    method: str, candidates: Candidates, choices: Choices, target: float, batches: list[Any],
    loss: Loss | None, autocast: torch.dtype | None, trials: int, seed: int, progress: bool,
) -> Array:  # fmt: skip
    if method == "magnitude":
        return candidates.magnitude_errors()
    if method == "output":
        return candidates.output_errors(batches)
    prior = quadratic_prior(choices.sparsities, max(choices.grid))
    prior -= prior[:, :1]  # what is pruned already costs nothing
    with progress_bar(search_length(len(prior), trials), "searching", progress) as bar:

        def step(lowest: float) -> None:
            bar.set_postfix(loss=f"{lowest:.4f}", refresh=False)
            bar.update()

        coefficients = search_coefficients(
            lambda chosen: candidates.loss(chosen, batches, loss, autocast), prior, choices.costs,
            target - choices.fixed_ms, trials=trials, generator=np.random.default_rng(seed), step=step,
        )  # fmt: skip
    return np.asarray(coefficients[:, None] * prior)


def _meet(
    choices: Choices, scores: Array, target: float, measure: Callable[[Sequence[int]], float] | None, tolerance: float,
    rounds: int, progress: bool,
) -> list[Attempt]:  # fmt: skip
    """Solves, measures, and asks the table for less or more until what is measured is near the target."""
    attempts: list[Attempt] = []
    known: dict[tuple[int, ...], float] = {}
    budget, low, high = target, choices.least_ms, choices.most_ms
    too_slow = fast_enough = False  # whether `high` and `low` are measured, not only the ends of what is possible
    with progress_bar(rounds if measure else 0, "converting", progress and measure is not None) as bar:
        for _ in range(rounds):
            chosen = tuple(choices.solve(scores, budget))
            predicted = choices.ms(chosen)
            if measure is None:
                return [Attempt(budget, predicted, None, chosen)]
            measured = known[chosen] = known[chosen] if chosen in known else measure(chosen)
            attempts.append(Attempt(budget, predicted, measured, chosen))
            bar.set_postfix_str(f"{measured:.3f} ms for {target:.3f}")
            bar.update()
            if abs(measured / target - 1) <= tolerance:
                break
            if measured > target:
                high, too_slow = min(high, predicted), True
            else:
                low, fast_enough = max(low, budget), True
            if high - low <= 1e-4 * target:
                break
            # Only what depends on the choice scales.
            share = max(0.0, target - choices.fixed_ms) / max(measured - choices.fixed_ms, 1e-9)
            budget = choices.fixed_ms + (predicted - choices.fixed_ms) * share
            if not fast_enough and len(attempts) == 3:
                budget = low  # scaling does not help: is the target within reach at all?
            elif budget <= low:
                budget = (low + high) / 2 if fast_enough else low
            elif budget >= high:
                budget = (low + high) / 2 if too_slow else high
    return attempts


def _chosen(attempts: Sequence[Attempt], target: float, tolerance: float, choices: Choices) -> Attempt:
    """The attempt nearest to the target. Warns where that is not near, raises where nothing could be."""
    best = min(attempts, key=lambda attempt: abs((attempt.measured_ms or target) - target))
    if best.measured_ms is None or abs(best.measured_ms / target - 1) <= tolerance:
        return best
    sparsest = [a.measured_ms for a in attempts if a.measured_ms and a.predicted_ms <= choices.least_ms * (1 + 1e-6)]
    if best.measured_ms > target and sparsest:
        raise ValueError(
            f"the target of {target:.4g} ms cannot be reached: with {max(choices.grid):.2%} zeros in every layer the "
            f"converted model takes {min(sparsest):.4g} ms"
        )
    if best.measured_ms > target or best.predicted_ms < choices.most_ms * (1 - 1e-6):
        warnings.warn(
            f"autoprune: {best.measured_ms:.4g} ms is the nearest to the target of {target:.4g} ms in "
            f"{len(attempts)} rounds; a busy machine disturbs the measurement",
            SparsepruneWarning,
            stacklevel=3,
        )
    return best
