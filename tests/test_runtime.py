"""sparseprune.runtime: programs on NumPy arrays, in a process that never sees torch."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import sparseprune
from sparseprune import FormatError, runtime

Array = NDArray[np.float32]
X = np.random.default_rng(0).standard_normal((2, 3, 12, 10)).astype(np.float32)


class Two(nn.Module):
    """Two inputs of equal batch; a dict with a tuple and None as output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> Any:
        y = self.conv(a)
        return {"sum": y + b, "parts": (y, None)}


class Elsewhere:
    """An array on the first CUDA device, as DLPack says it."""

    def __dlpack__(self) -> None:
        raise AssertionError("nobody asks for it")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3),
            nn.AdaptiveAvgPool2d(1),
        ]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5)).eval()
    sparseprune.prune_uniform(model, 0.8)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runtime")
    fast = sparseprune.convert(network(), torch.from_numpy(X), tune="fixed")
    fast.save(folder / "model.spr")
    np.save(folder / "x.npy", X)
    np.save(folder / "y.npy", fast(torch.from_numpy(X)).numpy())
    return folder


def python(code: str, **environment: str) -> Any:
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- without torch

HIDDEN = """
import json, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "tqdm"):
            raise ImportError(f"{name} is hidden")
sys.meta_path.insert(0, Hidden())
"""


def test_a_program_runs_where_there_is_no_torch(saved: Path) -> None:
    code = f"""{HIDDEN}
import numpy as np, sparseprune.runtime
program = sparseprune.runtime.load({str(saved / "model.spr")!r})
y = program(np.load({str(saved / "x.npy")!r}))
assert np.array_equal(y, np.load({str(saved / "y.npy")!r}))
print(json.dumps([sorted(m for m in sys.modules if m.split(".")[0] == "torch"), y.shape, program.describe()]))
"""
    loaded, shape, description = python(code)
    assert loaded == [] and shape == [2, 5]
    assert [layer["op"] for layer in description["layers"]].count("conv") == 2
    assert description["inputs"] == [{"name": "input", "shape": ["s0", 3, "s1", "s2"]}]


def test_importing_is_lazy() -> None:
    modules = "sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'tqdm', 'numpy', 'sparseprune'})"
    code = "import json, sys, sparseprune{extra}; print(json.dumps({modules}))"
    assert python(code.format(extra="", modules=modules)) == ["sparseprune"]
    assert python(code.format(extra=".runtime", modules=modules)) == ["numpy", "sparseprune"]
    used = "; sparseprune.BlockCSR, sparseprune.num_threads(), sparseprune.FormatError, dir(sparseprune)"
    assert python(code.format(extra=used, modules=modules)) == ["numpy", "sparseprune"]


def test_every_public_name_is_there() -> None:
    assert "nn" not in sparseprune.__all__  # type: ignore[attr-defined]  # a star must not hide torch's
    for name in [*sparseprune.__all__, "nn"]:  # type: ignore[attr-defined]  # the stub says them one by one
        assert getattr(sparseprune, name) is not None and name in dir(sparseprune)
    with pytest.raises(AttributeError, match="module 'sparseprune' has no attribute 'nothing'"):
        _ = sparseprune.nothing  # type: ignore[attr-defined]


def test_classes_of_errors() -> None:
    base = sparseprune.SparsepruneError
    assert issubclass(FormatError, (base)) and issubclass(FormatError, ValueError)
    assert issubclass(sparseprune.UnsupportedError, base) and issubclass(
        sparseprune.UnsupportedError, NotImplementedError
    )
    assert issubclass(sparseprune.VerificationError, base) and not issubclass(base, ValueError)


# ---- running


