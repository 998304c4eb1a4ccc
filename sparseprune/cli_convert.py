"""`sparseprune convert`: a model and its pruned weights in, one program file out."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from .cli_common import UsageError, load_model, load_weights, named, need_file, need_folder, sizes

__all__ = ["add_convert"]


def add_convert(commands: Any) -> None:
    """Registers the command with the subparsers of `cli._parser`."""
    convert = commands.add_parser("convert", help="turn a pruned model into a program file (.spr)")
    convert.add_argument("model", metavar="MODEL", help="a network of the benchmark's, or package.module:factory")
    convert.add_argument("weights", type=Path, metavar="WEIGHTS",
                         help="its pruned weights: a state dict (.pt) or safetensors")  # fmt: skip
    convert.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the program, usually *.spr")
    convert.add_argument("--input-shape", type=sizes, action="append", metavar="N,C,H,W",
                         help="with the batch; needed for package.module:factory; once for each input")  # fmt: skip
    convert.add_argument("--float16", action="store_true",
                         help="store weights rounded to float16: 3 bytes a kept one instead of 5")  # fmt: skip
    convert.add_argument("--tune", choices=("measure", "fixed"), default="measure",
                         help="time every layer's variants here (default), or take the defaults")  # fmt: skip
    convert.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    need_file(args.weights, "WEIGHTS")
    need_folder(args.output, "-o")
    try:
        import torch
    except ImportError as exc:
        raise UsageError(f"convert needs torch: pip install 'sparseprune[torch]' ({exc})") from None
    from .conversion import convert
    from .errors import SparsepruneWarning

    model, shapes, _ = load_model(args.model, args.input_shape)
    load_weights(model, args.weights)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    try:
        with torch.inference_mode():
            model(*inputs)
    except Exception as exc:
        raise UsageError(f"{args.model} fails on inputs of shape {shapes}: {named(exc)}") from exc
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsepruneWarning)  # a model that is not one program is an error below
        fast = convert(model, inputs, tune=args.tune)
    fast.save(args.output, weights="float16" if args.float16 else "float32")
    print(fast.report)
    print(f"{args.output}: {args.output.stat().st_size:,} bytes")
    return 0
