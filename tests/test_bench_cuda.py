"""`bench/cuda_layers.py`, `bench/cuda_ways.py` and `csrc/cuda/resources.py`: what can be said without a device.

No timing is judged here.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseprune.cuda_layers import Window

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "csrc" / "cuda")]
cuda_layers: Any = importlib.import_module("cuda_layers")
ways_of: Any = importlib.import_module("cuda_ways")
resources: Any = importlib.import_module("resources")


def test_cases_have_their_zeros() -> None:
    cases = cuda_layers.cases()
    assert len({case.name for case in cases}) == len(cases) and sum(case.at_least is not None for case in cases) == 12
    for case in (replace(case, weight=(64, 64, *case.weight[2:])) for case in cases):
        weight = ways_of.pruned(case)
        assert abs(float((weight == 0).float().mean()) - case.sparsity) < (0.3 if case.block[1] > 1 else 0.05)
        rows, columns = case.block
        blocks = (weight != 0).unfold(0, rows, rows).unfold(1, columns, columns)
        assert torch.equal(blocks.any(-1).any(-1), blocks.all(-1).all(-1))


@pytest.mark.parametrize(
    "shape, x_shape, window",
    [
        ((64, 64), (2, 64), Window()),
        ((8, 4, 3, 3), (2, 4, 6, 6), Window(padding=(1, 1))),
        ((8, 1, 3, 3), (3, 4, 7, 9), Window((2, 1), (0, 1), (1, 2), 4)),
    ],
)
def test_torch_ways_agree(shape: tuple[int, ...], x_shape: tuple[int, ...], window: Window) -> None:
    case = ways_of.Case("", shape, x_shape, 0.5, window=window)
    weight, x = ways_of.pruned(case), torch.randn(x_shape)
    ways = ways_of.torch_ways(case, weight, x, False)
    assert {"dense", "torch.sparse CSR"} <= set(ways) or {"dense", "dense channels_last"} <= set(ways)
    for name, way in ways.items():
        if "BSR" not in name:  # on the CPU torch has no such product
            y = way().t() if "CSR" in name else way()
            assert ways_of.check(case, lambda y=y: y, weight, x) < 1e-5
    with pytest.raises(AssertionError, match="relative error"):
        ways_of.check(case, lambda: 1.1 * ways["dense"](), weight, x)


def test_summary_takes_the_best_of_each_side() -> None:
    case = ways_of.Case("", (8, 8), (1, 8), 0.9, at_least=2.0, cold=True)
    times = {
        "gemv": {"warm": 1.0, "cold": 2.0},
        "spmm/1x1/1": {"warm": 2.0, "cold": 1.0},
        "dense": {"warm": 1.5, "cold": 4.0},
        "torch 2:4": {"warm": 3.0, "cold": 1.5},
    }
    found = ways_of.summary(case, times, {"gemv", "spmm/1x1/1"})
    assert found["warm"] == {"ours": "gemv", "other": "dense", "ratio": 1.5}
    assert found["cold"] == {"ours": "spmm/1x1/1", "other": "torch 2:4", "ratio": 1.5} and found["reached"] is False


LOG = """
ptxas info    : Compiling entry function '_ZN11sparseprune4cuda39_GLOBAL__N__dc2e91ba_7_spmm_cu_92efdd8d11spmm_kernelINS0_6BFloatELi4ELi1EEEvNS0_8SpmmArgsE' for 'sm_90'
ptxas info    : Function properties for _ZN11x
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 92 registers, used 1 barriers
ptxas info    : Compiling entry function '_ZN11sparseprune4cuda37_GLOBAL__N__a_7_gemv_cu_911gemv_kernelIfLi4EEEvNS0_8GemvArgsE' for 'sm_80'
    8 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 16 bytes smem
"""  # noqa: E501


def test_resources_of_a_log() -> None:
    uses = resources.read(LOG.splitlines())
    assert [(use.kernel, use.architecture, use.registers, use.spills) for use in uses] == [
        ("spmm/4x1/1 bfloat16", "sm_90", 92, 0),
        ("gemv/4 float32", "sm_80", 32, 12),
    ]
    assert "| gemv/4 float32 | 32 (8 B stack, 12 B spilled, 16 B shared) |  |" in resources.table(uses)


def test_spills_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import io

    clean = LOG[: LOG.rindex("ptxas info    : Compiling")]
    for log, code in ((LOG, 1), (clean, 0), ("", 1)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(log))
        assert resources.main() == code
    assert "spilled: gemv/4 float32 on sm_80, 12 bytes" in capsys.readouterr().err