def test_inputs_need_not_be_contiguous_or_aligned(saved: Path) -> None:
    program = runtime.load(saved / "model.spr")
    expected = np.load(saved / "y.npy")
    wide = np.zeros((2, 3, 12, 20), np.float32)
    wide[..., ::2] = X
    raw = np.zeros(X.nbytes + 1, np.uint8)
    odd = raw[1:].view(np.float32).reshape(X.shape)
    odd[:] = X
    frozen = X.copy()
    frozen.flags.writeable = False
    last = np.ascontiguousarray(X.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for x in (X, wide[..., ::2], np.asfortranarray(X), last, X[::-1][::-1], odd, frozen):
        before = x.copy()
        assert np.array_equal(program(x), expected) and np.array_equal(x, before)


def test_outputs_are_fresh_and_nested() -> None:
    a, b = X, np.ones((2, 4, 12, 10), np.float32)
    fast = sparseprune.convert(Two().eval(), (torch.from_numpy(a), torch.from_numpy(b)), tune="fixed")
    program = fast.program
    out = program(a, b)
    assert list(out) == ["sum", "parts"] and isinstance(out["parts"], tuple) and out["parts"][1] is None
    assert np.allclose(out["sum"], out["parts"][0] + b)
    kept = out["sum"].copy()
    out["sum"][:] = np.nan
    out["parts"][0][:] = np.nan
    assert np.array_equal(program(a, b)["sum"], kept)
    with pytest.raises(ValueError, match="inputs: expected 2, got 1"):
        program(a)
    with pytest.raises(ValueError, match="input"):
        program(a, b[:1])  # equal names are equal sizes


def test_wrong_inputs(saved: Path) -> None:
    program = runtime.load(saved / "model.spr")
    with pytest.raises(TypeError, match="input 'input': expected a numpy.ndarray or an array with __dlpack__, got li"):
        program(X.tolist())
    with pytest.raises(TypeError, match="input 'input': this Tensor cannot be shared through DLPack: .*gradient"):
        program(torch.from_numpy(X).requires_grad_())
    with pytest.raises(ValueError, match=r"expected an array on the CPU, got one on DLPack device \(2, 0\)"):
        program(Elsewhere())
    with pytest.raises(TypeError, match="input 'input': expected dtype float32, got float64"):
        program(X.astype(np.float64))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected dtype float32, got >f4"):
        program(X.astype(">f4"))
    with pytest.raises(ValueError, match=r"expected size 3 in dimension 1, got \(2, 4, 12, 10\)"):
        program(np.zeros((2, 4, 12, 10), np.float32))
    with pytest.raises(ValueError, match=r"\(3, 12, 10\)"):
        program(X[0])
    with pytest.raises(ValueError, match="extent 0"):
        program(X[:0])
    with pytest.raises(ValueError, match="does not fit|window"):
        program(X[:, :, :2, :2])  # nothing is left behind the pooling
    assert np.array_equal(program(X), np.load(saved / "y.npy"))


def test_the_native_gate_checks_arrays_itself(saved: Path) -> None:
    plan = runtime.load(saved / "model.spr").plan(X.shape)
    y = np.empty((2, 5), np.float32)
    plan.run([X], [y])
    assert np.array_equal(y, np.load(saved / "y.npy"))
    frozen = y.copy()
    frozen.flags.writeable = False
    wrong: list[tuple[list[Any], list[Any], str]] = [
        ([], [y], "inputs: 0 came, expected 1"),
        ([X], [y, y], "outputs: 2 came, expected 1"),
        ([X.astype(np.float64)], [y], r"inputs\[0\] has dtype float64, expected float32"),
        ([X[:1]], [y], r"inputs\[0\] has shape \(1, 3, 12, 10\), expected \(2, 3, 12, 10\)"),
        ([np.asfortranarray(X)], [y], r"inputs\[0\] is not C-contiguous"),
        ([X], [np.empty((5, 2), np.float32)], r"outputs\[0\] has shape \(5, 2\), expected \(2, 5\)"),
        ([X], [np.empty((5, 2), np.float32).T], r"outputs\[0\] is not C-contiguous"),
        ([X], [frozen], r"outputs\[0\] is read-only"),
    ]
    for inputs, outputs, message in wrong:
        with pytest.raises(ValueError, match=message):
            plan.run(inputs, outputs)


def test_arrays_of_other_libraries_come_and_go_without_a_copy(saved: Path) -> None:
    program, x = runtime.load(saved / "model.spr"), torch.from_numpy(X)
    expected = np.load(saved / "y.npy")
    for given in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert np.array_equal(program(given), expected)
    with pytest.raises(TypeError, match="expected dtype float32, got float64"):
        program(x.double())
    y = program(x)
    shared = torch.utils.dlpack.from_dlpack(y)
    shared[0, 0] = 7
    assert y[0, 0] == 7
    assert runtime._float32(x, "x").ctypes.data == x.data_ptr()


def test_it_says_what_is_planned_anew(saved: Path, tmp_path: Path) -> None:
    before = sparseprune.num_threads()
    try:
        sparseprune.set_num_threads(1)
        program = runtime.load(saved / "model.spr")
        assert "the file holds no tuning" in program.describe()["planning"]
        program.tune([X.shape], 0.2)
        (tmp_path / "tuned.spr").write_bytes(program.data)
        tuned = runtime.load(tmp_path / "tuned.spr")
        assert tuned.data == program.data
        assert tuned.describe()["planning"].endswith("1 thread, with the file's tuning")
        sparseprune.set_num_threads(2)
        assert tuned.describe()["planning"].endswith("2 threads: the file was tuned with 1; its choices are kept")
    finally:
        sparseprune.set_num_threads(before)
    code = f"""
import json, sparseprune.runtime
print(json.dumps(sparseprune.runtime.load({str(tmp_path / "tuned.spr")!r}).describe()["planning"]))
"""
    assert "the file was tuned on" in python(code, SPARSEPRUNE_ISA="scalar")


# ---- plans


def test_plans_are_cached_and_bounded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = runtime.load(saved / "model.spr")
    plan = program.plan(X.shape)
    assert program.plan(X.shape) is plan and plan.output_shapes == [(2, 5)]
    monkeypatch.setattr(runtime, "_MOST_PLANS", 8)
    shapes = [(1, 3, 8 + i, 9) for i in range(40)]
    outputs = [program(np.ones(shape, np.float32)) for shape in shapes]
    assert len(program._plans) == 8
    for shape, y in zip(shapes, outputs, strict=True):  # forgotten plans are made again, for the same bits
        assert np.array_equal(program(np.ones(shape, np.float32)), y)
    assert np.array_equal(program(X), np.load(saved / "y.npy"))


def test_forgotten_plans_are_freed(saved: Path) -> None:
    code = f"""
import json, numpy as np, sparseprune.runtime
program = sparseprune.runtime.load({str(saved / "model.spr")!r})
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def run(start, stop):
    for n in range(start, stop):
        program(np.zeros((1, 3, 200 + n, 600 - n), np.float32))
run(0, 100)
before = resident()
run(100, 400)
print(json.dumps([before, resident(), program.plan((1, 3, 400, 400)).arena_bytes]))
"""
    before, after, plan = python(code)
    assert plan > 1e6 and after < before + 40 * plan  # 300 more plans


# ---- files


def test_data_and_pickle(saved: Path) -> None:
    program = runtime.load(str(saved / "model.spr"))
    assert program.data == (saved / "model.spr").read_bytes()
    again = pickle.loads(pickle.dumps(program))
    assert np.array_equal(again(X), program(X))
    assert program.describe()["nbytes"] == (saved / "model.spr").stat().st_size


def test_what_is_no_program(saved: Path, tmp_path: Path) -> None:
    data = (saved / "model.spr").read_bytes()
    for wrong in (b"", b"PK", data[:-1], data + b"\0", data[:100], b"\xff" * 64):
        with pytest.raises(FormatError):
            runtime.Program(wrong)
    with pytest.raises(TypeError):
        runtime.Program("text")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        runtime.load(tmp_path / "none.spr")
    with pytest.raises(FormatError, match="sparseprune"):  # a safetensors file of something else
        from safetensors.numpy import save

        runtime.Program(save({"w": np.zeros(3, np.float32)}))
