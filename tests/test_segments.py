"""Models that are not wholly native: native and torch segments by turns, and single layers swapped."""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from old_torch import open_sizes
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import sparseprune
from sparseprune import (
    SparseModule,
    SparsepruneError,
    SparsepruneWarning,
    UnsupportedError,
    VerificationError,
    conversion,
    verification,
)
from sparseprune.graph.segmented import Segmented

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "TUNE_SECONDS", 0.05)


def made(kind: type[nn.Module], sparsity: float = 0.9) -> Any:
    torch.manual_seed(0)
    model = kind().eval()
    sparseprune.prune_uniform(model, sparsity, exclude=())
    return model


def converted(model: nn.Module, args: Any, **options: Any) -> SparseModule:
    """Converts; exactly one warning is given."""
    with pytest.warns(SparsepruneWarning) as caught:
        fast = sparseprune.convert(model, args, **{"tune": "fixed", **options})
        if not isinstance(args, tuple):
            args = (args,)
        check(fast, model, *args)
    found = [str(item.message) for item in caught]
    assert len(found) == 1, found
    assert caught[0].filename == __file__
    return fast


def check(fast: SparseModule, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The same nesting, dtypes and numbers as the model's."""
    with torch.no_grad():
        expected = model(*args, **kwargs)
    got = fast(*args, **kwargs)
    assert tree_map(lambda _: 0, got) == tree_map(lambda _: 0, expected)
    for y, want in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if not isinstance(want, Tensor):
            assert y == want
            continue
        assert y.dtype == want.dtype and y.shape == want.shape and not y.requires_grad
        if want.is_floating_point():
            assert torch.allclose(y, want, atol=1e-5, rtol=1e-4)
        else:
            assert torch.equal(y, want)


def kinds(fast: SparseModule) -> list[str]:
    return [segment.kind for segment in fast.report.segments]


# ---- segments


class Middle(nn.Module):
    """An operator that no program has, between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sort(self.first(x), dim=1)[0]
        y = self.second(y.flatten(2).reshape(y.shape)).relu()
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def middle() -> Any:
    return made(Middle)


@pytest.fixture(scope="module")
def fast(middle: nn.Module) -> SparseModule:
    with pytest.warns(SparsepruneWarning, match=r"3 segments, 2 of them native; in the way: .*aten\.sort"):
        return sparseprune.convert(middle, X, tune="fixed")


def test_an_unknown_operator_in_the_middle(fast: SparseModule, middle: nn.Module) -> None:
    assert kinds(fast) == ["native", "torch", "native"]
    check(fast, middle, X)
    report = fast.report
    assert [layer.name for layer in report.layers] == ["first.0", "second", "head"]
    assert all(layer.error is not None and layer.error < 1e-4 for layer in report.layers)
    assert report.max_error is not None and report.bound is not None and 0 < report.max_error <= report.bound
    first, torches, second = report.segments
    assert "first.0" in first.operators and "sort" in torches.operators and "second, head" in second.operators
    assert all(segment.nodes >= 1 and segment.share is None for segment in report.segments)
    assert "torch segment, not timed: 1 operator (sort)" in str(report) and "None" not in str(report)
    assert report.runs == "sparse" and report.input_shapes == ((2, 3, 16, 16),)
    assert repr(fast) == "SparseModule(x: ('s0', 3, 's1', 's2'), segments: native torch native)"


def test_one_warning_at_the_callers_line(middle: nn.Module) -> None:
    converted(middle, X)


def test_sizes_stay_open(fast: SparseModule, middle: nn.Module) -> None:
    assert all(note.startswith("removed") for note in fast.report.notes)
    for shape in ((1, 3, 16, 16), (5, 3, 16, 16), (2, 3, 20, 9), (1, 3, 1, 2)):
        check(fast, middle, torch.randn(shape))
    check(fast, middle, X.contiguous(memory_format=torch.channels_last))
    check(fast, middle, torch.randn(2, 3, 16, 32)[..., ::2])


def test_no_program_and_no_file(fast: SparseModule, tmp_path: Path) -> None:
    for refused in (lambda: fast.save(tmp_path / "model.spr"), lambda: fast.program):
        with pytest.raises(SparsepruneError, match=r"not one native program.*layer '.*operator aten\.sort") as error:
            refused()
        assert "None" not in str(error.value)
    assert str(error.value).startswith("the model") and "cannot be saved" not in str(error.value)
    with pytest.raises(SparsepruneError, match="^cannot be saved: the model is not one native program"):
        fast.save(tmp_path / "model.spr")
    assert not any(tmp_path.iterdir())


def test_measured(middle: nn.Module) -> None:
    fast = converted(middle, X, tune="measure", min_gain=1e-9)
    report = fast.report
    shares = [segment.share for segment in report.segments]
    assert all(share is not None and 0 <= share <= 1 for share in shares)
    assert sum(share or 0 for share in shares) == pytest.approx(1)
    assert report.runs == "sparse" and set(report.times_ms) == {"sparse", "eager", "channels_last"}
    assert all(layer.dense_ms is not None for layer in report.layers)
    assert "% of the time" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["segments"][1]["kind"] == "torch"


def test_dense_runs_where_it_is_faster(middle: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"sparse": 3.0, "eager": 2.0, "channels_last": 1.0}
    monkeypatch.setattr(conversion, "_take_turns", lambda *_: times)
    fast = converted(middle, X, tune="measure")
    assert fast.report.runs == "channels_last" and kinds(fast) == ["native", "torch", "native"]
    for wrong, error, message in (
        (X.double(), TypeError, "float32"),
        (X[:, :2], ValueError, "input 'x': expected size 3 in dimension 1, got"),
        (X[:0], ValueError, "input 'x': extent 0"),
    ):
        with pytest.raises(error, match=message):  # as where the segments run
            fast(wrong)


def test_warmup_tunes_every_native_segment(
    fast: SparseModule, middle: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = []
    monkeypatch.setattr(conversion, "tune_program", lambda _, shapes: tuned.append(shapes))
    x = torch.randn(1, 3, 12, 12)
    assert fast.warmup(x) is fast
    assert tuned == [[(1, 3, 12, 12)], [(1, 8, 12, 12)]]


def test_wrong_inputs(fast: SparseModule) -> None:
    for wrong, error, message in (
        (X.double(), TypeError, "expected dtype float32"),
        (X[0], ValueError, "expected 4 dimensions"),
        (X[:, :2], ValueError, "input 'x': expected size 3 in dimension 1"),
        (X[:0], ValueError, r"extent 0 of \(0, 3, 16, 16\)"),
        (X.to("meta"), ValueError, "on the CPU"),
    ):
        with pytest.raises(error, match=message):
            fast(wrong)
    with pytest.raises(TypeError, match="keyword arguments"):
        fast(x=X)


def test_threads(fast: SparseModule, middle: nn.Module) -> None:
    inputs = [torch.randn(1 + place % 3, 3, 16, 16) for place in range(8)]
    expected = [fast(x) for x in inputs]
    bad: list[int] = []

    def call(place: int) -> None:
        for _ in range(20):
            if not torch.equal(fast(inputs[place]), expected[place]):
                bad.append(place)

    threads = [threading.Thread(target=call, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not bad


def test_weights_are_snapshot(middle: nn.Module) -> None:
    model = made(Middle)
    fast = converted(model, X)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    check(fast, middle, X)


class Branches(nn.Module):
    """Two branches of different length, an unknown operator in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
        self.end = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.a(x).sort(1)[0] + self.b(x))  # type: ignore[no-any-return]


