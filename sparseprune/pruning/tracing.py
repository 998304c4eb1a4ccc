"""A model's dependency graph, as `torch-pruning` traces it, with index mappings from the shapes that tensors had.

By itself `torch-pruning` infers how wide a tensor is from the layers around it, which fails next to inputs, slices and
chunks. Autograd knows the shapes, so here they come from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import UnsupportedError

__all__ = ["Index", "Trace", "trace"]

_COUNTED = (nn.modules.conv._ConvNd, nn.Linear, nn.PReLU, nn.modules.batchnorm._BatchNorm,
            nn.modules.instancenorm._InstanceNorm)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Trace:
    """What was found.

    Attributes:
        graph: The `torch_pruning.DependencyGraph`.
        inputs: The gradient functions of the model's inputs.
        calls: How often each convolution, linear layer, norm and PReLU was called, by name, in the order of the calls.
        cuts: The nodes that slice or split a tensor along its channels, and where.
    """

    graph: Any
    inputs: set[Any]
    calls: dict[str, int]
    cuts: dict[Any, list[int]]


def trace(model: nn.Module, args: tuple[Any, ...]) -> Trace:
    """Trace `model`, in evaluation mode, on an example. Its `requires_grad` flags change.

    Raises:
        ImportError: `torch-pruning` is not installed.
        UnsupportedError: the model fails on the example, or cannot be traced.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(f"torch-pruning follows the channels: pip install 'sparseprune[compact]' ({error})") from None
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    graph, tracer = torch_pruning.DependencyGraph(), _Tracer(model, args)
    try:
        with torch.enable_grad():
            graph.build_dependency(model, None, forward_fn=tracer.run, verbose=False)
    except Exception as error:  # whatever the model's own code, or torch-pruning's, raises
        if not hasattr(graph, "module2node"):  # else it is its index mappings that failed, which are replaced below
            raise UnsupportedError(f"the model cannot be traced on example_inputs: {_named(error)}") from error
    finally:
        tracer.remove()
    _map_channels(graph)
    return Trace(graph, tracer.inputs, tracer.calls, _cuts(graph))


