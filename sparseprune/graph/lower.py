"""From torch's exported ATen graph to ours: values, aliases, constants, outputs. The operators are in `operators.py`.

The exported graph is not functional: `relu_` writes its input's memory, and a view shares it. So an fx node does not
name a value but a `Cell`, one piece of memory; an in-place operator replaces the cell's value, and whoever reads the
memory later, by whatever name, reads the new one. A view of a whole tensor that keeps the order of its elements is no
operator: it is another name of the cell, and its reader gets the cell's value, reshaped. Other views (`x[:, 1:]`,
`x.mT`) are operators with cells of their own; to write memory that has such views takes the functional form of the
graph, which torch makes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from ..errors import UnsupportedError
from .ir import Graph, Input, Node, Weight
from .naming import Names, describe, operator_name
from .shapes import ShapeDependentError, Symbols, known_equal, known_same, static

__all__ = ["Lowering", "UnknownOperatorError", "lower"]

_SIZES = {"aten::sym_size", "aten::sym_stride", "aten::sym_numel", "aten::sym_storage_offset"}


class UnknownOperatorError(UnsupportedError):
    """An operator without an entry in the table: decompositions may still help."""


class AmbiguousWriteError(UnsupportedError):
    """What the model computes depends on how its tensors lie in memory."""


@dataclass(eq=False)
class Cell:
    """A piece of memory: the number of its present value, and the fx nodes that are names of it.

    `unsure` is set once a name may as well be a copy (`reshape` of a strided tensor is one), `partial` once another
    cell is a part of this memory, or this of another's.
    """

    value: int
    names: list[fx.Node] = field(default_factory=list)
    unsure: bool = False
    partial: bool = False


class _Names(Names):
    def helper(self, node: fx.Node, op: str) -> str:
        """A name for what is emitted besides the layer's own operator."""
        name = f"{self._name(node)}.{op}"
        count = self.used.get(name, 0)
        self.used[name] = count + 1
        return f"{name}@{count}" if count else name


def lower(exported: ExportedProgram, tree: dict[str, Any]) -> Graph:
    """The program's graph, before `passes`.

    Args:
        exported: Of a model in evaluation mode, undecomposed; it is decomposed only where an operator is unknown.
        tree: The nesting of the outputs, as in `docs/program.md`; `{"kind": "tensor"}` takes the next tensor.

    Raises:
        UnsupportedError: Naming the operator, its layer, and what was tried.
    """
    # Undecomposed; functional, undecomposed; functional, decomposed.
    forms: list[Callable[[], ExportedProgram]] = [
        lambda: exported, lambda: exported.run_decompositions({}), exported.run_decompositions
    ]  # fmt: skip
    errors: list[UnsupportedError] = []
    for form in forms:
        try:
            return Lowering(_formed(form)).run(tree)
        except UnsupportedError as error:
            errors.append(error)
            if isinstance(error, AmbiguousWriteError):
                raise
            if isinstance(errors[0], ShapeDependentError):
                break
    shapes = next((error for error in errors if isinstance(error, ShapeDependentError)), None)
    if shapes is not None:
        raise shapes
    first, last = str(errors[0]), str(errors[-1])
    after = "" if first == last else f", where {last}"
    raise UnsupportedError(f"{first} (tried: the exported graph, then its decompositions{after})") from errors[0]


def _formed(form: Callable[[], ExportedProgram]) -> ExportedProgram:
    try:
        return form()
    except Exception as error:  # whatever torch's tracing raises
        raise UnsupportedError(f"torch could not decompose the graph: {type(error).__name__}: {error}") from error


