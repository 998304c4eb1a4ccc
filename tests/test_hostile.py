"""Programs that a file may declare but nobody should suffer from: each once crashed, hung or allocated endlessly."""

from __future__ import annotations

import json
import pickle
import signal
import threading
from typing import Any

import numpy as np
import pytest

from sparseprune import FormatError, _native
from sparseprune.container import with_tuned
from sparseprune.graph.ir import Graph, Input, Node, Weight
from sparseprune.runtime import Program


def graph(shape: tuple[int | str, ...], nodes: tuple[Node, ...], outputs: tuple[int, ...], **more: Any) -> Graph:
    tree = {"kind": "tensor"} if outputs else {"kind": "none"}
    return Graph((Input("x", shape),), nodes, outputs, tree, more.get("weights", {}), {})


CONV = {"dims": 2, "stride": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1}


def test_a_program_without_operators() -> None:
    program = Program(graph(("n", 3), (), ()).to_bytes())
    plan = _native.Program(program.data).plan([(1, 3)], 2)
    for _ in range(20000):  # workers once wrote into a job that had gone
        plan.run([np.zeros((1, 3), np.float32)], [])
    assert program(np.zeros((1, 3), np.float32)) is None


@pytest.mark.parametrize("shape", [(), ("n", 1, 1, 1, 1, 1, 1, 1, 1)])
def test_input_ranks_are_one_to_eight(shape: tuple[int | str, ...]) -> None:
    with pytest.raises(FormatError, match="dimensions, expected 1 to 8"):
        Program(graph(shape, (Node("act", "a", (0,), {"act": "relu"}),), (1,)).to_bytes())


def test_kernels_are_bounded() -> None:
    weights = {"w": Weight(np.zeros((1, 1, 200, 200), np.float32))}
    node = Node("conv", "huge", (0,), {**CONV, "padding": [100, 100, 100, 100]}, weight="w")
    with pytest.raises(FormatError, match="huge.*exceeds 16384 taps"):
        Program(graph((1, 1, 1, 1), (node,), (1,), weights=weights).to_bytes())


def test_a_hint_that_the_layer_would_not_offer_is_not_taken() -> None:
    weights = {"w": Weight(np.zeros((4096, 4096), np.float32))}
    node = Node("linear", "l", (0,), {}, weight="w")
    program = _native.Program(graph(("n", 4096), (node,), (1,), weights=weights).to_bytes())
    program.set_choices([(8, 4096)], [{"form": "direct", "kind": "dense", "vectors": 1}])
    plan = program.plan([(8, 4096)])
    assert plan.choices[0] is not None and plan.choices[0]["kind"] == "single"
    assert plan.weight_bytes < 1 << 20


def test_a_pooling_stride_beyond_the_image_costs_nothing() -> None:
    attrs: dict[str, Any] = {"dims": 2, "kernel": [1, 1], "stride": [1, 1 << 20], "padding": [0] * 4}
    attrs.update(dilation=[1, 1], ceil_mode=False)
    program = _native.Program(graph((1, 64, 1, 1), (Node("max_pool", "p", (0,), attrs),), (1,)).to_bytes())
    assert program.plan([(1, 64, 1, 1)]).arena_bytes < 1 << 16


def test_sizes_whose_product_overflows_do_not_divide() -> None:
    # 2^30 * 8 * 2^30 * 2 is 0 modulo 2^64, and what is left of the elements was divided by it: SIGFPE
    expand = Node("expand", "e", (0,), {"shape": [1 << 20, 1 << 19]})
    reshape = Node("reshape", "r", (1,), {"shape": [1 << 30, 8, 1 << 30, 2, -1]})
    program = Program(graph((1, 1), (expand, reshape), (2,)).to_bytes())
    with pytest.raises(ValueError, match="does not fit the shape"):
        program(np.zeros((1, 1), np.float32))


def test_many_names_and_many_tunings_take_linear_time() -> None:
    # each name was once looked for in all inputs, each tuning compared with all: hours for a header of 16 MiB
    count = 20000
    inputs = tuple(Input(f"x{i}", (f"n{i}",)) for i in range(count))
    nodes = tuple(Node("reshape", "", (0,), {"shape": [f"n{count - 1}"]}) for i in range(count))
    tuned = [(str(i), [[1]], [None] * 0, 0) for i in range(count)]
    assert len(Program(Graph(inputs, nodes, (count,), {"kind": "tensor"}, {}, {}).to_bytes()).inputs) == count
    plain = Graph((Input("x", ("n",)),), (), (0,), {"kind": "tensor"}, {}, {}).to_bytes()
    assert len(_native.Program(with_tuned(plain, tuned)).tuned) == count


def test_arrays_that_were_pickled_are_float32_too() -> None:
    program = Program(graph(("n", 3), (Node("act", "a", (0,), {"act": "relu"}),), (1,)).to_bytes())
    x = pickle.loads(pickle.dumps(np.array([[-1, 0, 2]], np.float32)))
    np.testing.assert_array_equal(program(x), [[0, 0, 2]])


def test_a_hint_of_unknown_names_is_an_error() -> None:
    data = Program(graph(("n", 3), (Node("act", "a", (0,), {"act": "relu"}),), (1,)).to_bytes()).data
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    document = json.loads(header["__metadata__"]["sparseprune"])
    document["tuned"] = [{"isa": "avx512", "shapes": [[1, 3]], "choices": [["direct", "unheard of", 1]]}]
    header["__metadata__"]["sparseprune"] = json.dumps(document)
    text = json.dumps(header).encode()
    with pytest.raises(FormatError, match="a choice is"):
        Program(_native.seal(len(text).to_bytes(8, "little") + text + data[end:]))


def test_tuning_can_be_interrupted() -> None:
    weights = {"w": Weight(np.ones((32, 32, 3, 3), np.float32))}
    nodes = tuple(Node("conv", f"c{i}", (i,), {**CONV, "padding": [1, 1, 1, 1]}, weight="w") for i in range(40))
    program = _native.Program(graph(("n", 32, "h", "w"), nodes, (40,), weights=weights).to_bytes())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        threading.Timer(0.2, lambda: signal.raise_signal(signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            program.tune([(1, 32, 112, 112)], 60.0)
    finally:
        signal.signal(signal.SIGINT, before)
