"""Taylor's criterion: how much the loss would change, to first order, if a unit were zero."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from .criteria import Criterion
from .masks import effective_weight, stored_parameter
from .patterns import Pattern, Slice
from .probing import undisturbed
from .selection import PrunableWeight, find_weights

__all__ = ["Taylor"]

_LINEAR = (nn.modules.conv._ConvNd, nn.Linear)  # layers whose output is linear in their weight


class Taylor(Criterion):
    """|sum of w * dL/dw over the unit|: the change of the loss if the unit were zero, to first order.

    For filters this is the paper's activation * gradient: the sum over one filter's weights equals the sum over its
    feature map (less the bias), which is taken for every example by itself before the absolute value, as effects of
    opposite sign on different examples would cancel otherwise. For every other pattern, single weights too, the
    absolute value is taken for each batch: use small ones. Any convolution or linear layer will do, and the model is
    run as it is: in evaluation mode, without touching `.grad`, BatchNorm's statistics or torch's random state.

    Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, 2017 (arXiv:1611.06440).

    Args:
        batches: yields (inputs, targets), or (input1, input2, ..., targets); a DataLoader or a list, since every call
            of `prune` runs through it (an iterator is used up by the first). Some hundreds of examples are enough.
        loss: `(outputs, targets) -> scalar`; cross entropy if None.
        normalize: divide the scores of each layer's slices (filters, channels, rows, columns) by their L2 norm before
            layers are ranked together. The paper does; networks with batch norm do better without (so found too by
            Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, arXiv:1906.10771).
        progress: show a bar.

    Raises:
        TypeError: `batches` is no iterable; from `prune`: a batch is no tuple of inputs and targets, or the loss no
            scalar tensor.
        ValueError: from `prune`: no batch at all, or a parameter that the loss does not depend on; under
            `torch.inference_mode()`.
        FloatingPointError: from `prune`: the loss is NaN or infinite; the message names the batch.

    Example:
        >>> prune(model, 0.3, criterion=Taylor(list(itertools.islice(loader, 10))), pattern="filter", include=nn.Conv2d)
    """

    def __init__(
        self, batches: Iterable[Any], loss: Callable[[Any, Any], Tensor] | None = None, *, normalize: bool = False,
        progress: bool = True,
    ) -> None:  # fmt: skip
        if isinstance(batches, (Tensor, str, Mapping, nn.Module)) or not isinstance(batches, Iterable):
            raise TypeError(f"batches must be an iterable of (inputs, targets), got {type(batches).__name__}")
        self.batches = batches
        self.loss = loss or F.cross_entropy
        self.normalize = normalize
        self.progress = progress

    def unit_scores(
        self, model: nn.Module, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor],
        patterns: Mapping[str, Pattern], generator: torch.Generator | None,
    ) -> Mapping[str, Tensor]:  # fmt: skip
        if torch.is_inference_mode_enabled():
            raise ValueError("Taylor takes gradients, which torch.inference_mode() forbids: call prune outside of it")
        units = self._run(model, weights, patterns)
        layers = {name for name, pattern in patterns.items() if self.normalize and isinstance(pattern, Slice)}
        return {name: F.normalize(score, dim=0) if name in layers else score for name, score in units.items()}

    def _run(
        self, model: nn.Module, weights: Mapping[str, Tensor], patterns: Mapping[str, Pattern]
    ) -> dict[str, Tensor]:
        """Sum of the units' contributions over all batches, (units,) float32 each."""
        parameters = {name.rpartition(".")[2] for name in weights}
        found = [w for w in find_weights(model, tuple(weights), parameters=parameters) if w.name in weights]
        totals: dict[str, Tensor] = {}
        number = 0
        with undisturbed(model):
            for weight in found:
                _require_gradients(weight)
            often = 0.2 if sys.stderr.isatty() else 30.0  # a log file wants few lines
            bar = tqdm(self.batches, desc="Taylor", disable=not self.progress, mininterval=often, leave=False)
            for number, batch in enumerate(bar, 1):
                for name, units in self._contributions(model, found, patterns, batch, number):
                    totals[name] = totals[name] + units if name in totals else units
        if not number:
            raise ValueError("batches is empty: it yielded no batch (pass a list or DataLoader, not a used iterator)")
        if missing := [weight.name for weight in found if weight.name not in totals]:
            raise ValueError(f"the loss does not depend on {', '.join(missing)} in any batch: exclude that")
        return totals

    def _contributions(
        self, model: nn.Module, found: list[PrunableWeight], patterns: Mapping[str, Pattern], batch: Any, number: int
    ) -> Iterator[tuple[str, Tensor]]:
        """What each unit adds to the loss of one batch: name, (units,) >= 0."""
        *inputs, targets = _unpack(batch, found[0].values().device)
        layers = {w.name: w.sites[0][0] for w in found if _by_output(w, patterns[w.name])}
        with torch.enable_grad(), parametrize.cached(), _outputs(layers) as outputs:
            value = _checked_loss(self.loss(model(*inputs), targets), number)
            sources = {w.name: outputs[w.name] if w.name in outputs else _tensors(w) for w in found}
            reached = [tensor for tensors in sources.values() for tensor in tensors if tensor.requires_grad]
            gradients = torch.autograd.grad(value, reached, allow_unused=True) if value.requires_grad else ()
        given = {id(t): g for t, g in zip(reached, gradients, strict=False) if g is not None}
        for weight in found:
            tensors = [tensor.detach() for tensor in sources[weight.name] if id(tensor) in given]
            slopes = [given[id(tensor)] for tensor in sources[weight.name] if id(tensor) in given]
            if not slopes:
                continue
            if weight.name in outputs:
                yield weight.name, _of_filters(layers[weight.name], tensors, slopes)
            else:
                slope = torch.stack([slope.float() for slope in slopes]).sum(0)
                yield weight.name, patterns[weight.name].reduce(weight.values().float() * slope).abs()


