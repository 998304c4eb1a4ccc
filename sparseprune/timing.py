"""Timing several candidates fairly on a machine that is not ours alone: in turns, in short blocks, with pauses."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Samples", "block", "machine", "run_queue_waits", "settle", "take_turns", "thread_count"]


@dataclass
class Samples:
    """One candidate's measured calls, and how much of the time its threads wanted a core and had none."""

    ms: list[float] = field(default_factory=list)
    wall_seconds: float = 0.0
    wait_seconds: float = 0.0  # summed over threads

    def add(self, call: Callable[[], Any], seconds: float) -> None:
        """Measure one block of about that many seconds."""
        before, start = run_queue_waits(), time.perf_counter()
        self.ms += block(call, seconds)
        self.wall_seconds += time.perf_counter() - start
        after = run_queue_waits()
        self.wait_seconds += sum(max(0, ns - before.get(thread, 0)) for thread, ns in after.items()) / 1e9


def take_turns(candidates: dict[str, Callable[[], Any]], rounds: int, seconds: float, bar: Any) -> dict[str, Samples]:
    """Measure every candidate in `rounds` blocks of `seconds`; the order rotates from round to round."""
    samples = {name: Samples() for name in candidates}
    order = list(candidates)
    for index in range(rounds):
        shift = index % len(order)
        for name in order[shift:] + order[:shift]:
            bar.set_description(name)
            bar.update()
            settle()
            samples[name].add(candidates[name], seconds)
    return samples


def run_queue_waits() -> dict[str, int]:
    """For each thread of this process, the nanoseconds it was runnable but not running (Linux; else nothing)."""
    waits: dict[str, int] = {}
    try:
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError):  # it ended meanwhile
                with open(f"/proc/self/task/{thread}/schedstat", encoding="ascii") as file:
                    waits[thread] = int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return {}
    return waits


def block(call: Callable[[], Any], seconds: float) -> list[float]:
    """Milliseconds of each call in about that many seconds, at least three, after a warm-up of a quarter of that."""
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
    """`count` threads for torch and, where the native core is built, for sparseprune; both are put back."""
    setters: list[tuple[Callable[[int], None], int]] = [(torch.set_num_threads, torch.get_num_threads())]
    try:
        from .threads import num_threads, set_num_threads

        setters.append((set_num_threads, num_threads()))
    except ImportError:  # not built: convert() will say so, and a given module may not need it
        pass
    try:
        for set_threads, _ in setters:
            set_threads(count)
        yield
    finally:
        for set_threads, before in setters:
            set_threads(before)


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
