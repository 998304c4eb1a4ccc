"""The front door: `convert(model)`."""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import _native, runtime
from .cuda_layers import built as cuda_built
from .errors import SparsepruneWarning, UnsupportedError
from .graph.capture import CapturedSegments, ExportError, capture, capture_segments, check_inputs, unwrap
from .graph.segmented import Segment
from .graph.snapshot import snapshot
from .module import Converted, SparseModule
from .report import LayerReport, Report, SegmentReport
from .swapping import Swapped, swap_layers
from .verification import verify_layers, verify_outputs, verify_program

__all__ = ["convert", "tune_program"]

TUNE_SECONDS = 3.0  # budget of one shape's tuning
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_PLAIN = (Tensor, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    tune: Literal["measure", "fixed"] = "measure",
    min_gain: float = 1.05,
    verify: bool = True,
) -> SparseModule:
    """Turns a pruned model into a native program that computes the same numbers, several times faster.

    A model with operators that a program does not have runs in as few alternating native and torch segments as it
    can (`.report.segments`); one that `torch.export` cannot follow (control flow that depends on the data) gets its
    layers swapped for sparse ones (`sparseprune.nn`). Either gives one `SparsepruneWarning` that says why, takes and
    returns any nesting, integers among the tensors too, and cannot be saved.

    A model on a CUDA device, where the CUDA kernels are built, gets sparse layers where they are faster there and is
    replayed as a CUDA graph (`docs/cuda.md`); it may be float16 or bfloat16, and cannot be saved. Where they are not
    built, it becomes a program for the CPU.

    Takes plain zeros, `torch.nn.utils.prune` hooks and parametrized masks as they are. The weights are snapshot;
    `model` is left untouched, and what is converted is its evaluation mode.

    Args:
        model: Any float32 module; it is one program if its operators are in `docs/operators.md`.
        example_inputs: The positional arguments of a typical call: a float32 tensor or a tuple. The batch and image
            sizes may differ later where the model allows it; the given ones are tuned. None: the first call's inputs.
        tune: `measure` times every layer's variants inside the running network, for about three seconds at most, then
            the whole program against dense torch (eager and channels_last); whatever loses is not used. `fixed` takes
            the default of every layer, deterministically, and times nothing.
        min_gain: A sparse layer must be this much faster than its dense variant, and the program than dense torch, to
            be used.
        verify: Compare with float64 on the examples: every layer within its rounding bound, the outputs within 1e-3
            of the largest (see `sparseprune.verification`).

    Returns:
        A `SparseModule`; `.report` says what was done and why.

    Raises:
        UnsupportedError: A dtype or device that cannot be had, or the model itself fails on the example.
        VerificationError: A layer or an output is beyond its bound.
        TypeError, ValueError: Arguments that do not fit.

    Example:
        >>> fast = sparseprune.convert(model, torch.randn(1, 3, 224, 224))
        >>> y = fast(x)
        >>> fast.save("model.spr")

        >>> fast = sparseprune.convert(detector, ({"image": image, "size": size},))  # sorts its boxes: a warning
        >>> [segment.kind for segment in fast.report.segments]
        ['native', 'torch']
    """
    if isinstance(model, SparseModule):
        raise TypeError("model: is converted already")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if tune not in ("measure", "fixed"):
        raise ValueError(f"tune={tune!r}: expected 'measure' or 'fixed'")
    if not isinstance(min_gain, int | float):
        raise TypeError(f"min_gain: expected a number, got {type(min_gain).__name__}")
    if not min_gain > 0:
        raise ValueError(f"min_gain={min_gain} must be positive")
    _native.isa()  # a SPARSEPRUNE_ISA that cannot be had is an error now, not later
    if example_inputs is None:
        frozen = snapshot(model, own=True)  # as it is now, whatever happens to it before the first call
        return SparseModule(None, lambda args: _convert(frozen, args, tune, min_gain, verify))
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    return SparseModule(_convert(model, args, tune, min_gain, verify))


def _convert(model: nn.Module, args: tuple[Any, ...], tune: str, min_gain: float, verify: bool) -> Converted:
    device = next((p.device for p in model.parameters() if p.is_cuda), None)
    if device is not None and cuda_built():
        from .cuda_conversion import convert_on_device

        return convert_on_device(model, args, tune, min_gain, verify, device)
    check_inputs(model, args)
    try:
        captured = capture(model, args)
    except ExportError as error:
        return _convert_layers(model, args, tune, min_gain, verify, error)
    except UnsupportedError as refused:
        try:
            segments = capture_segments(model, args, str(refused))
        except UnsupportedError as error:
            return _convert_layers(model, args, tune, min_gain, verify, error)
        return _convert_segments(model, segments, args, tune, min_gain, verify)
    except ValueError as error:
        if all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(args)):
            raise
        return _convert_layers(model, args, tune, min_gain, verify, error)
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
        found = verify_program(captured.graph, program, snapshot(model), args, inputs)
        layers = tuple(
            replace(layer, error=error) for layer, error in zip(report.layers, found.layer_errors, strict=True)
        )
        report = replace(report, layers=layers, max_error=found.max_error, bound=found.allowed)
    converted = Converted(program, captured.in_spec, captured.constants, report)
    if tune == "measure":
        _race(converted, snapshot(model, own=True), args, min_gain)
    return converted


