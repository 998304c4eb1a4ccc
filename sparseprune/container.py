"""A program's bytes, rewritten: other tuning results, float16 weights. NumPy and safetensors, no torch.

The format is `docs/program.md`. What is read here was made or has been checked by the native reader, the only gate.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _native

__all__ = ["VERSION", "pack", "with_half_weights", "with_tuned"]

VERSION = 2  # of the format; csrc/reader.cpp refuses every other
_CHECKSUM, _GRAPH = "checksum", "sparseprune"

Tuned = Sequence[tuple[str, list[list[int]], Sequence["_native.ChoiceDict | None"], int]]


def pack(arrays: dict[str, NDArray[Any]], graph: str) -> bytes:
    """The container of these arrays and this graph (JSON), sealed with its checksums."""
    from safetensors.numpy import save  # here, since running a program needs neither of the two

    # safetensors writes the memory as it lies, so a strided array would be stored scrambled.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    contiguous[_CHECKSUM] = np.zeros(2, np.uint64)
    return _native.seal(bytes(save(contiguous, metadata={_GRAPH: graph})))


def with_tuned(data: bytes, tuned: Tuned) -> bytes:
    """The same program with these choices in its graph; the payload stays as it is."""
    header, end = _header(data)
    graph = json.loads(header["__metadata__"][_GRAPH])
    graph["tuned"] = [
        {"isa": isa, "shapes": shapes, "choices": [c and [c["form"], c["kind"], c["vectors"]] for c in choices]}
        | ({"threads": threads} if threads else {})
        for isa, shapes, choices, threads in tuned
    ]
    header["__metadata__"][_GRAPH] = json.dumps(graph)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the payload
    return _native.seal(len(text).to_bytes(8, "little") + text + data[end:])


def with_half_weights(data: bytes) -> bytes:
    """The same program with its weights rounded to the nearest float16 (ties to even); biases stay float32.

    Raises:
        ValueError: A finite weight is beyond float16's range; the message names layer and weight.
    """
    from safetensors.numpy import load

    header, _ = _header(data)
    graph = json.loads(header["__metadata__"][_GRAPH])
    arrays = load(data)
    del arrays[_CHECKSUM]
    for name in graph["weights"]:
        values = arrays[f"{name}.values"]
        with np.errstate(over="ignore", under="ignore"):
            rounded = values.astype(np.float16)
        if bool((np.isinf(rounded) & ~np.isinf(values)).any()):
            layer = next(node["name"] for node in graph["nodes"] if node.get("weight") == name)
            largest = float(np.abs(values[np.isfinite(values)]).max())
            raise ValueError(
                f"weights='float16': layer {layer!r} has a weight of {largest:g}, expected at most 65504 in magnitude"
            )
        arrays[f"{name}.values"] = rounded
    return pack(arrays, header["__metadata__"][_GRAPH])


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """The safetensors header, and where the payload begins."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), end
