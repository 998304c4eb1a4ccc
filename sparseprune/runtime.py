"""Load and run a program with NumPy alone: this module, and what it imports, never imports torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _native
from .container import Tuned, with_tuned

__all__ = ["Program", "load"]

Array = NDArray[np.float32]
_DLPACK_CPU = 1  # kDLCPU
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
        return with_tuned(self._data, self._native.tuned)

    def plan(self, *shapes: tuple[int, ...]) -> _native.Plan:
        """The plan for these input shapes and the present thread count: made at first use, never tuned here."""
        key = (shapes, _native.num_threads())
        plan = self._plans.get(key)
        if plan is None:
            plan = self._native.plan(list(shapes))
            known = list(self._plans.copy())  # at once: other threads change it, which an iterator would raise at
            for oldest in known[: max(0, len(known) - _MOST_PLANS + 1)]:
                self._plans.pop(oldest, None)
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

    def __call__(self, *inputs: Any) -> Any:
        """Runs the program.

        Args:
            inputs: float32 NumPy arrays, or arrays on the CPU of any library that has `__dlpack__`, in the order of
                `inputs`; copied only where they are not C-contiguous.

        Returns:
            Fresh NumPy arrays, nested as the model nested its outputs. They have `__dlpack__` in their turn.

        Raises:
            TypeError: An input is no array, or not float32.
            ValueError: The number, the shapes or the device of the inputs do not fit.

        Example:
            >>> y = torch.from_dlpack(program(torch.randn(1, 3, 32, 32)))
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
        """What is in it, and how it runs here.

        Returns:
            `inputs` [{name, shape}], `layers` [{name, op, shape, total, kept, stored, …}], `nbytes`, `isa`, `threads`,
            and `planning`: plans are never stored, so this line says what is planned anew and whose tuning is used.
        """
        isa, threads = _native.isa(), _native.num_threads()
        return {
            "inputs": [{"name": name, "shape": list(shape)} for name, shape in self.inputs],
            "layers": [dict(layer) for layer in self._native.layers],
            "nbytes": len(self._data),
            "isa": isa,
            "threads": threads,
            "planning": _planning(isa, threads, self._native.tuned),
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


def _planning(isa: str, threads: int, tuned: Tuned) -> str:
    """What is planned anew here, in one line."""
    here = f"planned anew for {isa}, {threads} thread{'s' if threads != 1 else ''}"
    measured = [(name, count) for name, _, choices, count in tuned if any(choices)]
    if not measured:
        return f"{here}: the file holds no tuning, every layer runs as its default"
    if not any(name == isa for name, _ in measured):
        names = ", ".join(dict.fromkeys(name for name, _ in measured))
        return f"{here}: the file was tuned on {names}, so every layer runs as its default here"
    counts = [count for name, count in measured if name == isa and count]
    if counts and threads not in counts:
        return f"{here}: the file was tuned with {', '.join(map(str, dict.fromkeys(counts)))}; its choices are kept"
    return f"{here}, with the file's tuning"


def _float32(x: Any, name: str) -> Array:
    if not isinstance(x, np.ndarray):
        x = _from_dlpack(x, name)
    if x.dtype != np.float32:
        raise TypeError(f"input {name!r}: expected dtype float32, got {x.dtype}")
    return np.require(x, requirements=["C", "A"])


def _from_dlpack(x: Any, name: str) -> NDArray[Any]:
    """The memory of another library's array, without a copy."""
    if not (hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__")):
        raise TypeError(f"input {name!r}: expected a numpy.ndarray or an array with __dlpack__, got {type(x).__name__}")
    device, number = x.__dlpack_device__()
    if device != _DLPACK_CPU:
        raise ValueError(f"input {name!r}: expected an array on the CPU, got one on DLPack device ({device}, {number})")
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError) as error:  # what it is differs between the libraries
        raise TypeError(f"input {name!r}: this {type(x).__name__} cannot be shared through DLPack: {error}") from error
