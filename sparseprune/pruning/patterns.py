"""What shape goes: a pattern groups the weights of one parameter into units that are pruned as one."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PATTERNS", "Block", "NofM", "Pattern", "Slice", "mean_over_units", "resolve_pattern"]


class Pattern(ABC):
    """How the weights of one parameter group into units. Subclass it for another shape."""

    def bind(self, name: str, module: nn.Module, shape: tuple[int, ...]) -> Pattern:
        """This pattern for one parameter: itself, unless it depends on the layer.

        Args:
            name: the parameter's name, for messages.
            module: the layer that holds it.
            shape: the parameter's.

        Raises:
            ValueError: the parameter cannot have this pattern.
        """
        return self

    @abstractmethod
    def reduce(self, values: Tensor) -> Tensor:
        """Sum `values` (a weight's shape) over each unit -> (units,)."""

    @abstractmethod
    def expand(self, units: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Give every weight of `shape` its unit's entry of `units` (units,) -> shape."""


class Block(Pattern):
    """Blocks of rows x columns of the weight seen as a matrix out x (in / groups * kh * kw).

    Where `rows` or `columns` do not divide the matrix, the blocks at its lower and right edges are smaller.

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


class NofM(Pattern):
    """At most `n` kept of every `m` consecutive weights along a row of the matrix out x (in / groups * kh * kw).

    The pattern itself says how many go and where: the `m - n` lowest scores of every group of `m` (where `m` does not
    divide the row, the rest of it keeps its `n` best as well). Weights pruned already are the first to go, so a group
    may end with fewer than `n`.

    Mishra et al., Accelerating Sparse Deep Neural Networks, 2021 (arXiv:2104.08378).

    Raises:
        ValueError: not 1 <= n < m.
    """

    def __init__(self, n: int, m: int) -> None:
        if not 1 <= n < m:
            raise ValueError(f"pattern N:M must have 1 <= N < M, got {n}:{m}")
        self.n = n
        self.m = m

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def reduce(self, values: Tensor) -> Tensor:
        return values.reshape(-1)

    def expand(self, units: Tensor, shape: tuple[int, ...]) -> Tensor:
        return units.reshape(shape)

    def keep(self, scores: Tensor, live: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The weights that stay.

        Args:
            scores: (units,) float; equal ones go in order.
            live: (units,), non-zero where a weight is not pruned yet.
            shape: the weight's.

        Returns:
            (units,) bool, True = kept.
        """
        rows, columns = _matrix_shape(shape)
        ranked = torch.where(live != 0, scores, -math.inf).reshape(rows, columns)
        groups = F.pad(ranked, (0, -columns % self.m), value=-math.inf).reshape(rows, -1, self.m)
        order = torch.argsort(groups, dim=-1, stable=True)
        keep = torch.zeros_like(groups, dtype=torch.bool)
        keep.scatter_(-1, order[..., self.m - self.n :], True)
        return keep.reshape(rows, -1)[:, :columns].reshape(-1) & (live != 0)

    def __repr__(self) -> str:
        return f"NofM({self.n}, {self.m})"


class Slice(Pattern):
    """Whole slices of the weight (out, in / groups, kh, kw) along one dimension.

    What `torch.nn.utils.prune.ln_structured` calls `dim`: 0, a filter: all weights of one output channel (of a linear
    layer, one neuron). 1, all weights that read one input channel (of a grouped convolution only its own group reads
    it). 2 and 3, the same row or column of every kernel of the layer; a 1x1 convolution has only one. Transposed
    convolutions hold their weight as (in, out / groups, kh, kw): 0 and 1 mean output and input there too.

    Raises:
        ValueError: `dim` is negative.
    """

    def __init__(self, dim: int = 0) -> None:
        if dim < 0:
            raise ValueError(f"dim must be at least 0, got {dim}")
        self.dim = dim
        self._axis = dim  # of the tensor as the layer holds it
        self._groups = 1

    def bind(self, name: str, module: nn.Module, shape: tuple[int, ...]) -> Slice:
        if self.dim >= len(shape):
            raise ValueError(
                f"pattern {self.name!r} needs parameters of at least {self.dim + 1} dimensions, but {name} of a "
                f"{type(module).__name__} has shape {shape}: leave it out by include, exclude or parameters"
            )
        bound = Slice(self.dim)
        if isinstance(module, nn.modules.conv._ConvTransposeNd) and self.dim < 2 <= len(shape):
            bound._axis = 1 - self.dim
        if bound._axis == 1 and isinstance(module, nn.modules.conv._ConvNd):
            bound._groups = module.groups
        return bound

    @property
    def name(self) -> str:
        return next((name for name, dim in PATTERNS.items() if dim == self.dim), repr(self))

    def reduce(self, values: Tensor) -> Tensor:
        blocks = values.reshape(self._groups, -1, *values.shape[1:]) if self._groups > 1 else values.unsqueeze(0)
        others = [axis for axis in range(1, blocks.ndim) if axis != self._axis + 1]
        return (blocks.sum(dim=others) if others else blocks).reshape(-1)

    def expand(self, units: Tensor, shape: tuple[int, ...]) -> Tensor:
        blocks = [self._groups, shape[0] // self._groups, *shape[1:]]
        sizes = [size if axis in (0, self._axis + 1) else 1 for axis, size in enumerate(blocks)]
        return units.reshape(sizes).expand(blocks).reshape(shape)

    def __repr__(self) -> str:
        return f"Slice({self.dim})"


PATTERNS: dict[str, int] = {"filter": 0, "channel": 1, "kernel_row": 2, "kernel_col": 3}


def mean_over_units(scores: Tensor, kept: Tensor, pattern: Pattern) -> Tensor:
    """Mean score of each unit's weights, those already pruned counting 0 -> (units,) float.

    The mean, not the sum, so that units of different sizes compare: a filter of a wide layer has more weights, and a
    block at the edge of the matrix fewer, than others.

    Args:
        scores: a weight's shape, float.
        kept: the same shape, bool.
        pattern: bound to that weight.
    """
    sums = pattern.reduce(torch.where(kept, scores, 0))
    return sums / pattern.reduce(torch.ones_like(scores))


def resolve_pattern(pattern: str | Pattern) -> Pattern:
    """ "RxC" ("1x1" is unstructured), "N:M", a name in `PATTERNS` or a `Pattern` -> a `Pattern`."""
    if isinstance(pattern, Pattern):
        return pattern
    text = pattern if isinstance(pattern, str) else ""
    if text in PATTERNS:
        return Slice(PATTERNS[text])
    if match := re.fullmatch(r"(\d{1,6})x(\d{1,6})", text):
        return Block(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d{1,6}):(\d{1,6})", text):
        return NofM(int(match[1]), int(match[2]))
    raise ValueError(
        f'pattern must be "RxC" (such as "1x1" or "4x1"), "N:M" (such as "2:4"), {", ".join(PATTERNS)} or a Pattern, '
        f"got {pattern!r}"
    )


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    rows = shape[0] if shape else 1
    columns = 1
    for size in shape[1:]:
        columns *= size
    return rows, columns


def _matrix(values: Tensor) -> Tensor:
    return values.reshape(_matrix_shape(tuple(values.shape)))
