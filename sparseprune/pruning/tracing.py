"""From a model and an example to its coupling, by `torch-pruning`'s dependency graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import UnsupportedError
from .coupling import OUTPUT, Coupling, Union, is_depthwise

__all__ = ["couple"]

Ints = NDArray[np.int64]

_CONVS = nn.modules.conv._ConvNd
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def couple(model: nn.Module, args: tuple[Any, ...]) -> Coupling:
    """Trace `model`, a private copy in evaluation mode, on an example. Its `requires_grad` flags change.

    Raises:
        ImportError: `torch-pruning` is not installed.
        UnsupportedError: the model fails on the example, or cannot be traced.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            f"compact needs torch-pruning: pip install 'sparseprune[compact]' or torch-pruning ({error})"
        ) from error
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    graph = torch_pruning.DependencyGraph()
    tracer = _Tracer(model, args)
    try:
        with torch.enable_grad():
            graph.build_dependency(model, None, forward_fn=tracer.run, verbose=False)
    except Exception as error:  # whatever the model's own code, or torch-pruning's, raises
        raise UnsupportedError(f"the model cannot be traced on example_inputs: {_named(error)}") from error
    finally:
        tracer.remove()
    return _Builder(graph, tracer).coupling


class _Tracer:
    """Runs the model with inputs and outputs that show in the trace, and counts the calls of its modules."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self.model, self.args = model, args
        self.inputs: set[Any] = set()  # gradient functions
        self.calls: dict[str, int] = {}
        self.hooks = [
            module.register_forward_hook(self._count(name))
            for name, module in model.named_modules()
            if isinstance(module, (_CONVS, nn.Linear, nn.PReLU, *_NORMS))
        ]

    def _count(self, name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            self.calls[name] = self.calls.get(name, 0) + 1

        return count

    def run(self, model: nn.Module, _: Any) -> list[Tensor]:
        outputs = tree_leaves(model(*tree_map(self._enter, self.args)))
        found = [y * 1 for y in outputs if isinstance(y, Tensor) and y.grad_fn is not None]
        if not found:
            raise UnsupportedError("no output is a floating point tensor that depends on the parameters")
        return found

    def _enter(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value.detach().clone()
        entered = value.detach().clone().requires_grad_() * 1
        self.inputs.add(entered.grad_fn)
        return entered

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


class _Index(NamedTuple):
    """What `torch-pruning`'s index mappings take: a channel, and the component it belongs to."""

    idx: int
    root_idx: int


class _Builder:
    """Follows the edges of the dependency graph, each with its index mapping, from every layer's output channels."""

    def __init__(self, graph: Any, tracer: _Tracer) -> None:
        self.graph, self.ops, self.tracer = graph, graph.ops.OPTYPE, tracer
        self.names = {module: name for name, module in tracer.model.named_modules()}
        layers = {name: tracer.model.get_submodule(name) for name in tracer.calls}
        layers = {n: m for n, m in layers.items() if isinstance(m, (_CONVS, nn.Linear)) and m in graph.module2node}
        self.coupling = Coupling(layers)
        self.same = Union()
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
        new = [_Index(channel, self.same.add()) for channel in range(width or 0) if channel not in own]
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

    def _enter(self, edge: Any, items: Iterable[Any]) -> list[_Index]:
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
                new.append(_Index(item.idx, item.root_idx))
        return new

    def _number(self) -> None:
        roots, numbers = np.unique(self.same.roots(), return_inverse=True)
        self.coupling.size = len(roots)
        for known in self.found.values():
            for channel, item in known.items():
                known[channel] = int(numbers[item])

    def _describe(self, node: Any) -> None:
        module, name = node.module, self.names.get(node.module, "")
        if node.type in (self.ops.SLICE, self.ops.SPLIT):
            self._balance_parts(node)
        if isinstance(module, (_CONVS, nn.Linear)):
            if name in self.coupling.layers:
                self._layer(node, name, module)
        elif isinstance(module, (*_NORMS, nn.PReLU)):
            if _width(module, False) is not None:
                self.coupling.norms[name] = self._components(node, False, _width(module, False))
            if self.tracer.calls.get(name, 0) > 1:
                self._block(node, f"{name} is used {self.tracer.calls[name]} times in one call")
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
            if self.tracer.calls.get(follower) == 1:
                own.followers[name] = follower

    def _rigid(self, name: str, layer: nn.Module) -> str | None:
        """Why a layer can lose neither inputs nor outputs."""
        if self.tracer.calls[name] > 1:
            return f"{name} is used {self.tracer.calls[name]} times in one call"
        if not isinstance(layer._parameters.get("weight"), nn.Parameter):
            return f"the weight of {name} is computed by a hook"
        own = {id(parameter) for parameter in layer._parameters.values() if parameter is not None}
        for other, module in self.tracer.model.named_modules():
            if module is not layer and own & {id(parameter) for parameter in module._parameters.values()}:
                return f"{name} shares a parameter with {other or 'the model itself'}"
        return None

    def _foreign(self, node: Any, name: str) -> str | None:
        """Why channels that meet such a node stay."""
        what = type(node.module).__name__
        if node.type == self.ops.OUTPUT:
            return OUTPUT
        if node.grad_fn in self.tracer.inputs:
            return "an input of the model meets it"
        if node.type == self.ops.PARAMETER:
            names = (n for n, p in self.tracer.model.named_parameters() if p is node.module)
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
            edges = [edge for edge in source.dependencies if edge.target is node and edge.index_mapping[0] is not None]
            if not edges or not width:
                continue
            if node.type == self.ops.SLICE:
                if node.module.step != 1:
                    self._block(source, "every second channel of it is picked, or so")
                    continue
                cuts = {node.module.start, min(node.module.end, width)}
            else:
                cuts = set(node.module.offsets)
            own = np.array([known.get(channel, -1) for channel in range(width)])
            parts = tuple(np.split(own, sorted(cut for cut in cuts if 0 < cut < width)))
            if len(parts) > 1:
                self.coupling.balanced.append(parts)

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


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
