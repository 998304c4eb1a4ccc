"""Second moments of what layers are given: the Hessians of layer-wise least squares, from a few batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from ..calibration import move_inputs
from ..graph.snapshot import snapshot
from .selection import PrunableWeight

__all__ = ["Calls", "Probe", "bar_of", "input_vectors"]

_CHUNK = 1 << 24  # elements gathered at once: 64 MiB in float32
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")  # of conv2d; linear has three

OnCall = Callable[[str, Tensor, Mapping[str, Any]], None]  # weight, input, options of the convolution


@dataclass
class Calls:
    """How often each batch calls one weight, and how large the input vectors of all of them are."""

    of_batch: list[int]
    bytes: int


class Probe:
    """A frozen copy of a model, in evaluation mode, that is run on batches to see the inputs of some layers.

    Calls of conv2d and linear are watched, not modules: what a layer does to its input first (padding, say) is seen.

    Args:
        model: nothing of it is written.
        weights: what to watch.
        batches: run through again and again.
        patches: input vectors used of each example that a layer is given, drawn at random; None for all.
    """

    def __init__(
        self, model: nn.Module, weights: Sequence[PrunableWeight], batches: Iterable[Any], patches: int | None
    ) -> None:
        self._model = snapshot(model, own=True)
        self._batches = batches
        self._patches = patches
        paths = {id(module): path for path, module in model.named_modules()}
        self._weights: dict[str, list[Tensor]] = {}
        for weight in weights:
            sites = ((self._model.get_submodule(paths[id(module)]), parameter) for module, parameter in weight.sites)
            self._weights[weight.name] = [getattr(module, parameter) for module, parameter in sites]

    def set_weight(self, name: str, values: Tensor) -> None:
        """Give the copy other values of one weight."""
        with torch.no_grad():
            for tensor in self._weights[name]:
                tensor.copy_(values)

    def calls(self, progress: bool) -> dict[str, Calls]:
        """How often each weight is called, in the order in which layers are first called.

        Raises:
            ValueError: no batch, or a weight that is never called.
        """
        found: dict[str, Calls] = {}
        number = -1
        for number, batch in self._numbered("OBS: order", progress):
            for calls in found.values():
                calls.of_batch.append(0)
            generator = torch.Generator().manual_seed(number)

            def count(
                name: str, x: Tensor, options: Mapping[str, Any], number: int = number,
                generator: torch.Generator = generator,
            ) -> None:  # fmt: skip
                calls = found.setdefault(name, Calls([0] * (number + 1), 0))
                calls.of_batch[number] += 1
                calls.bytes += sum(v.nbytes for v in self._vectors(name, x, options, generator))

            self._run(batch, self._weights, count)
        self._check(found, self._weights, number)
        return found

    def hessians(self, names: Collection[str], progress: bool) -> dict[str, Tensor]:
        """Mean of x x^T over the inputs x of each layer, (groups, K, K), from one run of the batches.

        Raises:
            ValueError: no batch; a weight that is never called; NaN or infinite inputs.
        """
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        number = -1
        for number, batch in self._numbered("OBS: inputs", progress):
            generator = torch.Generator().manual_seed(number)

            def add(
                name: str, x: Tensor, options: Mapping[str, Any], generator: torch.Generator = generator
            ) -> None:
                for vectors in self._vectors(name, x, options, generator):
                    product = vectors.mT @ vectors
                    sums[name] = sums[name].add_(product) if name in sums else product
                    counts[name] = counts.get(name, 0) + vectors.shape[1]

            self._run(batch, names, add)
        self._check(sums, names, number)
        return {name: _finite(name, sums[name].div_(counts[name])) for name in names}

    def inputs(self, names: Collection[str]) -> dict[str, list[list[Tensor]]]:
        """The input vectors of some layers, batch by batch, from one run; see `input_vectors`."""
        found: dict[str, list[list[Tensor]]] = {name: [] for name in names}
        for number, batch in self._numbered("", False):
            generators = {name: torch.Generator().manual_seed(number) for name in names}
            for vectors in found.values():
                vectors.append([])

            def add(
                name: str, x: Tensor, options: Mapping[str, Any],
                generators: Mapping[str, torch.Generator] = generators,
            ) -> None:  # fmt: skip
                found[name][-1].extend(self._vectors(name, x, options, generators[name]))

            self._run(batch, names, add)
        return found

    def paired(self, name: str, theirs: Sequence[Sequence[Tensor]], calls: Calls) -> tuple[Tensor, Tensor]:
        """Moments of one layer's inputs x here with themselves, and with the inputs y that it has in another network.

        Args:
            name: of the weight.
            theirs: y, from that network's `inputs`: at the same positions.
            calls: how often each batch calls the weight; the run of a batch ends there.

        Returns:
            Means of x x^T and of y x^T, (groups, K, K) each.

        Raises:
            ValueError: NaN or infinite inputs, or x and y of different shapes.
        """
        square, cross, count = torch.zeros(()), torch.zeros(()), 0
        for number, batch in self._numbered("", False):
            mine = self._inputs_until(name, batch, number, calls.of_batch[number])
            if [x.shape for x in mine] != [y.shape for y in theirs[number]]:
                raise ValueError(
                    f"{name} is given inputs of other shapes once the layers before it are pruned; use sequential=False"
                )
            for x, y in zip(mine, theirs[number], strict=True):
                square = square.to(x) + x.mT @ x
                cross = cross.to(x) + y.mT @ x
                count += x.shape[1]
        return _finite(name, square / count), _finite(name, cross / count)

    def _inputs_until(self, name: str, batch: Any, number: int, calls: int) -> list[Tensor]:
        found: list[Tensor] = []
        generator = torch.Generator().manual_seed(number)  # the same positions as in `inputs`
        left = calls

        def add(_: str, x: Tensor, options: Mapping[str, Any]) -> None:
            nonlocal left
            found.extend(self._vectors(name, x, options, generator))
            left -= 1
            if not left:
                raise _Enough

        if calls:
            self._run(batch, [name], add)
        return found

    def _vectors(
        self, name: str, x: Tensor, options: Mapping[str, Any], generator: torch.Generator
    ) -> Iterator[Tensor]:
        return input_vectors(x, self._weights[name][0].shape, patches=self._patches, generator=generator, **options)

    def _run(self, batch: Any, names: Collection[str], on_call: OnCall) -> None:
        args, kwargs = move_inputs(batch, self._model, "batches")
        watched = {id(tensor): name for name in names for tensor in self._weights[name]}
        try:
            with torch.no_grad(), _Watch(watched, on_call):
                self._model(*args, **kwargs)
        except _Enough:
            pass

    def _numbered(self, label: str, progress: bool) -> Iterator[tuple[int, Any]]:
        torch.manual_seed(0)  # a loader that shuffles gives the same batches every time; callers fork the state
        return enumerate(bar_of(self._batches, label, progress))

    def _check(self, found: Collection[str], wanted: Collection[str], last: int) -> None:
        if last < 0:
            raise ValueError("batches is empty: it yielded no batch")
        if missing := [name for name in wanted if name not in found]:
            raise ValueError(
                f"the batches never reach a conv2d or linear call with {', '.join(missing[:5])}: exclude what is not "
                "run, and what is no convolution or linear layer"
            )


def input_vectors(
    x: Tensor, shape: Sequence[int], *, patches: int | None, generator: torch.Generator,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Iterator[Tensor]:  # fmt: skip
    """What a layer multiplies its weight with, in chunks: (groups, vectors, K), at least float32.

    Args:
        x: the layer's input: (..., in) for a linear layer, (N, in, H, W) or (in, H, W) for a convolution.
        shape: of the weight; K is the product of all but its first dimension.
        patches: at most so many vectors for each example, drawn at random; None for all.
        generator: draws them; on the CPU.
        stride, padding, dilation, groups: of the convolution.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if len(shape) == 2:
        examples, rows = x.shape[0] if x.ndim > 1 else 1, x.reshape(-1, x.shape[-1])
        for chosen in _drawn(len(rows), examples, patches, shape[1], generator):
            yield rows[chosen.to(x.device)].unsqueeze(0)
        return
    (tall, wide), (down, across), (dilated_y, dilated_x) = shape[2:], _pair(stride), _pair(dilation)
    margins = _margins(padding, (dilated_y * (tall - 1), dilated_x * (wide - 1)))
    images = F.pad(x if x.ndim == 4 else x.unsqueeze(0), margins)
    pixels = images.permute(0, 2, 3, 1).contiguous()  # (N, H, W, in)
    height = (pixels.shape[1] - dilated_y * (tall - 1) - 1) // down + 1
    width = (pixels.shape[2] - dilated_x * (wide - 1) - 1) // across + 1
    size = pixels.shape[3] * tall * wide
    for chosen in _drawn(len(pixels) * height * width, len(pixels), patches, size, generator):
        chosen = chosen.to(x.device)
        image, top, left = chosen // (height * width), chosen // width % height * down, chosen % width * across
        rows = top[:, None] + dilated_y * torch.arange(tall, device=x.device)
        columns = left[:, None] + dilated_x * torch.arange(wide, device=x.device)
        found = pixels[image[:, None, None], rows[:, :, None], columns[:, None, :]]  # (vectors, kh, kw, in)
        yield found.permute(0, 3, 1, 2).reshape(len(chosen), groups, -1).transpose(0, 1)


