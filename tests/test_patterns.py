"""Patterns: what a unit is, that units go whole and in the right number, and that `convert` takes what is left."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparseprune
from sparseprune import pruning
from sparseprune.pruning import Block, NofM, Pattern, Slice, finalize, prune, summary
from sparseprune.pruning.patterns import mean_over_units, resolve_pattern
from sparseprune.pruning.ranking import choose

get_mask: Any = pruning.get_mask

pytestmark = pytest.mark.filterwarnings("ignore:pruned to nothing")

@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny layers: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 16, 3, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def whole(mask: Tensor, dim: int) -> bool:
    """Whether every slice of `mask` along `dim` is all True or all False."""
    slices = mask.transpose(0, dim).flatten(1)
    return bool((slices.all(1) | ~slices.any(1)).all())


def sparsities(model: nn.Module) -> dict[str, float]:
    return {layer.name: layer.sparsity for layer in summary(model).layers}


# --- what a unit is --------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)
patterns = st.one_of(
    st.builds(Block, st.integers(1, 5), st.integers(1, 5)),
    st.builds(lambda n, more: NofM(n, n + more), st.integers(1, 4), st.integers(1, 4)),
    st.builds(Slice, st.integers(0, 3)),
)


@settings(max_examples=150, deadline=None)
@given(patterns, shapes, st.integers(0, 2**16))
def test_reduce_and_expand_agree(pattern: Pattern, shape: tuple[int, ...], seed: int) -> None:
    if isinstance(pattern, Slice) and pattern.dim >= len(shape):
        return
    pattern = pattern.bind("w", nn.Linear(1, 1), shape)
    values = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(seed)).float()
    units = pattern.reduce(values)
    index = pattern.expand(torch.arange(len(units)), shape)
    assert index.shape == shape
    assert torch.equal(torch.zeros_like(units).index_add_(0, index.flatten(), values.flatten()), units)
    mean = mean_over_units(values, torch.ones(shape, dtype=torch.bool), pattern)
    assert all(torch.isclose(mean[i], values[index == i].mean(), atol=1e-5) for i in range(len(units)))


@settings(max_examples=150, deadline=None)
@given(patterns, st.lists(shapes, min_size=1, max_size=3), st.integers(0, 999), st.integers(0, 300), st.floats(0, 0.5))
def test_chosen_units_are_whole_lowest_and_as_many_as_asked_for(
    pattern: Pattern, sizes: list[tuple[int, ...]], seed: int, count: int, floor: float
) -> None:
    sizes = [shape for shape in sizes if not isinstance(pattern, Slice) or pattern.dim < len(shape)]
    if not sizes or isinstance(pattern, NofM):
        return
    bound = [pattern.bind("w", nn.Linear(1, 1), shape) for shape in sizes]
    generator = torch.Generator().manual_seed(seed)
    held = [torch.rand(shape, generator=generator) > 0.2 for shape in sizes]
    live = [p.reduce(mask.float()) for p, mask in zip(bound, held, strict=True)]
    scores = [torch.rand(len(units), generator=generator) for units in live]
    try:
        masks = choose(held, scores, bound, count, floor, "here")
    except ValueError as exc:
        assert "min_density" in str(exc) and count > 0
        return
    left = [p.reduce(mask.float()) for p, mask in zip(bound, masks, strict=True)]
    for mask, before, now, was in zip(masks, held, left, live, strict=True):
        assert not bool((mask & ~before).any()) and bool(((now == 0) | (now == was)).all())
        assert mask.sum() >= min(int(before.sum()), floor * mask.numel() - 1e-3)
    gone = [(now == 0) & (was > 0) for now, was in zip(left, live, strict=True)]
    pruned, unit = sum(int(b.sum() - a.sum()) for a, b in zip(left, live, strict=True)), max(int(u.max()) for u in live)
    assert abs(pruned - count) < max(unit, 1)
    if floor == 0 and any(bool(g.any()) for g in gone):
        worst = max(float(s[g].max()) for s, g in zip(scores, gone, strict=True) if bool(g.any()))
        stay = [s[(was > 0) & ~g] for s, was, g in zip(scores, live, gone, strict=True)]
        assert all(not len(s) or float(s.min()) >= worst for s in stay)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), shapes, st.integers(0, 2**16), st.floats(0, 0.9))
def test_n_of_m_keeps_the_n_best_of_every_m(n: int, more: int, shape: tuple[int, ...], seed: int, gone: float) -> None:
    pattern, m, generator = NofM(n, n + more), n + more, torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, shape, generator=generator).float()
    live = torch.rand(shape, generator=generator) >= gone
    keep = pattern.keep(scores.flatten(), live.flatten(), shape).reshape(shape[0], -1)
    assert not bool((keep & ~live.flatten(1)).any())
    for row, score, alive in zip(keep, scores.flatten(1), live.flatten(1), strict=True):
        for start in range(0, len(row), m):
            group = slice(start, start + m)
            assert int(row[group].sum()) == min(n, int(alive[group].sum()))
            lost = score[group][alive[group] & ~row[group]]
            assert not len(lost) or lost.max() <= score[group][row[group]].min()


def test_ties_in_n_of_m_break_in_order() -> None:
    layer = nn.Linear(6, 1)
    nn.init.ones_(layer.weight)
    assert get_mask(prune(layer, 0.5, pattern="2:4")).flatten().tolist() == [False, False, True, True, True, True]


@pytest.mark.parametrize("text, expected", [
    ("1x1", "Block(1, 1)"), ("16x4", "Block(16, 4)"), ("2:4", "NofM(2, 4)"), ("filter", "Slice(0)"),
    ("channel", "Slice(1)"), ("kernel_row", "Slice(2)"), ("kernel_col", "Slice(3)"),
])  # fmt: skip
def test_names(text: str, expected: str) -> None:
    assert repr(resolve_pattern(text)) == expected


@pytest.mark.parametrize("bad", ["4", "0x1", "2:2", "0:4", "2:", "filters", "", None, 3])
def test_what_is_no_pattern(bad: Any) -> None:
    with pytest.raises(ValueError, match="pattern"):
        prune(network(), 0.5, pattern=bad)
    with pytest.raises(ValueError, match="dim must be at least 0"):
        Slice(-1)


# --- pruning by them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern, dim", [("filter", 0), ("channel", 1), ("kernel_row", 2), ("kernel_col", 3)])
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_slices_are_pruned_whole(pattern: str, dim: int, scope: str, criterion: str) -> None:
    include = nn.Conv2d if dim > 1 else (nn.Conv2d, nn.Linear)
    model = prune(network(), 0.4, pattern=pattern, scope=scope, criterion=criterion, seed=0, include=include)
    layers = [m for m in model if isinstance(m, (nn.Conv2d, nn.Linear)) and get_mask(m) is not None]
    # Dimension 1 of a grouped weight holds one channel of each group: those go by themselves.
    assert layers and all(whole(get_mask(m), dim) for m in layers if dim != 1 or getattr(m, "groups", 1) == 1)
    state = copy.deepcopy(model.state_dict())
    prune(model, 0.4, pattern=pattern, scope=scope, criterion=criterion, seed=0, include=include)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_filters_with_the_smallest_norm_go() -> None:
    for p in (1, 2):
        model = network()
        norms = model[0].weight.detach().flatten(1).norm(p=p, dim=1)
        prune(model, 0.5, pattern="filter", criterion=pruning.Magnitude(p), scope="local")
        gone = ~get_mask(model[0]).flatten(1).any(1)
        assert sorted(gone.nonzero().flatten().tolist()) == sorted(norms.argsort()[:4].tolist())
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[3.0, 0.1], [2, 2]])  # L1 3.1 and 4, squares 9.01 and 8
    for p, expected in ((1, [False, True]), (2, [True, False])):
        mask = get_mask(prune(copy.deepcopy(layer), 0.5, pattern="filter", criterion=pruning.Magnitude(p)))
        assert mask[:, 0].tolist() == expected


def test_slices_of_different_sizes_compare_by_their_mean() -> None:
    model = nn.Sequential(nn.Linear(100, 4, bias=False), nn.Linear(4, 4, bias=False))
    nn.init.constant_(model[0].weight, 0.1)  # type: ignore[arg-type]  # sums of 10 ...
    nn.init.constant_(model[1].weight, 0.5)  # type: ignore[arg-type]  # ... and of 2
    with pytest.warns(UserWarning, match=r"pruned to nothing: 0\.weight"):
        prune(model, 400, pattern="filter")
    assert sparsities(model) == {"0": 1.0, "1": 0.0}


def test_random_filters_are_whole_filters_of_any_layer() -> None:
    """Not random weights, nor always those of the layers whose units are small."""
    gone = torch.zeros(2)
    for seed in range(40):
        model = nn.Sequential(nn.Conv2d(1, 32, 1, bias=False), nn.Conv2d(32, 32, 3, bias=False))
        prune(model, 0.5, pattern="filter", criterion="random", seed=seed)
        masks = [get_mask(layer) for layer in model]
        assert all(whole(mask, 0) for mask in masks)
        gone += torch.tensor([float((~mask.flatten(1).any(1)).sum()) for mask in masks])
    assert bool(((gone / (40 * 32) - 0.5).abs() < 0.06).all())


def test_channels_of_grouped_convolutions_are_single_input_channels() -> None:
    conv = nn.Conv2d(8, 16, 3, groups=2)  # weight (16, 4, 3, 3): dimension 1 has a channel of both groups
    mask = get_mask(prune(conv, 0.25, pattern="channel"))
    by_group = mask.reshape(2, 8, 4, 9)
    assert int((~by_group.any(3).any(1)).sum()) == 2 and bool((by_group.all(3).all(1) | ~by_group.any(3).any(1)).all())
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    assert whole(get_mask(prune(depthwise, 0.5, pattern="channel")), 0)
    x = torch.randn(2, 8, 5, 5)
    gone = ~by_group.any(3).any(1).flatten()
    noise = x.clone()
    noise[:, gone] = torch.randn(2, int(gone.sum()), 5, 5)
    assert torch.equal(conv(x), conv(noise))


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_have_their_filters_elsewhere(groups: int) -> None:
    conv = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)
    prune(conv, 0.5, pattern="filter", include=nn.ConvTranspose2d)
    y = conv(torch.randn(1, 4, 5, 5))
    assert int((y == 0).all(dim=(0, 2, 3)).sum()) == 3
    conv = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)
    prune(conv, 0.5, pattern="channel", include=nn.ConvTranspose2d)
    assert whole(get_mask(conv), 0) and get_mask(conv).float().mean() == 0.5


@pytest.mark.parametrize("order", [("weight", "bias"), ("bias", "weight")])
def test_biases_go_with_their_filters(order: tuple[str, str]) -> None:
    model = prune(network(), 0.5, pattern="filter", parameters=order)
    for layer in (model[0], model[3], model[4], model[7]):
        mask, bias = get_mask(layer), get_mask(layer, "bias")
        filters = torch.ones(len(layer.bias), dtype=torch.bool) if mask is None else mask.flatten(1).any(1)
        assert torch.equal(filters, torch.ones_like(filters) if bias is None else bias)
    alone = prune(network(), 0.5, pattern="filter")
    assert sparsities(alone).items() <= sparsities(model).items()  # biases are not counted
    layer = prune(nn.Linear(3, 4), 0.5, pattern="filter")  # and one that was left behind can follow later
    prune(layer, 0.5, pattern="filter", parameters=("weight", "bias"))
    assert torch.equal(get_mask(layer, "bias"), get_mask(layer)[:, 0])
    x = torch.randn(2, 3)
    assert torch.equal(layer(x)[:, ~get_mask(layer, "bias")], torch.zeros(2, 2))


def test_zero_initialised_biases_are_not_taken_for_pruned_ones() -> None:
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.bias)
    prune(layer, 0.5, pattern="filter", parameters=("weight", "bias"))
    assert int(get_mask(layer, "bias").sum()) == 2


def test_norms_follow_their_own_scale() -> None:
    model = prune(network(), 0.5, pattern="filter", include=("1",), parameters=("weight", "bias"))
    assert torch.equal(get_mask(model[1]), get_mask(model[1], "bias")) and int(get_mask(model[1]).sum()) == 4


def test_patterns_that_a_parameter_cannot_have() -> None:
    with pytest.raises(ValueError, match=r"'kernel_row' needs parameters of at least 3 dim.*7\.weight of a Linear"):
        prune(network(), 0.5, pattern="kernel_row")
    with pytest.raises(ValueError, match=r"'channel' needs .*0\.bias of a Conv2d has shape \(8,\)"):
        prune(network(), 0.5, pattern="channel", parameters=("weight", "bias"))


def test_tied_layers_lose_the_same_filters() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    prune(model, 0.5, pattern="filter", parameters=("weight", "bias"))
    masks = [get_mask(layer) for layer in model]
    assert torch.equal(*masks) and int(masks[0].any(1).sum()) == 3
    assert all(torch.equal(get_mask(layer, "bias"), masks[0].any(1)) for layer in model)


# --- N:M -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, amount", [("2:4", 0.5), ("1:4", 0.75), ("4:8", 0.5), ("1:3", 2 / 3)])
def test_n_of_m_fixes_the_sparsity(text: str, amount: float) -> None:
    n, m = map(int, text.split(":"))
    model = prune(network(), amount, pattern=text)
    for layer in (model[0], model[3], model[4], model[7]):
        rows = get_mask(layer).flatten(1)
        whole_groups = rows[:, : rows.shape[1] // m * m].reshape(-1, m)
        assert bool((whole_groups.sum(1) == n).all())
    state = copy.deepcopy(model.state_dict())
    prune(model, amount, pattern=text, criterion="random")
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    for wrong in (0.0, amount + 0.01, 40):
        with pytest.raises(ValueError, match=f'pattern "{text}" fixes the sparsity: amount must be'):
            prune(network(), wrong, pattern=text)
    with pytest.raises(ValueError, match=r"amounts\['0'\] must be"):
        prune(network(), amount, pattern=text, amounts={"0": 0.1})
    with pytest.raises(ValueError, match='scope must be "global" or "local"'):
        prune(network(), amount, pattern=text, scope="erk")
    with pytest.raises(ValueError, match="below min_density=0.9"):
        prune(network(), amount, pattern=text, min_density=0.9)


def test_n_of_m_counts_what_is_pruned_already() -> None:
    model = prune(network(), 0.3)
    before = get_mask(model[0])
    prune(model, 0.5, pattern="2:4")
    after = get_mask(model[0])
    assert not bool((after & ~before).any())
    assert torch.equal(after.reshape(-1, 4).sum(1), before.reshape(-1, 4).sum(1).clamp(max=2))
    prune(model, 0.5, pattern="2:4")  # above one half by now, which is no contradiction
    assert torch.equal(get_mask(model[0]), after)


# --- and then --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["1x1", "4x1", "2x3", "2:4", "filter", "channel", "kernel_row", "kernel_col"])
def test_convert_takes_every_pattern(pattern: str) -> None:
    include = nn.Conv2d if pattern.startswith("kernel") else (nn.Conv2d, nn.Linear)
    parameters = ("weight", "bias") if pattern == "filter" else ("weight",)
    model = prune(network(), 0.5, pattern=pattern, include=include, parameters=parameters).eval()
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        expected = model(x)
        converted = sparseprune.convert(model, x, tune="fixed")(x)
        assert torch.allclose(converted, expected, atol=1e-5)
        assert torch.allclose(finalize(model)(x), expected, atol=1e-6) and math.isfinite(float(expected.sum()))
