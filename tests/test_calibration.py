"""recalibrate_bn: the statistics of the batches, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseprune
from sparseprune import recalibrate_bn


def network() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(48, 5), nn.BatchNorm1d(5, affine=False),
    )  # fmt: skip
    model(torch.randn(7, 2, 6, 6))  # some statistics
    return model


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [3 * torch.randn(size, 2, 6, 6, generator=generator) + 1 for size in sizes]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_statistics_are_the_plain_average_over_batches() -> None:
    model, loader = network().eval(), batches(8, 8, 4)
    before = snapshot(model)
    assert recalibrate_bn(model, loader) is model
    first = [model[0](batch).detach().transpose(0, 1).flatten(1) for batch in loader]
    torch.testing.assert_close(model[1].running_mean, torch.stack([x.mean(1) for x in first]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([x.var(1) for x in first]).mean(0))
    # The second layer sees what the first makes of each batch's own statistics, without dropout.
    norm = model[1]
    middle = [nn.functional.batch_norm(model[0](x), None, None, norm.weight, norm.bias, True) for x in loader]
    second = [model[5](torch.relu(x).flatten(1)) for x in middle]
    torch.testing.assert_close(model[6].running_mean, torch.stack([x.mean(0) for x in second]).mean(0).detach())
    assert int(model[6].num_batches_tracked) == 3
    assert model[1].momentum == 0.3 and model[6].momentum == 0.1
    unchanged = [name for name in before if not name.endswith(("running_mean", "running_var", "tracked"))]
    assert unchanged and all(torch.equal(before[name], model.state_dict()[name]) for name in unchanged)


def test_modes_gradients_and_frozen_layers_stay() -> None:
    model = network().train()
    model[3].eval()
    model(batches(4)[0]).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    recalibrate_bn(model, batches(4, 4))
    assert modes == [module.training for module in model.modules()] and torch.equal(rng, torch.get_rng_state())
    pairs = zip(gradients, model.parameters(), strict=True)
    assert all(torch.equal(a, b.grad) for a, b in pairs if b.grad is not None)


def test_number_of_batches_and_kinds_of_batches() -> None:
    expected = snapshot(recalibrate_bn(network(), batches(5, 5, 5)[:2]))
    kinds: list[list[Any]] = [
        batches(5, 5, 5), [(x, torch.zeros(5)) for x in batches(5, 5, 5)], [{"input": x} for x in batches(5, 5, 5)],
    ]  # fmt: skip
    for loader in kinds:
        found = snapshot(recalibrate_bn(network(), loader, batches=2))
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    consumed = iter(batches(5, 5, 5))
    recalibrate_bn(network(), consumed, batches=2)
    assert len(list(consumed)) == 1


def test_it_repairs_what_pruning_shifts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16))
    x = torch.rand(64, 2, 8, 8) + 1
    recalibrate_bn(model, [x]).eval()
    expected = model(x)
    sparseprune.prune(model, 0.6, include=nn.Conv2d)
    shifted = (model(x) - expected).square().mean()
    recalibrate_bn(model, [x])
    assert (model(x) - expected).square().mean() < 0.5 * shifted
    torch.testing.assert_close(model(x).mean((0, 2, 3)), torch.zeros(16), atol=1e-4, rtol=0)


class Branches(nn.Module):
    """`idle` never runs, and `plain` has no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.busy, self.idle = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.plain = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.plain(self.busy(x))
        return result


def test_layers_without_statistics_or_without_inputs() -> None:
    model: Any = Branches()
    model.idle.running_mean = torch.arange(4.0)
    recalibrate_bn(model, [torch.randn(6, 4) + 5])
    assert torch.equal(model.idle.running_mean, torch.arange(4.0)) and bool((model.idle.running_var == 1).all())
    assert float(model.busy.running_mean.mean()) > 4
    plain = nn.Linear(2, 2)
    assert recalibrate_bn(plain, []) is plain  # nothing to do, whatever the loader


BAD = float("nan")


@pytest.mark.parametrize(("loader", "options", "error", "message"), [
    ([], {}, ValueError, "loader is empty"),
    (batches(4), {"batches": 0}, ValueError, "batches must be"),
    (batches(4), {"batches": True}, ValueError, "batches must be"),
    (batches(4), {"batches": 2.0}, ValueError, "batches must be"),
    ([*batches(4), batches(4)[0] * BAD], {}, ValueError, "1 are NaN or infinite"),
    ([*batches(4), "image"], {}, TypeError, "loader must yield inputs"),
    ([*batches(4), torch.ones(4, 3, 6, 6)], {}, RuntimeError, "channels"),
    (batches(4, 1), {}, ValueError, "more than 1 value per channel"),
])  # fmt: skip
def test_errors_change_nothing(loader: Any, options: Any, error: type[Exception], message: str) -> None:
    model = network()
    model[1].eval()
    before, modes = snapshot(copy.deepcopy(model)), [module.training for module in model.modules()]
    with pytest.raises(error, match=message):
        recalibrate_bn(model, loader, **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()] and model[1].momentum == 0.3
