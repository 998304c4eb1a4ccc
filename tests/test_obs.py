"""OBS: which weights go, what becomes of the others, and that nothing else is touched."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

from sparseprune.pruning import OBS, Criterion, Pruner, finalize, get_mask, prune, summary
from sparseprune.pruning.moments import input_vectors
from sparseprune.pruning.obs import masked_least_squares

DAMPING = 0.01


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny layers: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def correlated(examples: int, features: int, seed: int = 0) -> Tensor:
    """Inputs that predict each other, as activations do: otherwise there is nothing to make up for."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(features // 3 + 1, features, generator=generator, dtype=torch.float64)
    hidden = torch.randn(examples, len(mixed), generator=generator, dtype=torch.float64)
    return hidden @ mixed + 0.3 * torch.randn(examples, features, generator=generator, dtype=torch.float64)


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 16, 3, groups=2, stride=2), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    return model.double()


def images(examples: int = 24, seed: int = 1) -> Tensor:
    rough = torch.randn(examples, 3, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.interpolate(rough, size=9, mode="bilinear")


def obs(*batches: Any, **options: Any) -> OBS:
    return OBS(list(batches), progress=False, **options)


def exact(weight: Tensor, mask: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Row by row: min |w y - v x|^2 / n + damping |v - w|^2 under the mask, by a dense solver. x, y: (n, K)."""
    y = x if y is None else y
    hessian, cross = x.T @ x / len(x), y.T @ x / len(x)
    damped = DAMPING * hessian.diagonal().mean()
    result = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        matrix = hessian[kept][:, kept] + damped * torch.eye(int(kept.sum()), dtype=x.dtype)
        result[row, kept] = torch.linalg.solve(matrix, (weight[row] @ cross + damped * weight[row])[kept])
    return result


def error(before: nn.Module, after: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((before(x) - after(x)).square().mean() / before(x).square().mean())


def mask_of(module: nn.Module) -> Tensor:
    mask = get_mask(module)
    assert mask is not None
    return mask


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a call that fails must leave as it was."""
    values = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules() if "parametrizations" not in name}
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return {"values": values, "gradients": gradients, "modes": modes, "hooks": hooks, "rng": torch.get_rng_state()}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(torch.equal(a, b)) if isinstance(a, Tensor) else bool(a == b)


def test_linear_layer_is_the_least_squares_solution_and_beats_magnitude() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(30, 8).double(), correlated(200, 30)
    ours = prune(copy.deepcopy(layer), 0.7, criterion=obs(x, patches=None))
    mask = mask_of(ours)
    assert int((~mask).sum()) == 168 and torch.equal(ours.bias, layer.bias)
    torch.testing.assert_close(ours.weight, exact(layer.weight.detach(), mask, x), rtol=1e-9, atol=1e-9)
    magnitude = prune(copy.deepcopy(layer), 0.7)
    refitted = copy.deepcopy(layer)
    refitted.weight.data = exact(layer.weight.detach(), mask_of(magnitude), x)
    assert error(layer, ours, x) < 0.7 * error(layer, refitted, x)  # the choice alone
    assert error(layer, ours, x) < 0.1 * error(layer, magnitude, x)


def test_choice_sees_what_others_can_make_up_for() -> None:
    """Two copies of one input, with large weights, can do each other's work: one of them goes first."""
    x = correlated(100, 4)
    x[:, 1] = x[:, 0]
    layer = nn.Linear(4, 1, bias=False).double()
    layer.weight.data = torch.tensor([[2.0, 2.0, 0.7, -0.7]], dtype=torch.float64)
    assert mask_of(prune(copy.deepcopy(layer), 2))[0].tolist() == [True, True, False, False]
    after = prune(copy.deepcopy(layer), 1, criterion=obs(x))
    assert error(layer, after, x) < 0.05


@pytest.mark.parametrize("options", [
    {}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": (2, 1)}, {"groups": 2, "padding": "same"},
    {"groups": 6, "stride": (1, 2)}, {"padding": "valid", "kernel_size": (2, 3)},
    {"padding": "same", "kernel_size": (2, 4), "dilation": (1, 2)}, {"padding": 1, "padding_mode": "reflect"},
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_convolutions_against_unfold(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    settings = {"kernel_size": 3, **options}
    layer = nn.Conv2d(6, 12, **settings).double()
    x = torch.randn(10, 6, 8, 7, dtype=torch.float64)
    x = F.avg_pool2d(x, 3, 1, 1)
    after = prune(copy.deepcopy(layer), 0.6, criterion=obs(x[:4], x[4:], patches=None))
    mask = mask_of(after)
    # The reference: im2col of an image that is padded before.
    kernel, padded = layer.kernel_size, x
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        mode = "reflect" if "padding_mode" in options else "constant"
        padded = F.pad(x, layer._reversed_padding_repeated_twice, mode)
        margin: Any = 0
    else:
        margin = layer.padding
    columns = F.unfold(padded, kernel, layer.dilation, margin, layer.stride)  # (N, in * kh * kw, positions)
    columns = columns.transpose(1, 2).flatten(0, 1).reshape(-1, layer.groups, layer.weight[0].numel())
    rows, kept = (t.detach().reshape(layer.groups, -1, columns.shape[2]) for t in (layer.weight, mask))
    expected = torch.stack([exact(rows[g], kept[g], columns[:, g]) for g in range(layer.groups)])
    torch.testing.assert_close(after.weight.reshape(expected.shape), expected, rtol=1e-8, atol=1e-9)
    nonzero: Any = after.weight != 0
    assert torch.equal(nonzero, mask)


def test_patches_are_drawn_from_all_positions_of_all_examples() -> None:
    x = torch.arange(5 * 4 * 4, dtype=torch.float64).reshape(5, 1, 4, 4)
    generator = torch.Generator().manual_seed(0)
    (all_of_them,) = input_vectors(x, (1, 1, 1, 1), patches=None, generator=generator)
    assert torch.equal(all_of_them.flatten().sort().values, x.flatten())
    (some,) = input_vectors(x, (1, 1, 1, 1), patches=6, generator=generator)
    drawn = {int(value) for value in some.flatten()}
    assert some.shape == (1, 30, 1) and len(drawn) == 30
    assert len({value // 16 for value in drawn}) == 5 and len({value % 16 for value in drawn}) > 8
    (tokens,) = input_vectors(torch.randn(3, 7, 4), (2, 4), patches=2, generator=generator)
    assert tokens.shape == (1, 6, 4)


@pytest.mark.parametrize("sequential", [True, False])
def test_networks(sequential: bool) -> None:
    model, x = network().eval(), images(64)
    ours = prune(copy.deepcopy(model), 0.6, criterion=obs(x[:32], x[32:], sequential=sequential))
    counts = summary(ours)
    assert counts.total - counts.kept == round(0.6 * counts.total)
    fresh = images(64, seed=2)
    magnitude = prune(copy.deepcopy(model), 0.6)
    assert error(model, ours, fresh) < 0.5 * error(model, magnitude, fresh)
    for name, value in model.state_dict().items():
        if "weight" not in name or name.startswith("1."):  # biases and BatchNorm
            assert torch.equal(ours.state_dict()[name], value)


def test_later_layers_make_up_for_earlier_ones() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 5)).double()
    x = correlated(300, 20)
    ours = prune(copy.deepcopy(model), 0.6, scope="local", criterion=obs(x, patches=None))
    given, due = torch.tanh(ours[0](x)).detach(), torch.tanh(model[0](x)).detach()
    expected = exact(model[2].weight.detach(), mask_of(ours[2]), given, due)
    torch.testing.assert_close(ours[2].weight, expected, rtol=1e-8, atol=1e-9)
    alone = prune(copy.deepcopy(model), 0.6, scope="local", criterion=obs(x, patches=None, sequential=False))
    assert torch.equal(mask_of(alone[2]), mask_of(ours[2])) and error(model, ours, x) < error(model, alone, x)


@pytest.mark.parametrize("pattern", ["1x1", "4x1", "2x3", "2:4", "filter", "channel"])
@pytest.mark.parametrize("scope", ["global", "local", "erk"])
def test_every_scope_and_pattern(pattern: str, scope: str) -> None:
    if pattern == "2:4" and scope == "erk":
        pytest.skip("2:4 fixes every layer's sparsity")
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8)).double()
    x = correlated(100, 24)
    options: Any = {"pattern": pattern, "scope": scope}
    ours = prune(copy.deepcopy(model), 0.5, criterion=obs(x), **options)
    magnitude = prune(copy.deepcopy(model), 0.5, **options)
    assert abs(summary(ours).kept - summary(magnitude).kept) <= 6  # 2x3 has smaller blocks at the edge
    if scope == "global" and pattern != "2:4":  # layers compare as by magnitude
        pairs = zip(summary(ours).layers, summary(magnitude).layers, strict=True)
        assert all(abs(a.kept - b.kept) <= 16 for a, b in pairs)
    assert error(model, ours, x) < error(model, magnitude, x)
    for layer in (ours[0], ours[2]):
        nonzero: Tensor = layer.weight != 0
        assert torch.equal(nonzero, mask_of(layer))


def test_again_and_further() -> None:
    model, x = network().eval(), images()
    prune(model, 0.5, criterion=obs(x))
    before = copy.deepcopy(model.state_dict())
    prune(model, 0.5, criterion=obs(x))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    prune(model, 0.8, criterion=obs(x))
    for name, value in before.items():
        if name.endswith("mask"):
            assert not bool((model.state_dict()[name] & ~value).any())
    assert summary(model).kept == summary(prune(network(), 0.8)).kept


def test_nothing_to_prune_changes_nothing() -> None:
    model = network()
    before = everything(model)
    prune(model, 0.0, criterion=obs(images()))
    assert same(before, everything(model))


def test_gradients_modes_statistics_and_random_state_stay() -> None:
    model = network().train()
    model[2].eval()
    model(images()).square().mean().backward()
    before = everything(model)
    loader = DataLoader(TensorDataset(images(), torch.zeros(24)), batch_size=5, shuffle=True)
    prune(model, 0.5, criterion=OBS(loader, progress=False), exclude="8")
    after = everything(model)
    assert same(before["modes"], after["modes"]) and torch.equal(before["rng"], after["rng"])
    for name, gradient in before["gradients"].items():
        new = name.replace(".weight", ".parametrizations.weight.original")
        kept = after["gradients"].get(name, after["gradients"].get(new))
        assert gradient is None or torch.equal(kept, gradient)
    assert all(torch.equal(value, after["values"][name]) for name, value in before["values"].items() if name[0] in "18")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.relu(self.first(x)))
        return result


def test_tied_weights_are_fitted_to_both_uses() -> None:
    torch.manual_seed(0)
    model, x = Tied().double(), correlated(80, 12)
    ours = prune(copy.deepcopy(model), 0.5, criterion=obs(x, sequential=False, patches=None))
    assert torch.equal(ours.first.weight, ours.second.weight)
    inputs = torch.cat([x, torch.relu(model.first(x)).detach()])
    expected = exact(model.first.weight.detach(), mask_of(ours.first), inputs)
    torch.testing.assert_close(ours.first.weight, expected, rtol=1e-8, atol=1e-9)
    again = prune(ours, 0.75, criterion=obs(x))  # now each has a parametrization of its own
    assert torch.equal(again.first.weight, again.second.weight) and int(mask_of(again.first).sum()) == 36
    assert error(model, again, x) < error(model, prune(copy.deepcopy(model), 0.75), x)


def test_torch_prune_hooks_and_half_precision() -> None:
    hooked = network().eval()
    torch_prune.l1_unstructured(hooked[4], "weight", 0.5)  # type: ignore[no-untyped-call]
    gone = hooked[4].weight == 0
    prune(hooked, 0.7, criterion=obs(images()))
    assert not bool((hooked[4].weight[gone] != 0).any()) and not hooked[4]._forward_pre_hooks
    half = network().to(torch.bfloat16).eval()
    prune(half, 0.7, criterion=obs(images().to(torch.bfloat16)))
    assert half[0].weight.dtype == torch.bfloat16
    full = network().eval()
    assert error(full, finalize(half).double(), images()) < error(full, prune(network().eval(), 0.7), images())


def test_pruner_takes_it() -> None:
    model, x = network(), images()
    pruner = Pruner(model, 0.8, steps=3, schedule="iterative", criterion=obs(x))
    for _ in range(3):
        pruner.step()
    assert summary(model).kept == summary(prune(network(), 0.8)).kept


def test_what_batches_may_be() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 6)).double()
    x = correlated(40, 6)
    expected = prune(copy.deepcopy(model), 0.5, criterion=obs(x))[0].weight
    for batches in ([(x, torch.zeros(40))], [[x]], [{"input": x}], iter([x])):
        assert torch.equal(prune(copy.deepcopy(model), 0.5, criterion=OBS(batches, progress=False))[0].weight, expected)


