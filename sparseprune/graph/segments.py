"""Models that are not wholly native: the fewest alternating native and torch segments.

The functional export is a list of *units*, a call together with the `getitem`s of its results. What only depends on
constants is computed here; arithmetic on sizes belongs to no segment, each recomputes what it needs. A unit is *torch*
if it reads or yields anything but float32 or if it cannot be lowered, *heavy* if it is worth a native segment of its
own (convolutions, matrix products, pooling), else it goes wherever its neighbours are.

A native segment is lowered as a small exported program. Its inputs get symbols of their own: sizes stay as open as
they were in the whole model.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram, default_decompositions
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols
from torch.utils._pytree import TreeSpec, tree_flatten

from .. import runtime
from ..errors import UnsupportedError
from . import passes
from .channels import remove_channels, savings
from .ir import Graph
from .lower import Lowering
from .naming import describe, operator_name
from .segmented import Held, Kind, Segment, Segmented
from .shapes import ShapeDependentError, Symbols

__all__ = ["split"]

_SIZES = {"aten::sym_size", "aten::sym_stride", "aten::sym_numel", "aten::sym_storage_offset"}
_HEAVY = re.compile(r"conv|linear|matmul|einsum|pool|attention|bmm|^(add)?mm$|^(add)?mv$|^dot$|lstm|gru")
_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)


def split(exported: ExportedProgram, out_spec: TreeSpec) -> Segmented:
    """Cuts a model that cannot be lowered as a whole.

    Args:
        exported: Of a model in evaluation mode, on the CPU.
        out_spec: The nesting of the outputs.

    Raises:
        ShapeDependentError: Fixed sizes may help.
        UnsupportedError: The model has a state that a call changes.
    """
    known: dict[Any, Any] = {}
    with torch.inference_mode(False), torch.no_grad():
        while True:
            splitter = _Splitter(exported.run_decompositions(known), known)
            try:
                return splitter.segmented(out_spec)
            except _Decompose as wanted:
                known[wanted.target] = wanted.by


class _Decompose(Exception):
    """This operator is better decomposed."""

    def __init__(self, target: Any, by: Any) -> None:
        super().__init__(target)
        self.target, self.by = target, by


class _Tracked(Lowering):
    """Remembers which fx node it is at."""

    at: fx.Node | None = None

    def _call(self, node: fx.Node) -> None:
        self.at = node
        super()._call(node)
        self.at = None


class _Failure(Exception):
    """These nodes cannot be lowered as one program; `culprit` is to blame, where that is known."""

    def __init__(self, culprit: fx.Node | None, error: UnsupportedError) -> None:
        super().__init__(str(error))
        self.culprit, self.error = culprit, error


@dataclass(eq=False)
class _Unit:
    """A call and the `getitem`s of its results."""

    nodes: list[fx.Node]
    torch: bool = False
    heavy: bool = False
    after: list[_Unit] = field(default_factory=list)  # the units that it reads
    before: list[_Unit] = field(default_factory=list)  # the units that read it

    @property
    def call(self) -> fx.Node:
        return self.nodes[0]


class _Splitter:
    """One functional program on its way."""

    def __init__(self, exported: ExportedProgram, decomposed: dict[Any, Any]) -> None:
        self.exported = exported
        self.decomposed = decomposed
        self.constants: dict[fx.Node, Any] = {}
        self.targets: dict[fx.Node, InputSpec] = {}
        self.inputs: list[fx.Node] = []
        self.sizes: set[fx.Node] = set()
        self.units: dict[fx.Node, _Unit] = {}
        self.order: list[_Unit] = []
        self.refused: dict[fx.Node, str] = {}
        self.lowered: dict[tuple[Any, ...], tuple[Graph, list[fx.Node]]] = {}
        self.dynamic = False
        self._placeholders()
        self._outputs()
        self._walk()

    # ---- what is what

    def _placeholders(self) -> None:
        placeholders = [node for node in self.exported.graph.nodes if node.op == "placeholder"]
        for node, spec in zip(placeholders, self.exported.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                if isinstance(spec.arg, TensorArgument):
                    self.inputs.append(node)
                    self.dynamic |= any(isinstance(size, torch.SymInt) for size in node.meta["val"].shape)
                else:
                    self.constants[node] = getattr(spec.arg, "value", None)
                continue
            state, constants = self.exported.state_dict, self.exported.constants
            found = state[spec.target] if spec.target in state else constants.get(spec.target or "")
            if not isinstance(found, Tensor):
                raise UnsupportedError(f"the model holds {spec.target!r}, which is no tensor but {spec.kind.name}")
            self.constants[node] = found.detach()
            self.targets[node] = spec

    def _outputs(self) -> None:
        self.returned: list[Any] = []
        self.numbers: set[fx.Node] = set()  # sizes that the model returns
        specs = self.exported.graph_signature.output_specs
        for item, spec in zip(self.exported.graph.output_node().args[0], specs, strict=True):  # type: ignore[arg-type]
            if spec.kind is not OutputKind.USER_OUTPUT:
                raise UnsupportedError(f"the forward writes {spec.target!r}; what is converted has no state")
            size = isinstance(item, fx.Node) and isinstance(item.meta.get("val"), _NUMBERS)
            if size and item.op == "call_function":
                with self.exported.graph.inserting_before(self.exported.graph.output_node()):
                    item = self.exported.graph.node_copy(item)  # a value, unlike other sizes
                self.numbers.add(item)
            self.returned.append(item)

    def _walk(self) -> None:
        dead = _dead(self.exported.graph) - self.numbers
        for node in self.exported.graph.nodes:
            if node.op == "get_attr":
                self.constants[node] = operator.attrgetter(node.target)(self.exported.graph_module)
            if node.op != "call_function" or node in dead:
                continue
            reads = node.all_input_nodes
            if all(item in self.constants for item in reads) and _is_pure(node):
                self._fold(node)
            elif node not in self.numbers and isinstance(node.meta.get("val"), _NUMBERS) and self._is_size(node):
                self.sizes.add(node)
            elif node.target is operator.getitem and node.args[0] in self.units:
                unit = self.units[node.args[0]]  # type: ignore[index]
                unit.nodes.append(node)
                self.units[node] = unit
            else:
                self.units[node] = _Unit([node], heavy=bool(_HEAVY.search(operator_name(node).rpartition("::")[2])))
                self.order.append(self.units[node])
        for unit in self.order:
            for item in self._reads(unit.nodes):
                other = self.units.get(item)
                if other is not None and other is not unit and other not in unit.after:
                    unit.after.append(other)
                    other.before.append(unit)
            if unit.call in self.numbers:
                unit.torch = True
            elif why := self._not_float32(unit):
                unit.torch = True
                self.refused[unit.call] = why

    def _is_size(self, node: fx.Node) -> bool:
        if operator_name(node) in _SIZES:
            return not _is_unbacked(node.meta["val"])
        return all(item in self.sizes or item in self.constants for item in node.all_input_nodes)

    def _fold(self, node: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda item: self.constants[item])
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        with torch.inference_mode(False), torch.no_grad():
            self.constants[node] = target(*args, **kwargs)

    def _reads(self, nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
        """The computed values and inputs that nodes read, sizes' tensors among them."""
        for node in nodes:
            for item in node.all_input_nodes:
                if item in self.sizes:
                    yield from self._reads([item])
                elif item not in self.constants:
                    yield item

    def _not_float32(self, unit: _Unit) -> str:
        used = unit.nodes[1:] or unit.nodes
        read = [item for node in unit.nodes for item in node.all_input_nodes if item not in self.constants]
        for node in [*used, *(item for item in read if item not in self.sizes)]:
            value = node.meta.get("val")
            for tensor in value if isinstance(value, tuple | list) else [value]:
                if node is unit.call and len(unit.nodes) > 1:
                    continue
                if isinstance(tensor, Tensor) and tensor.dtype != torch.float32:
                    what = "reads" if node in read else "its result is"
                    return f"{describe(unit.call)}: {what} {tensor.dtype}, only torch.float32 is native"
                if isinstance(tensor, _NUMBERS):
                    return f"{describe(unit.call)}: a number that depends on the data"
                if isinstance(tensor, Tensor) and any(_is_unbacked(size) for size in tensor.shape):
                    return f"{describe(unit.call)}: a shape that depends on the data"
        return ""

    # ---- which segment

    def segmented(self, out_spec: TreeSpec) -> Segmented:
        while True:
            segments = self._assign()
            failed = False
            for native, nodes in segments:
                if native:
                    try:
                        self._lower(nodes)
                    except _Failure as failure:
                        self._blame(nodes, failure)
                        failed = True
            if not failed:
                if not self.refused:  # nothing was asked to be native
                    self._refuse_all()
                return self._build(segments, out_spec)

    def _refuse_all(self) -> None:
        for unit in self.order:
            if unit.call not in self.numbers and (error := self._alone(unit)) is not None:
                self.refused[unit.call] = str(error)

    def _assign(self) -> list[tuple[bool, list[fx.Node]]]:
        """The fewest segments that alternate: `(native, nodes)`, in order."""
        best = min((self._slots(first) for first in (0, 1)), key=lambda slots: len(set(slots.values())))
        groups: dict[int, list[fx.Node]] = {}
        for unit in self.order:
            groups.setdefault(best[unit], []).extend(unit.nodes)
        return [(bool(slot % 2 == 0), groups[slot]) for slot in sorted(groups)]

    def _slots(self, first: int) -> dict[_Unit, int]:
        """The earliest slot of each unit, even ones native; light units wait for a native one if they can."""
        slots: dict[_Unit, int] = {}
        for unit in self.order:
            slot = max((slots[other] for other in unit.after), default=first)
            wanted = 1 if unit.torch else 0 if unit.heavy else slot % 2
            slots[unit] = slot + (slot % 2 != wanted)
        for unit in reversed(self.order):
            if not unit.torch and not unit.heavy and slots[unit] % 2 == 1 and unit.before:
                if min(slots[other] for other in unit.before) > slots[unit]:
                    slots[unit] += 1
        worth = {slots[unit] for unit in self.order if unit.heavy and not unit.torch}
        merged: dict[int, int] = {}  # a native slot without heavy units is torch's; neighbours of one kind are one
        for slot in sorted(set(slots.values())):
            kind = 0 if slot in worth else 1
            last = max(merged.values(), default=None)
            merged[slot] = kind if last is None else last + (last % 2 != kind)
        return {unit: merged[slot] for unit, slot in slots.items()}

    def _blame(self, nodes: list[fx.Node], failure: _Failure) -> None:
        """Marks what makes these nodes fail as torch's; raises where fixed sizes or a decomposition may help."""
        culprit = failure.culprit
        if culprit is None:
            culprit, failure = self._bisect(nodes, failure)
        unit = self.units[culprit]
        if self._alone(unit) is None:  # not it, but what it reads
            light = [other for other in unit.after if other.call in nodes and not other.heavy and not other.torch]
            for other in light or [unit]:
                self._refuse(other, failure.error)
            return
        for other in self.order:
            if other is unit or (other.call.target is culprit.target and not other.torch):
                error = self._alone(other)
                if other is unit or error is not None:
                    self._refuse(other, error or failure.error)

    def _refuse(self, unit: _Unit, why: UnsupportedError) -> None:
        if unit.heavy and self.dynamic and isinstance(why, ShapeDependentError):
            raise why  # better native with fixed sizes than in torch with open ones
        unit.torch = True
        self.refused[unit.call] = str(why)

    def _bisect(self, nodes: list[fx.Node], failure: _Failure) -> tuple[fx.Node, _Failure]:
        """The last node of the shortest failing prefix."""
        units = list(dict.fromkeys(self.units[node] for node in nodes))
        low, high = 0, len(units)  # a prefix of `low` units lowers, one of `high` does not
        while high - low > 1:
            middle = (low + high) // 2
            try:
                self._lower([node for unit in units[:middle] for node in unit.nodes])
                low = middle
            except _Failure as error:
                high, failure = middle, error
        return units[high - 1].call, failure

    def _alone(self, unit: _Unit) -> UnsupportedError | None:
        """Why a unit cannot be lowered even by itself; asks for its decomposition where that can be."""
        try:
            self._lower(unit.nodes)
            return None
        except _Failure as failure:
            target: Any = unit.call.target
            by = None
            if isinstance(target, torch._ops.OpOverload) and target not in self.decomposed:
                by = default_decompositions().get(target)
            if by is not None:
                try:
                    program, _ = self._program(unit.nodes)
                    names = [{"kind": "tensor"} for _ in program.graph_signature.user_outputs]
                    passes.optimize(Lowering(program.run_decompositions({target: by})).run(
                        {"kind": "list", "items": names}))  # fmt: skip
                except UnsupportedError:
                    return failure.error
                raise _Decompose(target, by) from None
            return failure.error

    # ---- native segments

    def _lower(self, nodes: list[fx.Node]) -> tuple[Graph, list[fx.Node]]:
        """The graph of a native segment, and the values that are its inputs."""
        key = tuple(nodes)
        if key not in self.lowered:
            try:
                program, reads = self._program(nodes)
            except UnsupportedError as error:
                raise _Failure(None, error) from error
            outputs = [{"kind": "tensor"} for _ in program.graph_signature.user_outputs]
            lowering = _Tracked(program)
            try:
                graph = passes.optimize(lowering.run({"kind": "list", "items": outputs}))
            except UnsupportedError as error:
                at = lowering.at
                by_name = {node.name: node for node in nodes}
                raise _Failure(by_name.get(at.name) if at is not None else None, error) from error
            self.lowered[key] = graph, reads
        return self.lowered[key]

    def _leaving(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """The nodes that others read, or the model returns."""
        inside, returned = set(nodes), {item for item in self.returned if isinstance(item, fx.Node)}
        alive = self.sizes | set(self.units)

        def is_read(node: fx.Node) -> bool:
            return node in returned or any(user in alive and user not in inside for user in node.users)

        found = [node for node in nodes if not isinstance(node.meta.get("val"), tuple | list) and is_read(node)]
        return found or nodes[-1:]

    def _program(self, nodes: list[fx.Node]) -> tuple[ExportedProgram, list[fx.Node]]:
        """These nodes as an exported program of their own, with fresh symbols for the sizes of its inputs."""
        sub = _Part(self, nodes)
        environment = ShapeEnv()
        mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
        symbols: dict[Any, Any] = {}
        specs: list[InputSpec] = []
        held: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        for node, tensor in sub.constants.items():
            placeholder = sub.graph.placeholder(node.name)
            placeholder.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
            sub.copies[node] = placeholder
            spec = self.targets.get(node)
            kept = spec is not None and spec.target in self.exported.state_dict
            argument = TensorArgument(placeholder.name)
            if spec is not None and kept:
                specs.append(InputSpec(spec.kind, argument, spec.target, spec.persistent))
                is_parameter = spec.kind is InputKind.PARAMETER
                state[spec.target or ""] = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
            else:
                target = f"constant_{placeholder.name}"
                specs.append(InputSpec(InputKind.CONSTANT_TENSOR, argument, target))
                held[target] = tensor
        for node in sub.reads:
            value = node.meta["val"]
            if not isinstance(value, Tensor) or value.dtype != torch.float32:
                what = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise UnsupportedError(f"{describe(node)}: is {what}, only torch.float32 is supported")
            sizes = [_fresh_size(size, environment, symbols) for size in value.shape]
            placeholder = sub.graph.placeholder(node.name)
            with mode:
                placeholder.meta["val"] = torch.empty(sizes, dtype=value.dtype, device="cpu")
            sub.copies[node] = placeholder
            specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(placeholder.name), None))
        sub.copy(mode)
        leaving = self._leaving(nodes)
        sub.graph.output(tuple(sub.copies[node] for node in leaving)).meta["val"] = None
        outs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(sub.copies[node].name), None) for node in leaving]
        in_spec = tree_flatten((tuple(range(len(sub.reads))), {}))[1]
        out_spec = tree_flatten(tuple(range(len(outs))))[1]
        ins: Any = [TensorArgument(sub.copies[node].name) for node in sub.reads]
        signature = ModuleCallSignature(ins, [out.arg for out in outs], in_spec, out_spec)
        program = ExportedProgram(
            root=torch.nn.Module(),
            graph=sub.graph,
            graph_signature=ExportGraphSignature(specs, outs),
            state_dict=state,
            range_constraints={},
            module_call_graph=[ModuleCallEntry("", signature)],
            constants=held,  # type: ignore[arg-type]
            verifiers=self.exported.verifiers,
        )
        return program, sub.reads

    # ---- all together

    def _build(self, segments: list[tuple[bool, list[fx.Node]]], out_spec: TreeSpec) -> Segmented:
        numbers = {node: place for place, node in enumerate(self.inputs)}
        built: list[Segment] = []
        notes: list[str] = []
        saved: list[tuple[Graph, Graph]] = []
        for native, nodes in segments:
            writes = self._leaving(nodes)
            for node in writes:
                numbers[node] = len(numbers)
            if native:
                whole, reads = self._lower(nodes)
                graph = remove_channels(whole)
                saved.append((whole, graph))
                notes += _newly_fixed(graph, reads)
                layers = [node.name for node in graph.nodes if node.weight is not None]
                operators = tuple(layers or (node.op for node in graph.nodes))
                parts: dict[str, Any] = {"graph": graph, "program": runtime.Program(graph.to_bytes())}
                parts["nodes"] = len(graph.nodes)
            else:
                parts, reads = self._torch(nodes, writes)
                calls = [self.units[node].call for node in nodes if self.units[node].call is node]
                operators = tuple(operator_name(node).removeprefix("aten::") for node in calls)
                parts["nodes"] = len(calls)
            kind: Kind = "native" if native else "torch"
            places = tuple(numbers[node] for node in reads)
            built.append(Segment(kind, places, tuple(numbers[node] for node in writes), operators, **parts))
        notes += savings(saved)
        outputs = tuple(
            numbers[item] if item in numbers else Held(self.constants.get(item) if isinstance(item, fx.Node) else item)
            for item in self.returned
        )
        symbols = Symbols()
        inputs = tuple(
            (node.name, symbols.shape(node.name, node.meta["val"].shape), node.meta["val"].dtype)
            for node in self.inputs
        )
        names = [self.refused[unit.call] for unit in self.order if unit.call in self.refused]
        random = any(_is_random(node) for native, nodes in segments for node in nodes if not native)
        return Segmented(
            inputs, _with_frees(built, outputs), outputs, out_spec, tuple(dict.fromkeys(names)), random, tuple(notes)
        )

    def _torch(self, nodes: list[fx.Node], writes: list[fx.Node]) -> tuple[dict[str, Any], list[fx.Node]]:
        sub = _Part(self, nodes)
        for node in sub.reads:
            sub.copies[node] = sub.graph.placeholder(node.name)
        root = torch.nn.Module()
        for node, constant in sub.attributes.items():
            name = f"held_{node.name}"
            if isinstance(constant, Tensor):
                root.register_buffer(name, constant)
            else:
                setattr(root, name, constant)
            sub.copies[node] = sub.graph.get_attr(name)
        sub.copy(None)
        sub.graph.output(tuple(sub.copies[node] for node in writes))
        return {"module": fx.GraphModule(root, sub.graph)}, sub.reads


