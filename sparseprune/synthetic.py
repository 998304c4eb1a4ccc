"""Networks to measure without training them: random zeros, and activations of an ordinary scale all the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LAYERS", "fit_batch_norm", "fit_scale", "prune_uniform"]

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
          nn.Linear)  # fmt: skip
_OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


def prune_uniform(model: nn.Module, sparsity: float, seed: int = 0, exclude: Sequence[str] | None = None) -> nn.Module:
    """Write plain zeros at random into every convolution and linear layer, the same share in each; for benchmarks.

    Of each layer's weights exactly `round(sparsity * count)` become zero. The first convolution and depthwise ones are
    left alone (few weights, most to lose), as in Gale et al., *The State of Sparsity*, 2019 (arXiv 1902.09574).

    Args:
        model: Changed in place, and returned.
        sparsity: Share of zeros, `0 <= sparsity < 1`.
        seed: Seed of a generator of its own: the same model and seed give the same zeros.
        exclude: Qualified names of layers left alone instead of the first convolution.

    Raises:
        ValueError: `sparsity` out of range, a name in `exclude` that is no layer, or a layer that has a mask already.

    Example:
        >>> layer = prune_uniform(nn.Sequential(nn.Linear(10, 10)), 0.9)
        >>> int((layer[0].weight != 0).sum())
        10
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} is not in [0, 1)")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    if exclude is None:
        exclude = [name for name, module in layers.items() if not isinstance(module, nn.Linear)][:1]
    for name in exclude:
        if name not in layers:
            raise ValueError(f"exclude: {name!r} is not a convolution or linear layer of the model")
    generator = torch.Generator().manual_seed(seed)
    for name, module in layers.items():
        depthwise = not isinstance(module, nn.Linear) and module.groups == module.in_channels > 1
        if name in exclude or depthwise:
            continue
        if "weight" not in module._parameters:
            raise ValueError(f"{name}: the weight has a mask or parametrization already; call finalize(model) first")
        weight = module.weight
        zeros = torch.randperm(weight.numel(), generator=generator)[: round(sparsity * weight.numel())]
        with torch.no_grad():
            weight.view(-1)[zeros.to(weight.device)] = 0
    return model


def fit_scale(model: nn.Module, inputs: Sequence[Tensor], seed: int = 0) -> nn.Module:
    """Give a network's activations an ordinary scale, whatever zeros were written into it.

    Batch norms get statistics that fit (`fit_batch_norm`). A network without any norm gets every convolution and linear
    layer divided by the standard deviation of its output instead, first to last, as in Mishkin, Matas, *All You Need
    Is a Good Init*, 2015 (arXiv 1511.06422).

    Args:
        model: Changed in place (modes are put back), and returned.
        inputs: Tensors that give shape and dtype; normal random ones with a batch of at least 8 are used.
        seed: Seed of those inputs.
    """
    modules = list(model.modules())
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
        return fit_batch_norm(model, inputs, seed)
    if any(isinstance(module, _OTHER_NORMS) for module in modules):
        return model
    layers = [module for module in modules if isinstance(module, LAYERS) and "weight" in module._parameters]
    modes = {module: module.training for module in modules}
    hooks = [layer.register_forward_hook(_divide) for layer in layers]
    model.eval()
    try:
        with torch.no_grad():
            model(*_samples(inputs, seed))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return model


def _divide(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A forward hook: the layer's parameters, and this output, divided by the output's standard deviation."""
    scale = output.std()
    if not 0 < scale < torch.inf:
        return output
    for parameter in layer._parameters.values():
        if parameter is not None:
            parameter.div_(scale)
    return output / scale


def _samples(inputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(max(8, x.shape[0]), *x.shape[1:], dtype=x.dtype, generator=generator) for x in inputs]


def fit_batch_norm(model: nn.Module, inputs: Sequence[Tensor], seed: int = 0) -> nn.Module:
    """Give every batch norm the statistics of random inputs, so that activations have an ordinary scale.

    Without it a fresh network with 95 % zeros lets its signal die away layer by layer (the statistics are those of no
    data at all), and comparing outputs says nothing.

    Args:
        model: Changed in place (statistics only; modes are put back), and returned.
        inputs: Tensors that give shape and dtype; normal random ones with a batch of at least 8 are used.
        seed: Seed of those inputs.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return model
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the calls
            norm.train()
        with torch.no_grad():
            model(*_samples(inputs, seed))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
    return model