def test_dead_inputs_go_first_and_a_dead_layer_goes_by_magnitude() -> None:
    torch.manual_seed(0)
    x = correlated(50, 10)
    x[:, :5] = 0
    layer = prune(nn.Linear(10, 4).double(), 0.5, criterion=obs(x))
    assert not bool(mask_of(layer)[:, :5].any()) and bool(mask_of(layer)[:, 5:].all())
    dead = nn.Linear(10, 4).double()
    kept = dead.weight.detach().clone()
    prune(dead, 0.5, criterion=obs(torch.zeros(8, 10, dtype=torch.float64)))
    magnitude = kept.abs() >= kept.abs().flatten().kthvalue(21).values
    assert torch.equal(mask_of(dead), magnitude)
    torch.testing.assert_close(dead.weight, torch.where(magnitude, kept, 0))


def test_fewer_examples_than_weights() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(40, 4).double(), correlated(5, 40)
    after = prune(copy.deepcopy(layer), 0.5, criterion=obs(x))
    torch.testing.assert_close(after.weight, exact(layer.weight.detach(), mask_of(after), x), rtol=1e-8, atol=1e-9)
    assert error(layer, after, x) < 1e-3


def test_rows_that_lose_everything_and_rows_that_lose_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    x = correlated(60, 9).unsqueeze(0)
    hessian = x.mT @ x / 60 + 0.1 * torch.eye(9, dtype=torch.float64)
    target = torch.randn(1, 3, 9, generator=generator, dtype=torch.float64)
    mask = torch.ones(1, 3, 9, dtype=torch.bool)
    mask[0, 0] = False
    values = masked_least_squares(hessian, target, torch.zeros_like(target), mask, 100)
    assert not bool(values[0, 0].any())
    torch.testing.assert_close(values[0, 1:], target[0, 1:] @ torch.linalg.inv(hessian[0]), rtol=1e-8, atol=1e-9)


