"""From the graph as the model wrote it to the graph as it runs: fold batch norm and padding, fuse residuals and
activations.

Every fusion is "a node absorbs its producer": the merged node takes the reader's place, so all it reads is there
already, and the producer, which nobody else reads, goes. Numbers of values do not change until `drop_dead`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ir import Graph, Node, Weight

__all__ = ["drop_dead", "fold_padding", "fold_scales", "fuse_activations", "fuse_residuals", "optimize"]

_MATRIX_OPS = ("conv", "linear")
_ARITHMETIC = ("add", "sub", "mul", "div", "maximum", "minimum")


def optimize(graph: Graph) -> Graph:
    """All passes in order; the result has bytes (`Graph.to_bytes`)."""
    graph = drop_dead(graph)
    for step in (fold_scales, fold_padding, fuse_residuals, fuse_activations):
        graph = drop_dead(step(graph))  # each step counts readers: none may be dead
    return graph


class _Editor:
    """A graph's nodes with holes, and who reads what."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.first = len(graph.inputs)
        self.nodes: list[Node | None] = list(graph.nodes)
        self.before: dict[int, list[tuple[int, Node]]] = {}  # nodes to insert and their values, by what they go before
        self.inserted = 0
        self.weights, self.biases = dict(graph.weights), dict(graph.biases)
        self.readers = [0] * (self.first + len(graph.nodes))
        for value in [*graph.outputs, *(value for node in graph.nodes for value in node.inputs)]:
            self.readers[value] += 1

    def each(self, *ops: str) -> Iterator[tuple[int, Node]]:
        for index in range(len(self.nodes)):
            if (node := self.nodes[index]) is not None and node.op in ops:
                yield index, node

    def sole_producer(self, value: int) -> Node | None:
        """The node that computes `value`, if exactly one node reads it, once."""
        return self.nodes[value - self.first] if value >= self.first and self.readers[value] == 1 else None

    def absorb(self, index: int, value: int, merged: Node) -> None:
        # Reads move with the merge: what the producer read, the merged node reads. So the other counts stay right.
        self.nodes[value - self.first] = None
        self.readers[value] = 0
        self.nodes[index] = merged

    def add_weight(self, dense: NDArray[np.float32]) -> str:
        name = f"folded.w{len(self.weights)}"
        self.weights[name] = Weight(dense)
        return name

    def add_bias(self, values: NDArray[np.float32]) -> str:
        name = f"folded.b{len(self.biases)}"
        self.biases[name] = values
        return name

    def insert(self, index: int, node: Node) -> int:
        """A new node before the one at `index`; the number of its value is negative until `finish`."""
        self.inserted += 1
        self.before.setdefault(index, []).append((-self.inserted, node))
        return -self.inserted

    def finish(self) -> Graph:
        """Holes become nodes that nobody reads, which `drop_dead` takes out."""
        number = {value: value for value in range(self.first)}
        nodes: list[Node] = []
        for index, (old, node) in enumerate(zip(self.graph.nodes, self.nodes, strict=True)):
            own = self.first + index, old if node is None else node
            for value, new in [*self.before.get(index, ()), own]:
                number[value] = self.first + len(nodes)
                nodes.append(replace(new, inputs=tuple(number[item] for item in new.inputs)))
        outputs = tuple(number[value] for value in self.graph.outputs)
        return replace(self.graph, nodes=tuple(nodes), outputs=outputs, weights=self.weights, biases=self.biases)


def fold_scales(graph: Graph) -> Graph:
    """Every `scale_shift` goes into the conv or linear before it, or becomes a depthwise conv, or `mul` and `add`."""
    editor = _Editor(graph)
    for index, node in editor.each("scale_shift"):
        before = editor.sole_producer(node.inputs[0])
        if before is not None and before.op == "scale_shift":
            gain, shift = _affine(node)
            first_gain, first_shift = _affine(before)
            merged = replace(node, inputs=before.inputs, gain=gain * first_gain, shift=gain * first_shift + shift)
            editor.absorb(index, node.inputs[0], merged)
    for index, node in editor.each("scale_shift"):
        before = editor.sole_producer(node.inputs[0])
        if before is not None and before.op in _MATRIX_OPS and before.act == "none" and len(before.inputs) == 1:
            editor.absorb(index, node.inputs[0], _folded(editor, before, node))
        elif node.attrs["dims"]:
            editor.nodes[index] = _depthwise(editor, node)
        else:
            editor.nodes[index] = _multiply_add(editor, index, node)
    return editor.finish()


def _affine(node: Node) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    assert node.gain is not None and node.shift is not None
    return node.gain, node.shift


def _folded(editor: _Editor, layer: Node, scale_shift: Node) -> Node:
    """(w·x + b)·gain + shift, in float64, rounded once; zeros stay zeros."""
    gain, shift = _affine(scale_shift)
    assert layer.weight is not None
    dense = editor.weights[layer.weight].dense
    weight = dense.astype(np.float64) * gain.reshape(-1, *[1] * (dense.ndim - 1))
    bias = shift if layer.bias is None else editor.biases[layer.bias].astype(np.float64) * gain + shift
    return replace(layer, weight=editor.add_weight(weight.astype(np.float32)), bias=editor.add_bias(_round(bias)))


