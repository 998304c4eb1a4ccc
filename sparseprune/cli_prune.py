"""`sparseprune prune`, `sparseprune compact`, and `sparseprune inspect` of a model."""

from __future__ import annotations

import argparse
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_common import (
    UsageError,
    count,
    load_model,
    load_weights,
    named,
    names,
    need_file,
    need_folder,
    share,
    sizes,
    write,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["add_commands", "inspect_model"]


def add_commands(commands: Any) -> None:
    """Add `prune` and `compact` to the parser's commands."""
    prune = commands.add_parser("prune", help="prune a model without data, and save its non-zero weights")
    _add_model(prune)
    prune.add_argument("--amount", type=_amount, required=True, metavar="A",
                       help="the final sparsity in [0, 1), or the number of weights to prune")  # fmt: skip
    prune.add_argument("--criterion", choices=("magnitude", "random"), default="magnitude",
                       help="those that need data are Python's: sparseprune.prune")  # fmt: skip
    prune.add_argument("--pattern", default="1x1", metavar="P",
                       help="1x1 (default), RxC, N:M, filter, channel, kernel_row or kernel_col")  # fmt: skip
    prune.add_argument("--scope", choices=("global", "local", "erk"), default="global")
    prune.add_argument("--include", type=names, metavar="A,B", help="names or globs of layers (default: all)")
    prune.add_argument("--exclude", type=names, default=(), metavar="A,B", help="names or globs of layers left alone")
    prune.add_argument("--min-density", type=share, default=0.0, metavar="D", help="least kept share of every layer")
    prune.add_argument("--seed", type=int, default=0, metavar="N", help="for --criterion random (default 0)")
    prune.add_argument("-o", "--output", type=Path, required=True, metavar="FILE",
                       help="a safetensors file of the non-zeros, which load_weights and load_pruned read")  # fmt: skip
    prune.set_defaults(run=_prune)

    compact = commands.add_parser("compact", help="remove pruned filters physically, and export the smaller model")
    _add_model(compact)
    compact.add_argument("--input-shape", type=sizes, action="append", metavar="N,C,H,W",
                         help="with the batch; needed for package.module:factory; once for each input")  # fmt: skip
    compact.add_argument("--drop-blocks", type=names, default=(), metavar="A,B", help="residual blocks to leave out")
    compact.add_argument("--multiple-of", type=count, default=1, metavar="N",
                         help="leave a multiple of N channels in each layer, 8 or 16 say (default 1)")  # fmt: skip
    compact.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.pt2",
                         help="a torch.export archive: torch.export.load(FILE).module() runs it without its "
                              "Python code")  # fmt: skip
    compact.set_defaults(run=_compact)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a network's name (see benchmark), or package.module:factory")
    command.add_argument("--weights", type=Path, metavar="FILE", help="a state dict (.pt) or safetensors to load")


def _amount(text: str) -> float | int:
    if text.isascii() and text.isdigit():
        return int(text)
    return share(text)


def _prepared(args: argparse.Namespace, shapes_needed: bool) -> tuple[nn.Module, list[tuple[int, ...]]]:
    need_file(args.weights, "--weights")
    try:
        import torch  # noqa: F401  (only whether it is there)
    except ImportError as exc:
        raise UsageError(f"this needs torch: pip install 'sparseprune[torch]' ({exc})") from None
    model, shapes, _ = load_model(args.model, getattr(args, "input_shape", None), shapes_needed=shapes_needed)
    if args.weights is not None:
        load_weights(model, args.weights)
    return model.eval(), shapes


def _inputs(shapes: list[tuple[int, ...]]) -> tuple[Tensor, ...]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _prune(args: argparse.Namespace) -> int:
    need_folder(args.output, "--output")
    model, _ = _prepared(args, shapes_needed=False)
    from .files import save_weights
    from .pruning import prune, summary

    chosen = {} if args.include is None else {"include": args.include}
    try:
        prune(model, args.amount, criterion=args.criterion, pattern=args.pattern, scope=args.scope,
              exclude=args.exclude, min_density=args.min_density, seed=args.seed, **chosen)  # fmt: skip
    except TypeError as exc:
        raise UsageError(str(exc)) from exc
    save_weights(model, args.output)
    print(summary(model))
    print(f"{args.output}: {args.output.stat().st_size:,} bytes")
    return 0


def _compact(args: argparse.Namespace) -> int:
    need_folder(args.output, "--output")
    if args.output.suffix != ".pt2":
        raise UsageError(f"--output: {args.output} must end in .pt2, it is an archive of torch.export")
    model, shapes = _prepared(args, shapes_needed=True)
    from .pruning import compact

    inputs = _inputs(shapes)
    try:
        small = compact(model, inputs, drop_blocks=args.drop_blocks, multiple_of=args.multiple_of)
    except ImportError as exc:
        raise UsageError(str(exc)) from exc
    archive = _exported(small, inputs)
    write(args.output, archive)
    print(small.compact_report)
    print(f"{args.output}: {len(archive):,} bytes; torch.export.load({str(args.output)!r}).module() runs it")
    return 0


def _exported(model: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    """The bytes of a `.pt2` archive; its batch may change where the model allows it."""
    import torch
    from torch.export import Dim

    from .graph.capture import quiet

    doubled = tuple(torch.cat([x, x]) if x.dim() else x for x in inputs)  # export pins a batch of 1
    open_batch = tuple({0: Dim.AUTO} if x.dim() else None for x in inputs)
    failure: Exception | None = None
    for shapes, given in ((open_batch, doubled), (None, inputs)):
        try:
            with warnings.catch_warnings(), quiet():
                warnings.simplefilter("ignore")
                program = torch.export.export(model, given, dynamic_shapes=shapes)
                buffer = io.BytesIO()
                torch.export.save(program, buffer)
            return buffer.getvalue()
        except Exception as exc:  # torch.export raises nearly anything
            failure = exc
    assert failure is not None
    raise UsageError(f"torch.export cannot follow the model, so it cannot be saved: {named(failure)}") from failure


def inspect_model(args: argparse.Namespace) -> int:
    """`sparseprune inspect MODEL`: the summary of a model with its weights."""
    args.model = args.target
    model, shapes = _prepared(args, shapes_needed=False)
    from .pruning import summary

    try:
        print(summary(model, _inputs(shapes) if shapes else None, file_size=True))
    except RuntimeError as exc:
        raise UsageError(f"{args.target} fails on inputs of shape {shapes}: {named(exc)}") from exc
    return 0
