"""How sparse a model is, by layer and as a whole, and what its layers compute and weigh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..tables import aligned
from .masks import iter_masked
from .selection import PrunableWeight, find_weights

__all__ = ["LayerSummary", "Summary", "summary"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_COUNTED: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)


@dataclass(frozen=True)
class LayerSummary:
    """One parameter.

    Attributes:
        name: The layer.
        parameter: Its parameter.
        shape: Of the parameter.
        kept: Kept weights, by the mask (`masked`) or else by the non-zeros.
        total: All weights.
        masked: Whether there is a mask.
        filters: Output channels of a convolution or linear layer, else None.
        zero_filters: Those of them that keep no weight, else None.
        macs: Multiply-adds that the layer's calls take on the example, when dense; None where not asked for.
        kept_macs: Those of kept weights alone.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    kept: int
    total: int
    masked: bool
    filters: int | None = None
    zero_filters: int | None = None
    macs: int | None = None
    kept_macs: int | None = None

    @property
    def density(self) -> float:
        return self.kept / self.total if self.total else 1.0

    @property
    def sparsity(self) -> float:
        return 1 - self.density

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "shape": list(self.shape), "density": self.density, "sparsity": self.sparsity}


@dataclass(frozen=True)
class Summary:
    """Every convolution and linear weight, and whatever else is masked; tied ones once. `str()` is a table.

    Attributes:
        layers: One for each parameter.
        file_bytes: The size of the file that `save_weights` would write; None where not asked for.
        dense_bytes: The size of the same file when nothing is zero.
    """

    layers: tuple[LayerSummary, ...]
    file_bytes: int | None = None
    dense_bytes: int | None = None

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

    @property
    def filters(self) -> int:
        return sum(layer.filters or 0 for layer in self.layers)

    @property
    def zero_filters(self) -> int:
        return sum(layer.zero_filters or 0 for layer in self.layers)

    @property
    def macs(self) -> int | None:
        return _total([layer.macs for layer in self.layers])

    @property
    def kept_macs(self) -> int | None:
        return _total([layer.kept_macs for layer in self.layers])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "kept": self.kept, "total": self.total, "density": self.density, "sparsity": self.sparsity,
            "filters": self.filters, "zero_filters": self.zero_filters, "macs": self.macs, "kept_macs": self.kept_macs,
            "file_bytes": self.file_bytes, "dense_bytes": self.dense_bytes,
        }  # fmt: skip

    def __str__(self) -> str:
        with_macs = self.macs is not None
        rows = [["layer", "shape", "kept", "total", "sparsity", "zero filters", *(["MACs", "kept"] * with_macs), ""]]
        for layer in self.layers:
            name = layer.name if layer.parameter == "weight" and layer.name else f"{layer.name}.{layer.parameter}"
            note = "pruned to nothing" if layer.total and not layer.kept else ""
            rows.append([name.lstrip("."), "x".join(map(str, layer.shape)), *_counts(layer, with_macs), note])
        rows.append(["global", "", *_counts(self, with_macs), ""])
        lines = aligned(rows, "<<>>>>" + ">>" * with_macs + "<")
        rule = "-" * len(lines[0])
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        if self.file_bytes is not None:
            lines.append(f"file: {self.file_bytes:,} bytes, {self.dense_bytes:,} if nothing were zero")
        return "\n".join(lines)


def summary(model: nn.Module, example_inputs: Any = None, *, file_size: bool = False) -> Summary:
    """Count kept weights by layer and globally.

    A masked parameter counts by its mask, any other by its non-zeros. Listed are the weights of convolutions and
    linear layers, and every masked parameter.

    Args:
        model: any module.
        example_inputs: the positional arguments of a call, a tensor or a tuple, to count multiply-adds: the model is
            run on them, in evaluation mode. The count is for the whole batch; each weight counts at every place of the
            output, at padded borders too. None: they are not counted.
        file_size: also say how many bytes `save_weights` would write.

    Returns:
        A `Summary` with `.layers`, `.kept`, `.total`, `.density`, `.sparsity`, `.zero_filters`, `.macs`, `.to_dict()`;
        print it for a table.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> print(summary(model, torch.randn(1, 3, 224, 224), file_size=True))
    """
    weights = find_weights(model, _COUNTED, required=False)
    seen = {(id(module), name) for weight in weights for module, name in weight.sites}
    for layer, module, name in iter_masked(model):
        if (id(module), name) not in seen:
            extra = find_weights(model, f"{layer}.{name}" if layer else name, parameters=name)
            weights += extra
            seen |= {(id(module), name) for weight in extra for module, name in weight.sites}
    places = None if example_inputs is None else _places(model, example_inputs)
    layers = tuple(_summarize(weight, places) for weight in weights)
    if not file_size:
        return Summary(layers)
    from ..files import weights_size

    return Summary(layers, weights_size(model), weights_size(model, dense=True))


def _summarize(weight: PrunableWeight, places: dict[int, int] | None) -> LayerSummary:
    values, mask = weight.values(), weight.mask()
    keeps = values != 0 if mask is None else mask
    kept, total, shape = int(keeps.sum()), values.numel(), tuple(values.shape)
    layers = [module for module, name in weight.sites if isinstance(module, _COUNTED) and name == "weight"]
    if not layers:
        return LayerSummary(weight.layer, weight.parameter, shape, kept, total, mask is not None)
    filters, used = shape[0], keeps.flatten(1).any(1)
    if isinstance(layers[0], _TRANSPOSED):  # (in, out / groups, ...)
        groups = layers[0].groups
        filters, used = groups * shape[1], keeps.reshape(groups, shape[0] // groups, shape[1], -1).any(3).any(1)
    calls = None if places is None else sum(places.get(id(layer), 0) for layer in layers)
    return LayerSummary(
        weight.layer, weight.parameter, shape, kept, total, mask is not None, filters, filters - int(used.sum()),
        None if calls is None else calls * total, None if calls is None else calls * kept,
    )  # fmt: skip


def _places(model: nn.Module, example_inputs: Any) -> dict[int, int]:
    """How often each layer's weights are applied in a call, by the layer's id."""
    found: dict[int, int] = {}

    def count(layer: Any, given: Any, keywords: Any, output: Tensor) -> None:
        x = given[0] if given else keywords["input"]
        if isinstance(layer, nn.Linear):
            uses = output.numel() // max(layer.out_features, 1)
        else:
            uses = x.numel() // layer.in_channels if layer.transposed else output.numel() // layer.out_channels
        found[id(layer)] = found.get(id(layer), 0) + uses

    layers = [layer for layer in model.modules() if isinstance(layer, _COUNTED)]
    hooks = [layer.register_forward_hook(count, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad(), _evaluating(model):
            model(*(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _total(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _counts(item: LayerSummary | Summary, with_macs: bool) -> list[str]:
    zero = "" if item.zero_filters is None else f"{item.zero_filters:,} of {item.filters:,}"
    macs = ["" if count is None else f"{count:,}" for count in (item.macs, item.kept_macs)]
    return [f"{item.kept:,}", f"{item.total:,}", f"{item.sparsity:.2%}", zero, *(macs if with_macs else [])]