def _convert_segments(
    model: nn.Module, captured: CapturedSegments, args: tuple[Any, ...], tune: str, min_gain: float, verify: bool
) -> Converted:
    segmented = captured.segmented
    natives = sum(segment.kind == "native" for segment in segmented.segments)
    parts = f"is not one native program but {len(segmented.segments)} segments, {natives} of them native"
    _warn(
        f"the model {parts if natives else 'has no native part, it runs in torch'}; in the way: "
        + "; ".join(_few(segmented.refused, 8))
    )
    inputs = _tensor_leaves(args)
    seen: dict[int, Sequence[Any]] = {}
    segmented.flat(inputs, lambda place, reads, _: seen.__setitem__(place, reads))
    layers: tuple[LayerReport, ...] = ()
    for place, segment in enumerate(segmented.segments):
        if segment.program is not None and segment.graph is not None:
            program, reads = segment.program, [x.contiguous() for x in seen[place]]
            shapes = [tuple(x.shape) for x in reads]
            tuned = tune_program(program, shapes, min_gain, TUNE_SECONDS / natives) if tune == "measure" else []
            found = _layers(program, program.plan(*shapes), {t["node"]: t for t in tuned})
            if verify:
                errors = verify_layers(segment.graph, program, reads)
                found = tuple(replace(layer, error=error) for layer, error in zip(found, errors, strict=True))
            layers += found
    seconds = _segment_seconds(segmented.flat, inputs) if tune == "measure" else {}
    report = Report(
        layers=layers,
        runs="sparse",
        reason="tune='fixed': nothing was timed",
        input_shapes=tuple(tuple(x.shape) for x in inputs),
        threads=_native.num_threads(),
        isa=_native.isa(),
        torch=torch.__version__,
        notes=captured.notes,
        segments=tuple(
            _segment(segment, seconds[place] / sum(seconds.values()) if seconds else None)
            for place, segment in enumerate(segmented.segments)
        ),
    )
    converted = Converted(segmented, captured.in_spec, captured.constants, report)
    if verify and segmented.random:
        _note(converted, "the model draws random numbers: its outputs were not verified")
    elif verify:
        _verify_outputs(converted, segmented.run(inputs), model, args)
    if tune == "measure":
        _race(converted, snapshot(unwrap(model), own=True).cpu(), args, min_gain)
    return converted


def _segment(segment: Segment, share: float | None) -> SegmentReport:
    summary = ", ".join(_few(list(dict.fromkeys(segment.operators)), 6))
    return SegmentReport(segment.kind, summary, segment.nodes, share)


def _few(items: Sequence[str], most: int) -> list[str]:
    return [*items[:most], *([f"{len(items) - most} more"] if len(items) > most else [])]


def _segment_seconds(run: Callable[..., Any], inputs: list[Tensor], runs: int = 7) -> dict[int, float]:
    """Median seconds of each segment, torch's with as many threads as ours."""
    samples: dict[int, list[float]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(_native.num_threads())
    try:
        for _ in range(runs):
            run(inputs, lambda place, _, seconds: samples.setdefault(place, []).append(seconds))
    finally:
        torch.set_num_threads(threads)
    return {place: statistics.median(taken) for place, taken in samples.items()}


def _convert_layers(
    model: nn.Module, args: tuple[Any, ...], tune: str, min_gain: float, verify: bool, error: Exception
) -> Converted:
    """The model itself with sparse layers in it: what is left where it cannot be exported."""

    def fresh() -> nn.Module:
        return snapshot(unwrap(model), own=True).cpu()

    args = tree_map(lambda a: a.detach().cpu() if isinstance(a, Tensor) else a, args)
    inner = fresh()
    try:
        swapped: Swapped = swap_layers(inner, _own(args), tune == "measure", min_gain, verify)
    except UnsupportedError:
        raise
    except Exception as own:  # the example does not run in torch either
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        hint = "; a list is one input, a tuple several" if isinstance(args[0], list) else ""
        why = f"{type(own).__name__}: {str(own).strip().partition(chr(10))[0]}"
        what = f"the model itself fails on the example inputs ({shapes or 'no tensors'}{hint})"
        raise UnsupportedError(f"{what}: {why}") from own
    why = str(error).strip().split("\n")[0]
    note = f"single layers were swapped ({swapped.count} of {len(swapped.layers)}), the rest runs in torch: {why}"
    _warn(f"the model is not one native program; {note}")
    report = Report(
        layers=swapped.layers,
        runs="sparse",
        reason="tune='fixed': nothing was timed",
        input_shapes=tuple(tuple(leaf.shape) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)),
        threads=_native.num_threads(),
        isa=_native.isa(),
        torch=torch.__version__,
        notes=(note,),
    )

    def unused() -> nn.Module:  # a model may have a state: what is handed over has seen no call
        return swapped.apply(fresh())

    converted = Converted(unused(), None, None, report)
    if verify:
        with torch.no_grad():
            outputs = unused()(*_own(args))
        _verify_outputs(converted, outputs, model, args)
    if tune == "measure":
        _race(converted, fresh(), _own(args), min_gain)
        converted.runs = unused()
        if isinstance(converted.dense, _DenseCall):
            last = converted.dense.memory is not None
            converted.dense = _DenseCall(_channels_last(fresh()) if last else fresh(), converted.dense.memory)
    return converted


