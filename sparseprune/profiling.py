"""How long converted networks take, and each layer in them, and dense torch.

Others on a shared machine change its pace by tens of per cent, for seconds or minutes, through its caches and memory
too, which a process that never waits for a core does not see. So what is compared is measured by turns, in short
blocks, and each round's pace is taken out: ratios stay within two or three per cent.
"""

from __future__ import annotations

import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import _native, timing
from .conversion import _channels_last, _channels_last_args, convert
from .errors import SparsepruneWarning, UnsupportedError
from .graph.segmented import Segmented
from .graph.snapshot import snapshot
from .module import SparseModule

__all__ = ["Profile", "Yardstick", "profile_models"]

_SECONDS = 0.06  # of a block
_ROUNDS = 12


@dataclass(frozen=True)
class Profile:
    """Milliseconds of one converted network.

    Attributes:
        layers: Each convolution and linear layer, by qualified name; all calls of one together.
        whole: Everything, measured without looking inside: the layers, other operators, torch segments and the call.
    """

    layers: dict[str, float]
    whole: float


def profile_models(
    models: Iterable[nn.Module], args: tuple[Any, ...], step: Callable[[], object] = lambda: None
) -> tuple[list[Profile], float, str]:
    """Converts models of one architecture and times them by turns, with as many threads as are set.

    Args:
        models: Each is let go once it is converted.
        args: As for `convert`.
        step: Called after each conversion.

    Returns:
        A profile of each; milliseconds of the first in dense torch, in the faster layout; and that layout, `eager` or
        `channels_last`.

    Raises:
        UnsupportedError: One cannot be converted, or only single layers of it.
    """
    dense: dict[str, Callable[[], Any]] = {}
    subjects = []
    with _warned_once():
        for model in models:
            subjects.append(_Subject(_program(model, args), args))
            dense = dense or _dense(model, args)
            step()
    calls = [*dense.values(), *(subject.call for subject in subjects)]
    taken = []
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            taken.append([_block_ms(call) for call in calls])
            for subject in subjects:
                subject.look_inside()
    times = np.array(taken)
    pace = np.exp(np.log(times).mean(axis=1))  # of each round
    ms = (np.median(times / pace[:, None], axis=0) * pace.min()).tolist()
    dense_ms, layout = min(zip(ms, dense, strict=False))
    whole = ms[len(dense) :]
    return [subject.profile(own, pace) for subject, own in zip(subjects, whole, strict=True)], dense_ms, layout


class Yardstick:
    """Times other models against one whose time is known: at whatever pace the machine goes now.

    Args:
        model: Of the same architecture, and not far from as fast.
        args: As for `convert`.
        ms: What `model` takes, converted.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], ms: float) -> None:
        self.args, self.ms, self.known = args, ms, _program(model, args)

    def measure(self, model: nn.Module) -> float:
        """Milliseconds of `model` converted: of its native program, also where `convert` would use dense torch.

        Raises:
            UnsupportedError: It cannot be converted, or only single layers of it.
        """
        fast = _program(model, self.args)
        shares = []
        for _ in range(_ROUNDS):
            known = _block_ms(lambda: self.known(*self.args))
            shares.append(_block_ms(lambda: fast(*self.args)) / known)
        return self.ms * statistics.median(shares)


def _program(model: nn.Module, args: tuple[Any, ...]) -> SparseModule:
    """The native program or segments, whatever dense torch does."""
    fast = convert(model, args, verify=False)
    converted = fast._ready()
    runs = converted.runs
    if isinstance(runs, nn.Module) or (isinstance(runs, Segmented) and not any(s.program for s in runs.segments)):
        raise UnsupportedError(
            f"timing layers needs a native program, which this model does not become: {'; '.join(fast.report.notes)}"
        )
    converted.dense = None
    return fast


@contextmanager
def _warned_once() -> Iterator[None]:
    """What every conversion has to say is said once."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SparsepruneWarning)
            yield
    finally:
        for warning in {str(warning.message): warning for warning in caught}.values():
            warnings.warn(warning.message, warning.category, stacklevel=4)


def _dense(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
    eager, last, args_last = snapshot(model, own=True), _channels_last(model), _channels_last_args(args)
    return {"eager": lambda: eager(*args), "channels_last": lambda: last(*args_last)}


def _block_ms(call: Callable[[], Any]) -> float:
    timing.settle()
    return statistics.median(timing.block(call, _SECONDS))


class _Subject:
    """A converted model, and what was seen inside."""

    def __init__(self, fast: SparseModule, args: tuple[Any, ...]) -> None:
        self.call, self.parts = lambda: fast(*args), _parts(fast, args)
        self.inside: list[NDArray[np.float64]] = []  # of each round, milliseconds by node

    def look_inside(self) -> None:
        samples: list[list[float]] = []
        timing.settle()
        timing.block(lambda: samples.append([s for part in self.parts for s in part.profile()]), _SECONDS)
        self.inside.append(1e3 * np.median(samples, axis=0))

    def profile(self, whole: float, pace: NDArray[np.float64]) -> Profile:
        nodes = np.median(np.array(self.inside) / pace[:, None], axis=0) * pace.min()
        layers: dict[str, float] = {}
        for name, ms in zip((name for part in self.parts for name in part.names), nodes, strict=True):
            if name:
                layers[name] = layers.get(name, 0.0) + float(ms)
        return Profile(layers, whole)


class _Part:
    """A native program with its inputs."""

    def __init__(self, plan: _native.Plan, inputs: list[NDArray[np.float32]], names: list[str]) -> None:
        self.plan, self.inputs, self.names = plan, inputs, names
        self.outputs = [np.empty(shape, np.float32) for shape in plan.output_shapes]

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
