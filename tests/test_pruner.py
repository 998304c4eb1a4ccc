"""`Pruner`: schedules, resumption, and pruning while `finetune` trains."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparseprune import Pruner, finetune, prune, summary
from sparseprune.pruning import get_mask


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))  # 600 and 150 weights


def data(batches: int = 4) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * batches, 20, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :5].argmax(1)), 8, shuffle=True)


@pytest.fixture(autouse=True)
def layers_may_vanish() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pruned to nothing")
        yield


def path(**options: Any) -> list[float]:
    model = net()
    pruner = Pruner(model, 0.9, **options)
    found = []
    while not pruner.finished:
        pruner.step()
        found.append(summary(model).sparsity)
    return found


def test_schedules_reach_the_amount_as_their_papers_say() -> None:
    total = 20 * 30 + 30 * 5
    for schedule, expected in {
        "linear": [0.225, 0.45, 0.675, 0.9],
        "cubic": [0.9 * (1 - (1 - k / 4) ** 3) for k in (1, 2, 3, 4)],
        "iterative": [1 - 0.1 ** (k / 4) for k in (1, 2, 3, 4)],
    }.items():
        assert path(schedule=schedule, steps=4) == pytest.approx(expected, abs=1 / total), schedule
    assert path(schedule="one_shot", steps=3) == pytest.approx([0.9, 0.9, 0.9])
    assert path(schedule=lambda p: p * p, steps=2) == pytest.approx([0.225, 0.9], abs=1 / total)


def test_amounts_are_absolute_whatever_was_pruned_before() -> None:
    model = prune(net(), 0.5)
    pruner = Pruner(model, 0.9, schedule="iterative", steps=3)
    seen = [summary(model).sparsity for _ in range(3) if pruner.step()]
    assert seen == pytest.approx([1 - 0.5 * 0.2 ** (k / 3) for k in (1, 2, 3)], abs=2e-3)
    with pytest.raises(ValueError, match="cannot go below the present"):
        Pruner(model, 0.6)


def test_every_counts_calls_and_the_first_one_prunes() -> None:
    model = net()
    pruner = Pruner(model, 0.8, schedule="linear", steps=2, every=3)
    assert [pruner.step() for _ in range(7)] == [True, False, False, True, False, False, False]
    assert pruner.finished and summary(model).sparsity == pytest.approx(0.8, abs=1e-3)


def test_layers_with_their_own_amount_and_local_scope() -> None:
    model = net()
    pruner = Pruner(model, 0.5, schedule="linear", steps=2, scope="local", amounts={"2": 0.8})
    pruner.step()
    layers = {layer.name: layer.sparsity for layer in summary(model).layers}
    assert layers == pytest.approx({"0": 0.25, "2": 0.4}, abs=1e-2)
    pruner.step()
    layers = {layer.name: layer.sparsity for layer in summary(model).layers}
    assert layers == pytest.approx({"0": 0.5, "2": 0.8}, abs=1e-2)


def test_state_dict_goes_on_where_it_was_taken() -> None:
    whole = net()
    straight = Pruner(whole, 0.9, steps=5)
    for _ in range(5):
        straight.step()
    first = net()
    half = Pruner(first, 0.9, steps=5)
    half.step(), half.step()
    second = copy.deepcopy(first)
    rest = Pruner(second, 0.9, steps=5)
    rest.load_state_dict(copy.deepcopy(half.state_dict()))
    while not rest.finished:
        rest.step()
    for a, b in ((whole[0], second[0]), (whole[2], second[2])):
        left, right = get_mask(a), get_mask(b)
        assert left is not None and right is not None and torch.equal(left, right)
    with pytest.raises(ValueError, match="steps=5"):
        Pruner(net(), 0.9, steps=4).load_state_dict(half.state_dict())
    with pytest.raises(ValueError, match="other amounts"):
        Pruner(net(), 0.8, steps=5).load_state_dict(half.state_dict())


@pytest.mark.parametrize("per", ["epoch", "batch"])
def test_finetune_prunes_and_holds(per: str) -> None:
    model = net()
    pruner = Pruner(model, 0.9, steps=3, per=per)
    history = finetune(model, data(), epochs=4, pruner=pruner, val_loader=data(), progress=False)
    assert pruner.finished and summary(model).sparsity == pytest.approx(0.9, abs=2e-3)
    assert history.sparsity[-1] == pytest.approx(0.9, abs=2e-3)
    if per == "epoch":
        assert history.sparsity[0] < history.sparsity[1] < history.sparsity[2]
        assert history.best_epoch in (2, 3)  # never an epoch before the final sparsity


def test_bad_arguments_are_named() -> None:
    for options, message in (
        ({"schedule": "quadratic"}, "schedule"), ({"steps": 0}, "steps"), ({"every": 0}, "every"),
        ({"per": "step"}, "per"),
        ({"amounts": {"nothing": 0.5}}, "matches no eligible"), ({"scope": "everywhere"}, "scope"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Pruner(net(), 0.5, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no option 'patern'"):
        Pruner(net(), 0.5, patern="4x1")
    with pytest.raises(ValueError, match="another model"):
        finetune(net(), data(), epochs=1, pruner=Pruner(net(), 0.5), progress=False)


@pytest.mark.parametrize("schedule", ["cubic", "linear", "iterative", "one_shot"])
def test_a_small_layer_may_lose_everything_on_the_way(schedule: str) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 1))  # 0.9 of 2 weights is 2
    pruner = Pruner(model, 0.9, schedule=schedule, steps=4, scope="local")
    while not pruner.finished:
        pruner.step()
    assert [layer.kept for layer in summary(model).layers] == [3, 1, 0]


def test_nothing_changes_before_the_criterion_is_known() -> None:
    model = net()
    for criterion, error in (("magnitud", ValueError), ("taylor", ValueError), (3, TypeError)):
        with pytest.raises(error, match="criterion"):
            Pruner(model, 0.5, criterion=criterion)
    with pytest.raises(TypeError, match="amounts must map"):
        Pruner(model, 0.5, amounts=[0.5])
    assert get_mask(model[0]) is None
    pruner = Pruner(model, 0.5)
    with pytest.raises(ValueError, match="has no goals"):
        pruner.load_state_dict({key: value for key, value in pruner.state_dict().items() if key != "goals"})
