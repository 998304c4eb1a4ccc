"""Latency of a converted model beside every good dense way torch has of running it, in one fair run.

What makes it fair: all candidates take turns in short blocks, in rotating order, so that a busy machine slows them
alike; each block warms up first; between two blocks we wait until the previous library's threads have stopped spinning;
the dense candidates run a copy with masks folded into the weights and get inputs in their own memory layout; and the
speed-up is against the *fastest* dense candidate, compiled ones included.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .dense import BASELINES, baseline, plain_copy
from .synthetic import LAYERS, prune_uniform
from .timing import Samples, machine, take_turns, thread_count

__all__ = ["BASELINES", "BenchmarkResult", "Timing", "benchmark", "prune_uniform"]

OURS = "sparseprune"
_WAITED = 0.03


@dataclass(frozen=True)
class Timing:
    """One candidate's latency in milliseconds, or the `failure` that kept it out.

    `max_abs_error` is the largest absolute difference of its outputs to eager torch's; `speedup` is the fastest dense
    candidate's median divided by this one's. `waited` is the share of the threads' time that they were runnable but had
    no core, because something else ran there: near 0 on an idle machine, and above some per cent the row means little.
    """

    name: str
    median_ms: float | None = None
    p90_ms: float | None = None
    samples: int = 0
    speedup: float | None = None
    max_abs_error: float | None = None
    waited: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class BenchmarkResult:
    """What `benchmark` measured. `str()` is a table, `to_dict()` plain data, `to_json()` the same as text."""

    model: str
    input_shapes: tuple[tuple[int, ...], ...]
    threads: int
    sparsity: float
    timings: tuple[Timing, ...]
    machine: dict[str, str | int]
    report: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def sparse(self) -> Timing:
        """The converted model's row."""
        return next(t for t in self.timings if t.name == OURS)

    @property
    def fastest_dense(self) -> Timing | None:
        """The dense row with the smallest median; None where every baseline failed."""
        dense = [t for t in self.timings if t.name != OURS and t.median_ms is not None]
        return min(dense, key=lambda t: t.median_ms or 0.0, default=None)

    @property
    def disturbed(self) -> bool:
        """True where some candidate waited for a core for over 3 % of its time: measure again on an idle machine.

        Dense libraries suffer most, since a thread that waits holds up the others at each barrier, so a disturbed run
        usually flatters the speed-up.
        """
        return any((t.waited or 0.0) > _WAITED for t in self.timings)

    @property
    def speedup(self) -> float | None:
        """Median of the fastest dense candidate divided by the converted model's; above 1 means we are faster."""
        return self.sparse.speedup

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; an error that is not finite becomes the string `"inf"`."""
        data = asdict(self)
        data["input_shapes"] = [list(shape) for shape in self.input_shapes]
        data["timings"] = [asdict(t) for t in self.timings]
        for row in data["timings"]:
            if row["max_abs_error"] is not None and not math.isfinite(row["max_abs_error"]):
                row["max_abs_error"] = "inf"
        fastest = self.fastest_dense
        return data | {"speedup": self.speedup, "fastest_dense": fastest.name if fastest else None,
                       "disturbed": self.disturbed}  # fmt: skip

    def to_json(self) -> str:
        """`to_dict()` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def __str__(self) -> str:
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.input_shapes)
        host = self.machine
        lines = [
            f"{self.model}, input {shapes}, {100 * self.sparsity:.1f} % of the weights zero, {self.threads} thread(s)",
            f"{host['cpu']} ({host['isa']}, {host['cores']} core(s)), torch {host['torch']}",
            "",
            f"{'':22} {'median ms':>10} {'p90 ms':>10} {'speed-up':>9} {'max abs error':>14}",
        ]
        for t in self.timings:
            if t.median_ms is None:
                lines.append(f"{t.name:22} failed: {t.failure}")
                continue
            speedup = "" if t.speedup is None else f"{t.speedup:.2f}×"
            lines.append(f"{t.name:22} {t.median_ms:10.3f} {t.p90_ms:10.3f} {speedup:>9} {t.max_abs_error:14.2e}")
        fastest = self.fastest_dense
        if fastest is not None:
            lines += ["", f"speed-up: against the fastest dense, {fastest.name}; error: against eager torch"]
        if self.disturbed:
            waits = ", ".join(f"{t.name} {t.waited:.0%}" for t in self.timings if t.waited is not None)
            lines += [
                "",
                "WARNING: other work took cores: do not rely on these figures, least of all on the speed-up.",
                f"Measure again on an idle machine. Share of time without a core: {waits}",
            ]
        return "\n".join(lines)


