"""One sparse layer on CUDA tensors: which kernels could run it, which of them is fastest, and running that one.

The kernels are those of `csrc/cuda`, in the optional extension `_cuda` (built with `SPARSEPRUNE_CUDA=ON`): spmm
(related work: Gale et al., *Sparse GPU Kernels for Deep Learning*, 2020, arXiv 2006.10901), blocks and vectors on
tensor cores, gemv for a few inputs. Dense cuDNN or cuBLAS and torch's 2:4 path take part too: nothing runs because it
is ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .errors import CudaError

if TYPE_CHECKING:
    from ._cuda import Kernel
    from .bsr import BlockCSR

__all__ = [
    "Activation",
    "Choice",
    "CudaLayer",
    "Window",
    "built",
    "choose",
    "event_timer",
    "extension",
    "output_shape",
    "preferred",
]

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SHARED_BYTES = 72 << 10  # of a block, so that two or three fit a multiprocessor
LEAST_FILL = 0.75  # kept weights / places in blocks that hold one; below, such blocks are not tried

Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Window:
    """A convolution's attributes; of a linear layer, the defaults. In pixels, `(h, w)`."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def numbers(self) -> tuple[int, ...]:
        return (*self.stride, *self.padding, *self.dilation)


@dataclass(frozen=True)
class Activation:
    """What ends the epilogue: `none`, `relu`, `leaky_relu` (`low` is the slope) or `clamp` to `[low, high]`."""

    kind: str = "none"
    low: float = 0.0
    high: float = 0.0

    @property
    def number(self) -> int:
        return ("none", "relu", "leaky_relu", "clamp").index(self.kind)

    def apply(self, x: Tensor) -> Tensor:
        if self.kind == "relu":
            return functional.relu(x)
        if self.kind == "leaky_relu":
            return functional.leaky_relu(x, self.low)
        return x.clamp(self.low, self.high) if self.kind == "clamp" else x


NONE = Activation()


@dataclass(frozen=True)
class Choice:
    """What a layer runs as for one shape.

    Attributes:
        name: `dense`, `2:4`, or a kernel: `spmm/1x1/4`, `gemv`, `blocks/32/bfloat`, `vectors/16/tf32x3`.
        reason: Why, with the runner-up's or dense's time.
        times_ms: Median milliseconds of every candidate; empty where there was one only.
    """

    name: str
    reason: str
    times_ms: dict[str, float] = field(default_factory=dict)


def choose(candidates: Mapping[str, Callable[[], Any]], timer: Timer, min_gain: float = 1.0) -> Choice:
    """The fastest of `candidates`; `dense`, which is always one, unless another is `min_gain` times as fast.

    Args:
        candidates: What to call, by name.
        timer: Gives a call's milliseconds.

    Raises:
        ValueError: There is no `dense`.
    """
    if "dense" not in candidates:
        raise ValueError(f"candidates: expected 'dense' among them, got {sorted(candidates)}")
    if len(candidates) == 1:
        return Choice("dense", "no sparse kernel takes this layer")
    times = {name: timer(call) for name, call in candidates.items()}
    best = min(times, key=lambda name: times[name])
    gain = times["dense"] / times[best]
    if best == "dense" or gain < min_gain:
        other = min((name for name in times if name != "dense"), key=lambda name: times[name])
        why = f"dense is fastest; {other} takes {times[other] / times['dense']:.2f} times as long"
        return Choice("dense", why if best == "dense" else f"{other} gains {gain:.2f}; min_gain is {min_gain}", times)
    return Choice(best, f"{gain:.2f} times dense, fastest of {len(times)} timed", times)


def preferred(names: list[str]) -> str:
    """Of several candidates the one to take where nothing is timed: the most regular one, and wide strips."""
    order = ("blocks", "vectors", "gemv", "spmm/4x1/4", "spmm/1x1/4", "spmm", "dense")
    return min(names, key=lambda name: next((i for i, start in enumerate(order) if name.startswith(start)), len(order)))


