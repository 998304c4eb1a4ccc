"""Random programs: operators of every kind reading each other, against float64 and over thread counts.

What single operators cannot show: layouts that meet (planes, contiguous, packed), values that lie in a concatenation's
buffer, views, and buffers that are used again.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from sparseprune import _native
from sparseprune.graph.ir import Graph, Input, Node, Weight
from sparseprune.graph.reference import run_reference

ACTS: list[dict[str, Any]] = [
    *({"act": act} for act in ("none", "relu", "relu6", "hardsigmoid", "hardswish", "sigmoid", "silu", "tanh", "gelu")),
    {"act": "leaky_relu", "alpha": 0.1},
    {"act": "leaky_relu", "alpha": -1.5},
    {"act": "clamp", "alpha": 0.25, "beta": 0.5},
    {"act": "elu", "alpha": 0.7},
]
Shape = tuple[int, ...]


class Builder:
    """Grows a graph whose values have about unit size."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.nodes: list[Node] = []
        self.weights: dict[str, Weight] = {}
        self.biases: dict[str, Any] = {}
        rng = self.rng
        height, width = rng.choice([1, 3, 7, 8, 9, 16, 20]), rng.choice([1, 4, 8, 9, 15, 16, 17, 33])
        self.shapes: list[Shape] = [(rng.choice([1, 1, 2, 3, 9]), rng.randint(1, 6), height, width)]
        self.inputs = 1

    def array(self, *shape: int) -> Any:
        return self.numbers.uniform(-1, 1, shape).astype(np.float32)

    def add(self, op: str, inputs: list[int], shape: Shape, attrs: dict[str, Any], **more: str) -> int:
        self.nodes.append(Node(op, f"{op}{len(self.nodes)}", tuple(inputs), attrs, **more))  # type: ignore[arg-type]
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def store(self, *shape: int) -> str:
        name = f"b{len(self.biases)}"
        self.biases[name] = self.array(*shape)
        return name

    def pick(self, *ranks: int) -> int:
        fitting = [i for i, shape in enumerate(self.shapes) if not ranks or len(shape) in ranks]
        return self.rng.choice(fitting[-6:] if self.rng.random() < 0.7 else fitting)

    def grow(self, steps: int) -> Graph:
        kinds = self.kinds()
        while len(self.nodes) < steps:
            kind = self.rng.choice(kinds)
            kind()
            if np.prod(self.shapes[-1]) > 60_000:  # keep it small
                self.nodes.pop()
                self.shapes.pop()
        first = self.inputs
        values = list(range(first, first + len(self.nodes)))
        outputs = values if self.rng.random() < 0.3 else self.rng.sample(values, min(3, len(values))) + [values[-1]]
        tree = {"kind": "list", "items": [{"kind": "tensor"}] * len(outputs)}
        return Graph((Input("x", self.shapes[0]),), tuple(self.nodes), tuple(outputs), tree, self.weights, self.biases)

    def kinds(self) -> list[Any]:
        return [getattr(self, name) for name in dir(self) if name.startswith("op_")]

    # ---- each adds an operator that fits

    def op_conv(self) -> None:
        x = self.pick(4)
        n, c, h, w = self.shapes[x]
        groups = self.rng.choice([1, 1, c])
        out = groups * self.rng.randint(1, 5)
        kernel = (min(self.rng.choice([1, 3, 3, 5]), h + 2), min(self.rng.choice([1, 3, 3]), w + 2))
        padding = [self.rng.randint(0, 2) for _ in range(4)]
        stride = [self.rng.choice([1, 1, 2]), self.rng.choice([1, 1, 2])]
        padded = (h + padding[0] + padding[1], w + padding[2] + padding[3])
        sizes = [(padded[i] - kernel[i]) // stride[i] + 1 for i in range(2)]
        if min(sizes) < 1:
            return
        weight = self.array(out, c // groups, *kernel)
        weight[self.numbers.random(weight.shape) < self.rng.choice([0.0, 0.5, 0.9])] = 0
        name = f"w{len(self.weights)}"
        self.weights[name] = Weight(weight / np.float32(np.sqrt(weight[0].size)))
        shape = (n, out, *sizes)
        residuals = [i for i, s in enumerate(self.shapes) if s == shape]
        attrs = {"dims": 2, "stride": stride, "padding": padding, "dilation": [1, 1], "groups": groups}
        inputs = [x, self.rng.choice(residuals)] if residuals and self.rng.random() < 0.5 else [x]
        self.add("conv", inputs, shape, attrs | self.rng.choice(ACTS), weight=name, bias=self.store(out))

    op_conv_again = op_conv

    def op_linear(self) -> None:
        x = self.pick()
        if len(self.shapes[x]) != 2:
            shape = self.shapes[x]
            x = self.add("flatten", [x], (shape[0], int(np.prod(shape[1:]))), {}) if len(shape) > 2 else -1
        if x < 0:
            return
        n, features = self.shapes[x]
        weight = self.array(self.rng.randint(1, 40), features) / np.float32(np.sqrt(features))
        weight[self.numbers.random(weight.shape) < 0.6] = 0
        name = f"w{len(self.weights)}"
        self.weights[name] = Weight(weight)
        self.add("linear", [x], (n, weight.shape[0]), dict(self.rng.choice(ACTS)), weight=name)

    def op_pool(self) -> None:
        x = self.pick(4)
        n, c, h, w = self.shapes[x]
        if h < 2 or w < 2:
            return
        attrs = {"dims": 2, "kernel": [2, 2], "stride": [2, 1], "padding": [0] * 4, "dilation": [1, 1]}
        attrs["ceil_mode"] = False
        self.add("max_pool", [x], (n, c, (h - 2) // 2 + 1, w - 1), attrs)

    def op_global_pool(self) -> None:
        x = self.pick(4)
        self.add("adaptive_avg_pool", [x], (*self.shapes[x][:2], 1, 1), {"dims": 2, "output_size": [1, 1]})

    def op_binary(self) -> None:
        a = self.pick()
        b = self.pick(*range(1, len(self.shapes[a]) + 1))
        if self.rng.random() < 0.5:
            wide = tuple(size if self.rng.random() < 0.5 else 1 for size in self.shapes[a])
            b = self.add("constant", [], wide, {"shape": list(wide)}, bias=self.store(int(np.prod(wide))))
        try:
            shape = np.broadcast_shapes(self.shapes[a], self.shapes[b])
        except ValueError:
            return
        op = self.rng.choice(["add", "add", "sub", "mul", "mul", "maximum", "minimum"])
        self.add(op, self.rng.sample([a, b], 2), shape, dict(self.rng.choice(ACTS)))

    op_binary_again = op_binary

    def op_act(self) -> None:
        x = self.pick()
        self.add("act", [x], self.shapes[x], dict(self.rng.choice(ACTS[1:])))

    def op_prelu(self) -> None:
        x = self.pick(2, 3, 4)
        self.add("prelu", [x], self.shapes[x], {}, scale=self.store(self.shapes[x][1]))

    def op_reshape(self) -> None:
        x = self.pick()
        shape = self.shapes[x]
        flat = int(np.prod(shape[1:]))
        by = self.rng.choice([d for d in range(1, flat + 1) if flat % d == 0])
        rest = flat // by
        new: Shape = self.rng.choice(
            [(shape[0], by, rest), (shape[0] * flat,), (shape[0], by, 1, rest), (1, shape[0], by, 1, rest)]
        )
        self.add("reshape", [x], new, {"shape": [-1 if i == len(new) - 1 else size for i, size in enumerate(new)]})

    def op_permute(self) -> None:
        x = self.pick()
        axes = self.rng.sample(range(len(self.shapes[x])), len(self.shapes[x]))
        self.add("permute", [x], tuple(self.shapes[x][axis] for axis in axes), {"axes": axes})

    def op_slice(self) -> None:
        x = self.pick()
        shape = list(self.shapes[x])
        axis = self.rng.choice([1 % len(shape), self.rng.randrange(len(shape))])
        start, step = self.rng.randrange(shape[axis]), self.rng.choice([1, 1, 2])
        end = self.rng.randint(start + 1, shape[axis])
        attrs = {"axis": axis, "start": start - self.rng.choice([0, shape[axis]]), "end": end, "step": step}
        shape[axis] = len(range(start, end, step))
        self.add("slice", [x], tuple(shape), attrs)

    op_slice_again = op_slice

    def op_index(self) -> None:
        x = self.pick()
        shape = list(self.shapes[x])
        axis = self.rng.randrange(len(shape))
        if self.rng.random() < 0.5:
            self.add("roll", [x], tuple(shape), {"axis": axis, "shift": self.rng.randint(-20, 20)})
            return
        index = [self.rng.randrange(shape[axis]) for _ in range(self.rng.randint(1, 5))]
        shape[axis] = len(index)
        self.add("index_select", [x], tuple(shape), {"axis": axis, "index": index})

    def op_concat(self) -> None:
        x = self.pick()
        axis = self.rng.choice([1 % len(self.shapes[x]), self.rng.randrange(len(self.shapes[x]))])

        def rest(shape: Shape) -> Shape:
            return shape[:axis] + shape[axis + 1 :]

        like = self.shapes[x]
        same = [i for i, s in enumerate(self.shapes) if len(s) == len(like) and rest(s) == rest(like)]
        parts = [self.rng.choice(same) for _ in range(self.rng.randint(1, 4))]
        shape = list(self.shapes[x])
        shape[axis] = sum(self.shapes[i][axis] for i in parts)
        self.add("concat", parts, tuple(shape), {"axis": axis})

    op_concat_again = op_concat
    op_concat_and_again = op_concat

    def op_pad(self) -> None:
        x = self.pick()
        shape = list(self.shapes[x])
        mode = self.rng.choice(["constant", "constant", "reflect", "replicate", "circular"])
        padding = [0] * (2 * len(shape))
        for axis in range(max(0, len(shape) - 2), len(shape)):
            most = shape[axis] - 1 if mode != "constant" else 3
            padding[2 * axis : 2 * axis + 2] = [self.rng.randint(0, min(most, 3)) for _ in range(2)]
            shape[axis] += sum(padding[2 * axis : 2 * axis + 2])
        self.add("pad", [x], tuple(shape), {"padding": padding, "mode": mode, "value": 0.5})

    def op_resize(self) -> None:
        x = self.pick(4)
        n, c, h, w = self.shapes[x]
        mode, corners = self.rng.choice([("nearest", False), ("bilinear", False), ("bilinear", True)])
        size = [self.rng.randint(1, 2 * h + 1), self.rng.randint(1, 2 * w + 1)]
        self.add("resize", [x], (n, c, *size), {"mode": mode, "size": size, "scale": [0, 0], "align_corners": corners})

    def op_shuffle(self) -> None:
        x = self.pick(4)
        n, c, h, w = self.shapes[x]
        groups = self.rng.choice([g for g in range(1, c + 1) if c % g == 0])
        self.add("channel_shuffle", [x], (n, c, h, w), {"groups": groups})

    def op_pixel_shuffle(self) -> None:
        x = self.pick(4)
        n, c, h, w = self.shapes[x]
        for rh, rw in [(2, 2), (1, 2), (3, 1), (1, 3)]:
            if c % (rh * rw) == 0:
                crop = [self.rng.randrange(rh), self.rng.randrange(rw)]
                shape = (n, c // (rh * rw), h * rh - crop[0], w * rw - crop[1])
                self.add("pixel_shuffle", [x], shape, {"factor": [rh, rw], "crop": crop})
                return

    def op_reduce(self) -> None:
        x = self.pick()
        shape = self.shapes[x]
        axes = self.rng.sample(range(len(shape)), self.rng.randint(1, len(shape)))
        keep = len(axes) == len(shape) or self.rng.random() < 0.5  # values have a dimension at least
        new = tuple(1 if i in axes else size for i, size in enumerate(shape) if keep or i not in axes)
        kind = self.rng.choice(["mean", "max", "min"])
        self.add("reduce", [x], new, {"kind": kind, "axes": axes, "keepdim": keep})

    def op_softmax(self) -> None:
        x = self.pick()
        self.add("softmax", [x], self.shapes[x], {"axis": self.rng.randrange(len(self.shapes[x]))})

    def op_norm(self) -> None:
        x = self.pick(2, 3, 4)
        shape = self.shapes[x]
        if self.rng.random() < 0.5:
            last = self.rng.randint(1, len(shape))
            size = int(np.prod(shape[-last:]))
            attrs = {"axes": last, "eps": 0.1}
            self.add("layer_norm", [x], shape, attrs, scale=self.store(size), bias=self.store(size))
            return
        groups = self.rng.choice([g for g in range(1, shape[1] + 1) if shape[1] % g == 0])
        scale, bias = self.store(shape[1]), self.store(shape[1])
        self.add("group_norm", [x], shape, {"groups": groups, "eps": 0.1}, scale=scale, bias=bias)

    def op_matmul(self) -> None:
        a = self.pick(2, 3, 4)
        *batch, m, k = self.shapes[a]
        if self.rng.random() < 0.5:
            self.add("matmul", [a, a], (*batch, m, m), {"transpose_b": True})
            return
        b = self.add("constant", [], (k, 5), {"shape": [k, 5]}, bias=self.store(k * 5))
        self.add("matmul", [a, b], (*batch, m, 5), {"transpose_b": False})


class Planes(Builder):
    """Layers of vision networks, on planes wide enough to run depth first, one mostly reading the one before."""

    def __init__(self, seed: int, *, wide: bool = False) -> None:
        super().__init__(seed)
        height, width = self.rng.randint(5, 40), self.rng.randint(17, 50)
        if wide:  # rows of more vectors than a tile has
            height, width = self.rng.randint(3, 7), self.rng.randint(65, 300)
        images = self.rng.choice([1, 1, 1, 2, 3, 9, 17])
        if images > 3:  # whole images to each thread
            height, width = min(height, 12), min(width, 20)
        self.shapes[0] = (images, self.rng.randint(1, 5), height, width)

    def kinds(self) -> list[Any]:
        return [self.op_conv, self.op_conv, self.op_conv, self.op_pool, self.op_act, self.op_sum, self.op_parts]

    def pick(self, *ranks: int) -> int:
        fitting = [i for i, shape in enumerate(self.shapes) if not ranks or len(shape) in ranks]
        return fitting[-1] if self.rng.random() < 0.7 else self.rng.choice(fitting)

    def op_sum(self) -> None:
        x = self.pick(4)
        same = [i for i, shape in enumerate(self.shapes) if shape == self.shapes[x]]
        self.add("add", [x, self.rng.choice(same)], self.shapes[x], {"act": "relu"})

    def op_parts(self) -> None:
        """Slices and concatenations of channels, as in CSP blocks."""
        x = self.pick(4)
        n, c, h, w = self.shapes[x]
        same = [i for i, (*_, c2, h2, w2) in enumerate(self.shapes) if (h2, w2) == (h, w)]
        if c > 1 and self.rng.random() < 0.5:
            start = self.rng.randint(0, c - 1)
            end = self.rng.randint(start + 1, c)
            self.add("slice", [x], (n, end - start, h, w), {"axis": 1, "start": start, "end": end, "step": 1})
            return
        parts = self.rng.sample(same, min(len(same), self.rng.randint(1, 3)))
        self.add("concat", parts, (n, sum(self.shapes[i][1] for i in parts), h, w), {"axis": 1})


def check(graph: Graph, isa: str, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal(graph.inputs[0].shape).astype(np.float32)  # type: ignore[arg-type]
    expected, bounds = run_reference(graph, [x], bounds=True)
    program = _native.Program(graph.to_bytes())
    results = []
    for threads in (1, 3):
        plan = program.plan([x.shape], threads, isa)
        outputs = [np.full(shape, np.nan, np.float32) for shape in plan.output_shapes]
        for _ in range(2):  # the second run finds the first one's numbers in the arena
            plan.run([x], outputs)
        results.append(outputs)
    first = len(graph.inputs)
    for place, (y, y64, bound) in enumerate(zip(results[0], expected, bounds, strict=True)):
        node = graph.nodes[graph.outputs[place] - first]
        error = (torch.from_numpy(y).double() - y64).abs()
        assert y.shape == tuple(y64.shape), f"seed {seed}: {node}"
        assert bool((error <= bound + 1e-30).all()), f"seed {seed}: {node}, {float((error - bound).max())} beyond"
        np.testing.assert_array_equal(y, results[1][place], err_msg=f"seed {seed}: {node}")


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("block", range(4))
def test_random_graphs(isa: str, block: int) -> None:
    for seed in range(40 * block, 40 * block + 40):
        builder = Builder(seed)
        check(builder.grow(builder.rng.randint(2, 24)), isa, seed)


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_wide_rows(isa: str) -> None:
    for seed in range(40):
        builder = Planes(seed, wide=True)
        check(builder.grow(builder.rng.randint(2, 6)), isa, seed)


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_depth_first_gives_the_same_bits(isa: str) -> None:
    groups = 0
    for seed in range(150):
        builder = Planes(seed, wide=seed % 5 == 0)
        graph = builder.grow(builder.rng.randint(2, 14))
        x = builder.array(*builder.shapes[0])
        program = _native.Program(graph.to_bytes())
        expected: list[Any] | None = None
        for threads, bands in [(1, -1), (1, 1), (1, 3), (2, 2), (2, 7), (3, 40), (2, 0)]:
            plan = program.plan([x.shape], threads, isa, bands=bands)
            outputs = [np.full(shape, np.nan, np.float32) for shape in plan.output_shapes]
            for _ in range(2):
                plan.run([x], outputs)
            expected = expected or outputs
            groups += sum(end - begin > 1 for begin, end in plan.groups)
            assert bands != -1 or not plan.groups
            for place, (y, y1) in enumerate(zip(outputs, expected, strict=True)):
                message = f"seed {seed}, {threads} threads, {bands} bands: {graph.nodes[graph.outputs[place] - 1]}"
                np.testing.assert_array_equal(y, y1, err_msg=message)
    assert groups > 500
