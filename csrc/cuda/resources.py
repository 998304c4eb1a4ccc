"""What `nvcc -Xptxas -v` said of each kernel, as a table; fails where a register was spilled.

    cmake --build DIRECTORY 2>&1 | python csrc/cuda/resources.py [--markdown]
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_STATIC = re.compile(r"(\d+) bytes smem")
_TYPES = {"f": "float32", "Half": "float16", "BFloat": "bfloat16"}
_MATHS = ("float16", "bfloat16", "tf32", "3xtf32")


@dataclass
class Use:
    """One kernel on one architecture; bytes, but for registers."""

    kernel: str
    architecture: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    static_shared: int = 0


def kernel_name(mangled: str) -> str:
    """As `Choice.name` has it, with the type; the mangled name where it is none of ours.

    Example:
        >>> kernel_name("_ZN11sparseprune4cuda11spmm_kernelIfLi1ELi4EEEvNS0_8SpmmArgsE")
        'spmm/1x1/4 float32'
    """
    found = re.search(r"(spmm|gemv|blocks)_kernelI(.*?)EEv", mangled)
    if found is None:
        return mangled
    numbers = [int(n) for n in re.findall(r"L[ib](\d+)E", found[2] + "E")]
    if found[1] == "blocks":
        math, rows, vectors = re.findall(r"E(\d+)E|Li(\d+)E|Lb(\d)E", "E" + found[2].split("MathE", 1)[-1] + "E")[:3]
        kind = "vectors" if "1" in vectors else "blocks"
        return f"{kind}/{''.join(rows)} {_MATHS[int(''.join(math))]}"
    type_ = next(name for key, name in _TYPES.items() if re.match(rf"(NS\w*?_\d*)?{key}(E|L)", found[2]))
    if found[1] == "gemv":
        return f"gemv/{numbers[-1]} {type_}"
    return f"spmm/{numbers[-2]}x1/{numbers[-1]} {type_}"


def read(lines: list[str]) -> list[Use]:
    """Every kernel that ptxas reported, in its order."""
    uses: list[Use] = []
    for line in lines:
        if found := _ENTRY.search(line):
            uses.append(Use(kernel_name(found[1]), found[2]))
        elif found := _SPILLS.search(line):
            if uses:
                uses[-1].stack, uses[-1].spills = int(found[1]), int(found[2]) + int(found[3])
        elif uses and (found := _USED.search(line)):
            uses[-1].registers = int(found[1])
            static = _STATIC.search(line)
            uses[-1].static_shared = int(static[1]) if static else 0
    return uses


def table(uses: list[Use]) -> str:
    """Markdown: a row a kernel, a column an architecture: registers, and bytes of what else there is."""
    architectures = sorted({use.architecture for use in uses})
    cells: dict[str, dict[str, str]] = {}
    for use in uses:
        extra = [(use.stack, "stack"), (use.spills, "spilled"), (use.static_shared, "shared")]
        notes = ", ".join(f"{count} B {what}" for count, what in extra if count)
        cells.setdefault(use.kernel, {})[use.architecture] = f"{use.registers}" + (f" ({notes})" if notes else "")
    lines = ["| kernel | " + " | ".join(architectures) + " |", "|---|" + "---|" * len(architectures)]
    for kernel, row in sorted(cells.items()):
        lines.append(f"| {kernel} | " + " | ".join(row.get(a, "") for a in architectures) + " |")
    return "\n".join(lines)


def main() -> int:
    lines = sys.stdin.read().splitlines()
    uses = read(lines)
    spilled = [use for use in uses if use.spills]
    if not uses:
        print("\n".join(lines[-30:]), file=sys.stderr)
        print("no kernel was compiled", file=sys.stderr)
        return 1
    if "--markdown" in sys.argv:
        print(table(uses))
    else:
        most = max(uses, key=lambda use: use.registers)
        print(f"{len(uses)} kernels; most registers: {most.registers}, {most.kernel} on {most.architecture}")
    for use in spilled:
        print(f"spilled: {use.kernel} on {use.architecture}, {use.spills} bytes", file=sys.stderr)
    return bool(spilled)


if __name__ == "__main__":
    sys.exit(main())