class Part(nn.Module):
    """`unused` never runs, and `table` is an embedding as well."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.embedding, self.table = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.table.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.table(self.used(self.embedding(tokens)))
        return result


BAD = float("nan")


@pytest.mark.parametrize(("make", "batches", "options", "message"), [
    (network, [], {}, "batches is empty"),
    (network, [images() * BAD], {}, r"inputs of the layer with 0\.weight are NaN"),
    (network, [images(), images() * float("inf")], {}, r"inputs of the layer with 0\.weight are NaN, infinite"),
    (network, [images()], {"include": nn.BatchNorm2d}, r"never reach a conv2d or linear call with 1\.weight"),
    (network, [images()], {"parameters": ("weight", "bias")}, r"never reach .* 0\.bias"),
    (network, [images()[:, :2]], {}, "channels"),  # torch's own
    (Part, [torch.arange(6)], {"exclude": "table"}, r"never reach a conv2d or linear call with unused\.weight"),
    (Part, [torch.arange(6)], {"exclude": "unused"}, r"(embedding|table)\.weight is an embedding table"),
    (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), [torch.ones(2, 4)], {}, "weight_norm"),
])  # fmt: skip
@pytest.mark.parametrize("sequential", [True, False])
def test_errors_change_nothing(make: Any, batches: Any, options: Any, message: str, sequential: bool) -> None:
    torch.manual_seed(0)
    model = make()
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = everything(model)
    with pytest.raises((ValueError, RuntimeError), match=message):
        prune(model, 0.5, criterion=obs(*batches, sequential=sequential), **options)
    assert same(before, everything(model))


class Fickle(nn.Module):
    """Runs its second layer on as many rows as the first one's output has large entries."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        result: Tensor = self.second(y[y.sum(1) > 0])
        return result