def _depthwise(editor: _Editor, node: Node) -> Node:
    gain, shift = _affine(node)
    dims = int(node.attrs["dims"])
    attrs = {"dims": dims, "stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": len(gain)}
    weight = editor.add_weight(_round(gain).reshape(-1, 1, *[1] * dims))
    return Node("conv", node.name, node.inputs, attrs, weight, editor.add_bias(_round(shift)))


def _multiply_add(editor: _Editor, index: int, node: Node) -> Node:
    gain, shift = _affine(node)
    operands = []
    for what, values in (("gain", gain), ("shift", shift)):
        attrs, bias = {"shape": [len(values)]}, editor.add_bias(_round(values))
        operands.append(editor.insert(index, Node("constant", f"{node.name}.{what}", (), attrs, bias=bias)))
    product = Node("mul", f"{node.name}.mul", (node.inputs[0], operands[0]), broadcasts=True)
    return Node("add", node.name, (editor.insert(index, product), operands[1]), broadcasts=True)


def _round(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return values.astype(np.float32)


def fold_padding(graph: Graph) -> Graph:
    """Zeros around an image before a conv become its own padding."""
    editor = _Editor(graph)
    for index, node in editor.each("conv"):
        pad = editor.sole_producer(node.inputs[0])
        if pad is None or pad.op != "pad" or pad.attrs["mode"] != "constant" or pad.attrs["value"] != 0:
            continue
        sides = pad.attrs["padding"]
        if not any(sides[:4]):
            sides = [0] * (8 - len(sides)) + sides[4:]
            padding = [own + more for own, more in zip(node.attrs["padding"], sides, strict=True)]
            merged = replace(node, inputs=(*pad.inputs, *node.inputs[1:]), attrs=node.attrs | {"padding": padding})
            editor.absorb(index, node.inputs[0], merged)
    return editor.finish()


def fuse_residuals(graph: Graph) -> Graph:
    """add(conv(x), r) becomes conv(x) with residual r; where both are layers, the later one takes the earlier."""
    editor = _Editor(graph)
    for index, node in editor.each("add"):
        if node.broadcasts:
            continue
        for value in sorted(node.inputs, reverse=True):
            layer = editor.sole_producer(value)
            if layer is None or layer.op not in _MATRIX_OPS or layer.act != "none" or len(layer.inputs) != 1:
                continue
            other = node.inputs[0] if node.inputs[1] == value else node.inputs[1]
            attrs = layer.attrs | node.attrs
            editor.absorb(index, value, replace(layer, inputs=(layer.inputs[0], other), attrs=attrs))
            break
    return editor.finish()


def fuse_activations(graph: Graph) -> Graph:
    """act(f(x)) becomes f with that act, f a layer or arithmetic without one, or a rectifier if act is one too."""
    editor = _Editor(graph)
    rectifiers = ("relu", "relu6")
    for index, node in editor.each("act"):
        before = editor.sole_producer(node.inputs[0])
        if before is None or before.op not in (*_MATRIX_OPS, *_ARITHMETIC, "act"):
            continue
        if before.act == "none":
            editor.absorb(index, node.inputs[0], replace(before, attrs=before.attrs | node.attrs))
        elif before.act in rectifiers and node.act in rectifiers:
            # relu after relu6, or before it, changes nothing.
            act = "relu6" if "relu6" in (before.act, node.act) else "relu"
            editor.absorb(index, node.inputs[0], replace(before, attrs=before.attrs | {"act": act}))
    return editor.finish()


def drop_dead(graph: Graph) -> Graph:
    """Without what no output needs; values, weights (`w0`, …) and biases (`b0`, …) numbered anew. Inputs all stay."""
    first = len(graph.inputs)
    alive = set(graph.outputs)
    for value in range(first + len(graph.nodes) - 1, first - 1, -1):
        if value in alive:
            alive.update(graph.nodes[value - first].inputs)
    kept = [*range(first), *(value for value in range(first, first + len(graph.nodes)) if value in alive)]
    number = {value: index for index, value in enumerate(kept)}
    nodes = [graph.nodes[value - first] for value in kept[first:]]
    weights, biases = _names("w", nodes, "weight"), _names("b", nodes, "bias", "scale")
    renumbered = tuple(
        replace(node, inputs=tuple(number[value] for value in node.inputs), weight=weights.get(node.weight),
                bias=biases.get(node.bias), scale=biases.get(node.scale))
        for node in nodes
    )  # fmt: skip
    return replace(
        graph,
        nodes=renumbered,
        outputs=tuple(number[value] for value in graph.outputs),
        weights={new: graph.weights[old] for old, new in weights.items()},
        biases={new: graph.biases[old] for old, new in biases.items()},
    )


def _names(letter: str, nodes: list[Node], *kinds: str) -> dict[Any, str]:
    """Old name to new, in order of first use."""
    names = (getattr(node, kind) for node in nodes for kind in kinds)
    used = dict.fromkeys(name for name in names if name is not None)
    return {name: f"{letter}{index}" for index, name in enumerate(used)}
