"""One-shot pruning from a few unlabelled batches: what goes is chosen, and what stays refitted, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .criteria import Criterion
from .moments import Probe, bar_of
from .patterns import Pattern, mean_over_units
from .probing import undisturbed
from .selection import PrunableWeight, find_weights

__all__ = ["LayerProblem", "OBS", "masked_least_squares"]

_BUDGET = 1 << 30  # bytes of Hessians, or of input vectors, held at once; one layer alone may exceed it
_KEEP = 0.8  # share of a layer's units that each round of ranking keeps
_END = 0.01  # share of the units from which on the last round's saliencies rank
_ROUND_STEPS = 8  # iterations of a round's refit
_LAST_STEPS = 100  # iterations of the last refit, at most
_ROUNDING = 100  # a residual of so many machine epsilons of the target is none


class OBS(Criterion):
    """Optimal Brain Surgeon, layer by layer: prunes in one shot, from a few unlabelled batches, without training.

    Every layer is a least-squares problem: its output is to stay what it was on the batches while weights go. With
    H = E[x x^T] over the layer's inputs x (a convolution's patches), the weights of a layer are removed in rounds, a
    fifth of those left each time: those that cost least, w_j^2 H_jj, after which the others are refitted to make up for
    it, so that the next round sees which weights have become dear. That ranks a layer's weights, or blocks; layers are
    compared with each other, where the scope does so, as by magnitude. When `prune` has chosen by its scope and
    pattern, the kept weights are refitted once more under their masks, in the order in which layers run: each is given
    the inputs that the pruned layers before it produce, and has to reproduce the output of the original network, errors
    made before included. Biases and BatchNorm stay: call `recalibrate_bn` afterwards.

    The refit is conjugate gradients on all rows at once: the least-squares solution under the mask itself, at the cost
    of SparseGPT's sweep over columns, which stops at about twice the error. Rounds take the place of the paper's
    w_j^2 / [H^-1]_jj, which presumes that all other weights stay. docs/efficientnet.md has the figures.

    The work is K^2 * out per layer for K = in / groups * kh * kw; a layer's H takes 4 K^2 bytes.

    Hassibi, Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, 1993; Frantar, Alistarh,
    Optimal Brain Compression, 2022 (arXiv:2208.11580); Frantar, Alistarh, SparseGPT, 2023 (arXiv:2301.00774).

    Args:
        batches: yields inputs as tensors, or (inputs, targets), or (input1, input2, ..., targets), or dicts of keyword
            arguments; targets are not looked at. Some hundred examples; more are better than more `patches`. A
            DataLoader or list is run through again for every layer, with one random state, so that shuffling does no
            harm; an iterator is read into a list.
        damping: added to the diagonal of H, as a share of its mean: keeps weights near what they were in directions
            that the batches say little about.
        patches: input vectors used of each example that a layer is given (positions of a feature map, tokens), drawn at
            random, always the same; None for all.
        sequential: refit layers one after another, as above, which runs the batches (as far as the layer) for every
            layer; False: all from the original network's inputs, in one run.
        progress: show bars.

    Raises:
        TypeError: `batches` is no iterable of batches; from `prune`: a batch of another kind.
        ValueError: `damping` or `patches` out of range; from `prune`: no batch at all; a parameter that the batches
            never use as the weight of a convolution or linear layer, or that something else computes (weight_norm) or
            uses (an embedding); NaN or infinite inputs of a layer. The model is as it was, then.

    Example:
        >>> prune(model, 0.8, criterion=OBS(batches), exclude=("conv1",))
        >>> recalibrate_bn(model, batches)
    """

    def __init__(
        self, batches: Iterable[Any], *, damping: float = 0.01, patches: int | None = 64, sequential: bool = True,
        progress: bool = True,
    ) -> None:  # fmt: skip
        if isinstance(batches, (Tensor, str, Mapping, nn.Module)) or not isinstance(batches, Iterable):
            raise TypeError(f"batches must be an iterable of batches, got {type(batches).__name__}")
        if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping < math.inf:
            raise ValueError(f"damping must be a positive number, got {damping!r}")
        if patches is not None and (isinstance(patches, bool) or not isinstance(patches, int) or patches < 1):
            raise ValueError(f"patches must be None or an int of at least 1, got {patches!r}")
        self.batches = list(batches) if isinstance(batches, Iterator) else batches
        self.damping = float(damping)
        self.patches = patches
        self.sequential = sequential
        self.progress = progress

    def unit_scores(
        self, model: nn.Module, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor],
        patterns: Mapping[str, Pattern], generator: torch.Generator | None,
    ) -> Mapping[str, Tensor]:  # fmt: skip
        found = _find(model, weights)
        scores: dict[str, Tensor] = {}
        with undisturbed(model), torch.no_grad():
            probe = Probe(model, found, self.batches, self.patches)
            for names in _affordable(_hessian_sizes(found)):
                hessians = probe.hessians(names, self.progress)
                for name in bar_of(names, "OBS: ranking", self.progress):
                    problem = LayerProblem(weights[name], hessians.pop(name), None, self.damping)
                    scores[name] = problem.rank(kept[name], patterns[name])
        return scores

    def finish(
        self, model: nn.Module, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        found = _find(model, weights)
        with undisturbed(model), torch.no_grad():
            original = Probe(model, found, self.batches, self.patches)
            if self.sequential:
                return self._in_turn(original, Probe(model, found, self.batches, self.patches), weights, masks)
            updates: dict[str, Tensor] = {}
            for names in _affordable(_hessian_sizes(found)):
                hessians = original.hessians(names, self.progress)
                for name in bar_of(names, "OBS: refit", self.progress):
                    problem = LayerProblem(weights[name], hessians.pop(name), None, self.damping)
                    updates[name] = problem.refit(masks[name])
        return updates

    def _in_turn(
        self, original: Probe, pruned: Probe, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        updates: dict[str, Tensor] = {}
        calls = original.calls(self.progress)
        with bar_of(calls, "OBS: refit", self.progress) as bar:
            for names in _affordable({name: each.bytes for name, each in calls.items()}):
                theirs = original.inputs(names)
                for name in names:
                    moments = pruned.paired(name, theirs.pop(name), calls[name])
                    updates[name] = LayerProblem(weights[name], *moments, self.damping).refit(masks[name])
                    pruned.set_weight(name, updates[name])
                    bar.update()
        return updates


class LayerProblem:
    """min over v: E|w y - v x|^2 + damping * |v - w|^2, for every row w of one weight.

    Args:
        weight: as the layer holds it, (out, ...).
        hessian: E[x x^T], (groups, K, K).
        cross: E[y x^T], the same shape; None where y = x.
        damping: relative to the mean diagonal of `hessian`.
    """

    def __init__(self, weight: Tensor, hessian: Tensor, cross: Tensor | None, damping: float) -> None:
        groups, columns, _ = hessian.shape
        self._weight = weight
        self._rows = weight.to(hessian.dtype).reshape(groups, -1, columns)
        energy = hessian.diagonal(dim1=1, dim2=2)
        damped = damping * energy.mean(1, keepdim=True)
        damped[damped == 0] = 1  # nothing ever comes in: every weight is as good as it was
        self._energy = torch.where(energy.any(1, keepdim=True), energy, 1)
        self._matrix = hessian.clone()
        self._matrix.diagonal(dim1=1, dim2=2).add_(damped)
        moved = self._rows @ (hessian if cross is None else cross)
        self._target = moved + damped.unsqueeze(2) * self._rows

    def refit(self, mask: Tensor) -> Tensor:
        """The weight, of its own dtype, refitted where `mask` (of its shape) is True; zero elsewhere."""
        kept = mask.to(self._rows.device).reshape(self._rows.shape)
        values = masked_least_squares(self._matrix, self._target, self._rows, kept, _LAST_STEPS)
        return values.reshape(self._weight.shape).to(self._weight.dtype)

    def rank(self, kept: Tensor, pattern: Pattern) -> Tensor:
        """Scores of the units: the order in which rounds remove them, with the layer's mean magnitudes as values."""
        live = pattern.reduce(kept.to(torch.float32)) > 0
        order, mask, values = [(~live).nonzero().squeeze(1)], kept, self._rows
        few = max(1, int(_END * len(live)))
        while True:
            cost = (values.square() * self._energy.unsqueeze(1)).reshape(kept.shape).cpu()
            units = live.nonzero().squeeze(1)
            units = units[torch.argsort(mean_over_units(cost, mask, pattern)[units], stable=True)]
            if len(units) <= few:
                order.append(units)
                break
            order.append(units[: len(units) - int(_KEEP * len(units))])
            live[order[-1]] = False
            mask = kept & pattern.expand(live, tuple(kept.shape))
            on_device = mask.to(values.device).reshape(values.shape)
            values = masked_least_squares(self._matrix, self._target, values, on_device, _ROUND_STEPS)
        magnitudes = mean_over_units(self._weight.abs().float().cpu(), kept, pattern)
        scores = torch.empty_like(magnitudes)
        scores[torch.cat(order)] = magnitudes.sort().values
        return scores


