"""What `bench/layers.py` measured, in few words: percents of the ceilings, break-evens, the slowest layers, a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ceilings
import numpy as np

__all__ = ["DENSE", "add_percents", "break_even", "curve", "percentile", "plot", "summary"]

Record = dict[str, Any]

DENSE = "dense"  # the pattern of a cell without zeros: it begins every pattern's curve
TARGET = 0.95  # the sparsity that the summary is about
MAIN = ("convolution", "batched linear")
SLOW = 30.0  # useful GFLOP/s a core


def add_percents(document: Record) -> None:
    """Each cell's `percent` of the ceilings, medians of all their runs so far."""
    top = ceilings.medians(document["ceilings"])
    for _, cell in _cells(document):
        cell["percent"] = None if top is None else _percents(cell, top)


def _percents(cell: Record, top: Record) -> dict[str, float]:
    rate = cell["packed_bytes"] / cell["ms"] / 1e6  # GB/s
    sizes = sorted(top["read"], key=int)
    nearest = min(sizes, key=lambda mib: abs(math.log(int(mib) * 2**20 / max(cell["packed_bytes"], 1))))
    found = {name: 100 * cell["gflops"] / top[name] for name in ("fma", "l1", "l2", "l3")}
    return found | {"read": 100 * rate / top["read"][nearest], "memory": 100 * rate / top["read"][sizes[-1]]}


def _cells(document: Record) -> list[tuple[Record, Record]]:
    return [(layer, cell) for layer in document["layers"] for cell in layer["cells"]]


def curve(layer: Record, pattern: str) -> list[tuple[float, float]]:
    """(sparsity, speed-up) of one pattern, ascending; the cell without zeros belongs to each."""
    cells = [c for c in layer["cells"] if c["pattern"] in (pattern, DENSE) and c["ratio"] is not None]
    return sorted((c["sparsity"], c["ratio"]) for c in cells)


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """The sparsity from which on the speed-up stays at 1 or more; None where it never does.

    The first one measured where it always is. Between two, time is taken to be linear in the sparsity.
    """
    if not points or points[-1][1] < 1:
        return None
    below = [i for i, (_, ratio) in enumerate(points) if ratio < 1]
    if not below:
        return points[0][0]
    (x0, y0), (x1, y1) = points[below[-1]], points[below[-1] + 1]
    return x0 + (x1 - x0) * (1 / y0 - 1) / (1 / y0 - 1 / y1)


def percentile(values: Sequence[float | None], share: float) -> float | None:
    """The smallest value that so large a share does not exceed; None counts as the largest."""
    if not values:
        return None
    found = sorted(math.inf if v is None else v for v in values)[math.ceil(share * len(values)) - 1]
    return None if found == math.inf else found


def summary(document: Record) -> tuple[Record, str]:
    """The figures, and the same as text."""
    patterns = [p for p in document["settings"]["patterns"] if any(c["pattern"] == p for _, c in _cells(document))]
    at = [(layer, cell) for layer, cell in _cells(document) if cell["sparsity"] == TARGET]
    found: Record = {"ceilings": ceilings.medians(document["ceilings"]), "at": TARGET, "patterns": {}}
    lines = [_ceiling_line(found["ceilings"])]
    disturbed = sum(cell["disturbed"] for _, cell in _cells(document))
    if disturbed:
        lines.append(f"WARNING: other work took cores in {disturbed} of {len(_cells(document))} cells")
    for pattern in patterns:
        here = [(layer, cell) for layer, cell in at if cell["pattern"] == pattern]
        main = [(layer, cell) for layer, cell in here if layer["group"] in MAIN]
        evens = {layer["name"]: break_even(curve(layer, pattern)) for layer in document["layers"]
                 if layer["group"] not in ("depthwise", "stem") and len(curve(layer, pattern)) > 1}  # fmt: skip
        figures = {
            "gflops": _spread([cell["gflops"] for _, cell in main]),
            "ratio": _spread([cell["ratio"] for _, cell in main if cell["ratio"] is not None]),
            "percent_l2": _spread([cell["percent"]["l2"] for _, cell in main if cell["percent"]]),
            "slow": {layer["name"]: cell["gflops"] for layer, cell in here
                     if cell["gflops"] < SLOW and layer["group"] != "linear, batch 1"},
            "batch_1_percent_read": {layer["name"]: cell["percent"]["read"] for layer, cell in here
                                     if layer["group"] == "linear, batch 1" and cell["percent"]},
            "break_even": evens,
            "break_even_p90": percentile(list(evens.values()), 0.9),
        }  # fmt: skip
        found["patterns"][pattern] = figures
        lines += ["", *_lines(pattern, figures, here, len(main))]
    return found, "\n".join(lines)


def _spread(values: list[float]) -> Record | None:
    return {"median": statistics.median(values), "min": min(values)} if values else None


