"""SparseModule: a converted model, used like the torch module that it came from."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from . import runtime
from .container import with_half_weights
from .errors import SparsepruneError
from .graph.segmented import Segmented, check_sizes
from .report import Report

__all__ = ["SparseModule", "load"]


class Converted:
    """What a conversion yields; `SparseModule` runs it."""

    def __init__(
        self,
        runs: runtime.Program | Segmented | nn.Module,
        in_spec: TreeSpec | None = None,
        constants: dict[int, object] | None = None,
        report: Report | None = None,
        dense: Callable[..., Any] | None = None,
    ) -> None:
        self.runs = runs  # a module: the model with sparse layers in it
        self.in_spec = in_spec  # None: the inputs are the tensors themselves
        self.constants = constants or {}
        self.report = report
        self.dense = dense  # what runs instead, where it was faster

    @property
    def program(self) -> runtime.Program:
        """The one program, where that is all."""
        if isinstance(self.runs, runtime.Program):
            return self.runs
        if isinstance(self.runs, Segmented):
            raise SparsepruneError(f"the model is not one native program; in the way: {'; '.join(self.runs.refused)}")
        notes = self.report.notes[0] if self.report is not None else "it could not be exported"
        raise SparsepruneError(f"the model is not one native program; {notes}")

    @cached_property
    def inputs(self) -> list[tuple[str, tuple[int | str, ...], torch.dtype]]:
        """Name, shape and dtype of each tensor that a call takes; what a module takes is not known."""
        if isinstance(self.runs, Segmented):
            return list(self.runs.inputs)
        program = self.runs if isinstance(self.runs, runtime.Program) else None
        return [(name, shape, torch.float32) for name, shape in program.inputs] if program is not None else []


class SparseModule(nn.Module):
    """An eval-mode module that runs a native program: one native call per inference. Made by `sparseprune.convert`.

    A model that is not wholly native runs in segments, native and torch by turns, or with sparse layers in torch;
    `report` says which.

    Outputs are fresh tensors and carry no gradient. Safe to call from many threads at once. It has no parameters: the
    weights were snapshot when the model was converted. NaN and Inf in an input propagate through kept weights; a pruned
    weight may ignore them.
    """

    def __init__(
        self, converted: Converted | None, convert: Callable[[tuple[Any, ...]], Converted] | None = None
    ) -> None:
        """For `sparseprune.convert`: either what it made, or what makes it at the first call."""
        super().__init__()
        self._converted = converted
        self._convert = convert
        self._lock = threading.Lock()
        super().train(False)

    @property
    def report(self) -> Report:
        """What was done and why: `str(report)` is a table; `.layers`, `.to_dict()`.

        Raises:
            SparsepruneError: Nothing is converted yet, or the program was loaded from a file, which carries no report.
        """
        converted = self._ready()
        if converted.report is None:
            raise SparsepruneError("a loaded program carries no report; `sparseprune inspect FILE` shows what is in it")
        return converted.report

    @property
    def program(self) -> runtime.Program:
        """The native program behind.

        Raises:
            SparsepruneError: Nothing is converted yet, or the model is not one native program.
        """
        return self._ready().program

    def train(self, mode: bool = True) -> SparseModule:
        if mode:
            raise SparsepruneError("a converted model cannot be trained: train the original model and convert it again")
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program on CPU tensors, nested and of the dtypes as in the example inputs.

        Raises:
            TypeError: Keyword arguments (a model with swapped layers takes them), another nesting, or another dtype.
            ValueError: A shape, device or constant that does not fit.
        """
        swapped = self._converted is not None and isinstance(self._converted.runs, nn.Module)
        if kwargs and not swapped:
            raise TypeError(
                f"keyword arguments are not supported by a converted model: {', '.join(kwargs)}; pass them by position"
            )
        converted = self._converted or self._convert_now(args)
        if isinstance(converted.runs, nn.Module):
            with torch.no_grad():
                return (converted.dense or converted.runs)(*args, **kwargs)
        leaves = self._leaves(converted, args)
        if converted.dense is not None:
            check_sizes(leaves, converted.inputs)  # whatever runs here, it takes what the program would
            with torch.no_grad():  # not inference_mode: its tensors cannot take part in a gradient later
                return converted.dense(*args)
        if isinstance(converted.runs, Segmented):
            return converted.runs.run(leaves)
        return self._run(converted.runs, leaves)

    def warmup(self, *inputs: Any) -> SparseModule:
        """Plans and tunes for the shapes of these inputs, then runs once: later calls of them are at full speed."""
        converted = self._converted or self._convert_now(inputs)
        from .conversion import tune_program

        if isinstance(converted.runs, runtime.Program):
            leaves = self._leaves(converted, inputs)
            tune_program(converted.runs, [tuple(x.shape) for x in leaves])
        elif isinstance(converted.runs, Segmented):
            for program, shapes in converted.runs.shapes(self._leaves(converted, inputs)):
                tune_program(program, shapes)
        self(*inputs)
        return self

    def save(self, path: str | os.PathLike[str], *, weights: str = "float32") -> None:
        """Writes the program as one `.spr` file: the non-zeros, the graph, no pickle. It is written beside and renamed.

        Args:
            path: where to, usually `*.spr`.
            weights: "float32", or "float16": every weight rounded once, to the nearest, so that a kept one takes 3
                bytes instead of 5. Computing stays float32, biases are not rounded, this module keeps its own weights.

        Raises:
            SparsepruneError: Nothing is converted yet, or parts run in torch; the message names their operators.
            ValueError: `weights` is neither, or a weight is beyond float16's range.

        Example:
            >>> fast.save("model.spr", weights="float16")
        """
        if weights not in ("float32", "float16"):
            raise ValueError(f"weights: expected 'float32' or 'float16', got {weights!r}")
        if self._converted is None:
            raise SparsepruneError(
                "nothing is converted yet: call the module once, or give convert example_inputs, before save"
            )
        try:
            data = self._converted.program.data
        except SparsepruneError as error:
            raise SparsepruneError(f"cannot be saved: {error}") from None
        write_beside(path, with_half_weights(data) if weights == "float16" else data)

    def extra_repr(self) -> str:
        if self._converted is None:
            return "converts at the first call"
        if isinstance(self._converted.runs, nn.Module):
            return f"{type(self._converted.runs).__name__} with sparse layers"
        parts = [f"{name}: {shape}" for name, shape, _ in self._converted.inputs]
        if isinstance(self._converted.runs, Segmented):
            parts.append("segments: " + " ".join(segment.kind for segment in self._converted.runs.segments))
        return ", ".join(parts)

    def _ready(self) -> Converted:
        if self._converted is None:
            raise SparsepruneError("nothing is converted yet: call the module once, or give convert example_inputs")
        return self._converted

    def _convert_now(self, args: tuple[Any, ...]) -> Converted:
        with self._lock:
            if self._converted is None:
                assert self._convert is not None
                self._converted = self._convert(args)
                self._convert = None  # lets go of the model
            return self._converted

    def _leaves(self, converted: Converted, args: tuple[Any, ...]) -> list[Tensor]:
        leaves: list[Any] = list(args)
        expected = converted.inputs
        if not (len(args) == len(expected) == 1 and isinstance(args[0], Tensor) and not converted.constants):
            leaves, spec = tree_flatten(args)
            if converted.in_spec is not None and spec != converted.in_spec:
                example = _example(converted.in_spec)
                leaves = _matched(example, args, "inputs", converted.constants)
            for place, constant in converted.constants.items():
                if type(leaves[place]) is not type(constant) or leaves[place] != constant:
                    raise ValueError(
                        f"{_leaf_name(converted.in_spec, place)}: was {constant!r} at conversion, which fixed it; "
                        f"got {leaves[place]!r}"
                    )
            leaves = [leaf for place, leaf in enumerate(leaves) if place not in converted.constants]
        if len(leaves) != len(expected):
            raise TypeError(f"inputs: expected {len(expected)} tensors, got {len(leaves)}")
        for leaf, (name, shape, dtype) in zip(leaves, expected, strict=True):
            _check_input(leaf, name, shape, dtype)
        return leaves

    def _run(self, program: runtime.Program, leaves: list[Tensor]) -> Any:
        plan = program.plan(*(tuple(x.shape) for x in leaves))
        inputs = [x.detach().contiguous().numpy() for x in leaves]
        outputs = [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in plan.output_shapes]
        plan.run(inputs, [y.numpy() for y in outputs])
        return runtime.nest(program._tree, iter(outputs))

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseModule:
        return SparseModule(self._converted, self._convert)  # the program is immutable

    def __reduce__(self) -> tuple[Any, ...]:
        raise SparsepruneError("a SparseModule is not pickled: use .save(path) and sparseprune.load(path)")