class Both(Branches):
    """Unknown operators in both, at different depths: they share one segment."""

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.a(x).sort(1)[0] + self.b(x).sort(2)[0])  # type: ignore[no-any-return]


class Late(Branches):
    """The unknown operator of one branch is at its begin, that of the other at its end."""

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.a(x.sort(3)[0]) + self.b(x).sort(2)[0])  # type: ignore[no-any-return]


class Begin(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.a((x * 2).sort(2)[0].relu())  # type: ignore[no-any-return]


class End(Branches):
    def forward(self, x: Tensor) -> Any:
        y = self.b(x)
        return {"values": (y.sort(1)[0] + 1).relu(), "which": y.argmax(1), "positive": y > 0, "y": y}


class Glue(Branches):
    """Cheap operators between two unknown ones are torch's; what follows them is native."""

    def forward(self, x: Tensor) -> Tensor:
        y = (self.a(x).sort(1)[0] * 2).relu().sort(2)[0]
        return self.end(y.reshape(y.shape[0], 4, -1).relu().reshape(y.shape))  # type: ignore[no-any-return]


class Fourier(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.fft.irfft2(torch.fft.rfft2(self.a(x)) * 0.5, s=x.shape[2:]))  # type: ignore[no-any-return]


class Sized(Branches):
    """A size of the input is needed after the cut, where the input is not."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x[:, :, ::2]).sort(1)[0]
        y = nn.functional.interpolate(y, size=x.shape[2:])
        return self.end(y).reshape(x.shape[0], 2, -1, x.shape[3] * 2).relu()  # type: ignore[no-any-return]


class Heavy(Branches):
    """A convolution that no program has is torch's, and what is beside it native."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Conv3d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.deep(self.a(x)[:, :, None])[:, :, 0] + self.b(x))  # type: ignore[no-any-return]


class Only(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(1)[0].relu()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Branches, "native torch native"),
        (Both, "native torch native"),
        (Late, "native torch native"),
        (Begin, "torch native"),
        (End, "native torch"),
        (Glue, "native torch native"),
        pytest.param(Fourier, "native torch native", marks=open_sizes),
        pytest.param(Sized, "native torch native", marks=open_sizes),
        pytest.param(Heavy, "native torch native", marks=open_sizes),
        (Only, "torch"),
    ],
)
def test_the_fewest_segments(kind: type[nn.Module], expected: str) -> None:
    model = made(kind)
    fast = converted(model, X)
    assert " ".join(kinds(fast)) == expected
    for shape in ((1, 3, 16, 16), (3, 3, 10, 14)):
        check(fast, model, torch.randn(shape))


