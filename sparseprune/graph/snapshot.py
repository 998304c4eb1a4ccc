"""A frozen copy of a module tree: effective weights, evaluation mode, no pruning hooks, no parametrizations.

`copy.deepcopy` fails on hooked models (a pruned `weight` is no leaf tensor) and copies every weight; this copies the
structure only. Unless asked to own them, tensors are shared with the model wherever it holds the effective value.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from ..errors import UnsupportedError

__all__ = ["snapshot"]


def snapshot(model: nn.Module, *, own: bool = False) -> nn.Module:
    """A structural copy of `model` in evaluation mode; nothing of `model` is written, neither flag nor tensor.

    A weight under a `torch.nn.utils.prune` hook becomes `apply_mask(weight_orig)` (the `weight` attribute is stale
    after an optimizer step), a parametrized one what its parametrization returns in evaluation mode. With `own` its
    tensors are copies too: what is written into the model later does not show in it.

    Raises:
        UnsupportedError: The model holds a TorchScript module.
    """
    with torch.no_grad():
        return _Copier(own).module(model)


class _Copier:
    def __init__(self, own: bool) -> None:
        self.own = own
        self.memo: dict[int, Any] = {}
        self.alive: list[Any] = []  # a memo by id is only sound while its keys live

    def module(self, module: nn.Module) -> nn.Module:
        if id(module) in self.memo:
            copied: nn.Module = self.memo[id(module)]
            return copied
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(f"{type(module).__name__} is TorchScript; pass the nn.Module it was made from")
        clone: nn.Module = object.__new__(type(module))
        self.remember(module, clone)
        # Through __dict__: Module.__setattr__ would want its dictionaries to exist.
        for key, value in module.__dict__.items():
            clone.__dict__[key] = self.value(value)
        clone.__dict__["training"] = False
        _apply_parametrizations(clone)
        _apply_pruning(clone)
        return clone

    def remember(self, original: Any, copied: Any) -> None:
        self.alive.append(original)
        self.memo[id(original)] = copied

    def value(self, value: Any) -> Any:
        """Any attribute: modules inside containers and bound methods follow; other objects are shared."""
        if isinstance(value, nn.Module):
            return self.module(value)
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.module(value.__self__))
        if type(value) in (dict, OrderedDict):
            mapping = type(value)()
            self.remember(value, mapping)
            mapping.update((key, self.value(item)) for key, item in value.items())
            return mapping
        if type(value) is list:
            items: list[Any] = []
            self.remember(value, items)
            items.extend(self.value(item) for item in value)
            return items
        return tuple(self.value(item) for item in value) if type(value) is tuple else value

    def tensor(self, tensor: Tensor) -> Tensor:
        """The same memory, or a copy if `own`; tied parameters stay one object."""
        if nn.parameter.is_lazy(tensor):
            raise UnsupportedError("the model holds uninitialized (lazy) parameters; run it once on an example first")
        detached = tensor.detach().clone() if self.own else tensor.detach()
        if isinstance(tensor, nn.Parameter):
            detached = nn.Parameter(detached, requires_grad=False)
        self.remember(tensor, detached)
        return detached


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    module.__dict__.pop(name, None)
    module._buffers.pop(name, None)
    module._parameters[name] = nn.Parameter(value.detach(), requires_grad=False)


def _apply_parametrizations(clone: nn.Module) -> None:
    lists = clone._modules.get("parametrizations")
    if lists is None or not nn.utils.parametrize.is_parametrized(clone):
        return
    # The copies are in evaluation mode already, so evaluating one (spectral_norm, say) updates no buffer.
    effective = {name: parametrization() for name, parametrization in lists.named_children()}
    del clone._modules["parametrizations"]
    # register_parametrization put a class with the properties in front of the module's own.
    clone.__class__ = type(clone).__bases__[0]
    for name, value in effective.items():
        _set_parameter(clone, name, value)


def _apply_pruning(clone: nn.Module) -> None:
    for key, hook in list(clone._forward_pre_hooks.items()):
        if isinstance(hook, BasePruningMethod):
            _set_parameter(clone, hook._tensor_name, hook.apply_mask(clone))  # type: ignore[no-untyped-call]
            del clone._forward_pre_hooks[key]
            clone._forward_pre_hooks_with_kwargs.pop(key, None)
