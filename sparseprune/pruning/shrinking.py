"""Taking components out of a model's layers, and their constants into those that read them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .coupling import Coupling, is_depthwise
from .layer_weights import get_taps, set_taps
from .removal_plan import Planner, flags_of

__all__ = ["shrink"]

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


def shrink(model: nn.Module, planner: Planner, removed: Bools) -> nn.Module:
    """Remove components from `model`, in place; its layers have the names that the coupling has."""
    coupling = planner.coupling
    for name in coupling.readers():
        _fold(model, planner, name, removed)
    for name in coupling.layers:
        _cut(model.get_submodule(name), _staying(coupling.out[name], removed), _staying(coupling.into[name], removed))
    for name, components in coupling.norms.items():
        stay = _staying(components, removed)
        if not stay.all():
            _cut_norm(model.get_submodule(name), torch.from_numpy(np.flatnonzero(stay)))
    return model


def _staying(components: Ints, removed: Bools) -> Bools:
    return ~flags_of(components, removed)


def _fold(model: nn.Module, planner: Planner, name: str, removed: Bools) -> None:
    """The constants that a layer reads and that go: into another constant channel, or into the bias."""
    coupling, constants = planner.coupling, planner.constants[name]
    stay = _staying(coupling.into[name], removed)
    leaving = np.flatnonzero(~stay & planner.reads(name, removed) & (constants != 0))
    if not len(leaving):
        return
    layer = model.get_submodule(name)
    taps, values = get_taps(layer), torch.from_numpy(constants)
    groups, outputs, inputs, _ = taps.shape
    if planner.padded[name]:
        telling = np.where(stay & ~np.isnan(constants), np.abs(constants), 0)
        stand_in = int(telling.argmax())
        shares = (values[leaving] / values[stand_in]).to(taps.device)
        merged = torch.einsum("oip,i->op", taps[0][:, leaving].double(), shares)
        taps = taps.clone()
        taps[0][:, stand_in] = (taps[0][:, stand_in].double() + merged).to(taps.dtype)
        set_taps(layer, taps)
        return
    sums = torch.zeros(groups, outputs, dtype=torch.float64, device=taps.device)
    for channel in leaving.tolist():
        group, place = divmod(channel, inputs)
        sums[group] += taps[group, :, place].double().sum(-1) * constants[channel]
    _shift(model, coupling, name, sums.reshape(-1))


def _shift(model: nn.Module, coupling: Coupling, name: str, sums: Tensor) -> None:
    """Add to a layer's output: in its bias, or where it has none in the mean of the batch norm that alone reads it."""
    layer = model.get_submodule(name)
    bias, follower = layer._parameters.get("bias"), coupling.followers.get(name)
    mean = None if follower is None else model.get_submodule(follower)._buffers.get("running_mean")
    with torch.no_grad():
        if bias is not None:
            bias.copy_((bias.double() + sums).to(bias.dtype))
        elif mean is not None:
            mean.copy_((mean.double() - sums).to(mean.dtype))
        else:
            weight = layer._parameters["weight"]
            assert weight is not None
            layer._parameters["bias"] = nn.Parameter(sums.to(weight.dtype), requires_grad=weight.requires_grad)


def _cut(layer: nn.Module, outputs: Bools, inputs: Bools) -> None:
    if outputs.all() and inputs.all():
        return
    taps = get_taps(layer)
    groups = len(taps)
    if is_depthwise(layer):
        taps = taps[torch.from_numpy(np.flatnonzero(outputs))]
    else:
        rows, columns = outputs.reshape(groups, -1), inputs.reshape(groups, -1)
        taps = torch.stack([
            own[torch.from_numpy(np.flatnonzero(rows[group]))][:, torch.from_numpy(np.flatnonzero(columns[group]))]
            for group, own in enumerate(taps)
        ])  # fmt: skip
    bias = layer._parameters.get("bias")
    set_taps(layer, taps)
    if bias is not None and not outputs.all():
        _select(layer, "bias", torch.from_numpy(np.flatnonzero(outputs)))


def _cut_norm(layer: nn.Module, stay: Tensor) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        _select(layer, name, stay)
    if isinstance(layer, nn.PReLU):
        layer.num_parameters = len(stay)
    else:
        layer.num_features = len(stay)  # type: ignore[assignment]


def _select(layer: nn.Module, name: str, stay: Tensor) -> None:
    parameter, buffer = layer._parameters.get(name), layer._buffers.get(name)
    if parameter is not None:
        chosen = parameter.detach()[stay.to(parameter.device)]
        layer._parameters[name] = nn.Parameter(chosen, requires_grad=parameter.requires_grad)
    elif buffer is not None:
        layer._buffers[name] = buffer[stay.to(buffer.device)]
