"""How long a converted network takes, and each layer in it: native programs timed from outside and from inside."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from . import _native, timing
from .conversion import convert
from .errors import UnsupportedError
from .graph.segmented import Segmented
from .module import SparseModule

__all__ = ["Profile", "converted_ms", "profile_layers"]

_BLOCKS = 5
_SECONDS = 0.06  # of a block


@dataclass(frozen=True)
class Profile:
    """Milliseconds of one converted network.

    Attributes:
        layers: Each convolution and linear layer, by qualified name; all calls of one together.
        whole: Everything, measured without looking inside: the layers, other operators, torch segments and the call.
        dense: The same model in torch, `eager` and `channels_last`.
    """

    layers: dict[str, float]
    whole: float
    dense: dict[str, float]


def profile_layers(model: nn.Module, args: tuple[Any, ...]) -> Profile:
    """Converts `model` and times it, with as many threads as are set.

    Raises:
        UnsupportedError: It cannot be converted, or only single layers of it.
    """
    fast, dense = _program(model, args)
    parts = _parts(fast, args)
    whole = _quietest(lambda: fast(*args))
    native = _quietest(lambda: _run(parts))
    inside = _quietest_inside(parts)
    scale = native / sum(inside.values())  # what looking inside costs, taken out
    layers = {name: ms * scale for name, ms in inside.items() if name}
    return Profile(layers, whole, dense)


def converted_ms(model: nn.Module, args: tuple[Any, ...]) -> float:
    """Milliseconds of a call of `model` converted: of its program, also where `convert` would rather use dense torch.

    Raises:
        UnsupportedError: as `profile_layers`.
    """
    fast, _ = _program(model, args)
    return _quietest(lambda: fast(*args))


def _program(model: nn.Module, args: tuple[Any, ...]) -> tuple[SparseModule, dict[str, float]]:
    """The native program or segments, whatever dense torch does, and the dense times."""
    fast = convert(model, args, verify=False)
    converted = fast._ready()
    runs = converted.runs
    if isinstance(runs, nn.Module) or (isinstance(runs, Segmented) and not any(s.program for s in runs.segments)):
        raise UnsupportedError(
            f"timing layers needs a native program, which this model does not become: {'; '.join(fast.report.notes)}"
        )
    converted.dense = None
    return fast, {name: ms for name, ms in fast.report.times_ms.items() if name != "sparse"}


class _Part:
    """A native program with its inputs."""

    def __init__(self, plan: _native.Plan, inputs: list[NDArray[np.float32]], names: list[str]) -> None:
        self.plan, self.inputs, self.names = plan, inputs, names
        self.outputs = [np.empty(shape, np.float32) for shape in plan.output_shapes]

    def run(self) -> None:
        self.plan.run(self.inputs, self.outputs)

    def profile(self) -> list[float]:
        return self.plan.profile(self.inputs, self.outputs)


def _parts(fast: SparseModule, args: tuple[Any, ...]) -> list[_Part]:
    converted = fast._ready()
    leaves = fast._leaves(converted, args)
    runs: list[tuple[Any, Sequence[Tensor]]] = []
    if isinstance(converted.runs, Segmented):
        segments = converted.runs.segments
        converted.runs.flat(
            leaves,
            lambda place, reads, _: runs.append((segments[place].program, reads)) if segments[place].program else None,
        )
    else:
        runs.append((converted.program, leaves))
    parts = []
    for program, inputs in runs:
        arrays = [np.ascontiguousarray(x.detach().numpy()) for x in inputs]
        plan = program.plan(*(x.shape for x in arrays))
        layers = program.describe()["layers"]
        # "@1": the second call of a layer
        names = [
            re.sub(r"@\d+$", "", layer["name"]) if choice else ""
            for layer, choice in zip(layers, plan.choices, strict=True)
        ]
        parts.append(_Part(plan, arrays, names))
    return parts


def _run(parts: list[_Part]) -> None:
    for part in parts:
        part.run()


def _quietest(call: Callable[[], Any]) -> float:
    """Median milliseconds of a call in the block that was disturbed least."""
    medians = []
    for _ in range(_BLOCKS):
        timing.settle()
        medians.append(statistics.median(timing.block(call, _SECONDS)))
    return min(medians)


def _quietest_inside(parts: list[_Part]) -> dict[str, float]:
    """Milliseconds by node name (all others under ""), medians of the block that was disturbed least."""
    best: NDArray[np.float64] | None = None
    for _ in range(_BLOCKS):
        samples: list[list[float]] = []

        def run(samples: list[list[float]] = samples) -> None:
            samples.append([seconds for part in parts for seconds in part.profile()])

        timing.settle()
        timing.block(run, _SECONDS)
        medians = 1e3 * np.median(np.array(samples[len(samples) // 5 :]), axis=0)  # a fifth warmed up
        if best is None or medians.sum() < best.sum():
            best = medians
    assert best is not None
    found: dict[str, float] = {}
    for name, ms in zip((name for part in parts for name in part.names), best, strict=True):
        found[name] = found.get(name, 0.0) + float(ms)
    return found