def test_light_operators_go_where_they_cost_nothing() -> None:
    fast = converted(made(Glue), X)
    assert fast.report.segments[1].operators.startswith("sort, mul, relu, sort") or fast.report.segments[1].nodes >= 4
    assert "relu" not in fast.report.segments[2].operators  # fused, or named by its layer
    assert converted(made(Only), X).report.layers == ()


class Mask(nn.Module):
    """Takes integers and booleans, returns integers; a shape that depends on a size."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.out = nn.Linear(8, 4)
        self.register_buffer("table", torch.arange(32).reshape(4, 8).float())

    def forward(self, x: Tensor, picks: Tensor, keep: Tensor) -> Any:
        y = self.fc(x) * keep[:, None] + self.table[picks]
        y = self.out(y)
        return y, (y.argmax(1), picks + x.shape[0], None), self.table


@open_sizes
def test_integers_in_and_out() -> None:
    model = made(Mask)
    args = (torch.randn(3, 6), torch.tensor([1, 0, 3]), torch.tensor([True, False, True]))
    fast = converted(model, args)
    assert kinds(fast)[0] == "native" and len(fast.report.layers) == 2
    check(fast, model, torch.randn(5, 6), torch.arange(5) % 4, torch.arange(5) % 2 == 0)
    y, (_, picks, _), table = fast(*args)
    table.zero_(), picks.zero_()
    check(fast, model, *args)  # what is given away is not kept
    with pytest.raises(TypeError, match="input 'picks': expected dtype int64, got torch.float32"):
        fast(args[0], args[1].float(), args[2])
    with pytest.raises(
        ValueError, match="input 'picks': expected size 3 in dimension 0, as 'x' has in dimension 0, got"
    ):
        fast(args[0], args[1][:2], args[2])


def test_outputs_that_are_inputs_or_views_are_fresh() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.fc(x).sort(1)[0]
            return x, y, y.t(), y

    model = made(Views)
    x = torch.randn(2, 3)
    fast = converted(model, x)
    got = fast(x)
    assert len({y.untyped_storage().data_ptr() for y in (x, *got)}) == 5


@open_sizes
def test_data_dependent_shapes() -> None:
    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return self.out(y[y[:, 0] > 0])  # type: ignore[no-any-return]

    model = made(Picked)
    fast = converted(model, torch.randn(8, 6))
    assert kinds(fast) == ["native", "torch"]
    for x in (torch.randn(5, 6), torch.zeros(1, 6)):
        check(fast, model, x)


def test_random_numbers_are_not_verified() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + torch.rand_like(x)  # type: ignore[no-any-return]

    with pytest.warns(SparsepruneWarning, match="rand_like"):
        fast = sparseprune.convert(made(Noise), torch.randn(2, 6), tune="fixed")
    assert any("random" in note for note in fast.report.notes) and fast.report.max_error is None


def test_shared_weight_and_shared_module() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.two(self.one(x)).sort(1)[0])  # type: ignore[no-any-return]

    fast = converted(made(Tied), torch.randn(2, 6))
    assert kinds(fast) == ["native", "torch", "native"]


def test_nested_inputs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: dict[str, Any], scale: int) -> Any:
            y = self.conv(x["a"] + x["more"][0]) * scale
            return {"sorted": y.sort(2)[0], "list": [y, None]}

    args = ({"a": X, "more": [X.flip(0)]}, 2)
    fast = converted(made(Nested), args)
    assert kinds(fast) == ["native", "torch"]
    check(fast, made(Nested), {"more": args[0]["more"], "a": X}, 2)  # type: ignore[index]  # keys in any order
    for wrong, error, message in (
        ((args[0], 3), ValueError, r"inputs\[1\]: was 2 at conversion"),
        (({"a": X}, 2), TypeError, r"inputs\[0\]: expected a dict with the keys \['a', 'more'\], got the keys \['a'\]"),
        (({"a": X, "more": (X,)}, 2), TypeError, r"inputs\[0\]\['more'\]: expected a list of 1, got a tuple"),
        (({"a": X, "more": []}, 2), TypeError, r"inputs\[0\]\['more'\]: expected 1 item\(s\), got 0"),
    ):
        with pytest.raises(error, match=message):
            fast(*wrong)


def test_a_wrong_segment_is_found(middle: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = Segmented.flat

    def tampered(self: Segmented, *args: Any) -> list[Tensor]:
        return [y * 1.01 for y in flat(self, *args)]

    monkeypatch.setattr(Segmented, "flat", tampered)
    with pytest.warns(SparsepruneWarning), pytest.raises(VerificationError, match="output 0"):
        sparseprune.convert(middle, X, tune="fixed")
    monkeypatch.undo()
    values = verification._all_values

    def wrong(graph: Any, *args: Any) -> list[Tensor]:
        found = values(graph, *args)
        found[-1] = found[-1] + 1e-3
        return found

    monkeypatch.setattr(verification, "_all_values", wrong)
    with pytest.warns(SparsepruneWarning), pytest.raises(VerificationError, match="layer '"):
        sparseprune.convert(middle, X, tune="fixed")


def test_dtypes_are_still_refused() -> None:
    for model, x in (
        (nn.Linear(3, 3).double(), torch.randn(2, 3)),
        (nn.Linear(3, 3), torch.randn(2, 3).double()),
        (nn.Linear(3, 3), torch.randn(2, 3, dtype=torch.complex64)),
        (nn.Linear(3, 3).to(torch.bfloat16), torch.randn(2, 3)),
        (nn.Linear(3, 3).to(torch.complex64), torch.randn(2, 3)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UnsupportedError, match="only torch.float32"):
                sparseprune.convert(model, x)


def test_the_first_call_converts(middle: nn.Module) -> None:
    fast = sparseprune.convert(middle, tune="fixed")
    with pytest.warns(SparsepruneWarning):
        check(fast, middle, X)
    assert kinds(fast) == ["native", "torch", "native"]


def test_outputs_of_any_nesting(tmp_path: Path) -> None:
    class Pair(NamedTuple):
        y: Tensor
        size: int

    class Nests(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Any:
            y = self.fc(x)
            return Pair(y, x.shape[0]), {"k": 7, 3: [y.relu(), "name", None]}

    model = made(Nests)
    fast = converted(model, torch.randn(2, 6))
    check(fast, model, torch.randn(5, 6))
    assert len(fast.report.layers) == 1 and fast.report.layers[0].choice.count("/") == 2
    pair, _ = fast(torch.randn(4, 6))
    assert isinstance(pair, Pair) and pair.size == 4 and type(pair.size) is int
    with pytest.raises(SparsepruneError, match="output.*Pair|output.*SymInt"):
        fast.save(tmp_path / "model.spr")


def test_a_named_tuple_of_torch() -> None:
    class Best(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Any:
            return self.fc(x).topk(2)

    fast = converted(made(Best), torch.randn(2, 6))
    assert kinds(fast) == ["native", "torch"] and isinstance(fast(torch.randn(2, 6)), torch.return_types.topk)


def test_in_inference_mode(middle: nn.Module, fast: SparseModule) -> None:
    with torch.inference_mode():
        check(converted(middle, X), middle, X)
    check(fast, middle, X)


# ---- swapped layers


class Branching(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding="same")
        self.deep = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.other = nn.Conv2d(8, 8, 3, padding=1)
        self.never = nn.Linear(3, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        y = self.deep(self.conv(x))
        if y.sum() > 0 or float(y.max()) < 1e9:
            y = self.other(y).relu()
        y = self.head(y.mean((2, 3)))
        return 2 * y if double else y  # type: ignore[no-any-return]


def test_layers_are_swapped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = made(Branching)
    fast = converted(model, X)
    assert capfd.readouterr().err.strip("\n") == ""  # torch.export prints what it has traced
    report = fast.report
    assert {layer.name: layer.choice for layer in report.layers} == {
        "conv": "sparse layer", "deep": "torch", "other": "sparse layer", "head": "sparse layer",
    }  # fmt: skip
    assert "circular" in report.layers[1].reason and report.segments == ()
    assert all(layer.error is not None for layer in report.layers if layer.choice != "torch")
    assert report.max_error is not None and report.bound is not None and report.max_error <= report.bound
    assert any("swapped (3 of 4)" in note and "data-dependent" in note for note in report.notes)
    assert "test_segments.py" in report.notes[0] and "`if y.sum() > 0 or float(y.max()) < 1e9:`" in report.notes[0]
    assert "note: " in str(report) and "sparse layer" in str(report)
    for refused in (lambda: fast.save(tmp_path / "model.spr"), lambda: fast.program):
        with pytest.raises(SparsepruneError, match="not one native program; single layers were swapped"):
            refused()
    check(fast, model, torch.randn(1, 3, 9, 12))
    check(fast, model, X, double=True)
    assert fast.warmup(X) is fast and repr(fast) == "SparseModule(Branching with sparse layers)"
    assert fast.state_dict() == {} and type(model.conv) is nn.Conv2d and type(model.head) is nn.Linear
    with pytest.raises(SparsepruneError, match="cannot be trained"):
        fast.train()


@pytest.mark.parametrize("runs", ["sparse", "eager", "channels_last"])
def test_swapped_layers_are_measured(runs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"sparse": 3.0, "eager": 3.0, "channels_last": 3.0, runs: 1.0}
    monkeypatch.setattr(conversion, "_take_turns", lambda *_: times)
    model = made(Branching)
    fast = converted(model, X, tune="measure", min_gain=1e-9)
    report = fast.report
    assert report.times_ms == times and report.runs == "sparse"
    timed = [layer for layer in report.layers if layer.name != "deep"]
    assert all(layer.choice == "sparse layer" and layer.dense_ms and layer.sparse_ms for layer in timed)
    fast = converted(model, X, tune="measure", min_gain=2)
    assert fast.report.runs == runs
    check(fast, model, X, double=True)


def test_nothing_is_swapped_where_it_would_lose() -> None:
    fast = converted(made(Branching), X, tune="measure", min_gain=1e9)
    assert all(layer.choice == "torch" for layer in fast.report.layers)
    assert fast.report.runs in ("eager", "channels_last")
    dense = converted(made(Branching, 0.5), X)
    assert all(layer.choice == "torch" for layer in dense.report.layers)


class Tied(nn.Module):
    """A shared weight, a shared layer, nested inputs and outputs of any kind, a state."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight
        self.again = self.one
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: dict[str, list[Tensor]]) -> Any:
        self.calls += 1
        y = self.again(self.two(self.one(x["x"][0])))
        return {"y": [y], "name": "tied", "number": 3, "calls": self.calls.clone(), "none": None}


