"""Finetuning: it learns, holds masks, keeps the best, restores what it borrowed, and says what is wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sparseprune import pruning
from sparseprune.errors import SparsepruneError
from sparseprune.evaluation import Evaluation, evaluate
from sparseprune.pruning import finalize, hold_zeros, prune, summary
from sparseprune.regularizers import L1
from sparseprune.training import finetune

get_mask: Any = pruning.get_mask
l1_unstructured: Any = torch_prune.l1_unstructured


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny layers: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def data(n: int = 128, seed: int = 0, batch: int = 32) -> DataLoader[Any]:
    """Two classes told apart by brightness."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=generator)
    x = torch.randn(n, 1, 6, 6, generator=generator) + (y - 0.5)[:, None, None, None]
    return DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=True)


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 2)
    )  # fmt: skip


def test_it_learns_with_masks_held() -> None:
    model = prune(network(), 0.7)
    before = evaluate(model, data())
    masks = [get_mask(model[i]) for i in (0, 5)]
    history = finetune(model, data(batch=8), epochs=6, val_loader=data(seed=1), progress=False)
    assert evaluate(model, data()).accuracy > max(0.8, before.accuracy)
    assert [get_mask(model[i]).equal(mask) for i, mask in zip((0, 5), masks, strict=True)] == [True, True]
    assert bool((model[5].weight[~masks[1]] == 0).all())
    for values in (history.train_loss, history.train_accuracy, history.val_loss, history.val_accuracy, history.seconds):
        assert len(values) == 6 and all(math.isfinite(value) for value in values)
    assert history.sparsity == [summary(model).sparsity] * 6
    assert history.learning_rate[0] <= 0.01 and history.learning_rate[-1] < history.learning_rate[1]


def test_best_epoch_is_kept() -> None:
    model = network()
    history = finetune(
        model, data(), epochs=4, val_loader=data(seed=1), progress=False,
        optimizer=lambda p: torch.optim.SGD(p, 1.0, momentum=0.9),
    )  # fmt: skip
    assert history.best_epoch is not None
    assert history.val_accuracy[history.best_epoch] == max(history.val_accuracy)
    assert evaluate(model, data(seed=1)).accuracy == history.val_accuracy[history.best_epoch]
    assert finetune(network(), data(), epochs=1, progress=False).best_epoch is None


def test_modes_and_random_state_are_restored() -> None:
    model = network().eval()
    model[0].train()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    finetune(model, data(), epochs=1, progress=False)
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(FloatingPointError):
        finetune(model, [(torch.full((2, 1, 6, 6), math.nan), torch.zeros(2).long())], epochs=1, progress=False)
    assert [m.training for m in model.modules()] == modes


def test_a_seed_repeats_the_run() -> None:
    runs: list[Any] = []
    for seed in (0, 0, 1):
        model = prune(network(), 0.5)
        torch.manual_seed(len(runs) + 10)
        finetune(model, data(), epochs=2, seed=seed, progress=False)
        runs.append(model[5].weight.detach().clone())
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_loss_names_the_step_and_is_not_applied(bad: float) -> None:
    model, x, y = network(), torch.randn(4, 1, 6, 6), torch.zeros(4).long()
    good = (x, y)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with pytest.raises(FloatingPointError, match=r"epoch 1, step 3 \(learning rate 0.01\)"):
        finetune(model, [good, good, (x * bad, y), good], epochs=2, optimizer=optimizer, progress=False)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_empty_loaders() -> None:
    empty = DataLoader(TensorDataset(torch.zeros(0, 1, 6, 6), torch.zeros(0).long()))
    for kwargs in ({"train_loader": empty}, {"train_loader": data(), "val_loader": empty}):
        with pytest.raises(ValueError, match="_loader is empty"):
            finetune(network(), **kwargs, epochs=1, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loader is empty"):
        evaluate(network(), [])
    with pytest.raises(ValueError, match="no batch in epoch 2"):  # a generator is spent after one epoch
        finetune(network(), (batch for batch in data()), epochs=2, progress=False)


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        samples: Any = data(64).dataset
        yield from samples


def test_loaders_without_a_length() -> None:
    history = finetune(network(), DataLoader(Stream(), batch_size=16), epochs=3, progress=False)
    assert history.learning_rate[0] > history.learning_rate[2]


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True])
def test_epochs_out_of_range(epochs: int) -> None:
    with pytest.raises(ValueError, match="epochs must be"):
        finetune(network(), data(), epochs=epochs)


def test_optimizers_and_schedulers() -> None:
    model = network()
    with pytest.raises(ValueError, match="no parameter of model"):
        finetune(model, data(), epochs=1, optimizer=torch.optim.SGD(network().parameters(), 0.1))
    with pytest.raises(TypeError, match="optimizer must be"):
        finetune(model, data(), epochs=1, optimizer=lambda p: 3)  # type: ignore[arg-type,return-value]
    rates = {}
    for name, scheduler in {
        "none": None,
        "epoch": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
        "batch": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
        "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10.0),
    }.items():
        history = finetune(
            model, data(), epochs=2, scheduler=scheduler, progress=False, optimizer=lambda p: torch.optim.AdamW(p, 0.01)
        )
        rates[name] = history.learning_rate
    assert rates["none"] == [0.01, 0.01] and rates["epoch"] == [0.01, 0.005] and rates["plateau"][0] == 0.01
    assert rates["batch"][0] == pytest.approx(0.004) and rates["batch"][1] > 0.05


