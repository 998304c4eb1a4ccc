"""Does the memory of a process that infers for days stay the same? Exit status 1 where it grows by a MiB.

    python bench/soak.py                           # a million inferences of a tiny network, made here (needs torch)
    python bench/soak.py model.spr --inferences 100000

The first tenth warms up: plans, arenas and Python's own caches. Then the resident set may not grow by 1 MiB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import sparseprune.runtime

LIMIT = 1 << 20


def resident() -> int:
    """Bytes of this process in memory, from the kernel's exact count: /proc/self/statm is batched for each thread."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/smaps_rollup has no Rss")


def tiny(folder: Path) -> Path:
    """A program of two convolutions and a linear layer, saved by another process, so that torch is not in this one."""
    import subprocess

    code = f"""
import torch, sparseprune
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, 2), nn.Flatten(), nn.Linear(24, 5)).eval()
sparseprune.prune_uniform(model, 0.7, exclude=())
sparseprune.convert(model, torch.zeros(1, 3, 8, 8), tune="fixed", verify=False).save({str(folder / "tiny.spr")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    return folder / "tiny.spr"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?", type=Path, help="default: a tiny one, made here")
    parser.add_argument("--inferences", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = sparseprune.runtime.load(args.program or tiny(Path(folder)))
    inputs = []
    for _, shape in program.inputs:
        sizes = [n if isinstance(n, int) else 1 if place == 0 else 8 for place, n in enumerate(shape)]
        inputs.append(np.ones(sizes, np.float32))
    program(*inputs)
    warm, begin, before = max(args.inferences // 10, 1), time.perf_counter(), 0
    for done in range(args.inferences):
        if done == warm:
            before = resident()
        program(*inputs)
    growth = resident() - before
    seconds = time.perf_counter() - begin
    print(f"{args.inferences} inferences, {seconds / args.inferences * 1e6:.1f} us each; after the first {warm} the "
          f"resident set grew by {growth / 1024:.0f} KiB")  # fmt: skip
    return int(growth >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
