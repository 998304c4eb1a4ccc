"""What shape goes: a pattern groups the weights of one parameter into units that are pruned as one."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Block", "Pattern", "resolve_pattern"]


class Pattern(ABC):
    """How the weights of one parameter group into units. Subclass it for another shape."""

    @abstractmethod
    def reduce(self, values: Tensor) -> Tensor:
        """Sum `values` (a weight's shape) over each unit -> (units,)."""

    @abstractmethod
    def expand(self, units: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Give every weight of `shape` its unit's entry of `units` (units,) -> shape."""


class Block(Pattern):
    """Blocks of rows x columns of the weight seen as a matrix out x (in / groups * kh * kw).

    A block's score is the sum of its weights' scores (|w| for magnitude). Where `rows` or `columns` do not divide the
    matrix, the blocks at its lower and right edges are smaller.

    Raises:
        ValueError: `rows` or `columns` is below 1.
    """

    def __init__(self, rows: int = 1, columns: int = 1) -> None:
        if rows < 1 or columns < 1:
            raise ValueError(f"pattern must have at least 1 row and 1 column, got {rows}x{columns}")
        self.rows = rows
        self.columns = columns

    def reduce(self, values: Tensor) -> Tensor:
        if self.rows == self.columns == 1:
            return values.reshape(-1)
        matrix = _matrix(values)
        pad_rows, pad_columns = -matrix.shape[0] % self.rows, -matrix.shape[1] % self.columns
        padded = F.pad(matrix, (0, pad_columns, 0, pad_rows))
        across = padded.shape[1] // self.columns
        blocks = padded.reshape(-1, self.rows, across, self.columns)  # (block row, R, block column, C)
        return blocks.sum(dim=(1, 3)).reshape(-1)

    def expand(self, units: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.rows == self.columns == 1:
            return units.reshape(shape)
        rows, columns = _matrix_shape(shape)
        blocks = units.reshape(-(-rows // self.rows), -(-columns // self.columns))
        matrix = blocks.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        return matrix[:rows, :columns].reshape(shape)

    def __repr__(self) -> str:
        return f"Block({self.rows}, {self.columns})"


def resolve_pattern(pattern: str | Pattern) -> Pattern:
    """ "RxC" (rows x columns of the weight matrix; "1x1" is unstructured) or a `Pattern` -> a `Pattern`."""
    if isinstance(pattern, Pattern):
        return pattern
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", pattern) if isinstance(pattern, str) else None
    if match is None:
        raise ValueError(f'pattern must be "RxC", such as "1x1" or "4x1", or a Pattern, got {pattern!r}')
    return Block(int(match[1]), int(match[2]))


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    rows = shape[0] if shape else 1
    columns = 1
    for size in shape[1:]:
        columns *= size
    return rows, columns


def _matrix(values: Tensor) -> Tensor:
    return values.reshape(_matrix_shape(tuple(values.shape)))
