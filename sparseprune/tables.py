"""Plain text tables."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned"]


def aligned(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Rows as lines: `align` has a "<" or ">" for each column; the last one is as wide as it likes."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(align))]
    places = list(zip(align, [*widths[:-1], 0], strict=True))
    return ["  ".join(f"{cell:{a}{w}}" for cell, (a, w) in zip(row, places, strict=True)).rstrip() for row in rows]
