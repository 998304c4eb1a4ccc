"""How a model that is not wholly native runs: native and torch segments by turns. `segments.py` makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec, tree_unflatten

from .. import runtime
from .ir import Graph

__all__ = ["Held", "Kind", "Segment", "Segmented", "check_sizes"]

Kind = Literal["native", "torch"]


@dataclass(frozen=True)
class Held:
    """A constant that a model returns: a tensor, a number, None."""

    value: Any


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of a model; values are numbered, the model's inputs first.

    Attributes:
        kind: What runs it.
        reads, writes: The values that it takes and gives, in order.
        frees: The values that nobody reads later.
        nodes: How many operators it has.
        operators: What it consists of: native operators or layers, or torch's operators with their layers.
        graph, program: Of a native segment.
        module: Of a torch segment.
    """

    kind: Kind
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    operators: tuple[str, ...]
    graph: Graph | None = None
    program: runtime.Program | None = None
    module: fx.GraphModule | None = None
    frees: tuple[int, ...] = ()
    nodes: int = 0

    def __call__(self, values: Sequence[Any]) -> Sequence[Any]:
        if self.program is None:
            assert self.module is not None
            return self.module(*values)  # type: ignore[no-any-return]
        inputs = [x.detach().contiguous() for x in values]
        plan = self.program.plan(*(tuple(x.shape) for x in inputs))
        outputs = [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in plan.output_shapes]
        plan.run([x.numpy() for x in inputs], [y.numpy() for y in outputs])
        return outputs


@dataclass(frozen=True, eq=False)
class Segmented:
    """A model as alternating segments; safe to run from many threads at once.

    Attributes:
        inputs: Name, shape (sizes by name are open, equal names are equal sizes) and dtype of each input.
        segments: In order.
        outputs: The numbers of the values that the model returns, and constants.
        out_spec: Their nesting.
        refused: Every operator that is in the way of one program, with its layer and the reason.
        random: Whether some operator draws random numbers.
        notes: What else is worth knowing.
    """

    inputs: tuple[tuple[str, tuple[int | str, ...], torch.dtype], ...]
    segments: tuple[Segment, ...]
    outputs: tuple[int | Held, ...]
    out_spec: TreeSpec
    refused: tuple[str, ...]
    random: bool = False
    notes: tuple[str, ...] = ()

    def run(self, leaves: Sequence[Tensor], observe: Callable[[int, Sequence[Any], float], None] | None = None) -> Any:
        """Runs all segments; returns fresh tensors, nested. `observe` is told each segment's inputs and seconds."""
        return tree_unflatten(self.flat(leaves, observe), self.out_spec)

    def flat(
        self, leaves: Sequence[Tensor], observe: Callable[[int, Sequence[Any], float], None] | None = None
    ) -> list[Any]:
        check_sizes(leaves, self.inputs)
        values: dict[int, Any] = {place: x.detach().contiguous() for place, x in enumerate(leaves)}
        with torch.no_grad():
            for place, segment in enumerate(self.segments):
                reads = [values[number] for number in segment.reads]
                start = perf_counter()
                written = segment(reads)
                if observe is not None:
                    observe(place, reads, perf_counter() - start)
                values.update(zip(segment.writes, written, strict=True))
                for number in segment.frees:
                    values.pop(number, None)
            return self._fresh(values, leaves)

    def shapes(self, leaves: Sequence[Tensor]) -> list[tuple[runtime.Program, list[tuple[int, ...]]]]:
        """Every native segment's program with the shapes of its inputs in a run."""
        seen: list[tuple[runtime.Program, list[tuple[int, ...]]]] = []

        def note(place: int, reads: Sequence[Any], _: float) -> None:
            program = self.segments[place].program
            if program is not None:
                seen.append((program, [tuple(x.shape) for x in reads]))

        self.flat(leaves, note)
        return seen

    def _fresh(self, values: dict[int, Any], leaves: Sequence[Tensor]) -> list[Any]:
        """The outputs: none of them in memory of an input, of a constant or of another output."""
        taken = {x.untyped_storage().data_ptr() for x in leaves} | self._constants
        outputs: list[Any] = []
        for item in self.outputs:
            y = item.value if isinstance(item, Held) else values[item]
            if isinstance(y, Tensor):
                if y.untyped_storage().data_ptr() in taken:
                    y = y.clone()
                taken.add(y.untyped_storage().data_ptr())
            outputs.append(y)
        return outputs

    @cached_property
    def _constants(self) -> set[int]:
        tensors = (item.value for item in self.outputs if isinstance(item, Held) and isinstance(item.value, Tensor))
        held = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        for segment in self.segments:
            if segment.module is not None:
                held.update(buffer.untyped_storage().data_ptr() for buffer in segment.module.buffers())
        return held


def check_sizes(leaves: Sequence[Tensor], inputs: Sequence[tuple[str, tuple[int | str, ...], torch.dtype]]) -> None:
    """Raises `ValueError` unless these tensors, of the right ranks, have the sizes that `inputs` ask for."""
    sizes: dict[str, tuple[int, str]] = {}
    for x, (name, shape, _) in zip(leaves, inputs, strict=True):
        for dim, (size, expected) in enumerate(zip(x.shape, shape, strict=True)):
            if size == 0:
                raise ValueError(f"input {name!r}: extent 0 of {tuple(x.shape)} is not supported")
            if isinstance(expected, int):
                want, where = expected, ""
            else:
                want, where = sizes.setdefault(expected, (size, f", as {name!r} has in dimension {dim}"))
            if size != want:
                raise ValueError(
                    f"input {name!r}: expected size {want} in dimension {dim}{where}, got {tuple(x.shape)}"
                )
