"""Pruning little by little: `Pruner` raises the sparsity step by step while the model is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .api import DEFAULT_LAYERS, prune
from .criteria import resolve_criterion
from .patterns import NofM, Pattern, Slice, resolve_pattern
from .scopes import Amount, check_amount, check_density, resolve_scope, target_count
from .selection import PrunableWeight, find_weights
from .targets import STRAY_ZEROS, State, check_pattern_amounts, follow_filters, held, split_groups

__all__ = ["SCHEDULES", "Pruner"]

# schedule name -> share of the way from the first to the final sparsity, after a share `p` in (0, 1] of the steps
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cubic": lambda p: 1 - (1 - p) ** 3,
    "linear": lambda p: p,
    "one_shot": lambda p: 1.0,
}


class Pruner:
    """Prunes a model in steps, from its present sparsity to a final one.

    Schedules: "cubic" (fast at first, slow at the end; Zhu & Gupta, To Prune, or Not to Prune, 2017, arXiv:1710.01878),
    "linear", "one_shot" (all at the first step), "iterative" (every step keeps the same share of what is left; Han et
    al. 2015, arXiv:1506.02626), or a function from the share of steps done, in (0, 1], to the share of the way.

    Pass it to `finetune(pruner=...)`, which steps it before every epoch (or batch, with `per="batch"`), or call
    `step()` in a loop of your own.

    From the start every eligible weight has a mask, which keeps all but the zeros that the layer has been pruned to: so
    an optimizer or DistributedDataParallel made afterwards stays valid, and names in `state_dict` do not change.

    Args:
        model: the module to prune, in place.
        amount: the final, absolute sparsity (float) or number of weights pruned (int), as in `prune`.
        schedule: see above.
        steps: prunings until the final amount.
        every: calls of `step()` for one pruning; the first call prunes.
        per: "epoch" or "batch": when `finetune` calls `step()`.
        options: `criterion`, `pattern`, `scope`, `include`, `exclude`, `parameters`, `amounts`, `min_density`, `seed`:
            as in `prune`. A layer with an amount of its own, by `amounts` or by the scope, follows the schedule from
            its own present sparsity.

    Raises:
        TypeError, ValueError: as `prune`, and for an unknown schedule, or `steps` or `every` below 1.

    Example:
        >>> pruner = Pruner(model, 0.98, schedule="cubic", steps=10)
        >>> finetune(model, loader, epochs=15, pruner=pruner)
    """

    def __init__(
        self, model: nn.Module, amount: float | int, *, schedule: str | Callable[[float], float] = "cubic",
        steps: int = 1, every: int = 1, per: str = "epoch", **options: Any,
    ) -> None:  # fmt: skip
        if not (callable(schedule) or schedule in (*SCHEDULES, "iterative")):
            names = [*SCHEDULES, "iterative"]
            raise ValueError(f"schedule must be one of {names} or a function, got {schedule!r}")
        for name, value in (("steps", steps), ("every", every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if per not in ("epoch", "batch"):
            raise ValueError(f'per must be "epoch" or "batch", got {per!r}')
        self.model, self.steps, self.every, self.per = model, steps, every, per
        self._schedule = schedule
        self._amount, self._options = check_amount(amount), dict(options)
        self._calls = 0
        self._goals, weights = _goals(model, self._amount, self._options)
        if steps > 1 and isinstance(resolve_pattern(options.get("pattern", "1x1")), NofM):
            raise ValueError(f"an N:M pattern fixes the sparsity: steps must be 1, got {steps}")
        for weight in weights:
            if weight.mask() is None:
                weight.set_mask(_kept(weight))

    @property
    def finished(self) -> bool:
        """Whether the final amount is reached."""
        return self._done() >= self.steps

    def step(self) -> bool:
        """Count one call, and prune if it is time to; whether it pruned.

        Raises:
            ValueError: as `prune`; the call is then not counted.
        """
        due = not self.finished and self._calls % self.every == 0
        if due and self._done() + 1 == self.steps:
            prune(self.model, self._amount, **self._options)
        elif due:
            share = (self._done() + 1) / self.steps
            amounts = {name: goal.amount(self._schedule, share) for name, goal in self._goals.items()}
            rest = amounts.pop("", 0.0)
            prune(self.model, rest, **{**self._options, "amounts": amounts})
        self._calls += 1
        return due

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands: plain data. The masks are in the model's own `state_dict`."""
        goals = {layer: [goal.start, goal.final, goal.total] for layer, goal in self._goals.items()}
        return {"calls": self._calls, "goals": goals, **self._description()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; the model's masks must be those of that time.

        Raises:
            ValueError: the state is of another schedule, number of steps, amount or model.
        """
        mine = self._description()
        for key, value in mine.items():
            if state.get(key) != value:
                raise ValueError(f"the state is of a pruner with {key}={state.get(key)!r}, this one has {value!r}")
        if not isinstance(state.get("goals"), Mapping):
            raise ValueError(f"the state is no pruner's: it has no goals, only {sorted(state)}")
        goals = {layer: _Goal(int(s), int(f), int(n)) for layer, (s, f, n) in state["goals"].items()}
        if {layer: (goal.final, goal.total) for layer, goal in goals.items()} != {
            layer: (goal.final, goal.total) for layer, goal in self._goals.items()
        }:
            raise ValueError("the state is of a pruner with other amounts or of another model")
        self._goals, self._calls = goals, int(state["calls"])

    def _done(self) -> int:
        return -(-self._calls // self.every)

    def _description(self) -> dict[str, Any]:
        schedule = self._schedule
        name = schedule if isinstance(schedule, str) else getattr(schedule, "__qualname__", "function")
        return {"schedule": name, "steps": self.steps, "every": self.every}

    def __repr__(self) -> str:
        about = ", ".join(f"{key}={value!r}" for key, value in self._description().items())
        return f"Pruner({about}, done={min(self._done(), self.steps)})"


class _Goal:
    """How many of `total` weights are pruned at first and in the end."""

    def __init__(self, start: int, final: int, total: int) -> None:
        self.start, self.final, self.total = start, final, total

    def at(self, schedule: str | Callable[[float], float], share: float) -> int:
        """Weights pruned after a share of the steps."""
        if schedule == "iterative":  # the same share of what is left, every time
            kept, last = self.total - self.start, self.total - self.final
            return self.total - round(kept * (last / kept) ** share) if kept else self.final
        way = SCHEDULES[schedule](share) if isinstance(schedule, str) else float(schedule(share))
        return min(self.final, max(self.start, self.start + round((self.final - self.start) * way)))

    def amount(self, schedule: str | Callable[[float], float], share: float) -> float:
        """The same for `prune`: a float, whose rounding may take all of a small layer, as an int may not."""
        return min(self.at(schedule, share) / max(self.total, 1), math.nextafter(1.0, 0.0))


def _goals(
    model: nn.Module, amount: Amount, options: Mapping[str, Any]
) -> tuple[dict[str, _Goal], list[PrunableWeight]]:
    """Parameter name -> its goal, "" for all that are ranked together; and all eligible weights."""
    known = {"criterion", "pattern", "scope", "include", "exclude", "parameters", "amounts", "min_density", "seed"}
    for key in options:
        if key not in known:
            raise TypeError(f"Pruner has no option {key!r}; it takes {sorted(known)}")
    weights = find_weights(
        model, options.get("include", DEFAULT_LAYERS), options.get("exclude", ()), options.get("parameters", "weight")
    )
    pattern, scope = resolve_pattern(options.get("pattern", "1x1")), resolve_scope(options.get("scope", "global"))
    resolve_criterion(options.get("criterion", "magnitude"))  # raises now, not in the middle of a training
    amounts, floor = options.get("amounts") or {}, check_density(options.get("min_density", 0.0))
    check_pattern_amounts(pattern, amount, amounts, scope, floor)
    followed = follow_filters(weights) if isinstance(pattern, Slice) and pattern.dim == 0 else {}
    goals: dict[str, _Goal] = {}
    for group, share in split_groups([w for w in weights if w.name not in followed], amount, scope, amounts, floor):
        key = group[0].name if len(group) == 1 else ""
        if key in goals:
            raise ValueError(f"scope={scope!r} ranks several groups of layers: such a scope cannot be scheduled")
        goals[key] = _goal(group, share, pattern, key or f"{len(group)} layers")
    return goals, weights


def _goal(weights: Sequence[PrunableWeight], amount: Amount, pattern: Pattern, where: str) -> _Goal:
    """Raises ValueError where more is pruned already than `amount` asks for."""
    states = [State.of(weight, weight.values()) for weight in weights]
    bound = [pattern.bind(w.name, w.sites[0][0], tuple(w.values().shape)) for w in weights]
    held(states, bound, amount, where)
    total = sum(state.by_mask.numel() for state in states)
    pruned = sum(int((~_kept(weight)).sum()) for weight in weights)
    final = target_count(amount, total, where, pruned=pruned)
    return _Goal(min(pruned, final), final, total)


def _kept(weight: PrunableWeight) -> Tensor:
    """Its mask, or what it was pruned to without one: bool of its shape."""
    mask, values = weight.mask(), weight.values()
    if mask is not None:
        return mask
    zeros = values == 0
    pruned = int(zeros.sum()) >= STRAY_ZEROS * zeros.numel()
    return ~zeros if pruned else torch.ones_like(zeros)
