"""Which channels are constants, and layers that do not read these any more.

A channel without weights is act(bias). Through everything that computes channel by channel a constant stays one; how
much it is then, the reference says. Where a layer reads it, the constant times its weights goes into the bias; where
zeros are padded around the image that would be wrong at the border, unless it is 0, so there the largest constant
channel stands for all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .flow import Flow, Link, constant_axis
from .ir import Graph, Input, Node
from .reference import run_reference

__all__ = ["Constants", "Layer", "activation"]

_LAYERS = ("conv", "linear")
_BINARY = ("add", "sub", "mul", "div", "maximum", "minimum")

Bools = NDArray[np.bool_]
Doubles = NDArray[np.float64]


class Layer:
    """A conv or linear that reads no constants any more.

    `taps`, `(groups, out / groups, in / groups, places)`, is the weight; `reads`, without places, where it is to be
    taken for what it is: elsewhere it is zero.
    """

    def __init__(self, graph: Graph, node: Node) -> None:
        assert node.weight is not None
        dense = graph.weights[node.weight].dense
        groups = int(node.attrs.get("groups", 1))
        self.shape = dense.shape
        self.taps = dense.reshape(groups, dense.shape[0] // groups, dense.shape[1], -1)
        self.reads: Bools = np.zeros(self.taps.shape[:3], bool)
        for place in range(self.taps.shape[3]):  # much faster than any(3)
            self.reads |= self.taps[..., place] != 0
        self.bias = None if node.bias is None else graph.biases[node.bias]
        self.padded = any(node.attrs.get("padding", ()))
        self.changed = False

    def take_in(self, constants: Doubles) -> None:
        """Without the channels whose constants are known, NaN where they are not."""
        constants = constants.reshape(self.taps.shape[0], -1)
        known = np.isfinite(constants) & self.reads.any(1)
        if self.padded:
            self._merge(constants[0], known[0] & (constants[0] != 0))
            known &= constants == 0
        self.changed |= bool(known.any())
        group, channel = np.nonzero(known & (constants != 0))
        if len(group):
            bias = np.zeros(self.shape[0]) if self.bias is None else self.bias.astype(np.float64)
            sums = self.taps[group, :, channel].sum(-1, dtype=np.float64) * constants[group, channel, None]
            np.add.at(bias.reshape(self.taps.shape[:2]), group, sums)
            self.bias = bias.astype(np.float32)
        self.reads &= ~known[:, None]

    def _merge(self, constants: Doubles, several: Bools) -> None:
        """The largest of some constant channels for all of them."""
        if len(self.taps) > 1 or several.sum() < 2:
            return
        self.taps, self.changed = self.taps.copy(), True
        (places,) = np.nonzero(several)
        largest = places[np.abs(constants[places]).argmax()]
        weights = self.taps[0][:, places].astype(np.float64)
        merged = np.einsum("oit,i->ot", weights, constants[places] / constants[largest]).astype(np.float32)
        self.reads[0][:, places] = False
        self.taps[0][:, largest], self.reads[0][:, largest] = merged, merged.any(1)


class Constants:
    """Of each value, float64: what each channel is, at every place of the image; NaN where it is no constant."""

    def __init__(self, graph: Graph, flow: list[Flow]) -> None:
        self.graph, self.flow = graph, flow
        self.first = len(graph.inputs)
        self.values: list[Doubles] = [self._unknown(value) for value in range(self.first)]
        self.layers: dict[int, Layer] = {}  # by value
        for node in graph.nodes:
            self.values.append(
                self._of(node) if flow[len(self.values)].width is not None else self._unknown(len(self.values))
            )
            own = self.values[-1]
            own[~np.isfinite(own)] = np.nan

    def _unknown(self, value: int) -> Doubles:
        width = self.flow[value].width
        return np.full(1 if width is None else width, np.nan)

    def _of(self, node: Node) -> Doubles:
        value = len(self.values)
        if node.op in _LAYERS:
            return self._of_layer(node, value)
        if self.flow[value].rigid:
            return self._unknown(value)
        if node.op in _BINARY:
            return self._of_binary(node, value)
        moved = self._moved(self.flow[value].links, value)
        if node.op in ("act", "prelu"):
            return self._computed(node, moved)
        known: float | None = None  # the one constant that stays what it is
        if node.op == "pad" and node.attrs["mode"] == "constant":
            known = node.attrs["value"]
        if (node.op == "avg_pool" and _uneven(node)) or (node.op == "reduce" and node.attrs["kind"] == "sum"):
            known = 0
        return moved if known is None else np.where(moved == known, moved, np.nan)

    def _of_layer(self, node: Node, value: int) -> Doubles:
        layer = self.layers[value] = Layer(self.graph, node)
        if self.flow[node.inputs[0]].width is not None:
            layer.take_in(self.values[node.inputs[0]])
        constants = np.zeros(layer.shape[0]) if layer.bias is None else layer.bias.astype(np.float64)
        for other in node.inputs[1:]:
            constants = constants + (self.values[other] if self.flow[other].width is not None else np.nan)
        constants = np.where(layer.reads.any(2).reshape(-1), np.nan, constants)
        return self._computed(Node("act", node.name, (0,), activation(node)), constants)

    def _of_binary(self, node: Node, value: int) -> Doubles:
        width = len(self._unknown(value))
        linked = {link.value: link for link in self.flow[value].links}
        operands: list[Doubles] = []
        for item in node.inputs:
            held = self.graph.nodes[item - self.first] if item >= self.first else None
            if item in linked:
                operands.append(self.values[item])
            elif held is not None and held.op == "constant":
                operands.append(np.broadcast_to(self._held(held, value), width))
            else:
                operands.append(self._unknown(value))
        if node.op == "mul":  # 0 times anything
            a, b = operands
            operands = [np.where((b == 0) & np.isnan(a), 0, a), np.where((a == 0) & np.isnan(b), 0, b)]
        return self._computed(node, *operands)

    def _held(self, node: Node, reader: int) -> Doubles:
        """The numbers of a constant by the channel that they meet; NaN where these are several."""
        assert node.bias is not None
        shape = node.attrs["shape"]
        axis = constant_axis(shape, self.flow[reader].rank or 0)
        array = self.graph.biases[node.bias].astype(np.float64).reshape(shape)
        rows = array.reshape(1, -1) if axis is None else np.moveaxis(array, axis, 0).reshape(shape[axis], -1)
        return np.where((rows == rows[:, :1]).all(1), rows[:, 0], np.nan)

    def _moved(self, links: tuple[Link, ...], value: int) -> Doubles:
        """What comes from several channels is a constant where they agree."""
        low, high = np.full_like(self._unknown(value), np.inf), np.full_like(self._unknown(value), -np.inf)
        with np.errstate(invalid="ignore"):  # NaN stays NaN
            for link in links:
                np.minimum.at(low, link.to, self.values[link.value][link.of])
                np.maximum.at(high, link.to, self.values[link.value][link.of])
        return np.where(low == high, low, np.nan)

    def _computed(self, node: Node, *operands: Doubles) -> Doubles:
        """By the reference, on one image of one place."""
        unknown: Bools = np.logical_or.reduce([np.isnan(x) for x in operands])
        if unknown.all():
            return np.full(unknown.shape, np.nan)
        inputs = tuple(Input(f"x{i}", (1, len(unknown))) for i in range(len(operands)))
        node = replace(node, inputs=tuple(range(len(operands))))
        single = Graph(inputs, (node,), (len(operands),), {"kind": "tensor"}, {}, self.graph.biases)
        (result,) = run_reference(single, [np.where(unknown, 0, x)[None] for x in operands])
        return np.where(unknown, np.nan, result[0].numpy())


def activation(node: Node) -> dict[str, Any]:
    """The attributes that say which."""
    return {key: value for key, value in node.attrs.items() if key in ("act", "alpha", "beta")}


def _uneven(node: Node) -> bool:
    """Whether an average is not of elements of the image alone."""
    return bool(node.attrs["divisor"]) or (any(node.attrs["padding"]) and bool(node.attrs["count_include_pad"]))
