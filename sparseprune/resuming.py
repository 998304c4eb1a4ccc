"""What `finetune` keeps in `checkpoint_dir`: enough to go on, bit for bit, where an interruption stopped it."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .pruning.masks import get_mask, iter_masked, set_mask

__all__ = ["LAST", "load_training", "masked_names", "restore_model", "restore_rng", "rng_state", "save_training"]

LAST = "last.pt"  # in checkpoint_dir: the state after the last whole epoch
_VERSION = 1


def save_training(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state beside and rename it, so that an interruption leaves the one before."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            torch.save({"sparseprune": _VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load_training(path: Path) -> dict[str, Any] | None:
    """The state in a checkpoint directory, or None where there is none. Only tensors and plain data are unpickled.

    Raises:
        ValueError: the file is damaged or of another kind.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:
        raise ValueError(f"{path} cannot be read as a training checkpoint ({exc}); remove it to start again") from exc
    if not isinstance(state, dict) or state.get("sparseprune") != _VERSION:
        raise ValueError(f"{path} is no training checkpoint of this version; remove it to start again")
    return state


def masked_names(model: nn.Module) -> list[tuple[str, str]]:
    """(layer, parameter) of every mask."""
    return [(layer, name) for layer, _, name in iter_masked(model)]


def restore_model(model: nn.Module, state: Mapping[str, Any], masked: list[tuple[str, str]]) -> None:
    """Load a `state_dict` that was taken when these parameters had masks, into a model that may not have them yet.

    Raises:
        ValueError: it does not fit the model.
    """
    try:
        for layer, name in masked:
            module = model.get_submodule(layer)
            if get_mask(module, name) is None:
                key = f"{layer}.parametrizations.{name}.0.mask" if layer else f"parametrizations.{name}.0.mask"
                if key in state:
                    set_mask(module, state[key], name)
        model.load_state_dict(dict(state))
    except (RuntimeError, AttributeError, ValueError) as exc:
        raise ValueError(f"the checkpoint in checkpoint_dir does not fit the model: {exc}") from exc


def rng_state() -> dict[str, Any]:
    """Every random generator that training may draw from, as tensors and plain data."""
    numpy_state: Any = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": list(_listed(random.getstate())),
        "numpy": [numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """The generators as `rng_state` found them."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _listed(value: Any) -> list[Any]:
    return [list(each) if isinstance(each, tuple) else each for each in value]
