"""Which channels can only go together, and which cannot go at all.

A *component* is a set of channels tied to each other: a filter, its batch norm, the filters of other layers that are
added to it, and the columns of all weights that read it. Components are numbered; -1 is a channel of none (a channel of
the model's input, say).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .tracing import Index, Trace, trace

__all__ = ["OUTPUT", "Coupling", "couple", "is_depthwise"]

Ints = NDArray[np.int64]

_CONVS = nn.modules.conv._ConvNd
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
OUTPUT = "it is an output of the model"


@dataclass(eq=False)
class Coupling:
    """The components of a model.

    Attributes:
        layers: Convolutions and linear layers that the example reaches, by name, in the order of their first call.
        out: The component of each output channel of a layer.
        into: The component of each input channel of a layer; a depthwise layer's are those of its output.
        norms: The components of the channels of batch norms, instance norms and PReLUs.
        followers: The batch norm that alone reads a layer's output, where there is one.
        balanced: Parts of a tensor from which as many channels have to go, in proportion: `(components, ...)`.
        blocked: Why a component has to stay.
        foreign: Components whose values also come from something else than layers; they are never constants.
    """

    layers: dict[str, nn.Module]
    out: dict[str, Ints] = field(default_factory=dict)
    into: dict[str, Ints] = field(default_factory=dict)
    norms: dict[str, Ints] = field(default_factory=dict)
    followers: dict[str, str] = field(default_factory=dict)
    balanced: list[tuple[Ints, ...]] = field(default_factory=list)
    blocked: dict[int, str] = field(default_factory=dict)
    foreign: set[int] = field(default_factory=set)
    size: int = 0

    def readers(self) -> list[str]:
        """Layers that end a component: their input channels are not their output channels."""
        return [name for name, layer in self.layers.items() if not is_depthwise(layer)]

    def coupled(self, layer: str) -> list[str]:
        """The other layers whose filters go together with those of `layer`."""
        own = self.out[layer][self.out[layer] >= 0]
        return [name for name in self.layers if name != layer and np.isin(self.out[name], own).any()]

    def groups(self) -> list[Ints]:
        """Components that share a layer's output, or have to be balanced: those to be tried together."""
        joined = _Union(self.size)
        for parts in [*((own,) for own in self.out.values()), *self.balanced]:
            members = np.concatenate(parts)
            for component in members[members >= 0].tolist():
                joined.join(int(members[members >= 0][0]), component)
        roots = joined.roots()
        return [np.flatnonzero(roots == root) for root in dict.fromkeys(roots.tolist())]


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each output channel reads the input channel of its own number, and no other."""
    return isinstance(layer, _CONVS) and layer.groups == layer.in_channels == layer.out_channels > 1


def couple(model: nn.Module, args: tuple[Any, ...]) -> Coupling:
    """Follow the channels of `model`, a private copy in evaluation mode, on an example.

    Its `requires_grad` flags change.

    Raises:
        ImportError: `torch-pruning` is not installed.
        UnsupportedError: the model fails on the example, or cannot be traced.
    """
    return _Builder(model, trace(model, args)).coupling


class _Union:
    """Which of some numbers are the same."""

    def __init__(self, size: int = 0) -> None:
        self.parents = list(range(size))

    def add(self) -> int:
        self.parents.append(len(self.parents))
        return self.parents[-1]

    def find(self, item: int) -> int:
        while self.parents[item] != item:
            self.parents[item] = self.parents[self.parents[item]]
            item = self.parents[item]
        return item

    def join(self, one: int, other: int) -> None:
        one, other = self.find(one), self.find(other)
        self.parents[max(one, other)] = min(one, other)

    def roots(self) -> Ints:
        return np.array([self.find(item) for item in range(len(self.parents))], np.int64)


class _Builder:
    """Follows the edges of the dependency graph, each with its index mapping, from every layer's output channels."""

    def __init__(self, model: nn.Module, found: Trace) -> None:
        self.model, self.graph, self.inputs, self.calls = model, found.graph, found.inputs, found.calls
        graph, self.cuts = self.graph, found.cuts
        self.ops = graph.ops.OPTYPE
        self.names = {module: name for name, module in model.named_modules()}
        self.owners: dict[int, list[nn.Module]] = {}  # by the id of a parameter
        for module in self.names:
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append(module)
        layers = {name: model.get_submodule(name) for name in self.calls}
        layers = {n: m for n, m in layers.items() if isinstance(m, (_CONVS, nn.Linear)) and m in graph.module2node}
        self.coupling = Coupling(layers)
        self.same = _Union()
        self.found: dict[tuple[Any, bool], dict[int, int]] = {}  # (node, input side) -> channel -> component
        for layer in layers.values():
            self._follow(layer)
        self._number()
        for node in graph.module2node.values():
            self._describe(node)

    def _follow(self, layer: nn.Module) -> None:
        node = self.graph.module2node[layer]
        own = self.found.setdefault((node, False), {})
        width = _width(layer, False)
        new = [Index(channel, self.same.add()) for channel in range(width or 0) if channel not in own]
        own.update(new)
        stack = [(node, self.graph.get_pruner_of_module(layer).prune_out_channels, new)]
        while stack:
            node, handler, items = stack.pop()
            for edge in node.dependencies:
                if edge.is_triggered_by(handler):
                    mapped: Sequence[Any] = items
                    for mapping in edge.index_mapping:
                        mapped = mapped if mapping is None else mapping(mapped)
                    if new := self._enter(edge, mapped):
                        stack.append((edge.target, edge.handler, new))

    def _enter(self, edge: Any, items: Iterable[Any]) -> list[Index]:
        """Note the channels at the end of an edge; those that were not known yet."""
        pruner = self.graph.get_pruner_of_module(edge.target.module)
        reads = edge.handler == pruner.prune_in_channels != pruner.prune_out_channels
        known = self.found.setdefault((edge.target, reads), {})
        new = []
        for item in items:
            if item.idx in known:
                self.same.join(known[item.idx], item.root_idx)
            else:
                known[item.idx] = item.root_idx
                new.append(Index(item.idx, item.root_idx))
        return new

    def _number(self) -> None:
        roots, numbers = np.unique(self.same.roots(), return_inverse=True)
        self.coupling.size = len(roots)
        for known in self.found.values():
            for channel, item in known.items():
                known[channel] = int(numbers[item])

    def _describe(self, node: Any) -> None:
        module, name = node.module, self.names.get(node.module, "")
        if node in self.cuts:
            self._balance_parts(node)
        if isinstance(module, (_CONVS, nn.Linear)):
            if name in self.coupling.layers:
                self._layer(node, name, module)
        elif isinstance(module, (*_NORMS, nn.PReLU)):
            if _width(module, False) is not None:
                self.coupling.norms[name] = self._components(node, False, _width(module, False))
            if self.calls.get(name, 0) > 1:
                self._block(node, f"{name} is used {self.calls[name]} times in one call")
        elif reason := self._foreign(node, name):
            self._block(node, reason)
            if node.type != self.ops.OUTPUT:
                for reads in (False, True):
                    self.coupling.foreign |= set(self.found.get((node, reads), {}).values())

    def _layer(self, node: Any, name: str, layer: nn.Module) -> None:
        reason = self._rigid(name, layer)
        own = self.coupling
        own.out[name] = self._components(node, False, _width(layer, False))
        own.into[name] = own.out[name]
        if node.type == self.ops.DEPTHWISE_CONV and not is_depthwise(layer):
            reason = reason or f"{name} reads several channels a group, and makes one of them"
            own.into[name] = np.full(_width(layer, True) or 0, -1)
        elif not is_depthwise(layer):
            own.into[name] = self._components(node, True, _width(layer, True))
        if reason is not None:
            self._block(node, reason)
        groups = int(getattr(layer, "groups", 1))
        if groups > 1 and not is_depthwise(layer) and reason is None:
            own.balanced += [tuple(np.split(side, groups)) for side in (own.out[name], own.into[name])]
        if [follower.type for follower in node.outputs] == [self.ops.BN]:
            follower = self.names[node.outputs[0].module]
            if self.calls.get(follower) == 1:
                own.followers[name] = follower

    def _rigid(self, name: str, layer: nn.Module) -> str | None:
        """Why a layer can lose neither inputs nor outputs."""
        if self.calls[name] > 1:
            return f"{name} is used {self.calls[name]} times in one call"
        if not isinstance(layer._parameters.get("weight"), nn.Parameter):
            return f"the weight of {name} is computed by a hook"
        for parameter in layer._parameters.values():
            for other in self.owners.get(id(parameter), []):
                if other is not layer:
                    return f"{name} shares a parameter with {self.names[other] or 'the model itself'}"
        return None

    def _foreign(self, node: Any, name: str) -> str | None:
        """Why channels that meet such a node stay."""
        what = type(node.module).__name__
        if node.type == self.ops.OUTPUT:
            return OUTPUT
        if node.grad_fn in self.inputs:
            return "an input of the model meets it"
        if node.type == self.ops.PARAMETER:
            names = (n for n, p in self.model.named_parameters() if p is node.module)
            return f"the parameter {next(names, '?')} meets it outside of a layer that is known"
        if node.type in (self.ops.LN, self.ops.GN):
            return f"{name}, a {what}, computes over all channels"
        if node.type in (self.ops.EMBED, self.ops.LSTM, self.ops.MHA, self.ops.CUSTOMIZED):
            return f"{name}, a {what}, keeps its size"
        return None

    def _balance_parts(self, node: Any) -> None:
        """A tensor cut at a share of its channels (a half, say) has to lose as many on either side."""
        for source in node.inputs:
            known = self.found.get((source, False), {})
            width = max(known, default=-1) + 1
            own = np.array([known.get(channel, -1) for channel in range(width)])
            parts = tuple(np.split(own, [cut for cut in self.cuts[node] if 0 < cut < width]))
            if len(parts) > 1:
                self.coupling.balanced.append(parts)
            if node.type == self.ops.SLICE and node.module.step != 1:
                self._block(source, "a slice with a step picks some of its channels")

    def _components(self, node: Any, reads: bool, width: int | None) -> Ints:
        known = self.found.get((node, reads), {})
        result = np.full(width or 0, -1, np.int64)
        for channel, component in known.items():
            if channel >= len(result):
                reason = f"torch-pruning cannot follow it to {self.names[node.module]}"
                for other in known.values():
                    self.coupling.blocked.setdefault(other, reason)
            else:
                result[channel] = component
        return result

    def _block(self, node: Any, reason: str) -> None:
        for reads in (False, True):
            for component in self.found.get((node, reads), {}).values():
                if reason == OUTPUT or component not in self.coupling.blocked:
                    self.coupling.blocked[component] = reason


def _width(module: nn.Module, reads: bool) -> int | None:
    """How many channels a module has, None where it knows of none."""
    if isinstance(module, _CONVS):
        return module.in_channels if reads else module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features if reads else module.out_features
    if isinstance(module, nn.PReLU):
        return module.num_parameters if module.num_parameters > 1 else None
    return int(module.num_features) if isinstance(module, _NORMS) else None
