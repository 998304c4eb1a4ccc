"""`sparseprune convert`: weights in, a program out; mistakes are one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sparseprune
from sparseprune import cli, runtime

FACTORY = """
from torch import nn
def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
def sorts():
    class Sorts(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)
        def forward(self, x):
            return self.fc(x).sort().values
    return Sorts()
"""


@pytest.fixture()
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets_to_convert.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    sparseprune.prune_uniform(net, 0.9)
    return net


@pytest.mark.parametrize("half", [False, True])
def test_a_state_dict_becomes_a_program(folder: Path, capsys: pytest.CaptureFixture[str], half: bool) -> None:
    net = model()
    torch.save(net.state_dict(), "pruned.pt")
    command = "convert nets_to_convert:make pruned.pt -o x.spr --input-shape 1,3,8,8 --tune fixed"
    assert cli.main([*command.split(), *(["--float16"] if half else [])]) == 0
    assert "x.spr: " in capsys.readouterr().out
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = net(x).numpy()
    np.testing.assert_allclose(runtime.load("x.spr")(x.numpy()), expected, atol=2e-3 if half else 1e-5)
    assert cli.main(["inspect", "x.spr"]) == 0
    out = capsys.readouterr().out
    assert ("weights were rounded to float16" in out) == half and "planned anew for" in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("nets_to_convert:make none.pt -o x.spr --input-shape 1,3,8,8", "WEIGHTS: none.pt is not a file"),
        ("nets_to_convert:make w.pt -o no/x.spr --input-shape 1,3,8,8", "-o: no is not a folder"),
        ("nets_to_convert:make w.pt -o x.spr", "needs --input-shape"),
        ("nets_to_convert:make w.pt -o x.spr --input-shape 1,4,8,8", "fails on inputs of shape"),
        ("nets_to_convert:sorts s.pt -o x.spr --input-shape 1,4 --tune fixed", "cannot be saved"),
        ("nets_to_convert:make s.pt -o x.spr --input-shape 1,3,8,8", "--weights s.pt"),
    ],
)
def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], command: str, message: str) -> None:
    torch.save(model().state_dict(), "w.pt")
    torch.save({"fc.weight": torch.ones(3, 4), "fc.bias": torch.zeros(3)}, "s.pt")
    assert cli.main(["convert", *command.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not Path("x.spr").exists()