def test_inputs_that_depend_on_the_pruning() -> None:
    torch.manual_seed(0)
    model, x = Fickle(), torch.randn(200, 8)
    before = everything(model)
    with pytest.raises(ValueError, match=r"second\.weight is given inputs of other shapes .* sequential=False"):
        prune(model, 0.7, criterion=obs(x))
    assert same(before, everything(model))
    prune(model, 0.7, criterion=obs(x, sequential=False))


@pytest.mark.parametrize("batches", [torch.ones(2, 3), "batches", {"x": torch.ones(2)}, 3, nn.Linear(2, 2)])
def test_batches_of_the_wrong_kind(batches: Any) -> None:
    with pytest.raises(TypeError, match="batches must be an iterable"):
        OBS(batches)


def test_a_batch_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match="batches must yield inputs"):
        prune(network(), 0.5, criterion=obs("an image"))
    with pytest.raises(ValueError, match=r"needs data: pass pruning.OBS\(batches\)"):
        prune(network(), 0.5, criterion="obs")


@pytest.mark.parametrize("options", [
    {"damping": 0}, {"damping": -1}, {"damping": BAD}, {"damping": "much"}, {"damping": True}, {"patches": 0},
    {"patches": 1.5}, {"patches": True},
])  # fmt: skip
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        OBS([], **options)


class Meddler(Criterion):
    """A criterion of a user's own, whose updates are wrong."""

    def __init__(self, update: Tensor) -> None:
        self.update = update

    def scores(self, model: Any, weights: Any, generator: Any) -> Any:
        return {name: weight.abs() for name, weight in weights.items()}

    def finish(self, model: Any, weights: Any, masks: Any) -> Any:
        return {name: self.update for name in weights}


def test_updates_of_a_users_own_criterion() -> None:
    for update, message in ((torch.ones(2, 2), "shape"), (torch.full((4, 4), BAD), "NaN")):
        layer = nn.Linear(4, 4)
        before = everything(layer)
        with pytest.raises(ValueError, match=f"update of weight .*{message}"):
            prune(layer, 0.5, criterion=Meddler(update))
        assert same(before, everything(layer))
    layer = prune(nn.Linear(4, 4), 0.5, criterion=Meddler(torch.ones(4, 4)))
    assert torch.equal(layer.weight, mask_of(layer).float())
