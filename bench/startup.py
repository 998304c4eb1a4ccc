"""From a program file to its first answer, without torch: time, memory, bytes a kept weight.

    python bench/startup.py                   # ResNet-18 and ResNet-50 with zeros (needs torch to make them)
    python bench/startup.py model.spr --input-shape 1,3,224,224 --repeats 9

Each measurement is a fresh process: `import sparseprune.runtime`, `load`, one call. "process" is all of it, Python's
own start and end included. "load MiB" is the highest resident set during `load`, less that before it and the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NETWORKS = [("resnet18", 0.95), ("resnet18", 0.98), ("resnet50", 0.95)]

MAKE = """
import sys, torch, sparseprune
from sparseprune.zoo import NETWORKS
name, sparsity, folder = sys.argv[1], float(sys.argv[2]), sys.argv[3]
network = NETWORKS[name]
model = sparseprune.prune_uniform(network.factory().eval(), sparsity, exclude=network.keep_dense)
fast = sparseprune.convert(model, torch.zeros(1, *network.input_shape), tune="fixed", verify=False)
for weights in ("float32", "float16"):
    fast.save(f"{folder}/{name}-{sparsity:.0%}-{weights}.spr", weights=weights)
"""

RUN = """
import time
begin = time.perf_counter()
import json, sys
import numpy as np
import sparseprune.runtime
imported = time.perf_counter()
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
x = np.zeros(json.loads(sys.argv[2]), np.float32)
before = status("VmRSS:")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
ready = time.perf_counter()
program = sparseprune.runtime.load(sys.argv[1])
loaded = time.perf_counter()
peak = status("VmHWM:") - before
again = time.perf_counter()
program(x)
end = time.perf_counter()
kept = sum(layer.get("kept", 0) for layer in program.describe()["layers"])
print(json.dumps({"import": imported - begin, "load": loaded - ready, "first": end - again, "peak": peak, "kept": kept,
                  "torch": "torch" in sys.modules}))
"""


def measure(path: Path, shape: list[int], repeats: int) -> str:
    runs: list[dict[str, Any]] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        command = [sys.executable, "-c", RUN, str(path), json.dumps(shape)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        runs.append({**json.loads(output), "process": time.perf_counter() - begin})
    assert not any(run["torch"] for run in runs)

    def ms(*keys: str) -> str:
        times = [1e3 * sum(run[key] for key in keys) for run in runs]
        return f"{statistics.median(times):6.0f} ({min(times):.0f})"

    size, kept = path.stat().st_size, runs[0]["kept"]
    above = max(run["peak"] for run in runs) - size
    return (f"{path.stem:24} {size:12,} {size / kept:6.2f} {ms('import'):>13} {ms('load'):>13} {ms('first'):>13} "
            f"{ms('import', 'load', 'first'):>13} {ms('process'):>13} {above / 2**20:8.1f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?", type=Path)
    parser.add_argument("--input-shape", default="1,3,224,224")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    shape = [int(part) for part in args.input_shape.split(",")]
    print(f"{'program':24} {'bytes':>12} {'/kept':>6} {'import ms':>13} {'load ms':>13} {'first ms':>13} {'sum':>13} "
          f"{'process':>13} {'load MiB':>8}\n{'':24} {'':12} {'':6}   median (fastest)")  # fmt: skip
    if args.program is not None:
        print(measure(args.program, shape, args.repeats))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, sparsity in NETWORKS:
            subprocess.run([sys.executable, "-c", MAKE, name, str(sparsity), folder], check=True)
            for weights in ("float32", "float16"):
                print(measure(Path(folder) / f"{name}-{sparsity:.0%}-{weights}.spr", shape, args.repeats), flush=True)


if __name__ == "__main__":
    main()