class Lowering:
    """One exported program on its way; `operators.TABLE` calls the methods below `run`."""

    def __init__(self, exported: ExportedProgram) -> None:
        self.exported = exported
        self.names = _Names(exported)
        self.symbols = Symbols()
        self.inputs: list[Input] = []
        self.nodes: list[Node] = []
        self.shapes: list[Sequence[Any]] = []  # of each value, sizes may be symbolic
        self.weights: dict[str, Weight] = {}
        self.biases: dict[str, Any] = {}
        self.cells: dict[fx.Node, Cell] = {}
        self.lists: dict[fx.Node, list[Cell]] = {}  # of operators with several results
        self.constants: dict[fx.Node, Any] = {}
        self.reshaped: dict[tuple[Any, ...], int] = {}
        self.constant_values: dict[tuple[Any, ...], int] = {}
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
        """The number of the value that `node` reads through `item`: a tensor, computed or constant, or a number."""
        if isinstance(item, fx.Node) and item in self.cells:
            return self.reshape(self.cells[item].value, item.meta["val"].shape, item)
        found = self.scalar(item)
        if isinstance(found, bool | int | float):
            found = torch.tensor(found)
        if isinstance(found, torch.SymInt | torch.SymFloat):
            raise ShapeDependentError(f"{describe(node)}: computes with the number {found}, which depends on sizes")
        if not isinstance(found, Tensor):
            raise UnsupportedError(f"{describe(node)}: expected a tensor as input, got {item}")
        return self._constant_value(found, node)

    def _constant_value(self, tensor: Tensor, node: fx.Node) -> int:
        tensor = tensor.detach().float()
        key: tuple[Any, ...] = (len(self.constant_values),)
        if tensor.numel() == 1:
            key = (tuple(tensor.shape), "number", float(tensor).hex())
        elif self._is_frozen(tensor):
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if key not in self.constant_values:
            shape = list(tensor.shape) or [1]
            held = {"attrs": {"shape": shape}, "bias": self.add_bias(tensor)}
            self.constant_values[key] = self.emit(node, "constant", [], shape, helper=True, **held)
        return self.constant_values[key]

    def producer(self, value: int) -> Node | None:
        """The node that computes a value, None for an input."""
        return self.nodes[value - len(self.inputs)] if value >= len(self.inputs) else None

    def reshape(self, value: int, shape: Sequence[Any], node: fx.Node) -> int:
        """The value with this shape: itself where it has it, else a reshape of what is behind its own reshapes."""
        chain = [value]
        while (before := self.producer(chain[-1])) is not None and before.op in ("reshape", "flatten"):
            chain.append(before.inputs[0])
        for source in chain:
            if known_same(self.shapes[source], shape):
                return source
        if (shuffled := self._channel_shuffle(chain[-1], shape, node)) is not None:
            return shuffled
        for source in reversed(chain):
            own = self.shapes[source]
            sizes = self.symbols.encode(shape, own, infer=True)
            if sizes is None:
                continue
            flat = len(shape) == 2 and len(own) in (3, 4) and known_equal(shape[0], own[0])
            if (key := (source, *sizes)) not in self.reshaped:
                op = "flatten" if flat else "reshape"
                attrs = {} if flat else {"shape": sizes}
                self.reshaped[key] = self.emit(node, op, [source], shape, helper=True, attrs=attrs)
            return self.reshaped[key]
        raise ShapeDependentError(
            f"{describe(node)}: a view of {tuple(self.shapes[value])} as {tuple(shape)} depends on more than one size"
        )

    def _channel_shuffle(self, value: int, shape: Sequence[Any], node: fx.Node) -> int | None:
        """(N, C, …) as (N, g, C/g, …), permuted to (N, C/g, g, …), as (N, C, …) again."""
        permute = self.producer(value)
        if permute is None or permute.op != "permute" or len(shape) < 3:
            return None
        axes, split = permute.attrs["axes"], self.producer(permute.inputs[0])
        if split is None or split.op != "reshape" or axes != [0, 2, 1, *range(3, len(shape) + 1)]:
            return None
        middle, source = self.shapes[permute.inputs[0]], split.inputs[0]
        rest = known_same([middle[0], *middle[3:]], [shape[0], *shape[2:]])
        if not rest or not known_same(self.shapes[source], shape) or (groups := static(middle[1])) is None:
            return None
        return self.emit(node, "channel_shuffle", [source], shape, attrs={"groups": groups})

    def permute(self, value: int, axes: Sequence[int], node: fx.Node) -> int:
        """Merged with a permute before it."""
        axes = list(axes)
        if (before := self.producer(value)) is not None and before.op == "permute":
            value, axes = before.inputs[0], [before.attrs["axes"][axis] for axis in axes]
        shape = [self.shapes[value][axis] for axis in axes]
        # Sizes of 1 may move without moving an element.
        longer = [axis for axis in axes if static(self.shapes[value][axis]) != 1]
        if longer == sorted(longer) and self.symbols.encode(shape, self.shapes[value], infer=True) is not None:
            return self.reshape(value, shape, node)
        return self.emit(node, "permute", [value], shape, attrs={"axes": axes})

    def again(self, value: int, source: int, node: fx.Node) -> int:
        """What made `value` of a tensor of `source`'s shape, done to `source`."""
        before = self.producer(value)
        assert before is not None
        if before.op in ("reshape", "flatten"):
            return self.reshape(source, self.shapes[value], node)
        if before.op == "permute":
            return self.permute(source, before.attrs["axes"], node)
        name = self.names.helper(node, before.op)
        return self._append(replace(before, name=name, inputs=(source,)), self.shapes[value])

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
        found = self.constants[item] if item in self.constants else item.meta["val"]
        return None if isinstance(found, Tensor) and item not in self.constants else found

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
        self,
        node: fx.Node,
        op: str,
        inputs: Sequence[int],
        shape: Sequence[Any] | None = None,
        *,
        helper: bool = False,
        **rest: Any,
    ) -> int:
        """Appends an operator of ours; `shape` only where it is not the fx node's. Returns its value's number.

        A `helper` leaves the layer's name to another operator.
        """
        if shape is None:
            result = node.meta["val"]
            shape = (result[0] if isinstance(result, tuple | list) else result).shape
        name = self.names.helper(node, op) if helper else self.names.of(node)
        return self._append(Node(op, name, tuple(inputs), **rest), shape)

    # ---- the walk

    def _append(self, node: Node, shape: Sequence[Any]) -> int:
        if not 1 <= len(shape) <= 8:
            raise UnsupportedError(f"layer '{node.name}': expected tensors of 1 to 8 dimensions, got {len(shape)}")
        if any(static(size) == 0 for size in shape):
            raise UnsupportedError(f"layer '{node.name}': a tensor without elements is not supported")
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
        pattern = self._pattern(node)
        if _is_pure(node) and all(item in self.constants or item is pattern for item in node.all_input_nodes):
            self._fold(node)
        elif _is_size(node.meta.get("val")):
            self._size(node)
        elif node.target is operator.getitem and node.args[0] in self.lists:
            cells = self.lists[node.args[0]]  # type: ignore[index]
            if node.args[1] >= len(cells):  # type: ignore[operator]
                raise UnsupportedError(f"{describe(node.args[0])}: only its first result is supported, not the indices")
            self.cells[node] = cells[node.args[1]]  # type: ignore[index]
            self.cells[node].names.append(node)
        else:
            self._operator(node)

    def _pattern(self, node: fx.Node) -> fx.Node | None:
        """The computed tensor of which only the shape is used, where the result's is fixed."""
        from .operators import FACTORIES

        fixed = isinstance(node.meta.get("val"), Tensor) and None not in map(static, node.meta["val"].shape)
        if not fixed or operator_name(node).removeprefix("aten::") not in FACTORIES:
            return None
        return node.args[0] if node.args[0] in self.cells else None  # type: ignore[return-value]

    def _fold(self, node: fx.Node) -> None:
        """Computes a constant now: a mask times a weight, say."""
        for item in _written(node):
            if isinstance(found := self.constants.get(item), Tensor) and self._is_frozen(found):
                raise UnsupportedError(f"{describe(node)}: writes a parameter, buffer or constant of the model")
        pattern = self._pattern(node)
        stand_in = None if pattern is None else torch.empty([static(size) or 1 for size in pattern.meta["val"].shape])
        args, kwargs = fx.node.map_arg(
            (node.args, dict(node.kwargs)), lambda item: stand_in if item is pattern else self.constants[item]
        )
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        with torch.no_grad():
            self.constants[node] = target(*args, **kwargs)

    def _size(self, node: fx.Node) -> None:
        """A number: left symbolic. One that depends on the numbers in a tensor cannot be."""
        reads_tensor = any(item in self.cells for item in node.all_input_nodes)
        if reads_tensor and operator_name(node) not in _SIZES:
            raise UnknownOperatorError(f"{describe(node)}: a number that depends on the data is not supported")

    def _operator(self, node: fx.Node) -> None:
        from .operators import COPIES, IDENTITIES, TABLE, VIEWS, bind

        namespace, _, base = operator_name(node).partition("::")
        written = _written(node)
        entry = TABLE.get(base.rstrip("_") if written else base) if namespace == "aten" else None
        known = entry is not None or (namespace == "aten" and (base in VIEWS or base in COPIES))
        if _is_pure(node) and not any(item in self.cells or item in self.lists for item in node.all_input_nodes):
            if not known or _dtype(node) != torch.float32:
                raise ShapeDependentError(f"{describe(node)} is computed from sizes of the inputs")
        if not known:
            raise UnknownOperatorError(f"{describe(node)} is not supported")
        self._check_dtype(node, node.meta.get("val"))
        source = self.cells.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if entry is None:
            cell = source or Cell(self.value(node.args[0], node))
            if base in COPIES:
                self.cells[node] = Cell(cell.value, [node])
            else:
                cell.unsure |= VIEWS.get(base) == "perhaps a copy"
                self._alias(node, cell)
            return
        result = entry.handler(self, node, bind(node))
        if written:
            assert isinstance(result, int)
            self._write(node, written[0], result)
            return
        if base in IDENTITIES and source is not None and result == source.value:
            self._alias(node, source)  # dropout gives back its input itself
            return
        cells = [Cell(value) for value in ([result] if isinstance(result, int) else result)]
        if source is not None and _is_view(node):
            for cell in (source, *cells):
                cell.partial = True
        if isinstance(node.meta.get("val"), Tensor):
            self._alias(node, cells[0])
        else:
            self.lists[node] = cells

    def _alias(self, node: fx.Node, cell: Cell) -> None:
        cell.names.append(node)
        self.cells[node] = cell

    def _write(self, node: fx.Node, target: fx.Node, value: int) -> None:
        if (cell := self.cells.get(target)) is None:
            raise UnsupportedError(f"{describe(node)}: writes computed numbers into a constant")
        for name in cell.names if cell.unsure else ():
            later = (user for user in name.users if user not in self.dead and self.order[user] > self.order[node])
            if name is not target and any(later):
                raise AmbiguousWriteError(
                    f"{describe(node)}: writes memory that {describe(name)} may share or may have copied, and that is "
                    "read later; use the operator that is not in place"
                )
        if cell.partial:
            raise UnsupportedError(f"{describe(node)}: writes memory that has other views")
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


def _is_view(node: fx.Node) -> bool:
    """Whether its result shares memory with an argument."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return any(item.alias_info is not None for item in node.target._schema.returns)


def _dtype(node: fx.Node) -> object:
    return getattr(node.meta.get("val"), "dtype", None)


def _is_pure(node: fx.Node) -> bool:
    """Whether computing it once gives what computing it at each call would."""
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded not in node.target.tags
    return callable(node.target) and not isinstance(node.target, torch._ops.HigherOrderOperator)


def _is_size(value: object) -> bool:
    return isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)
