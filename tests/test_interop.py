"""Masks that come from elsewhere or go elsewhere: the user's own, and `torch.nn.utils.prune`'s."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

import sparseprune
from sparseprune import pruning
from sparseprune.pruning import apply_masks, finalize, prune, summary, to_torch_prune

get_mask: Any = pruning.get_mask
l1_unstructured: Any = torch_prune.l1_unstructured
is_pruned: Any = torch_prune.is_pruned

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().sum().backward()
    optimizer.step()


# --- torch.nn.utils.prune --------------------------------------------------------------------------------------------


def test_there_and_back() -> None:
    model = prune(network(), 0.7, exclude=("2",), parameters=("weight", "bias"))
    parameters = [model[0].parametrizations.weight.original, model[2].weight]
    expected, counts = model(X), summary(model).to_dict()
    masks = {(i, n): get_mask(model[i], n) for i in (0, 3) for n in ("weight", "bias")}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    assert to_torch_prune(model) is model
    assert {"0.weight_orig", "0.weight_mask", "0.bias_orig", "2.weight", "2.bias"} <= set(model.state_dict())
    assert not any(parametrize.is_parametrized(layer) for layer in model) and is_pruned(model)
    assert model[0].weight_orig is parameters[0] and model[2].weight is parameters[1]
    assert torch.equal(model(X), expected) and summary(model).to_dict() == counts
    for (i, n), mask in masks.items():
        assert torch.equal(get_mask(model[i], n), mask)
    to_torch_prune(model)  # nothing left to do
    step(model, optimizer)
    before = model(X)
    prune(model, sum(int((~mask).sum()) for mask in masks.values()), exclude=("2",), parameters=("weight", "bias"))
    assert not is_pruned(model) and model[0].parametrizations.weight.original is parameters[0]
    assert torch.equal(model(X), before) and torch.equal(get_mask(model[0]), masks[0, "weight"])
    step(model, optimizer)
    assert bool((model[0].weight[~masks[0, "weight"]] == 0).all())


def test_torch_takes_over_from_there() -> None:
    model = to_torch_prune(prune(network(), 0.5, scope="local"))
    l1_unstructured(model[0], "weight", 0.5)  # half of what is left, as torch counts
    assert summary(model).layers[0].sparsity == 0.75
    torch_prune.remove(model[0], "weight")  # type: ignore[no-untyped-call]
    assert "0.weight" in model.state_dict() and float((model[0].weight == 0).float().mean()) == 0.75


def test_tied_layers_stay_tied() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.Linear(8, 4))
    model[4].weight = model[1].weight
    prune(model, 0.5)
    expected = model(X)
    to_torch_prune(model)
    assert model[1].weight_orig is model[4].weight_orig and torch.equal(model(X), expected)
    step(model, torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1))
    model(X)
    assert torch.equal(model[1].weight, model[4].weight)
    counts = summary(model)
    assert counts.total == 48 + 32 + 32 and summary(prune(model, 0.5)).kept == counts.kept == 56
    assert model[1].parametrizations.weight[0] is model[4].parametrizations.weight[0]


def test_other_parametrizations_cannot_become_hooks() -> None:
    model = network()
    parametrizations.weight_norm(model[2])
    prune(model, 0.5)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"2\.weight has a mask and other parametrizations"):
        to_torch_prune(model)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


# --- the user's own masks --------------------------------------------------------------------------------------------


def test_masks_of_a_trained_model_on_a_fresh_one() -> None:
    trained, fresh = prune(network(), 0.8), network()
    weight = fresh[0].weight
    masks = {"0": get_mask(trained[0]), "3.weight": get_mask(trained[3]), "2.bias": torch.arange(8) < 4}
    assert sparseprune.apply_masks(fresh, masks) is fresh
    assert torch.equal(get_mask(fresh[0]), masks["0"]) and torch.equal(get_mask(fresh[3]), masks["3.weight"])
    assert torch.equal(get_mask(fresh[2], "bias"), masks["2.bias"]) and get_mask(fresh[2]) is None
    assert fresh[0].parametrizations.weight.original is weight
    step(fresh, torch.optim.SGD(fresh.parameters(), 0.1, momentum=0.9, weight_decay=0.1))
    assert bool((finalize(fresh)[0].weight[~masks["0"]] == 0).all())


def test_what_is_pruned_stays_pruned() -> None:
    layer = prune(nn.Linear(6, 6), 0.5)
    before = get_mask(layer)
    apply_masks(layer, {"weight": ~before | (torch.rand(6, 6) < 0.5)})
    assert not bool((get_mask(layer) & ~before).any())
    hooked = network()
    l1_unstructured(hooked[0], "weight", 0.5)
    apply_masks(hooked, {"0": torch.eye(8, 6, dtype=torch.bool)})
    assert torch.equal(get_mask(hooked[0]), torch.eye(8, 6, dtype=torch.bool) & get_mask(hooked[0]))


def test_masks_that_do_not_fit() -> None:
    model, mask = network(), torch.ones(8, 6, dtype=torch.bool)
    for masks, error, text in [
        ({"0": mask.float()}, TypeError, r"masks\['0'\] must be a bool tensor .* got torch.float32"),
        ({"0": [True]}, TypeError, "got list"),
        ({"2": mask}, ValueError, r"masks\['2'\] has shape \(8, 6\), expected 2.weight's shape \(8, 8\)"),
        ({"0": mask, "0.weight": mask}, ValueError, r"masks\['0.weight'\] is a second mask for 0.weight"),
        ({"fc": mask}, ValueError, r"masks\['fc'\] matches no"),
        ({"1": mask}, ValueError, r"masks\['1'\] matches no"),
        ({"": mask}, ValueError, r"masks\[''\] matches no"),
    ]:  # fmt: skip
        with pytest.raises(error, match=text):
            apply_masks(model, {"3": torch.zeros(4, 8, dtype=torch.bool)} | masks)  # type: ignore[operator]
    assert not any(parametrize.is_parametrized(layer) for layer in model)


def test_tied_layers_take_one_mask() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    apply_masks(model, {"1": torch.eye(6, dtype=torch.bool)})
    assert torch.equal(get_mask(model[0]), torch.eye(6, dtype=torch.bool))
    with pytest.raises(ValueError, match="second mask"):
        apply_masks(model, {"0": torch.eye(6) > 0, "1": torch.eye(6) > 0})
