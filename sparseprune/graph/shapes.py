"""Symbolic sizes: comparisons that add no guard, and short names for the program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..errors import UnsupportedError

__all__ = ["ShapeDependentError", "Symbols", "known_equal", "known_same", "ratio", "static"]


class ShapeDependentError(UnsupportedError):
    """Not supported while these sizes are symbolic; with fixed sizes it may be."""


def known_equal(a: Any, b: Any) -> bool:
    return bool(statically_known_true(a == b))


def known_same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal for every value of the symbols."""
    return len(a) == len(b) and all(known_equal(x, y) for x, y in zip(a, b, strict=True))


def static(size: Any) -> int | None:
    """The size as an integer, None where it depends on the inputs'."""
    if isinstance(size, torch.SymInt):
        return int(size.node.expr) if size.node.expr.is_Integer else None
    return int(size)


def ratio(a: Any, b: Any) -> int | None:
    """The integer a / b, None where it is none, or depends on the inputs' sizes."""
    if not isinstance(a, torch.SymInt) or not isinstance(b, torch.SymInt):
        return None
    quotient = sympy.simplify(a.node.expr / b.node.expr)
    return int(quotient) if quotient.is_Integer else None


class Symbols:
    """Export's symbols (`s77`) as `s0`, `s1`, … in order of appearance in the inputs."""

    def __init__(self) -> None:
        self.names: dict[sympy.Symbol, str] = {}

    def shape(self, name: str, sizes: Sequence[Any]) -> tuple[int | str, ...]:
        return tuple(self._size(name, dim, size) for dim, size in enumerate(sizes))

    def name(self, size: Any) -> str | None:
        """The name of a size that is exactly one of the inputs'."""
        return self.names.get(size.node.expr) if isinstance(size, torch.SymInt) else None

    def encode(self, sizes: Sequence[Any], source: Sequence[Any], *, infer: bool) -> list[int | str] | None:
        """Sizes as `docs/program.md` writes them, None where that cannot be.

        Args:
            source: The shape of the operator's first input.
            infer: One size may be -1, what is left.
        """
        encoded: list[int | str] = []
        for place, size in enumerate(sizes):
            places = (i for i in (place, *range(len(source))) if i < len(source))
            if (number := static(size)) is not None:
                encoded.append(number)
            elif (same := next((i for i in places if known_equal(size, source[i])), None)) is not None:
                encoded.append(-2 - same)
            elif (name := self.name(size)) is not None:
                encoded.append(name)
            elif infer and -1 not in encoded:
                encoded.append(-1)
            else:
                return None
        return encoded

    def _size(self, name: str, dim: int, size: Any) -> int | str:
        if (number := static(size)) is not None:
            return number
        expression = size.node.expr
        if not isinstance(expression, sympy.Symbol):
            raise ShapeDependentError(f"input '{name}' dimension {dim}: its size is tied to others as {expression}")
        return self.names.setdefault(expression, f"s{len(self.names)}")
