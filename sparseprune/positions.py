"""Where the kept weights of a tensor are, in few bytes: a bitmap, or the gaps between them. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError

__all__ = ["decode_positions", "encode_positions"]

_GAPS: dict[str, type[np.unsignedinteger[Any]]] = {"gaps8": np.uint8, "gaps16": np.uint16}


def encode_positions(kept: NDArray[np.bool_]) -> tuple[str, NDArray[Any]]:
    """The smallest of the encodings of a flat bool array.

    Returns:
        ("bitmap", (ceil(n / 8),) uint8, little bit order), or ("gaps8" | "gaps16", (m,) uint8 | uint16): a gap is the
        number of pruned entries before a kept one; the type's largest value L means "L pruned entries, no kept one".
    """
    positions = np.flatnonzero(kept).astype(np.int64)
    gaps = np.diff(positions, prepend=-1) - 1
    size, name = (kept.size + 7) // 8, "bitmap"
    for candidate, dtype in _GAPS.items():
        needed = (len(gaps) + int((gaps // np.iinfo(dtype).max).sum())) * np.dtype(dtype).itemsize
        if needed < size:
            size, name = needed, candidate
    if name == "bitmap":
        return name, np.packbits(kept, bitorder="little")
    limit = int(np.iinfo(_GAPS[name]).max)
    skips = gaps // limit
    ends = np.cumsum(skips + 1) - 1  # where each kept entry's own gap lands
    result = np.full(len(gaps) + int(skips.sum()), limit, dtype=_GAPS[name])
    result[ends] = (gaps % limit).astype(_GAPS[name])
    return name, result


def decode_positions(encoding: str, data: NDArray[Any], size: int, count: int) -> NDArray[np.int64]:
    """Sorted positions of the `count` kept entries of `size`, whatever `data` holds being checked.

    Raises:
        FormatError: `data` does not encode exactly `count` positions below `size`.
    """
    if encoding == "bitmap":
        if data.dtype != np.uint8 or data.shape != ((size + 7) // 8,):
            raise FormatError(f"bitmap is {data.dtype} {data.shape}, expected uint8 ({(size + 7) // 8},)")
        bits = np.unpackbits(data, bitorder="little")
        if bits[size:].any():
            raise FormatError(f"bitmap has bits set beyond its {size} entries")
        positions = np.flatnonzero(bits).astype(np.int64)
    elif encoding in _GAPS:
        dtype = _GAPS[encoding]
        if data.dtype != dtype or data.ndim != 1:
            raise FormatError(f"gaps are {data.dtype} {data.shape}, expected one-dimensional {np.dtype(dtype)}")
        limit = int(np.iinfo(dtype).max)
        kept = data != limit
        if len(data) and not kept[-1]:
            raise FormatError("gaps end in a skip")
        steps = data.astype(np.int64) + kept  # at most 2**16 each, so the sum cannot overflow
        positions = (np.cumsum(steps) - 1)[kept]
        if len(positions) and positions[-1] >= size:
            raise FormatError(f"gaps reach position {positions[-1]}, beyond {size} entries")
    else:
        raise FormatError(f"encoding is {encoding!r}, expected bitmap, {' or '.join(_GAPS)}")
    if len(positions) != count:
        raise FormatError(f"{encoding} holds {len(positions)} positions, expected {count}")
    return positions
