"""The ATen operators that are known: a table from name to handler, and what it becomes.

A handler takes the lowering, the fx node and the node's arguments by schema name (defaults filled in), emits operators
of ours and returns the number of the result's value, or one for each result. In-place variants share the handler:
`lower.py` does the writing.
"""

from __future__ import annotations

from .activations import ACTIVATIONS
from .arguments import COPIES, FACTORIES, IDENTITIES, VIEWS, Entry, bind
from .arithmetic import ARITHMETIC
from .convolutions import CONVOLUTIONS
from .movements import MOVEMENTS
from .normalizations import NORMALIZATIONS
from .products import PRODUCTS
from .reductions import REDUCTIONS
from .resizing import RESIZING

__all__ = ["COPIES", "FACTORIES", "IDENTITIES", "TABLE", "VIEWS", "Entry", "bind", "operator_table"]

TABLE: dict[str, Entry] = {
    **CONVOLUTIONS,
    **PRODUCTS,
    **NORMALIZATIONS,
    **ACTIVATIONS,
    **ARITHMETIC,
    **REDUCTIONS,
    **MOVEMENTS,
    **RESIZING,
}


def operator_table() -> list[tuple[str, str, str]]:
    """`(ATen operator, program operators, limits)` of every operator that is lowered, sorted; for documentation."""
    rows = [(name, entry.becomes, entry.limits) for name, entry in TABLE.items()]
    rows += [(name, "reshape, or nothing", "") for name in VIEWS]
    rows += [(name, "nothing", "") for name in COPIES]
    return sorted(rows, key=lambda row: row[0].lstrip("_"))