def event_timer(device: torch.device, rounds: int = 7, calls: int = 5) -> Timer:
    """Milliseconds of a call: the median of `rounds` between events around `calls` calls, on the current stream.

    The device first sleeps for a while, so that all is queued when it starts: Python's own time does not count, as it
    does not in a CUDA graph.
    """

    def timer(call: Callable[[], Any]) -> float:
        call()
        taken = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")  # type: ignore[no-untyped-call]
            torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]  # cycles, about half a millisecond
            start.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / calls)
        return float(statistics.median(taken))

    def on_device(call: Callable[[], Any]) -> float:
        with torch.cuda.device(device):
            return timer(call)

    return on_device


def built() -> bool:
    """Whether the extension is here; says nothing of drivers and devices."""
    return importlib.util.find_spec("._cuda", __package__) is not None


def extension() -> Any:
    """The module `_cuda`, its driver checked.

    Raises:
        CudaError: It was not built, or there is no driver that fits.
    """
    try:
        module = importlib.import_module("._cuda", __package__)
    except ImportError as error:
        hint = "pip install . --config-settings=cmake.define.SPARSEPRUNE_CUDA=ON, in a checkout with nvcc 12 or later"
        raise CudaError(f"sparseprune was built without its CUDA kernels ({error}); {hint}") from error
    module.require_driver()
    return module


def output_shape(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], window: Window) -> tuple[int, ...]:
    """Of `(N, K)` and `(out, K)`, or `(N, C, H, W)` and `(out, C / groups, kh, kw)`."""
    if len(weight_shape) == 2:
        return (x_shape[0], weight_shape[0])
    sizes = zip(x_shape[2:], weight_shape[2:], window.stride, window.padding, window.dilation, strict=True)
    return (x_shape[0], weight_shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes))


