"""How sparse a model is, by layer and as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .masks import iter_masked
from .selection import PrunableWeight, find_weights

__all__ = ["LayerSummary", "Summary", "summary"]

_COUNTED: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)  # fmt: skip


@dataclass(frozen=True)
class LayerSummary:
    """One parameter: `kept` of `total` weights, from its mask (`masked`) or from its non-zeros."""

    name: str
    parameter: str
    shape: tuple[int, ...]
    kept: int
    total: int
    masked: bool

    @property
    def density(self) -> float:
        return self.kept / self.total if self.total else 1.0

    @property
    def sparsity(self) -> float:
        return 1 - self.density

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "parameter": self.parameter, "shape": list(self.shape), "kept": self.kept,
            "total": self.total, "density": self.density, "sparsity": self.sparsity, "masked": self.masked,
        }  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """Every convolution and linear weight, and whatever else is masked; tied ones once. `str()` is a table."""

    layers: tuple[LayerSummary, ...]

    @property
    def kept(self) -> int:
        return sum(layer.kept for layer in self.layers)

    @property
    def total(self) -> int:
        return sum(layer.total for layer in self.layers)

    @property
    def density(self) -> float:
        return self.kept / self.total if self.total else 1.0

    @property
    def sparsity(self) -> float:
        return 1 - self.density

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "kept": self.kept, "total": self.total, "density": self.density, "sparsity": self.sparsity,
        }  # fmt: skip

    def __str__(self) -> str:
        rows = [("layer", "shape", "kept", "total", "sparsity", "")]
        for layer in self.layers:
            name = layer.name if layer.parameter == "weight" and layer.name else f"{layer.name}.{layer.parameter}"
            note = "pruned to nothing" if layer.total and not layer.kept else ""
            rows.append((name.lstrip("."), _shape(layer.shape), *_counts(layer), note))
        rows.append(("global", "", *_counts(self), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        align: list[Callable[[str, int], str]] = [str.ljust, str.ljust, str.rjust, str.rjust, str.rjust]
        lines = ["  ".join([*(align[i](row[i], widths[i]) for i in range(5)), row[5]]).rstrip() for row in rows]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def summary(model: nn.Module) -> Summary:
    """Count kept weights by layer and globally.

    A masked parameter counts by its mask, any other by its non-zeros. Listed are the weights of convolutions and
    linear layers, and every masked parameter.

    Args:
        model: any module.

    Returns:
        A `Summary` with `.layers`, `.kept`, `.total`, `.density`, `.sparsity`, `.to_dict()`; print it for a table.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> print(summary(model))
    """
    weights = find_weights(model, _COUNTED, required=False)
    seen = {(id(module), name) for weight in weights for module, name in weight.sites}
    for layer, module, name in iter_masked(model):
        if (id(module), name) not in seen:
            extra = find_weights(model, f"{layer}.{name}" if layer else name, parameters=name)
            weights += extra
            seen |= {(id(module), name) for weight in extra for module, name in weight.sites}
    return Summary(tuple(_summarize(weight) for weight in weights))


def _summarize(weight: PrunableWeight) -> LayerSummary:
    values, mask = weight.values(), weight.mask()
    kept = int((values != 0).sum()) if mask is None else int(mask.sum())
    return LayerSummary(weight.layer, weight.parameter, tuple(values.shape), kept, values.numel(), mask is not None)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _counts(item: LayerSummary | Summary) -> tuple[str, str, str]:
    return f"{item.kept:,}", f"{item.total:,}", f"{item.sparsity:.2%}"