def masked_least_squares(matrix: Tensor, target: Tensor, start: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Minimise v A v^T / 2 - b v^T for many rows v, each zero outside its mask.

    Conjugate gradients with the diagonal as preconditioner (Hestenes, Stiefel 1952), on the rows' own subspaces, all
    rows in one matrix product; ends when every residual is down to rounding, at the start if need be.

    Args:
        matrix: A, (groups, K, K), symmetric and positive definite.
        target: b, (groups, rows, K).
        start: v to begin with, like `target`.
        mask: bool, like `target`; False = zero.
        steps: at most.

    Returns:
        v, like `target`.
    """
    inverse = 1 / matrix.diagonal(dim1=1, dim2=2).unsqueeze(1)
    kept = mask.to(target.dtype)
    values = start * kept
    residual = (target - values @ matrix) * kept
    search = residual * inverse
    length = (residual * search).sum(-1, keepdim=True)
    limits = torch.finfo(target.dtype)
    enough = (target.square() * inverse).sum(-1, keepdim=True) * (_ROUNDING * limits.eps) ** 2
    for _ in range(steps):
        if not bool((length > enough).any()):
            break
        product = (search @ matrix) * kept
        step = length / (search * product).sum(-1, keepdim=True).clamp(min=limits.tiny)
        values += step * search
        residual -= step * product
        scaled = residual * inverse
        before, length = length, (residual * scaled).sum(-1, keepdim=True)
        search = scaled + (length / before.clamp(min=limits.tiny)) * search
    return values


def _find(model: nn.Module, weights: Mapping[str, Tensor]) -> list[PrunableWeight]:
    parameters = {name.rpartition(".")[2] for name in weights}
    found = [w for w in find_weights(model, tuple(weights), parameters=parameters) if w.name in weights]
    for weight in found:
        if not weight.is_plain():
            raise ValueError(
                f"{weight.name} is computed by a parametrization (weight_norm, say), so that OBS cannot refit it: "
                "remove that first, or exclude the layer"
            )
    return found


def _hessian_sizes(weights: Sequence[PrunableWeight]) -> dict[str, int]:
    """Bytes of each layer's Hessian."""
    sizes = {}
    for weight in weights:
        values, groups = weight.values(), getattr(weight.sites[0][0], "groups", 1)
        sizes[weight.name] = groups * math.prod(values.shape[1:]) ** 2 * max(4, values.element_size())
    return sizes


def _affordable(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names, in runs that need no more than _BUDGET bytes, or have one member."""
    run: list[str] = []
    used = 0
    for name, size in sizes.items():
        if run and used + size > _BUDGET:
            yield run
            run, used = [], 0
        run.append(name)
        used += size
    if run:
        yield run
