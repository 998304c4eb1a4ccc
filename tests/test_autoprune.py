"""`autoprune`, its latency table and its dynamic programme, and `sensitivity`. No measured time is judged."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparseprune
from sparseprune import conversion, latency, profiling, timing
from sparseprune.allocation import allocate, quadratic_prior, search_coefficients, search_length
from sparseprune.candidates import Candidates
from sparseprune.errors import FormatError, SparsepruneWarning, UnsupportedError
from sparseprune.latency import LatencyTable, LayerLatency, non_increasing, pruned_count
from sparseprune.pruning import get_mask

GRID = (0.0, 0.5, 0.9, 0.99)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def weight(model: nn.Module, layer: str) -> torch.Tensor:
    found = model.get_submodule(layer).weight
    assert isinstance(found, torch.Tensor)
    return found.detach()


def mask_of(model: nn.Module, layer: str) -> torch.Tensor:
    found = get_mask(model.get_submodule(layer))
    assert found is not None
    return found


SHAPES = {"0": (8, 1, 3, 3), "3": (16, 8, 3, 3), "8": (10, 64)}
DENSE = {"0": 1.0, "3": 4.0, "8": 0.2}  # ms
X = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module", autouse=True)
def hasty() -> Iterator[None]:
    """Measuring is exercised, but no time is judged: it may be as rough as it likes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_SECONDS", 0.002), ("_ROUNDS", 2)):
            patch.setattr(profiling, name, value)
        patch.setattr(conversion, "TUNE_SECONDS", 0.05)
        yield


def fake_table(**changes: Any) -> LatencyTable:
    """Times in proportion to the density, and 0.5 ms that stay."""
    fields: dict[str, Any] = {
        "sparsities": GRID,
        "layers": {n: LayerLatency(SHAPES[n], tuple(ms * (1 - s) for s in GRID)) for n, ms in DENSE.items()},
        "rest_ms": 0.5,
        "whole_ms": tuple(0.5 + sum(DENSE.values()) * (1 - s) for s in GRID),
        "dense_ms": 4.0,
        "dense_layout": "channels_last",
        "threads": 1,
        "input_shapes": ((1, 1, 8, 8),),
        "machine": timing.machine(),
    }
    return LatencyTable(**{**fields, **changes})


def calibration() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(16, 1, 8, 8, generator=generator), torch.arange(16) % 10)]


# ---- dynamic programming ----


def brute_force(errors: np.ndarray, costs: np.ndarray, budget: float) -> float:
    best = math.inf
    for chosen in itertools.product(range(errors.shape[1]), repeat=errors.shape[0]):
        rows = range(len(chosen))
        if costs[rows, chosen].sum() <= budget:
            best = min(best, errors[rows, chosen].sum())
    return best


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    layers, options = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    numbers = st.lists(st.integers(0, 20), min_size=layers * options, max_size=layers * options)
    errors, costs = (np.array(draw(numbers), float).reshape(layers, options) for _ in "ab")
    return errors, costs


@given(problems(), st.integers(1, 80))
@settings(deadline=None, max_examples=100)
def test_allocate_is_optimal_where_costs_are_whole_buckets(problem: tuple[np.ndarray, np.ndarray], budget: int) -> None:
    errors, costs = problem
    expected = brute_force(errors, costs, budget)
    if math.isinf(expected):
        with pytest.raises(ValueError, match="lowest reachable"):
            allocate(errors, costs, budget, buckets=budget)
        return
    chosen = allocate(errors, costs, budget, buckets=budget)
    rows = range(len(chosen))
    assert costs[rows, chosen].sum() <= budget and errors[rows, chosen].sum() == expected


@given(problems(), st.floats(0.1, 80), st.floats(0.01, 3))
@settings(deadline=None, max_examples=100)
def test_allocate_stays_within_the_budget_and_loses_only_to_rounding(
    problem: tuple[np.ndarray, np.ndarray], budget: float, scale: float
) -> None:
    errors, costs = problem[0], problem[1] * scale
    if costs.min(axis=1).sum() > budget:
        return
    buckets = 50
    chosen = allocate(errors, costs, budget, buckets=buckets)
    rows = range(len(chosen))
    assert costs[rows, chosen].sum() <= budget * (1 + 1e-9)
    dearer = costs + budget / buckets * (costs > 0)
    if dearer.min(axis=1).sum() <= budget:
        assert errors[rows, chosen].sum() <= brute_force(errors, dearer, budget) + 1e-9


