"""Damaged and hostile program files: always FormatError, or a program that runs; never a crash or a believed size.

`tests/native/test_malformed.cpp` does the same below Python, under sanitizers and with a counting allocator.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load, save

from sparseprune import FormatError, _native
from sparseprune.container import with_half_weights
from sparseprune.graph.ir import Graph, Input, Node, Weight
from sparseprune.runtime import Program

X = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)


def small() -> bytes:
    """A convolution with zeros, a pooling, a dense linear layer; about 1.5 kB."""
    random = np.random.default_rng(1)
    sparse = np.where(random.random((4, 3, 3, 3)) < 0.2, random.standard_normal((4, 3, 3, 3)), 0).astype(np.float32)
    attrs: dict[str, Any] = {"dims": 2, "stride": [1, 1], "padding": [1] * 4, "dilation": [1, 1], "groups": 1}
    nodes = (
        Node("conv", "conv", (0,), attrs | {"act": "relu"}, weight="w0", bias="b0"),
        Node("adaptive_avg_pool", "pool", (1,), {"dims": 2, "output_size": [1, 1]}),
        Node("flatten", "flat", (2,)),
        Node("linear", "fc", (3,), weight="w1"),
    )
    weights = {"w0": Weight(sparse), "w1": Weight(np.ones((2, 4), np.float32))}
    bias = {"b0": np.arange(4, dtype=np.float32)}
    return Graph((Input("x", ("n", 3, "h", "w")),), nodes, (4,), {"kind": "tensor"}, weights, bias).to_bytes()


DATA = small()
Y = Program(DATA)(X)


def readable(data: bytes) -> bool:
    """A program that runs, or that refuses these inputs; or FormatError."""
    try:
        program = Program(data)
    except FormatError as error:
        assert str(error)
        return False
    try:
        program(X)
    except ValueError as error:
        assert not isinstance(error, FormatError)
    return True


def sealed(data: bytes) -> bytes:
    """With checksums that fit, so that what is behind them is reached."""
    try:
        return _native.seal(data)
    except FormatError:
        return data


def header_size() -> int:
    return 8 + int.from_bytes(DATA[:8], "little")


def test_truncation_at_every_byte() -> None:
    assert readable(DATA)
    for size in range(len(DATA)):
        assert not readable(DATA[:size]) and not readable(sealed(DATA[:size]))
    assert not readable(DATA + b"\0") and not readable(sealed(DATA + b"\0"))


def test_every_flipped_bit_is_found() -> None:
    for data in (DATA, with_half_weights(DATA)):
        for place in range(len(data)):
            for bit in range(8):
                changed = bytearray(data)
                changed[place] ^= 1 << bit
                with pytest.raises(FormatError):
                    _native.Program(bytes(changed))


def test_every_header_byte_mutated_in_turn() -> None:
    """As it comes the checksum finds it; sealed again, it is refused or runs."""
    reread = 0
    for place in range(header_size()):
        for byte in b'\x00 "\\09-{],e\x7f\xff':
            changed = DATA[:place] + bytes([byte]) + DATA[place + 1 :]
            if byte != DATA[place]:
                assert not readable(changed)
                reread += readable(sealed(changed))
    assert reread > 100  # names, for one, are free


def test_payload_bytes_mutated_behind_the_checksum() -> None:
    for place in range(header_size(), len(DATA)):
        for byte in (0, 1, 127, 128, 255):
            readable(sealed(DATA[:place] + bytes([byte]) + DATA[place + 1 :]))


def test_an_unchanged_program_resealed_is_equal() -> None:
    assert _native.seal(DATA) == DATA
    np.testing.assert_array_equal(Program(sealed(DATA))(X), Y)


# ---- named cases, written by the safetensors library

Arrays = dict[str, NDArray[Any]]


def rebuilt(edit: Callable[[dict[str, Any], Arrays], None]) -> bytes:
    header = json.loads(DATA[8 : header_size()])
    graph, arrays = json.loads(header["__metadata__"]["sparseprune"]), load(DATA)
    edit(graph, arrays)
    text = graph["text"] if "text" in graph else json.dumps(graph)
    return sealed(save(arrays, metadata={"sparseprune": text}))


def columns(arrays: Arrays, values: list[int]) -> None:
    del arrays["w0.col_gaps"]
    kept = len(arrays["w0.values"])
    arrays["w0.col_indices"] = np.array((values + list(range(9, 27)))[:kept], np.uint16)
    arrays["w0.crow_indices"] = np.array([0, kept, kept, kept, kept], np.int32)


CASES: dict[str, tuple[str, Callable[[dict[str, Any], Arrays], Any]]] = {
    "an older version": ("version 1 of the format", lambda g, a: g.update(version=1)),
    "a newer version": ("version 3 of the format", lambda g, a: g.update(version=3)),
    "no checksum": ("'checksum' is missing", lambda g, a: a.pop("checksum")),
    "a cycle": ("value 4 is not in", lambda g, a: g["nodes"][0].update(inputs=[4])),
    "a node that reads itself": ("value 1 is not in", lambda g, a: g["nodes"][0].update(inputs=[1])),
    "an output that is not there": ("value 9 is not in", lambda g, a: g.update(outputs=[9])),
    "an array that is not there": ("'b0' is missing", lambda g, a: a.pop("b0")),
    "an array that nobody uses": ("nothing uses", lambda g, a: a.update(more=np.zeros(3, np.float32))),
    "a wrong dtype": ("is I32, expected F32", lambda g, a: a.update(b0=np.zeros(4, np.int32))),
    "a dtype that programs have not": ("dtype 'F64'", lambda g, a: a.update(b0=np.zeros(4))),
    "a bias too short": ("3 elements, expected 4", lambda g, a: a.update(b0=np.zeros(3, np.float32))),
    "values too short": ("values has", lambda g, a: a.update({"w0.values": a["w0.values"][:-1]})),
    "a column out of range": (r"is not in \[0, 27\)", lambda g, a: columns(a, [0, 1, 27])),
    "unsorted columns": ("is not above", lambda g, a: columns(a, [5, 4])),
    "a column twice": ("is not above", lambda g, a: columns(a, [5, 5])),
    "rows that fall": ("expected 9", lambda g, a: a.update({"w0.crow_indices": np.array([0, 9, 3, 9, 9], np.int32)})),
    "rows beyond the columns": ("ends in block row", lambda g, a: a["w0.crow_indices"].__setitem__(4, 2**31 - 1)),
    "gaps left over": ("col_gaps' has", lambda g, a: a.update({"w0.col_gaps": np.ones(99, np.uint8)})),
    "an absurd shape": ("exceeds", lambda g, a: g["weights"]["w0"].update(shape=[4, 2**31 - 1, 2**31 - 1, 1])),
    "an overflowing shape": ("not in", lambda g, a: g["weights"]["w0"].update(shape=[2**62, 2**62])),
    "rows that are not there": ("indices has 5", lambda g, a: g["weights"]["w0"].update(shape=[2**31 - 1, 3, 3, 3])),
    "zero channels": ("extent 0", lambda g, a: g["weights"]["w0"].update(shape=[0, 3, 3, 3])),
    "a stride of 2^63": ("64 bits", lambda g, a: g["nodes"][0]["attrs"].update(stride=[2**63, 1])),
    "a key twice": ("duplicate key 'version'", lambda g, a: g.update(text='{"version": 2, "version": 2}')),
    "deep nesting": ("nested deeper", lambda g, a: g.update(text="[" * 10**6)),
    "a deep tree": ("nested deeper", lambda g, a: g.update(tree=tree(100))),
    "tunings": ("shapes twice", lambda g, a: g.update(tuned=[{"isa": "", "shapes": [], "choices": [None] * 4}] * 2)),
    "text behind": ("bytes after the value", lambda g, a: g.update(text=json.dumps(g) + "0")),
    "no text": ("expected a value", lambda g, a: g.update(text="")),
    "an unknown operator": ("unknown op", lambda g, a: g["nodes"][1].update(op="system")),
    "an attribute too many": ("unknown key", lambda g, a: g["nodes"][2]["attrs"].update(path="/etc/passwd")),
}  # fmt: skip


def tree(depth: int) -> dict[str, Any]:
    return {"kind": "list", "items": [tree(depth - 1)]} if depth else {"kind": "tensor"}


@pytest.mark.parametrize("case", CASES)
def test_named_cases(case: str) -> None:
    message, edit = CASES[case]
    with pytest.raises(FormatError, match=message):
        Program(rebuilt(edit))


def test_duplicate_arrays_and_gaps_in_the_payload() -> None:
    header, payload = DATA[8 : header_size()].rstrip(), DATA[header_size() :]
    one = b'"b0":' + json.dumps(json.loads(header)["b0"]).encode()

    def file(text: bytes, rest: bytes) -> bytes:
        return sealed(len(text).to_bytes(8, "little") + text + rest)

    assert readable(file(header, payload))
    with pytest.raises(FormatError, match="duplicate key 'b0'"):
        Program(file(header[:-1] + b"," + one + b"}", payload))
    with pytest.raises(FormatError, match="overlap"):
        Program(file(header[:-1] + b"," + one.replace(b"b0", b"b9") + b"}", payload))
    with pytest.raises(FormatError, match="the tensors hold"):
        Program(file(header, payload + b"\0\0\0\0"))


HOSTILE = """
import resource, sys
import sparseprune.runtime as runtime
from sparseprune import FormatError
here = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (here + (64 << 20), here + (64 << 20)))
for path in sys.argv[1:]:
    try:
        runtime.load(path)
    except FormatError:
        print("refused")
