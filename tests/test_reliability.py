"""What a deployed program must survive: many threads, forks, odd numbers, days of calls. No torch where it runs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparseprune
from sparseprune import _native, runtime

THREADS, CALLS, CYCLES, INFERENCES = 32, 1000, 200, 20_000


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    before = sparseprune.num_threads()
    yield
    sparseprune.set_num_threads(before)


def network(width: int = 6) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, 2), nn.Flatten(),
                              nn.Linear(width * 9, 5))  # fmt: skip
    sparseprune.prune_uniform(model.eval(), 0.7, exclude=())
    return model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reliability") / "model.spr"
    sparseprune.convert(network(), torch.zeros(1, 3, 8, 8), tune="fixed", verify=False).save(path)
    return path


def inputs(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.standard_normal((1, 3, 8, 8)).astype(np.float32) for _ in range(count)]


# ---- threads


def test_many_threads_each_with_its_own_numbers(path: Path) -> None:
    """32 Python threads, 1,000 calls each, while the number of threads changes under them."""
    program, xs = runtime.load(path), inputs(16)
    expected, wrong, done = [program(x).tobytes() for x in xs], [], []

    def call(caller: int) -> None:
        for turn in range(CALLS):
            place = (caller + turn) % len(xs)
            if caller == 0 and turn % 100 == 0:
                sparseprune.set_num_threads(1 + turn // 100 % 4)
            if program(xs[place]).tobytes() != expected[place]:
                wrong.append((caller, turn))
        done.append(caller)

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(done) == THREADS


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_the_same_bits_on_any_number_of_threads(isa: str) -> None:
    model = nn.Sequential(*list(network(16))[:3])
    program = sparseprune.convert(model, torch.zeros(1, 3, 40, 40), tune="fixed", verify=False).program
    x = np.random.default_rng(1).standard_normal((3, 3, 40, 40)).astype(np.float32)
    seen = set()
    for threads in (1, 2, 4, 8):
        plan = program._native.plan([x.shape], threads, isa)
        for _ in range(100 if threads == 2 else 10):
            y = np.full(plan.output_shapes[0], np.nan, np.float32)
            plan.run([x], [y])
            seen.add(y.tobytes())
    assert len(seen) == 1


def test_it_works_after_any_exception(path: Path) -> None:
    program, (x,) = runtime.load(path), inputs(1)
    expected = program(x)
    for wrong in ([], [x, x], [x[0]], [x[:, :2]], [x.astype(np.float64)], ["text"], [x[..., :1]]):
        with pytest.raises((ValueError, TypeError)):
            program(*list[Any](wrong))
        with pytest.raises(sparseprune.FormatError):
            runtime.Program(program.data[:-1])
        np.testing.assert_array_equal(program(x), expected)
    model = nn.Sequential(nn.Upsample(scale_factor=256), nn.Upsample(scale_factor=16))
    huge = sparseprune.convert(model, torch.zeros(1, 1, 1, 1), tune="fixed", verify=False).program
    code_shape = (2000, 64, 8, 8)  # 8 TB of output: more than there is
    with pytest.raises((MemoryError, ValueError)):
        huge(np.zeros(code_shape, np.float32))
    np.testing.assert_array_equal(huge(np.ones((1, 1, 1, 1), np.float32)), np.ones((1, 1, 4096, 4096), np.float32))


# ---- fork

FORKS = """
import os, signal, sys, numpy as np, sparseprune.runtime as runtime, sparseprune
program, cycles = runtime.load(sys.argv[1]), int(sys.argv[2])
x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
expected = program(x).tobytes()
for cycle in range(cycles):
    sparseprune.set_num_threads(1 + cycle % 3)
    assert program(x).tobytes() == expected
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that hangs is ended, and counts as a failure
        os._exit(0 if program(x).tobytes() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0, cycle
print("served", cycles)
"""

FORKS_AMONG_CALLS = """
import os, signal, sys, threading, numpy as np, sparseprune.runtime as runtime, sparseprune
program, stop = runtime.load(sys.argv[1]), threading.Event()
x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
expected = program(x).tobytes()
def call(size):
    while not stop.is_set():
        program._native.plan([(1 + size % 50, 3, 8, 8)])  # takes the lock of the plans, every time
        size += 1
threads = [threading.Thread(target=call, args=(size,)) for size in (0, 20)]
for thread in threads: thread.start()
try:
    for cycle in range(int(sys.argv[2])):
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            y = np.empty((1, 5), np.float32)
            program._native.plan([x.shape]).run([x], [y])  # the very program that others were using
            os._exit(0 if y.tobytes() == expected else 1)
        assert os.waitpid(child, 0)[1] == 0, cycle
finally:
    stop.set()
print("served", cycle + 1)
"""


def served(code: str, path: Path, cycles: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", code, str(path), str(cycles)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.split() == ["served", str(cycles)], done.stderr


def test_use_fork_infer(path: Path) -> None:
    served(FORKS, path, CYCLES)


def test_children_of_a_process_whose_other_threads_are_planning(path: Path) -> None:
    served(FORKS_AMONG_CALLS, path, 60)


# ---- floats


def test_nan_and_infinity_go_where_dense_torch_has_them() -> None:
    """Every weight kept: the same places. Pruned weights ignore them: the one documented difference."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: Any = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    fast = sparseprune.convert(model, torch.zeros(1, 2, 9, 9), tune="fixed", verify=False)
    for odd in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(1, 2, 9, 9, generator=torch.Generator().manual_seed(2))
        x[0, 1, 4, 4] = odd
        with torch.no_grad():
            y, expected = fast(x), model(x)
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isposinf(), expected.isposinf())
        assert torch.equal(y.isneginf(), expected.isneginf()) and not bool(expected.isfinite().all())
        finite = expected.isfinite()
        torch.testing.assert_close(y[finite], expected[finite])
    with torch.no_grad():
        model[0].weight[:, 1] = 0  # nobody reads channel 1 any more
        fast = sparseprune.convert(model, torch.zeros(1, 2, 9, 9), tune="fixed", verify=False)
        assert bool(fast(x).isfinite().all()) and not bool(model(x).isfinite().all())


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("threads", [1, 2])
def test_denormals_are_numbers_and_the_mode_stays_the_callers(isa: str, threads: int) -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([0.5, 2.0]).reshape(2, 1, 1, 1)
    program = sparseprune.convert(model, torch.zeros(1, 1, 64, 64), tune="fixed", verify=False).program
    x = np.full((1, 1, 64, 64), 2.0**-140, np.float32)  # 2^-126 is the least normal one
    plan = program._native.plan([x.shape], threads, isa)

    def run() -> list[float]:
        y = np.empty((1, 2, 64, 64), np.float32)
        plan.run([x], [y])
        assert all(len(np.unique(y[0, c])) == 1 for c in (0, 1))
        return [float(y[0, 0, 0, 0]), float(y[0, 1, 0, 0])]

    def flushes() -> bool:
        return float(torch.tensor([2.0**-140]).mul(0.5)[0]) == 0.0

    assert run() == [2.0**-141, 2.0**-139] and not flushes()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        assert run() == [0.0, 0.0] and flushes()  # in every thread: the mode is the caller's
        assert program._native.plan([(2, 1, 8, 8)]).isa and flushes()
    finally:
        torch.set_flush_denormal(False)
    assert run() == [2.0**-141, 2.0**-139] and not flushes()


# ---- memory


def test_many_inferences_keep_no_memory(path: Path) -> None:
    """The short form of `bench/soak.py`, which makes a million."""
    script = Path(__file__).parents[1] / "bench" / "soak.py"
    command = [sys.executable, str(script), str(path), "--inferences", str(INFERENCES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert f"{INFERENCES} inferences" in done.stdout
