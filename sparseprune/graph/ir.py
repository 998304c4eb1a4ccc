"""The graph as plain data, and its bytes: what `docs/program.md` describes. Needs NumPy and safetensors, not torch.

Values are numbered: the inputs first, then one value for each node in order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..container import VERSION, pack

__all__ = ["OPS", "BlockCSRLike", "Graph", "Input", "Node", "Weight", "pack_csr", "pack_gaps"]

Array = NDArray[Any]

OPS = frozenset({"conv", "linear", "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "add", "sub",
                 "mul", "div", "maximum", "minimum", "act", "prelu", "flatten", "constant", "reshape", "permute",
                 "expand", "slice", "index_select", "roll", "concat", "pad", "resize", "pixel_shuffle",
                 "channel_shuffle", "reduce", "softmax", "layer_norm", "group_norm", "matmul"})  # fmt: skip

_MAX_U16_COLUMNS = 1 << 16
_SKIP = 255


class BlockCSRLike(Protocol):
    """What `Weight.sparse` must offer: the arrays of a `BlockCSR`."""

    @property
    def block_shape(self) -> tuple[int, int]: ...
    @property
    def crow_indices(self) -> Array: ...
    @property
    def col_indices(self) -> Array: ...
    @property
    def masks(self) -> Array | None: ...
    @property
    def values(self) -> Array: ...


@dataclass(frozen=True)
class Input:
    """A program input: each size is an integer (fixed) or a name (any size; equal names are equal sizes)."""

    name: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight, float32, `(out, in/groups, kh, kw)`, `(out, in/groups, k)` or `(out, in)`.

    `sparse`, where set, is what `Graph.to_bytes` writes instead of its own (1, 1) blocks; it must hold the same
    numbers.
    """

    dense: Array
    sparse: BlockCSRLike | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.dense.shape

    @property
    def kept_per_row(self) -> Array:
        """The number of non-zeros of each row: `(out,)`, int64."""
        return np.asarray(np.count_nonzero(self.dense.reshape(self.shape[0], -1), axis=1))

    @property
    def has_zeros(self) -> bool:
        return int(np.count_nonzero(self.dense)) != self.dense.size


