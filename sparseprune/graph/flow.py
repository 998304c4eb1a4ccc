"""Which channels of its operands does each channel of a node's value come from?

Channels are dimension 1 of a value: of `(N, C, H, W)`, or the features of `(N, F)`. What is not understood here keeps
all its channels, and so does all that it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ir import Graph, Node

__all__ = ["Flow", "Link", "constant_axis", "flows"]

_BINARY = ("add", "sub", "mul", "div", "maximum", "minimum")
_PARTIAL = ("sqrt", "rsqrt", "reciprocal")  # not finite everywhere: a channel that nobody reads would matter


@dataclass(frozen=True, eq=False)
class Link:
    """Channel `to[i]` of a node's value comes from channel `of[i]` of an operand, and one goes only with the other."""

    value: int
    of: NDArray[np.intp]
    to: NDArray[np.intp]


@dataclass(frozen=True)
class Flow:
    """A value, and how it comes from others.

    Attributes:
        rank: How many dimensions it has; None: not known.
        width: How many channels; None: not known, or dimension 1 is none.
        links: To the operands that it comes from channel by channel. The input of a conv or linear is no such, but
            where the conv is depthwise.
        whole: Operands of which every channel is needed.
        rigid: Its own channels all have to stay.
    """

    rank: int | None
    width: int | None
    links: tuple[Link, ...] = ()
    whole: tuple[int, ...] = ()
    rigid: bool = True


def flows(graph: Graph) -> list[Flow]:
    """One for each value."""
    walk = _Walk(graph)
    for node in graph.nodes:
        own = _RULES.get(node.op, _opaque)(walk, node)
        unknown = any(walk.found[link.value].width is None for link in own.links)
        walk.found.append(_opaque(walk, node, own.rank, own.width) if unknown or node.act in _PARTIAL else own)
    return walk.found


def constant_axis(shape: list[int], rank: int) -> int | None:
    """Which dimension of a constant meets dimension 1 of a value of this rank; None: none, or it has size 1."""
    axis = 1 - (rank - len(shape))
    return None if axis < 0 or shape[axis] == 1 else axis


@dataclass
class _Walk:
    graph: Graph
    found: list[Flow] = field(default_factory=list)

    def __post_init__(self) -> None:
        for item in self.graph.inputs:
            width = item.shape[1] if len(item.shape) > 1 else None
            self.found.append(Flow(len(item.shape), width if isinstance(width, int) else None))

    def node(self, value: int) -> Node | None:
        first = len(self.graph.inputs)
        return self.graph.nodes[value - first] if value >= first else None

    def features(self, value: int) -> int | None:
        """The width of a value as the linear layers say that read it."""
        for node in self.graph.nodes:
            if node.op == "linear" and node.inputs[0] == value and node.weight is not None:
                return self.graph.weights[node.weight].shape[1]
        return None


Rule = Callable[[_Walk, Node], Flow]


def _straight(value: int, width: int) -> Link:
    return Link(value, np.arange(width), np.arange(width))


def _opaque(walk: _Walk, node: Node, rank: int | None = None, width: int | None = None) -> Flow:
    return Flow(rank, width, whole=node.inputs)


