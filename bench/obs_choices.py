"""What OBS's choices gain, layer by layer: how weights are ranked, and how the kept ones are refitted.

    python examples/obs_accuracy.py --seeds 1            # trains the network whose layers are measured
    python bench/obs_choices.py obs_out/dense-0.safetensors

Prunes layers to one sparsity each; prints the squared error of the output, relative to the output, as the mean over
layers, and the seconds over all layers (one thread). Errors are on the inputs that were fitted to. Layers of
more than --columns inputs are left out: the exact methods take K^3 for every row.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import sparseprune
from sparseprune.pruning import Block
from sparseprune.pruning.moments import Probe
from sparseprune.pruning.obs import LayerProblem, masked_least_squares
from sparseprune.pruning.selection import find_weights
from sparseprune.zoo import resnet18_32

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import datasets  # noqa: E402

DAMPING = 0.01
Rank = Callable[[Tensor, Tensor, int], Tensor]  # weight (1, rows, K), H (1, K, K), how many are kept -> mask
Refit = Callable[[Tensor, Tensor, Tensor], Tensor]  # weight, H, mask -> weight


def damped(hessian: Tensor) -> Tensor:
    result = hessian.clone()
    result.diagonal(dim1=1, dim2=2).add_(DAMPING * hessian.diagonal(dim1=1, dim2=2).mean())
    return result


def best(scores: Tensor, kept: int) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort(descending=True)[:kept]] = True
    return mask.reshape(scores.shape)


# --- ranking ---------------------------------------------------------------------------------------------------------


def by_magnitude(weight: Tensor, hessian: Tensor, kept: int) -> Tensor:
    return best(weight.abs(), kept)


def by_energy(weight: Tensor, hessian: Tensor, kept: int) -> Tensor:
    """w_j^2 H_jj, once."""
    return best(weight.square() * hessian.diagonal(dim1=1, dim2=2).unsqueeze(1), kept)


def by_inverse(weight: Tensor, hessian: Tensor, kept: int) -> Tensor:
    """w_j^2 / [H^-1]_jj, once: Hassibi and Stork's, with all other weights there to make up."""
    inverse = torch.linalg.inv(damped(hessian).double()).diagonal(dim1=1, dim2=2)
    return best(weight.double().square() / inverse.unsqueeze(1), kept)


def in_rounds_by_inverse(weight: Tensor, hessian: Tensor, kept: int) -> Tensor:
    """The same, in rounds that keep 0.8, each row with the inverse of its own rest, refitted by a dense solver."""
    matrix, now, mask = damped(hessian).double()[0], weight.double(), torch.ones_like(weight, dtype=torch.bool)
    while int(mask.sum()) > kept:
        scores = torch.full_like(now, -1)
        for row, alive in enumerate(mask[0]):
            inverse = torch.linalg.inv(matrix[alive][:, alive]).diagonal()
            scores[0, row, alive] = now[0, row, alive].square() / inverse
        mask = best(scores, max(kept, int(0.8 * int(mask.sum()))))
        now = by_solver(weight, hessian, mask).double()
    return mask


def in_rounds(weight: Tensor, hessian: Tensor, kept: int) -> Tensor:
    """What OBS does."""
    problem = LayerProblem(weight[0], hessian, None, DAMPING)
    return best(problem.rank(torch.ones_like(weight[0], dtype=torch.bool), Block()).reshape(weight.shape), kept)


# --- refit -----------------------------------------------------------------------------------------------------------


def not_at_all(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    return weight * mask


def by_sweep(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """SparseGPT's: column after column, each pruned weight's error is passed on to the columns after it."""
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(hessian).double())[0], upper=True)
    now = weight[0].double().clone()
    for column in range(now.shape[1]):
        wrong = torch.where(mask[0, :, column], 0, now[:, column]) / upper[column, column]
        now[:, column:] -= wrong[:, None] * upper[column, column:]
    return (now * mask[0]).to(weight.dtype).unsqueeze(0)


def by_solver(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """The normal equations of each row, by Cholesky."""
    matrix, result = damped(hessian).double()[0], torch.zeros_like(weight, dtype=torch.double)
    target = weight[0].double() @ matrix
    for row, alive in enumerate(mask[0]):
        factor = torch.linalg.cholesky(matrix[alive][:, alive])
        result[0, row, alive] = torch.cholesky_solve(target[row, alive, None], factor)[:, 0]
    return result.to(weight.dtype)


def by_gradients(steps: int) -> Refit:
    """What OBS does, with at most `steps` iterations."""

    def refit(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
        matrix = damped(hessian)
        return masked_least_squares(matrix, weight @ matrix, weight, mask, steps)

    return refit


def measure(layers: list[tuple[Tensor, Tensor]], density: float, rank: Rank, refit: Refit) -> str:
    """Mean relative error over layers, seconds for ranking, seconds for refitting."""
    errors, ranking, refitting = [], 0.0, 0.0
    for weight, hessian in layers:
        start = time.process_time()
        mask = rank(weight, hessian, round(density * weight.numel()))
        middle = time.process_time()
        change = (refit(weight, hessian, mask) - weight).double()
        ranking, refitting = ranking + middle - start, refitting + time.process_time() - middle
        energies = [((v @ hessian.double()) * v).sum() for v in (change, weight.double())]
        errors.append(float(energies[0] / energies[1]))
    return f"{sum(errors) / len(errors):.4f} | {ranking:.1f} | {refitting:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("weights", type=Path, help="a network of examples/obs_accuracy.py")
    parser.add_argument("--width", type=int, default=16, help="of that network")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--columns", type=int, default=300, help="largest K")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = resnet18_32(width=args.width, in_channels=1)
    sparseprune.load_weights(model, args.weights)
    found = [w for w in find_weights(model, (nn.Conv2d, nn.Linear), "conv1") if w.values()[0].numel() <= args.columns]
    images = torch.split(datasets(None)[0].tensors[0][: args.images], 128)
    hessians = Probe(model, found, images, 64).hessians([weight.name for weight in found], progress=True)
    layers = [(weight.values().flatten(1).unsqueeze(0), hessians[weight.name]) for weight in found]
    print("| zeros | ranking | refit | error | s, ranking | s, refit |\n|---|---|---|---|---|---|")
    ranks: dict[str, Rank] = {
        "magnitude": by_magnitude, "w^2 H": by_energy, "w^2 / H^-1": by_inverse,
        "rounds, w^2 / H^-1": in_rounds_by_inverse, "rounds, w^2 H (OBS)": in_rounds,
    }  # fmt: skip
    refits: dict[str, Refit] = {
        "none": not_at_all, "sweep": by_sweep, "Cholesky": by_solver, "8 steps": by_gradients(8),
        "20 steps": by_gradients(20), "100 steps (OBS)": by_gradients(100),
    }  # fmt: skip
    for sparsity in args.sparsity:
        for name, refit in refits.items():
            figures = measure(layers, 1 - sparsity, in_rounds, refit)
            print(f"| {sparsity:.0%} | rounds, w^2 H (OBS) | {name} | {figures}", flush=True)
        for name, rank in ranks.items():
            figures = measure(layers, 1 - sparsity, rank, by_gradients(100))
            print(f"| {sparsity:.0%} | {name} | 100 steps (OBS) | {figures}", flush=True)


if __name__ == "__main__":
    main()
