"""The front door: `convert(model)`."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from . import _native, runtime
from .errors import VerificationError
from .graph.capture import Captured, capture
from .graph.ir import Graph
from .graph.reference import run_reference
from .graph.snapshot import snapshot
from .module import Converted, SparseModule
from .report import LayerReport, Report

__all__ = ["convert", "tune_program"]

TUNE_SECONDS = 8.0  # budget of one shape's tuning
RELATIVE_TOLERANCE = 1e-3  # of the largest output: what verify allows where the rounding bound is looser
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)


def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    tune: Literal["measure", "fixed"] = "measure",
    min_gain: float = 1.05,
    verify: bool = True,
) -> SparseModule:
    """Turns a pruned model into a native program that computes the same numbers, several times faster.

    Takes plain zeros, `torch.nn.utils.prune` hooks and parametrized masks as they are. The weights are snapshot; `model` is
    left untouched, and what is converted is its evaluation mode.

    Args:
        model: Any module whose operators are in `docs/program.md`.
        example_inputs: The positional arguments of a typical call: a float32 tensor or a tuple. The batch and image sizes may
            differ later where the model allows it; the given ones are tuned. None: the first call's inputs are used.
        tune: `measure` times every layer's variants inside the running network, then the whole program against dense torch (eager and
            channels_last); whatever loses is not used. `fixed` takes the default of every layer, deterministically, and times nothing.
        min_gain: A sparse layer must be this much faster than its dense variant, and the program than dense torch, to be used.
        verify: Compare with float64 on the examples.

    Returns:
        A `SparseModule`; `.report` says what was done and why.

    Raises:
        UnsupportedError: The model holds an operator that is not known; the message names it and its layer.
        VerificationError: Outputs differ from float64 by more than the rounding bound (`graph.reference.run_reference`) and more
            than 1e-3 of the largest output.
        TypeError, ValueError: Arguments that do not fit.

    Example:
        >>> fast = sparseprune.convert(model, torch.randn(1, 3, 224, 224))
        >>> y = fast(x)
        >>> fast.save("model.spr")
    """
    if isinstance(model, SparseModule):
        raise TypeError("model: is converted already")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if tune not in ("measure", "fixed"):
        raise ValueError(f"tune={tune!r}: expected 'measure' or 'fixed'")
    if not min_gain > 0:
        raise ValueError(f"min_gain={min_gain} must be positive")
    _native.isa()  # a SPARSEPRUNE_ISA that cannot be had is an error now, not later
    if example_inputs is None:
        frozen = snapshot(model)  # the weights as they are now, whatever happens to the model before the first call
        return SparseModule(None, lambda args: _convert(frozen, args, tune, min_gain, verify))
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    return SparseModule(_convert(model, args, tune, min_gain, verify))


def _convert(model: nn.Module, args: tuple[Any, ...], tune: str, min_gain: float, verify: bool) -> Converted:
    captured = capture(model, args)
    program = runtime.Program(captured.graph.to_bytes())
    inputs = _tensor_leaves(args)
    shapes = [tuple(x.shape) for x in inputs]
    tuned = tune_program(program, shapes, min_gain) if tune == "measure" else []
    plan = program.plan(*shapes)
    report = Report(
        layers=_layers(program, plan, {t["node"]: t for t in tuned}),
        runs="sparse",
        reason="tune='fixed': nothing was timed",
        input_shapes=tuple(shapes),
        threads=plan.threads,
        isa=plan.isa,
        torch=torch.__version__,
        notes=captured.notes,
    )
    if verify:
        report = _verify(report, captured.graph, program, snapshot(model), args, inputs)
    converted = Converted(program, captured.in_spec, captured.constants, report)
    if tune == "measure":
        _race(converted, snapshot(model), args, min_gain)
    return converted


def tune_program(program: runtime.Program, shapes: list[tuple[int, ...]], min_gain: float = 1.05) -> list[_native.TunedDict]:
    """Tunes a program for these input shapes; shows progress where it takes longer than two seconds."""
    from tqdm import tqdm

    bar = tqdm(total=0, desc="tuning", unit="round", leave=False, delay=2, disable=not sys.stderr.isatty())

    def progress(done: int, total: int) -> bool:
        bar.total = total
        bar.update(done - bar.n)
        return True

    with bar:
        return program.tune(shapes, TUNE_SECONDS, min_gain, progress)


def _tensor_leaves(args: tuple[Any, ...]) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf.detach().cpu() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]


# ---- the report's layers ----


def _layers(program: runtime.Program, plan: _native.Plan, tuned: dict[int, _native.TunedDict]) -> tuple[LayerReport, ...]:
    layers = []
    for node, (layer, choice) in enumerate(zip(program.describe()["layers"], plan.choices, strict=True)):
        if choice is None:
            continue
        timed = tuned.get(node)
        dense = timed["dense_seconds"] if timed else None
        layers.append(
            LayerReport(
                name=layer["name"],
                op=layer["op"],
                shape=tuple(layer["shape"]),
                sparsity=1 - layer["kept"] / layer["total"],
                block_density=layer["block_density"],
                dense_ms=None if dense is None else 1e3 * dense,
                sparse_ms=1e3 * timed["seconds"] if timed else None,
                choice=f"{choice['form']}/{choice['kind']}/{choice['vectors']}",
                reason=f"fastest of {timed['candidates']} timed" if timed else "default for its shape",
                error=None,
            )
        )
    return tuple(layers)


# ---- verification ----


def _verify(
    report: Report, graph: Graph, program: runtime.Program, model: nn.Module, args: tuple[Any, ...], inputs: list[Tensor]
) -> Report:
    from torch.utils._pytree import tree_leaves, tree_map

    with torch.no_grad():
        double = tree_map(lambda a: a.detach().cpu().double() if isinstance(a, Tensor) else a, args)
        expected = [y for y in tree_leaves(model.cpu().double()(*double)) if isinstance(y, Tensor)]
    # every layer's output as an output of its own: the same plan, seen from inside
    nodes = [number + len(graph.inputs) for number, node in enumerate(graph.nodes) if node.weight is not None]
    inside = Graph(graph.inputs, graph.nodes, (*graph.outputs, *nodes), _flat_tree(len(graph.outputs) + len(nodes)), graph.weights, graph.biases)
    reference, bounds = run_reference(inside, inputs, bounds=True)
    actual = program.run([np.ascontiguousarray(x.numpy()) for x in inputs])
    worst, allowed = 0.0, 0.0
    for index, (y, y64, bound) in enumerate(zip(actual, expected, bounds, strict=False)):
        error = (torch.from_numpy(y).double() - y64).abs()
        finite = torch.isfinite(y64)
        limit = torch.maximum(bound, RELATIVE_TOLERANCE * y64[finite].abs().max() if finite.any() else bound)
        beyond = (error > limit) & finite
        if beyond.any() or not bool(torch.isfinite(torch.from_numpy(y))[finite].all()):
            place = int((error - limit).masked_fill(~finite, -torch.inf).argmax())
            raise VerificationError(
                f"output {index}: {int(beyond.sum())} of {error.numel()} elements differ from float64 by more than allowed; the worst by "
                f"{float(error.flatten()[place]):.3g}, allowed {float(limit.flatten()[place]):.3g}"
            )
        if error.numel() and finite.any() and float(error[finite].max()) >= worst:
            place = int(error.masked_fill(~finite, -1).argmax())
            worst, allowed = float(error.flatten()[place]), float(limit.flatten()[place])
    errors = _layer_errors(inside, inputs, reference, len(graph.outputs))
    layers = tuple(replace(layer, error=error) for layer, error in zip(report.layers, errors, strict=True))
    return replace(report, layers=layers, max_error=worst, bound=allowed)


def _flat_tree(count: int) -> dict[str, Any]:
    return {"kind": "list", "items": [{"kind": "tensor"}] * count}


def _layer_errors(inside: Graph, inputs: list[Tensor], reference: list[Tensor], skip: int) -> list[float]:
    outputs = runtime.Program(inside.to_bytes()).run([np.ascontiguousarray(x.numpy()) for x in inputs])
    return [
        float((torch.from_numpy(y).double() - y64).abs().nan_to_num().max())
        for y, y64 in zip(outputs[skip:], reference[skip:], strict=True)
    ]


# ---- the whole program against dense torch ----


def _race(converted: Converted, model: nn.Module, args: tuple[Any, ...], min_gain: float) -> None:
    """Times the program and dense torch in turns; the report gets each layer's dense time, and what runs."""
    assert converted.report is not None
    ours = SparseModule(converted)
    eager, last = _LayerTimer(model), _LayerTimer(_channels_last(model))
    args_last = _channels_last_args(args)
    calls: dict[str, Callable[[], Any]] = {
        "sparse": lambda: ours(*args),
        "eager": lambda: eager.module(*args),
        "channels_last": lambda: last.module(*args_last),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(converted.report.threads)
    try:
        with torch.inference_mode():
            times = _take_turns(calls)
            dense_layers = _fastest_layers([eager.times(*args), last.times(*args_last)])
    finally:
        torch.set_num_threads(threads)
    converted.report = _with_times(converted.report, times, dense_layers, min_gain)
    runs = converted.report.runs
    if runs != "sparse":
        module, memory = (eager.module, None) if runs == "eager" else (last.module, torch.channels_last)
        converted.dense = _DenseCall(module, memory)


def _take_turns(calls: dict[str, Callable[[], Any]], blocks: int = 4, seconds: float = 0.12) -> dict[str, float]:
    """Median milliseconds of each call, in short blocks by turns, with a pause for the other's spinning threads to stop."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(blocks):
        for name, call in calls.items():
            time.sleep(0.005)
            call()
            call()
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or not samples[name]:
                start = time.perf_counter()
                call()
                samples[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(taken) for name, taken in samples.items()}


class _LayerTimer:
    """A dense model whose convolutions and linear layers can be timed inside the running network."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def times(self, *args: Any, runs: int = 5) -> dict[str, float]:
        """Fastest seconds of each layer that is called once a run."""
        best: dict[str, float] = {}
        calls: dict[str, int] = {}
        started: dict[str, float] = {}
        hooks = []

        def before(name: str) -> Callable[..., None]:
            return lambda *_: started.__setitem__(name, time.perf_counter())

        def after(name: str) -> Callable[..., None]:
            def note(*_: Any) -> None:
                taken = time.perf_counter() - started[name]
                best[name] = min(best.get(name, taken), taken)
                calls[name] = calls.get(name, 0) + 1

            return note

        for name, layer in self.module.named_modules():
            if isinstance(layer, _LAYERS):
                hooks += [layer.register_forward_pre_hook(before(name)), layer.register_forward_hook(after(name))]
        try:
            for _ in range(runs):
                self.module(*args)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: seconds for name, seconds in best.items() if calls[name] == runs}