class CudaLayer:
    """A weight on CUDA devices: packed where and when it is first needed, measured once for each shape.

    Args:
        weight: `(out, in)` or `(out, in/groups, kh, kw)`.
        window: Of a convolution.
        min_gain: How many times as fast as dense another way must be.
        measure: Time the candidates; else the one that is meant for such a weight runs (`preferred`).
    """

    def __init__(
        self, weight: BlockCSR, window: Window | None = None, min_gain: float = 1.0, measure: bool = True
    ) -> None:
        self.weight, self.window = weight, window or Window()
        self.min_gain, self.measure = min_gain, measure
        self.choices: dict[tuple[Any, ...], Choice] = {}
        self._calls: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        self._dense: dict[tuple[Any, ...], Tensor] = {}
        self._native: Any = None

    def __call__(
        self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, act: Activation = NONE
    ) -> Tensor:
        """`act(layer(x) + bias + residual)`; the output lies as `x` does, channels_last or not.

        Args:
            x: float32, float16 or bfloat16, `(N, in)` or `(N, C, H, W)`; any strides.
            bias: Of the same dtype and device, `(out,)`.
            residual: Likewise, of the output's shape.

        Raises:
            CudaError: No extension, no fitting driver, or a call failed; or a shape that was never measured comes
                while a CUDA graph is captured.
        """
        x = x.detach()
        if not is_channels_last(x):
            x = x.contiguous()
        key = self._key(x)
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = self._measured(key, x, bias, residual, act)
        return call(x, bias, residual, act)

    def choice(self, x: Tensor) -> Choice | None:
        """What runs for such an input; None: none was seen yet."""
        return self.choices.get(self._key(x if is_channels_last(x) else x.contiguous()))

    def _key(self, x: Tensor) -> tuple[Any, ...]:
        return (x.device.index, x.dtype, tuple(x.shape), is_channels_last(x), self._tf32(x))

    def _tf32(self, x: Tensor) -> bool:
        flags = torch.backends.cuda.matmul if len(self.weight.shape) == 2 else torch.backends.cudnn
        return x.dtype == torch.float32 and bool(flags.allow_tf32)

    def _measured(
        self, key: tuple[Any, ...], x: Tensor, bias: Tensor | None, residual: Tensor | None, act: Activation
    ) -> Callable[..., Tensor]:
        if torch.cuda.is_current_stream_capturing():
            raise CudaError(f"an input of shape {tuple(x.shape)} was never measured: call the layer before capturing")
        calls = self.candidates(x)
        if self.measure:
            timed = {name: partial(call, x, bias, residual, act) for name, call in calls.items()}
            choice = choose(timed, event_timer(x.device), self.min_gain)
        else:
            choice = Choice(preferred(list(calls)), "default for its weight; nothing was timed")
        self.choices[key] = choice
        return calls[choice.name]

    def candidates(self, x: Tensor) -> dict[str, Callable[..., Tensor]]:
        """Everything that can run such an input, packed and on its device."""
        calls: dict[str, Callable[..., Tensor]] = {"dense": self._run_dense}
        if x.numel() == 0:
            return calls
        if self._two_of_four(x):
            calls["2:4"] = self._run_two_of_four
        module = extension()
        multiprocessors, most_shared, _ = module.properties(x.device.index)
        for name, kernel in kernels(self._weight(module), x, self.window, self._tf32(x), multiprocessors, most_shared):
            packed = torch.from_numpy(kernel.packed).to(x.device)
            calls[name] = _KernelCall(kernel, packed, output_shape(tuple(x.shape), self.weight.shape, self.window))
        return calls

    def _weight(self, module: Any) -> Any:
        if self._native is None:
            w = self.weight
            arrays = w.crow_indices, w.col_indices, w.masks, w.values
            self._native = module.Weight(list(w.shape), w.block_shape, *arrays)
        return self._native

    def _dense_weight(self, x: Tensor, last: bool = False) -> Tensor:
        key = (x.device.index, x.dtype, last)
        if key not in self._dense:
            dense = torch.from_numpy(self.weight.to_dense()).to(x.device, x.dtype)
            self._dense[key] = dense.contiguous(memory_format=torch.channels_last) if last else dense
        return self._dense[key]

    def _run_dense(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, act: Activation) -> Tensor:
        last = is_channels_last(x)
        if len(self.weight.shape) == 2:
            y = functional.linear(x, self._dense_weight(x), bias)
        else:
            w = self.window
            weight = self._dense_weight(x, last)
            y = functional.conv2d(x, weight, bias, w.stride, w.padding, w.dilation, w.groups)
        return _finished(y, last, residual, act)

    def _two_of_four(self, x: Tensor) -> bool:
        """Whether torch's semi-structured path takes it: 16 bits, multiples of 64, two of four neighbours at most."""
        shape = self.weight.shape
        if len(shape) != 2 or x.dtype == torch.float32 or shape[0] % 64 or shape[1] % 64:
            return False
        if torch.cuda.get_device_capability(x.device)[0] < 8 or not two_of_four(self.weight.to_dense()):
            return False
        try:
            self._run_two_of_four(x, None, None, NONE)
        except RuntimeError:  # a shape, or a build of torch, that it is not for
            return False
        return True

    def _run_two_of_four(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, act: Activation) -> Tensor:
        key = (x.device.index, x.dtype, "2:4")
        if key not in self._dense:
            self._dense[key] = torch.sparse.to_sparse_semi_structured(self._dense_weight(x))
        return _finished(functional.linear(x, self._dense[key], bias), False, residual, act)


