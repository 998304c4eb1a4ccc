"""From the graph as the model wrote it to the graph as it runs: fold batch norm, fuse residuals, fuse activations.

Every fusion is "a node absorbs its producer": the merged node takes the reader's place, so all it reads is there
already, and the producer, which nobody else reads, goes. Numbers of values do not change until `drop_dead`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError
from .ir import Graph, Node, Weight

__all__ = ["drop_dead", "fold_scales", "fuse_activations", "fuse_residuals", "optimize"]

_MATRIX_OPS = ("conv", "linear")


def optimize(graph: Graph) -> Graph:
    """All passes in order; the result has bytes (`Graph.to_bytes`).

    Raises:
        UnsupportedError: A batch norm over `(N, F)` that does not follow a linear layer.
    """
    graph = drop_dead(graph)
    for step in (fold_scales, fuse_residuals, fuse_activations):
        graph = drop_dead(step(graph))  # each step counts readers: none may be dead
    return graph


class _Editor:
    """A graph's nodes with holes, and who reads what."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.first = len(graph.inputs)
        self.nodes: list[Node | None] = list(graph.nodes)
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

    def finish(self) -> Graph:
        """Holes become nodes that nobody reads, which `drop_dead` takes out; the numbers of values stay."""
        nodes = [old if node is None else node for old, node in zip(self.graph.nodes, self.nodes, strict=True)]
        return replace(self.graph, nodes=tuple(nodes), weights=self.weights, biases=self.biases)


def fold_scales(graph: Graph) -> Graph:
    """Every `scale_shift` goes into the conv or linear before it, or becomes a depthwise 1×1 conv."""
    editor = _Editor(graph)
    for index, node in editor.each("scale_shift"):
        before = editor.sole_producer(node.inputs[0])
        if before is not None and before.op == "scale_shift":
            scale, shift = _affine(node)
            first_scale, first_shift = _affine(before)
            merged = replace(node, inputs=before.inputs, scale=scale * first_scale, shift=scale * first_shift + shift)
            editor.absorb(index, node.inputs[0], merged)
    for index, node in editor.each("scale_shift"):
        before = editor.sole_producer(node.inputs[0])
        if before is not None and before.op in _MATRIX_OPS and before.act == "none" and len(before.inputs) == 1:
            editor.absorb(index, node.inputs[0], _folded(editor, before, node))
        else:
            editor.nodes[index] = _depthwise(editor, node)
    return editor.finish()


def _affine(node: Node) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    assert node.scale is not None and node.shift is not None
    return node.scale, node.shift


def _folded(editor: _Editor, layer: Node, scale_shift: Node) -> Node:
    """(w·x + b)·scale + shift, in float64, rounded once; zeros stay zeros."""
    scale, shift = _affine(scale_shift)
    assert layer.weight is not None
    dense = editor.weights[layer.weight].dense
    weight = dense.astype(np.float64) * scale.reshape(-1, *[1] * (dense.ndim - 1))
    bias = shift if layer.bias is None else editor.biases[layer.bias].astype(np.float64) * scale + shift
    return replace(layer, weight=editor.add_weight(weight.astype(np.float32)), bias=editor.add_bias(_round(bias)))


def _depthwise(editor: _Editor, node: Node) -> Node:
    scale, shift = _affine(node)
    dims = int(node.attrs["dims"])
    if dims not in (1, 2):
        raise UnsupportedError(
            f"layer '{node.name}': a batch norm, scale or shift over (N, F) is supported after a linear layer only"
        )
    attrs = {"dims": dims, "stride": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": len(scale)}
    weight = editor.add_weight(_round(scale).reshape(-1, 1, *[1] * dims))
    return Node("conv", node.name, node.inputs, attrs, weight, editor.add_bias(_round(shift)))


def _round(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return values.astype(np.float32)


def fuse_residuals(graph: Graph) -> Graph:
    """add(conv(x), r) becomes conv(x) with residual r; where both are layers, the later one takes the earlier."""
    editor = _Editor(graph)
    for index, node in editor.each("add"):
        for value in sorted(node.inputs, reverse=True):
            layer = editor.sole_producer(value)
            if layer is None or layer.op not in _MATRIX_OPS or layer.act != "none" or len(layer.inputs) != 1:
                continue
            other = node.inputs[0] if node.inputs[1] == value else node.inputs[1]
            attrs = layer.attrs | {key: act for key, act in node.attrs.items() if key == "act"}
            editor.absorb(index, value, replace(layer, inputs=(layer.inputs[0], other), attrs=attrs))
            break
    return editor.finish()


def fuse_activations(graph: Graph) -> Graph:
    """act(f(x)) becomes f with that act, f a conv, linear, add or another act."""
    editor = _Editor(graph)
    for index, node in editor.each("act"):
        before = editor.sole_producer(node.inputs[0])
        if before is not None and before.op in (*_MATRIX_OPS, "add", "act"):
            # relu after relu6, or before it, changes nothing.
            act = "relu6" if "relu6" in (before.act, node.act) else node.act
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
    weights, biases = (_names(nodes, kind) for kind in ("weight", "bias"))
    renumbered = tuple(
        replace(node, inputs=tuple(number[value] for value in node.inputs), weight=weights.get(node.weight),
                bias=biases.get(node.bias))
        for node in nodes
    )  # fmt: skip
    return replace(
        graph,
        nodes=renumbered,
        outputs=tuple(number[value] for value in graph.outputs),
        weights={new: graph.weights[old] for old, new in weights.items()},
        biases={new: graph.biases[old] for old, new in biases.items()},
    )


def _names(nodes: list[Node], kind: str) -> dict[Any, str]:
    """Old name to new, in order of first use."""
    used = dict.fromkeys(name for node in nodes if (name := getattr(node, kind)) is not None)
    return {name: f"{kind[0]}{index}" for index, name in enumerate(used)}
