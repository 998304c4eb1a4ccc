"""State dicts of pruned models, in any of their dialects, as plain ones; and putting a plain one into any model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import FormatError
from .pruning.masks import effective_weight, iter_masked

__all__ = ["PlainEntry", "check_mapping", "install", "plain_entries", "unwrap"]

_NESTED = ("state_dict", "model_state_dict", "model", "net", "module")
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel and AveragedModel; torch.compile
_PARAMETRIZED = re.compile(r"^(?P<layer>(?:.*\.)?)parametrizations\.(?P<name>[^.]+)\.(?P<rest>.+)$")


@dataclass
class PlainEntry:
    """One tensor of a plain state dict, and the keys it comes from: values, and masks if it has any."""

    value: Tensor
    value_key: str
    mask_keys: list[str] = field(default_factory=list)


def unwrap(checkpoint: Mapping[str, Any], own: set[str]) -> dict[str, Any]:
    """Dig the state dict out of {"state_dict": ...} and the like, and strip `module.` where the model has none.

    `own` holds the plain names of the model it is for.
    """
    state: Mapping[str, Any] | None = checkpoint
    while state is not None:
        outer, state = state, next((state[key] for key in _NESTED if isinstance(state.get(key), Mapping)), None)
    result = {}
    for key, value in outer.items():
        if not isinstance(key, str):
            raise TypeError(f"state_dict must map names to tensors, got a key of type {type(key).__name__}")
        if key.rpartition(".")[2] != "_extra_state":  # whatever a layer keeps beside its tensors
            result[key] = value
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            names = [key for key in result if key != "n_averaged"]
            if names and all(k.startswith(prefix) for k in names) and not any(k.startswith(prefix) for k in own):
                result = {key[len(prefix) :]: result[key] for key in names}
                stripped = True
    return result


def plain_entries(state: Mapping[str, Any]) -> dict[str, PlainEntry]:
    """Fold `x_orig` with `x_mask`, and `parametrizations.x.original` with its masks, into plain `x`.

    Pruned entries become +0. A parametrization that is no mask (weight_norm) keeps its own keys.

    Raises:
        TypeError: an entry is no tensor.
        ValueError: a mask has another shape than its values, or two dialects name the same tensor.
    """
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"state_dict[{key!r}] must be a tensor, got {type(value).__name__}")
    used: set[str] = set()
    entries: dict[str, PlainEntry] = {}
    for key in state:
        folded = _hook_pair(key, state) or _masked_parametrization(key, state)
        if folded is not None:
            name, masks = folded
            if name in entries or name in state:
                raise ValueError(f"state_dict holds {name!r} twice, plain and with a mask ({key!r})")
            entries[name] = PlainEntry(_apply(key, masks, state), key, masks)
            used.update([key, *masks])
    for key, value in state.items():
        if key not in used:
            entries[key] = PlainEntry(value.detach(), key)
    return entries


def install(model: nn.Module, plain: Mapping[str, Tensor], source: str, *, exact: bool = False) -> None:
    """Load plain tensors into a model, plain or masked, all or nothing.

    Where the model has a mask, the mask becomes the non-zeros of the loaded tensor; elsewhere zeros stay plain.

    Raises:
        ValueError: names or shapes (with `exact`, dtypes too) differ; the message lists them.
    """
    state = model.state_dict()
    own = plain_entries({k: v for k, v in state.items() if isinstance(v, Tensor)})
    problems = [f"missing: {name}" for name in own if name not in plain and not _optional(name)]
    problems += [f"unexpected: {name}" for name in plain if name not in own]
    for name, tensor in plain.items():
        if name in own and tensor.shape != own[name].value.shape:
            have = tuple(own[name].value.shape)
            problems.append(f"shape of {name}: {source} has {tuple(tensor.shape)}, the model {have}")
        elif exact and name in own and tensor.dtype != own[name].value.dtype:
            problems.append(f"dtype of {name}: {source} has {tensor.dtype}, the model {own[name].value.dtype}")
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise ValueError(f"{source} does not fit the model:\n  " + "\n  ".join(problems[:20] + more))
    native: dict[str, Any] = dict(state)
    for name, tensor in plain.items():
        native[own[name].value_key] = tensor
        for key in own[name].mask_keys:
            native[key] = (tensor != 0).to(state[key].dtype)
    model.load_state_dict(native)
    for _, module, name in iter_masked(model):
        if f"{name}_orig" in module._parameters:  # the hook would refresh it only in the next forward
            setattr(module, name, effective_weight(module, name))


def _hook_pair(key: str, state: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """`torch.nn.utils.prune`: x_orig and x_mask."""
    name = key.removesuffix("_orig")
    return (name, [f"{name}_mask"]) if name != key and f"{name}_mask" in state else None


def _masked_parametrization(key: str, state: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """`parametrizations.x.original` if all that stands beside it are masks: of its shape, and of zeros and ones."""
    match = _PARAMETRIZED.match(key)
    if match is None or match["rest"] != "original":
        return None
    prefix = key.removesuffix("original")
    masks = [other for other in state if other.startswith(prefix) and other != key]
    if not masks or not all(_is_mask(state[mask], state[key]) for mask in masks):
        return None
    return match["layer"] + match["name"], masks


def _is_mask(mask: Tensor, values: Tensor) -> bool:
    return mask.shape == values.shape and (mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all()))


def _apply(key: str, masks: list[str], state: Mapping[str, Any]) -> Tensor:
    values: Tensor = state[key].detach()
    for mask_key in masks:
        mask = state[mask_key].detach().to(values.device)
        if mask.shape != values.shape:
            raise ValueError(f"{mask_key} has shape {tuple(mask.shape)}, but {key} has {tuple(values.shape)}")
        values = torch.where(mask != 0, values * mask.to(values.dtype), 0)
    return values


def _optional(name: str) -> bool:
    return name.rpartition(".")[2] == "num_batches_tracked"  # checkpoints older than torch 0.4.1 have none


def check_mapping(value: object) -> Mapping[str, Any]:
    """`value` as a mapping, or a clear error of what was passed or stored instead."""
    if isinstance(value, nn.Module):
        raise TypeError("state_dict must be a state dict or a path, got a module: pass module.state_dict()")
    if not isinstance(value, Mapping):
        raise FormatError(f"the checkpoint holds {type(value).__name__}, expected a state dict")
    return value
