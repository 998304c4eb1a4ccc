"""`finetune(checkpoint_dir=...)`: an interrupted training ends like one that was not, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from sparseprune import Pruner, finetune, load_weights, prune, summary
from sparseprune.resuming import LAST


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(8 * 16, 4)
    )


def data(generator: torch.Generator | None = None) -> DataLoader[tuple[Tensor, ...]]:
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(40, 1, 6, 6, generator=drawn)
    return DataLoader(TensorDataset(x, x[:, 0, 0, :4].argmax(1)), 8, shuffle=True, generator=generator)


class Interrupted(Exception):
    pass


class Stops:
    """A loader that is interrupted in the middle of its third epoch."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader, self.left = loader, 2 * len(loader) + 2

    @property
    def generator(self) -> Any:
        return self.loader.generator

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            if not self.left:
                raise Interrupted
            self.left -= 1
            yield batch


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.01)


def one_cycle(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return OneCycleLR(optimizer, 0.01, total_steps=5 * 5)


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    return ReduceLROnPlateau(optimizer, patience=0)


@pytest.mark.parametrize(
    "options", [{}, {"optimizer": adam, "scheduler": one_cycle}, {"optimizer": adam, "scheduler": plateau}]
)
@pytest.mark.parametrize("own_generator", [False, True])
def test_an_interruption_leaves_no_trace(tmp_path: Path, options: dict[str, Any], own_generator: bool) -> None:
    def run(folder: Path, stop: bool) -> tuple[nn.Module, Any]:
        model = net()
        loader: Any = data(torch.Generator().manual_seed(5) if own_generator else None)
        pruner = Pruner(model, 0.9, steps=4)
        given = Stops(loader) if stop else loader
        return model, finetune(
            model, given, epochs=5, val_loader=data(), pruner=pruner, checkpoint_dir=folder, progress=False, **options
        )

    expected, history = run(tmp_path / "whole", stop=False)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", stop=True)
    torch.manual_seed(99)  # a new process would have another state
    found, again = run(tmp_path / "cut", stop=False)
    assert again.train_loss == history.train_loss and again.val_accuracy == history.val_accuracy
    assert again.best_epoch == history.best_epoch and again.learning_rate == history.learning_rate
    for key, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[key]), key


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    model = prune(net(), 0.5)
    first = finetune(model, data(), epochs=2, checkpoint_dir=tmp_path, progress=False)
    stamp = (tmp_path / LAST).stat().st_mtime_ns
    other = prune(net(), 0.5)
    second = finetune(other, data(), epochs=2, checkpoint_dir=tmp_path, progress=False)
    assert second == first and (tmp_path / LAST).stat().st_mtime_ns == stamp
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_every_pruning_leaves_its_weights(tmp_path: Path) -> None:
    model = net()
    finetune(model, data(), epochs=3, pruner=Pruner(model, 0.8, schedule="linear", steps=2), checkpoint_dir=tmp_path,
             progress=False)  # fmt: skip
    files = sorted(path.name for path in tmp_path.glob("pruned-*.safetensors"))
    assert [name[:10] for name in files] == ["pruned-001", "pruned-002"]
    loaded = load_weights(net(), tmp_path / files[0])
    assert summary(loaded).sparsity == pytest.approx(0.4, abs=1e-2)


def test_another_training_is_refused(tmp_path: Path) -> None:
    finetune(net(), data(), epochs=1, checkpoint_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match="epochs=1, not 2"):
        finetune(net(), data(), epochs=2, checkpoint_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match="does not fit the model"):
        other = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
        finetune(other, data(), epochs=1, checkpoint_dir=tmp_path, progress=False)
    folder = tmp_path / "pruned"
    first = net()
    finetune(first, data(), epochs=2, pruner=Pruner(first, 0.8, steps=2), checkpoint_dir=folder, progress=False)
    model = net()
    pruner = Pruner(model, 0.9, steps=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="other amounts"):
        finetune(model, data(), epochs=2, pruner=pruner, checkpoint_dir=folder, progress=False)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for content in (b"", b"not a checkpoint", (tmp_path / LAST).read_bytes()[:200]):
        (tmp_path / LAST).write_bytes(content)
        with pytest.raises(ValueError, match="remove it to start again"):
            finetune(net(), data(), epochs=1, checkpoint_dir=tmp_path, progress=False)


def test_a_loss_of_nan_leaves_the_last_state(tmp_path: Path) -> None:
    calls = 0

    def bad(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return nn.functional.cross_entropy(outputs, targets) * (float("nan") if calls == 12 else 1)

    with pytest.raises(FloatingPointError, match="epoch 3, step 2"):
        finetune(net(), data(), epochs=4, loss=bad, checkpoint_dir=tmp_path, progress=False)
    history = finetune(net(), data(), epochs=4, checkpoint_dir=tmp_path, progress=False)
    assert len(history.train_loss) == 4
    assert not list(tmp_path.glob(".*"))  # nothing half-written