@pytest.mark.parametrize("tune", ["fixed", "measure"])
def test_tied_weights_nests_and_state(tune: str) -> None:
    model = made(Tied)
    args = ({"x": [torch.randn(3, 4, 8)]},)
    with pytest.warns(SparsepruneWarning) as caught:
        fast = sparseprune.convert(model, args, tune=tune, min_gain=1e-9)  # type: ignore[arg-type]
    assert len(caught) == 1 and int(model.calls) == 0
    check(fast, model, *args)
    check(fast, model, *args)  # the state goes on as the model's does
    assert fast._converted is not None
    inner: Any = fast._converted.runs
    assert isinstance(inner.one, sparseprune.nn.SparseLinear) and inner.again is inner.one
    assert inner.two.packed is inner.one.packed


def test_pruned_and_parametrized_layers_are_swapped_as_they_compute() -> None:
    model = made(Branching, 0.0)
    sparseprune.prune(model, 0.8, exclude=("never",), scope="local")
    fast = converted(model, X)
    assert sum(layer.choice == "sparse layer" for layer in fast.report.layers) >= 2


def test_weird_inputs() -> None:
    class Batch:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, batch: Any) -> Any:
            return Batch(self.fc(batch.x))

    model = made(Takes)
    batch = Batch(torch.randn(2, 8))
    with pytest.warns(SparsepruneWarning):
        fast = sparseprune.convert(model, (batch,), tune="fixed")
    assert torch.allclose(fast(batch).x, model(batch).x, atol=1e-5)


