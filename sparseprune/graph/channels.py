"""Channels that need not be computed: removed, exactly.

An output channel without weights is a constant, act(bias) everywhere; what it becomes on its way is computed in
float64. A layer that reads it does not have to: the constant times its weights goes into the bias. Where zeros are
padded around the image that would be wrong at the border (of a constant that is not 0), so there all constant channels
become one. A channel that nobody reads then goes, with all that belongs to it: rows of the weights that make it,
columns of the weights that read it, its part of biases, slopes and constants.

Nothing else changes: in exact arithmetic the outputs are the same. In floating point, leaving out zeros is exact; a
bias that takes constants in, or a merged weight, is computed in float64 and rounded once. Inf and NaN times a pruned
weight are nothing, as everywhere in a program.

Runs after the other passes, on layers that have their batch norms, residuals and activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .constants import Constants, activation
from .flow import Flow, constant_axis, flows
from .ir import Graph, Node, Weight
from .passes import drop_dead

__all__ = ["remove_channels", "savings"]

_LAYERS = ("conv", "linear")
_BINARY = ("add", "sub", "mul", "div", "maximum", "minimum")

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


def remove_channels(graph: Graph) -> Graph:
    """The graph without channels that are constant or that nobody reads; inputs and outputs keep all of theirs."""
    flow = flows(graph)
    return _Removal(graph, flow, Constants(graph, flow)).run()


def savings(pairs: Sequence[tuple[Graph, Graph]]) -> tuple[str, ...]:
    """What `remove_channels` made of graphs, (before, after), as notes: one, or none."""
    counts = np.array([[_count(graph) for graph in pair] for pair in pairs], np.int64).reshape(-1, 2, 2)
    (channels, weights), (channels_left, weights_left) = counts.sum(0).tolist()
    if channels == channels_left and weights == weights_left:
        return ()
    return (f"removed {channels - channels_left:,} of {channels:,} channels and {weights - weights_left:,} of "
            f"{weights:,} weights: they are constant, or nobody reads them",)  # fmt: skip


def _count(graph: Graph) -> tuple[int, int]:
    """Channels that layers compute, and weights that are not zero; what layers share counts for each."""
    weights = [graph.weights[node.weight].dense for node in graph.nodes if node.weight is not None]
    return sum(len(dense) for dense in weights), sum(int(np.count_nonzero(dense != 0)) for dense in weights)


# ---- what is read, and what stays


class _Removal:
    """`live`: channels whose numbers somebody needs. `kept`: those that stay, also because others that belong to them
    do; a kept channel that is not live may hold any finite number."""

    def __init__(self, graph: Graph, flow: list[Flow], constants: Constants) -> None:
        self.graph, self.flow, self.layers = graph, flow, constants.layers
        self.first = len(graph.inputs)
        self.live: list[Bools] = [np.zeros(len(own), bool) for own in constants.values]
        self.weights, self.biases = dict(graph.weights), dict(graph.biases)
        self.made: dict[str, list[str]] = {}  # weights by what they were made of: layers may share one
        self.readers: list[list[int]] = [[] for _ in flow]
        for index, node in enumerate(graph.nodes):
            for value in node.inputs:
                self.readers[value].append(self.first + index)
        self.nodes: list[Node] = []
        self.number = {value: value for value in range(self.first)}  # of old values among the new

    def run(self) -> Graph:
        for value in reversed(range(len(self.flow))):
            self._read(value)
        self.kept = [live.copy() for live in self.live]
        for value, flow in enumerate(self.flow):
            if value < self.first or flow.rigid:
                self.kept[value][:] = True
            for other in flow.whole:
                self.kept[other][:] = True
        self.idle = {value for value in self.layers if self._is_idle(value)}
        self._tie()
        while any(self._needs_one(value) for value in reversed(range(len(self.flow)))):
            self._tie()
        return self._rebuilt()

    def _node(self, value: int) -> Node:
        return self.graph.nodes[value - self.first]

    def _read(self, value: int) -> None:
        """Marks what a value, whose own readers all have been, reads."""
        flow = self.flow[value]
        if value in self.graph.outputs or flow.rigid:
            self.live[value][:] = True
        live = self.live[value]
        if value in self.layers:
            reads = self.layers[value].reads
            x = self.live[self._node(value).inputs[0]]
            x |= (reads & live.reshape(*reads.shape[:2], 1)).any(1).reshape(-1) if len(x) == reads[:, 0].size else True
        for link in flow.links:
            if value not in self.layers or link.value in self._node(value).inputs[1:]:
                self.live[link.value][link.of[live[link.to]]] = True
        for other in flow.whole:
            self.live[other][:] = True

    def _tie(self) -> None:
        """Channels of linked values stay together; a value without any does not count, it may go as a whole."""
        before = -1
        while before != (before := sum(int(kept.sum()) for kept in self.kept)):
            places = range(self.first, len(self.flow))
            for value in chain(reversed(places), places):
                for link in self.flow[value].links if self.kept[value].any() else ():
                    kept = self.kept[value][link.to] | self.kept[link.value][link.of]
                    self.kept[value][link.to[kept]] = True
                    self.kept[link.value][link.of[kept]] = True

    def _needs_one(self, value: int) -> bool:
        """Gives a value that somebody reads, if only its size, a channel; concatenations do without."""
        if self.kept[value].any() or all(self._spares(reader, value) for reader in self.readers[value]):
            return False
        self.kept[value][0] = True
        return True

    def _spares(self, reader: int, value: int) -> bool:
        node = self._node(reader)
        aside = node.op == "concat" or (reader in self.idle and value not in node.inputs[1:])
        return aside or not self.kept[reader].any()

    def _is_idle(self, value: int) -> bool:
        """Whether a layer gives on its residual, plus a bias, and no more."""
        return len(self._node(value).inputs) > 1 and not self._used(value).any()

    def _used(self, value: int) -> Bools:
        """`(out, in / groups)`: where a layer's weight has to be what it is."""
        reads = self.layers[value].reads
        return reads.reshape(-1, reads.shape[2]) & self.live[value][:, None]

    # ---- the graph that is left

    def _rebuilt(self) -> Graph:
        for value in range(self.first, len(self.flow)):
            if self.kept[value].any():  # else concatenations, at most, read it
                self.number[value] = self._rebuild(self._node(value), value)
        outputs = tuple(self.number[value] for value in self.graph.outputs)
        graph = replace(self.graph, nodes=tuple(self.nodes), outputs=outputs, weights=self.weights, biases=self.biases)
        return drop_dead(graph)

    def _emit(self, node: Node) -> int:
        self.nodes.append(node)
        return self.first + len(self.nodes) - 1

    def _rebuild(self, node: Node, value: int) -> int:
        if value in self.layers:
            return self._idle_layer(node, value) if value in self.idle else self._layer(node, value)
        inputs = [self.number[item] for item in node.inputs if self.kept[item].any()]
        if node.op == "concat" and len(inputs) == 1:
            return inputs[0]
        rows = self.kept[value]
        if not self.flow[value].rigid:
            node = replace(node, attrs=self._attributes(node, value))
            if node.op in _BINARY and not rows.all():
                inputs = [self._operand(item, value) for item in node.inputs]
            if node.scale is not None and len(self.biases[node.scale]) == len(rows):
                node = replace(node, scale=self._array(self.biases[node.scale][rows]))
        return self._emit(replace(node, inputs=tuple(inputs)))

    def _attributes(self, node: Node, value: int) -> dict[str, Any]:
        """With the new sizes and places of channels, where they are written down."""
        attrs, width = node.attrs, int(self.kept[value].sum())
        if node.op in ("reshape", "expand") and attrs["shape"][1] > 0:
            return attrs | {"shape": [attrs["shape"][0], width, *attrs["shape"][2:]]}
        if node.op == "slice" and attrs["axis"] == 1:
            (link,) = self.flow[value].links
            start = int(self.kept[link.value][: link.of[0]].sum())
            return attrs | {"start": start, "end": start + width}
        return attrs

    def _operand(self, item: int, reader: int) -> int:
        """Of an operator of two operands: a constant loses the channels that its reader has lost."""
        held = self._node(item) if item >= self.first else None
        axis = None
        if held is not None and held.op == "constant":
            axis = constant_axis(held.attrs["shape"], self.flow[reader].rank or 0)
        if held is None or held.bias is None or axis is None:
            return self.number[item]
        rows = self.kept[reader]
        array = np.compress(rows, self.graph.biases[held.bias].reshape(held.attrs["shape"]), axis)
        return self._constant(held.name, array)

    def _constant(self, name: str, array: Floats) -> int:
        return self._emit(Node("constant", name, (), {"shape": list(array.shape)}, bias=self._array(array.reshape(-1))))

    def _layer(self, node: Node, value: int) -> int:
        layer, rows, used = self.layers[value], self.kept[value], self._used(value)
        inputs = tuple(self.number[item] for item in node.inputs)
        x, columns = self.kept[node.inputs[0]], np.ones(layer.shape[1], bool)
        if node.attrs.get("groups", 1) == 1:
            columns = x if len(x) == len(columns) else columns
        elif not self.flow[value].rigid:  # depthwise
            node = replace(node, attrs=node.attrs | {"groups": int(x.sum())})
        if layer.changed or not rows.all() or not columns.all() or used.sum() < layer.reads.sum():
            left = np.ix_(rows, columns)
            dense = layer.taps.reshape(*used.shape, -1)[left]
            dense[~used[left]] = 0
            node = replace(node, weight=self._weight(node, dense.reshape(*dense.shape[:2], *layer.shape[2:])))
        if layer.bias is not None and (layer.changed or not rows.all()):
            node = replace(node, bias=self._array(layer.bias[rows]))
        return self._emit(replace(node, inputs=inputs))

    def _idle_layer(self, node: Node, value: int) -> int:
        """act(residual + bias)"""
        residual, bias = self.number[node.inputs[1]], self.layers[value].bias
        act = activation(node)
        if bias is not None and (bias := bias[self.kept[value]]).any():
            held = self._constant(f"{node.name}.bias", bias.reshape(-1, *[1] * (len(self.layers[value].shape) - 2)))
            return self._emit(Node("add", node.name, (residual, held), act, broadcasts=True))
        return residual if node.act == "none" else self._emit(Node("act", node.name, (residual,), act))

    def _weight(self, node: Node, dense: Floats) -> str:
        """What layers that share a weight have left of it is shared where it is the same."""
        assert node.weight is not None
        names = self.made.setdefault(node.weight, [])
        for name in names:
            if np.array_equal(self.weights[name].dense, dense):
                return name
        names.append(f"left.w{len(self.weights)}")
        self.weights[names[-1]] = Weight(dense)
        return names[-1]

    def _array(self, values: Floats) -> str:
        name = f"left.b{len(self.biases)}"
        self.biases[name] = np.ascontiguousarray(values)
        return name
