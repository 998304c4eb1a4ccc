"""The native tests, and what the kernels' objects export: built here unless SPARSEPRUNE_NATIVE_TESTS names them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a virtual environment brings them, too
CASES = "200"  # .ci/run does 2,000 on each instruction set, and some under sanitizers


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture(scope="module")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder is the build folder."""
    if given := os.environ.get("SPARSEPRUNE_NATIVE_TESTS"):
        return Path(given).resolve()
    cmake, ninja = (shutil.which(tool, path=TOOLS) for tool in ("cmake", "ninja"))
    if cmake is None:
        pytest.skip("needs cmake")
    build = tmp_path_factory.mktemp("native")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DSPARSEPRUNE_PYTHON=OFF", "-DSPARSEPRUNE_TESTS=ON"]
    configure: list[str | Path] = [cmake, "-S", ROOT, "-B", build, *generator, *options]
    for command in (configure, [cmake, "--build", build, "-j", "2"]):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "native_tests"


def test_native(executable: Path) -> None:
    done = run(executable, CASES)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert f"scalar: {CASES} random layers" in lines and lines[-1] == "0 failures"


def test_an_unknown_instruction_set_is_an_error(executable: Path) -> None:
    assert run(executable, "1", "bogus").returncode != 0


# ---- symbols

CHECK = ROOT / "tests" / "native" / "check_symbols.sh"
needs_tools = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("nm", "g++", "bash")), reason="needs nm, g++ and bash"
)


@needs_tools
def test_kernels_export_one_symbol_each(executable: Path) -> None:
    done = run("bash", CHECK, executable.parent)
    assert done.returncode == 0, done.stdout + done.stderr


GETTER = "namespace sparseprune { struct Kernels; const Kernels* kernels_scalar() { return nullptr; } }\n"


@needs_tools
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", ""),
        ("static int hidden() { return 1; }\nint (*volatile keep)();", "keep"),
        ("int second() { return 2; }", "exports second()"),
        ("inline int merged() { return 3; }\nstatic int (*used)() = merged;\nstatic int call() { return used(); }", ""),
        (
            "template <class T> struct S { static T f(T x) { return x * 3; } };\ntemplate struct S<int>;",
            "weak symbol S<int>::f(int)",
        ),
        (
            "__attribute__((noinline)) inline float weak(float x) { return x; }\nfloat (*volatile p)(float) = weak;",
            "weak symbol weak(float)",
        ),
        (
            "#include <cmath>\nstatic double v;\nstruct G { G() { v = std::exp(v); } };\nstatic G g;",
            "calls exp",
        ),
        ("int table[4];", "exports table"),
    ],
)
def test_the_check_can_fail(code: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "kernels_scalar.cpp").write_text(GETTER + code)
    compiled = run("g++", "-std=c++17", "-O1", "-c", "kernels_scalar.cpp", "-o", "kernels_scalar.cpp.o", cwd=tmp_path)
    assert compiled.returncode == 0, compiled.stderr
    done = run("bash", CHECK, tmp_path)
    assert (done.returncode != 0) == bool(message) and message in done.stdout, done.stdout


@needs_tools
def test_the_check_wants_the_getter_and_an_object(tmp_path: Path) -> None:
    done = run("bash", CHECK, tmp_path)
    assert done.returncode != 0 and "no kernels_*.cpp.o" in done.stdout
    (tmp_path / "kernels_avx2.cpp").write_text(GETTER)  # another one's getter
    assert run("g++", "-c", "kernels_avx2.cpp", "-o", "kernels_avx2.cpp.o", cwd=tmp_path).returncode == 0
    done = run("bash", CHECK, tmp_path)
    assert done.returncode != 0
    assert "exports sparseprune::kernels_scalar()\ndoes not define sparseprune::kernels_avx2()" in done.stdout