def test_other_tasks_have_no_accuracy() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 1))
    loader = [(torch.randn(8, 1, 6, 6), torch.randn(8, 1))] * 2
    history = finetune(model, loader, val_loader=loader, epochs=2, loss=nn.functional.mse_loss, progress=False)
    assert math.isnan(history.train_accuracy[0]) and history.best_epoch == history.val_loss.index(min(history.val_loss))
    seen = evaluate(nn.Identity(), [(torch.tensor([[0.0, 9.0], [9.0, 0.0]]), torch.tensor([1, 1]))])
    assert isinstance(seen, Evaluation) and seen.accuracy == 0.5 and seen.examples == 2


def test_means_weigh_batches_by_size() -> None:
    scores, targets = torch.randn(10, 3), torch.randint(3, (10,))
    whole = evaluate(nn.Identity(), [(scores, targets)])
    parts = evaluate(nn.Identity(), [(scores[:7], targets[:7]), (scores[7:], targets[7:])])
    assert parts.loss == pytest.approx(whole.loss) and parts.accuracy == whole.accuracy


def test_batches_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match="train_loader must yield"):
        finetune(network(), [torch.zeros(2, 1, 6, 6)], epochs=1, progress=False)
    with pytest.raises(TypeError, match="loader must yield"):
        evaluate(network(), [{"x": 1}])


def test_torch_prune_hooks_hold_too() -> None:
    model = network()
    l1_unstructured(model[5], "weight", 0.5)
    finetune(model, data(), epochs=1, val_loader=data(seed=1), progress=False)
    assert summary(model).layers[1].sparsity == 0.5 and int((finalize(model)[5].weight == 0).sum()) == 64


def test_plain_zeros_are_warned_about() -> None:
    model = finalize(prune(network(), 0.5))
    with pytest.warns(UserWarning, match="hold_zeros"):
        finetune(model, data(), epochs=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finetune(hold_zeros(finalize(prune(network(), 0.5))), data(), epochs=1, progress=False)


def test_a_mask_changed_in_between_is_caught() -> None:
    model = prune(network(), 0.5)

    def tampering(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(outputs * 1.0, targets)
        model[5].parametrizations.weight[0].mask = torch.ones(2, 64, dtype=torch.bool)
        return loss

    with pytest.raises(SparsepruneError, match=r"mask of 5\.weight changed"):
        finetune(model, data(), epochs=1, loss=tampering, progress=False)


def test_the_bar_shows_loss_accuracy_and_sparsity(capfd: pytest.CaptureFixture[str]) -> None:
    finetune(prune(network(), 0.5), data(), epochs=2)
    shown = capfd.readouterr().err
    assert "epoch 2/2" in shown and all(word in shown for word in ("loss=", "acc=", "sparsity=0.5"))


def test_a_loader_that_is_none_or_spent_is_named() -> None:
    with pytest.raises(TypeError, match="train_loader must yield .* got NoneType"):
        finetune(network(), None, epochs=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^loader must yield .* got NoneType"):
        evaluate(network(), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="val_loader is empty"):
        finetune(network(), data(), epochs=2, val_loader=(batch for batch in data()), progress=False)


def test_losses_of_the_wrong_kind() -> None:
    model = network()
    before = model[5].weight.detach().clone()
    each: Any = nn.CrossEntropyLoss(reduction="none")
    for call in (
        lambda: finetune(model, data(), epochs=1, loss=each, progress=False),
        lambda: evaluate(model, data(), loss=each),
    ):
        with pytest.raises(TypeError, match=r"loss must return a scalar tensor, got a tensor of shape \(32,\)"):
            call()
    for wrong in (nn.CrossEntropyLoss, "mse"):  # the class instead of an instance
        with pytest.raises(TypeError, match="loss must be a function"):
            finetune(model, data(), epochs=1, loss=wrong, progress=False)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="loss must be a function"):
            evaluate(model, data(), loss=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got NoneType"):
        finetune(model, data(), epochs=1, loss=lambda outputs, targets: None, progress=False)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="loss has no gradient"), torch.no_grad():
        finetune(model, data(), epochs=1, progress=False)
    assert torch.equal(model[5].weight, before)


def test_arguments_of_the_wrong_kind_come_before_any_training() -> None:
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stray = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), 0.1), 1)
    for options, error, message in (
        ({"optimizer": "adam"}, TypeError, "optimizer must be"), ({"scheduler": "cosine"}, TypeError, "scheduler must"),
        ({"scheduler": stray}, ValueError, "scheduler is of another optimizer"),
        ({"regularizer": "l1"}, TypeError, "regularizer must be"), ({"regularizer": L1}, TypeError, "regularizer must"),
        ({"pruner": 0.9}, TypeError, "pruner must be a Pruner"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            finetune(model, data(), epochs=1, progress=False, **options)  # type: ignore[arg-type]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_zeros_of_no_mask_do_not_choose_the_best_epoch() -> None:
    model: Any = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    with torch.no_grad():
        model[1].weight.zero_()[:, 0] = 1  # they wake up little by little: the first epoch has the most zeros

    class Waking:
        epoch = 0

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            self.epoch += 1
            for x, y in data():
                x = x.clone()
                x.view(len(x), -1)[:, 6 * self.epoch :] = 0
                yield x, y

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zeros without a mask
        history = finetune(model, Waking(), epochs=4, val_loader=data(seed=1), progress=False)
    assert history.sparsity == sorted(history.sparsity, reverse=True) and history.sparsity[0] > history.sparsity[-1]
    assert history.best_epoch is not None and max(history.val_accuracy) > history.val_accuracy[0]
    assert history.val_accuracy[history.best_epoch] == max(history.val_accuracy)
