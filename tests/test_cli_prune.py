"""The commands that prune, compact and inspect models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparseprune import cli, compact, load_weights, summary

MODULE = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(),
                         nn.Linear(64, 5))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else -self.a(x)
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    (tmp_path / "prune_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "prune_models", raising=False)
    import prune_models  # type: ignore[import-not-found]

    model: nn.Sequential = prune_models.net()
    torch.save(model.state_dict(), "dense.pt")
    return model.eval()


def fresh() -> nn.Sequential:
    import prune_models

    model: nn.Sequential = prune_models.net()
    return model.eval()


def test_prune(net: nn.Sequential, capsys: pytest.CaptureFixture[str]) -> None:
    command = "prune prune_models:net --weights dense.pt --amount 0.9 --scope local -o out.safetensors"
    assert cli.main(command.split()) == 0
    out = capsys.readouterr().out
    assert "89.93%" in out and "out.safetensors:" in out
    found = summary(load_weights(fresh(), "out.safetensors"))
    assert found.total - found.kept == 741
    kept = load_weights(fresh(), "out.safetensors")[0].weight
    assert torch.equal(kept[kept != 0], net[0].weight[kept != 0])  # type: ignore[index, arg-type]


def test_prune_with_every_choice(net: nn.Sequential) -> None:
    command = ("prune prune_models:net --weights dense.pt --amount 0.5 --criterion random --seed 3 --pattern filter "
               "--scope local --include 0,3 --exclude 3 --min-density 0.1 -o out.safetensors")  # fmt: skip
    assert cli.main(command.split()) == 0
    first, second, last = summary(load_weights(fresh(), "out.safetensors")).layers
    assert first.zero_filters == 4 and second.zero_filters == last.zero_filters == 0
    assert cli.main("prune prune_models:net --amount 40 -o count.safetensors".split()) == 0
    found = summary(load_weights(fresh(), "count.safetensors"))
    assert found.total - found.kept == 40


def test_compact(net: nn.Sequential, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main("prune prune_models:net --amount 0.5 --pattern filter --include 0 -o p.safetensors".split()) == 0
    capsys.readouterr()
    assert cli.main("compact prune_models:net --weights p.safetensors --input-shape 1,3,8,8 -o small.pt2".split()) == 0
    out = capsys.readouterr().out
    assert "8x3x3x3" in out and "4x3x3x3" in out and "small.pt2" in out
    masked = load_weights(fresh(), "p.safetensors")
    x = torch.randn(3, 3, 8, 8)  # another batch than the example's
    torch.testing.assert_close(torch.export.load("small.pt2").module()(x), masked(x))
    assert [path.name for path in Path().glob(".small*")] == []
    # Runs where the classes are not importable, and is as large as what is left.
    small = compact(masked, x)
    assert Path("small.pt2").stat().st_size < 40_000 and small[0].out_channels == 4


def test_inspect_a_model(net: nn.Sequential, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main("prune prune_models:net --amount 0.5 --pattern filter --include 0 -o p.safetensors".split()) == 0
    capsys.readouterr()
    assert cli.main("inspect prune_models:net --weights p.safetensors --input-shape 2,3,8,8".split()) == 0
    out = capsys.readouterr().out
    assert "4 of 8" in out and "MACs" in out and f"{2 * 36 * 8 * 27:,}" in out and "if nothing were zero" in out
    assert cli.main("inspect tutorial-cnn".split()) == 0
    assert "conv1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("prune prune_models:net --amount 1.5 -o out", "'1.5' is not in [0, 1)"),
        ("prune prune_models:net -o out", "--amount"),
        ("prune prune_models:net --amount 0.5", "-o/--output"),
        ("prune prune_models:net --amount 0.5 -o none/out", "--output: none is not a folder"),
        ("prune prune_models:net --amount 0.5 -o .", "--output: . is a folder, not a file"),
        ("prune prune_models:net --amount 0.5 --weights none.pt -o out", "--weights: none.pt is not a file"),
        ("prune prune_models:net --amount 0.5 --pattern 4by1 -o out", "pattern must be"),
        ("prune prune_models:net --amount 0.5 --exclude fc9 -o out", "exclude='fc9' matches no layer"),
        ("prune prune_models:gone --amount 0.5 -o out", "MODEL: prune_models:gone: AttributeError"),
        ("prune nonsense --amount 0.5 -o out", "MODEL: 'nonsense' is neither one of"),
        ("prune prune_models:net --amount 0.5 --weights prune_models.py -o out", "is no checkpoint of tensors alone"),
        ("compact prune_models:net --input-shape 1,3,8,8 -o out.pt", "must end in .pt2"),
        ("compact prune_models:net -o out.pt2", "needs --input-shape"),
        ("compact prune_models:net --input-shape 1,4,8,8 -o out.pt2", "cannot be traced on example_inputs"),
        ("compact prune_models:net --input-shape 1,3,8,8 --drop-blocks 9 -o out.pt2", "drop_blocks: '9' is no module"),
        ("compact prune_models:Branching --input-shape 1,3,8,8 -o out.pt2", "torch.export cannot follow the model"),
        ("inspect prune_models:net --input-shape 1,4,8,8", "fails on inputs of shape [(1, 4, 8, 8)]"),
        ("inspect dense.pt --weights dense.pt", "are for models, and dense.pt is a file"),
        ("inspect none.spr", "none.spr is not a file"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    net: nn.Sequential, command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(command.split())
    except SystemExit as exc:  # argparse's way out
        status = int(str(exc.code))
    err = capsys.readouterr().err
    assert status == 2 and message in err and err.count("\n") == 1
    assert not Path("out").exists() and not Path("out.pt2").exists()


def test_without_torch_pruning(
    net: nn.Sequential, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    assert cli.main("compact prune_models:net --input-shape 1,3,8,8 -o out.pt2".split()) == 2
    assert "pip install 'sparseprune[compact]'" in capsys.readouterr().err