def bar_of(items: Iterable[Any], label: str, progress: bool) -> Any:
    often = 0.2 if sys.stderr.isatty() else 30.0  # a log file wants few lines
    return tqdm(items, desc=label, disable=not progress, mininterval=often, leave=False)


class _Enough(BaseException):
    """Ends a run of the model early; no `except Exception` in the model is to catch it."""


class _Watch(TorchFunctionMode):
    """Reports every conv2d and linear call with one of the weights, by identity."""

    def __init__(self, watched: Mapping[int, str], on_call: OnCall) -> None:
        super().__init__()
        self._watched = watched
        self._on_call = on_call

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d or func is F.linear:
            given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
            name = self._watched.get(id(given["weight"]))
            if name is not None:
                self._on_call(name, given["input"], {key: given[key] for key in _ARGUMENTS[3:] if key in given})
        elif func is F.embedding or func is F.embedding_bag:
            for name in (self._watched[id(item)] for item in (*args, *kwargs.values()) if id(item) in self._watched):
                raise ValueError(f"{name} is an embedding table as well, which OBS cannot update: exclude it")
        return func(*args, **kwargs)


def _finite(name: str, moments: Tensor) -> Tensor:
    if not bool(torch.isfinite(moments).all()):
        raise ValueError(f"the inputs of the layer with {name} are NaN, infinite or too large in some batch")
    return moments


def _drawn(
    total: int, examples: int, patches: int | None, size: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Indices of the vectors to use, of `total`, in chunks of so many that each has at most _CHUNK elements."""
    limit = total if patches is None else min(total, patches * examples)
    chosen = torch.arange(total) if limit == total else torch.randperm(total, generator=generator)[:limit]
    return torch.split(chosen, max(1, _CHUNK // max(1, size)))


def _margins(padding: Any, reach: tuple[int, int]) -> tuple[int, int, int, int]:
    """What F.pad adds left, right, above and below; `reach` is how far the kernel's last row and column are away."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":  # what cannot be halved goes right and below
        above, left = reach[0] // 2, reach[1] // 2
        return left, reach[1] - left, above, reach[0] - above
    above, left = _pair(padding)
    return left, left, above, above


def _pair(value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    return int(pair[0]), int(pair[-1])  # torch takes (1,) for (1, 1)
