"""Regularizers and distillation: values against their formulas, and what training with them does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparseprune import Distillation, finetune, prune, summary
from sparseprune.regularizers import L1, L2, BNScaleL1, GroupLasso, Regularizer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3))


def data() -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(32, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, 0, 0, :3].argmax(1)), 8)


def number(value: Tensor) -> float:
    return float(value.detach())


def test_values_are_those_of_the_formulas() -> None:
    model = net()
    conv, linear = model[0].weight, model[4].weight
    assert isinstance(conv, Tensor) and isinstance(linear, Tensor)
    assert number(L1(0.1)(model)) == pytest.approx(0.1 * number(conv.abs().sum() + linear.abs().sum()), rel=1e-5)
    assert number(L2(0.1, include="0")(model)) == pytest.approx(0.1 * number(conv.square().sum()), rel=1e-5)
    assert number(BNScaleL1(0.5)(model)) == pytest.approx(0.5 * 6)
    filters = conv.flatten(1).norm(dim=1).sum() * math.sqrt(18)
    channels = conv.transpose(0, 1).flatten(1).norm(dim=1).sum() * math.sqrt(54)
    assert number(GroupLasso(1.0, include=nn.Conv2d)(model)) == pytest.approx(number(filters), rel=1e-4)
    assert number(GroupLasso(1.0, dim=1, include=nn.Conv2d)(model)) == pytest.approx(number(channels), rel=1e-4)


def test_a_filter_of_zeros_has_a_finite_gradient() -> None:
    model = net()
    with torch.no_grad():
        next(model.parameters())[2] = 0
    GroupLasso(1.0)(model).backward()  # type: ignore[no-untyped-call]
    gradient = model[0].weight.grad
    assert isinstance(gradient, Tensor) and bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("make", [lambda: GroupLasso(0.03), lambda: BNScaleL1(0.1), lambda: L1(0.03)])
def test_training_with_a_penalty_shrinks_what_it_penalises(make: Callable[[], Regularizer]) -> None:
    penalty, plain, sparse = make(), net(), net()
    finetune(plain, data(), epochs=10, progress=False)
    finetune(sparse, data(), epochs=10, regularizer=penalty, progress=False)
    assert number(penalty(sparse)) < 0.9 * number(penalty(plain))


def test_masked_weights_stay_zero_under_a_penalty() -> None:
    model = prune(net(), 0.5)
    finetune(model, data(), epochs=2, regularizer=L1(1e-3), progress=False)  # finetune itself checks the masks
    assert summary(model).sparsity == 0.5


def test_strengths_to_begin_with() -> None:
    assert [repr(kind()) for kind in (L1, L2, BNScaleL1, GroupLasso)] == [
        "L1(1e-05)", "L2(0.0001)", "BNScaleL1(0.0001)", "GroupLasso(0.0001)"
    ]  # fmt: skip


def test_bad_penalties_are_named() -> None:
    for bad in (0, -1, math.nan, math.inf, True, "much"):
        with pytest.raises(ValueError, match="strength must be a positive number"):
            L1(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dim must be"):
        GroupLasso(1, dim=2)
    with pytest.raises(ValueError, match="no parameter"):
        BNScaleL1(1)(nn.Linear(2, 2))


def test_distillation_is_hintons_loss() -> None:
    teacher, student = net().eval(), net()
    x, y = torch.randn(5, 2, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    outputs = student(x)
    found = Distillation(teacher, temperature=3, alpha=0.7).loss(outputs, [x], y, F.cross_entropy)
    with torch.no_grad():
        wanted = teacher(x)
    p, q = F.softmax(wanted / 3, 1), F.softmax(outputs / 3, 1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    assert number(found) == pytest.approx(number(0.7 * 9 * divergence + 0.3 * F.cross_entropy(outputs, y)), rel=1e-4)


def test_a_student_follows_its_teacher_and_the_teacher_stays() -> None:
    teacher = net()
    before = copy.deepcopy(teacher.state_dict())
    torch.manual_seed(5)
    student = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
    x = next(iter(data()))[0]

    def distance() -> float:
        with torch.no_grad():
            return float((student(x).softmax(1) - teacher.eval()(x).softmax(1)).abs().mean())

    start = distance()
    teacher.train()
    finetune(student, data(), epochs=20, teacher=Distillation(teacher, alpha=1.0), progress=False)
    assert teacher.training
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert distance() < 0.5 * start


def test_bad_teachers_are_named() -> None:
    with pytest.raises(TypeError, match="teacher must be"):
        finetune(net(), data(), epochs=1, teacher="resnet", progress=False)  # type: ignore[arg-type]
    for options, name in (({"temperature": 0}, "temperature"), ({"alpha": 0}, "alpha"), ({"alpha": 1.5}, "alpha")):
        with pytest.raises(ValueError, match=name):
            Distillation(net(), **options)
    with pytest.raises(ValueError, match="must agree"):
        finetune(net(), data(), epochs=1, teacher=nn.Sequential(nn.Flatten(), nn.Linear(32, 7)), progress=False)