def _own(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, args))


def _verify_outputs(converted: Converted, outputs: Any, model: nn.Module, args: tuple[Any, ...]) -> None:
    assert converted.report is not None
    error, allowed, note = verify_outputs(outputs, lambda: snapshot(unwrap(model), own=True).cpu(), args)
    converted.report = replace(converted.report, max_error=error, bound=allowed)
    if note:
        _note(converted, note)


def _note(converted: Converted, note: str) -> None:
    assert converted.report is not None
    converted.report = replace(converted.report, notes=(*converted.report.notes, note))


def _warn(message: str) -> None:
    """At the first frame outside this package."""
    depth, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, SparsepruneWarning, stacklevel=depth)


def tune_program(
    program: runtime.Program, shapes: list[tuple[int, ...]], min_gain: float = 1.05, seconds: float | None = None
) -> list[_native.TunedDict]:
    """Tunes a program for these input shapes; shows progress where it takes longer than two seconds."""
    from tqdm import tqdm

    bar = tqdm(total=0, desc="tuning", unit="round", leave=False, delay=2, disable=not sys.stderr.isatty())

    def progress(done: int, total: int) -> bool:
        bar.total = total
        bar.update(done - bar.n)
        return True

    with bar:
        return program.tune(shapes, TUNE_SECONDS if seconds is None else seconds, min_gain, progress)


def _tensor_leaves(args: tuple[Any, ...]) -> list[Tensor]:
    return [leaf.detach().cpu() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]


# ---- the report's layers ----


def _layers(
    program: runtime.Program, plan: _native.Plan, tuned: dict[int, _native.TunedDict]
) -> tuple[LayerReport, ...]:
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
    """Median milliseconds of each call, in short blocks by turns, with pauses for others' threads to stop spinning."""
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.memory is None:
            return self.module(*args, **kwargs)
        return self.module(*_channels_last_args(args), **kwargs)


def _channels_last(model: nn.Module) -> nn.Module:
    return snapshot(model, own=True).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _channels_last_args(args: tuple[Any, ...]) -> tuple[Any, ...]:
    def last(a: Any) -> Any:
        return a.contiguous(memory_format=torch.channels_last) if isinstance(a, Tensor) and a.dim() == 4 else a

    return tuple(tree_map(last, args))


def _fastest_layers(timings: list[dict[str, float]]) -> dict[str, float]:
    names = set().union(*timings)
    return {name: min(t[name] for t in timings if name in t) for name in names}


def _with_times(report: Report, times: dict[str, float], dense: dict[str, float], min_gain: float) -> Report:
    layers = []
    for layer in report.layers:
        known = [
            ms for ms in (layer.dense_ms, 1e3 * dense[layer.name] if layer.name in dense else None) if ms is not None
        ]
        fastest = min(known, default=None)
        reason = layer.reason
        if (
            fastest is not None
            and layer.sparse_ms is not None
            and layer.sparse_ms > fastest
            and "/dense/" not in layer.choice
            and layer.choice not in ("torch", "sparse layer")
        ):
            reason += "; torch's dense layer alone is faster, but would leave the program"
        layers.append(replace(layer, dense_ms=fastest, reason=reason))
    best = min(("eager", "channels_last"), key=lambda name: times[name])
    gain = times[best] / times["sparse"]
    runs = "sparse" if gain >= min_gain else best
    reason = f"{gain:.2f} times the fastest of eager and channels_last torch; min_gain is {min_gain}"
    return replace(report, layers=tuple(layers), times_ms=times, runs=runs, reason=reason)