class _Part:
    """A copy of some of the nodes, on its way: what they read, and the sizes they need."""

    def __init__(self, whole: _Splitter, nodes: list[fx.Node]) -> None:
        self.whole, self.nodes, self.inside = whole, nodes, set(nodes)
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, Any] = {}
        direct = (item for node in nodes for item in node.all_input_nodes)
        self.attributes = {
            item: whole.constants[item]
            for item in dict.fromkeys(direct)
            if isinstance(whole.constants.get(item), Tensor | torch.nn.Module)
        }
        self.constants = {item: value for item, value in self.attributes.items() if isinstance(value, Tensor)}
        outside = (item for node in nodes for item in node.all_input_nodes)
        self.reads = list(
            dict.fromkeys(
                item
                for item in outside
                if item not in self.inside and item not in whole.sizes and item not in whole.constants
            )
        )
        for node in nodes:
            for item in node.all_input_nodes:
                if item in whole.sizes:
                    self._need(item)

    def _need(self, size: fx.Node) -> None:
        """Makes sure that a size can be had from what is read."""
        if _integer(size.meta["val"]) is not None or self._found(size) is not None:
            return
        for item in size.all_input_nodes:
            if item in self.whole.sizes:
                self._need(item)
            elif item not in self.whole.constants and item not in self.inside and item not in self.reads:
                self.reads.append(item)

    def _found(self, size: fx.Node) -> tuple[fx.Node, int] | None:
        """An input of this part with a dimension of this size."""
        value = size.meta["val"]
        if not isinstance(value, torch.SymInt):
            return None
        for node in self.reads:
            for dim, other in enumerate(getattr(node.meta["val"], "shape", ())):
                if isinstance(other, torch.SymInt) and other.node.expr == value.node.expr:
                    return node, dim
        return None

    def copy(self, mode: FakeTensorMode | None) -> None:
        """All nodes; with `mode`, their fake values are computed anew."""
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda item: self._argument(item, mode))
            self.copies[node] = self._call(node, args, kwargs, mode)

    def _argument(self, item: fx.Node, mode: FakeTensorMode | None) -> Any:
        if item in self.copies:
            return self.copies[item]
        if item in self.whole.constants:
            return self.whole.constants[item]
        integer = _integer(item.meta["val"])
        if integer is not None:
            return integer
        found = self._found(item)
        if found is not None:
            node, dim = found
            size = self.graph.call_function(torch.ops.aten.sym_size.int, (self.copies[node], dim))
            if mode is not None:
                size.meta["val"] = self.copies[node].meta["val"].shape[dim]
            self.copies[item] = size
        else:
            args, kwargs = fx.node.map_arg((item.args, dict(item.kwargs)), lambda other: self._argument(other, mode))
            self.copies[item] = self._call(item, args, kwargs, mode)
        return self.copies[item]

    def _call(self, node: fx.Node, args: Any, kwargs: Any, mode: FakeTensorMode | None) -> fx.Node:
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        copied = self.graph.create_node("call_function", target, args, kwargs, name=node.name)
        copied.meta = dict(node.meta)
        if mode is not None:
            args, kwargs = fx.node.map_arg((args, kwargs), lambda item: item.meta["val"])
            try:
                with mode, enable_python_dispatcher(), torch.no_grad():
                    copied.meta["val"] = target(*args, **kwargs)
            except Exception as error:  # torch cannot tell its shape here
                raise UnsupportedError(f"{describe(node)}: {type(error).__name__}: {error}") from error
        return copied


