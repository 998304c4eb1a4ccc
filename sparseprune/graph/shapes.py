"""Symbolic sizes: comparisons that add no guard, and short names for the program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..errors import UnsupportedError

__all__ = ["ShapeDependentError", "Symbols", "known_equal", "known_same"]


class ShapeDependentError(UnsupportedError):
    """Not supported while these sizes are symbolic; with fixed sizes it may be."""


def known_equal(a: Any, b: Any) -> bool:
    return bool(statically_known_true(a == b))


def known_same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal for every value of the symbols."""
    return len(a) == len(b) and all(known_equal(x, y) for x, y in zip(a, b, strict=True))


class Symbols:
    """Export's symbols (`s77`) as `s0`, `s1`, … in order of appearance in the inputs."""

    def __init__(self) -> None:
        self.names: dict[sympy.Symbol, str] = {}

    def shape(self, name: str, sizes: Sequence[Any]) -> tuple[int | str, ...]:
        return tuple(self._size(name, dim, size) for dim, size in enumerate(sizes))

    def _size(self, name: str, dim: int, size: Any) -> int | str:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if expression.is_Integer:
            return int(expression)
        if not isinstance(expression, sympy.Symbol):
            raise ShapeDependentError(f"input '{name}' dimension {dim}: its size is tied to others as {expression}")
        return self.names.setdefault(expression, f"s{len(self.names)}")
