"""The dense ways torch has of running a model, each at its best: what a converted model has to beat."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_map

__all__ = ["BASELINES", "MORE_BASELINES", "baseline", "plain_args", "plain_copy"]

BASELINES = ("eager", "channels_last", "compile", "compile_channels_last")
MORE_BASELINES = ("compile_max_autotune",)  # minutes to prepare


def baseline(name: str, dense: nn.Module, args: tuple[Tensor, ...]) -> Callable[[], Any]:
    """A call of the dense model in one of torch's ways, inputs prepared, compiled if that is the way."""
    if name.endswith("channels_last"):
        dense = copy.deepcopy(dense).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        args = tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in args)
    if not name.startswith("compile"):
        return lambda: dense(*args)
    from torch._inductor import config

    compiled = torch.compile(dense)
    with config.patch(
        freezing=True, max_autotune=name.endswith("max_autotune")
    ):  # freezing needs gradients off: benchmark() is in inference mode
        for _ in range(2):  # the first call compiles
            compiled(*args)
    return lambda: compiled(*args)


def plain_args(example_inputs: Any) -> tuple[Any, ...]:
    """A tuple of the arguments, none of them made under `torch.inference_mode()`: gradients can be followed."""
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    copied: tuple[Any, ...] = tree_map(lambda a: a.clone() if isinstance(a, Tensor) and a.is_inference() else a, args)
    return copied


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose pruning masks are folded into plain weights, as anybody would deploy it."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():  # `weight` under a hook is no leaf, which deepcopy refuses
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    result = copy.deepcopy(model, memo).eval()
    for module in list(result.modules()):
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
        if parametrize.is_parametrized(module):
            _own_class(module)
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return result.requires_grad_(False)


def _own_class(module: nn.Module) -> None:
    """A copied parametrized module shares its generated class: unparametrizing one would delete both's weight."""
    cls = type(module)
    names = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, names)
