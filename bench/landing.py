"""How near `autoprune` lands to its latency target: by the table alone, after its rounds, and converted afresh.

    python bench/landing.py resnet18-32 --threads 1 --speedups 5,10,20 --json landing.json

Weights are as initialised: what is judged is the latency, not the accuracy. The table is measured once (`--table` keeps
it), then each target is reached from the dense network again. Afterwards the pruned model is converted and tuned
`--repeats` times more, which took no part in choosing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import sparseprune
from sparseprune.latency import SPARSITIES, LatencyTable
from sparseprune.timing import machine, thread_count
from sparseprune.zoo import NETWORKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("--threads", type=int, default=sparseprune.num_threads())
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--speedups", type=_numbers, default=[5.0, 10.0, 20.0], help="targets, against dense torch")
    parser.add_argument("--sparsities", type=_numbers, default=list(SPARSITIES), help="of the latency table")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=3, help="conversions afresh; the median counts")
    parser.add_argument("--table", type=Path, help="read the latency table from here, or write it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    x = torch.zeros(options.batch, *NETWORKS[options.network].input_shape)
    if options.table and options.table.exists():
        table = LatencyTable.load(options.table)
    else:
        model = network(options.network)
        table = LatencyTable.measure(model, x, threads=options.threads, sparsities=options.sparsities)
        if options.table:
            table.save(options.table)
    print(f"{table}\n")
    rows = []
    for speedup in options.speedups:
        rows.append(land(options, table, x, speedup))
        print(line(rows[-1]), flush=True)
        if options.json:
            document = {"network": options.network, "threads": table.threads, "machine": machine(), "rows": rows}
            beside = options.json.with_name(options.json.name + ".part")
            beside.write_text(json.dumps(document, indent=1) + "\n")
            beside.replace(options.json)


def land(options: argparse.Namespace, table: LatencyTable, x: torch.Tensor, speedup: float) -> dict[str, Any]:
    model = network(options.network)
    found = sparseprune.autoprune(model, x, speedup=speedup, table=table, tolerance=options.tolerance)
    with thread_count(table.threads):
        yardstick = table.yardstick(network(options.network), x, found.target_ms)
        afresh = [yardstick.measure(model) for _ in range(options.repeats)]
    return {
        "speedup": speedup, "target_ms": found.target_ms, "first_measured_ms": found.attempts[0].measured_ms,
        "measured_ms": found.measured_ms, "rounds": len(found.attempts),
        "sparsity": sparseprune.summary(model).sparsity, "afresh_ms": afresh,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    def off(ms: float) -> str:
        return f"{ms / row['target_ms'] - 1:+.1%}"

    return (
        f"{row['speedup']:5.1f} times: target {row['target_ms']:8.3f} ms, {row['sparsity']:.2%} zeros; table alone "
        f"{off(row['first_measured_ms'])}, after {row['rounds']} round(s) {off(row['measured_ms'])}; "
        f"converted afresh {', '.join(map(off, row['afresh_ms']))}"
    )


def network(name: str) -> torch.nn.Module:
    return NETWORKS[name].factory().eval()


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
