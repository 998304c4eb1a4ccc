from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

class ChoiceDict(TypedDict):
    form: str
    kind: str
    vectors: int

class LayerDict(TypedDict, total=False):
    name: str
    op: str
    shape: tuple[int, ...]
    total: int
    kept: int
    stored: str  # in the file: float32 or float16
    block_shape: tuple[int, int]
    block_density: float

class TunedDict(TypedDict):
    node: int
    choice: ChoiceDict
    seconds: float
    dense_seconds: float | None
    candidates: int

class BlockCSR:
    def __init__(
        self,
        shape: Sequence[int],
        block_shape: tuple[int, int],
        crow_indices: NDArray[np.int32],
        col_indices: NDArray[np.int32],
        masks: NDArray[np.uint64] | None,
        values: NDArray[np.float32],
    ) -> None: ...
    @staticmethod
    def from_dense(
        dense: NDArray[np.float32], mask: NDArray[np.bool_] | None = None, block_shape: tuple[int, int] = (1, 1)
    ) -> BlockCSR: ...
    def to_dense(self) -> NDArray[np.float32]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def block_shape(self) -> tuple[int, int]: ...
    @property
    def crow_indices(self) -> NDArray[np.int32]: ...
    @property
    def col_indices(self) -> NDArray[np.int32]: ...
    @property
    def masks(self) -> NDArray[np.uint64]: ...
    @property
    def values(self) -> NDArray[np.float32]: ...
    @property
    def nnz_blocks(self) -> int: ...
    @property
    def kept(self) -> int: ...

class Plan:
    def run(self, inputs: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]) -> None: ...
    def profile(self, inputs: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]) -> list[float]: ...
    @property
    def output_shapes(self) -> list[tuple[int, ...]]: ...
    @property
    def value_shapes(self) -> list[tuple[int, ...]]: ...
    @property
    def choices(self) -> list[ChoiceDict | None]: ...
    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def arena_bytes(self) -> int: ...
    @property
    def groups(self) -> list[list[int]]: ...  # nodes [begin, end) that run depth first, together
    @property
    def weight_bytes(self) -> int: ...

class Program:
    def __init__(self, data: bytes) -> None: ...
    @staticmethod
    def layer(
        weight: BlockCSR,
        dims: int,
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> Program: ...
    @property
    def inputs(self) -> list[tuple[str, tuple[int | str, ...]]]: ...
    @property
    def tree(self) -> str: ...
    @property
    def tuned(self) -> list[tuple[str, list[list[int]], list[ChoiceDict | None], int]]: ...  # threads last, 0: not known
    @property
    def layers(self) -> list[LayerDict]: ...
    def plan(
        self,
        shapes: Sequence[tuple[int, ...]],
        threads: int | None = None,
        isa: str | None = None,
        bands: int
        | None = None,  # a plan of its own, not cached: > 0: depth first in so many bands, guarded; < 0: never so
    ) -> Plan: ...
    def set_choices(
        self, shapes: Sequence[tuple[int, ...]], choices: Sequence[ChoiceDict | None], isa: str | None = None
    ) -> None: ...
    def tune(
        self,
        shapes: Sequence[tuple[int, ...]],
        budget_seconds: float,
        min_gain: float = 1.0,
        progress: Callable[[int, int], bool] | None = None,
        threads: int | None = None,
        isa: str | None = None,
    ) -> list[TunedDict]: ...

def seal(data: bytes) -> bytes: ...  # with the checksums of what is there
def available_cores() -> int: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def isa() -> str: ...
def supported_isas() -> list[str]: ...
