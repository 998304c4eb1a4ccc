"""`finetune` under `torchrun`: one process a device, gradients averaged by DistributedDataParallel, masks of rank 0."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

__all__ = ["broadcast_model", "is_main", "set_epoch", "shard", "start", "total", "unwrap", "world_size", "wrap"]


def start(place: torch.device | None) -> None:
    """Join the process group that `torchrun` set up, unless the caller has. Does nothing in a single process."""
    if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if place is not None and place.type == "cuda" else "gloo")


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that shows progress and writes files."""
    return world_size() == 1 or dist.get_rank() == 0


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside a DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def wrap(model: nn.Module, place: torch.device | None) -> nn.Module:
    """What to call in the training loop: the model, in DistributedDataParallel where there are several processes."""
    if world_size() == 1 or isinstance(model, DistributedDataParallel):
        return model
    return DistributedDataParallel(model, device_ids=[place] if place is not None and place.type == "cuda" else None)


def shard(loader: Iterable[Any], seed: int | None) -> Iterable[Any]:
    """The same loader for this process's share of the examples.

    Raises:
        TypeError: it is no DataLoader over a map-style data set, or has a batch sampler or sampler of its own; such
            loaders must be split by whoever made them, with a DistributedSampler.
    """
    if world_size() == 1:
        return loader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise TypeError("train_loader must be a DataLoader over a map-style data set to be split over processes")
    if isinstance(loader.sampler, DistributedSampler):
        return loader
    if not isinstance(loader.sampler, (RandomSampler, SequentialSampler)) or loader.batch_size is None:
        raise TypeError("train_loader has a sampler of its own: make it a torch DistributedSampler to train on several")
    shuffle = isinstance(loader.sampler, RandomSampler)
    return DataLoader(
        loader.dataset, loader.batch_size, sampler=DistributedSampler(loader.dataset, shuffle=shuffle, seed=seed or 0),
        num_workers=loader.num_workers, collate_fn=loader.collate_fn, pin_memory=loader.pin_memory,
        drop_last=loader.drop_last, worker_init_fn=loader.worker_init_fn, persistent_workers=loader.persistent_workers,
    )  # fmt: skip


def broadcast_model(model: nn.Module) -> None:
    """Make parameters, masks and statistics those of rank 0, in every process."""
    if world_size() == 1:
        return
    with torch.no_grad():
        for tensor in [*unwrap(model).parameters(), *unwrap(model).buffers()]:
            sent = tensor.detach()
            sent = sent.to(torch.uint8) if sent.dtype == torch.bool else sent.contiguous()
            dist.broadcast(sent, 0)
            tensor.copy_(sent)


def total(values: list[float], place: torch.device | None) -> list[float]:
    """Sums over the processes; NaN in any is NaN in all."""
    if world_size() == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64)
    sums = sums.to(place) if place is not None and dist.get_backend() == "nccl" else sums
    dist.all_reduce(sums)
    return [float(value) for value in sums]


def set_epoch(loader: Iterable[Any], epoch: int) -> None:
    """Another order for every epoch."""
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        sampler.set_epoch(epoch)