def test_allocate_takes_no_forbidden_option_and_checks_its_arguments() -> None:
    errors = np.array([[0.0, math.inf, 2.0], [math.inf, 1.0, 2.5]])
    costs = np.array([[5.0, 0.0, 1.0], [0.0, 4.0, 1.0]])
    assert allocate(errors, costs, 9.01) == [0, 1]
    assert allocate(errors, costs, 6.01) == [0, 2]
    assert allocate(errors, costs, 5.01) == [2, 1]
    assert allocate(errors, costs, 2.01) == [2, 2]
    with pytest.raises(ValueError, match="below the lowest reachable sum of costs, 2"):
        allocate(errors, costs, 1.9)
    assert allocate(np.zeros((2, 1)), np.zeros((2, 1)), 0.0) == [0, 0]
    for bad in (np.array([[np.nan]]), np.array([[-1.0]])):
        with pytest.raises(ValueError, match="at least 0"):
            allocate(bad, np.ones((1, 1)), 1.0)
        with pytest.raises(ValueError, match="at least 0"):
            allocate(np.ones((1, 1)), bad, 1.0)
    with pytest.raises(ValueError, match="one shape"):
        allocate(np.ones((2, 2)), np.ones((2, 3)), 1.0)


def test_rounding_up_alone_does_not_make_a_budget_unreachable() -> None:
    costs = np.full((30, 1), 1.0 / 30)  # fills the budget exactly, in steps of 1 / 7
    assert allocate(np.ones((30, 1)), costs, float(costs.sum()), buckets=7) == [0] * 30


def test_the_prior_and_the_search_for_its_coefficients() -> None:
    sparsities = np.array([[0.0, 0.9, 0.99]] * 3)
    prior = quadratic_prior(sparsities, 0.99)
    assert prior[0].tolist() == pytest.approx([0.0, 0.25, 1.0])
    costs = np.array([[3.0, 2.0, 1.0]] * 3)
    calls: list[tuple[int, ...]] = []

    def score(chosen: Sequence[int]) -> float:  # the last layer must stay dense; one answer is not a number
        calls.append(tuple(chosen))
        return math.nan if chosen[0] == 2 else float(2 * chosen[2] + chosen[1])

    lowest: list[float] = []
    coefficients = search_coefficients(
        score, prior, costs, 6.01, trials=60, generator=np.random.default_rng(0), step=lowest.append
    )
    assert allocate(coefficients[:, None] * prior, costs, 6.01)[2] == 0
    assert len(calls) == len(set(calls)) and len(lowest) == search_length(3, 60) == 120
    assert lowest == sorted(lowest, reverse=True)
    again = search_coefficients(score, prior, costs, 6.01, trials=60, generator=np.random.default_rng(0))
    assert np.array_equal(again, coefficients)


# ---- the latency table ----


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12))
def test_isotonic_regression(values: list[float]) -> None:
    smooth = non_increasing(values)
    assert len(smooth) == len(values) and all(b <= a + 1e-12 for a, b in zip(smooth, smooth[1:], strict=False))
    assert sum(smooth) == pytest.approx(sum(values))
    assert non_increasing(smooth) == pytest.approx(smooth)
    if values == sorted(values, reverse=True):
        assert smooth == values


def test_predictions_interpolate_over_density_and_never_rise() -> None:
    table = fake_table()
    assert table.predict({}) == pytest.approx(5.7) and table.predict({"3": 0.5}) == pytest.approx(3.7)
    assert table.predict({"3": 0.75, "0": 1.0}) == pytest.approx(0.5 + 1.0 + 0.2 + 0.01)
    noisy = fake_table(layers={"0": LayerLatency((8, 1, 3, 3), (4.0, 1.0, 3.0, 0.5))})
    assert noisy.layer_ms("0", 0.5) == noisy.layer_ms("0", 0.9) == pytest.approx(2.0)
    assert noisy.layers["0"].ms == (4.0, 1.0, 3.0, 0.5)  # as measured
    with pytest.raises(ValueError, match="'nothing' is not in the latency table; it has"):
        table.predict({"nothing": 0.5})
    with pytest.raises(ValueError, match=r"sparsity=1.5 of '0' is not in \[0, 1\]"):
        table.predict({"0": 1.5})