def _newly_fixed(graph: Graph, reads: list[fx.Node]) -> list[str]:
    """Sizes that a segment fixes, although they are open in the whole model."""
    return [
        f"input '{node.name}' of a native segment, dimension {dim}: its operators fix it"
        for item, node in zip(graph.inputs, reads, strict=True)
        for dim, (size, given) in enumerate(zip(item.shape, node.meta["val"].shape, strict=True))
        if isinstance(size, int) and _integer(given) is None
    ]


def _with_frees(segments: list[Segment], outputs: tuple[int | Held, ...]) -> tuple[Segment, ...]:
    needed = {item for item in outputs if isinstance(item, int)}
    result: list[Segment] = []
    for segment in reversed(segments):
        frees = tuple(number for number in {*segment.reads, *segment.writes} if number not in needed)
        needed.update(segment.reads)
        result.append(replace(segment, frees=frees))
    return tuple(reversed(result))


def _fresh_size(size: Any, environment: ShapeEnv, symbols: dict[Any, Any]) -> Any:
    """An integer, or a symbol for each different expression."""
    integer = _integer(size)
    if integer is not None:
        return integer
    expression = size.node.expr
    if expression not in symbols:
        hint = max(int(size.node.hint), 2)  # a size of 1 would be taken for a constant
        source = ConstantSource(f"size{len(symbols)}")
        symbol = environment.create_symbol(
            hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None, do_not_specialize_zero_one=True
        )
        symbols[expression] = environment.create_symintnode(symbol, hint=hint, source=source)
    return symbols[expression]


def _integer(size: Any) -> Any:
    """A number that is not symbolic, else None."""
    if isinstance(size, torch.SymInt):
        return int(size.node.expr) if size.node.expr.is_Integer else None
    return None if isinstance(size, torch.SymFloat | torch.SymBool) else size


def _is_unbacked(size: Any) -> bool:
    return isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) and bool(free_unbacked_symbols(size))


def _is_random(node: fx.Node) -> bool:
    """Whether it draws random numbers; not at evaluation, where an operator is told so."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    given = {argument.name: argument.default_value for argument in node.target._schema.arguments}
    given.update(zip(given, node.args, strict=False))
    given.update(node.kwargs)
    return given.get("dropout_p", 1) != 0 and given.get("training", given.get("train", True)) is not False


def _is_pure(node: fx.Node) -> bool:
    return not _is_random(node) and not isinstance(node.target, torch._ops.HigherOrderOperator)


def _dead(graph: fx.Graph) -> set[fx.Node]:
    """Calls whose results nobody reads; in a functional graph these are assertions and leftovers."""
    dead: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("call_function", "get_attr") and all(user in dead for user in node.users):
            dead.add(node)
    return dead
