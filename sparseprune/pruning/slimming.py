"""Network slimming: the scale that a batch norm gives a channel ranks the filter that makes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .criteria import Criterion
from .masks import effective_weight
from .patterns import Pattern, Slice
from .probing import undisturbed

__all__ = ["BNScale"]

_BatchNorm = nn.modules.batchnorm._BatchNorm


class BNScale(Criterion):
    """|gamma| of the batch norm that reads a layer's output ranks the layer's filters; with `pattern="filter"` only.

    Which batch norm that is, is found by running the model once: the one whose input is the very tensor that the layer
    returned. It means something only where training drove gammas to zero by an L1 penalty, as in the paper. The gammas
    themselves stay, and so does the constant that a pruned channel's batch norm puts out (`convert` folds it away).

    Liu et al., Learning Efficient Convolutional Networks through Network Slimming, 2017 (arXiv:1708.06519).

    Args:
        example_inputs: positional arguments of a typical call: a tensor or a tuple, on the model's device.

    Raises:
        ValueError: from `prune`: a layer without such a batch norm, or with several; another pattern.

    Example:
        >>> prune(model, 0.5, criterion=BNScale(images[:1]), pattern="filter", exclude=("fc",))
    """

    def __init__(self, example_inputs: Any) -> None:
        self.example_inputs = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)

    def unit_scores(
        self, model: nn.Module, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor],
        patterns: Mapping[str, Pattern], generator: torch.Generator | None,
    ) -> Mapping[str, Tensor]:  # fmt: skip
        for name, pattern in patterns.items():
            if not isinstance(pattern, Slice) or pattern.dim != 0:
                raise ValueError(f'BNScale ranks whole filters: pattern must be "filter", got {pattern!r} for {name}')
        layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in weights}
        norms = _norms_after(model, layers.values(), self.example_inputs)
        return {name: _scale(name, layer, norms.get(id(layer), [])) for name, layer in layers.items()}


def _scale(name: str, layer: nn.Module, norms: list[_BatchNorm]) -> Tensor:
    """|gamma| of the only one of `norms`, (filters,)."""
    if isinstance(layer, _BatchNorm):
        norms = [layer]
    if len(norms) != 1:
        raise ValueError(
            f"BNScale needs one BatchNorm that reads the output of {name}'s layer directly, found {len(norms)}: leave "
            "the layer out by include or exclude"
        )
    if norms[0].weight is None:
        raise ValueError(f"the BatchNorm after {name} has no scale (affine=False): leave the layer out by exclude")
    return effective_weight(norms[0], "weight").abs()


def _norms_after(
    model: nn.Module, layers: Iterable[nn.Module], example_inputs: tuple[Any, ...]
) -> dict[int, list[_BatchNorm]]:
    """id of a layer -> the batch norms that are called with the tensor it returned."""
    returned: list[tuple[Tensor, int]] = []  # holding the tensors, so that no id is given twice
    found: dict[int, list[_BatchNorm]] = {}

    def note(layer: nn.Module, args: Any, output: Any) -> None:
        returned.append((output, id(layer)))

    def match(norm: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        for tensor, layer in returned:
            if args and args[0] is tensor and not any(norm is known for known in found.setdefault(layer, [])):
                found[layer].append(norm)

    hooks: list[RemovableHandle] = [layer.register_forward_hook(note) for layer in layers]
    hooks += [m.register_forward_pre_hook(match) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        with undisturbed(model), torch.no_grad():
            model(*example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
