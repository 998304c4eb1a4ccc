"""What this machine can do, by `bench/ceilings.cpp`: compiled once a process, run as often as asked."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["measure", "medians"]

# What `measure` gives: threads; fma, l1, l2, l3: GFLOP/s a thread; read: GB/s of all threads by MiB read.
Ceilings = dict[str, Any]

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-pthread", "-w")


def measure(threads: int) -> Ceilings:
    """One run, about a second. Raises `RuntimeError` where it cannot be compiled (no compiler, no AVX-512)."""
    run = subprocess.run([_program(), "--json", str(threads)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"ceilings: exit status {run.returncode}: {run.stderr.strip()[:200]}")
    found: Ceilings = json.loads(run.stdout)
    return found


def medians(runs: list[Ceilings]) -> Ceilings | None:
    """Each ceiling's median over several runs; None of no runs."""
    if not runs:
        return None
    rates: Ceilings = {name: statistics.median(run[name] for run in runs) for name in ("fma", "l1", "l2", "l3")}
    return rates | {"read": {mib: statistics.median(run["read"][mib] for run in runs) for mib in runs[0]["read"]}}


@cache
def _program() -> str:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    compiler, source = os.environ.get("CXX", "c++"), Path(__file__).with_name("ceilings.cpp")
    try:
        command = [compiler, *_FLAGS, str(source), "-o", f"{folder}/ceilings"]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"ceilings: no C++ compiler ({compiler}); CXX may name one") from None
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr[:200])
        raise RuntimeError(f"ceilings: {first.strip()}") from None
    return f"{folder}/ceilings"