def test_a_table_is_saved_and_loaded(tmp_path: Path) -> None:
    table, path = fake_table(), tmp_path / "table.json"
    table.save(path)
    assert LatencyTable.load(path) == table and [file.name for file in tmp_path.iterdir()] == ["table.json"]
    text = str(table)
    assert all(part in text for part in ("rest", "sum", "whole", "99.0%", "dense torch 4.000 (channels_last)"))


@pytest.mark.parametrize("text", [
    "", "[]", "{}", "nonsense", '{"format": "sparseprune latency table, version 1"}', "\xff",
])  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=r"bad\.json is no latency table"):
        LatencyTable.load(tmp_path / "bad.json")


@pytest.mark.parametrize("change", [
    {"sparsities": [0, 0.9, 0.5, 0.99]}, {"layers": {}}, {"rest_ms": -1}, {"whole_ms": [1]}, {"threads": 0},
    {"layers": {"0": {"shape": [1], "ms": [1, 2]}}}, {"layers": {"0": {"shape": [1], "ms": [1, 2, 3, "x"]}}},
    {"layers": 3}, {"machine": 1}, {"dense_ms": float("nan")},
])  # fmt: skip
def test_damaged_tables_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({**fake_table().to_dict(), **change}))
    with pytest.raises(FormatError, match="is no latency table"):
        LatencyTable.load(path)


@pytest.mark.parametrize("grid", [(), (0.5, 0.5), (0.9, 0.5), (-0.1,), (1.0,), (float("nan"),)])
def test_grids_ascend(grid: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="sparsities must ascend"):
        LatencyTable.measure(network(), X, sparsities=grid, progress=False)


def test_counts_keep_one_weight() -> None:
    assert [pruned_count(s, 10) for s in (0.0, 0.26, 0.99)] == [0, 3, 9] and pruned_count(0.9, 1) == 0


@pytest.fixture(scope="module")
def measured(hasty: None) -> LatencyTable:
    return LatencyTable.measure(network().eval(), X, sparsities=(0.0, 0.9), threads=1, progress=False)


def test_a_measured_table(measured: LatencyTable) -> None:
    assert {name: layer.shape for name, layer in measured.layers.items()} == SHAPES
    assert measured.threads == 1 and measured.input_shapes == ((1, 1, 8, 8),)
    assert measured.dense_ms > 0 and measured.dense_layout in ("eager", "channels_last")
    for place in range(2):  # the parts add up
        parts = sum(layer.ms[place] for layer in measured.layers.values())
        assert parts > 0 and parts + measured.rest_ms == pytest.approx(measured.whole_ms[place])


