"""Every operator but convolution (tests/native fuzzes that), on every instruction set, against float64."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from sparseprune import _native
from sparseprune.graph.capture import capture
from sparseprune.graph.reference import run_reference

SIZES = [1, 2, 4, 7, 8, 9, 14, 16, 17, 31, 33]


def check(model: nn.Module, x: torch.Tensor, isa: str) -> None:
    """The program's outputs are within the bound of float64, and the same bits over thread counts."""
    graph = capture(model.eval(), (x,)).graph
    program = _native.Program(graph.to_bytes())
    expected, bounds = run_reference(graph, [x], bounds=True)
    # folding a batch-norm rounds the weights once
    torch.testing.assert_close(expected[0], copy.deepcopy(model).double()(x.double()), rtol=1e-5, atol=1e-5)
    results = []
    for threads in (1, 3):
        plan = program.plan([tuple(x.shape)], threads, isa)
        y = np.full(plan.output_shapes[0], np.nan, np.float32)
        plan.run([x.numpy()], [y])
        results.append(y)
    error = (torch.from_numpy(results[0]).double() - expected[0]).abs()
    assert bool((error <= bounds[0]).all()), f"largest error {float(error.max())}"
    np.testing.assert_array_equal(results[0], results[1])


def pool(rng: random.Random) -> nn.Module:
    kernel = rng.randint(1, 4), rng.randint(1, 4)
    stride = rng.randint(1, 3), rng.randint(1, 3)
    padding = rng.randint(0, kernel[0] // 2), rng.randint(0, kernel[1] // 2)
    ceil = rng.random() < 0.5
    if rng.random() < 0.5:
        dilation = rng.randint(1, 2), rng.randint(1, 2)
        return nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil)
    divisor = rng.choice([None, None, 3])
    return nn.AvgPool2d(kernel, stride, padding, ceil, rng.random() < 0.5, divisor)


def adaptive(rng: random.Random) -> nn.Module:
    size = (rng.choice([1, 2, 5, None]), rng.choice([1, 3, 6, None]))
    return (nn.AdaptiveAvgPool2d if rng.random() < 0.5 else nn.AdaptiveMaxPool2d)(size)


class Mixed(nn.Module):
    """relu6(x) + pooled branch, so that adds see values of several layouts; then flattened, or not."""

    def __init__(self, rng: random.Random, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=rng.random() < 0.5)
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.flat = rng.random() < 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = nn.functional.relu6(x) + self.pool(x)
        y = nn.functional.relu(self.conv(a) + x) + a
        return torch.flatten(y, 1) if self.flat else y


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("kind", ["pool", "adaptive", "mixed"])
def test_random(isa: str, kind: str) -> None:
    for seed in range(16):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        shape = (rng.choice([1, 2, 9]), rng.randint(1, 5), rng.choice(SIZES[3:]), rng.choice(SIZES[3:]))
        model = {"pool": pool, "adaptive": adaptive}[kind](rng) if kind != "mixed" else Mixed(rng, shape[1])
        check(model, torch.randn(shape), isa)


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("batch", [1, 3, 8, 17])
def test_heads(isa: str, batch: int) -> None:
    """Global pooling, flatten and linear layers, where one-pixel values are packed or planes, by batch."""
    torch.manual_seed(batch)
    for shape in [(5, 4, 4), (6, 1, 1), (3, 9, 17)]:
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape[0], 7), nn.ReLU(), nn.Linear(7, 4))
        check(head, torch.randn(batch, *shape), isa)
        features = shape[0] * shape[1] * shape[2]
        tail = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(features, 20), nn.ReLU6())
        check(tail, torch.randn(batch, *shape), isa)


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_one_dimensional(isa: str) -> None:
    torch.manual_seed(0)
    for length in (5, 16, 50):
        first = [nn.Conv1d(3, 6, 5, padding=2), nn.BatchNorm1d(6), nn.ReLU(), nn.AvgPool1d(3, 2, 1)]
        model = nn.Sequential(*first, nn.Conv1d(6, 4, 3, stride=2, padding=1))
        check(model, torch.randn(2, 3, length), isa)


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_nan_and_infinity(isa: str) -> None:
    """They propagate through kept weights, activations and pooling as in torch."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU6()).eval()
    x = torch.randn(1, 2, 20, 20)
    x[0, 0, 3, 3] = torch.nan
    x[0, 1, 10, 17] = torch.inf
    program = _native.Program(capture(model, (x,)).graph.to_bytes())
    plan = program.plan([tuple(x.shape)], 2, isa)
    y = np.empty(plan.output_shapes[0], np.float32)
    plan.run([x.numpy()], [y])
    with torch.no_grad():
        expected = model(x).numpy()
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
