from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

class Kernel:
    @property
    def name(self) -> str: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def packed(self) -> NDArray[np.uint8]: ...
    def start(
        self,
        device: int,
        stream: int,
        weights: int,
        x: int,
        x_strides: tuple[int, int, int],
        y: int,
        y_strides: tuple[int, int, int],
        bias: int,
        residual: int,
        act: int,
        low: float,
        high: float,
    ) -> None: ...

class Weight:
    def __init__(
        self,
        shape: Sequence[int],
        block_shape: tuple[int, int],
        crow_indices: NDArray[np.int32],
        col_indices: NDArray[np.int32],
        masks: NDArray[np.uint64],
        values: NDArray[np.float32],
    ) -> None: ...
    def fill(self, rows: int, columns: int) -> float: ...
    def spmm(
        self,
        x_shape: Sequence[int],
        window: Sequence[int],
        groups: int,
        type: int,
        rows: int,
        tile: int,
        shared_bytes: int,
    ) -> Kernel | None: ...
    def gemv(self, x_shape: Sequence[int], type: int, multiprocessors: int, shared_bytes: int) -> Kernel | None: ...
    def blocks(
        self,
        x_shape: Sequence[int],
        window: Sequence[int],
        groups: int,
        math: str,
        rows: int,
        vectors: bool,
        multiprocessors: int,
        shared_bytes: int,
    ) -> Kernel | None: ...

def require_driver() -> None: ...
def driver_problem(driver: int, runtime: int) -> str: ...
def properties(device: int) -> tuple[int, int, int]: ...