def _ceiling_line(top: Record | None) -> str:
    if top is None:
        return "ceilings: not measured"
    read = ", ".join(f"{rate:.0f} of {mib} MiB" for mib, rate in top["read"].items())
    loads = f"loading from L1 {top['l1']:.0f}, L2 {top['l2']:.0f}, L3 {top['l3']:.0f}"
    return f"ceilings, GFLOP/s a core: FMA {top['fma']:.0f}, {loads}; GB/s read in all: {read}"


def _lines(pattern: str, figures: Record, here: list[tuple[Record, Record]], count: int) -> list[str]:
    lines = [f"{pattern}, {TARGET:.0%} zeros"]
    if gflops := figures["gflops"]:
        percent = figures["percent_l2"]
        share = f" ({percent['median']:.0f} %, {percent['min']:.0f} % of loading from L2)" if percent else ""
        lines.append(f"  {count} convolutions and batched linears: {gflops['median']:.1f} useful GFLOP/s a core, "
                     f"at least {gflops['min']:.1f}{share}")  # fmt: skip
    if ratio := figures["ratio"]:
        lines.append(f"  {ratio['median']:.2f} times the fastest dense, at least {ratio['min']:.2f}")
    for name, percent in figures["batch_1_percent_read"].items():
        cell = next(cell for layer, cell in here if layer["name"] == name)
        ratio = "" if cell["ratio"] is None else f", {cell['ratio']:.2f} times dense"
        kept = f"{cell['bytes_per_kept']:.1f} bytes a kept weight"
        lines.append(f"  {name}: {kept}, {percent:.0f} % of reading as much{ratio}")
    evens = list(figures["break_even"].values())
    if evens:
        last = figures["break_even_p90"]
        share = "at no sparsity measured" if last is None else f"up to {last:.0%} zeros"
        never = sum(even is None for even in evens)
        lines.append(f"  break-even of nine in ten layers: {share}; {never} of {len(evens)} never")
    if figures["slow"]:
        lines.append(f"  below {SLOW:.0f} useful GFLOP/s a core:")
        for layer, cell in sorted(here, key=lambda pair: float(pair[1]["gflops"])):
            if layer["name"] in figures["slow"]:
                ratio = "" if cell["ratio"] is None else f"{cell['ratio']:6.2f} x dense"
                name = f"{layer['name']:32} {layer['group']:15}"
                lines.append(f"    {cell['gflops']:6.1f} {ratio} {name} {cell['choice']}")
    return lines


def plot(document: Record, path: Path) -> None:
    """Speed-up against sparsity, a panel a pattern; dots are break-evens, the dashed line is where nine of ten are."""
    pyplot = matplotlib()
    patterns = list(document["summary"]["patterns"])
    if not patterns:
        raise ValueError("plot: there is no cell with zeros")
    figure, panels = pyplot.subplots(1, len(patterns), figsize=(6 * len(patterns), 5), sharey=True, squeeze=False)
    groups = list(dict.fromkeys(layer["group"] for layer in document["layers"]))
    for panel, pattern in zip(panels[0], patterns, strict=True):
        for layer in document["layers"]:
            points, colour = curve(layer, pattern), f"C{groups.index(layer['group'])}"
            if not points:
                continue
            known, times = [s for s, _ in points], [1 / r for _, r in points]
            between = np.union1d(known, np.linspace(known[0], known[-1], 200))
            speed_ups = 1 / np.interp(between, known, times)
            panel.plot([_place(s) for s in between], speed_ups, colour, lw=0.6, alpha=0.5)
            if (even := break_even(points)) is not None and len(points) > 1:
                panel.plot(_place(even), 1 if even > points[0][0] else points[0][1], "o", color=colour, ms=3)
        for index, group in enumerate(groups):
            panel.plot([], [], f"C{index}", label=group)
        panel.axhline(1, color="black", lw=1)
        if (last := document["summary"]["patterns"][pattern]["break_even_p90"]) is not None:
            panel.axvline(_place(last), color="black", ls="--", lw=1, label=f"break-even of nine in ten: {last:.0%}")
        ticks = sorted({c["sparsity"] for _, c in _cells(document)})
        panel.set_xticks([_place(s) for s in ticks], [f"{100 * s:g}" for s in ticks])
        panel.set(title=pattern, xlabel="zeros, %", yscale="log")
        panel.legend(fontsize=8)
    panels[0][0].set_ylabel("times as fast as the fastest dense")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _place(sparsity: float) -> float:
    return -math.log10(max(1 - sparsity, 1e-4))  # what is left, by factors


def matplotlib() -> Any:
    """`pyplot` without a screen. Raises `RuntimeError` where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise RuntimeError("--plot needs matplotlib: pip install '.[bench]'") from None
    return pyplot
