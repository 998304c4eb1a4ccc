"""Comparing a program with float64: what `convert(verify=True)` does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import runtime
from .errors import VerificationError
from .graph.ir import Graph, Input
from .graph.reference import run_reference

__all__ = ["RELATIVE_TOLERANCE", "Verification", "verify_program"]

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
    for place, node in enumerate(graph.nodes):
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


def _check_outputs(
    outputs: list[Tensor], model: nn.Module, args: tuple[Any, ...], layer_errors: tuple[float, ...]
) -> Verification:
    with torch.no_grad():
        double = tree_map(lambda a: a.detach().cpu().double() if isinstance(a, Tensor) else a, args)
        expected = [y for y in tree_leaves(model.cpu().double()(*double)) if isinstance(y, Tensor)]
    worst = (0.0, 0.0)
    for place, (y, y64) in enumerate(zip(outputs, expected, strict=True)):
        finite = y64[torch.isfinite(y64)]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        found = _check(f"output {place}", y, y64, torch.full_like(y64, RELATIVE_TOLERANCE * largest))
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