class _Tracer:
    """Runs the model with inputs and outputs that show in the trace, and counts the calls of its modules."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self.model, self.args = model, args
        self.inputs: set[Any] = set()  # gradient functions
        self.calls: dict[str, int] = {}
        self.hooks = [
            module.register_forward_hook(self._count(name))
            for name, module in model.named_modules()
            if isinstance(module, _COUNTED)
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


def _shape(function: Any, number: int = 0) -> tuple[int, ...]:
    """Of an output of what a gradient function differentiates; of a parameter itself."""
    if hasattr(function, "variable"):
        return tuple(function.variable.shape)
    return tuple(int(size) for size in function._input_metadata[number].shape)


def _axis(rank: int, tokens: bool) -> int:
    return rank - 1 if rank < 2 or (rank == 3 and tokens) else 1


def _dimension(function: Any, rank: int) -> int:
    """Which dimension is concatenated, cut or split; autograd keeps negative numbers as unsigned ones."""
    saved = int(function._saved_dim)
    return saved if saved < rank else _signed(saved) + rank


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


class Index(NamedTuple):
    """A channel, and the component it belongs to; index mappings take lists of these."""

    idx: int
    root_idx: int


@dataclass(frozen=True)
class _Part:
    """Channels `start` to `end` of a tensor, and their numbers in that part; `inverse`: from the part to the tensor."""

    start: int
    end: int
    step: int = 1
    inverse: bool = False

    def __call__(self, items: Iterable[Index]) -> list[Index]:
        if self.inverse:
            return [Index(item.idx * self.step + self.start, item.root_idx) for item in items]
        taken = range(self.start, self.end, self.step)
        return [Index(taken.index(item.idx), item.root_idx) for item in items if item.idx in taken]


@dataclass(frozen=True)
class _Flat:
    """Each channel becomes `places` features; `inverse`: back to channels."""

    places: int
    inverse: bool = False

    def __call__(self, items: Iterable[Index]) -> list[Index]:
        if self.inverse:
            return list(dict.fromkeys(Index(item.idx // self.places, item.root_idx) for item in items))
        return [Index(item.idx * self.places + place, item.root_idx) for item in items for place in range(self.places)]


def _map_channels(graph: Any) -> None:
    """Give every edge the index mapping that the shapes of its tensors say."""
    types, tokens = graph.ops.OPTYPE, not graph._2d_4d
    for node in graph.module2node.values():
        entries = _entries(node, types, tokens)
        for source in set(node.inputs):
            numbers = [number for function, number in node.grad_fn.next_functions if function is source.grad_fn]
            pairs = zip(_places(node.inputs, source), _edges(source, node), strict=True)
            for k, (place, (back, forth)) in enumerate(pairs):
                steps = [] if entries[place] is None else [entries[place]]
                if source.type == types.SPLIT and k < len(numbers):
                    steps.insert(0, _split_part(source, numbers[k], tokens))
                forth.index_mapping = [step for step in steps if step is not None]
                back.index_mapping = [replace(step, inverse=not step.inverse) for step in reversed(forth.index_mapping)]


def _places(nodes: list[Any], node: Any) -> list[int]:
    return [place for place, other in enumerate(nodes) if other is node]


def _edges(source: Any, reader: Any) -> list[tuple[Any, Any]]:
    """The dependencies between two nodes, back and forth, of each tensor that goes from one to the other.

    A node's dependencies are first those on its inputs, then those on its outputs, in their order.
    """
    back = [reader.dependencies[place] for place in _places(reader.inputs, source)]
    forth = [source.dependencies[len(source.inputs) + place] for place in _places(source.outputs, reader)]
    return list(zip(back, forth, strict=True))


def _cuts(graph: Any) -> dict[Any, list[int]]:
    """Of every node that cuts a tensor along its channels, where it does so."""
    types, tokens = graph.ops.OPTYPE, not graph._2d_4d
    found = {}
    for node in graph.module2node.values():
        parts: list[Any] = []
        if node.type == types.SPLIT:
            parts = [_split_part(node, number, tokens) for number in range(len(node.grad_fn._input_metadata))]
        elif node.type == types.SLICE:
            parts = _entries(node, types, tokens)
        if parts and parts[0] is not None:
            found[node] = sorted({cut for part in parts for cut in (part.start, part.end)})
    return found


def _entries(node: Any, types: Any, tokens: bool) -> list[_Part | _Flat | None]:
    """How the channels of each of a node's inputs become its own; None: one by one."""
    function = node.grad_fn
    result: list[_Part | _Flat | None] = [None] * len(node.inputs)
    if node.type == types.CONCAT:
        return _concatenation(node, tokens) or result
    if node.type not in (types.SLICE, types.RESHAPE) or len(node.inputs) != 1:
        return result
    before, after = _shape(*function.next_functions[0]), _shape(function)
    if node.type == types.SLICE:
        axis = _dimension(function, len(before))
        if axis != _axis(len(before), tokens):
            return result
        start, end, _ = slice(*(_signed(n) for n in (node.module.start, node.module.end))).indices(before[axis])
        return [_Part(start, end, node.module.step)]
    if len(before) > len(after) == 2 and before[0] == after[0] and not (tokens and len(before) == 3):
        return [_Flat(math.prod(before[2:]))]
    if len(after) > len(before) == 2 and before[0] == after[0] and not (tokens and len(after) == 3):
        return [_Flat(math.prod(after[2:]), inverse=True)]
    return result


def _concatenation(node: Any, tokens: bool) -> list[_Part | _Flat | None] | None:
    shape, sources = _shape(node.grad_fn), node.grad_fn.next_functions
    axis = _dimension(node.grad_fn, len(shape))
    sizes = [0 if source is None else _shape(source, number)[axis] for source, number in sources]
    constants = [place for place, (source, _) in enumerate(sources) if source is None]  # what needs no gradient
    if axis != _axis(len(shape), tokens) or len(constants) > 1 or len(sources) - len(constants) != len(node.inputs):
        return None
    for place in constants:
        sizes[place] = shape[axis] - sum(sizes)
    ends = list(accumulate(sizes))
    parts = [_Part(end - size, end, inverse=True) for end, size in zip(ends, sizes, strict=True)]
    return [part for place, part in enumerate(parts) if place not in constants]


def _split_part(node: Any, number: int, tokens: bool) -> _Part | None:
    function = node.grad_fn
    shapes = [tuple(int(size) for size in part.shape) for part in function._input_metadata]
    axis = _dimension(function, len(shapes[0]))
    if axis != _axis(len(shapes[0]), tokens):
        return None
    start = sum(shape[axis] for shape in shapes[:number])
    return _Part(start, start + shapes[number][axis])


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
