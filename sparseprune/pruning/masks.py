"""Masks: which weights of a parameter are kept, held by a parametrization so that nothing can revive the others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

__all__ = [
    "Mask", "effective_weight", "get_mask", "has_only_masks", "iter_masked", "remove_mask", "set_mask",
    "stored_parameter",
]  # fmt: skip


class Mask(nn.Module):
    """A `torch.nn.utils.parametrize` parametrization that shows a weight as zero wherever its mask is False.

    The layer computes with `where(mask, weight, 0)`, so gradients of pruned weights are exactly zero and neither
    momentum, weight decay, a deepcopy nor an averaged copy of the model can bring one back. The mask is a bool
    buffer: it moves with `.to()`, is never cast by `.half()`, and is saved as `parametrizations.<name>.0.mask`.

    `torch.optim.swa_utils.AveragedModel(use_buffers=True)` with its *default* average subtracts buffers, which torch
    refuses for bool; leave `use_buffers` off or pass `multi_avg_fn=get_ema_multi_avg_fn()`, which both work.

    Args:
        mask: bool tensor of the weight's shape; True = kept.

    Raises:
        TypeError: `mask` is not a bool tensor.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> parametrize.register_parametrization(layer, "weight", Mask(torch.eye(2, dtype=torch.bool)))
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        _check_bool(mask)
        self.register_buffer("mask", mask.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        kept, total = int(self.mask.sum()), self.mask.numel()
        return f"shape={tuple(self.mask.shape)}, kept={kept}, sparsity={1 - kept / max(total, 1):.4f}"


def get_mask(module: nn.Module, name: str = "weight") -> Tensor | None:
    """The mask of one parameter of `module`: a bool tensor of its shape, True = kept, or None if it has none.

    Masks of `torch.nn.utils.prune` count as well. The tensor is a copy.

    Example:
        >>> get_mask(model.conv1)
    """
    if _is_hooked(module, name):
        return _buffer(module, f"{name}_mask") != 0
    found = _masks(module, name)
    if not found:
        return None
    mask = found[0].mask.clone()
    for other in found[1:]:
        mask &= other.mask
    return mask


def set_mask(module: nn.Module, mask: Tensor, name: str = "weight", *, holder: Mask | None = None) -> Mask:
    """Give one parameter of `module` this mask, in place of any it has, and zero the pruned values.

    A parameter pruned by `torch.nn.utils.prune` is taken over: its hook goes, its `weight_orig` becomes the weight
    again (the same Parameter object, so optimizers stay valid).

    Args:
        module: the layer.
        mask: bool tensor of the parameter's shape; True = kept.
        name: the parameter's name.
        holder: share this `Mask` instead of making one; for tied parameters.

    Raises:
        TypeError: `mask` is not bool.
        ValueError: its shape is not the parameter's.

    Example:
        >>> set_mask(model.fc, model.fc.weight.abs() > 0.01)
    """
    _check_bool(mask)
    if _is_hooked(module, name):
        _unhook(module, name)
    weight = effective_weight(module, name)
    if mask.shape != weight.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {name}'s shape {tuple(weight.shape)}")
    mask = mask.detach().to(weight.device)
    found = _masks(module, name)
    if found:
        for each in found:
            each.mask.copy_(mask)
    else:
        holder = Mask(mask) if holder is None else holder
        holder.mask.copy_(mask)
        _own_class(module)
        parametrize.register_parametrization(module, name, holder)
        found = [holder]
    stored = stored_parameter(module, name)
    if isinstance(stored, Tensor) and has_only_masks(module, name):
        with torch.no_grad():
            stored.masked_fill_(~mask, 0)
    return found[0]


def remove_mask(module: nn.Module, name: str = "weight") -> None:
    """Bake the mask of one parameter: it becomes a plain Parameter again, with zeros where it was pruned.

    Does nothing without a mask. Other parametrizations on the same parameter (weight_norm, say) are baked with it.

    Example:
        >>> remove_mask(model.conv1)
    """
    if _is_hooked(module, name):
        _unhook(module, name)
    elif _masks(module, name):
        _own_class(module)
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def effective_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """The values the layer computes with, detached: pruned ones are exactly +0.

    Under a `torch.nn.utils.prune` hook `module.weight` is stale after an optimizer step, so it is recomputed from
    `weight_orig` and `weight_mask`.
    """
    if _is_hooked(module, name):
        orig, mask = _parameter(module, f"{name}_orig").detach(), _buffer(module, f"{name}_mask")
        return torch.where(mask != 0, orig * mask.to(orig.dtype), 0)
    with torch.no_grad():
        value = getattr(module, name)
    if not isinstance(value, Tensor):
        raise TypeError(f"{type(module).__name__}.{name} is {type(value).__name__}, expected a tensor")
    return value.detach()


def stored_parameter(module: nn.Module, name: str) -> object:
    """The object that training updates: equal for two layers exactly when they are tied. None if there is none."""
    if _is_hooked(module, name):
        return _parameter(module, f"{name}_orig")
    if parametrize.is_parametrized(module, name):
        parametrizations = _parametrization_list(module, name)
        return parametrizations.original if parametrizations.is_tensor else parametrizations
    return module._parameters.get(name)


def iter_masked(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every masked parameter of `model` as (layer name, layer, parameter name); `torch.nn.utils.prune`'s too."""
    for layer, module in list(model.named_modules()):
        names = [key[: -len("_orig")] for key in module._parameters if key.endswith("_orig")]
        names = [name for name in names if _is_hooked(module, name)]
        if parametrize.is_parametrized(module):
            parametrizations = module.parametrizations
            assert isinstance(parametrizations, nn.ModuleDict)
            names += [name for name in parametrizations if _masks(module, name)]
        for name in names:
            yield layer, module, name


def has_only_masks(module: nn.Module, name: str) -> bool:
    """Whether nothing but masks parametrizes a parameter that is parametrized."""
    return len(_masks(module, name)) == len(_parametrization_list(module, name))


def _check_bool(mask: object) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True = kept), got {got}")


def _is_hooked(module: nn.Module, name: str) -> bool:
    return f"{name}_orig" in module._parameters and f"{name}_mask" in module._buffers


def _unhook(module: nn.Module, name: str) -> None:
    pruned = _buffer(module, f"{name}_mask") == 0
    torch_prune.remove(module, name)  # type: ignore[no-untyped-call]
    with torch.no_grad():  # orig * mask leaves -0.0, or NaN where a pruned weight had overflowed
        _parameter(module, name).masked_fill_(pruned, 0)


def _own_class(module: nn.Module) -> None:
    """Part a parametrized layer's class from its deepcopies'.

    torch puts the property `weight` on a class that it makes per layer but that a deepcopy shares, so that changing the
    parametrizations of a copy would break the original.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        own = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, own)


def _parametrization_list(module: nn.Module, name: str) -> parametrize.ParametrizationList:
    assert isinstance(module.parametrizations, nn.ModuleDict)
    found = module.parametrizations[name]
    assert isinstance(found, parametrize.ParametrizationList)
    return found


def _masks(module: nn.Module, name: str) -> list[Mask]:
    if not parametrize.is_parametrized(module, name):
        return []
    return [each for each in _parametrization_list(module, name) if isinstance(each, Mask)]


def _parameter(module: nn.Module, name: str) -> Tensor:
    value = module._parameters[name]
    assert value is not None
    return value


def _buffer(module: nn.Module, name: str) -> Tensor:
    value = module._buffers[name]
    assert value is not None
    return value
