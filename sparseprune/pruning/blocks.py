"""Leaving out residual blocks: what stays of one is its shortcut."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["drop_residual_blocks"]

_SHORTCUTS = ("downsample", "shortcut", "skip", "projection")  # what such a module is usually called


def drop_residual_blocks(model: nn.Module, args: tuple[Any, ...], names: Iterable[str] | str) -> tuple[str, ...]:
    """Replace blocks of `model`, in place, by identity, or where shapes differ by the block's own shortcut module.

    Raises:
        ValueError: a name is no module, the example does not reach it, or it has no shortcut.
    """
    dropped = (names,) if isinstance(names, str) else tuple(names)
    modules = dict(model.named_modules())
    for name in dropped:
        if name not in modules or not name:
            raise ValueError(f"drop_blocks: {name!r} is no module of the model; it has {[n for n in modules if n][:8]}")
    if not dropped:
        return ()
    shapes: dict[str, tuple[Any, Any]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, given, output: shapes.__setitem__(name, (given, output))

    hooks = [modules[name].register_forward_hook(note(name)) for name in dropped]
    try:
        with torch.no_grad():
            model(*args)
    finally:
        for hook in hooks:
            hook.remove()
    for name in dropped:
        if name not in shapes:
            raise ValueError(f"drop_blocks: example_inputs do not reach {name!r}")
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).add_module(child, _shortcut(name, modules[name], *shapes[name]))
    return dropped


def _shortcut(name: str, block: nn.Module, given: Any, output: Any) -> nn.Module:
    if len(given) != 1 or not isinstance(given[0], Tensor) or not isinstance(output, Tensor):
        raise ValueError(f"drop_blocks: {name!r} has to take one tensor and to return one")
    (x,) = given
    if x.shape == output.shape:
        return nn.Identity()
    for own in _SHORTCUTS:
        shortcut = block._modules.get(own)
        if shortcut is not None:
            with torch.no_grad():
                if shortcut(x).shape == output.shape:
                    return shortcut
    raise ValueError(
        f"drop_blocks: {name!r} makes {tuple(output.shape)} of {tuple(x.shape)}, and has no module that does the same "
        f"for its shortcut (called {', '.join(_SHORTCUTS)}); only blocks that keep the shape can be left out"
    )
