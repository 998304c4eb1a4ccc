"""How the benches of `--device cuda` time: replayed CUDA graphs between events, in turns; and at which precision."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from sparseprune import CudaError
from sparseprune.cuda_graphs import capture_graph
from sparseprune.cuda_layers import extension

__all__ = ["KINDS", "DTYPES", "Events", "Sample", "Timer", "Way", "captured", "device_facts", "graph_times",
           "line", "precision", "precision_name", "precisions", "take_turns", "unready"]  # fmt: skip

DEVICE = torch.device("cuda")
DTYPES = ("float32", "float16", "bfloat16")
KINDS = ("warm", "cold")  # right after the same replay; after the second-level cache was flushed
FLUSHED = 256 << 20  # bytes, beyond any second-level cache
SLEEP = 1_000_000  # cycles, about half a millisecond

Way = Callable[[], Any]
Sample = Callable[[Way, str], float]  # runs once, warm or cold; milliseconds
Timer = Callable[[Mapping[str, Way]], tuple[dict[str, dict[str, float]], dict[str, str]]]


def unready() -> str:
    """Why nothing can be measured here, in one line; empty where it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device: nothing can be measured"
    try:
        extension()
    except CudaError as error:
        return str(error)
    return ""


def device_facts() -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability()
    return {"device": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "torch": torch.__version__,
            "cuda": torch.version.cuda}  # fmt: skip


@contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """TF32 allowed or not, in cuBLAS and cuDNN alike, and cuDNN's algorithms measured; no gradients. Put back after."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    cudnn.benchmark = True
    try:
        with torch.no_grad():
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def precisions(dtypes: list[str], tf32: list[str]) -> list[tuple[str, bool]]:
    """Each dtype, float32 with TF32 `off` or `on` or both; to the others it is all the same."""
    return [(d, mode == "on") for d in dtypes for mode in (tf32 if d == "float32" else ["off"])]


def precision_name(dtype: str, tf32: bool) -> str:
    return f"{dtype} {'with' if tf32 else 'without'} TF32" if dtype == "float32" else dtype


class Events:
    """A `Sample` of the device's own time.

    The device first sleeps, so that all is queued when it gets there: what Python and a launch take does not count.
    """

    def __init__(self) -> None:
        self.scratch = torch.empty(FLUSHED, dtype=torch.uint8, device=DEVICE)

    def __call__(self, way: Way, kind: str) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")  # type: ignore[no-untyped-call]
        torch.cuda._sleep(SLEEP)  # type: ignore[no-untyped-call]
        if kind == "cold":
            self.scratch.zero_()
        else:
            way()
        start.record()
        way()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def take_turns(ways: Mapping[str, Way], rounds: int, sample: Sample) -> dict[str, dict[str, list[float]]]:
    """Each way's milliseconds, warm and cold; the order rotates from round to round, as clocks may drift."""
    taken: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in ways}
    order = list(ways)
    for turn in range(rounds):
        shift = turn % max(1, len(order))
        for name in order[shift:] + order[:shift]:
            for kind in KINDS:
                taken[name][kind].append(sample(ways[name], kind))
    return taken


def captured(ways: Mapping[str, Way]) -> tuple[dict[str, Way], dict[str, str]]:
    """Each as a CUDA graph, and why others could not be: a shape, build or operator of torch's that does not do it."""
    replays: dict[str, Way] = {}
    failed: dict[str, str] = {}
    for name, way in ways.items():
        try:
            replays[name], _ = capture_graph(way)
        except Exception as error:
            failed[name] = line(error)
    return replays, failed


def graph_times(rounds: int, sample: Sample) -> Timer:
    """What gives ways' median milliseconds as CUDA graphs, and why others have none."""

    def timer(ways: Mapping[str, Way]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
        replays, failed = captured(ways)
        taken = take_turns(replays, rounds, sample)
        return {name: {kind: statistics.median(taken[name][kind]) for kind in KINDS} for name in taken}, failed

    return timer


def line(error: Exception) -> str:
    """An exception in one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
