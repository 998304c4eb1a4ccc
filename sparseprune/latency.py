"""What each layer costs at each sparsity: a latency table, measured inside the converted network on this machine."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from . import _native, timing
from .dense import plain_copy
from .errors import FormatError
from .module import write_beside
from .profiling import Profile, Yardstick, profile_models
from .pruning import Pattern, prune
from .pruning.patterns import NofM, resolve_pattern
from .pruning.selection import PrunableWeight, Selector, find_weights

__all__ = [
    "SPARSITIES", "LatencyTable", "LayerLatency", "check_pattern", "check_sparsities", "input_shapes", "progress_bar",
    "pruned_count",
]  # fmt: skip

SPARSITIES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
_FORMAT = "sparseprune latency table, version 1"

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class LayerLatency:
    """One weight: its `shape`, and `ms`, the milliseconds of its layer at each of the table's sparsities.

    The times are as measured: those of a noisy run may rise with sparsity. Tied weights have one entry, all their
    layers together, and a layer that is called several times all its calls.
    """

    shape: tuple[int, ...]
    ms: tuple[float, ...]


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of each layer of a converted network at each sparsity, and of all the rest.

    The layers' times are read from the native program while the whole network runs: with its depth-first groups, its
    caches as warm or cold as they are there, and each layer's kernel tuned. They add up, so that the latency of any
    choice of sparsities can be predicted.

    Attributes:
        sparsities: Ascending, in [0, 1).
        layers: Qualified name -> its times.
        rest_ms: What does not depend on the sparsities: other operators and the call itself.
        whole_ms: The whole network, measured without looking inside, every layer at each of `sparsities`. The layers'
            times and the rest add up to it; only `predict` evens out what rises with sparsity.
        dense_ms: The dense model in torch, in the faster layout: what a speed-up refers to.
        dense_layout: That layout: `eager` or `channels_last`.
        threads, input_shapes, machine: What it was measured with.

    Raises:
        ValueError: Fields that do not fit together, or are out of range.

    Example:
        >>> table = sparseprune.LatencyTable.measure(model, torch.zeros(1, 3, 32, 32), threads=2)
        >>> table.predict({"layer1.0.conv1": 0.9, "layer4.1.conv2": 0.98})
        >>> table.save("table.json")
    """

    sparsities: tuple[float, ...]
    layers: dict[str, LayerLatency]
    rest_ms: float
    whole_ms: tuple[float, ...]
    dense_ms: float
    dense_layout: str
    threads: int
    input_shapes: Shapes
    machine: dict[str, str | int]

    def __post_init__(self) -> None:
        check_sparsities(self.sparsities)
        if not self.layers:
            raise ValueError("layers: a latency table needs at least one")
        points = len(self.sparsities)
        for name, layer in self.layers.items():
            if len(layer.ms) != points:
                raise ValueError(f"layers[{name!r}].ms has {len(layer.ms)} times for {points} sparsities")
        if len(self.whole_ms) != points:
            raise ValueError(f"whole_ms has {len(self.whole_ms)} times for {points} sparsities")
        times = [time for layer in self.layers.values() for time in layer.ms]
        times += [*self.whole_ms, self.rest_ms, self.dense_ms]
        if not all(math.isfinite(time) and time >= 0 for time in times) or 0 in self.whole_ms:
            raise ValueError("times must be finite and not negative, those of the whole positive")
        if self.threads < 1:
            raise ValueError(f"threads={self.threads} must be positive")

    @classmethod
    def measure(
        cls, model: nn.Module, example_inputs: Any, *, sparsities: Sequence[float] = SPARSITIES,
        threads: int | None = None, pattern: str | Pattern = "1x1",
        include: Iterable[Selector] | Selector = (nn.Conv2d, nn.Linear), exclude: Iterable[Selector] | Selector = (),
        progress: bool = True,
    ) -> LatencyTable:  # fmt: skip
        """Convert the model once per sparsity, all layers pruned to it, and time every layer in the running programs.

        About six seconds a sparsity for ResNet-18 on small images; all programs are in memory at the end. Each layer is
        pruned by magnitude, so masks are as uneven as the trained weights are. All programs and dense torch run by
        turns, and each round's pace is taken out. `model` is not changed.

        Args:
            model: Any float32 module that converts; its evaluation mode is measured.
            example_inputs: As for `convert`: a tensor or a tuple. Their batch is the one to deploy with.
            sparsities: The grid, ascending, in [0, 1); 0 should be in it. A layer that holds more zeros already is
                measured with those.
            threads: Threads to deploy with; None is `num_threads()`.
            pattern: What shape goes, as in `prune`.
            include, exclude: The layers to measure, as in `prune`. Others stay as they are and count as rest.
            progress: Show a progress bar on stderr.

        Returns:
            The table.

        Raises:
            TypeError, ValueError: Arguments that do not fit.
            UnsupportedError: The model cannot be converted, or only single layers of it.
        """
        grid = check_sparsities(sparsities)
        check_pattern(pattern)
        weights = find_weights(model, include, exclude)
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        threads = _native.num_threads() if threads is None else threads
        with timing.thread_count(threads), progress_bar(len(grid), "converting", progress) as bar:
            pruned = (_uniform(model, weights, sparsity, pattern) for sparsity in grid)
            points, dense_ms, layout = profile_models(pruned, args, bar.update)
        layers, rest = _split(weights, points)
        return cls(
            sparsities=grid,
            layers=layers,
            rest_ms=rest,
            whole_ms=tuple(point.whole for point in points),
            dense_ms=dense_ms,
            dense_layout=layout,
            threads=threads,
            input_shapes=input_shapes(args),
            machine=timing.machine(),
        )

    def layer_ms(self, layer: str, sparsity: float) -> float:
        """Milliseconds of one layer: interpolated over density, never rising with sparsity (isotonic regression).

        Outside the grid it is the nearest point's.

        Raises:
            ValueError: No such layer; `sparsity` not in [0, 1].
        """
        if layer not in self.layers:
            raise ValueError(f"layer {layer!r} is not in the latency table; it has {list(self.layers)[:8]}")
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity={sparsity} of {layer!r} is not in [0, 1]")
        densities = [1 - s for s in reversed(self.sparsities)]
        return float(np.interp(1 - sparsity, densities, non_increasing(self.layers[layer].ms)[::-1]))

    def predict(self, sparsities: Mapping[str, float]) -> float:
        """Milliseconds of the whole converted network with these sparsities; layers that are not named are dense.

        Raises:
            ValueError: A name that is not in the table, or a sparsity out of range.
        """
        for name in sparsities:
            self.layer_ms(name, sparsities[name])
        return self.rest_ms + sum(self.layer_ms(name, sparsities.get(name, 0.0)) for name in self.layers)

    def yardstick(
        self, model: nn.Module, example_inputs: Any, near_ms: float, pattern: str | Pattern = "1x1"
    ) -> Yardstick:
        """Measures pruned versions of `model` in this table's milliseconds, whatever the machine's pace is now.

        They take turns with that of the table's networks, all layers at one sparsity, whose time is nearest to
        `near_ms`; it is converted here. The number of threads is for the caller to set.
        """
        place = min(range(len(self.sparsities)), key=lambda i: abs(math.log(self.whole_ms[i] / near_ms)))
        weights = find_weights(model, tuple(self.layers))
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        return Yardstick(_uniform(model, weights, self.sparsities[place], pattern), args, self.whole_ms[place])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"format": _FORMAT, **asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON, beside and then renamed."""
        write_beside(path, (json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            FormatError: It holds no latency table, or a damaged one.
        """
        with open(path, "rb") as file:
            text = file.read()
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data.get("format") != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT!r}")
            return cls(
                sparsities=tuple(float(s) for s in data["sparsities"]),
                layers={
                    name: LayerLatency(tuple(int(n) for n in x["shape"]), tuple(float(t) for t in x["ms"]))
                    for name, x in data["layers"].items()
                },
                rest_ms=float(data["rest_ms"]),
                whole_ms=tuple(float(t) for t in data["whole_ms"]),
                dense_ms=float(data["dense_ms"]),
                dense_layout=str(data["dense_layout"]),
                threads=int(data["threads"]),
                input_shapes=tuple(tuple(int(n) for n in shape) for shape in data["input_shapes"]),
                machine=dict(data["machine"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FormatError(f"{os.fspath(path)} is no latency table: {type(error).__name__}: {error}") from None

    def __str__(self) -> str:
        width = max(6, *(len(name) for name in self.layers))
        head = f"{'layer':{width}}" + "".join(f"{s:>8.1%}" for s in self.sparsities)
        rows = [f"{name:{width}}" + "".join(f"{t:8.4f}" for t in x.ms) for name, x in self.layers.items()]
        predicted = (self.predict(dict.fromkeys(self.layers, s)) for s in self.sparsities)
        return "\n".join([
            head, *rows, f"{'rest':{width}}{self.rest_ms:8.4f}",
            f"{'sum':{width}}" + "".join(f"{t:8.4f}" for t in predicted),
            f"{'whole':{width}}" + "".join(f"{t:8.4f}" for t in self.whole_ms),
            "", f"milliseconds; dense torch {self.dense_ms:.3f} ({self.dense_layout}); "
            f"inputs {self.input_shapes}, {self.threads} thread(s), {self.machine.get('cpu', 'unknown CPU')}",
        ])  # fmt: skip


def pruned_count(sparsity: float, total: int) -> int:
    """How many of a layer's `total` weights to prune: `round(sparsity * total)`, but one weight is always kept."""
    return max(0, min(round(sparsity * total), total - 1))


def check_sparsities(sparsities: Sequence[float]) -> tuple[float, ...]:
    """The grid as floats. Raises `ValueError` unless it ascends within [0, 1)."""
    grid = tuple(float(s) for s in sparsities)
    if not grid or not all(0 <= s < 1 for s in grid) or any(b <= a for a, b in zip(grid, grid[1:], strict=False)):
        raise ValueError(f"sparsities must ascend within [0, 1), got {list(sparsities)}")
    return grid


def check_pattern(pattern: str | Pattern) -> None:
    """Raises `ValueError` for N:M, of which there is one sparsity only."""
    if isinstance(resolved := resolve_pattern(pattern), NofM):
        raise ValueError(
            f'pattern "{resolved.n}:{resolved.m}" has one sparsity only, {resolved.sparsity:g}: there is no choice to '
            "make between several"
        )


def input_shapes(args: tuple[Any, ...]) -> Shapes:
    """The shapes of the tensors among a call's arguments."""
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(args) if isinstance(leaf, Tensor))


def non_increasing(values: Sequence[float]) -> list[float]:
    """The nearest sequence (least squares) that never rises: neighbours that do are pooled (Ayer et al. 1955)."""
    pools: list[tuple[float, int]] = []  # mean, how many
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-1][0] > pools[-2][0]:
            (b, m), (a, n) = pools.pop(), pools.pop()
            pools.append(((a * n + b * m) / (n + m), n + m))
    return [mean for mean, count in pools for _ in range(count)]


def _uniform(
    model: nn.Module, weights: Sequence[PrunableWeight], sparsity: float, pattern: str | Pattern
) -> nn.Module:
    """A copy with each of these layers pruned by magnitude, on its own, to at least `sparsity`."""
    copied = plain_copy(model).cpu()
    amounts = {}
    for weight in weights:
        values = weight.values()
        amounts[weight.name] = max(pruned_count(sparsity, values.numel()), int((values == 0).sum()))
    return prune(copied, 0, pattern=pattern, include=tuple(amounts), amounts=amounts)


def _split(weights: Sequence[PrunableWeight], points: Sequence[Profile]) -> tuple[dict[str, LayerLatency], float]:
    """Each layer's times and the rest, so that both add up to the whole everywhere.

    The rest is that of the fastest point. A busy network pushes out of the caches what the call around it needs, so
    what that takes beyond is the layers' doing: each gets of it in proportion to its time.
    """
    times = {
        weight.layer: np.array(
            [sum(point.layers.get(name, 0.0) for name in dict.fromkeys(weight.names)) for point in points]
        )
        for weight in weights
    }
    times = {layer: ms for layer, ms in times.items() if ms.any()}
    if not times:
        raise ValueError("no layer that include and exclude select is in the model's native program")
    whole, inside = np.array([point.whole for point in points]), np.sum(list(times.values()), axis=0)
    rest = max(0.0, float((whole - inside)[whole.argmin()]))
    shapes = {weight.layer: tuple(weight.values().shape) for weight in weights}
    scaled = {layer: (ms * (whole - rest) / inside).tolist() for layer, ms in times.items()}
    return {layer: LayerLatency(shapes[layer], tuple(ms)) for layer, ms in scaled.items()}, rest


def progress_bar(total: int, label: str, progress: bool) -> Any:
    """A bar on stderr, gone when it is done; a log file gets few lines."""
    often = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, desc=label, leave=False, disable=not progress, mininterval=often)
