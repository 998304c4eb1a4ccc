"""Writes docs/operators.md from what the lowering says of itself (`sparseprune.graph.operators.operator_table`).

    python docs/generate_operators.py

`tests/test_docs.py` fails where the file is not what this writes.
"""

from __future__ import annotations

import re
from pathlib import Path

from sparseprune.graph.ir import OPS
from sparseprune.graph.operators import operator_table

TARGET = Path(__file__).with_name("operators.md")

INTRO = """# Operators that convert

<!-- Written by docs/generate_operators.py; edit that, or the tables in sparseprune/graph/operators/. -->

`sparseprune.convert` exports a model with `torch.export` and lowers PyTorch's ATen operators, which layers and
functions consist of, to the operators of a program ([program.md](program.md)). The {count} ATen operators below are
known, with their in-place variants (`relu_`, `add_`, …) and overloads. Everything is float32; constants, and what is
computed from constants and sizes alone, are worked out at conversion with whatever operator torch has.

## What is not in the table

A model with another operator, or beyond one's limits, still converts:

- It runs in as few alternating *segments* as it can: native ones around the operator, torch for the operator itself.
  The report lists them with their shares of the time (`fast.report.segments`).
- A model that `torch.export` cannot follow, for example because its control flow depends on the data, keeps running in
  torch with its `nn.Conv2d` and `nn.Linear` layers swapped for sparse ones (`sparseprune.nn`), each where that is
  faster.

Either gives a `SparsepruneWarning` that says why. Such a conversion cannot be saved as a program. As always, what loses
to dense torch as a whole is not used.

## The table

"nothing" means that the operator costs nothing at run time: it is a view, or folds into another operator. An activation
(`act`) is fused into the operator before it where that has one.

| torch operators | program operators | limits |
|---|---|---|
"""

_OPERATOR = re.compile(rf"(?<!a )\b({'|'.join(sorted(OPS, key=len, reverse=True))})\b(?! layer)")


def generate() -> str:
    """The document. Operators that become the same under the same limits share a row."""
    rows: dict[tuple[str, str], list[str]] = {}
    table = operator_table()
    for name, becomes, limits in table:
        rows.setdefault((becomes, limits), []).append(f"`{name}`")
    lines = []
    for (becomes, limits), names in rows.items():
        cells = (", ".join(names), _OPERATOR.sub(r"`\1`", becomes), limits)
        lines.append("".join(f"| {cell} " if cell else "| " for cell in cells) + "|")
    return INTRO.format(count=len(table)) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(generate(), encoding="utf-8")
    print(f"wrote {TARGET}")
