"""Criteria that look at data: what they compute, what they leave untouched, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from sparseprune import pruning
from sparseprune.pruning import BNScale, Criterion, Pattern, Scores, Slice, Taylor, prune, set_mask, summary

get_mask: Any = pruning.get_mask
l1_unstructured: Any = torch_prune.l1_unstructured


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, groups=3),
        nn.ReLU(inplace=True), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    model[1].running_mean.uniform_(-1, 1)  # type: ignore[union-attr,operator]
    model[1].weight.data.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
    return model


def examples(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 6, 6, generator=generator), torch.randint(0, 5, (count,), generator=generator)


def one_by_one(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    x, y = examples(count)
    return [(x[i : i + 1], y[i : i + 1]) for i in range(count)]


def products(model: nn.Module, names: list[str], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """w * dL/dw by plain autograd on a copy."""
    twin = copy.deepcopy(model).eval()
    F.cross_entropy(twin(x), y).backward()  # type: ignore[no-untyped-call]
    result = {}
    for name in names:
        parameter = twin.get_parameter(name)
        assert parameter.grad is not None
        result[name] = parameter.detach() * parameter.grad
    return result


def unit_scores(criterion: Criterion, model: nn.Module, pattern: Pattern, *names: str) -> dict[str, Tensor]:
    """What `criterion` gives each unit of the parameters named."""
    weights = {name: model.get_parameter(name).detach() for name in names}
    bound = {n: pattern.bind(n, model.get_submodule(n.rpartition(".")[0]), tuple(w.shape)) for n, w in weights.items()}
    kept = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    return dict(criterion.unit_scores(model, weights, kept, bound, None))


# --- Taylor ----------------------------------------------------------------------------------------------------------

WEIGHTS = ["0.weight", "3.weight", "8.weight"]


def test_single_weights_are_weight_times_gradient() -> None:
    model, (x, y) = network(), examples()
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    scores = unit_scores(Taylor(batches, progress=False), model, pruning.Block(1, 1), *WEIGHTS)
    expected = [products(model, WEIGHTS, *batch) for batch in batches]
    for name in WEIGHTS:
        assert torch.allclose(scores[name], sum(e[name].abs() for e in expected).flatten(), atol=1e-6)  # type: ignore


@pytest.mark.parametrize("normalize", [False, True])
def test_filters_are_weight_times_gradient_example_by_example(normalize: bool) -> None:
    """One batch of six gives what six batches of one give, each summed over a filter before the absolute value."""
    model = network()
    expected = {name: torch.zeros(model.get_parameter(name).shape[0]) for name in WEIGHTS}
    for x, y in one_by_one():
        for name, product in products(model, WEIGHTS, x, y).items():
            expected[name] += product.flatten(1).sum(1).abs() / 6  # the loss is the mean over the batch
    criterion = Taylor([examples()], normalize=normalize, progress=False)
    scores = unit_scores(criterion, model, Slice(0), *WEIGHTS)
    for name in WEIGHTS:
        wanted = expected[name] / expected[name].norm() if normalize else expected[name]
        assert torch.allclose(scores[name], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_other_slices_are_summed_before_the_absolute_value(dim: int) -> None:
    model, (x, y) = network(), examples()
    product = products(model, ["0.weight"], x, y)["0.weight"]
    scores = unit_scores(Taylor([(x, y)], progress=False), model, Slice(dim), "0.weight")["0.weight"]
    assert torch.allclose(scores, product.transpose(0, dim).flatten(1).sum(1).abs(), atol=1e-6)


class Unusual(nn.Module):
    """Sequences, a layer called twice, one whose weight is used without calling it, and tied ones."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.direct = nn.Linear(4, 4)
        self.up = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.tied = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4, bias=False)
        self.again.weight = self.tied.weight
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:  # (N, time, 4)
        x = torch.tanh(self.twice(torch.relu(self.twice(x))))
        x = F.linear(x, self.direct.weight)
        x = self.again(torch.tanh(self.tied(x)))
        result: Tensor = self.head(self.up(x.transpose(1, 2)).mean(2))
        return result


def test_filters_of_unusual_layers() -> None:
    torch.manual_seed(0)
    model = Unusual()
    x, y = torch.randn(4, 7, 4), torch.tensor([0, 3, 1, 4])
    names = ["twice.weight", "direct.weight", "tied.weight", "head.weight", "up.weight"]
    one = Taylor([(x[:1], y[:1])], progress=False)
    scores, product = unit_scores(one, model, Slice(0), *names), products(model, names, x[:1], y[:1])
    for name in names[:-1]:
        assert torch.allclose(scores[name], product[name].sum(1).abs(), atol=1e-6), name
    grouped = product["up.weight"].reshape(2, 2, 3, 3).sum((1, 3)).flatten()  # (groups, in, out, k)
    assert torch.allclose(scores["up.weight"], grouped.abs(), atol=1e-6)
    prune(model, 0.4, criterion=Taylor([(x, y)], progress=False), pattern="filter", min_density=0.2)
    assert torch.equal(get_mask(model.tied), get_mask(model.again))


