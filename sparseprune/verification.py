"""Comparing a program with float64: what `convert(verify=True)` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import runtime
from .errors import VerificationError
from .graph.ir import Graph, Input
from .graph.reference import run_reference

__all__ = ["RELATIVE_TOLERANCE", "Verification", "verify_layers", "verify_outputs", "verify_program"]

RELATIVE_TOLERANCE = 1e-3  # of the largest output


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        layer_errors: Largest |y - y64| of each weighted layer on its own float32 input, in order.
        max_error: Largest |y - y64| of the program's outputs against the model run in float64.
        allowed: The bound at that output.
    """

    layer_errors: tuple[float, ...]
    max_error: float
    allowed: float


def verify_program(
    graph: Graph, program: runtime.Program, model: nn.Module, args: tuple[Any, ...], inputs: list[Tensor]
) -> Verification:
    """Checks `program` on example inputs, twice.

    Every operator, with the kernels that the program has chosen, against float64 on the very float32 input that it saw:
    |y - y64| <= (kept + 4) eps (sum |w x| + |b| + |r|) for linear parts; activations and pooling add at most their own
    rounding. And the program's outputs against `model`, run in float64: |y - y64| <= 1e-3 max |y64|. (The rigorous
    bound of a whole network grows with its depth until it says nothing, so the first check is the strict one, the
    second catches a wrong capture.)

    Raises:
        VerificationError: Beyond a bound; the message names the layer or output.
    """
    values = _all_values(graph, program, inputs)
    layer_errors = _check_layers(graph, values)
    outputs = [values[number] for number in graph.outputs]
    return _check_outputs(outputs, model, args, layer_errors)


def verify_layers(graph: Graph, program: runtime.Program, inputs: list[Tensor]) -> tuple[float, ...]:
    """The first half of `verify_program`: every operator on its own input. Returns the weighted layers' errors."""
    return _check_layers(graph, _all_values(graph, program, inputs))


def verify_outputs(outputs: Any, fresh: Callable[[], nn.Module], args: tuple[Any, ...]) -> tuple[float, float, str]:
    """Compares nested outputs of any dtypes with the model's: in float64, and where that does not do, in float32.

    A model that decides by its data (sorts, picks, branches) may decide otherwise in float64, and one that makes
    float32 tensors may not run in it; so outputs that are those of the float32 model within the same bound are right,
    too. Integers have to be equal.

    Args:
        outputs: As computed from `args`.
        fresh: Makes a copy of the model, on the CPU.

    Returns:
        The largest error, what was allowed there, and a note where it was not float64 that was compared with.

    Raises:
        VerificationError: Neither fits; the message is that of the comparison with float64 where there was one.
    """
    first: Exception
    try:
        return (*_compare(outputs, _run(fresh().double(), args, double=True)), "")
    except Exception as error:  # the model's own code may raise anything
        first = error
    try:
        found = _compare(outputs, _run(fresh(), args, double=False))
    except VerificationError as error:
        raise (first if isinstance(first, VerificationError) else error) from None
    why = str(first).strip().split("\n")[0]
    return (*found, f"outputs were compared with the float32 model, not float64: {type(first).__name__}: {why}")


