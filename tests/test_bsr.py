"""BlockCSR: round trips, counts, and errors that name the field and the value."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparseprune import BlockCSR

Array = NDArray[Any]
FIELDS = ("crow_indices", "col_indices", "masks", "values")


@st.composite
def weights(draw: Callable[..., Any]) -> tuple[Array, tuple[int, int]]:
    """A small weight of two to four dimensions, and blocks that divide it."""
    r, c = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kernel = draw(st.sampled_from([(), (1,), (3,), (1, 1), (2, 3), (3, 3)]))
    shape = (r * draw(st.integers(1, 4)), c * draw(st.integers(1, 4)), *kernel)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dense = random.standard_normal(shape).astype(np.float32)
    dense[random.random(shape) >= draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))] = 0
    return dense, (r, c)


def blocks(dense: Array, block_shape: tuple[int, int]) -> Array:
    """(out, ...) as (block rows, block columns, R * C), by plain NumPy."""
    r, c = block_shape
    rows, cols = dense.shape[0], int(np.prod(dense.shape[1:]))
    cut: Array = dense.reshape(rows // r, r, cols // c, c).swapaxes(1, 2)
    return cut.reshape(rows // r, cols // c, r * c)


def same(a: BlockCSR, b: BlockCSR) -> bool:
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in FIELDS)
    return a.shape == b.shape and a.block_shape == b.block_shape and arrays


# ---- round trips


@settings(max_examples=80, deadline=None)
@given(weights())
def test_dense_round_trip_and_fields(case: tuple[Array, tuple[int, int]]) -> None:
    dense, block_shape = case
    packed = BlockCSR.from_dense(dense, block_shape=block_shape)
    assert packed.shape == dense.shape and packed.block_shape == block_shape
    back = packed.to_dense()
    assert back.dtype == np.float32 and np.array_equal(back, dense)

    cut = blocks(dense, block_shape)
    stored = (cut != 0).any(-1)
    assert np.array_equal(packed.crow_indices, np.append(0, np.cumsum(stored.sum(1))))
    assert np.array_equal(packed.col_indices, np.nonzero(stored)[1])
    bits = (cut[stored] != 0).astype(np.uint64) << np.arange(cut.shape[-1], dtype=np.uint64)
    assert np.array_equal(packed.masks, bits.sum(-1, dtype=np.uint64))
    assert np.array_equal(packed.values, cut[stored][cut[stored] != 0])
    dtypes = [getattr(packed, name).dtype for name in FIELDS]
    assert dtypes == [np.int32, np.int32, np.uint64, np.float32]

    kept, full = int(np.count_nonzero(dense)), int(stored.sum()) * cut.shape[-1]
    assert packed.kept == kept and packed.nnz_blocks == int(stored.sum())
    assert packed.density == kept / dense.size and packed.block_density == full / dense.size
    arrays = FIELDS if kept < full else ("crow_indices", "col_indices", "values")
    assert packed.nbytes == sum(getattr(packed, name).nbytes for name in arrays)


@settings(max_examples=30, deadline=None)
@given(weights())
def test_fields_make_the_same_weight(case: tuple[Array, tuple[int, int]]) -> None:
    packed = BlockCSR.from_dense(case[0], block_shape=case[1])
    fields = [getattr(packed, name) for name in FIELDS]
    assert same(packed, BlockCSR(packed.shape, packed.block_shape, *fields))
    assert same(packed, pickle.loads(pickle.dumps(packed)))
    wide = [field.astype(np.int64) for field in fields[:2]]
    assert same(packed, BlockCSR(packed.shape, packed.block_shape, *wide, *fields[2:]))


@settings(max_examples=30, deadline=None)
@given(weights())
def test_torch_bsr_both_ways(case: tuple[Array, tuple[int, int]]) -> None:
    dense, block_shape = case
    packed = BlockCSR.from_dense(dense, block_shape=block_shape)
    tensor = packed.to_torch_bsr()
    matrix = torch.from_numpy(dense.reshape(dense.shape[0], -1))
    assert tensor.layout == torch.sparse_bsr and tuple(tensor.values().shape[1:]) == block_shape
    assert torch.equal(tensor.to_dense(), matrix)
    assert tensor.values().shape[0] == packed.nnz_blocks
    assert same(packed, BlockCSR.from_torch_bsr(tensor, packed.shape))
    theirs = BlockCSR.from_torch_bsr(matrix.to_sparse_bsr(block_shape))
    assert theirs.shape == tuple(matrix.shape) and np.array_equal(theirs.to_dense(), matrix.numpy())


def test_a_mask_says_what_is_kept() -> None:
    dense = np.array([[1, 0, 3], [0, 5, 6]], np.float32)
    mask = np.array([[False, True, True], [False, False, True]])
    packed = BlockCSR.from_dense(dense, mask)
    assert packed.kept == 3 and packed.values.tolist() == [0, 3, 6]  # a kept weight may be zero
    assert np.array_equal(packed.to_dense(), dense * mask)
    assert same(packed, BlockCSR.from_dense(torch.from_numpy(dense), torch.from_numpy(mask)))


def test_sources_need_not_be_contiguous_or_detached() -> None:
    dense = torch.randn(6, 8, requires_grad=True)
    expected = dense.detach().numpy().T
    assert np.array_equal(BlockCSR.from_dense(dense.T).to_dense(), expected)
    assert np.array_equal(BlockCSR.from_dense(expected).to_dense(), expected)
    assert np.array_equal(BlockCSR.from_dense(torch.nn.Parameter(dense)).to_dense(), dense.detach().numpy())


def test_special_values_are_kept_bit_for_bit() -> None:
    dense = np.array([[np.nan, np.inf, -np.inf, 1e-45], [0, 0, 0, 0]], np.float32)
    assert np.array_equal(BlockCSR.from_dense(dense).to_dense().view(np.uint32), dense.view(np.uint32))


def test_the_largest_block_and_full_masks() -> None:
    dense = np.arange(1, 129, dtype=np.float32).reshape(8, 16)
    packed = BlockCSR.from_dense(dense, block_shape=(8, 8))
    assert packed.masks.tolist() == [2**64 - 1] * 2 and np.array_equal(packed.to_dense(), dense)
    assert same(packed, BlockCSR((8, 16), (8, 8), [0, 2], [0, 1], None, packed.values))


def test_arrays_are_copies() -> None:
    packed = BlockCSR.from_dense(np.ones((2, 3), np.float32))
    for name in FIELDS:
        getattr(packed, name)[:] = 0
    packed.to_dense()[:] = 0
    assert np.array_equal(packed.to_dense(), np.ones((2, 3)))
    values = np.ones(1, np.float32)
    packed = BlockCSR((1, 1), (1, 1), [0, 1], [0], None, values)
    values[0] = 2
    assert packed.values.tolist() == [1]


def test_repr() -> None:
    packed = BlockCSR.from_dense(np.eye(4, dtype=np.float32), block_shape=(2, 2))
    assert repr(packed) == "BlockCSR(shape=(4, 4), block_shape=(2, 2), density=0.25)"


# ---- errors


GOOD: dict[str, Any] = {
    "shape": (4, 3, 2),
    "block_shape": (2, 2),
    "crow_indices": [0, 2, 3],
    "col_indices": [0, 2, 1],
    "masks": [15, 1, 6],
    "values": np.ones(7, np.float32),
}


def test_the_good_fields_are_good() -> None:
    assert BlockCSR(**GOOD).kept == 7


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shape", (4,), "shape has 1 dimensions, expected 2 or more"),
        ("shape", (4, 0, 2), r"shape\[1\]=0 is not in \[1, 2147483647\]"),
        ("shape", (-4, 3, 2), r"shape\[0\]=-4 is not in"),
        ("shape", (2**31, 3, 2), r"shape\[0\]=2147483648 is not in"),
        ("shape", (4, 2**16, 2**16), "shape: the product of all but its first dimension exceeds"),
        ("shape", (2**20, 2**21), "shape holds more than 1099511627776 elements"),
        ("block_shape", (3, 2), r"block_shape\[0\]=3 does not divide out_channels=4"),
        ("block_shape", (2, 4), r"block_shape\[1\]=4 does not divide columns=6"),
        ("block_shape", (0, 2), r"block_shape\[0\]=0 is not in \[1, 64\]"),
        ("block_shape", (2, 65), r"block_shape\[1\]=65 is not in \[1, 64\]"),
        ("block_shape", (2, 64), r"block_shape=\(2, 64\) has more than 64 entries"),
        ("block_shape", (2, 2, 2), r"block_shape: expected \(rows, columns\), got \(2, 2, 2\)"),
        ("block_shape", 2, r"block_shape: expected \(rows, columns\), got 2"),
        ("crow_indices", [0, 3], "crow_indices has 2 elements, expected 3"),
        ("crow_indices", [1, 2, 3], r"crow_indices\[0\]=1, expected 0"),
        ("crow_indices", [0, 4, 3], r"crow_indices\[2\]=3 is below crow_indices\[1\]=4"),
        ("crow_indices", [0, -1, 3], r"crow_indices\[1\]=-1 is below crow_indices\[0\]=0"),
        ("crow_indices", [0, 2, 4], r"crow_indices\[2\]=4 is not the 3 elements of col_indices"),
        ("crow_indices", [0, 2, 2**31], "crow_indices: a value does not fit int32"),
        ("crow_indices", [[0, 2, 3]], "crow_indices has 2 dimensions, expected 1"),
        ("col_indices", [0, 3, 1], r"col_indices\[1\]=3 is not in \[0, 3\)"),
        ("col_indices", [0, -1, 1], r"col_indices\[1\]=-1 is not in"),
        ("col_indices", [0, 0, 1], r"col_indices\[1\]=0 is not above col_indices\[0\]=0 in block row 0"),
        ("col_indices", [0, 2, -(2**31) - 1], "col_indices: a value does not fit int32"),
        ("masks", [15, 1], "masks has 2 elements, expected 3"),
        ("masks", [15, 0, 6], r"masks\[1\]=0: a stored block keeps an entry"),
        ("masks", [15, 17, 6], r"masks\[1\]=17 has bits outside the block: expected at most 15"),
        ("masks", [15, -1, 6], "masks: a value does not fit uint64"),
        ("masks", None, "values has 7 elements, expected 12"),
        ("masks", [], "masks has 0 elements, expected 3"),
        ("values", np.ones(8, np.float32), "values has 8 elements, expected 7"),
        ("values", np.ones((7, 1), np.float32), "values has 2 dimensions, expected 1"),
    ],
)
def test_a_field_that_does_not_fit_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockCSR(**{**GOOD, field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("crow_indices", [0.0, 2.0, 3.0], "crow_indices: expected integers, got dtype float64"),
        ("col_indices", np.array([0, 2, 1], np.float32), "col_indices: expected integers, got dtype float32"),
        ("masks", [True, True, False], "masks: expected integers, got dtype bool"),
        ("values", np.ones(7), "values: expected dtype float32, got float64"),
        ("values", torch.ones(7, dtype=torch.float16), "values: expected dtype float32, got float16"),
    ],
)
def test_a_dtype_that_does_not_fit_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        BlockCSR(**{**GOOD, field: value})


def test_wrong_arguments_of_from_dense() -> None:
    dense = np.ones((4, 6), np.float32)
    with pytest.raises(TypeError, match="weight: expected dtype float32, got float64"):
        BlockCSR.from_dense(dense.astype(np.float64))
    with pytest.raises(TypeError, match="mask: expected dtype bool, got int64"):
        BlockCSR.from_dense(dense, np.ones((4, 6), np.int64))
    with pytest.raises(ValueError, match=r"mask has shape \(4, 5\), expected \(4, 6\)"):
        BlockCSR.from_dense(dense, np.ones((4, 5), bool))
    with pytest.raises(ValueError, match=r"block_shape\[1\]=4 does not divide columns=6"):
        BlockCSR.from_dense(dense, block_shape=(1, 4))
    with pytest.raises(ValueError, match="shape has 1 dimensions"):
        BlockCSR.from_dense(dense[0])
    with pytest.raises(ValueError, match=r"shape\[1\]=0"):
        BlockCSR.from_dense(dense[:, :0])


def test_wrong_arguments_of_from_torch_bsr() -> None:
    dense = torch.ones(4, 6)
    bsr = dense.to_sparse_bsr((2, 3))
    with pytest.raises(ValueError, match="expected a 2-D torch.sparse_bsr tensor, got 2-D torch.strided"):
        BlockCSR.from_torch_bsr(dense)
    with pytest.raises(ValueError, match="got 3-D torch.sparse_bsr"):
        BlockCSR.from_torch_bsr(torch.ones(2, 4, 6).to_sparse_bsr((2, 3)))
    with pytest.raises(TypeError, match="expected dtype float32, got torch.float64"):
        BlockCSR.from_torch_bsr(dense.double().to_sparse_bsr((2, 3)))
    for shape in ((6, 4), (4, 5), (4, 6, 2), ()):
        with pytest.raises(ValueError, match="does not hold the tensor's"):
            BlockCSR.from_torch_bsr(bsr, shape)
    assert BlockCSR.from_torch_bsr(bsr, (4, 2, 3)).shape == (4, 2, 3)