def benchmark(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    *,
    sparse: Callable[..., Any] | None = None,
    threads: int | None = None,
    baselines: Sequence[str] = BASELINES,
    rounds: int = 8,
    block_seconds: float = 0.15,
    name: str | None = None,
    progress: bool = True,
) -> BenchmarkResult:
    """Time `model` converted by sparseprune against dense torch, all in one interleaved run.

    Args:
        model: The pruned (or dense) model, on the CPU. It is copied in eval mode with its masks made permanent, and
            left as it is.
        inputs: A tensor, or a sequence of the tensors that `model` takes, on the CPU, of any shape the model accepts.
        sparse: What `sparseprune.convert(model)` returned, or any callable of the same inputs; None converts here.
        threads: Threads for torch and sparseprune alike; None is every core this process may use. Restored afterwards.
        baselines: Some of `BASELINES`. `compile` is `torch.compile` with inductor's freezing.
        rounds: Blocks per candidate.
        block_seconds: Measured seconds per block, after a warm-up of a quarter of that.
        name: What the result calls the model; None takes the class's name.
        progress: Show a progress bar on stderr.

    Returns:
        Medians and 90th percentiles in milliseconds over all blocks. A baseline that cannot run has a `failure`.

    Raises:
        ValueError: An unknown baseline, a count that is not positive, or outputs of other shapes than the model's.
        SparsepruneError: The model cannot be converted.

    Example:
        >>> print(sparseprune.benchmark(model, torch.zeros(1, 3, 32, 32), threads=2))  # doctest: +SKIP
    """
    unknown = [b for b in baselines if b not in BASELINES]
    if unknown:
        raise ValueError(f"baselines: {unknown[0]!r} is not one of {', '.join(BASELINES)}")
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    if threads < 1 or rounds < 1 or block_seconds <= 0:
        raise ValueError(f"threads={threads}, rounds={rounds}, block_seconds={block_seconds} must all be positive")
    args = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    dense = plain_copy(model)
    with thread_count(threads):
        if sparse is None:
            from sparseprune import convert

            sparse = convert(dense, args)
        with torch.inference_mode(), _progress(len(baselines) + rounds * (len(baselines) + 1), progress) as bar:
            timings = _measure(dense, sparse, args, baselines, rounds, block_seconds, bar)
    return BenchmarkResult(
        model=name or type(model).__name__,
        input_shapes=tuple(tuple(x.shape) for x in args),
        threads=threads,
        sparsity=_sparsity(dense),
        timings=timings,
        machine=machine(),
        report=_report(sparse),
    )


def _measure(
    dense: nn.Module,
    sparse: Callable[..., Any],
    args: tuple[Tensor, ...],
    baselines: Sequence[str],
    rounds: int,
    block_seconds: float,
    bar: Any,
) -> tuple[Timing, ...]:
    expected = _leaves(dense(*args))
    candidates: dict[str, Callable[[], Any]] = {}
    rows: dict[str, Timing] = {}
    for name in dict.fromkeys(baselines):
        bar.set_description(f"prepare {name}")
        try:
            call = baseline(name, dense, args)
            rows[name] = Timing(name, max_abs_error=_max_error(call(), expected, name))
            candidates[name] = call
        except Exception as exc:  # whatever a compiler raises: it is reported, not hidden
            rows[name] = Timing(name, failure=_one_line(exc))
        bar.update()
    candidates[OURS] = lambda: sparse(*args)
    rows[OURS] = Timing(OURS, max_abs_error=_max_error(sparse(*args), expected, OURS))
    return _summarise(rows, take_turns(candidates, rounds, block_seconds, bar), torch.get_num_threads())


def _sparsity(model: nn.Module) -> float:
    weights = [module.weight for module in model.modules() if isinstance(module, LAYERS)]
    total = sum(w.numel() for w in weights)
    return 1 - sum(int(torch.count_nonzero(w)) for w in weights) / total if total else 0.0


def _leaves(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [x for x in leaves if isinstance(x, Tensor)]


def _max_error(output: Any, expected: list[Tensor], name: str) -> float:
    found = _leaves(output)
    if [x.shape for x in found] != [x.shape for x in expected]:
        shapes = [[tuple(x.shape) for x in tensors] for tensors in (found, expected)]
        raise ValueError(f"{name} returns shapes {shapes[0]}, the model {shapes[1]}")
    worst = 0.0
    for x, y in zip(found, expected, strict=True):
        same = (x == y) | (x.isnan() & y.isnan())
        gap = torch.where(same, 0.0, (x.double() - y.double()).abs()).nan_to_num(nan=math.inf)
        worst = max(worst, float(gap.max()) if gap.numel() else 0.0)
    return worst


def _summarise(rows: dict[str, Timing], samples: dict[str, Samples], threads: int) -> tuple[Timing, ...]:
    medians = {name: statistics.median(taken.ms) for name, taken in samples.items()}
    dense = min((ms for name, ms in medians.items() if name != OURS), default=None)
    for name, taken in samples.items():
        rows[name] = replace(
            rows[name],
            median_ms=medians[name],
            p90_ms=sorted(taken.ms)[math.ceil(0.9 * len(taken.ms)) - 1],
            samples=len(taken.ms),
            speedup=None if dense is None else dense / medians[name],
            waited=taken.wait_seconds / (taken.wall_seconds * threads),
        )
    return tuple(rows.values())


def _report(sparse: Any) -> dict[str, Any] | None:
    to_dict = getattr(getattr(sparse, "report", None), "to_dict", None)
    return to_dict() if callable(to_dict) else None


def _one_line(exc: BaseException, limit: int = 200) -> str:
    text = " ".join(f"{type(exc).__name__}: {exc}".split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _progress(total: int, enabled: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, leave=False, disable=not enabled)