def _run(model: nn.Module, args: tuple[Any, ...], double: bool) -> Any:
    def converted(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        a = a.detach().cpu().clone()
        return a.double() if double and a.is_floating_point() else a

    with torch.no_grad():
        return model(*tree_map(converted, args))


def _compare(outputs: Any, expected: Any) -> tuple[float, float]:
    worst = (0.0, 0.0)
    ours, theirs = tree_leaves(outputs), tree_leaves(expected)
    if [isinstance(y, Tensor) for y in ours] != [isinstance(y, Tensor) for y in theirs]:
        raise VerificationError(f"outputs: {len(ours)} of another nesting than the model's {len(theirs)}")
    for place, (y, want) in enumerate(zip(ours, theirs, strict=True)):
        if not isinstance(y, Tensor):
            if isinstance(y, int | str) and y != want:
                raise VerificationError(f"output {place}: {y!r}, the model's is {want!r}")
            continue
        if y.shape != want.shape:
            raise VerificationError(f"output {place}: shape {tuple(y.shape)}, the model's is {tuple(want.shape)}")
        if y.is_complex():
            y, want = torch.view_as_real(y), torch.view_as_real(want.resolve_conj())
        if not y.is_floating_point():
            if not torch.equal(y, want):
                raise VerificationError(f"output {place}: {int((y != want).sum())} of {y.numel()} {y.dtype} differ")
            continue
        y64 = want.double()
        worst = max(worst, _check(f"output {place}", y, y64, torch.full_like(y64, _allowed(y64))))
    return worst


def _allowed(y64: Tensor) -> float:
    finite = y64[torch.isfinite(y64)]
    smallest = torch.finfo(torch.float32).smallest_normal  # below it numbers lose their digits
    return RELATIVE_TOLERANCE * (float(finite.abs().max()) if finite.numel() else 0.0) + 4 * smallest


def _all_values(graph: Graph, program: runtime.Program, inputs: list[Tensor]) -> list[Tensor]:
    """Every value of a run: the same nodes with the same choices, all of them outputs."""
    first = len(graph.inputs)
    numbers = tuple(range(first, first + len(graph.nodes)))
    tree = {"kind": "list", "items": [{"kind": "tensor"}] * len(numbers)}
    inside = runtime.Program(replace(graph, outputs=numbers, tree=tree).to_bytes())
    shapes = [tuple(x.shape) for x in inputs]
    inside.set_choices(shapes, program.plan(*shapes).choices)
    arrays = [x.contiguous().numpy() for x in inputs]
    return [*inputs, *(torch.from_numpy(y) for y in inside.run(arrays))]


def _check_layers(graph: Graph, values: list[Tensor]) -> tuple[float, ...]:
    errors = []
    sizes = {
        name: int(size)
        for spec, x in zip(graph.inputs, values[: len(graph.inputs)], strict=True)
        for name, size in zip(spec.shape, x.shape, strict=True)
        if isinstance(name, str)
    }
    for place, node in enumerate(graph.nodes):
        node = replace(node, attrs={key: _sized(value, sizes) for key, value in node.attrs.items()})
        operands = [values[number] for number in node.inputs]
        single = Graph(
            inputs=tuple(Input(f"x{i}", tuple(x.shape)) for i, x in enumerate(operands)),
            nodes=(replace(node, inputs=tuple(range(len(operands)))),),
            outputs=(len(operands),),
            tree={"kind": "tensor"},
            weights=graph.weights,
            biases=graph.biases,
        )
        (expected,), (bound,) = run_reference(single, operands, bounds=True)
        error = _check(f"layer {node.name!r} ({node.op})", values[len(graph.inputs) + place], expected, bound)
        if node.weight is not None:
            errors.append(error[0])
    return tuple(errors)


def _sized(value: Any, sizes: dict[str, int]) -> Any:
    """An attribute without names of sizes: a node by itself does not know the program's inputs."""
    return (
        [sizes.get(item, item) if isinstance(item, str) else item for item in value]
        if isinstance(value, list)
        else value
    )


def _check_outputs(
    outputs: list[Tensor], model: nn.Module, args: tuple[Any, ...], layer_errors: tuple[float, ...]
) -> Verification:
    with torch.no_grad():
        double = tree_map(lambda a: a.detach().cpu().double() if isinstance(a, Tensor) else a, args)
        expected = [y for y in tree_leaves(model.cpu().double()(*double)) if isinstance(y, Tensor)]
    worst = (0.0, 0.0)
    for place, (y, y64) in enumerate(zip(outputs, expected, strict=True)):
        found = _check(f"output {place}", y, y64, torch.full_like(y64, _allowed(y64)))
        worst = max(worst, found)
    return Verification(layer_errors, *worst)


def _check(what: str, y: Tensor, y64: Tensor, bound: Tensor) -> tuple[float, float]:
    """The largest finite error and the bound there. Where float64 is NaN or Inf, nothing is asked."""
    finite = torch.isfinite(y64) & torch.isfinite(bound)
    error = torch.where(finite, (y.double() - y64).abs().nan_to_num(nan=torch.inf), torch.zeros_like(y64))
    beyond = (error > bound) & finite
    if beyond.any():
        place = int(torch.where(beyond, error, torch.full_like(error, -1)).argmax())
        raise VerificationError(
            f"{what}: {int(beyond.sum())} of {error.numel()} elements differ from float64 by more than allowed; "
            f"the worst by {float(error.flatten()[place]):.3g}, allowed {float(bound.flatten()[place]):.3g}"
        )
    if error.numel() == 0:
        return 0.0, 0.0
    place = int(error.argmax())
    return float(error.flatten()[place]), float(bound.flatten()[place])
