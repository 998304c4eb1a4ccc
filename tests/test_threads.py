"""Threads, forks and instruction sets: every caller gets the same numbers."""

from __future__ import annotations

import os
import signal
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

SHAPES = [(1, 3, 16, 16), (2, 3, 16, 16), (1, 3, 21, 13)]


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    before = sparseprune.num_threads()
    yield
    sparseprune.set_num_threads(before)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1, groups=4), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Conv2d(16, 24, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 7))
    sparseprune.prune_uniform(model.eval(), 0.7)
    path = tmp_path_factory.mktemp("threads") / "model.spr"
    sparseprune.convert(model, torch.randn(2, 3, 16, 16), tune="fixed").save(path)
    return path


@pytest.fixture(scope="module")
def program(path: Path) -> runtime.Program:
    return runtime.load(path)


def inputs(seed: int) -> np.ndarray:
    shape = SHAPES[seed % len(SHAPES)]
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_many_callers_share_a_program(program: runtime.Program) -> None:
    sparseprune.set_num_threads(1)
    expected = {seed: program(inputs(seed)) for seed in range(24)}
    fresh = runtime.Program(program.data)  # so that its plans are made under the race, too
    barrier, failures, done = threading.Barrier(8), [], []

    def call(caller: int) -> None:
        barrier.wait()
        for turn in range(40):
            seed = (7 * caller + turn) % 24
            if caller == 0 and turn % 5 == 0:
                sparseprune.set_num_threads(1 + turn % 3)
            if not np.array_equal(fresh(inputs(seed)), expected[seed]):
                failures.append((caller, turn))
        done.append(caller)

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(done) == 8


def test_plans_may_be_forgotten_meanwhile(program: runtime.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    class Emptied(dict[Any, Any]):  # by a tuning that ends just after it was asked how many there are
        def __len__(self) -> int:
            count = super().__len__()
            self.clear()
            return count

    monkeypatch.setattr(runtime, "_MOST_PLANS", 1)
    fresh = runtime.Program(program.data)
    fresh._plans = Emptied()
    for shape in SHAPES:  # the second once raised StopIteration; where one was added meanwhile, RuntimeError
        assert fresh.plan(shape).output_shapes == program.plan(shape).output_shapes


def test_python_runs_on_beside_a_program(program: runtime.Program) -> None:
    """The interpreter lock is released while a program runs: else this thread would see it only ended."""
    sparseprune.set_num_threads(1)
    x = np.zeros((16, 3, 400, 400), np.float32)
    program(x)
    seen, before = [], sys.getswitchinterval()
    sys.setswitchinterval(60)  # the lock changes hands only where it is given away
    try:
        for _ in range(5):  # this thread may be slow to wake up
            state, ready = ["idle"], threading.Event()

            def call(state: list[str] = state, ready: threading.Event = ready) -> None:
                ready.set()
                state[0] = "running"
                program(x)
                state[0] = "ended"

            thread = threading.Thread(target=call)
            thread.start()
            ready.wait()
            seen.append(state[0])
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert "running" in seen, seen


@pytest.mark.parametrize("threads", [1, 4])
def test_a_forked_child_infers(program: runtime.Program, threads: int) -> None:
    sparseprune.set_num_threads(threads)
    expected = [program(inputs(seed)) for seed in range(3)]  # the parent's pool runs
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a pool that waits for its parent's threads would wait for ever
        same = all(np.array_equal(program(inputs(seed)), expected[seed]) for seed in range(3))
        os._exit(0 if same and sparseprune.num_threads() == threads else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(program(inputs(0)), expected[0])  # and the parent's still works


def test_a_child_forked_while_others_run(program: runtime.Program) -> None:
    sparseprune.set_num_threads(2)
    expected, stop = program(inputs(1)), threading.Event()

    def call() -> None:
        while not stop.is_set():
            program(inputs(0))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                fresh = runtime.Program(program.data)  # another thread may have held the old one's locks
                os._exit(0 if np.array_equal(fresh(inputs(1)), expected) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_set_num_threads() -> None:
    assert 1 <= _native.available_cores() <= len(os.sched_getaffinity(0))
    for n in (1, 2, 256):
        sparseprune.set_num_threads(n)
        assert sparseprune.num_threads() == n
    for wrong in (0, -1, 257, 10**9):
        with pytest.raises(ValueError, match=f"n={wrong} must be between 1 and 256"):
            sparseprune.set_num_threads(wrong)
    for odd in (2.0, "2", True, None):
        with pytest.raises(TypeError, match=f"n: expected an int, got {type(odd).__name__}"):
            sparseprune.set_num_threads(odd)  # type: ignore[arg-type]
    assert sparseprune.num_threads() == 256


def test_more_threads_than_work(program: runtime.Program) -> None:
    x = np.ones((1, 3, 3, 3), np.float32)
    sparseprune.set_num_threads(1)
    expected = program(x)
    sparseprune.set_num_threads(64)
    assert np.array_equal(program(x), expected)


def test_affinity_is_respected() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "import sparseprune; print(sparseprune.num_threads())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


# ---- instruction sets

RUN = """
import sys, numpy as np, sparseprune.runtime as runtime
program = runtime.load(sys.argv[1])
np.save(sys.argv[3], program(np.load(sys.argv[2])))
print(program.describe()["isa"], program.plan((2, 3, 16, 16)).isa)
"""


def run(isa: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "SPARSEPRUNE_ISA": isa}
    )


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "neon"])
def test_every_instruction_set_agrees(isa: str, program: runtime.Program, path: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", inputs(1))
    done = run(isa, path, tmp_path / "x.npy", tmp_path / "y.npy")
    if isa not in _native.supported_isas():
        assert done.returncode != 0 and f"isa='{isa}' is not available on this processor" in done.stderr
        pytest.skip(f"this processor has no {isa}: that it is an error was tested")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa, isa]
    y, expected = np.load(tmp_path / "y.npy"), program(inputs(1))
    assert (
        y.shape == expected.shape and float(np.abs(y - expected).max()) <= 1e-6 * float(np.abs(expected).max()) + 1e-7
    )


def test_an_unknown_instruction_set_is_a_clear_error(path: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", inputs(1))
    done = run("bogus", path, tmp_path / "x.npy", tmp_path / "y.npy")
    assert done.returncode != 0 and "Traceback" in done.stderr  # an exception, no crash
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ValueError: SPARSEPRUNE_ISA: isa='bogus' is not available on this processor, which has: scalar"
    )
    with pytest.raises(ValueError, match="isa='bogus' is not available"):
        runtime.load(path)._native.plan([(1, 3, 16, 16)], None, "bogus")


def test_convert_names_a_bogus_instruction_set_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEPRUNE_ISA", "bogus")
    with pytest.raises(ValueError, match="SPARSEPRUNE_ISA: isa='bogus'"):
        sparseprune.convert(nn.Linear(3, 3))
    monkeypatch.setenv("SPARSEPRUNE_ISA", "")  # empty: as if it were not there
    assert (
        sparseprune.convert(nn.Linear(3, 3), torch.ones(1, 3), tune="fixed").report.isa == _native.supported_isas()[-1]
    )
