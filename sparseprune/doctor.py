"""What is here and what is missing to run, convert and build: the `sparseprune doctor` command.

Imports nothing but the standard library at first, so that it can say that NumPy, the native core or torch is missing.
torch is looked at in a process of its own, since a broken one may do worse than raise.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import __version__

__all__ = ["Check", "diagnose", "report", "to_json", "usable"]

OK, NOTE, MISSING = "ok", "note", "missing"

GROUPS = {
    "run": "To run programs",
    "convert": "To prune, convert and benchmark",
    "build": "To build from source (a wheel needs none of it)",
}

# As in pyproject.toml.
OLDEST = {"python": "3.10", "numpy": "1.23", "safetensors": "0.4", "torch": "2.6", "tqdm": "4.60", "cmake": "3.20",
          "ninja": "1.10"}  # fmt: skip

_WITH_TORCH = "pip install 'sparseprune[torch]' (in a checkout: pip install '.[torch]')"
_NATIVE = "pip install --force-reinstall sparseprune (in a checkout: pip install .)"
_TORCH_PROBE = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
import torch
print(json.dumps([torch.__version__, torch.get_num_threads()]))
"""


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        group: A key of `GROUPS`: what it is needed for.
        name: What was looked for.
        status: `ok`; `note`, which hinders nothing; `missing`, without which the group's work fails.
        found: What is there, or what is wrong.
        fix: What to type, where something can be done.
    """

    group: str
    name: str
    status: str
    found: str
    fix: str | None = None


def diagnose() -> list[Check]:
    """Look at everything. Takes a few seconds where torch is installed, and never raises.

    Example:
        >>> [check.name for check in diagnose() if check.status == "missing"]  # doctest: +SKIP
        ['torch']
    """
    checks = []
    for group, name, look in _LOOKS:
        try:
            checks.append(Check(group, name, *look()))
        except Exception as exc:  # an odd system: say so and go on
            status = MISSING if group == "run" and name in _NEEDED else NOTE
            checks.append(Check(group, name, status, f"could not be looked at: {_one_line(exc)}"))
    return checks


def usable(checks: Iterable[Check], group: str = "run") -> bool:
    """Whether nothing that this group needs is missing. Converting needs all that running does."""
    groups = ("run",) if group == "run" else ("run", group)
    return not any(check.status == MISSING and check.group in groups for check in checks)


def report(checks: Sequence[Check]) -> str:
    """The plain text that the command prints.

    Example:
        >>> print(report(diagnose()))  # doctest: +SKIP
    """
    lines = [f"sparseprune {__version__} in {Path(__file__).parent}"]
    width = max((len(check.name) for check in checks), default=0)
    for group, title in GROUPS.items():
        lines += ["", title]
        for check in checks:
            if check.group != group:
                continue
            lines.append(f"  {check.status:7}  {check.name:{width}}  {check.found}")
            if check.fix is not None:
                lines.append(f"  {'':7}  {'':{width}}  type: {check.fix}")
    lines.append("")
    if not usable(checks):
        lines.append("Programs cannot run here: see what is missing above.")
    elif not usable(checks, "convert"):
        lines.append("Programs run here; converting needs what is missing above.")
    elif not usable(checks, "build"):
        lines.append("Everything to run and convert is here; building from source needs what is missing above.")
    else:
        lines.append("Everything to run, convert and build is here.")
    return "\n".join(lines)


def to_json(checks: Sequence[Check]) -> str:
    """The same as indented JSON: `sparseprune` (version), `runs`, `converts`, `builds`, and the list `checks`."""
    able = {"runs": usable(checks), "converts": usable(checks, "convert"), "builds": usable(checks, "build")}
    data = {"sparseprune": __version__} | able | {"checks": [asdict(check) for check in checks]}
    return json.dumps(data, indent=2)


# --- what is needed to run -------------------------------------------------------------------------------------------

Found = tuple[str, str] | tuple[str, str, str | None]  # status, found, fix


def _system() -> Found:
    system, machine = platform.system(), platform.machine()
    text = f"{system} {platform.release()}, {machine}, {_cpu()}"
    if system != "Linux" or machine.lower() not in ("x86_64", "amd64", "aarch64", "arm64"):
        return MISSING, f"{text}; Linux on x86-64 or aarch64 is needed"
    return OK, text


def _cpu() -> str:
    for line in _text("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "processor unknown"


def _python() -> Found:
    version = platform.python_version()
    text = f"{version} ({platform.python_implementation()}), {sys.executable}"
    if _older(version, OLDEST["python"]):
        return MISSING, f"{text}; {OLDEST['python']} or newer is needed", "python3.12 -m venv .venv"
    return OK, text


def _package(name: str, fix: str) -> Callable[[], Found]:
    def look() -> Found:
        oldest = OLDEST[name]
        try:
            module = importlib.import_module(name)
        except ImportError as exc:
            return MISSING, _absence(name, exc), fix
        version = str(getattr(module, "__version__", "of unknown version"))
        if _older(version, oldest):
            return MISSING, f"{version}; {oldest} or newer is needed", fix
        return OK, version

    return look


def _native_core() -> Found:
    try:
        native = importlib.import_module("sparseprune._native")
    except ImportError as exc:
        return MISSING, _one_line(exc), _NATIVE
    return OK, str(native.__file__)


def _native_part(look: Callable[[Any], Found]) -> Callable[[], Found]:
    """What the native core knows; why it is missing is a line of its own."""

    def found() -> Found:
        try:
            native = importlib.import_module("sparseprune._native")
        except ImportError:
            return NOTE, "unknown without the native core"
        return look(native)

    return found


def _isa(native: Any) -> Found:
    available = list(reversed(native.supported_isas()))
    forced = os.environ.get("SPARSEPRUNE_ISA")
    try:
        isa = native.isa()
    except ValueError as exc:
        return MISSING, _one_line(exc), f"unset SPARSEPRUNE_ISA (or set it to one of {', '.join(available)})"
    text = f"{isa}, forced by SPARSEPRUNE_ISA" if forced else f"{isa}, detected"
    if isa != available[0]:
        return NOTE, f"{text}; {available[0]} is the default here", "unset SPARSEPRUNE_ISA"
    if isa == "scalar":
        return NOTE, f"{text}: plain C++, several times slower than AVX2; programs run"
    return OK, text + "".join(f"; SPARSEPRUNE_ISA={name} forces {name}" for name in available[1:])


def _threads(native: Any) -> Found:
    threads, default = native.num_threads(), native.available_cores()
    quota = _cpu_quota()
    text = f"{threads}, {'the default' if threads == default else f'set (the default is {default})'}; affinity "
    text += f"{_affinity()} of {os.cpu_count() or 'unknown'} cores, cgroup quota "
    return OK, text + ("none" if quota is None else f"{quota:g} cores")


def _affinity() -> str:
    get = getattr(os, "sched_getaffinity", None)  # Linux has it
    return str(len(get(0))) if get else "unknown"


def _cpu_quota() -> float | None:
    """Cores that the cgroup allows, version 2 or 1; None: no limit."""
    words = _text("/sys/fs/cgroup/cpu.max").split()
    if not words:
        words = _text("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").split()
        words += _text("/sys/fs/cgroup/cpu/cpu.cfs_period_us").split()
    try:
        quota, period = (float(word) for word in words[:2])
    except ValueError:  # "max", or nothing there
        return None
    return quota / period if quota > 0 and period > 0 else None


def _memory() -> Found:
    sizes = {}
    for line in _text("/proc/meminfo").splitlines():
        match = re.match(r"(\w+):\s+(\d+) kB", line)
        if match:
            sizes[match[1]] = 1024 * int(match[2])
    if "MemTotal" not in sizes:
        return NOTE, "unknown"
    text = f"{_gib(sizes.get('MemAvailable', sizes.get('MemFree', 0)))} free of {_gib(sizes['MemTotal'])}"
    limit = _text("/sys/fs/cgroup/memory.max") or _text("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    if limit.strip().isdigit() and int(limit) < sizes["MemTotal"]:
        text += f"; cgroup limit {_gib(int(limit))}"
    return OK, text


def _huge_pages() -> Found:
    text = _text("/sys/kernel/mm/transparent_hugepage/enabled")
    match = re.search(r"\[(\w+)\]", text)
    if match is None:
        return NOTE, "not offered by this system; programs run, but miss the page tables' cache more often"
    if match[1] == "never":
        fix = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        return NOTE, "off; programs run, but miss the page tables' cache more often", fix
    return OK, f"{match[1]}: programs use them"


# --- what is needed to convert ---------------------------------------------------------------------------------------


def _torch() -> Found:
    status, output = _run([sys.executable, "-c", _TORCH_PROBE, json.dumps(sys.path)], timeout=120)
    last = output.strip().splitlines()[-1] if output.strip() else f"exit status {status}"
    if status != 0:
        absent = "No module named 'torch'" in last
        text = "not installed" if absent else f"cannot be imported: {last}"
        return MISSING, f"{text}; sparseprune.convert and benchmark are not available, programs run", _WITH_TORCH
    version, threads = json.loads(last)
    text = f"{version}, {threads} thread(s)"
    if _older(version, OLDEST["torch"]):
        return MISSING, f"{text}; {OLDEST['torch']} or newer is needed", _WITH_TORCH
    return OK, text


# --- what is needed to build -----------------------------------------------------------------------------------------


def _compiler() -> Found:
    fix = _system_package("g++", "gcc-c++")
    why = "; torch.compile, which the benchmark measures too, needs one"
    if named := os.environ.get("CXX"):
        names, fix = [named], f"unset CXX, or {fix}"
    else:
        names = ["c++", "g++", "clang++"]
    for name in names:
        command = name.split()  # CXX="ccache g++"
        if shutil.which(command[0]) is None:
            continue
        status, output = _run([*command, "-std=c++17", "-Werror", "-x", "c++", "-fsyntax-only", "-"],
                              stdin="inline constexpr int x = 0;\n")  # fmt: skip
        if status != 0:
            return MISSING, f"{name} does not compile C++17: {_one_line(output)}{why}", fix
        return OK, f"{name}: {_version_line(command)}"
    return MISSING, f"CXX={named} is not here{why}" if named else f"no {', '.join(names)}{why}", fix


def _headers() -> Found:
    header = Path(sysconfig.get_path("include"), "Python.h")
    if header.is_file():
        return OK, str(header)
    return MISSING, f"no {header}", _system_package("python3-dev", "python3-devel")


def _build_tool(name: str) -> Callable[[], Found]:
    def look() -> Found:
        beside = shutil.which(name, path=str(Path(sys.executable).parent))  # a virtual environment that is not active
        path, fix = shutil.which(name) or beside, f"pip install {name}"
        if path is None:
            return NOTE, "not here; pip fetches one to build with", fix
        text = _version_line([path])
        if _older(text, OLDEST[name]):
            return NOTE, f"{text}; {OLDEST[name]} or newer is needed, pip fetches one", fix
        return OK, f"{text}, {path}"

    return look


def _nvcc() -> Found:
    path = shutil.which("nvcc")
    if path is None:
        return NOTE, "not here; nothing needs it but a build with CUDA"
    lines = [line for line in _run([path, "--version"])[1].splitlines() if "release" in line]
    return OK, f"{lines[0] if lines else 'of unknown version'}, {path}"


_LOOKS: tuple[tuple[str, str, Callable[[], Found]], ...] = (
    ("run", "system", _system),
    ("run", "Python", _python),
    ("run", "NumPy", _package("numpy", f"pip install 'numpy>={OLDEST['numpy']}'")),
    ("run", "native core", _native_core),
    ("run", "instruction set", _native_part(_isa)),
    ("run", "threads", _native_part(_threads)),
    ("run", "memory", _memory),
    ("run", "huge pages", _huge_pages),
    ("convert", "torch", _torch),
    ("convert", "safetensors", _package("safetensors", f"pip install 'safetensors>={OLDEST['safetensors']}'")),
    ("convert", "tqdm", _package("tqdm", _WITH_TORCH)),
    ("build", "C++ compiler", _compiler),
    ("build", "Python.h", _headers),
    ("build", "cmake", _build_tool("cmake")),
    ("build", "ninja", _build_tool("ninja")),
    ("build", "nvcc", _nvcc),
)
_NEEDED = ("NumPy", "native core")


# --- helpers ---------------------------------------------------------------------------------------------------------


def _run(command: list[str], stdin: str = "", timeout: float = 20) -> tuple[int, str]:
    """Exit status and output (both streams) of a command; 127 and the reason where it cannot be run."""
    try:
        done = subprocess.run(command, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout,
                              check=False, encoding="utf-8", errors="replace")  # fmt: skip
    except (OSError, subprocess.SubprocessError) as exc:
        return 127, _one_line(exc)
    return done.returncode, done.stdout


def _version_line(command: list[str]) -> str:
    return _one_line(next(iter(_run([*command, "--version"])[1].splitlines()), "of unknown version"))


def _text(path: str) -> str:
    """A file's contents, empty where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _older(version: str, than: str) -> bool:
    """Whether the first number with dots in `version` is below `than`; a version that cannot be read is not."""
    match = re.search(r"\d+(?:\.\d+)*", version)
    return match is not None and _numbers(match[0]) < _numbers(than)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _absence(name: str, exc: ImportError) -> str:
    return "not installed" if exc.name == name else f"cannot be imported: {_one_line(exc)}"


def _system_package(debian: str, fedora: str) -> str:
    return f"sudo apt-get install {debian} (Debian, Ubuntu) or sudo dnf install {fedora} (Fedora)"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _one_line(what: object, limit: int = 200) -> str:
    text = " ".join(str(what).split()) or type(what).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