def _by_output(weight: PrunableWeight, pattern: Pattern) -> bool:
    """Whether a unit's contribution can be read off the layer's output."""
    (module, parameter), *tied = weight.sites
    filters = isinstance(pattern, Slice) and pattern.dim == 0
    return filters and isinstance(module, _LINEAR) and parameter == "weight" and not tied


@contextmanager
def _outputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """What each layer returns, call by call; a layer that is never called is not there."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, output: Tensor) -> Tensor:
        seen.setdefault(name, []).append(output)
        return output.clone()  # the next layer may work in place

    def hook_of(name: str) -> Callable[..., Tensor]:
        return lambda layer, args, output: note(name, output)

    hooks = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _of_filters(layer: nn.Module, outputs: list[Tensor], slopes: list[Tensor]) -> Tensor:
    """|output * gradient| summed over the map of each example, then over examples -> (filters,) float32."""
    bias = effective_weight(layer, "bias").float() if getattr(layer, "bias", None) is not None else None
    calls = []
    for output, slope in zip(outputs, slopes, strict=True):
        product, factor = output.float(), slope.float()
        if isinstance(layer, nn.Linear):  # (examples, ..., filters)
            product = (product if bias is None else product - bias) * factor
            calls.append(product.reshape(product.shape[0] if product.ndim > 1 else 1, -1, product.shape[-1]).sum(1))
        else:  # (examples, filters, ...), or without examples
            first = -len(layer.kernel_size) - 1  # type: ignore[arg-type]
            product, factor = (x.flatten(first + 1) for x in (product, factor))
            product = (product if bias is None else product - bias.unsqueeze(1)) * factor
            calls.append(product.sum(-1).reshape(-1, product.shape[-2]))
    if len({call.shape for call in calls}) == 1:  # a layer that is called more than once for the same examples
        calls = [torch.stack(calls).sum(0)]
    return torch.cat(calls).abs().sum(0)


def _require_gradients(weight: PrunableWeight) -> None:
    for module, parameter in weight.sites:
        stored = stored_parameter(module, parameter)
        for tensor in stored.parameters() if isinstance(stored, nn.Module) else [stored]:
            assert isinstance(tensor, Tensor)
            tensor.requires_grad_(True)


def _tensors(weight: PrunableWeight) -> list[Tensor]:
    """What gradients are taken of: a parameter, or what parametrizations make of it (cached for one forward)."""
    tensors: dict[int, Tensor] = {}
    for module, parameter in weight.sites:
        stored = stored_parameter(module, parameter)
        tensor = getattr(module, parameter) if parametrize.is_parametrized(module, parameter) else stored
        assert isinstance(tensor, Tensor)
        tensors[id(tensor)] = tensor
    return list(tensors.values())


def _unpack(batch: Any, device: torch.device) -> list[Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(f"batches must yield (inputs, targets), got {type(batch).__name__}")
    return [item.to(device) if isinstance(item, Tensor) else item for item in batch]


def _checked_loss(value: Any, number: int) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss must return a scalar tensor, got {got}")
    if not bool(torch.isfinite(value)):
        raise FloatingPointError(f"the loss of batch {number} is {value.item()}: look for NaN in weights and inputs")
    return value