class Twice(nn.Module):
    """A layer that is called twice, tied weights, and one that `exclude` leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.tied = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.second.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(torch.relu(self.first(x)))
        y: torch.Tensor = self.tied(torch.relu(self.second(torch.relu(x))))
        return y


def test_calls_and_ties_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Twice()
    (found,), dense_ms, layout = profiling.profile_models([model], (torch.zeros(1, 8),))
    assert set(found.layers) == {"first", "second", "tied"} and found.whole > 0
    assert dense_ms > 0 and layout in ("eager", "channels_last")
    fake = profiling.Profile({"first": 2.0, "second": 3.0, "tied": 4.0}, 10.0)
    monkeypatch.setattr("sparseprune.latency.profile_models", lambda *_: ([fake], 20.0, "eager"))
    table = LatencyTable.measure(model, torch.zeros(1, 8), sparsities=(0.0,), progress=False)
    assert table.layers == {"first": LayerLatency((8, 8), (2.0,)), "second": LayerLatency((8, 8), (7.0,))}
    assert table.rest_ms == pytest.approx(1.0)
    table = LatencyTable.measure(model, torch.zeros(1, 8), sparsities=(0.0,), exclude="first", progress=False)
    assert list(table.layers) == ["second"] and table.rest_ms == pytest.approx(3.0)


class Hopeless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(x)
        return y if float(y.sum()) > 1e9 else -y


def test_a_model_of_which_no_program_can_be_made_is_refused() -> None:
    with warnings.catch_warnings(), pytest.raises(UnsupportedError, match="needs a native program"):
        warnings.simplefilter("ignore", SparsepruneWarning)  # it is given once a process
        LatencyTable.measure(Hopeless(), torch.zeros(1, 4), sparsities=(0.0,), progress=False)


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(torch.sort(self.a(x)).values)
        return y


def test_segments_are_profiled_too() -> None:
    with pytest.warns(SparsepruneWarning, match="segments"):
        (found,), _, _ = profiling.profile_models([Sorted()], (torch.zeros(1, 8),))
    assert set(found.layers) == {"a", "b"}


# ---- candidates ----


def candidates(model: nn.Module, counts: list[list[int]]) -> Candidates:
    names = ("0.weight", "3.weight")

    def prune(other: nn.Module, amounts: list[int]) -> None:
        wanted = dict(zip(names, amounts, strict=True))
        sparseprune.prune(other, 0, include=tuple(names), amounts=wanted)

    return Candidates(model, names, np.array(counts), prune)


COUNTS = [[0, 36, 71], [0, 1000, 1100]]


def test_candidates_are_what_prune_gives() -> None:
    model = network().eval()
    found = candidates(model, COUNTS)
    for option in range(3):
        amounts = {"0": COUNTS[0][option], "3": COUNTS[1][option]}
        twin = sparseprune.prune(copy.deepcopy(model), 0, include=("0", "3"), amounts=amounts)
        for layer, name in enumerate("03"):
            assert torch.equal(found._weight(layer, option), weight(twin, name))
    errors = found.magnitude_errors()
    squares = weight(model, "0").square().flatten().sort().values
    assert errors[:, 0].tolist() == [0, 0] and errors[0, 1] == pytest.approx(float(squares[:36].sum() / squares.sum()))
    assert (np.diff(errors) > 0).all() and (errors <= 1).all()


def test_output_errors_are_relative_to_what_the_weight_gives() -> None:
    model = network().eval()
    found, batches = candidates(model, COUNTS), calibration()
    errors = found.output_errors(batches)
    full, left = (nn.functional.conv2d(batches[0][0], w, padding=1) for w in (weight(model, "0"), found._weight(0, 1)))
    assert errors[0, 1] == pytest.approx(float((full - left).square().sum() / full.square().sum()), rel=1e-4)
    assert errors[:, 0].tolist() == [0, 0] and (errors[:, 2] > errors[:, 1]).all()
    assert torch.equal(weight(found.model, "0"), weight(model, "0"))
    assert not any(module._forward_hooks for module in found.model.modules())


def test_the_loss_of_a_choice_uses_the_batch_s_statistics() -> None:
    model, batches = network().eval(), calibration()
    found = candidates(model, COUNTS)
    loss = found.loss([1, 2], batches)
    twin = sparseprune.prune(copy.deepcopy(model), 0, include=("0", "3"), amounts={"0": 36, "3": 1100}).train()
    with torch.no_grad():
        expected = float(nn.functional.cross_entropy(twin(batches[0][0]), batches[0][1]))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert torch.equal(weight(found.model, "3"), weight(model, "3"))
    assert not any(module.training for module in found.model.modules())


def test_weights_that_a_criterion_updates_are_kept_as_they_are() -> None:
    model = network().eval()

    def prune(other: nn.Module, amounts: list[int]) -> None:
        sparseprune.prune(other, 0, include="3", amounts={"3": amounts[0]})
        if amounts[0]:
            other[3].parametrizations.weight.original.data.mul_(1.5)  # type: ignore[index,union-attr]

    found = Candidates(model, ["3.weight"], np.array([[0, 500, 900]]), prune)
    assert torch.equal(found._weight(0, 0), weight(model, "3"))
    for option, count in ((1, 500), (2, 900)):
        twin = copy.deepcopy(model)
        prune(twin, [count])
        assert torch.equal(found._weight(0, option), weight(twin, "3")) and int((weight(twin, "3") == 0).sum()) == count


# ---- autoprune ----


def by_table(model: nn.Module) -> float:
    """Predicted milliseconds of what is pruned now."""
    return fake_table().predict({name: count / math.prod(SHAPES[name]) for name, count in zeros(model).items()})


def run(model: nn.Module, **options: Any) -> sparseprune.AutopruneResult:
    given = {"table": fake_table(), "verify": False, "progress": False, **options}
    return sparseprune.autoprune(model, X, **given)


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((weight(model, name) == 0).sum()) for name in SHAPES}


@pytest.mark.parametrize("options", [
    {}, {"errors": "output", "batches": calibration()}, {"batches": calibration(), "trials": 4},
])  # fmt: skip
def test_the_prediction_is_within_the_target_and_the_masks_are_as_said(options: dict[str, Any]) -> None:
    model = network()
    result = run(model, latency_ms=2.0, **options)
    assert 1.7 < result.predicted_ms <= 2.0 == result.target_ms and result.measured_ms is None
    assert result.predicted_ms == pytest.approx(fake_table().predict(result.sparsities))
    for layer in result.layers:
        count, mask = zeros(model)[layer.name], get_mask(model.get_submodule(layer.name))
        assert layer.sparsity == count / math.prod(layer.shape) and (mask is None) == (count == 0)
    assert model.training and json.loads(json.dumps(result.to_dict()))["measured_ms"] is None
    assert "target 2.000 ms" in str(result) and "not measured" in str(result)


def test_what_costs_little_and_hurts_much_stays_dense() -> None:
    model = network()
    errors = {name: {s: (100.0 if name == "8" else 1.0) * s for s in GRID} for name in SHAPES}
    result = run(model, latency_ms=1.8, errors=errors)  # 1.3 ms for what takes 1, 4 and 0.2 ms dense
    assert result.sparsities == {"0": 0, "3": pruned_count(0.99, 1152) / 1152, "8": 0}
    assert [layer.error for layer in result.layers] == [0, 0.99, 0]


def test_speedup_is_relative_to_the_fastest_dense() -> None:
    result = run(network(), speedup=2)
    assert result.target_ms == pytest.approx(4.0 / 2) and result.dense_ms == 4.0


def test_excluded_layers_stay_and_their_time_counts() -> None:
    model = network()
    result = run(model, latency_ms=2.0, exclude="0")
    assert list(result.sparsities) == ["3", "8"] and zeros(model)["0"] == 0
    assert result.predicted_ms <= 2.0
    sparser = sparseprune.prune(network(), 0.5, include="0")
    assert run(sparser, latency_ms=2.0, exclude="0").sparsities["3"] < result.sparsities["3"]


def test_present_zeros_stay_and_count() -> None:
    model = sparseprune.prune(network(), 0.9, include=("0", "3"), scope="local")
    kept = {name: mask_of(model, name) for name in ("0", "3")}
    result = run(model, latency_ms=3.0)
    assert result.sparsities["3"] >= 0.9 and result.sparsities["8"] == 0
    assert all(torch.equal(mask_of(model, name), mask) for name, mask in kept.items())  # nothing more to do
    result = run(model, latency_ms=0.9, batches=calibration(), trials=2)
    assert result.predicted_ms <= 0.9 and sum(zeros(model).values()) > 65 + 1037
    assert not any(bool((mask_of(model, name) & ~mask).any()) for name, mask in kept.items())


@pytest.mark.parametrize(("options", "message"), [
    ({}, "exactly one of latency_ms and speedup"),
    ({"latency_ms": 2, "speedup": 2}, "exactly one"),
    ({"latency_ms": -1}, "latency_ms=-1"),
    ({"latency_ms": math.nan}, "latency_ms=nan"),
    ({"speedup": 1}, "speedup=1 must be above 1"),
    ({"latency_ms": 0.5}, r"0.5 ms cannot be reached: the lowest that the latency table predicts is 0\.55\d* ms"),
    ({"speedup": 100}, "cannot be reached"),
    ({"latency_ms": 4.5}, "needs no pruning: dense torch takes 4 ms"),
    ({"latency_ms": 2, "errors": "best"}, "errors='best' is not one of"),
    ({"latency_ms": 2, "errors": "search"}, "errors='search' needs batches"),
    ({"latency_ms": 2, "errors": {"0": {}}}, "sparsity 0.0 of layer '0' is missing"),
    ({"latency_ms": 2, "errors": {}}, "layer '0' is missing"),
    ({"latency_ms": 2, "errors": {n: dict.fromkeys(GRID, math.nan) for n in SHAPES}}, "at least 0"),
    ({"latency_ms": 2, "batches": []}, "batches is empty"),
    ({"latency_ms": 2, "threads": 3}, "threads=3, but the latency table was measured with 1"),
    ({"latency_ms": 2, "tolerance": 0}, "tolerance=0"),
    ({"latency_ms": 2, "rounds": 0}, "rounds=0"),
    ({"latency_ms": 2, "include": "nothing"}, "include='nothing' matches no layer"),
    ({"latency_ms": 2, "criterion": "best"}, "criterion"),
    ({"latency_ms": 2, "sparsities": (0.9, 0.5)}, "must ascend"),
    ({"latency_ms": 2, "table": fake_table(input_shapes=((2, 1, 8, 8),))}, "the latency table was measured with"),
    ({"latency_ms": 2, "table": fake_table(machine={"cpu": "another"}), "verify": True}, "of another machine"),
    ({"latency_ms": 2, "table": fake_table(layers={"0": LayerLatency((1, 2), (4.0, 3, 2, 1))})}, r"shape \(1, 2\)"),
    ({"latency_ms": 2, "table": fake_table(layers={"z": LayerLatency((1,), (4.0, 3, 2, 1))})}, "none of the layers"),
])  # fmt: skip
def test_bad_arguments_are_named_and_change_nothing(options: dict[str, Any], message: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        run(model, **options)
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {k: v.tolist() for k, v in before.items()}


@pytest.mark.parametrize(("options", "message"), [
    ({"speedup": "2"}, "speedup='2': expected a number, got str"),
    ({"latency_ms": True}, "latency_ms=True: expected a number"),
    ({"latency_ms": 2, "rounds": 1.5}, "rounds=1.5: expected a whole number, got float"),
    ({"latency_ms": 2, "tolerance": None}, "tolerance"),
])  # fmt: skip
def test_arguments_of_other_types_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        run(network(), **options)


def test_an_error_on_the_way_changes_nothing() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="errors must be"):
        run(model, latency_ms=2, errors=3)

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        run(model, latency_ms=2, batches=calibration(), loss=loss)
    weight(model, "3")[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="3.weight holds NaN"):
        run(model, latency_ms=2)
    assert list(model.state_dict()) == list(before)


# ---- its rounds of measuring ----


def measures(monkeypatch: pytest.MonkeyPatch, ms: Callable[[nn.Module], float]) -> None:
    """In place of converting and timing."""
    monkeypatch.setattr(latency, "Yardstick", lambda *_: types.SimpleNamespace(measure=ms))


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.0, 1.3, 2.0])
def test_budgets_are_corrected_until_the_target_is_met(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """The real times differ from the table's by a factor, in all that depends on the sparsities."""
    measures(monkeypatch, lambda model: 0.5 + factor * (by_table(model) - 0.5))
    model = network()
    fine = [1 - 0.01 ** (i / 24) for i in range(25)]
    result = run(model, latency_ms=2.0, verify=True, sparsities=fine)
    assert result.measured_ms == pytest.approx(2.0, rel=0.05)
    assert result.predicted_ms == pytest.approx(0.5 + 1.5 / factor, rel=0.08)
    assert (len(result.attempts) == 1) == (factor == 1.0)
    assert result.sparsities == {n: c / math.prod(SHAPES[n]) for n, c in zeros(model).items()}