def _layer(walk: _Walk, node: Node) -> Flow:
    assert node.weight is not None
    shape, groups = walk.graph.weights[node.weight].shape, int(node.attrs.get("groups", 1))
    width = shape[0]
    links = [_straight(value, width) for value in node.inputs[1:]]
    whole: tuple[int, ...] = ()
    if groups > 1 and shape[1] == 1:
        links.append(Link(node.inputs[0], np.arange(width) // (width // groups), np.arange(width)))
    elif groups > 1:
        whole = node.inputs
    return Flow(len(shape), width, tuple(links), whole, rigid=bool(whole))


def _same(walk: _Walk, node: Node) -> Flow:
    """Every channel by itself. A second operand gives sizes only."""
    x = walk.found[node.inputs[0]]
    if x.width is None:
        return _opaque(walk, node, x.rank)
    return Flow(x.rank, x.width, (_straight(node.inputs[0], x.width),), rigid=False)


def _normal(walk: _Walk, node: Node) -> Flow:
    x = walk.found[node.inputs[0]]
    return _opaque(walk, node, x.rank, x.width)


def _binary(walk: _Walk, node: Node) -> Flow:
    operands = [walk.found[value] for value in node.inputs]
    ranks = [x.rank for x in operands]
    rank = None if None in ranks else max(r for r in ranks if r is not None)
    constants = [walk.node(value) for value in node.inputs]
    shapes = [list(c.attrs["shape"]) if c is not None and c.op == "constant" else None for c in constants]
    widths = [x.width for x, shape in zip(operands, shapes, strict=True) if shape is None]
    if rank is None or not widths or None in widths or (node.op == "div" and shapes[1] is None):
        return _opaque(walk, node, rank)
    width = max(w for w in widths if w is not None)
    links, whole = [], []
    for value, x, shape in zip(node.inputs, operands, shapes, strict=True):
        if shape is not None:
            axis = constant_axis(shape, rank)
            if axis is not None and shape[axis] != width:
                return _opaque(walk, node, rank)
        elif x.rank != rank or x.width not in (1, width):
            return _opaque(walk, node, rank)
        elif x.width == width:
            links.append(_straight(value, width))
        else:
            whole.append(value)  # one channel for all
    return Flow(rank, width, tuple(links), tuple(whole), rigid=False)


def _flatten(walk: _Walk, node: Node) -> Flow:
    x, own = walk.found[node.inputs[0]], walk.features(len(walk.found))
    if x.width is None or own is None:
        return _opaque(walk, node, 2, own)
    return Flow(2, own, (Link(node.inputs[0], np.arange(own) // (own // x.width), np.arange(own)),), rigid=False)


def _shaped(walk: _Walk, node: Node) -> Flow:
    """reshape and expand that leave dimension 1, and dimension 0 or what comes after, as they are."""
    x, shape = walk.found[node.inputs[0]], node.attrs["shape"]
    known = len(shape) > 1 and x.width is not None and shape[1] in (-3, x.width) and -3 not in shape[2:]
    if not known or (node.op == "reshape" and shape[0] != -2):
        width = shape[1] if len(shape) > 1 and isinstance(shape[1], int) and shape[1] > 0 else None
        return _opaque(walk, node, len(shape), width)
    return _with_rank(_same(walk, node), len(shape))


def _with_rank(flow: Flow, rank: int) -> Flow:
    return Flow(rank, flow.width, flow.links, flow.whole, flow.rigid)


def _permute(walk: _Walk, node: Node) -> Flow:
    axes = node.attrs["axes"]
    return _same(walk, node) if list(axes[:2]) == [0, 1] else _opaque(walk, node, len(axes))


def _slice(walk: _Walk, node: Node) -> Flow:
    x, a = walk.found[node.inputs[0]], node.attrs
    if a["axis"] != 1 or x.width is None:
        return _same(walk, node) if a["axis"] != 1 else _opaque(walk, node, x.rank)
    of = np.arange(x.width)[a["start"] : a["end"] : a["step"]]
    if a["step"] != 1:
        return _opaque(walk, node, x.rank, len(of))
    return Flow(x.rank, len(of), (Link(node.inputs[0], of, np.arange(len(of))),), rigid=False)


def _moved(walk: _Walk, node: Node) -> Flow:
    """index_select and roll."""
    if node.attrs["axis"] != 1:
        return _same(walk, node)
    x = walk.found[node.inputs[0]]
    return _opaque(walk, node, x.rank, len(node.attrs["index"]) if "index" in node.attrs else x.width)


def _concat(walk: _Walk, node: Node) -> Flow:
    operands = [walk.found[value] for value in node.inputs]
    widths = [x.width for x in operands if x.width is not None]
    rank = operands[0].rank
    if len(widths) < len(operands):
        return _opaque(walk, node, rank)
    if node.attrs["axis"] != 1:
        return Flow(rank, widths[0], tuple(_straight(value, widths[0]) for value in node.inputs), rigid=False)
    starts = np.cumsum([0, *widths])
    links = [Link(value, np.arange(width), np.arange(start, start + width))
             for value, width, start in zip(node.inputs, widths, starts, strict=False)]  # fmt: skip
    return Flow(rank, int(starts[-1]), tuple(links), rigid=False)


def _pad(walk: _Walk, node: Node) -> Flow:
    return (
        _opaque(walk, node, len(node.attrs["padding"]) // 2) if any(node.attrs["padding"][2:4]) else _same(walk, node)
    )


def _pixel_shuffle(walk: _Walk, node: Node) -> Flow:
    x, (rows, columns) = walk.found[node.inputs[0]], node.attrs["factor"]
    if x.width is None:
        return _opaque(walk, node, 4)
    of = np.arange(x.width)
    return Flow(4, x.width // (rows * columns), (Link(node.inputs[0], of, of // (rows * columns)),), rigid=False)


def _reduce(walk: _Walk, node: Node) -> Flow:
    x, axes, keepdim = walk.found[node.inputs[0]], node.attrs["axes"], bool(node.attrs["keepdim"])
    rank = None if x.rank is None else x.rank - (0 if keepdim else len(axes))
    if 1 in axes or (0 in axes and not keepdim):
        return _opaque(walk, node, rank)
    return Flow(rank, (same := _same(walk, node)).width, same.links, same.whole, same.rigid)


def _constant(walk: _Walk, node: Node) -> Flow:
    return Flow(len(node.attrs["shape"]), None)


_RULES: dict[str, Any] = {
    **dict.fromkeys(("conv", "linear"), _layer),
    **dict.fromkeys(
        ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "act", "prelu", "resize"), _same
    ),
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(("softmax", "layer_norm", "group_norm", "channel_shuffle"), _normal),
    **dict.fromkeys(("reshape", "expand"), _shaped),
    **dict.fromkeys(("index_select", "roll"), _moved),
    "flatten": _flatten,
    "permute": _permute,
    "slice": _slice,
    "concat": _concat,
    "pad": _pad,
    "pixel_shuffle": _pixel_shuffle,
    "reduce": _reduce,
    "constant": _constant,
}