@dataclass(frozen=True, eq=False)
class Node:
    """An operator. `gain` and `shift` (float64, `(C,)`) belong to `scale_shift`, which `passes` folds or lowers away.

    Attributes:
        op: One of `OPS`, or `scale_shift` before `passes.optimize`.
        name: The torch layer's qualified name; a second use of the layer has `@1` appended.
        inputs: Numbers of the values it reads.
        weight: A key of `Graph.weights`.
        bias: A key of `Graph.biases`.
        scale: Another key of `Graph.biases`: the factors of a norm, or the slopes of `prelu`.
        attrs: As in `docs/program.md`.
        broadcasts: Its operands may differ in shape, so it is no residual; for `passes` only.
    """

    op: str
    name: str
    inputs: tuple[int, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    weight: str | None = None
    bias: str | None = None
    scale: str | None = None
    gain: Array | None = None
    shift: Array | None = None
    broadcasts: bool = False

    @property
    def act(self) -> str:
        return str(self.attrs.get("act", "none"))


@dataclass(frozen=True, eq=False)
class Graph:
    """A program: see `docs/program.md`. Immutable by convention; the passes return new graphs."""

    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    tree: dict[str, Any]
    weights: dict[str, Weight]
    biases: dict[str, Array]

    def to_json(self) -> str:
        """The graph's JSON document. Weights that no node uses are left out."""
        return json.dumps(
            {
                "format": "sparseprune-program",
                "version": VERSION,
                "inputs": [{"name": i.name, "shape": list(i.shape)} for i in self.inputs],
                "weights": {name: _weight_json(self.weights[name]) for name in self._used("weight")},
                "nodes": [_node_json(node) for node in self.nodes],
                "outputs": list(self.outputs),
                "tree": self.tree,
            }
        )

    def to_bytes(self) -> bytes:
        """The program's container, a safetensors file.

        Raises:
            ValueError: The graph holds an operator that programs do not have, or an array that is not float32.
        """
        arrays: dict[str, Array] = {}
        for name in self._used("weight"):
            arrays.update(_weight_arrays(name, self.weights[name]))
        for name in self._used("bias", "scale"):
            arrays[name] = _float32(name, self.biases[name])
        return pack(arrays, self.to_json())

    def _used(self, *kinds: str) -> list[str]:
        names = (getattr(node, kind) for node in self.nodes for kind in kinds)
        return list(dict.fromkeys(name for name in names if name is not None))


def pack_csr(dense: Array) -> tuple[Array, Array, Array]:
    """The 1×1 blocks of a weight as a matrix `(out, K)`: crow_indices `(out + 1,)`, col_indices and values `(nnz,)`."""
    matrix = dense.reshape(dense.shape[0], -1)
    kept = matrix != 0
    crow = np.zeros(matrix.shape[0] + 1, np.int64)
    np.cumsum(kept.sum(axis=1), out=crow[1:])
    if crow[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"a weight of shape {dense.shape} keeps {crow[-1]} values, more than int32 can index")
    columns = np.nonzero(kept)[1].astype(_column_dtype(matrix.shape[1]))
    return crow.astype(np.int32), columns, matrix[kept]


def pack_gaps(crow: Array, columns: Array) -> Array:
    """`columns` `(nnz,)`, ascending in each row of `crow`, as gaps in bytes: how many empty columns come before each.

    A byte of 255 means 255 empty columns and no kept one, so wide gaps take several bytes.
    """
    before = np.empty(columns.shape, np.int64)
    before[1:] = columns[:-1]
    before[crow[:-1][np.diff(crow) > 0]] = -1
    gaps = columns.astype(np.int64) - before - 1
    skips = gaps // _SKIP
    out = np.full(len(gaps) + int(skips.sum()), _SKIP, np.uint8)
    out[np.cumsum(skips + 1) - 1] = gaps % _SKIP
    return out


def _columns(crow: Array, columns: Array, block_columns: int) -> dict[str, Array]:
    """The smaller of the two ways of storing them."""
    gaps, plain = pack_gaps(crow, columns), columns.astype(_column_dtype(block_columns))
    return {"col_gaps": gaps} if gaps.nbytes <= plain.nbytes else {"col_indices": plain}


def _column_dtype(columns: int) -> type[np.uint16] | type[np.int32]:
    return np.uint16 if columns <= _MAX_U16_COLUMNS else np.int32


def _float32(name: str, array: Array) -> Array:
    if array.dtype != np.float32:
        raise ValueError(f"array '{name}' is {array.dtype}, expected float32")
    return array


def _block_shape(weight: Weight) -> list[int] | None:
    """None where the weight is stored dense."""
    if weight.sparse is not None:
        return [int(size) for size in weight.sparse.block_shape]
    return [1, 1] if weight.has_zeros else None


def _weight_json(weight: Weight) -> dict[str, Any]:
    block_shape = _block_shape(weight)
    return {"shape": list(weight.shape)} | ({} if block_shape is None else {"block_shape": block_shape})


def _weight_arrays(name: str, weight: Weight) -> dict[str, Array]:
    _float32(name, weight.dense)
    masks: Array | None = None
    if (block_shape := _block_shape(weight)) is None:
        return {f"{name}.values": weight.dense}
    block_columns = -(-(weight.dense[0].size) // block_shape[1])
    if weight.sparse is None:
        crow, columns, values = pack_csr(weight.dense)
    else:
        packed = weight.sparse
        crow, values = packed.crow_indices.astype(np.int32), _float32(name, packed.values)
        columns, masks = packed.col_indices, packed.masks
    arrays = {"crow_indices": crow, "values": values} | _columns(crow, columns, block_columns)
    if masks is not None:
        arrays["masks"] = masks.astype(np.uint64)
    return {f"{name}.{key}": array for key, array in arrays.items()}


def _node_json(node: Node) -> dict[str, Any]:
    if node.op not in OPS:
        raise ValueError(f"layer '{node.name}': a program has no operator '{node.op}'; run passes.optimize first")
    named = {key: value for key in ("weight", "bias", "scale") if (value := getattr(node, key)) is not None}
    return {"op": node.op, "name": node.name, "inputs": list(node.inputs), **named, "attrs": node.attrs}
