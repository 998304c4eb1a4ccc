"""Scopes: how an amount spreads over layers, and the floor against layer collapse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparseprune import pruning
from sparseprune.pruning import ErdosRenyi, prune, summary

get_mask: Any = pruning.get_mask


def network(scale: float = 1.0) -> Any:
    """Three layers; those of the second are `scale` times as large as usual."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 40), nn.Linear(40, 10))
    with torch.no_grad():
        model[1].weight.mul_(scale)  # type: ignore[operator]
    return model


def kept(model: nn.Module) -> list[int]:
    return [layer.kept for layer in summary(model).layers]


def test_erk_densities_follow_the_sum_of_the_dimensions() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 128, 3), nn.Conv2d(128, 128, 1))
    prune(model, 0.9, scope="erk", criterion="random", seed=0)
    ratios = [layer.kept / sum(layer.shape) for layer in summary(model).layers]
    assert max(ratios) / min(ratios) < 1.01
    assert sum(kept(model)) == round(0.1 * summary(model).total)


def test_erk_leaves_what_is_small_dense_and_the_total_exact() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 256, 3), nn.Linear(256, 99))
    for amount in (0.2, 0.5, 0.9, 0.97, 100):
        pruned = prune(copy.deepcopy(model), amount, scope="erk")
        counts = summary(pruned)
        gone = amount if isinstance(amount, int) else round(amount * counts.total)
        assert counts.total - counts.kept == gone
    by_name = {layer.name: layer.sparsity for layer in summary(prune(model, 0.5, scope="erk")).layers}
    assert by_name["0"] == by_name["1"] == 0 and by_name["2"] > 0.3 and by_name["3"] > 0.3


def test_erk_keeps_biases_dense() -> None:
    layer = prune(nn.Linear(50, 50), 0.5, scope="erk", parameters=("weight", "bias"))
    assert get_mask(layer, "bias") is None and int((~get_mask(layer)).sum()) == round(0.5 * 2550)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6),
       st.floats(0, 0.3))  # fmt: skip
def test_erk_counts_are_exact_within_bounds_and_never_shrink(shapes: list[tuple[int, ...]], floor: float) -> None:
    sizes = [torch.Size(shape).numel() for shape in shapes]
    before = [0] * len(shapes)
    for amount in range(0, sum(sizes), max(1, sum(sizes) // 20)):
        try:
            groups = ErdosRenyi().groups(shapes, amount, floor)
        except ValueError as exc:
            assert "keeps" in str(exc) and sum(sizes) - amount < sum(max(1, floor * size + 1) for size in sizes)
            break
        assert [members for members, _ in groups] == [[i] for i in range(len(shapes))]
        counts = [int(count) for _, count in groups]
        assert sum(counts) == amount
        for count, last, size in zip(counts, before, sizes, strict=True):
            assert last <= count <= min(size - 1, (1 - floor) * size + 1e-5)
        before = counts


def test_erk_grows_from_call_to_call() -> None:
    model = network()
    for amount in (0.3, 0.301, 0.5, 0.5, 0.73, 0.9):
        prune(model, amount, scope="erk")
        assert sum(kept(model)) == 2200 - round(amount * 2200)
    with pytest.raises(ValueError, match="already are"):
        prune(model, 0.5, scope="erk")


def test_a_layer_may_vanish_unless_there_is_a_floor() -> None:
    with pytest.warns(UserWarning, match=r"pruned to nothing: 1\.weight.*min_density"):
        assert kept(prune(network(1e-4), 0.6))[1] == 0


@pytest.mark.parametrize("floor", [0.01, 0.1, 0.25])
def test_the_floor_holds_and_the_total_is_exact(floor: float) -> None:
    model = prune(network(1e-4), 0.6, min_density=floor)
    assert kept(model)[1] == round(floor * 1200) and sum(kept(model)) == 880
    with torch.no_grad():  # what is kept there is the best of it
        full = network(1e-4)[1].weight
        mask = get_mask(model[1])
        assert full[mask].abs().min() >= full[~mask].abs().max()
    state = copy.deepcopy(model.state_dict())
    prune(model, 0.6, min_density=floor)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_floor_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"min_density=0\.5 leaves 1100 weights in 3 layers .* asks for 1320"):
        prune(network(), 0.6, min_density=0.5)
    with pytest.raises(ValueError, match=r"min_density=0\.5 leaves 300 weights in 0\.weight .* asks for 360"):
        prune(network(), 0.6, min_density=0.5, scope="local")
    with pytest.raises(ValueError, match=r"min_density=0\.5 .*0\.weight"):
        prune(network(), 0.1, min_density=0.5, amounts={"0": 0.9})
    with pytest.raises(ValueError, match=r"scope='erk' with min_density=0\.5 keeps 1100 at least"):
        prune(network(), 0.6, min_density=0.5, scope="erk")
    assert kept(prune(network(), 0.5, min_density=0.5)) == [300, 600, 200]
    for bad, error in ((1.5, ValueError), (-0.1, ValueError), (True, TypeError), ("1", TypeError)):
        with pytest.raises(error, match="min_density"):
            prune(network(), 0.5, min_density=bad)  # type: ignore[arg-type]


def test_the_floor_of_a_layer_that_is_below_it() -> None:
    model = prune(network(), 0.9, amounts={"0": 0.0, "2": 0.0})
    now = kept(model)
    prune(model, 0.7, min_density=0.2)
    assert kept(model)[1] == now[1] == 120 and sum(kept(model)) == 660


@pytest.mark.filterwarnings("ignore:pruned to nothing")
def test_a_layer_of_which_nothing_is_left() -> None:
    layer = prune(nn.Linear(2, 4), 0.95)  # round(7.6): all of it
    assert not bool(get_mask(layer).any())
    assert not bool(get_mask(prune(layer, 0.95, min_density=0.5)).any())


def test_the_floor_counts_whole_filters() -> None:
    model = prune(network(1e-4), 0.55, pattern="filter", min_density=0.06)
    filters = int(get_mask(model[1]).any(1).sum())
    assert filters == 3 and abs(sum(kept(model)) - 990) <= 20  # 3 of 40 are 7.5 %, 2 would be 5 %


def test_erk_with_a_floor() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(100, 100), nn.Linear(300, 300))
    prune(model, 0.9, scope="erk", min_density=0.09)
    densities = [layer.density for layer in summary(model).layers]
    assert densities[0] == 1 and densities[2] == pytest.approx(0.09, abs=1e-4)
    assert sum(kept(model)) == round(0.1 * 100016)


def test_an_unknown_scope() -> None:
    with pytest.raises(ValueError, match=r"scope must be one of \['erk', 'global', 'local'\]"):
        prune(network(), 0.5, scope="ERK")