def load(path: str | os.PathLike[str]) -> SparseModule:
    """Loads a program that `SparseModule.save` wrote, as a torch module; `sparseprune.runtime.load` needs NumPy alone.

    Raises:
        FileNotFoundError: There is no such file.
        FormatError: It is no program, or a damaged one.

    Example:
        >>> fast = sparseprune.load("model.spr")
        >>> y = fast(x)
    """
    return SparseModule(Converted(runtime.load(path)))


def write_beside(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file whole or not at all: into a temporary one in the same directory, which then takes the name."""
    target = os.fspath(path)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target) or ".", prefix=os.path.basename(target) + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _check_input(x: Any, name: str, shape: tuple[int | str, ...], dtype: torch.dtype) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"input {name!r}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype != dtype:
        raise TypeError(f"input {name!r}: expected dtype {str(dtype).removeprefix('torch.')}, got {x.dtype}")
    if x.device.type != "cpu":
        raise ValueError(f"input {name!r}: expected a tensor on the CPU, got one on {x.device}")
    if x.dim() != len(shape):
        raise ValueError(f"input {name!r}: expected {len(shape)} dimensions {shape}, got shape {tuple(x.shape)}")


def _example(spec: TreeSpec) -> Any:
    """Arguments of this nesting, each leaf its place among all."""
    return tree_unflatten(list(range(spec.num_leaves)), spec)


def _leaf_name(spec: TreeSpec | None, place: int) -> str:
    from .graph.capture import leaf_names

    return f"inputs, leaf {place}" if spec is None else leaf_names(_example(spec))[place]


def _matched(example: Any, given: Any, name: str, constants: dict[int, object]) -> list[Any]:
    """The leaves of `given` in the order of `example`, whose own leaves are their places; a dict may have any order."""
    got = f"a {type(given).__name__}"
    if isinstance(example, dict):
        if type(given) is not type(example) or given.keys() != example.keys():
            got = f"the keys {list(given)}" if isinstance(given, dict) else got
            raise TypeError(f"{name}: expected a {type(example).__name__} with the keys {list(example)}, got {got}")
        parts = [(item, given[key], f"{name}[{key!r}]") for key, item in example.items()]
    elif isinstance(example, list | tuple):
        if type(given) is not type(example):
            raise TypeError(f"{name}: expected a {type(example).__name__} of {len(example)}, got {got}")
        if len(given) != len(example):
            what = "positional argument(s)" if name == "inputs" else "item(s)"
            raise TypeError(f"{name}: expected {len(example)} {what}, got {len(given)}")
        parts = [(item, given[place], f"{name}[{place}]") for place, item in enumerate(example)]
    elif isinstance(example, int):
        if tree_flatten(given)[1] != tree_flatten(example)[1]:
            wanted = repr(constants[example]) if example in constants else "a torch.Tensor"
            raise TypeError(f"{name}: expected {wanted}, got {got}")
        return [given]
    else:  # some other container
        if tree_flatten(given)[1] != tree_flatten(example)[1]:
            raise TypeError(f"{name}: expected a {type(example).__name__}, nested as at conversion, got {got}")
        return tree_leaves(given)
    return [leaf for part in parts for leaf in _matched(*part, constants)]