class _DenseCall:
    def __init__(self, module: nn.Module, memory: torch.memory_format | None) -> None:
        self.module, self.memory = module, memory

    def __call__(self, *args: Any) -> Any:
        return self.module(*(args if self.memory is None else _channels_last_args(args)))


def _channels_last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _channels_last_args(args: tuple[Any, ...]) -> tuple[Any, ...]:
    from torch.utils._pytree import tree_map

    def last(a: Any) -> Any:
        return a.contiguous(memory_format=torch.channels_last) if isinstance(a, Tensor) and a.dim() == 4 else a

    return tuple(tree_map(last, args))


def _fastest_layers(timings: list[dict[str, float]]) -> dict[str, float]:
    names = set().union(*timings)
    return {name: min(t[name] for t in timings if name in t) for name in names}


def _with_times(report: Report, times: dict[str, float], dense: dict[str, float], min_gain: float) -> Report:
    layers = []
    for layer in report.layers:
        known = [ms for ms in (layer.dense_ms, 1e3 * dense[layer.name] if layer.name in dense else None) if ms is not None]
        fastest = min(known, default=None)
        reason = layer.reason
        if fastest is not None and layer.sparse_ms is not None and layer.sparse_ms > fastest and "/dense/" not in layer.choice:
            reason += "; torch's dense layer alone is faster, but would leave the program"
        layers.append(replace(layer, dense_ms=fastest, reason=reason))
    best = min(("eager", "channels_last"), key=lambda name: times[name])
    gain = times[best] / times["sparse"]
    runs = "sparse" if gain >= min_gain else best
    reason = f"{gain:.2f} times the fastest of eager and channels_last torch; min_gain is {min_gain}"
    return replace(report, layers=tuple(layers), times_ms=times, runs=runs, reason=reason)

