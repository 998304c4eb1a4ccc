"""Where the time of a converted network goes, layer by layer, measured inside the running network.

    python bench/profile_network.py resnet50 --sparsity 0.95 --threads 2

Prints, for each operator: its group, where it runs depth first with others, median microseconds, useful GFLOP/s a
thread (2 x kept weights x output pixels / time / threads) and what was chosen. `bench/ceilings.cpp` says what the
machine could do.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np

import sparseprune
from sparseprune import runtime
from sparseprune.zoo import NETWORKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=50)
    options = parser.parse_args()

    import torch

    sparseprune.set_num_threads(options.threads)
    network = NETWORKS[options.network]
    model = network.factory()
    sparseprune.prune_uniform(model, options.sparsity)
    x = torch.randn(options.batch, *network.input_shape)
    fast = sparseprune.convert(model, x, verify=False)
    profile(fast.program, np.ascontiguousarray(x.numpy()), options.runs)


def profile(program: runtime.Program, x: np.ndarray, runs: int) -> None:
    plan = program.plan(x.shape)
    outputs = [np.empty(shape, np.float32) for shape in plan.output_shapes]
    samples = [plan.profile([x], outputs) for _ in range(runs + 3)][3:]
    total = 0.0
    layers = program.describe()["layers"]
    group = {node: f"g{i}" for i, (begin, end) in enumerate(plan.groups) for node in range(begin, end)}
    for node, (layer, choice) in enumerate(zip(layers, plan.choices, strict=True)):
        micros = 1e6 * statistics.median(sample[node] for sample in samples)
        total += micros
        shape = plan.value_shapes[node + 1]
        pixels = int(np.prod(shape)) // shape[1]
        useful = 2e-3 * layer.get("kept", 0) * pixels / micros / plan.threads if micros else 0.0
        picked = f"{choice['form']}/{choice['kind']}/{choice['vectors']}" if choice else ""
        name = f"{group.get(node, ''):3} {layer['name']:28} {layer['op']:17} {str(shape):22}"
        print(f"{name} {micros:9.1f} us {useful:7.1f} GFLOP/s  {picked}")
    memory = f"arena {plan.arena_bytes / 1e6:.1f} MB, packed weights {plan.weight_bytes / 1e6:.1f} MB"
    print(f"sum of medians: {total / 1e3:.3f} ms; {memory}")


if __name__ == "__main__":
    main()