def test_a_model_that_does_not_run_is_an_error() -> None:
    fails = "the model itself fails on the example inputs"
    for wrong, message in (
        (X[:, :2], rf"{fails} \(\(2, 2, 16, 16\)\): RuntimeError: .*expected input\[2, 2, 16, 16\] to have 3 channels"),
        ([X], rf"{fails} \(\(2, 3, 16, 16\); a list is one input, a tuple several\): \w+: "),
        (X.numpy(), rf"{fails} \(no tensors\): \w+: "),
    ):
        with pytest.raises(UnsupportedError, match=message) as error:
            sparseprune.convert(made(Branching), wrong, tune="fixed")
        assert "\n" not in str(error.value)


def test_a_model_that_writes_its_input() -> None:
    class Writes(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.mul_(2)).sort(1)[0]  # type: ignore[no-any-return]

    x = X.clone()
    with pytest.warns(SparsepruneWarning, match="writes 'x'"):
        fast = sparseprune.convert(made(Writes), x, min_gain=1e-9)
    assert torch.equal(x, X)
    assert torch.allclose(fast(X.clone()), made(Writes)(X.clone()), atol=1e-5)
    fast(x)
    assert torch.equal(x, 2 * X)  # as the model does


def test_swapped_layers_from_threads() -> None:
    model = made(Branching)
    fast = converted(model, X)
    expected = fast(X)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.extend(fast(X) for _ in range(10))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 60 and all(torch.equal(y, expected) for y in results)


