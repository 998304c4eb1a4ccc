"""Whether a model still computes the same once channels are out: seen by running it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..dense import plain_copy
from .coupling import Coupling
from .layer_weights import get_taps, set_taps
from .removal_plan import Planner, flags_of
from .shrinking import shrink

__all__ = ["Outputs", "find_trouble", "outputs_of", "removal_trouble"]

Bools = NDArray[np.bool_]
Outputs = list[tuple[tuple[Any, ...], list[Tensor]]]

_TORCH = str(Path(torch.__file__).parent)


def outputs_of(model: nn.Module, args: tuple[Any, ...]) -> Outputs:
    """What a model makes of the example, and of noise like it (an example may be all zeros) if it takes that."""
    found = [(args, _run(model, args))]
    generator = torch.Generator().manual_seed(0)
    noise = tree_map(lambda a: _like(a, generator) if isinstance(a, Tensor) else a, args)
    try:
        found.append((noise, _run(model, noise)))
    except Exception:  # the model's own code may raise anything on what it was not made for
        pass
    return found


def find_trouble(model: nn.Module, expected: Outputs) -> str | None:
    """How `model` fails to compute what is expected, within rounding (the square root of epsilon); None: it does."""
    for args, outputs in expected:
        try:
            found = _run(model, args)
        except Exception as error:  # the model's own code may raise anything
            return _told(error)
        for y, want in zip(found, outputs, strict=True):
            if y.shape != want.shape:
                return f"an output has shape {tuple(y.shape)} instead of {tuple(want.shape)}"
            if (difference := _difference(y, want)) is not None:
                return f"an output differs by {difference:.3g}, its largest value is {float(want.abs().max()):.3g}"
    return None


def removal_trouble(model: nn.Module, args: tuple[Any, ...], coupling: Coupling, removed: Bools) -> str | None:
    """What goes wrong when components go that nobody reads: their columns are zeroed for that. Copies `model`."""
    zeroed = plain_copy(model)
    for name in coupling.readers():
        layer = zeroed.get_submodule(name)
        gone = flags_of(coupling.into[name], removed)
        taps = get_taps(layer).clone()
        taps[torch.from_numpy(gone.reshape(len(taps), 1, -1, 1)).expand_as(taps)] = 0
        set_taps(layer, taps)
    expected = outputs_of(zeroed, args)
    own = replace(coupling, layers={name: zeroed.get_submodule(name) for name in coupling.layers})
    unknown = {name: np.full(len(ids), np.nan) for name, ids in coupling.into.items()}
    return find_trouble(shrink(zeroed, Planner(own, unknown), removed), expected)


def _run(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        outputs = model(*tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, args))
    return [y for y in tree_leaves(outputs) if isinstance(y, Tensor)]


def _like(x: Tensor, generator: torch.Generator) -> Tensor:
    if not x.is_floating_point() or not x.numel():
        return x
    values = x.double().cpu()
    spread = float(values.std(correction=0)) or 1.0
    return (torch.randn(x.shape, generator=generator, dtype=torch.float64) * spread + values.mean()).to(x)


def _difference(y: Tensor, want: Tensor) -> float | None:
    """The largest difference, if it is more than rounding."""
    if not want.is_floating_point() or not want.numel():
        return None if torch.equal(y, want) else float((y != want).sum())
    allowed = torch.finfo(want.dtype).eps ** 0.5 * float(want.abs().nan_to_num(0, 0, 0).max())
    if torch.allclose(y, want, rtol=0, atol=allowed + torch.finfo(want.dtype).tiny, equal_nan=True):
        return None
    return float((y - want).abs().max())


def _told(error: BaseException) -> str:
    """An error, and the line of the model's own code that raised it."""
    frames: Iterator[traceback.FrameSummary] = reversed(traceback.extract_tb(error.__traceback__))
    where = next((f for f in frames if not f.filename.startswith((_TORCH, str(Path(__file__).parent)))), None)
    why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return why if where is None else f"{Path(where.filename).name}, line {where.lineno}: `{where.line}`: {why}"
