"""Sparse layers as modules, against torch's."""

from __future__ import annotations

import copy
import doctest
import pickle
from typing import Any

import pytest
import torch
from old_torch import traced_weights
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparseprune
from sparseprune import BlockCSR, SparsepruneError, UnsupportedError
from sparseprune.nn import SparseConv2d, SparseLinear


def thinned(layer: Any, sparsity: float = 0.8) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < sparsity] = 0
    return layer.eval()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    "options",
    [{}, {"padding": "same"}, {"padding": "valid"}, {"stride": 2, "padding": (1, 0)}, {"groups": 2, "padding": 1},
     {"dilation": (2, 1), "padding": "same", "bias": False}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kernel", [1, 3, 4, (2, 3)], ids=str)
def test_conv2d(options: dict[str, Any], kernel: Any) -> None:
    dense = thinned(nn.Conv2d(4, 6, kernel, **options))
    sparse = SparseConv2d.from_conv2d(dense)
    for shape in ((2, 4, 11, 9), (1, 4, 9, 11), (4, 11, 9), (0, 4, 11, 9)):
        x = torch.randn(shape)
        y, expected = sparse(x), dense(x)
        assert y.shape == expected.shape and not y.requires_grad and torch.allclose(y, expected, atol=1e-5)
    assert torch.equal(sparse.weight, dense.weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (0, 5), (2, 3, 5), (2, 1, 3, 5)], ids=str)
def test_linear(bias: bool, shape: tuple[int, ...]) -> None:
    dense = thinned(nn.Linear(5, 7, bias=bias))
    sparse = SparseLinear.from_linear(dense)
    x = torch.randn(shape)
    assert sparse(x).shape == dense(x).shape and torch.allclose(sparse(x), dense(x), atol=1e-6)


def test_masks_and_parametrizations_apply() -> None:
    prune_randomly: Any = torch_prune.random_unstructured
    hooked: Any = nn.Linear(16, 16)
    prune_randomly(hooked, "weight", 0.75)
    with torch.no_grad():
        hooked.weight_orig.mul_(2)  # `hooked.weight` is stale from here on
    effective = hooked.weight_orig * hooked.weight_mask
    assert torch.equal(SparseLinear.from_linear(hooked).weight, effective)
    held: Any = nn.Sequential(nn.Conv2d(4, 4, 3))
    sparseprune.prune(held, 0.5)
    sparse = SparseConv2d.from_conv2d(held[0])
    assert torch.equal(sparse.weight, held[0].weight) and sparse.packed.density == pytest.approx(0.5, abs=0.01)


def test_weights_are_shared_when_given() -> None:
    dense = thinned(nn.Linear(8, 8))
    packed = BlockCSR.from_dense(dense.weight)
    first, second = (SparseLinear.from_linear(dense, packed) for _ in range(2))
    assert first.packed is second.packed is packed


def test_a_copy_does_not_follow_the_layer() -> None:
    dense = thinned(nn.Linear(8, 8))
    x = torch.randn(2, 8)
    sparse, expected = SparseLinear.from_linear(dense), dense(x)
    with torch.no_grad():
        dense.weight.zero_(), dense.bias.zero_()
    assert torch.allclose(sparse(x), expected, atol=1e-6)


def test_it_is_for_evaluation() -> None:
    sparse = SparseLinear.from_linear(thinned(nn.Linear(8, 8)))
    assert not sparse.training and list(sparse.parameters()) == [] and sparse.eval() is sparse
    with pytest.raises(SparsepruneError, match="cannot be trained"):
        sparse.train()
    with pytest.raises(SparsepruneError, match="cannot be trained"):
        nn.Sequential(sparse).train()


def test_copies_and_pickles() -> None:
    x = torch.randn(2, 4, 8, 8)
    sparse = SparseConv2d.from_conv2d(thinned(nn.Conv2d(4, 4, 3)))
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(twin(x), sparse(x))


def test_what_they_print() -> None:
    linear = SparseLinear.from_linear(thinned(nn.Linear(8, 4)))
    assert repr(linear).startswith("SparseLinear(in_features=8, out_features=4, bias=True, sparsity=")
    conv = SparseConv2d.from_conv2d(thinned(nn.Conv2d(4, 2, 3, stride=2, bias=False)))
    assert "4, 2, kernel_size=(3, 3), stride=(2, 2), padding=(0, 0)" in repr(conv) and "bias=False" in repr(conv)


def test_wrong_arguments() -> None:
    with pytest.raises(UnsupportedError, match="padding_mode='circular'"):
        SparseConv2d.from_conv2d(nn.Conv2d(3, 3, 3, padding_mode="circular"))
    with pytest.raises(TypeError, match="expected a torch.nn.Conv2d, got Linear"):
        SparseConv2d.from_conv2d(nn.Linear(3, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a torch.nn.Linear, got Conv2d"):
        SparseLinear.from_linear(nn.Conv2d(3, 3, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float32"):
        SparseLinear.from_linear(nn.Linear(3, 3).double())
    with pytest.raises(TypeError, match="expected a BlockCSR, got Tensor"):
        SparseLinear(torch.zeros(3, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected 4 dimensions"):
        SparseConv2d(BlockCSR.from_dense(torch.ones(3, 3)))
    packed = BlockCSR.from_dense(torch.ones(2, 2, 3, 3))
    with pytest.raises(ValueError, match="needs stride 1"):
        SparseConv2d(packed, padding="same", stride=2)
    with pytest.raises(ValueError, match="padding='full'"):
        SparseConv2d(packed, padding="full")
    for wrong, message in (
        ({"stride": (1, 2, 3)}, r"stride: expected an int or two of them, got \(1, 2, 3\)"),
        ({"padding": None}, "padding: expected an int or two of them, got None"),
        ({"groups": 3}, "groups=3 does not divide out_channels=2"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseConv2d(packed, **wrong)  # type: ignore[arg-type]
    conv = SparseConv2d(packed)
    with pytest.raises(TypeError, match="x: expected a torch.Tensor, got list"):
        conv([torch.zeros(2, 4, 4)])
    sparse = SparseLinear.from_linear(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="float32"):
        sparse(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"expected shape \(..., 3\)"):
        sparse(torch.zeros(2, 4))


@traced_weights
def test_in_compiled_and_exported_code() -> None:
    model = nn.Sequential(SparseConv2d.from_conv2d(thinned(nn.Conv2d(3, 4, 3))), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.compile(model, backend="aot_eager")(x), model(x))
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


def test_examples_of_the_docstrings() -> None:
    found = doctest.testmod(sparseprune.nn, extraglobs={"torch": torch, "sparseprune": sparseprune})
    assert found.attempted == 4 and found.failed == 0
