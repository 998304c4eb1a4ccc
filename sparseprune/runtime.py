"""Load and run a program with NumPy alone: this module, and what it imports, never imports torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _native

__all__ = ["Program", "load"]

Array = NDArray[np.float32]
_MOST_PLANS = 64  # Python-side references to plans; the native cache behind keeps the latest 16


class Program:
    """A program ready to run on NumPy arrays. Safe to call from many threads at once.

    Example:
        >>> program = sparseprune.runtime.load("model.spr")
        >>> y = program(x)  # x: float32, C-contiguous, (N, 3, 32, 32)
    """

    def __init__(self, data: bytes) -> None:
        """`data`: a program's bytes (`docs/program.md`). Raises `FormatError` where they are anything else."""
        self._native = _native.Program(data)
        self._data = data
        self._tree: dict[str, Any] = json.loads(self._native.tree)
        self._plans: dict[tuple[Any, ...], _native.Plan] = {}

    @property
    def inputs(self) -> list[tuple[str, tuple[int | str, ...]]]:
        """Each input's name and shape; a size is an integer (fixed) or a name (any; equal names are equal sizes)."""
        return self._native.inputs

    @property
    def data(self) -> bytes:
        """The program's bytes, as saved: with what tuning has chosen so far."""
        return _with_tuned(self._data, self._native.tuned)

    def plan(self, *shapes: tuple[int, ...]) -> _native.Plan:
        """The plan for these input shapes and the present thread count: made at first use, never tuned here."""
        key = (shapes, _native.num_threads())
        plan = self._plans.get(key)
        if plan is None:
            plan = self._native.plan(list(shapes))
            while len(self._plans) >= _MOST_PLANS:
                self._plans.pop(next(iter(self._plans)), None)
            self._plans[key] = plan
        return plan

    def tune(
        self, shapes: list[tuple[int, ...]], budget_seconds: float, min_gain: float = 1.0, progress: Any = None
    ) -> list[_native.TunedDict]:
        """Times every layer's variants inside the running network and keeps the fastest for these shapes.

        A sparse variant must be `min_gain` times as fast as the dense one, where that is timed too.
        `progress(done, total)` is called between rounds; returning False stops early, with the best so far.
        """
        tuned = self._native.tune(shapes, budget_seconds, min_gain, progress)
        self._plans.clear()
        return tuned

    def set_choices(self, shapes: list[tuple[int, ...]], choices: Sequence[_native.ChoiceDict | None]) -> None:
        """Fixes what each layer runs as for these shapes, as another plan's `choices` say."""
        self._native.set_choices(shapes, list(choices))
        self._plans.clear()

    def __call__(self, *inputs: Array) -> Any:
        """Runs the program.

        Args:
            inputs: float32 arrays, in the order of `inputs`; copied where they are not C-contiguous.

        Returns:
            Fresh arrays, nested as the model nested its outputs.

        Raises:
            TypeError: An input is no array, or not float32.
            ValueError: The number or the shapes of the inputs do not fit.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(f"inputs: expected {len(self.inputs)}, got {len(inputs)}")
        arrays = [_float32(x, name) for x, (name, _) in zip(inputs, self.inputs, strict=True)]
        return nest(self._tree, iter(self.run(arrays)))

    def run(self, arrays: list[Array]) -> list[Array]:
        """The flat form of a call: contiguous float32 arrays in, a list of fresh ones out."""
        plan = self.plan(*(a.shape for a in arrays))
        outputs = [np.empty(shape, np.float32) for shape in plan.output_shapes]
        plan.run(arrays, outputs)
        return outputs

    def describe(self) -> dict[str, Any]:
        """What is in it: `inputs` [{name, shape}], `layers` [{name, op, shape, …}], `nbytes`, `isa`, `threads`."""
        return {
            "inputs": [{"name": name, "shape": list(shape)} for name, shape in self.inputs],
            "layers": [dict(layer) for layer in self._native.layers],
            "nbytes": len(self._data),
            "isa": _native.isa(),
            "threads": _native.num_threads(),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return (Program, (self.data,))


def load(path: str | os.PathLike[str]) -> Program:
    """Reads a program that `SparseModule.save` wrote. Torch is not needed.

    Raises:
        FileNotFoundError: There is no such file.
        FormatError: It is no program, or a damaged one.

    Example:
        >>> program = sparseprune.runtime.load("model.spr")
        >>> logits = program(images)
    """
    with open(path, "rb") as file:
        return Program(file.read())


def nest(tree: Mapping[str, Any], leaves: Iterator[Any]) -> Any:
    """Puts flat outputs back into the nesting that a program's `tree` describes."""
    kind = tree["kind"]
    if kind == "tensor":
        return next(leaves)
    if kind == "none":
        return None
    items = [nest(item, leaves) for item in tree["items"]]
    if kind == "dict":
        return dict(zip(tree["keys"], items, strict=True))
    return tuple(items) if kind == "tuple" else items


_Tuned = Sequence[tuple[str, list[list[int]], Sequence["_native.ChoiceDict | None"]]]


def _with_tuned(data: bytes, tuned: _Tuned) -> bytes:
    """The same program with these choices in its graph; the payload stays as it is."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    graph = json.loads(header["__metadata__"]["sparseprune"])
    graph["tuned"] = [
        {"isa": isa, "shapes": shapes, "choices": [c and [c["form"], c["kind"], c["vectors"]] for c in choices]}
        for isa, shapes, choices in tuned
    ]
    header["__metadata__"]["sparseprune"] = json.dumps(graph)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the payload
    return len(text).to_bytes(8, "little") + text + data[end:]


def _float32(x: Any, name: str) -> Array:
    if not isinstance(x, np.ndarray):
        raise TypeError(f"input {name!r}: expected a numpy.ndarray, got {type(x).__name__}")
    if x.dtype != np.float32:
        raise TypeError(f"input {name!r}: expected dtype float32, got {x.dtype}")
    return np.require(x, requirements=["C", "A"])
