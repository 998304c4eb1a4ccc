"""`sensitivity`: what pruning one layer alone does to the accuracy, and to the milliseconds."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .dense import plain_copy
from .latency import SPARSITIES, LatencyTable, check_pattern, check_sparsities, progress_bar, pruned_count
from .module import write_beside
from .pruning import Criterion, Pattern, prune
from .pruning.criteria import ScoreFunction
from .pruning.selection import PrunableWeight, Selector, find_weights

__all__ = ["LayerSensitivity", "Sensitivity", "sensitivity"]


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer pruned alone, at each sparsity: `values` of `evaluate`, and `ms`, the layer's predicted milliseconds.

    `ms` is None without a latency table, or where the native program does not have the layer.
    """

    name: str
    shape: tuple[int, ...]
    values: tuple[float, ...]
    ms: tuple[float, ...] | None


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` found. `str()` is a table, `to_dict()` plain data, `plot(path)` a picture.

    Attributes:
        base: What `evaluate` gave for the model as it is.
        base_ms: Predicted milliseconds of the whole converted model as it is; None without a latency table.
        sparsities: Ascending.
        layers: In the model's order.
    """

    base: float
    base_ms: float | None
    sparsities: tuple[float, ...]
    layers: tuple[LayerSensitivity, ...]

    def errors(self) -> dict[str, dict[float, float]]:
        """For each layer and sparsity what `evaluate` lost, at least 0: for `autoprune`'s `errors`.

        Give `autoprune` these sparsities too: `autoprune(..., errors=s.errors(), sparsities=s.sparsities)`.
        """
        return {
            layer.name: {s: max(0.0, self.base - v) for s, v in zip(self.sparsities, layer.values, strict=True)}
            for layer in self.layers
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a value that is not finite becomes None."""
        data = asdict(self)
        for layer in data["layers"]:
            layer["values"] = [value if math.isfinite(value) else None for value in layer["values"]]
        return data | {"base": self.base if math.isfinite(self.base) else None}

    def to_json(self) -> str:
        """`to_dict()` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON, beside and then renamed."""
        write_beside(path, self.to_json().encode())

    def __str__(self) -> str:
        width = max(5, *(len(layer.name) for layer in self.layers))
        lines = [f"{'layer':{width}}" + "".join(f"{s:>9.1%}" for s in self.sparsities)]
        for layer in self.layers:
            lines.append(f"{layer.name:{width}}" + "".join(f"{value:9.4f}" for value in layer.values))
            if layer.ms is not None:
                lines.append(f"{'':{width - 2}}ms" + "".join(f"{ms:9.4f}" for ms in layer.ms))
        whole = "" if self.base_ms is None else f", {self.base_ms:.3f} ms predicted; ms: of the layer itself"
        return "\n".join([*lines, "", f"the model as it is: {self.base:.4f}{whole}"])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws `evaluate` against sparsity, a line for each layer; with times, against the milliseconds saved too.

        Needs matplotlib (`pip install 'sparseprune[plot]'`). The file's ending says its format: .png, .svg, .pdf.

        Raises:
            RuntimeError: matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            raise RuntimeError("plot needs matplotlib: pip install 'sparseprune[plot]'") from None
        timed = [layer for layer in self.layers if layer.ms is not None]
        figure = Figure(figsize=(7 * (1 + bool(timed)), 5), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 1 + bool(timed), squeeze=False, sharey=True)[0]
        places = [-math.log10(1 - s) for s in self.sparsities]  # what is left, by factors
        for index, layer in enumerate(self.layers):
            style: dict[str, Any] = {"color": f"C{index % 10}", "ls": ("-", "--", ":", "-.")[index // 10 % 4], "lw": 1}
            panels[0].plot(places, layer.values, label=layer.name, **style)
            if layer.ms is not None:
                panels[1].plot([layer.ms[0] - ms for ms in layer.ms], layer.values, **style)
        panels[0].set_xticks(places, [f"{100 * s:g}" for s in self.sparsities])
        panels[0].set(xlabel="zeros in this layer, %", ylabel="evaluate")
        if timed:
            panels[1].set(xlabel="ms saved in this layer")
        for panel in panels:
            panel.axhline(self.base, color="black", lw=0.8)
        figure.legend(fontsize=7, loc="outside right upper")
        target = Path(path)
        beside = target.with_name(f".{target.stem}.part{target.suffix}")
        try:
            figure.savefig(beside, dpi=120)
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


def sensitivity(
    model: nn.Module, evaluate: Callable[[nn.Module], float], *, sparsities: Sequence[float] = SPARSITIES,
    layers: Iterable[Selector] | Selector | None = None, example_inputs: Any = None, table: LatencyTable | None = None,
    criterion: str | Criterion | ScoreFunction | Mapping[str, Tensor] = "magnitude", pattern: str | Pattern = "1x1",
    seed: int = 0, progress: bool = True,
) -> Sensitivity:  # fmt: skip
    """Prune one layer at a time, on a copy, to each sparsity, and evaluate the copy.

    What each layer can give up, before anything is decided; with times also where it is worth while. Layers are pruned
    alone, so what several do together is not seen: `autoprune` with `batches` looks at that.

    Args:
        model: Any module; not changed. A layer that holds more zeros than a sparsity asks for keeps its own.
        evaluate: A copy of the model, in evaluation mode and without gradients -> a float, the greater the better;
            say `lambda m: sparseprune.evaluate(m, loader).accuracy`. To see accuracy without the shift that pruning
            gives to batch norms, let it recalibrate them first. It may change the copy.
        sparsities: Ascending, in [0, 1).
        layers: Layer types, names or globs, as `prune`'s `include`; None is every Conv2d and Linear.
        example_inputs: As for `convert`; to measure a latency table.
        table: A `LatencyTable` measured before, instead.
        criterion, pattern, seed: As in `prune`; N:M has one sparsity only and will not do.
        progress: Show a progress bar on stderr.

    Returns:
        A `Sensitivity`: print it, or `.plot("sensitivity.png")`.

    Raises:
        TypeError, ValueError: Arguments that do not fit, or `evaluate` returns no number.

    Example:
        >>> found = sensitivity(model, lambda m: evaluate(m, loader).accuracy, example_inputs=images[:1])
        >>> print(found)

    Li et al., Pruning Filters for Efficient ConvNets, 2016 (arXiv 1608.08710), section 3.2, for whole filters.
    """
    grid = check_sparsities(sparsities)
    check_pattern(pattern)
    if not callable(evaluate):
        raise TypeError(f"evaluate must be a function from a model to a float, got {type(evaluate).__name__}")
    include: Iterable[Selector] | Selector = (nn.Conv2d, nn.Linear) if layers is None else layers
    weights = find_weights(model, include)
    base = _number(evaluate(plain_copy(model)))  # first, as it may fail and measuring takes a while
    if table is None and example_inputs is not None:
        table = LatencyTable.measure(
            model, example_inputs, sparsities=grid, pattern=pattern, include=include, progress=progress
        )
    found = []
    with progress_bar(len(weights) * len(grid), "sensitivity", progress) as bar:
        for weight in weights:
            total, zeros = weight.values().numel(), int((weight.values() == 0).sum())
            counts = [max(zeros, pruned_count(sparsity, total)) for sparsity in grid]
            values = []
            for count in counts:
                bar.set_description(f"{weight.layer} {count / total:.1%}")
                amounts = {weight.name: count}
                twin = plain_copy(model)
                prune(twin, 0, criterion=criterion, pattern=pattern, include=weight.name, amounts=amounts, seed=seed)
                values.append(_number(evaluate(twin)) if count > zeros else base)
                bar.update()
            ms = None if table is None else _times(table, weight, [count / total for count in counts])
            found.append(LayerSensitivity(weight.layer, tuple(weight.values().shape), tuple(values), ms))
    return Sensitivity(base, None if table is None else _present_ms(model, table), grid, tuple(found))


def _number(value: object) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"evaluate must return a float, got {type(value).__name__}")
    return float(value)  # type: ignore[arg-type]


def _times(table: LatencyTable, weight: PrunableWeight, sparsities: Sequence[float]) -> tuple[float, ...] | None:
    layer = next((name for name in weight.names if name in table.layers), None)
    return None if layer is None else tuple(table.layer_ms(layer, sparsity) for sparsity in sparsities)


def _present_ms(model: nn.Module, table: LatencyTable) -> float:
    zeros = {}
    for weight in find_weights(model, tuple(table.layers)):
        share = float((weight.values() == 0).double().mean())
        zeros.update({layer: share for layer in weight.names if layer in table.layers})
    return table.predict(zeros)
