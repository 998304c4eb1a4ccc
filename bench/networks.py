"""Whole networks against every dense engine installed, at several sparsities, batch sizes and thread counts.

    pip install '.[torch,peers]'; pip install --no-deps MNN     # the peers are optional
    python bench/networks.py --json networks.json
    python bench/networks.py resnet50 --sparsity 0.95 --batch 1,16 --threads 1,2 --only eager,compile,mnn
    python bench/networks.py --device cuda --json networks.json      # on a GPU: cuda_networks.py

Each candidate is a process of its own, stopped while it is not its turn: engines whose threads spin would disturb each
other. They take turns in short blocks, in rotating order. The ratio is against the fastest *dense float32* candidate of
the same run; bf16, int8 and sparse rows of other engines are information. The machine is shared: read ratios within a
run, and only those that repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
from bench_options import refuse, split_device

from sparseprune import timing

NETWORKS = "resnet18-32,resnet50,yolov4-tiny,vgg16,mobilenetv2"
TORCH = ("eager", "channels_last", "compile", "compile_channels_last", "compile_max_autotune")
OURS = "sparseprune"
LIMIT = 900  # seconds until a candidate must be ready


def main(arguments: list[str] | None = None) -> int:
    device, arguments = split_device(sys.argv[1:] if arguments is None else arguments)
    if device == "cuda":
        import cuda_networks

        return cuda_networks.main(arguments, "networks.py --device cuda")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "networks", nargs="?", default=NETWORKS, help=f"names, separated by commas (default {NETWORKS})"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda: cuda_networks.py runs, which has options of "
                        "its own (--device cuda --help)")  # fmt: skip
    parser.add_argument("--sparsity", default="0.95,0.98")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--threads", default=str(min(2, len(os.sched_getaffinity(0)))))
    parser.add_argument("--only", help="these candidates, and sparseprune (default all that are installed)")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a block")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    refuse(parser, "cuda", "--dtype", "--tf32", "--compile")
    options = parser.parse_args(arguments)
    if options.worker:
        work(json.loads(options.worker))
        return 0
    results = []
    for threads in map(int, options.threads.split(",")):
        for batch in map(int, options.batch.split(",")):
            for network in options.networks.split(","):
                for sparsity in map(float, options.sparsity.split(",")):
                    case = {"network": network, "sparsity": sparsity, "batch": batch, "threads": threads}
                    results.append(measure(case, candidates(options.only), options.rounds, options.seconds))
                    print(table(results[-1]), flush=True)
                    if options.json:
                        beside = options.json.with_name(options.json.name + ".part")
                        beside.write_text(json.dumps(results, indent=2) + "\n")
                        beside.replace(options.json)
    return 0


def candidates(only: str | None) -> list[str]:
    names = [*TORCH, *(name for name in (*peers.PEERS, *peers.INFORMATION) if peers.installed(name))]
    return [*(only.split(",") if only else names), OURS]


def measure(case: dict[str, Any], names: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    """Medians in milliseconds of all candidates, and largest differences to eager torch."""
    rows: dict[str, dict[str, Any]] = {name: {"samples": []} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        workers: dict[str, Worker] = {}
        try:
            for name in names:
                print(f"\rprepare {name:30}", end="", file=sys.stderr, flush=True)
                worker = Worker({**case, "candidate": name, "seconds": seconds, "folder": folder})
                workers[name] = worker
                try:
                    rows[name]["max_abs_error"] = worker.ready()
                except RuntimeError as error:
                    rows[name]["failure"] = str(error)
                    workers.pop(name).close()
            order = list(workers)
            for turn in range(rounds):
                print(f"\rround {turn + 1} of {rounds} {'':30}", end="", file=sys.stderr, flush=True)
                for name in order[turn % len(order) :] + order[: turn % len(order)]:
                    rows[name]["samples"] += workers[name].block()
        finally:
            for worker in workers.values():
                worker.close()
    print("\r" + " " * 50, end="\r", file=sys.stderr)
    for row in rows.values():
        if samples := row["samples"]:
            row["median_ms"], row["min_ms"] = statistics.median(samples), min(samples)
            row["samples"] = len(samples)
    dense = {name: row["median_ms"] for name, row in rows.items()
             if "median_ms" in row and name != OURS and name not in peers.INFORMATION}  # fmt: skip
    fastest = min(dense, key=lambda name: dense[name], default=None)
    ratio = dense[fastest] / rows[OURS]["median_ms"] if fastest and "median_ms" in rows[OURS] else None
    return {**case, "fastest_dense": fastest, "ratio": ratio, "rows": rows, "machine": timing.machine()}


def table(result: dict[str, Any]) -> str:
    title = "{network}, {sparsity:.0%} zeros, batch {batch}, {threads} thread(s)".format(**result)
    lines = [title, f"  {'':22} {'median ms':>10} {'min ms':>10} {'max abs error':>14}"]
    for name, row in result["rows"].items():
        if "median_ms" not in row:
            lines.append(f"  {name:22} failed: {row.get('failure', 'no sample')}")
            continue
        note = "  (no baseline)" if name in peers.INFORMATION else ""
        lines.append(f"  {name:22} {row['median_ms']:10.3f} {row['min_ms']:10.3f} {row['max_abs_error']:14.2e}{note}")
    if result["ratio"]:
        lines.append(f"  {result['ratio']:.2f} times the fastest dense, {result['fastest_dense']}")
    return "\n".join(lines) + "\n"


class Worker:
    """One candidate's process. It runs only inside `ready` and `block`."""

    def __init__(self, task: dict[str, Any]) -> None:
        command = [sys.executable, __file__, "--worker", json.dumps(task)]
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, start_new_session=True
        )

    def ready(self) -> float:
        return float(self._answer()["error"])

    def block(self) -> list[float]:
        os.killpg(self.process.pid, signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return list(self._answer()["ms"])

    def _answer(self) -> dict[str, Any]:
        import select

        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], LIMIT)[0]:
            raise RuntimeError(f"not ready after {LIMIT} s")
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            tail = self.log.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(" ".join((tail or [f"exit status {self.process.returncode}"])[-1].split())[:200])
        os.killpg(self.process.pid, signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


def work(task: dict[str, Any]) -> None:
    """A worker: prepares its candidate, answers with its error, then with a block of samples to each line."""
    answers = os.fdopen(os.dup(1), "w")  # what libraries print does not belong there
    os.dup2(2, 1)
    import torch

    import sparseprune
    from sparseprune.synthetic import fit_scale
    from sparseprune.timing import block
    from sparseprune.zoo import NETWORKS as ZOO

    torch.manual_seed(0)
    network = ZOO[task["network"]]
    args = (torch.randn(task["batch"], *network.input_shape),)
    model = sparseprune.prune_uniform(network.factory(), task["sparsity"], exclude=network.keep_dense).eval()
    fit_scale(model, args)
    torch.set_num_threads(task["threads"])
    sparseprune.set_num_threads(task["threads"])
    with torch.inference_mode():
        expected = Path(task["folder"]) / "expected.pt"
        if not expected.exists():
            torch.save(torch.utils._pytree.tree_leaves(model(*args)), expected)
        call = prepare(task["candidate"], model, args, task["threads"])
        found = torch.utils._pytree.tree_leaves(call())
        error = max(float((x - y).abs().max()) for x, y in zip(found, torch.load(expected), strict=True))
        print(json.dumps({"error": error}), file=answers, flush=True)
        for _ in sys.stdin:
            print(json.dumps({"ms": block(call, task["seconds"])}), file=answers, flush=True)


def prepare(name: str, model: Any, args: tuple[Any, ...], threads: int) -> Callable[[], Any]:
    import sparseprune
    from sparseprune.dense import baseline

    if name == OURS:
        fast = sparseprune.convert(model, *args, verify=False)
        return lambda: fast(*args)
    return baseline(name, model, args) if name in TORCH else peers.peer(name, model, args, threads)


if __name__ == "__main__":
    sys.exit(main())