class _KernelCall:
    """A kernel and its packed weight on one device."""

    def __init__(self, kernel: Kernel, packed: Tensor, shape: tuple[int, ...]) -> None:
        self.kernel, self.packed, self.shape = kernel, packed, shape
        self.pixels_first = kernel.name in ("blocks", "vectors")  # reads a pixel's channels side by side

    def __call__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, act: Activation) -> Tensor:
        last = is_channels_last(x)
        if self.pixels_first:
            if x.dim() == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            if x.data_ptr() % 16:
                x = x.clone()
        y = torch.empty(
            self.shape,
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )
        if residual is not None:
            residual = _like(residual, last)
        bias_pointer, residual_pointer = (0 if t is None else t.data_ptr() for t in (bias, residual))
        index = x.device.index
        stream = torch.cuda.current_stream(x.device).cuda_stream
        ends = act.number, act.low, act.high
        given = x.data_ptr(), _strides(x, last or self.pixels_first)
        tensors = *given, y.data_ptr(), _strides(y, last), bias_pointer, residual_pointer
        self.kernel.start(index, stream, self.packed.data_ptr(), *tensors, *ends)
        return y


def kernels(
    weight: Any, x: Tensor, window: Window, tf32: bool, multiprocessors: int, most_shared: int
) -> list[tuple[str, Kernel]]:
    """The kernels worth trying for such an input, by name; packed on the host. Needs no device.

    Args:
        weight: A `_cuda.Weight`.
        x: `(N, in)` or `(N, C, H, W)`; only its shape and dtype count.
        tf32: Whether float32 may be rounded to TF32; else three products make up for it.
        multiprocessors, most_shared: The device's, and the bytes of shared memory that a block may have.
    """
    shape, type_, groups = list(x.shape), DTYPES[x.dtype], window.groups
    found: list[tuple[str, Kernel | None]] = []
    shared = min(SHARED_BYTES, most_shared)
    if len(shape) == 2 and shape[0] <= 4:
        found.append(("gemv", weight.gemv(shape, type_, multiprocessors, most_shared)))
    for rows in (4, 1):
        if rows == 1 or weight.fill(rows, 1) >= LEAST_FILL:
            for tile in (1, 4):
                made = weight.spmm(shape, window.numbers, groups, type_, rows, tile, shared)
                found.append((f"spmm/{rows}x1/{tile}", made))
    math = {torch.float16: "half", torch.bfloat16: "bfloat"}.get(x.dtype, "tf32" if tf32 else "tf32x3")
    step = 8 if x.dtype == torch.float32 else 16
    numbers = groups, math
    for vectors, sizes in ((False, (32, 16)), (True, (32, 16, 8))):
        for rows in sizes:
            if weight.fill(rows, 1 if vectors else step) >= LEAST_FILL:
                made = weight.blocks(shape, window.numbers, *numbers, rows, vectors, multiprocessors, shared)
                found.append((f"{'vectors' if vectors else 'blocks'}/{rows}/{math}", made))
                break  # smaller ones would read the inputs more often
    return [(name, kernel) for name, kernel in found if kernel is not None]


def two_of_four(dense: np.ndarray[Any, Any]) -> bool:
    """Whether each four neighbours of a row `(out, K)` hold two non-zeros at most."""
    if dense.shape[1] % 4:
        return False
    return int((dense.reshape(dense.shape[0], -1, 4) != 0).sum(axis=2).max(initial=0)) <= 2


def is_channels_last(x: Tensor) -> bool:
    """Whether a tensor lies so, and not also as torch lies by default."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _like(x: Tensor, last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if last and x.dim() == 4 else torch.contiguous_format)


def _finished(y: Tensor, last: bool, residual: Tensor | None, act: Activation) -> Tensor:
    if residual is not None:
        y = y + residual
    return _like(act.apply(y), last)


def _strides(x: Tensor, last: bool) -> tuple[int, int, int]:
    """Of an image, a channel and a pixel, as a tensor lies. Those that torch gives are no help where a size is 1."""
    if x.dim() == 2:
        return 0, 1, x.shape[1]
    _, c, h, w = x.shape
    return (c * h * w, 1, c) if last else (c * h * w, h * w, 1)