def test_a_target_that_measuring_shows_to_be_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    measures(monkeypatch, lambda model: 3.0)
    model = network()
    with pytest.raises(ValueError, match=r"cannot be reached: with 99.00% zeros in every layer .* takes 3 ms"):
        run(model, latency_ms=2.0, verify=True)
    assert sum(zeros(model).values()) == 0


def test_the_nearest_is_taken_with_a_warning_where_measuring_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    measures(monkeypatch, lambda model: 1.7 if by_table(model) < 1.5 else 3.0)
    with pytest.warns(SparsepruneWarning, match="1.7 ms is the nearest to the target of 2 ms"):
        result = run(network(), latency_ms=2.0, verify=True)
    assert result.measured_ms == 1.7 and {a.measured_ms for a in result.attempts} == {1.7, 3.0}
    slow = [a.predicted_ms for a in result.attempts if a.measured_ms == 3.0]
    fast = [a.budget_ms for a in result.attempts if a.measured_ms == 1.7]
    assert min(slow) > max(fast)


def test_end_to_end_with_a_measured_table(measured: LatencyTable) -> None:
    model = network().eval()
    middle = (measured.predict({}) + measured.predict(dict.fromkeys(SHAPES, 0.9))) / 2
    table = dataclasses.replace(measured, dense_ms=max(measured.dense_ms, 2 * middle))  # whichever is faster, so small
    # Whatever a busy machine measures: one round, then its answer or its error.
    try:
        result = sparseprune.autoprune(
            model, X, latency_ms=middle, table=table, tolerance=0.99, batches=calibration(), trials=2, rounds=1,
            progress=False,
        )  # fmt: skip
    except ValueError as error:
        assert "cannot be reached" in str(error) and sum(zeros(model).values()) == 0
        return
    assert result.measured_ms is not None and result.measured_ms > 0 and result.predicted_ms <= middle
    assert f"measured {result.measured_ms:.3f}" in str(result) and len(result.attempts) == 1
    assert result.sparsities == {name: count / math.prod(SHAPES[name]) for name, count in zeros(model).items()}
    assert sum(zeros(model).values()) > 0


