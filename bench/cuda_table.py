"""The table of `bench/layers.py --device cuda`: every distinct layer after `convert`, and how often dense is faster."""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from cuda_timing import KINDS, Timer, precision_name, precisions
from cuda_ways import Case, measure_converted
from layer_shapes import Layer, table
from layer_summary import DENSE

from sparseprune.cuda_layers import Window

__all__ = ["SLOWER", "case_of", "layers", "run", "summary"]

Record = dict[str, Any]

SLOWER = 0.97  # a ratio below is slower than dense, above is noise
SHOWN = 20  # of the slower ones, in the text; the file has all


def layers(batches: list[int], shapes: re.Pattern[str]) -> dict[Layer, list[str]]:
    """Each distinct layer at these batch sizes whose name, group or network is found, and the networks that have it."""
    found: dict[Layer, list[str]] = {}
    for batch in batches:
        for layer, networks in table(batch).items():
            if shapes.search(f"{layer.name} ({layer.group}: {', '.join(networks)})"):
                known = found.setdefault(layer, [])
                known += [network for network in networks if network not in known]
    return found


def run(document: Record, chosen: dict[Layer, list[str]], options: argparse.Namespace, timer: Timer) -> Iterator[str]:
    """Measures the layers that `document` lacks, appends each, and says in a line a precision what came out."""
    done = {layer["name"] for layer in document["layers"]}
    for index, (layer, networks) in enumerate(chosen.items()):
        if layer.name in done:
            continue
        cells = [
            {"pattern": pattern, "sparsity": sparsity, "dtype": dtype, "tf32": tf32}
            | measure_converted(case_of(layer, pattern, sparsity, dtype, tf32), options.compile, timer)
            for dtype, tf32 in precisions(options.dtype, options.tf32)
            for pattern, sparsity in zeros(layer, options)
        ]
        about = {"name": layer.name, "group": layer.group, "networks": networks, "pixels": layer.pixels}
        document["layers"].append(about | asdict(layer) | {"cells": cells})
        yield "\n".join(f"{index + 1:3} of {len(chosen)}  {line}" for line in _lines(layer, cells))


def zeros(layer: Layer, options: argparse.Namespace) -> list[tuple[str, float]]:
    """Pattern and sparsity of a layer's cells. Without zeros all patterns are one; in groups, there is 1x1 only."""
    found: list[tuple[str, float]] = []
    for pattern in options.patterns:
        if pattern != "1x1" and layer.groups > 1:
            continue
        shares = options.sparsity if pattern == "1x1" else options.block_sparsity
        found += [(pattern, share) if share else (DENSE, share) for share in shares]
    return list(dict.fromkeys(found))


def case_of(layer: Layer, pattern: str, sparsity: float, dtype: str, tf32: bool) -> Case:
    rows, columns = (1, 1) if pattern == DENSE else (int(size) for size in pattern.split("x"))
    name = f"{layer.name}, {pattern}, {sparsity:.0%}, {precision_name(dtype, tf32)}"
    window = Window(layer.stride, layer.padding, (1, 1), layer.groups)
    x = (layer.rows, layer.inputs, *layer.size)
    return Case(name, layer.weight_shape, x, sparsity, dtype, (rows, columns), window, tf32)


def _lines(layer: Layer, cells: list[Record]) -> Iterator[str]:
    for precision in _precisions(cells):
        here = [cell for cell in cells if _precision(cell) == precision]
        dense = here[0]["warm"]
        ratios = ", ".join(f"{c['pattern']} {100 * c['sparsity']:g} % {c['warm']['ratio']:.2f}" for c in here)
        mark = "! " if any(_slower(cell, "warm") for cell in here) else ""
        yield f"{mark}{layer.name} {precision}: {dense['dense_ms']:.4f} ms {dense['dense']}; times, warm: {ratios}"


def summary(document: Record) -> tuple[Record, str]:
    """Of each precision, how many layers are slower than dense after `convert`, and what the sparse ones gain."""
    pairs = [(layer, cell) for layer in document["layers"] for cell in layer["cells"]]
    found: Record = {"slower_below": SLOWER, "precisions": {}}
    lines: list[str] = []
    for precision in _precisions([cell for _, cell in pairs]):
        here = [(layer, cell) for layer, cell in pairs if _precision(cell) == precision]
        figures: Record = {"cells": len(here)}
        for kind in KINDS:
            slower = sorted(((layer, cell) for layer, cell in here if _slower(cell, kind)),
                            key=lambda pair: float(pair[1][kind]["ratio"]))  # fmt: skip
            sparse = [cell[kind]["ratio"] for _, cell in here if not cell[kind]["ours"].startswith("dense")]
            figures[kind] = {
                "slower": [_about(layer, cell, kind) for layer, cell in slower],
                "sparse": len(sparse),
                "median_ratio_of_sparse": statistics.median(sparse) if sparse else None,
            }
            gain = f"; {len(sparse)} run sparse, median {statistics.median(sparse):.2f} times dense" if sparse else ""
            lines.append(f"{precision}, {kind}: layers slower than dense after convert: {len(slower)} of {len(here)} "
                         f"(by more than {1 - SLOWER:.0%}; asked: 0){gain}")  # fmt: skip
            lines += [f"  {c[kind]['ratio']:.2f} {layer['name']}, {c['pattern']} {100 * c['sparsity']:g} %: "
                      f"{c[kind]['ours']} to {c[kind]['dense']}" for layer, c in slower[:SHOWN]]  # fmt: skip
            if len(slower) > SHOWN:
                lines.append(f"  and {len(slower) - SHOWN} more")
        found["precisions"][precision] = figures
    return found, "\n".join(lines)


def _about(layer: Record, cell: Record, kind: str) -> Record:
    return {"name": layer["name"], "pattern": cell["pattern"], "sparsity": cell["sparsity"], **cell[kind]}


def _slower(cell: Record, kind: str) -> bool:
    return bool(cell[kind]["ratio"] < SLOWER)


def _precision(cell: Record) -> str:
    return precision_name(cell["dtype"], cell["tf32"])


def _precisions(cells: list[Record]) -> list[str]:
    return list(dict.fromkeys(_precision(cell) for cell in cells))