# ---- the awkward models of issue 3, each by segments and by layer swap


class ByData(Branches):
    """Control flow that depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(x)
        return self.end(y if y.mean() > 0 else -y)  # type: ignore[no-any-return]


class NestedDicts(Branches):
    def forward(self, x: Any) -> Any:
        y = self.a(x["image"]) + self.b(x["more"]["flipped"][0])
        return {"y": self.end(y.sort(1)[0]), "more": {"y": [y, None]}}


class SharedWeight(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.b[2].weight = self.end.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.b(x).sort(1)[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        (ByData, "swap"),
        *((kind, way) for kind in (NestedDicts, SharedWeight, Branches) for way in ("segments", "swap")),
    ],
)
def test_awkward_models_agree_and_warn_once(kind: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward = made(kind), kind.forward
    if way == "swap":  # a decision of the data's, which changes nothing
        monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) if tree_leaves(x)[0].sum() > 0 else None)
    x = X.abs()
    args: Any = ({"image": x, "more": {"flipped": [x.flip(0)]}},) if kind is NestedDicts else (x,)
    times = {"sparse": 1.0, "eager": 3.0, "channels_last": 3.0}
    monkeypatch.setattr(conversion, "_take_turns", lambda *_: times)
    fast = converted(model, args, tune="measure", min_gain=1e-9)
    assert kinds(fast) == (["native", "torch", "native"] if way == "segments" else [])
    layers = {layer.name: layer for layer in fast.report.layers}
    assert layers.keys() >= {"b.0", "b.2", "end"} and all(layer.error is not None for layer in layers.values())
    assert way == "segments" or all(layer.choice == "sparse layer" for layer in layers.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # later calls say nothing
        check(fast, model, *tree_map(lambda x: x[:, :, 2:, 1:], args))
