"""BlockCSR, the canonical packed weight: public, stored in files, checked once in native code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _native

if TYPE_CHECKING:
    import torch

    from .cuda_layers import CudaLayer

__all__ = ["BlockCSR"]


class BlockCSR:
    """A weight `(out, ...)`, seen as a matrix `out x K`, in block-CSR with block masks.

    The matrix is cut into blocks of `block_shape` = (R, C), R*C <= 64. A block is stored, in ascending column order,
    only where it keeps an entry, with an R*C-bit mask (bit r*C + c) and only its kept values, in bit order. So one
    format holds unstructured weights without fill-in, block-pruned ones and dense ones. The vocabulary is that of
    PyTorch's BSR tensors.

    Attributes:
        shape: As torch has it: `(out, in)`, `(out, in/groups, k)` or `(out, in/groups, kh, kw)`.
        crow_indices: int32, `out / R + 1`: where each block row starts.
        col_indices: int32, `nnz_blocks`: block columns, strictly ascending within a block row.
        masks: uint64, `nnz_blocks`.
        values: float32, the kept ones.

    Example:
        >>> w = BlockCSR.from_dense(conv.weight, block_shape=(4, 1))
        >>> w.density, w.block_density
    """

    def __init__(
        self,
        shape: Sequence[int],
        block_shape: tuple[int, int],
        crow_indices: ArrayLike,
        col_indices: ArrayLike,
        masks: ArrayLike | None,
        values: ArrayLike,
    ) -> None:
        """`masks` None: every stored block is full.

        Raises:
            ValueError: A field that does not fit; the message names it and the value.
            TypeError: A field of another dtype.
        """
        columns = _integers("col_indices", col_indices, np.int32)
        bits = None if masks is None else _integers("masks", masks, np.uint64)
        if bits is not None and bits.size == 0 < columns.size:  # to the native side, no masks are full ones
            raise ValueError(f"masks has 0 elements, expected {columns.size}")
        crow = _integers("crow_indices", crow_indices, np.int32)
        sizes = [int(size) for size in shape]
        self._set(_native.BlockCSR(sizes, _pair(block_shape), crow, columns, bits, _floats("values", values)))

    def _set(self, native: _native.BlockCSR) -> None:
        self._native = native
        self._programs: dict[Any, _native.Program] = {}  # of sparseprune.ops, by the layer's attributes
        self._cuda_layers: dict[Any, CudaLayer] = {}  # likewise

    @classmethod
    def _wrap(cls, native: _native.BlockCSR) -> BlockCSR:
        self = cls.__new__(cls)
        self._set(native)
        return self

    @classmethod
    def from_dense(
        cls,
        weight: torch.Tensor | ArrayLike,
        mask: torch.Tensor | ArrayLike | None = None,
        block_shape: tuple[int, int] = (1, 1),
    ) -> BlockCSR:
        """Packs a dense float32 array or tensor: what `mask` (bool, same shape, True: kept) says, else the non-zeros.

        Raises:
            TypeError: `weight` is not float32, or `mask` not bool.
            ValueError: `block_shape` does not divide the matrix, or the shapes differ.
        """
        kept = None
        if mask is not None:
            kept = _array(mask)
            if kept.dtype != np.bool_:
                raise TypeError(f"mask: expected dtype bool, got {kept.dtype}")
        return cls._wrap(_native.BlockCSR.from_dense(_floats("weight", weight), kept, _pair(block_shape)))

    def to_dense(self) -> NDArray[np.float32]:
        """A fresh array of `shape`, zeros where nothing is kept."""
        return self._native.to_dense()

    def to_torch_bsr(self) -> torch.Tensor:
        """The same matrix `(out, K)` as a `torch.sparse_bsr` tensor; blocks are filled up with zeros."""
        import torch

        rows, cols = self._matrix_shape()
        r, c = self.block_shape
        blocks = np.zeros((self.nnz_blocks, r * c), np.float32)
        bits = (self.masks[:, None] >> np.arange(r * c, dtype=np.uint64)) & np.uint64(1)
        blocks[bits.astype(bool)] = self.values
        return torch.sparse_bsr_tensor(
            torch.from_numpy(self.crow_indices),
            torch.from_numpy(self.col_indices),
            torch.from_numpy(blocks.reshape(-1, r, c)),
            size=(rows, cols),
        )

    @classmethod
    def from_torch_bsr(cls, tensor: torch.Tensor, shape: Sequence[int] | None = None) -> BlockCSR:
        """Packs a two-dimensional float32 `torch.sparse_bsr` tensor; zeros inside its blocks are not kept.

        Args:
            tensor: `(out, K)`, layout `torch.sparse_bsr`.
            shape: The weight's own shape, with `out` first and K elements behind; `(out, K)` where left out.
        """
        import torch

        if tensor.layout != torch.sparse_bsr or tensor.dim() != 2:
            raise ValueError(f"tensor: expected a 2-D torch.sparse_bsr tensor, got {tensor.dim()}-D {tensor.layout}")
        if tensor.dtype != torch.float32:
            raise TypeError(f"tensor: expected dtype float32, got {tensor.dtype}")
        r, c = tensor.values().shape[1:]
        dense = tensor.detach().cpu().to_dense().numpy()
        full = tuple(int(s) for s in (shape if shape is not None else dense.shape))
        if not full or full[0] != dense.shape[0] or int(np.prod(full)) != dense.size:
            raise ValueError(f"shape={full} does not hold the tensor's {tuple(dense.shape)}")
        return cls.from_dense(dense.reshape(full), block_shape=(int(r), int(c)))

    def _matrix_shape(self) -> tuple[int, int]:
        return self.shape[0], int(np.prod(self.shape[1:]))

    @property
    def shape(self) -> tuple[int, ...]:
        return self._native.shape

    @property
    def block_shape(self) -> tuple[int, int]:
        return self._native.block_shape

    @property
    def crow_indices(self) -> NDArray[np.int32]:
        return self._native.crow_indices

    @property
    def col_indices(self) -> NDArray[np.int32]:
        return self._native.col_indices

    @property
    def masks(self) -> NDArray[np.uint64]:
        return self._native.masks

    @property
    def values(self) -> NDArray[np.float32]:
        return self._native.values

    @property
    def nnz_blocks(self) -> int:
        """Stored blocks."""
        return self._native.nnz_blocks

    @property
    def kept(self) -> int:
        """Kept weights."""
        return self._native.kept

    @property
    def density(self) -> float:
        """kept / total; sparsity is 1 - density."""
        return self.kept / int(np.prod(self.shape))

    @property
    def block_density(self) -> float:
        """Stored blocks / all blocks."""
        r, c = self.block_shape
        return self.nnz_blocks * r * c / int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the four arrays; masks count only where some block is not full."""
        r, c = self.block_shape
        masks = 0 if self.kept == self.nnz_blocks * r * c else 8 * self.nnz_blocks
        return 4 * (self.shape[0] // r + 1 + self.nnz_blocks + self.kept) + masks

    def __repr__(self) -> str:
        return f"BlockCSR(shape={self.shape}, block_shape={self.block_shape}, density={self.density:.4g})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (BlockCSR, (self.shape, self.block_shape, self.crow_indices, self.col_indices, self.masks, self.values))


def _array(value: Any) -> NDArray[Any]:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.ascontiguousarray(value)


def _floats(name: str, value: Any) -> NDArray[np.float32]:
    array = _array(value)
    if array.dtype != np.float32:
        raise TypeError(f"{name}: expected dtype float32, got {array.dtype}")
    return array


def _integers(name: str, value: Any, dtype: type[np.int32] | type[np.uint64]) -> NDArray[Any]:
    array = _array(value)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name}: expected integers, got dtype {array.dtype}")
    limits = np.iinfo(dtype)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        raise ValueError(f"{name}: a value does not fit {np.dtype(dtype).name}")
    return array.astype(dtype)


def _pair(block_shape: Any) -> tuple[int, int]:
    if not isinstance(block_shape, (tuple, list)) or len(block_shape) != 2:
        raise ValueError(f"block_shape: expected (rows, columns), got {block_shape!r}")
    return int(block_shape[0]), int(block_shape[1])
