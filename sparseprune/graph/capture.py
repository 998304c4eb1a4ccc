"""From a model and an example to a graph, with as many sizes left open as the model allows.

The model is exported with every size dynamic but the channels; where that fails, or where a size takes part in a
decision of the model's own code, with fewer; at last with the example's sizes only.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TextIO, TypeVar

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection, export
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from ..errors import UnsupportedError
from . import passes
from .channels import remove_channels, savings
from .ir import Graph
from .lower import lower
from .segmented import Segmented
from .segments import split
from .shapes import ShapeDependentError, static
from .snapshot import snapshot

__all__ = [
    "Captured",
    "CapturedSegments",
    "ExportError",
    "capture",
    "capture_segments",
    "check_inputs",
    "leaf_names",
    "quiet",
    "unwrap",
]

_TORCH = str(Path(torch.__file__).parent) + os.sep
_OPEN_SECONDS = 60.0  # of this thread's time, for an export with open sizes
_Place = tuple[int, int]  # (which leaf of args, which dimension)
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Captured:
    """A captured model.

    Attributes:
        graph: Its inputs are the tensor leaves of `args`, in order.
        in_spec: The nesting of `args`, a `torch.utils._pytree` spec.
        out_spec: The nesting of what the model returns; leaves are tensors and None.
        constants: Leaves of `args` that are no tensors, by place among all leaves: the graph holds for these only.
        notes: Sizes that had to be fixed, and why; channels that were removed.
    """

    graph: Graph
    in_spec: TreeSpec
    out_spec: TreeSpec
    constants: dict[int, object]
    notes: tuple[str, ...]


def capture(model: nn.Module, args: tuple[Any, ...], *, optimize: bool = True) -> Captured:
    """Exports `model` as it computes in evaluation mode; neither its tensors nor its flags nor its hooks are touched.

    Args:
        model: Any module; masks of `torch.nn.utils.prune` and parametrizations are applied to the captured weights.
        args: The positional arguments of an example call; tensors float32, nested in any pytree.
        optimize: Fold and fuse (`passes.optimize`) and remove channels (`remove_channels`); without, the graph is as
            the model wrote it, and has no bytes.

    Raises:
        TypeError: `model` is no module, or `args` no tuple.
        ValueError: `args` holds no tensor, or one without elements.
        UnsupportedError: An operator, dtype or output that a program cannot have; the message names it and its layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(args, tuple):
        raise TypeError(f"args: expected a tuple of positional arguments, got {type(args).__name__}; for one x: (x,)")
    leaves, in_spec = tree_flatten(args)
    names = leaf_names(args)
    _check_leaves(names, leaves)
    frozen = snapshot(unwrap(model))
    _check_parameters(frozen)
    device = next((tensor.device for tensor in frozen.parameters()), torch.device("cpu"))
    # detach makes each leaf an object of its own, also where one tensor is passed twice.
    leaves = [leaf.detach().to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    found = _first_success(frozen, leaves, in_spec, _lower)
    shapes = [item.shape for item in found.result.inputs]
    notes, graph = tuple(_notes(names, shapes, leaves, found)), found.result
    if optimize:
        whole = passes.optimize(graph)
        graph = remove_channels(whole)
        notes += savings([(whole, graph)])
    return Captured(graph, in_spec, found.out_spec, _constants(leaves), notes)


@dataclass(frozen=True, eq=False)
class CapturedSegments:
    """A captured model that is not wholly native; `in_spec` and `constants` as those of `Captured`."""

    segmented: Segmented
    in_spec: TreeSpec
    constants: dict[int, object]
    notes: tuple[str, ...]


def capture_segments(model: nn.Module, args: tuple[Any, ...], why: str) -> CapturedSegments:
    """Exports a model that `capture` refused, and cuts it into native and torch segments.

    `why` is what `capture` said: the reason where no operator is one, but the outputs are.

    Raises:
        ExportError: It cannot be exported either.
        UnsupportedError: A dtype, or an output, that no segment can have, or a state that calls change.
    """
    leaves, in_spec = tree_flatten(args)
    names = leaf_names(args)
    _check_leaves(names, leaves, integers=True)
    frozen = snapshot(unwrap(model), own=True).cpu()
    _check_parameters(frozen)
    leaves = [leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    found = _first_success(frozen, leaves, in_spec, split)
    notes = _notes(names, [shape for _, shape, _ in found.result.inputs], leaves, found)
    segmented = found.result if found.result.refused else replace(found.result, refused=(why,))
    return CapturedSegments(segmented, in_spec, _constants(leaves), (*notes, *segmented.notes))


def check_inputs(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Raises `UnsupportedError` for parameters and inputs that are not float32, but integers; or that hold no data."""
    _check_parameters(unwrap(model))
    for name, leaf in zip(leaf_names(args), tree_flatten(args)[0], strict=True):
        if isinstance(leaf, Tensor):
            _check_leaf(name, leaf, integers=True)


def leaf_names(args: tuple[Any, ...]) -> list[str]:
    """`inputs[0]`, `inputs[1]['image']`, …: how a call's arguments are called in errors, by place among all leaves."""
    try:
        return [f"inputs{keystr(path)}" for path, _ in tree_flatten_with_path(args)[0]]
    except ValueError:  # some container has no names for its parts
        return [f"inputs, leaf {place}" for place in range(len(tree_flatten(args)[0]))]


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedError(f"parameter '{name}' is on the meta device: it has no values to convert")
        if (parameter.is_floating_point() or parameter.is_complex()) and parameter.dtype != torch.float32:
            raise UnsupportedError(f"parameter '{name}' is {parameter.dtype}, only torch.float32 is supported")


def _constants(leaves: list[Any]) -> dict[int, object]:
    return {place: leaf for place, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and data parallel wrappers."""
    if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        return unwrap(inner)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrap(model.module)
    return model


def _check_leaves(names: list[str], leaves: list[Any], integers: bool = False) -> None:
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        kinds = ", ".join(dict.fromkeys(type(leaf).__name__ for leaf in leaves))
        raise ValueError(f"inputs: expected at least one torch.Tensor, got {kinds or 'none'}")
    for name, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, Tensor):
            _check_leaf(name, leaf, integers)
            if leaf.numel() == 0:
                raise ValueError(f"{name}: expected elements, got shape {tuple(leaf.shape)}")


def _check_leaf(name: str, leaf: Tensor, integers: bool) -> None:
    if leaf.dtype != torch.float32 and not (integers and not leaf.is_floating_point() and not leaf.is_complex()):
        raise UnsupportedError(f"{name}: is {leaf.dtype}, only torch.float32 is supported")
    if leaf.is_meta:
        raise UnsupportedError(f"{name}: is on the meta device, expected a tensor with values")


class _PinnedError(Exception):
    """Export succeeded, but holds for the example's size of these dimensions only."""

    def __init__(self, reasons: dict[_Place, str]) -> None:
        super().__init__(str(reasons))
        self.reasons = reasons


@dataclass(frozen=True)
class _Found(Generic[_T]):
    result: _T
    out_spec: TreeSpec
    dynamic: set[_Place]
    fixed: dict[_Place, str]


_Finish = Callable[[ExportedProgram, TreeSpec], _T]


def _first_success(model: nn.Module, leaves: list[Any], in_spec: TreeSpec, finish: _Finish[_T]) -> _Found[_T]:
    """Tries with ever fewer dynamic sizes; `finish` makes what is wanted of an export and its outputs' nesting."""
    places = [(place, dim) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)
              for dim in range(leaf.ndim) if dim != 1]  # fmt: skip
    plans = [places, [(place, dim) for place, dim in places if dim == 0], []]
    fixed: dict[_Place, str] = {}
    last: Exception | None = None
    while plans:
        dynamic = {place for place in plans[0] if place not in fixed}
        try:
            result, out_spec = _attempt(model, leaves, in_spec, dynamic, finish)
        except _PinnedError as error:
            fixed |= error.reasons
            continue
        except (ShapeDependentError, ExportError) as error:
            last = error
            for place in set(plans.pop(0)) - set(plans[0] if plans else ()):
                fixed.setdefault(place, "the model cannot be captured with it open")
            while plans and dynamic == {place for place in plans[0] if place not in fixed}:
                plans.pop(0)  # nothing new to try
            continue
        return _Found(result, out_spec, dynamic, fixed)
    assert last is not None
    raise last


def _notes(names: list[str], shapes: Iterable[Sequence[int | str]], leaves: list[Any], found: _Found[Any]) -> list[str]:
    """Why sizes are fixed, those that export fixed unasked included (`max_pool1d` does so, and a size of 1)."""
    tensors = (place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    fixed = dict(found.fixed)
    for place, shape in zip(tensors, shapes, strict=True):
        for dim, size in enumerate(shape):
            if isinstance(size, int) and (place, dim) in found.dynamic:
                fixed[place, dim] = "torch.export fixes it"
    return [f"{names[place]}, dimension {dim}: {why}" for (place, dim), why in sorted(fixed.items())]


class ExportError(UnsupportedError):
    """`torch.export` could not follow the model's code."""


def _attempt(
    model: nn.Module, leaves: list[Any], in_spec: TreeSpec, dynamic: set[_Place], finish: _Finish[_T]
) -> tuple[_T, TreeSpec]:
    # Export takes a size of 1 for a constant: a batch of one is shown to it twice.
    doubled = {place for place, dim in dynamic if dim == 0 and leaves[place].shape[0] == 1}
    example = [torch.cat([leaf, leaf]) if place in doubled else leaf for place, leaf in enumerate(leaves)]
    try:
        watch = _Watch(_OPEN_SECONDS if dynamic else None, padding=finish is _lower)
        with quiet(), torch.inference_mode(False), torch.no_grad(), watch:
            shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]  # by tensor: forward may take *args
            for place, leaf in enumerate(example):
                if isinstance(leaf, Tensor):
                    dims = range(leaf.ndim)
                    shapes[leaf] = {dim: Dim.AUTO if (place, dim) in dynamic else Dim.STATIC for dim in dims}
            exported = export(model, tree_unflatten(example, in_spec), dynamic_shapes=shapes, strict=False)
    except ShapeDependentError:
        raise
    except Exception as error:  # export raises what the model's own code raises, too
        text = str(error).strip().split("\n\n")[0]
        where = _where(error)
        raise ExportError(f"torch.export could not capture the model{where}: {type(error).__name__}: {text}") from error
    if pinned := _pinned(exported, doubled):
        raise _PinnedError(pinned)
    out_spec = exported.call_spec.out_spec
    if out_spec is None:
        raise UnsupportedError("torch.export did not record how the outputs are nested")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, when it copies its own tree specs to decompose
        return finish(exported, out_spec), out_spec


def _where(error: Exception) -> str:
    """The line of the model's code that raised; empty where it was none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        watching = frame.filename == __file__ and frame.name == "__torch_function__"  # _Watch, called from a line
        if not frame.filename.startswith((_TORCH, "<")) and not watching:
            at = f" at {os.path.basename(frame.filename)}:{frame.lineno}"
            return "" if frame.filename == __file__ else at + (f" (`{frame.line}`)" if frame.line else "")
    return ""


class _Watch(TorchFunctionMode):
    """Gives up an export with open sizes that leads nowhere.

    Where windows are cut from images of any size, formulas of quotients and remainders grow, and torch reasons about
    them for many minutes. What would come of it: padding by such a formula, which no program has (`padding` stops
    there), or nothing in `seconds`.
    """

    def __init__(self, seconds: float | None, padding: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds, self.padding, self.start = seconds, padding, time.thread_time()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.seconds is not None and time.thread_time() - self.start > self.seconds:
            raise ShapeDependentError(f"torch.export took longer than {self.seconds:g} s with open sizes")
        if self.padding and func in (nn.functional.pad, torch._C._nn.pad):
            sides = kwargs["pad"] if "pad" in kwargs else args[1]
            if any(isinstance(side, torch.SymInt) and static(side) is None for side in sides):
                raise ShapeDependentError(f"pad: the padding {tuple(sides)} depends on the inputs' sizes")
        return func(*args, **kwargs)


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's log of everything that it has traced, where it fails; the error has the reason."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    logger.addFilter(_above_warning)
    try:
        with redirect_stderr(_WithoutGraphs(sys.stderr)):
            yield
    finally:
        logger.removeFilter(_above_warning)


def _above_warning(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING


class _WithoutGraphs(io.TextIOBase):
    """Passes everything on but the graphs that torch.export prints when it fails, each with its newline."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.after_graph = False

    def write(self, text: str) -> int:
        newline = self.after_graph and text == "\n"
        self.after_graph = text.lstrip().startswith("def forward(self, arg")
        return len(text) if newline or self.after_graph else self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


def _lower(exported: ExportedProgram, out_spec: TreeSpec) -> Graph:
    return lower(exported, _output_tree(exported, out_spec))


def _pinned(exported: ExportedProgram, doubled: set[int]) -> dict[_Place, str]:
    """The dimensions whose size the model's own code asked about, and doubled batches that export fixed."""
    asked = dict(_user_guards(exported))
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    specs = exported.graph_signature.input_specs
    users = [node for node, spec in zip(placeholders, specs, strict=True) if spec.kind is InputKind.USER_INPUT]
    pinned: dict[_Place, str] = {}
    for place, node in enumerate(users):
        shape = node.meta["val"].shape if isinstance(node.meta["val"], Tensor) else ()
        for dim, size in enumerate(shape):
            if isinstance(size, torch.SymInt) and not size.node.expr.is_Integer:
                reasons = [asked[symbol] for symbol in size.node.expr.free_symbols if symbol in asked]
                if reasons:
                    pinned[place, dim] = f"the model's code depends on it: {reasons[0]}"
            elif dim == 0 and place in doubled:
                pinned[place, dim] = "the model fixes it"
    return pinned


def _user_guards(exported: ExportedProgram) -> Iterator[tuple[Any, str]]:
    """Symbols in conditions that come from code outside torch (`if x.shape[2] > 64`), and where.

    torch's own conditions (a window fits, a layout is contiguous) do not change what is computed; a condition of the
    model's code chose between two computations, and only one of them was recorded.
    """
    for node in exported.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            environment = mode.shape_env
            break
    else:
        return
    for guard in environment.guards:
        frame = getattr(getattr(guard, "sloc", None), "framework_loc", None)
        filename = getattr(frame, "filename", "")
        if filename.startswith(_TORCH):
            continue
        # An equality that export took into account (`assert h == w`) simplifies to True and binds nothing more.
        for symbol in getattr(environment.simplify(guard.expr), "free_symbols", ()):
            yield symbol, f"{guard.expr} ({filename or 'unknown file'}:{getattr(frame, 'lineno', '?')})"


def _output_tree(exported: ExportedProgram, out_spec: TreeSpec) -> dict[str, Any]:
    specs = [spec for spec in exported.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    return _tree(tree_unflatten([spec.arg for spec in specs], out_spec), "output")


def _tree(item: object, path: str) -> dict[str, Any]:
    """`docs/program.md`'s tree of a nest of torch.export's argument descriptions."""
    if isinstance(item, TensorArgument):
        return {"kind": "tensor"}
    if item is None or (isinstance(item, ConstantArgument) and item.value is None):
        return {"kind": "none"}
    if type(item) in (dict, OrderedDict) and all(isinstance(key, str) for key in item):  # type: ignore[attr-defined]
        assert isinstance(item, dict)
        items = [_tree(value, f"{path}[{key!r}]") for key, value in item.items()]
        return {"kind": "dict", "keys": list(item), "items": items}
    if type(item) in (list, tuple):
        assert isinstance(item, list | tuple)
        return {"kind": type(item).__name__, "items": [_tree(value, f"{path}[{i}]") for i, value in enumerate(item)]}
    found = f"the constant {item.value!r}" if isinstance(item, ConstantArgument) else f"a {type(item).__name__}"
    raise UnsupportedError(f"{path}: {found}; a model may return tensors and None in dicts (of str), lists and tuples")
