"""Pruning: exact counts, what is touched and what is not, and masks that nothing revives."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparseprune import pruning
from sparseprune.pruning import Block, Local, Mask, Scores, finalize, hold_zeros, prune, set_mask, summary
from sparseprune.pruning.ranking import prune_units

get_mask: Any = pruning.get_mask
l1_unstructured: Any = torch_prune.l1_unstructured
random_unstructured: Any = torch_prune.random_unstructured
averaging: Any = get_ema_multi_avg_fn

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
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 16, 3, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.body = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 12, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: Tensor = self.decoder(self.body(self.embedding(tokens)))
        return result


def pruned(model: nn.Module) -> int:
    counts = summary(model)
    return counts.total - counts.kept


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, n: int = 3) -> None:
    for _ in range(n):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()


def zeros_hold(model: nn.Module) -> bool:
    layers = [(m, get_mask(m)) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    masked = [(m.weight, mask) for m, mask in layers if mask is not None]
    return bool(masked) and all(bool((weight[~mask] == 0).all()) for weight, mask in masked)


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
@pytest.mark.parametrize("amount", [0.0, 0.5, 0.9, 0.987, 17])
def test_global_count_is_exact(amount: float, criterion: str) -> None:
    model = network()
    total = summary(model).total
    assert prune(model, amount, criterion=criterion, seed=1) is model
    assert pruned(model) == (amount if isinstance(amount, int) else round(amount * total))


def test_local_count_is_exact_in_every_layer() -> None:
    for amount in (0.3, 5):
        for layer in summary(prune(network(), amount, scope="local")).layers:
            assert layer.total - layer.kept == (amount if isinstance(amount, int) else round(amount * layer.total))


def test_magnitude_removes_the_smallest() -> None:
    model = network()
    before = torch.cat([m.weight.detach().flatten() for m in model if isinstance(m, (nn.Conv2d, nn.Linear))])
    prune(model, 0.6)
    after = torch.cat([m.weight.detach().flatten() for m in model if isinstance(m, (nn.Conv2d, nn.Linear))])
    assert before[after == 0].abs().max() <= before[after != 0].abs().min()
    assert torch.equal(after[after != 0], before[after != 0])


def test_ties_break_in_order() -> None:
    layer = nn.Linear(4, 2)
    nn.init.ones_(layer.weight)
    assert get_mask(prune(layer, 0.375)).flatten().tolist() == [False] * 3 + [True] * 5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=40), st.integers(0, 90))
def test_units_with_equal_and_unequal_sizes(units: list[tuple[int, int]], count: int) -> None:
    scores = torch.tensor([float(score) for score, _ in units])
    sizes = torch.tensor([size for _, size in units])
    keep = prune_units(scores, sizes, count)
    assert bool(keep[sizes == 0].all())
    gone, order = sizes[~keep].sum(), torch.argsort(scores, stable=True)
    live = [int(i) for i in order if sizes[i]]
    sums = torch.tensor([0] + [int(sizes[i]) for i in live]).cumsum(0)
    assert abs(gone - count) == (sums - count).abs().min()
    assert [bool(keep[i]) for i in live] == sorted(bool(keep[i]) for i in live)
    ones = prune_units(scores, torch.ones_like(sizes), min(count, len(units)))
    assert int((~ones).sum()) == min(count, len(units)) and set(order[: int((~ones).sum())].tolist()) == set(
        (~ones).nonzero().flatten().tolist()
    )


def test_repeated_amounts_do_not_compound() -> None:
    model, once = network(), prune(network(), 0.8)
    for amount in (0.5, 0.5, 0.8, 0.8):
        prune(model, amount)
        assert pruned(model) == round(amount * summary(model).total)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), once.state_dict().values(), strict=True))
    assert sum(isinstance(m, Mask) for m in model.modules()) == sum(isinstance(m, Mask) for m in once.modules())


def test_pruned_weights_stay_first_under_another_criterion() -> None:
    model = prune(network(), 0.5)
    before = {n: m.mask.clone() for n, m in model.named_modules() if isinstance(m, Mask)}
    prune(model, 0.7, criterion="random", seed=0)
    for name, mask in before.items():
        assert not (model.get_submodule(name).mask & ~mask).any()


def test_below_the_present_sparsity_raises_and_changes_nothing() -> None:
    model = prune(network(), 0.8)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"amount=0\.5 asks for .*sparsity 0\.7998"):
        prune(model, 0.5)
    with pytest.raises(ValueError, match="already are"):
        prune(finalize(copy.deepcopy(model)), 0.5)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_a_stray_zero_is_not_pruning() -> None:
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight[3, 3] = 0
    prune(layer, 0.0)
    assert get_mask(layer) is None
    assert pruned(prune(layer, 0.5)) == 2048 and not get_mask(layer)[3, 3]


@pytest.mark.parametrize("amount", [1.0, -0.1, 1.5, float("nan"), -1, 10**9])
def test_amount_outside_its_range(amount: float) -> None:
    with pytest.raises(ValueError, match="amount"):
        prune(network(), amount)


@pytest.mark.parametrize("amount", [True, "0.5", None])
def test_amount_of_the_wrong_type(amount: object) -> None:
    with pytest.raises(TypeError, match="amount must be"):
        prune(network(), amount)  # type: ignore[arg-type]


def test_batchnorm_and_biases_only_when_asked_for() -> None:
    for include in [(nn.Conv2d, nn.Linear), ("*",), ("0", "[1-9]")]:
        model = prune(network(), 0.9, include=include)
        assert not parametrize.is_parametrized(model[1]) and bool((model[1].weight == 1).all())
        assert not any(parametrize.is_parametrized(m, "bias") for m in model)
    norms: list[Any] = [("1",), nn.BatchNorm2d]
    for norm in norms:
        assert get_mask(prune(network(), 0.5, include=norm)[1]).sum() == 4
    layer = prune(nn.Linear(4, 4), 10, parameters=("weight", "bias"))
    masks = [get_mask(layer, name) for name in ("weight", "bias")]
    assert sum(int((~mask).sum()) for mask in masks if mask is not None) == 10


def test_include_exclude_amounts() -> None:
    model = prune(network(), 0.5, exclude=("7",), amounts={"[03]": 0.25, "0": 0.75})
    by_name = {layer.name: layer for layer in summary(model).layers}
    assert by_name["7"].sparsity == 0 and by_name["0"].sparsity == 0.75
    assert by_name["3"].total - by_name["3"].kept == round(0.25 * 72) and by_name["4"].sparsity == 0.5
    nested = nn.Sequential(network(), network(1))
    prune(nested, 0.5, exclude="0")
    assert all(m.name.startswith("1.") == (m.sparsity > 0) for m in summary(nested).layers if m.kept < m.total)
    assert not any(parametrize.is_parametrized(m) for m in nested[0].modules())
    with pytest.raises(ValueError, match="include='convv1' matches no"):
        prune(network(), 0.5, include=("convv1",))
    with pytest.raises(ValueError, match="exclude='fc' matches no"):
        prune(network(), 0.5, exclude=("fc",))
    with pytest.raises(ValueError, match=r"amounts\['fc'\] matches no"):
        prune(network(), 0.5, amounts={"fc": 0.5})
    with pytest.raises(ValueError, match=r"amounts\['0'\]"):
        prune(network(), 0.5, amounts={"0": 1.5})
    with pytest.raises(ValueError, match="no parameter to prune"):
        prune(nn.ReLU(), 0.5)
    with pytest.raises(TypeError, match="include must hold"):
        prune(network(), 0.5, include=(3,))  # type: ignore[arg-type]


def test_blocks_are_pruned_whole() -> None:
    model = prune(network(), 0.5, pattern="4x1", include=nn.Conv2d)
    for layer in (m for m in model if isinstance(m, nn.Conv2d)):
        blocks = get_mask(layer).flatten(1).reshape(-1, 4, layer.weight[0].numel())
        assert bool((blocks.all(1) | ~blocks.any(1)).all())
    again = prune(copy.deepcopy(model), 0.5, pattern="4x1", include=nn.Conv2d)
    assert pruned(again) == pruned(model)


def test_block_scores_and_ragged_edges() -> None:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data = torch.tensor([[3.0, 3, 1, 1], [-3, -3, 1, 9], [2, 2, 5, 5], [2, -2, 5, 5]])
    expected = [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert get_mask(prune(layer, 0.25, pattern="2x2")).int().tolist() == expected
    pattern, values = Block(4, 3), torch.arange(70.0).reshape(10, 7)
    units = pattern.reduce(values)
    assert units.shape == (9,) and units.sum() == values.sum() and units[-1] == values[8:, 6:].sum()
    assert torch.equal(pattern.expand(torch.arange(9), (10, 7))[:, 0], torch.tensor([0] * 4 + [3] * 4 + [6] * 2))
    mask = get_mask(prune(nn.Linear(7, 10), 0.5, pattern="4x3"))
    assert abs(int((~mask).sum()) - 35) <= 6


@pytest.mark.parametrize("kwargs", [{"pattern": "4"}, {"pattern": "0x1"}, {"scope": "layer"}, {"criterion": "l1"}])
def test_unknown_choices_are_named(kwargs: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        prune(network(), 0.5, **kwargs)  # type: ignore[arg-type]


def test_own_scores() -> None:
    layer = nn.Linear(4, 4)
    scores = torch.arange(16.0).reshape(4, 4).flip(0)
    masks = [
        get_mask(prune(copy.deepcopy(nn.Sequential(layer)), 0.5, criterion=criterion)[0])
        for criterion in ({"0.weight": scores}, {"0": scores}, lambda name, weight: scores, Scores({"0": scores}))
    ]
    assert all(torch.equal(mask, scores >= 8) for mask in masks)
    with pytest.raises(ValueError, match="no scores for '0.weight'"):
        prune(nn.Sequential(layer), 0.5, criterion={})
    with pytest.raises(ValueError, match=r"shape \(4,\), expected \(4, 4\)"):
        prune(nn.Sequential(layer), 0.5, criterion=lambda name, weight: weight[0])
    with pytest.raises(ValueError, match="NaN"):
        prune(nn.Sequential(layer), 0.5, criterion=lambda name, weight: weight * float("nan"))


def test_random_repeats_with_its_seed() -> None:
    a, b, c = (prune(network(), 0.5, criterion="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(get_mask(a[0]), get_mask(b[0])) and not torch.equal(get_mask(a[0]), get_mask(c[0]))


def test_nan_weights_raise() -> None:
    model = network()
    model[4].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="4.weight holds NaN"):
        prune(model, 0.5)


def test_a_layer_pruned_to_nothing_is_reported() -> None:
    model = network()
    model[4].weight.data.mul_(1e-6)
    with pytest.warns(UserWarning, match="pruned to nothing: 4.weight"):
        prune(model, 0.8)
    assert "pruned to nothing" in str(summary(model))
    assert torch.isfinite(model(torch.randn(2, 3, 8, 8))).all()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
])  # fmt: skip
def test_masks_hold_through_momentum_and_weight_decay(make: object, when: str) -> None:
    model = network()
    optimizer = make(model.parameters())  # type: ignore[operator]
    if when == "before":  # momentum of dense steps, then pruned: the optimizer still owns the same parameters
        steps(model, optimizer)
    prune(model, 0.9)
    kept = model[0].weight.detach().clone()
    steps(model, optimizer)
    assert zeros_hold(model) and not torch.equal(kept, model[0].weight)
    masks = [get_mask(m) for m in model if isinstance(m, nn.Conv2d)]
    finalize(model)
    assert all(bool((m.weight[~k] == 0).all()) for m, k in zip((model[0], model[3], model[4]), masks, strict=True))
    assert optimizer.param_groups[0]["params"][0] is model[0].weight


def test_deepcopy_and_averages_keep_masks() -> None:
    model = prune(network(), 0.9)
    twin = copy.deepcopy(model)
    steps(twin, torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=0.1))
    assert zeros_hold(twin) and not torch.equal(twin[0].weight, model[0].weight)
    for options in ({}, {"multi_avg_fn": averaging(0.9)},
                    {"multi_avg_fn": averaging(0.9), "use_buffers": True}):  # fmt: skip
        average = AveragedModel(model, **options)
        for _ in range(3):
            steps(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1), 1)
            average.update_parameters(model)
        assert zeros_hold(average) and summary(average).kept == summary(model).kept
        finalize(average)
        assert summary(average).kept <= summary(model).kept


def test_changing_a_copy_leaves_the_original_alone() -> None:
    model = prune(network(), 0.8)
    expected = model.eval()(torch.ones(1, 3, 8, 8))
    finalize(copy.deepcopy(model))
    prune(copy.deepcopy(model), 0.5, parameters="bias")  # another property on the same torch-made class
    assert torch.equal(model(torch.ones(1, 3, 8, 8)), expected) and zeros_hold(model)
    assert set(finalize(model).state_dict()) == set(network().state_dict())


def test_state_dict_of_a_masked_model_restores_masks() -> None:
    model, other = prune(network(), 0.9), prune(network(1), 0.5, scope="local")
    for layer in (0, 3, 4, 7):
        if get_mask(model[layer]) is None:
            set_mask(model[layer], torch.ones_like(model[layer].weight, dtype=torch.bool))
    other.load_state_dict(model.state_dict())
    assert torch.equal(get_mask(other[0]), get_mask(model[0])) and torch.equal(other[0].weight, model[0].weight)


def test_half_precision_keeps_bool_masks() -> None:
    model = prune(network(), 0.5).to(torch.bfloat16)
    assert get_mask(model[0]).dtype == torch.bool and model[0].weight.dtype == torch.bfloat16
    assert pruned(prune(network().half(), 0.5)) == pruned(prune(network(), 0.5))


def test_tied_weights_count_and_are_masked_once() -> None:
    model: Any = prune(Tied(), 0.5)
    assert summary(model).total == 12 * 6 + 36 and pruned(model) == 54
    assert model.embedding.parametrizations.weight[0] is model.decoder.parametrizations.weight[0]
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(12)).square().mean().backward()
        optimizer.step()
    assert torch.equal(model.embedding.weight, model.decoder.weight)
    assert pruned(prune(model, 0.7)) == round(0.7 * 108)
    copied = finalize(copy.deepcopy(model))
    assert copied.embedding.weight is copied.decoder.weight and pruned(copied) == round(0.7 * 108)


def test_a_parameter_tied_under_another_name() -> None:
    model = Tied()
    model.table = model.decoder.weight  # type: ignore[assignment]
    prune(model, 0.5)
    assert torch.equal(model.table == 0, model.decoder.weight == 0)


def test_a_shared_module_answers_to_both_names() -> None:
    layer = nn.Linear(4, 4)
    model = prune(nn.ModuleDict({"a": layer, "b": layer}), 0.5, include=("b",))
    assert summary(model).total == 16 and pruned(model) == 8


def test_torch_prune_hooks_are_taken_over() -> None:
    model = network()
    weight = model[0].weight
    l1_unstructured(model[0], "weight", 0.5)
    random_unstructured(model[0], "weight", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    steps(model, optimizer)  # module.weight is stale now
    gone = model[0].weight_mask == 0
    assert torch.equal(get_mask(model[0]), ~gone) and summary(model).layers[0].kept == int((~gone).sum())
    prune(model, 0.8)
    assert not model[0]._forward_pre_hooks and model[0].parametrizations.weight.original is weight
    assert not bool((get_mask(model[0]) & gone).any()) and pruned(model) == round(0.8 * summary(model).total)
    steps(model, optimizer)
    assert zeros_hold(model)


def test_finalize_leaves_plain_parameters() -> None:
    model = prune(network(), 0.9)
    l1_unstructured(model[1], "weight", 0.5)
    x = torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    assert finalize(model) is model and list(model.state_dict()) and not model[1]._forward_pre_hooks
    assert set(model.state_dict()) == set(network().state_dict()) and type(model[0]) is nn.Conv2d
    assert torch.equal(model(x), expected) and model[0].weight.requires_grad
    assert not torch.signbit(model[0].weight[model[0].weight == 0]).any()
    assert pruned(model) > 0 and finalize(finalize(network())) is not None


def test_hold_zeros() -> None:
    model = hold_zeros(finalize(prune(network(), 0.9)))
    count = pruned(model)
    steps(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1))
    assert zeros_hold(model) and pruned(model) == count
    assert not any(isinstance(m, Mask) for m in hold_zeros(network()).modules())


def test_weight_norm_beneath_a_mask() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)))
    prune(model, 0.5)
    steps_ok = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    model(torch.randn(3, 6)).sum().backward()
    steps_ok.step()
    assert zeros_hold(model) and pruned(model) == 18
    assert set(finalize(model).state_dict()) == {"0.weight", "0.bias"}


def test_summary_is_plain_data_and_a_table() -> None:
    model = prune(network(), 0.9)
    data = json.loads(json.dumps(summary(model).to_dict()))
    assert data["kept"] + pruned(model) == data["total"] and data["density"] == pytest.approx(1 - data["sparsity"])
    assert data["layers"][0] == {**data["layers"][0], "name": "0", "shape": [8, 3, 3, 3], "total": 216, "masked": True}
    text = str(summary(model)).splitlines()
    assert text[0].split() == ["layer", "shape", "kept", "total", "sparsity", "zero", "filters"]
    assert text[-1].startswith("global")
    assert "weight" in str(summary(nn.Linear(2, 2)))
    extra = summary(prune(network(), 0.5, include=nn.BatchNorm2d))
    assert [layer.name for layer in extra.layers if layer.masked] == ["1"]


def test_masks_reject_what_is_not_one() -> None:
    with pytest.raises(TypeError, match="bool"):
        Mask(torch.ones(2))
    with pytest.raises(ValueError, match=r"shape \(2,\), expected"):
        set_mask(nn.Linear(2, 2), torch.ones(2, dtype=torch.bool))
    assert isinstance(Local(), Local)


def test_arguments_and_models_of_the_wrong_kind() -> None:
    for options, message in (
        ({"include": None}, "include must hold"), ({"exclude": 3}, "exclude must hold"),
        ({"parameters": ()}, "parameters must hold"), ({"parameters": None}, "parameters must hold"),
        ({"amounts": [0.5]}, "amounts must map"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=message):
            prune(nn.Linear(4, 4), 0.5, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight is on the meta device"):
        prune(nn.Linear(4, 4, device="meta"), 0.5)
    with torch.inference_mode():
        frozen = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="made under torch.inference_mode"):
        prune(frozen, 0.5)
    assert get_mask(frozen) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted: Any = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="ScriptModule"):
        prune(scripted, 0.5)


def test_a_count_of_all_weights_only_where_all_are_gone() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was empty before
        prune(model, 0.5, amounts={"1": 8})
    assert [layer.kept for layer in summary(model).layers] == [8, 0]
    with pytest.raises(ValueError, match="would prune all of the 16 weights"):
        prune(model, 0.5, amounts={"0": 16})
    with pytest.raises(ValueError, match="would prune all of the 8 weights"):
        prune(model, 0.5, amounts={"1": 9})
