"""Masks hold in other people's training loops: a plain one, Lightning's, and Hugging Face's Trainer."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sparseprune import finalize, hold_zeros, prune, summary
from sparseprune.pruning import get_mask


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))


def examples() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
    return x, x[:, :4].argmax(1)


def check(model: nn.Module, masks: list[Tensor], before: list[Tensor]) -> None:
    """The masks are what they were, what they prune is zero, and what they keep was trained."""
    for index, mask, old in zip((0, 2), masks, before, strict=True):
        layer = model.get_submodule(str(index))
        now, weight = get_mask(layer), layer.weight
        assert now is not None and isinstance(weight, Tensor)
        assert torch.equal(now, mask) and not weight[~mask].any() and not torch.equal(weight[mask], old[mask])
    finalize(model)
    assert summary(model).sparsity == pytest.approx(0.8, abs=1e-2)


def pruned() -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    model = prune(net(), 0.8, scope="local")
    layers = [model.get_submodule(index) for index in ("0", "2")]
    masks = [get_mask(layer) for layer in layers]
    weights = [layer.weight for layer in layers]
    return model, [m for m in masks if m is not None], [w.detach().clone() for w in weights if isinstance(w, Tensor)]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_plain_loop(optimizer: Any) -> None:
    model, masks, before = pruned()
    options = {"momentum": 0.9, "nesterov": True} if optimizer is torch.optim.SGD else {}
    steps = optimizer(model.parameters(), 0.01, weight_decay=0.1, **options)
    x, y = examples()
    for _ in range(10):
        steps.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
    check(model, masks, before)


def test_zeros_hold_on_a_second_data_set() -> None:
    model, _, _ = pruned()
    sparse = net()
    sparse.load_state_dict(finalize(model).state_dict())
    hold_zeros(sparse)
    x, y = examples()
    steps = torch.optim.SGD(sparse.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
    for _ in range(10):
        steps.zero_grad()
        F.cross_entropy(sparse(-2 * x), (y + 1) % 4).backward()  # type: ignore[no-untyped-call]
        steps.step()
    assert summary(finalize(sparse)).sparsity == pytest.approx(0.8, abs=1e-2)


def usable(module: str, name: str) -> Any:
    """A class of a library, or a skipped test where that library does not import."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as exc:  # it may also be broken, by a torchvision that does not fit torch, say
        pytest.skip(f"{module} does not import: {exc}")


def test_lightning(tmp_path: Path) -> None:
    base, make_trainer = usable("lightning.pytorch", "LightningModule"), usable("lightning.pytorch", "Trainer")
    model, masks, before = pruned()

    class Task(base):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=0.1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about workers and loggers
        trainer = make_trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Task(), DataLoader(TensorDataset(*examples()), 16))
    check(model, masks, before)


class Rows(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = examples()
        return {"x": x[index], "labels": y[index]}


def test_hugging_face_trainer(tmp_path: Path) -> None:
    usable("accelerate", "Accelerator")
    make_trainer, make_arguments = usable("transformers", "Trainer"), usable("transformers", "TrainingArguments")
    model, masks, before = pruned()

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            scores = self.model(x)
            return {"loss": F.cross_entropy(scores, labels), "logits": scores}

    arguments = make_arguments(
        output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=16, learning_rate=0.01,
        weight_decay=0.1, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    make_trainer(model=Classifier(), args=arguments, train_dataset=Rows()).train()
    check(model, masks, before)