# ---- sensitivity ----


def test_sensitivity_prunes_one_layer_at_a_time(tmp_path: Path) -> None:
    model = network()
    seen: list[list[int]] = []

    def evaluate(copied: nn.Module) -> float:
        assert not copied.training and copied is not model
        seen.append(list(zeros(copied).values()))
        return 1 - sum(seen[-1]) / 2000

    found = sparseprune.sensitivity(model, evaluate, sparsities=GRID, table=fake_table(), progress=False)
    assert seen[0] == [0, 0, 0] and [0, 576, 0] in seen and all(sum(map(bool, row)) <= 1 for row in seen)
    assert len(seen) == 1 + 3 * 3 and sum(zeros(model).values()) == 0  # at 0 nothing changes
    assert [layer.name for layer in found.layers] == list(SHAPES) and found.base == 1.0
    assert found.base_ms == pytest.approx(5.7)
    middle = found.layers[1]
    assert middle.values == pytest.approx((1.0, 1 - 576 / 2000, 1 - 1037 / 2000, 1 - 1140 / 2000))
    assert middle.ms is not None and middle.ms == pytest.approx((4.0, 2.0, 0.4, 0.04), rel=0.05)
    found.save(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["layers"][1]["name"] == "3"
    assert "0.7120" in str(found) and "ms" in str(found)
    result = run(model, latency_ms=2.0, errors=found.errors(), sparsities=found.sparsities)
    assert result.sparsities["8"] == 0


def test_sensitivity_of_chosen_layers_keeps_present_zeros() -> None:
    model = sparseprune.prune(network(), 0.6, include="3")
    found = sparseprune.sensitivity(
        model, lambda m: -float(zeros(m)["3"]), sparsities=(0.5, 0.9), layers="3", progress=False
    )
    assert [layer.values for layer in found.layers] == [(-691.0, -1037.0)] and found.layers[0].ms is None
    assert found.errors() == {"3": {0.5: 0.0, 0.9: 346.0}} and "ms" not in str(found)


def test_sensitivity_measures_times_and_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = sparseprune.sensitivity(
        network().eval(), lambda m: math.nan, sparsities=(0.9,), layers="3", example_inputs=X, progress=False
    )
    assert found.base_ms is not None and found.layers[0].ms is not None and found.to_dict()["base"] is None
    found.plot(tmp_path / "plot.png")
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_sensitivity_wants_a_number() -> None:
    with pytest.raises(TypeError, match="evaluate must return a float, got str"):
        sparseprune.sensitivity(network(), lambda m: "good", progress=False)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="include='nothing'"):
        sparseprune.sensitivity(network(), lambda m: 1.0, layers="nothing", progress=False)


