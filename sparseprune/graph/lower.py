"""From torch's exported ATen graph to ours: values, aliases, constants, outputs. The operators are in `operators.py`.

The exported graph is not functional: `relu_` writes its input's memory, and a view shares it. So an fx node does not
name a value but a `Cell`, one piece of memory; an in-place operator replaces the cell's value, and whoever reads the
memory later, by whatever name, reads the new one. Only views of a whole tensor are known here, so a cell has one value,
and a view is no operator: a reader of a view gets the cell's value, flattened if that is what the view's shape says.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from ..errors import UnsupportedError
from .ir import Graph, Input, Node, Weight
from .naming import Names, describe, operator_name
from .shapes import ShapeDependentError, Symbols, known_equal, known_same

__all__ = ["Lowering", "UnknownOperatorError", "lower"]

_SIZES = {"aten::sym_size", "aten::sym_stride", "aten::sym_numel", "aten::sym_storage_offset"}


class UnknownOperatorError(UnsupportedError):
    """An operator without an entry in the table: decompositions may still help."""


@dataclass(eq=False)
class Cell:
    """A piece of memory: the number of its present value, and the fx nodes that are names of it.

    `unsure` is set once a name may as well be a copy (`reshape` of a strided tensor is one).
    """

    value: int
    names: list[fx.Node] = field(default_factory=list)
    unsure: bool = False


def lower(exported: ExportedProgram, tree: dict[str, Any]) -> Graph:
    """The program's graph, before `passes`.

    Args:
        exported: Of a model in evaluation mode, undecomposed; it is decomposed only where an operator is unknown.
        tree: The nesting of the outputs, as in `docs/program.md`; `{"kind": "tensor"}` takes the next tensor.

    Raises:
        UnsupportedError: Naming the operator, its layer, and what was tried.
    """
    try:
        return Lowering(exported).run(tree)
    except UnknownOperatorError as first:
        try:
            return Lowering(exported.run_decompositions()).run(tree)
        except ShapeDependentError:
            raise
        except UnsupportedError as second:
            after = "" if str(first) == str(second) else f", where {second}"
            raise UnsupportedError(f"{first} (tried: the exported graph, then its decompositions{after})") from second


class Lowering:
    """One exported program on its way; `operators.TABLE` calls the methods below `run`."""

    def __init__(self, exported: ExportedProgram) -> None:
        self.exported = exported
        self.names = Names(exported)
        self.symbols = Symbols()
        self.inputs: list[Input] = []
        self.nodes: list[Node] = []
        self.shapes: list[Sequence[Any]] = []  # of each value, sizes may be symbolic
        self.weights: dict[str, Weight] = {}
        self.biases: dict[str, Any] = {}
        self.cells: dict[fx.Node, Cell] = {}
        self.constants: dict[fx.Node, Any] = {}
        self.flattened: dict[int, int] = {}
        self.weight_names: dict[tuple[Any, ...], str] = {}
        self.frozen_storages: set[int] = set()
        self.dead = _dead_nodes(exported.graph)
        self.order = {node: index for index, node in enumerate(exported.graph.nodes)}

    def run(self, tree: dict[str, Any]) -> Graph:
        self._placeholders()
        for node in self.exported.graph.nodes:
            if node.op == "call_function" and node not in self.dead:
                self._call(node)
        outputs = self._outputs()
        return Graph(tuple(self.inputs), tuple(self.nodes), tuple(outputs), tree, self.weights, self.biases)

    # ---- what operators use

    def is_value(self, item: object) -> bool:
        return isinstance(item, fx.Node) and item in self.cells

    def value(self, item: object, node: fx.Node) -> int:
        """The number of the value that `node` reads through `item`; emits a flatten where `item` is a flat view."""
        if not isinstance(item, fx.Node) or item not in self.cells:
            raise UnsupportedError(f"{describe(node)}: expected a computed tensor as input, got the constant {item}")
        shape, value = item.meta["val"].shape, self.cells[item].value
        if known_same(self.shapes[value], shape):
            return value
        if len(shape) == 2 and known_equal(shape[0], self.shapes[value][0]):
            if value not in self.flattened:
                self.flattened[value] = self._append(Node("flatten", self.names.of(item), (value,)), shape)
            return self.flattened[value]
        raise ShapeDependentError(
            f"{describe(item)}: a view of {tuple(self.shapes[value])} as {tuple(shape)} is neither the identity nor a "
            f"flatten from dimension 1, and {describe(node)} reads it"
        )

    def underlying(self, item: fx.Node) -> tuple[int, Sequence[Any]]:
        """The value of the memory, and the value's own shape, whatever the view."""
        value = self.cells[item].value
        return value, self.shapes[value]

    def constant(self, item: object, node: fx.Node, what: str) -> Tensor:
        """A constant float32 tensor."""
        found = self.constants.get(item) if isinstance(item, fx.Node) else item
        if not isinstance(found, Tensor):
            raise UnsupportedError(f"{describe(node)}: its {what} is computed from the inputs, expected a constant")
        if found.dtype != torch.float32:
            raise UnsupportedError(f"{describe(node)}: its {what} is {found.dtype}, only torch.float32 is supported")
        return found

    def scalar(self, item: object) -> object:
        """A Python or symbolic number for an argument that may be an fx node."""
        if not isinstance(item, fx.Node):
            return item
        return self.constants[item] if item in self.constants else item.meta["val"]

    def add_weight(self, tensor: Tensor) -> str:
        """Registers a copy; a parameter that several layers share stays one weight."""
        # Memory of the model stays as it is while we look; that of intermediates may be written or used again.
        key: tuple[Any, ...] = (len(self.weights),)
        if self._is_frozen(tensor):
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if key not in self.weight_names:
            self.weight_names[key] = f"w{len(self.weights)}"
            self.weights[self.weight_names[key]] = Weight(tensor.detach().cpu().contiguous().numpy().copy())
        return self.weight_names[key]

    def add_bias(self, tensor: Tensor) -> str:
        name = f"b{len(self.biases)}"
        self.biases[name] = tensor.detach().cpu().reshape(-1).contiguous().numpy().copy()
        return name

    def emit(
        self, node: fx.Node, op: str, inputs: Sequence[int], shape: Sequence[Any] | None = None, **rest: Any
    ) -> int:
        """Appends an operator of ours; `shape` only where it is not the fx node's. Returns its value's number."""
        if shape is None:
            result = node.meta["val"]
            shape = (result[0] if isinstance(result, tuple | list) else result).shape
        return self._append(Node(op, self.names.of(node), tuple(inputs), **rest), shape)

    # ---- the walk

    def _append(self, node: Node, shape: Sequence[Any]) -> int:
        self.nodes.append(node)
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def _placeholders(self) -> None:
        placeholders = [node for node in self.exported.graph.nodes if node.op == "placeholder"]
        for node, spec in zip(placeholders, self.exported.graph_signature.input_specs, strict=True):
            if spec.kind is not InputKind.USER_INPUT:
                self._freeze(node, spec.target)
            elif isinstance(spec.arg, TensorArgument):
                value = node.meta["val"]
                self._check_dtype(node, value)
                self.inputs.append(Input(node.name, self.symbols.shape(node.name, value.shape)))
                self.shapes.append(value.shape)
                self.cells[node] = Cell(len(self.shapes) - 1, [node])
            else:
                self.constants[node] = getattr(spec.arg, "value", None)

    def _freeze(self, node: fx.Node, target: str | None) -> None:
        tensor = self.exported.state_dict.get(target) if target in self.exported.state_dict else None
        tensor = self.exported.constants.get(target) if tensor is None and target is not None else tensor
        if isinstance(tensor, Tensor):
            self.constants[node] = tensor
            self.frozen_storages.add(tensor.untyped_storage().data_ptr())

    def _is_frozen(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.frozen_storages

    def _call(self, node: fx.Node) -> None:
        if all(item in self.constants for item in node.all_input_nodes) and _is_pure(node):
            self._fold(node)
        elif _is_size(node.meta.get("val")):
            self._size(node)
        elif node.target is operator.getitem and node.args[0] in self.cells:
            if node.args[1] != 0:
                raise UnsupportedError(f"{describe(node.args[0])}: only its first result is supported, not the indices")
            self.cells[node] = self.cells[node.args[0]]  # type: ignore[index]
        else:
            self._check_dtype(node, node.meta.get("val"))
            self._operator(node)

    def _fold(self, node: fx.Node) -> None:
        """Computes a constant now: a mask times a weight, say."""
        for item in _written(node):
            if isinstance(found := self.constants.get(item), Tensor) and self._is_frozen(found):
                raise UnsupportedError(f"{describe(node)}: writes a parameter, buffer or constant of the model")
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda item: self.constants[item])
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        with torch.no_grad():
            self.constants[node] = target(*args, **kwargs)

    def _size(self, node: fx.Node) -> None:
        """A number: left symbolic. One that depends on the numbers in a tensor cannot be."""
        reads_tensor = any(item in self.cells for item in node.all_input_nodes)
        if reads_tensor and operator_name(node) not in _SIZES:
            raise UnknownOperatorError(f"{describe(node)}: a number that depends on the data is not supported")

    def _operator(self, node: fx.Node) -> None:
        from .operators import COPIES, TABLE, VIEWS, bind

        name = operator_name(node)
        namespace, _, base = name.partition("::")
        source = node.args[0] if node.args and self.is_value(node.args[0]) else None
        written = _written(node)
        if namespace != "aten":
            raise UnknownOperatorError(f"{describe(node)} is not supported")
        if source is not None and base in VIEWS:
            cell = self.cells[source]  # type: ignore[index]
            cell.unsure |= VIEWS[base] == "perhaps a copy"
            self._alias(node, cell)
        elif source is not None and base in COPIES:
            self.cells[node] = Cell(self.cells[source].value, [node])  # type: ignore[index]
        elif (handler := TABLE.get(base.rstrip("_") if written else base)) is None:
            raise UnknownOperatorError(f"{describe(node)} is not supported")
        else:
            value = handler(self, node, bind(node))
            if written:
                self._write(node, written[0], value)
            elif source is not None and value == self.cells[source].value:  # type: ignore[index]
                self._alias(node, self.cells[source])  # type: ignore[index]  # dropout gives back its input itself
            else:
                self.cells[node] = Cell(value, [node])

    def _alias(self, node: fx.Node, cell: Cell) -> None:
        cell.names.append(node)
        self.cells[node] = cell

    def _write(self, node: fx.Node, target: fx.Node, value: int) -> None:
        if (cell := self.cells.get(target)) is None:
            raise UnsupportedError(f"{describe(node)}: writes computed numbers into a constant")
        for name in cell.names if cell.unsure else ():
            later = (user for user in name.users if user not in self.dead and self.order[user] > self.order[node])
            if name is not target and any(later):
                raise UnsupportedError(
                    f"{describe(node)}: writes memory that {describe(name)} may share or may have copied, and that is "
                    "read later; use the operator that is not in place"
                )
        cell.value = value
        self._alias(node, cell)

    def _check_dtype(self, node: fx.Node, value: object) -> None:
        if isinstance(value, Tensor) and value.dtype != torch.float32:
            raise UnsupportedError(f"{describe(node)}: is {value.dtype}, only torch.float32 is supported")

    def _outputs(self) -> list[int]:
        node = self.exported.graph.output_node()
        outputs: list[int] = []
        for item, spec in zip(node.args[0], self.exported.graph_signature.output_specs, strict=True):  # type: ignore
            if spec.kind is OutputKind.BUFFER_MUTATION:
                raise UnsupportedError(f"the forward writes the buffer '{spec.target}'; a program has no state")
            if spec.kind is not OutputKind.USER_OUTPUT or not isinstance(spec.arg, TensorArgument):
                continue
            if not self.is_value(item):
                raise UnsupportedError(f"output {len(outputs)}: the constant {item} does not depend on the inputs")
            outputs.append(self.value(item, node))
        return outputs


def _dead_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Calls whose results nobody reads and that write nothing: also assertions, and the sizes that only they read."""
    dead: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("call_function", "get_attr") and not _written(node) and all(user in dead for user in node.users):
            dead.add(node)
    return dead


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments an operator writes in place."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    arguments = node.target._schema.arguments
    names = [item.name for item in arguments if item.alias_info is not None and item.alias_info.is_write]
    positions = {item.name: index for index, item in enumerate(arguments)}
    given = dict(enumerate(node.args))
    found = [given.get(positions[name], node.kwargs.get(name)) for name in names]
    return [item for item in found if isinstance(item, fx.Node)]


def _is_pure(node: fx.Node) -> bool:
    """Whether computing it once gives what computing it at each call would."""
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded not in node.target.tags
    return callable(node.target) and not isinstance(node.target, torch._ops.HigherOrderOperator)


def _is_size(value: object) -> bool:
    return isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)