def test_masks_hooks_and_other_parametrizations_are_seen_through() -> None:
    x, y = examples()
    plain, masked, hooked, normed = (network() for _ in range(4))
    keep = torch.rand(6, 3, 3, 3) > 0.5
    with torch.no_grad():
        plain[0].weight *= keep
    set_mask(masked[0], keep)
    torch_prune.custom_from_mask(hooked[0], "weight", keep)  # type: ignore[no-untyped-call]
    hooked.eval()(x)
    parametrizations.weight_norm(normed[0])
    set_mask(normed[0], keep)
    for pattern in (Slice(0), Slice(1), pruning.Block(1, 1)):
        expected, *others = (
            Taylor([(x, y)], progress=False).unit_scores(
                model, {"0.weight": plain[0].weight.detach()}, {}, {"0.weight": pattern}, None
            )["0.weight"]
            for model in (plain, masked, hooked, normed)
        )
        for other in others:
            assert torch.allclose(other, expected, atol=1e-6)


def test_nothing_is_left_behind() -> None:
    model = network().train()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    prune(model, 0.3)
    model(examples()[0]).sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    drawn = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        drawn.append(torch.rand(1))  # a loss that draws
        return F.cross_entropy(outputs, targets)

    with torch.no_grad():
        criterion = Taylor([examples()], loss, progress=False)
        pruned = prune(copy.deepcopy(model), 0.5, criterion=criterion)
        assert summary(pruned).sparsity == pytest.approx(0.5, abs=1e-3)
        names = ["0.weight", "3.weight"]
        weights = {name: model[int(name[0])].weight.detach() for name in names}
        criterion.unit_scores(model, weights, {}, {name: Slice(0) for name in names}, None)
    assert len(drawn) == 2 and torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model] == [True, False] + [True] * 7 and model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    for parameter, before in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (before is None)
        assert before is None or parameter.grad is None or torch.equal(parameter.grad, before)
    assert not any(m._forward_hooks for m in model.modules())


def test_taylor_finds_the_filters_that_do_nothing() -> None:
    """Filters that the next layer multiplies by zero go first, whatever their magnitude is."""
    model = network()
    with torch.no_grad():
        model[0].weight[[1, 4]] *= 100
        model[3].weight.view(3, 2, 2, 9)[0, :, 1] = 0  # reads channel 1 (group 0, its second)
        model[3].weight.view(3, 2, 2, 9)[2, :, 0] = 0  # and channel 4
    prune(model, 2 * 27, criterion=Taylor([examples()], progress=False), pattern="filter", include=("0",))
    assert (~get_mask(model[0]).flatten(1).any(1)).nonzero().flatten().tolist() == [1, 4]


def test_what_taylor_refuses() -> None:
    x, y = examples()
    for batches, text in ((x, "got Tensor"), (3, "got int"), ({"x": x}, "got dict"), (network(), "got Sequential")):
        with pytest.raises(TypeError, match=f"batches must be an iterable of .*{text}"):
            Taylor(batches)  # type: ignore[arg-type]

    def run(criterion: Taylor, model: Any = None, exclude: Any = ()) -> None:
        model = model or network()
        state = copy.deepcopy(model.state_dict())
        try:
            prune(model, 0.5, criterion=criterion, exclude=exclude)
        finally:
            assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
            assert model.training

    trained = network()
    with pytest.raises(ValueError, match="batches is empty"):
        run(Taylor([], progress=False))
    used_up = iter([(x, y)])
    list(used_up)
    with pytest.raises(ValueError, match="batches is empty"):
        run(Taylor(used_up, progress=False))
    for batch in (x, [x], {"x": x}):
        with pytest.raises(TypeError, match=r"batches must yield \(inputs, targets\), got"):
            run(Taylor([batch], progress=False))
    with torch.inference_mode(), pytest.raises(ValueError, match="takes gradients"):
        prune(trained, 0.5, criterion=Taylor([(x, y)], progress=False))
    with pytest.raises(FloatingPointError, match="loss of batch 2 is nan"):
        run(Taylor([(x, y), (x * float("nan"), y)], progress=False))
    with pytest.raises(TypeError, match=r"loss must return a scalar tensor, got shape \(6,\)"):
        run(Taylor([(x, y)], lambda o, t: F.cross_entropy(o, t, reduction="none"), progress=False))
    with pytest.raises(TypeError, match="loss must return a scalar tensor, got float"):
        run(Taylor([(x, y)], lambda o, t: F.cross_entropy(o, t).item(), progress=False))  # type: ignore
    for detach in (lambda o: o.detach(), lambda o: o.data):
        with pytest.raises(ValueError, match=r"the loss does not depend on 0\.weight, 3\.weight, 8\.weight"):
            run(Taylor([(x, y)], lambda o, t, d=detach: F.cross_entropy(d(o), t), progress=False))  # type: ignore
    unused: Any = nn.Sequential()
    unused.used, unused.auxiliary = nn.Linear(4, 5), nn.Linear(4, 5)
    unused.forward = lambda x: unused.used(x)
    with pytest.raises(ValueError, match=r"does not depend on auxiliary\.weight in any batch"):
        run(Taylor([(torch.randn(6, 4), y)], progress=False), unused)
    prune(unused, 0.5, criterion=Taylor([(torch.randn(6, 4), y)], progress=False), exclude=("auxiliary",))