def test_n_of_m_leaves_no_choice_and_evaluate_comes_first() -> None:
    for call in (
        lambda: sparseprune.sensitivity(network(), lambda m: 1.0, pattern="2:4", progress=False),
        lambda: LatencyTable.measure(network(), X, pattern="2:4", progress=False),
        lambda: sparseprune.autoprune(network(), X, speedup=2.0, pattern="2:4", progress=False),
    ):
        with pytest.raises(ValueError, match='pattern "2:4" has one sparsity only, 0.5'):
            call()
    with pytest.raises(TypeError, match="evaluate must be a function"):
        sparseprune.sensitivity(network(), 0.9, progress=False)  # type: ignore[arg-type]


def test_a_layer_of_zeros() -> None:
    model = network()
    with torch.no_grad():
        model.get_submodule("3").weight.zero_()  # type: ignore[operator, union-attr]
    found = sparseprune.sensitivity(model, lambda m: float(sum(zeros(m).values())), sparsities=(0.0, 0.5),
                                    table=fake_table(), progress=False)  # fmt: skip
    assert found.layers[1].values == (1152.0, 1152.0)
    result = run(model, latency_ms=2.5)
    assert result.sparsities["3"] == 1.0 and zeros(model)["3"] == 1152
    table = LatencyTable.measure(model, X, sparsities=(0.0,), threads=1, include="3", progress=False)
    assert len(table.whole_ms) == 1