"""


def test_declared_sizes_are_not_allocated(tmp_path: Path) -> None:
    """Each declares gigabytes; the process that reads them may have 64 MiB more than it has."""
    paths: list[Path] = []
    for case in ("an absurd shape", "an overflowing shape", "rows that are not there", "rows beyond the columns"):
        paths.append(tmp_path / f"{len(paths)}.spr")
        paths[-1].write_bytes(rebuilt(CASES[case][1]))
    for size in (2**24, 2**40, 2**63):
        paths.append(tmp_path / f"{len(paths)}.spr")
        paths[-1].write_bytes(size.to_bytes(8, "little") + DATA[8:])
    command = [sys.executable, "-c", HOSTILE, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["refused"] * len(paths), done.stderr


# ---- float16


def test_float16_weights_are_rounded_once() -> None:
    half = with_half_weights(DATA)
    before, after = load(DATA), load(half)
    for name, array in after.items():
        if name.endswith(".values"):
            assert array.dtype == np.float16
            np.testing.assert_array_equal(array, before[name].astype(np.float16))
        elif name != "checksum":
            np.testing.assert_array_equal(array, before[name])
    again = with_half_weights(half)
    assert again == half  # rounding what is rounded changes nothing
    stored = [layer.get("stored") for layer in Program(half).describe()["layers"]]
    assert stored == ["float16", None, None, "float16"]
    np.testing.assert_allclose(Program(half)(X), Y, rtol=2e-3, atol=1e-3)


def test_float16_refuses_what_it_cannot_hold() -> None:
    for value in (65504.0, 65519.0, 65520.0, np.inf, np.nan, 1e-9):
        dense = np.full((2, 3), value, np.float32)
        nodes = (Node("linear", "fc", (0,), {}, weight="w"),)
        data = Graph((Input("x", ("n", 3)),), nodes, (1,), {"kind": "tensor"}, {"w": Weight(dense)}, {}).to_bytes()
        if value != 65520.0:
            Program(with_half_weights(data))
        else:
            with pytest.raises(ValueError, match="layer 'fc' has a weight of 65520, expected at most 65504"):
                with_half_weights(data)