def test_a_bar_shows_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    prune(network(), 0.5, criterion=Taylor([examples()]))
    assert "Taylor" in capsys.readouterr().err


# --- BNScale ---------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn2 = nn.BatchNorm2d(8)  # declared in another order than called
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu_()
        x = x + self.bn2(self.conv2(x))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


def test_the_scale_of_the_norm_that_follows_ranks_filters() -> None:
    torch.manual_seed(0)
    model: Any = Residual().train()
    with torch.no_grad():
        model.bn1.weight.copy_(torch.tensor([1, -2, 0.1, 3, -0.2, 1, 1, 1]))
        model.bn2.weight.copy_(torch.tensor([0.05, 9, 9, 9, 9, 9, 9, -0.15]))
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"reads the output of fc\.weight's layer directly, found 0"):
        prune(model, 0.5, criterion=BNScale(x), pattern="filter")
    with pytest.raises(ValueError, match='pattern must be "filter", got Block'):
        prune(model, 0.5, criterion=BNScale(x))
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    prune(model, 27 + 2 * 72, criterion=BNScale((x,)), pattern="filter", exclude=("fc",))
    kept = [get_mask(layer).flatten(1).any(1) for layer in (model.conv1, model.conv2)]
    assert [(~filters).nonzero().flatten().tolist() for filters in kept] == [[2], [0, 7]]
    assert model.training and model.bn1.training and torch.equal(model.bn1.running_mean, state["bn1.running_mean"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_norms_that_give_no_answer() -> None:
    x = torch.randn(2, 3, 8, 8)
    without = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    with pytest.raises(ValueError, match=r"after 0\.weight has no scale"):
        prune(without, 0.5, criterion=BNScale(x), pattern="filter")
    between = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="found 0"):
        prune(between, 0.5, criterion=BNScale(x), pattern="filter")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            result: Tensor = self.a(x) + self.b(x)
            return result

    with pytest.raises(ValueError, match="found 2"):
        prune(Two(), 0.5, criterion=BNScale(x), pattern="filter")


# --- the user's own --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, text", [("taylor", r"Taylor\(batches\)"), ("bnscale", r"BNScale\(example_inputs\)")])
def test_names_of_criteria_that_need_data(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"criterion='{name}' needs data: pass pruning.{text}"):
        prune(network(), 0.5, criterion=name)


def test_own_criteria_of_weights_and_of_units() -> None:
    class Negative(Criterion):
        def scores(
            self, model: nn.Module, weights: Mapping[str, Tensor], generator: torch.Generator | None
        ) -> Mapping[str, Tensor]:
            return {name: -weight.abs() for name, weight in weights.items()}

    class LastFilters(Criterion):
        def unit_scores(
            self, model: nn.Module, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor],
            patterns: Mapping[str, Pattern], generator: torch.Generator | None,
        ) -> Mapping[str, Tensor]:  # fmt: skip
            return {name: -torch.arange(float(len(p.reduce(kept[name].float())))) for name, p in patterns.items()}

    layer = nn.Linear(3, 4)
    layer.weight.data = torch.arange(1.0, 13).reshape(4, 3)
    for criterion in (Negative(), LastFilters(), Scores({"weight": -layer.weight.data})):
        mask = get_mask(prune(copy.deepcopy(layer), 0.5, criterion=criterion, pattern="filter"))
        assert mask.all(1).tolist() == [True, True, False, False]
    with pytest.raises(NotImplementedError, match="Criterion must define scores or unit_scores"):
        prune(layer, 0.5, criterion=Criterion())

    class Short(LastFilters):
        def unit_scores(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
            return {"weight": torch.zeros(3)}

    with pytest.raises(ValueError, match=r"scores for weight have shape \(3,\), expected \(4,\)"):
        prune(layer, 0.5, criterion=Short(), pattern="filter")
