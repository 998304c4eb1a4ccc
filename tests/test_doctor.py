from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from sparseprune import _native, cli, doctor
from sparseprune.doctor import Check


def find(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process is started: torch answers at once, tools say nothing."""

    def run(command: list[str], stdin: str = "", timeout: float = 20) -> tuple[int, str]:
        return 0, '["2.13.0+cpu", 2]\n' if command[0] == sys.executable else "tool 99.1\n"

    monkeypatch.setattr(doctor, "_run", run)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without any tool, package, file of /proc and /sys, or environment."""

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.setattr(shutil, "which", lambda *args, **named: None)
    monkeypatch.setattr(doctor, "_run", lambda *args, **named: (1, "ModuleNotFoundError: No module named 'torch'\n"))
    monkeypatch.setattr(doctor, "_text", lambda path: "")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nowhere")
    monkeypatch.delenv("CXX", raising=False)


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for check in ("Python", "NumPy", "native core", "instruction set", "threads", "torch", "safetensors", "tqdm"):
        line = next(line for line in out.splitlines() if line[11:].startswith(f"{check}  "))
        assert line.startswith("  ok ")
    last = out.splitlines()[-1]
    assert f"{_native.isa()}, " in out and last.startswith("Everything to run") and " is here" in last


def test_json(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["runs"] and data["converts"] and data["sparseprune"]
    assert {check["group"] for check in data["checks"]} == set(doctor.GROUPS)
    assert {check["status"] for check in data["checks"]} <= {"ok", "note", "missing"}


def test_a_bare_system(bare: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    for fix in ("pip install 'numpy>=1.23'", "pip install 'sparseprune[torch]'", "pip install 'safetensors>=0.4'",
                "pip install --force-reinstall sparseprune", "sudo apt-get install g++", "pip install cmake",
                "sudo apt-get install python3-dev", "pip install ninja"):  # fmt: skip
        assert f"type: {fix}" in out
    assert "nvidia-cuda-toolkit" not in out  # gigabytes, for nothing
    assert out.count("unknown without the native core") == 2  # said once, not thrice, why it is not there
    assert "Programs cannot run here" in out
    assert cli.main(["doctor", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert not data["runs"] and not data["converts"] and not data["builds"]


def test_without_torch(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_run", lambda *args, **named: (1, "Traceback\nNo module named 'torch'\n"))
    checks = doctor.diagnose()
    torch = find(checks, "torch")
    assert torch.status == "missing" and "convert and benchmark are not available" in torch.found
    assert torch.fix is not None and torch.fix.startswith("pip install 'sparseprune[torch]'")
    assert doctor.usable(checks) and not doctor.usable(checks, "convert")
    assert "Programs run here; converting needs" in doctor.report(checks)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ((1, "OSError: libcudart.so: cannot open shared object file\n"), "cannot be imported: OSError: libcudart.so"),
        ((-11, ""), "cannot be imported: exit status -11"),
        ((0, '["2.1.0", 4]\n'), "2.1.0, 4 thread(s); 2.6 or newer is needed"),
        ((127, "TimeoutExpired"), "cannot be imported: TimeoutExpired"),
    ],
)
def test_a_broken_torch(answer: tuple[int, str], found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_run", lambda *args, **named: answer)
    check = find(doctor.diagnose(), "torch")
    assert check.status == "missing" and found in check.found and check.fix is not None


def test_noise_before_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_run", lambda *args, **named: (0, 'a warning\n["2.13.0", 2]\n'))
    assert find(doctor.diagnose(), "torch").found == "2.13.0, 2 thread(s)"


def test_an_instruction_set_that_is_not_there(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEPRUNE_ISA", "avx9")
    checks = doctor.diagnose()
    check = find(checks, "instruction set")
    assert check.status == "missing" and "avx9" in check.found and not doctor.usable(checks)
    assert check.fix is not None and "unset SPARSEPRUNE_ISA" in check.fix and "scalar" in check.fix
    monkeypatch.setenv("SPARSEPRUNE_ISA", "scalar")
    check = find(doctor.diagnose(), "instruction set")
    assert check.found.startswith("scalar, forced by SPARSEPRUNE_ISA") and check.status == "note"


def test_a_slower_instruction_set_than_could_be_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    class Native:
        def __init__(self, isa: str, *supported: str) -> None:
            self.isa = lambda: isa
            self.supported_isas = lambda: supported

    monkeypatch.delenv("SPARSEPRUNE_ISA", raising=False)
    best = "avx2, detected; SPARSEPRUNE_ISA=scalar forces scalar"
    assert doctor._isa(Native("avx2", "scalar", "avx2")) == ("ok", best)
    status, found, *fix = doctor._isa(Native("scalar", "scalar"))
    assert status == "note" and "slower" in found and not fix
    monkeypatch.setenv("SPARSEPRUNE_ISA", "avx2")
    status, found, *fix = doctor._isa(Native("avx2", "scalar", "avx2", "avx512"))
    assert status == "note" and "avx512 is the default here" in found and fix == ["unset SPARSEPRUNE_ISA"]


def test_threads(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/sys/fs/cgroup/cpu.max": "150000 100000\n"}
    monkeypatch.setattr(doctor, "_text", lambda path: files.get(path, ""))
    default, before = _native.available_cores(), _native.num_threads()
    _native.set_num_threads(default + 1)
    try:
        found = find(doctor.diagnose(), "threads").found
    finally:
        _native.set_num_threads(before)
    cores = len(os.sched_getaffinity(0))
    assert found.startswith(f"{default + 1}, set (the default is {default}); affinity {cores} of")
    assert found.endswith("cgroup quota 1.5 cores")
    files.clear()
    files |= {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}
    assert find(doctor.diagnose(), "threads").found.endswith("cgroup quota none")
    files["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "50000\n"
    assert find(doctor.diagnose(), "threads").found.endswith("cgroup quota 0.5 cores")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert "affinity unknown of" in find(doctor.diagnose(), "threads").found


def test_memory_and_huge_pages(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = "/sys/kernel/mm/transparent_hugepage/enabled"
    files = {"/proc/meminfo": "MemTotal: 4194304 kB\nMemAvailable: 1048576 kB\n", pages: "always madvise [never]\n",
             "/sys/fs/cgroup/memory.max": "2147483648\n"}  # fmt: skip
    monkeypatch.setattr(doctor, "_text", lambda path: files.get(path, ""))
    checks = doctor.diagnose()
    assert find(checks, "memory").found == "1.0 GiB free of 4.0 GiB; cgroup limit 2.0 GiB"
    assert find(checks, "huge pages").status == "note" and str(find(checks, "huge pages").fix).endswith(pages)
    files[pages] = "always [madvise] never\n"
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    checks = doctor.diagnose()
    assert find(checks, "huge pages").found.startswith("madvise") and "cgroup" not in find(checks, "memory").found


def test_old_versions(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy

    monkeypatch.setattr(numpy, "__version__", "1.9.3")
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.18")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    checks = doctor.diagnose()
    assert find(checks, "NumPy").found == "1.9.3; 1.23 or newer is needed"
    assert find(checks, "Python").status == "missing" and "Linux" in find(checks, "system").found
    assert not doctor.usable(checks)


def test_what_breaks_a_look_is_a_line(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr(platform, "system", broken)
    checks = doctor.diagnose()
    assert find(checks, "system") == Check("run", "system", "note", "could not be looked at: no such thing")
    assert doctor.usable(checks)


def test_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "old++"
    old.write_text("#!/bin/sh\necho 'error: unknown option -std=c++17' >&2\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    status, found, *fix = doctor._compiler()
    assert status == "missing" and found.startswith(f"{old} does not compile C++17: error: unknown option -std=c++17")
    monkeypatch.setenv("CXX", str(tmp_path / "none++"))
    status, found, *fix = doctor._compiler()
    assert status == "missing" and found.startswith(f"CXX={tmp_path}/none++ is not here")
    assert str(fix[0]).startswith("unset CXX, or sudo apt-get install g++")
    old.write_text("not a program at all")
    monkeypatch.setenv("CXX", str(old))
    assert doctor._compiler()[0] == "missing"


def test_a_tool_beside_python(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"{path}/{name}" if path else None)
    monkeypatch.setattr(doctor, "_run", lambda *args, **named: (0, "cmake version 3.5.1\n"))
    check = find(doctor.diagnose(), "cmake")
    assert check.status == "note" and "3.20 or newer is needed" in check.found and check.fix == "pip install cmake"


def test_the_oldest_versions_are_those_of_the_project() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for name, version in doctor.OLDEST.items():
        assert f'"{name}>={version}"' in text or (name == "python" and f'requires-python = ">={version}"' in text)


def test_needs_no_torch() -> None:
    code = "import sys; from sparseprune import doctor; doctor.diagnose(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
