"""Timing several candidates fairly on a machine that is not ours alone: in turns, in short blocks, with pauses."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["machine", "settle", "take_turns", "thread_count"]


def take_turns(
    candidates: dict[str, Callable[[], Any]], rounds: int, seconds: float, bar: Any
) -> dict[str, list[float]]:
    """Milliseconds of every measured call, by candidate; the order rotates from round to round."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for index in range(rounds):
        shift = index % len(order)
        for name in order[shift:] + order[:shift]:
            bar.set_description(name)
            bar.update()
            settle()
            samples[name] += _block(candidates[name], seconds)
    return samples


def _block(call: Callable[[], Any], seconds: float) -> list[float]:
    clock = time.perf_counter
    end = clock() + seconds / 4
    call()
    while clock() < end:
        call()
    taken: list[float] = []
    end = clock() + seconds
    while len(taken) < 3 or clock() < end:
        start = clock()
        call()
        taken.append(1e3 * (clock() - start))
    return taken


def settle(pause: float = 0.004, limit: float = 1.0) -> None:
    """Sleep until this process uses no CPU: GCC's OpenMP threads spin for milliseconds, Intel's for 200 ms."""
    end = time.perf_counter() + limit
    while True:
        used, start = time.process_time(), time.perf_counter()
        time.sleep(pause)
        if time.process_time() - used < 0.1 * (time.perf_counter() - start) or start > end:
            return


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """`count` threads for torch and, where the native core is built, for sparseprune."""
    before = torch.get_num_threads()
    try:
        from sparseprune import get_num_threads, set_num_threads
    except ImportError:  # not built: convert() will say so; a given `sparse` may not need it
        get_num_threads = set_num_threads = None
    native_before = get_num_threads() if get_num_threads else 0
    try:
        torch.set_num_threads(count)
        if set_num_threads:
            set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
        if set_num_threads:
            set_num_threads(native_before)


def machine() -> dict[str, str | int]:
    """This machine, as a result names it: CPU model, vector extensions, cores this process may use, versions."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {
        "cpu": cpu,
        "isa": os.environ.get("SPARSEPRUNE_ISA") or torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
