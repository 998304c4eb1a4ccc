"""The `sparseprune` command: prune, compact, convert, benchmark, inspect a model; doctor says what is missing.

A user's mistake is one line on stderr and exit status 2. torch is imported only by what has a model to load.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import cli_prune
from .cli_common import (
    NETWORKS,
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
from .cli_convert import add_convert
from .errors import SparsepruneError

__all__ = ["main"]

_EPILOG = """examples:
  sparseprune prune my_models:make_net --weights dense.pt --amount 0.9 -o pruned.safetensors
  sparseprune compact my_models:make_net --weights pruned.safetensors --input-shape 1,3,224,224 -o small.pt2
  sparseprune benchmark resnet18-32 --sparsity 0.95 --threads 2
  sparseprune benchmark my_models:make_net --weights pruned.pt --input-shape 1,3,224,224 --json out.json
  sparseprune convert my_models:make_net pruned.pt -o model.spr --input-shape 1,3,224,224
  sparseprune inspect model.spr
  sparseprune inspect my_models:make_net --weights pruned.safetensors
  sparseprune doctor
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for a user's mistake, 130 when interrupted.

    `doctor` returns 1 where programs cannot run.
    """
    args = _parser().parse_args(argv)
    status = 0
    try:
        status = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `sparseprune inspect FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except (UsageError, SparsepruneError, OSError, ValueError) as exc:
        print(f"sparseprune: {_one_line(exc)}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sparseprune", description=__doc__.splitlines()[0] if __doc__ else None, epilog=_EPILOG,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    bench = commands.add_parser("benchmark", help="time a network against the dense ways torch has of running it")
    bench.add_argument("model", metavar="MODEL", help=f"{', '.join(NETWORKS)}, or package.module:factory")
    bench.add_argument("--weights", type=Path, metavar="FILE", help="a state dict (.pt) or safetensors to load")
    bench.add_argument("--sparsity", type=share, metavar="S",
                       help="write random zeros, this share of every layer but the first convolution "
                            "(without it the weights stay as they are)")  # fmt: skip
    bench.add_argument("--batch", type=count, metavar="N", help="images at a time (default 1)")
    bench.add_argument("--threads", type=count, metavar="N", help="default: every core this process may use")
    bench.add_argument("--input-shape", type=sizes, action="append", metavar="N,C,H,W",
                       help="with the batch; needed for package.module:factory; once for each input")  # fmt: skip
    bench.add_argument("--baselines", type=names, metavar="A,B",
                       help="some of eager,channels_last,compile,compile_channels_last (default all)")  # fmt: skip
    bench.add_argument("--rounds", type=count, default=8, metavar="N", help="short blocks per candidate (default 8)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    bench.set_defaults(run=_benchmark)

    add_convert(commands)

    inspect = commands.add_parser("inspect", help="print what a program (.spr), a weights file or a model holds")
    inspect.add_argument("target", metavar="TARGET", help="a file, a network's name, or package.module:factory")
    inspect.add_argument("--weights", type=Path, metavar="FILE", help="what to load into the model")
    inspect.add_argument("--input-shape", type=sizes, action="append", metavar="N,C,H,W",
                         help="with the batch, to count multiply-adds of a model; once for each input")  # fmt: skip
    inspect.set_defaults(run=_inspect)

    cli_prune.add_commands(commands)

    doctor = commands.add_parser("doctor", help="print what is here, and what to type for what is missing")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(run=_doctor)
    return parser


# --- benchmark -------------------------------------------------------------------------------------------------------


def _benchmark(args: argparse.Namespace) -> int:
    need_folder(args.json, "--json")
    need_file(args.weights, "--weights")
    try:
        import torch
    except ImportError as exc:
        raise UsageError(f"the benchmark needs torch: pip install 'sparseprune[torch]' ({exc})") from None
    from .benchmarking import BASELINES, benchmark
    from .synthetic import fit_scale, prune_uniform

    model, shapes, keep_dense = load_model(args.model, args.input_shape)
    if args.batch is not None:
        shapes = [(args.batch, *shape[1:]) for shape in shapes]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    if args.weights is not None:
        load_weights(model, args.weights)
    model.eval()
    if args.sparsity is not None:
        prune_uniform(model, args.sparsity, exclude=keep_dense)
    try:
        if args.sparsity is not None or (keep_dense is not None and args.weights is None):
            fit_scale(model, inputs)
        with torch.inference_mode():
            model(*inputs)
    except Exception as exc:
        raise UsageError(f"{args.model} fails on inputs of shape {shapes}: {named(exc)}") from exc
    result = benchmark(model, inputs, threads=args.threads, rounds=args.rounds, name=args.model,
                       baselines=args.baselines or BASELINES)  # fmt: skip
    print(result)
    if args.json is not None:
        write(args.json, result.to_json())
    return 0


# --- inspect ---------------------------------------------------------------------------------------------------------


def _inspect(args: argparse.Namespace) -> int:
    path = Path(args.target)
    if not path.is_file() and (args.weights is not None or ":" in args.target or args.target in NETWORKS):
        return cli_prune.inspect_model(args)
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    if args.weights is not None or args.input_shape is not None:
        raise UsageError(f"--weights and --input-shape are for models, and {path} is a file")
    header = _safetensors_header(path)
    if header is None:
        raise UsageError(f"{path} is neither a sparseprune program (.spr) nor a safetensors weights file")
    if "sparseprune" in header.get("__metadata__", {}):
        from . import runtime

        print(_program_report(runtime.load(path).describe(), path))
    else:
        print(_weights_report(header, path))
    return 0


def _program_report(about: dict[str, Any], path: Path) -> str:
    """A table of a program's layers from what `Program.describe()` says."""
    lines = [f"{path}: a sparseprune program, {path.stat().st_size:,} bytes"]
    for entry in about["inputs"]:
        lines.append(f"input {entry['name']}: ({', '.join(str(n) for n in entry['shape'])}) float32")
    lines += ["", f"{'layer':32} {'operator':12} {'weight':>18} {'kept':>12} {'sparsity':>9}"]
    kept = total = 0
    for layer in about["layers"]:
        row = f"{layer['name']:32} {layer['op']:12}"
        if layer.get("total"):  # pooling and the like have no weight
            kept, total = kept + layer["kept"], total + layer["total"]
            shape = "×".join(str(n) for n in layer["shape"])
            row += f" {shape:>18} {layer['kept']:12,} {_percent(layer['kept'], layer['total']):>9}"
        lines.append(row.rstrip())
    lines += ["", f"{kept:,} of {total:,} weights kept, {_percent(kept, total)} zero; {about['nbytes']:,} bytes packed"]
    if any(layer.get("stored") == "float16" for layer in about["layers"]):
        lines.append("weights were rounded to float16 when the file was written")
    if "planning" in about:
        lines.append(about["planning"])
    return "\n".join(lines)


def _weights_report(header: dict[str, Any], path: Path) -> str:
    """A table of the tensors of a `save_weights` file, from its header alone, or of any other safetensors file."""
    own = header.get("__metadata__", {}).get("sparseprune.weights")
    what = "safetensors" if own is None else "sparseprune weights"
    lines = [f"{path}: {what}, {path.stat().st_size:,} bytes", ""]
    lines.append(f"{'tensor':40} {'dtype':8} {'shape':>18} {'kept':>12} {'sparsity':>9}")
    try:
        entries = header if own is None else json.loads(own)["tensors"]
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            if "same_as" in entry:
                lines.append(f"{name:40} the same as {entry['same_as']}")
                continue
            total = math.prod(entry["shape"])
            row = f"{name:40} {entry['dtype']:8} {'×'.join(map(str, entry['shape'])) or 'scalar':>18}"
            if "kept" in entry:
                row += f" {entry['kept']:12,} {_percent(entry['kept'], total):>9}"
            lines.append(row)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as exc:
        raise UsageError(f"{path} is damaged: its header does not describe tensors ({named(exc)})") from exc
    return "\n".join(lines)


def _safetensors_header(path: Path) -> dict[str, Any] | None:
    """The JSON header of a safetensors file, None where the file is something else."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= path.stat().st_size - 8:
            return None
        try:
            header = json.loads(file.read(size))
        except (ValueError, RecursionError):
            return None
    return header if isinstance(header, dict) and isinstance(header.get("__metadata__", {}), dict) else None


# --- doctor ----------------------------------------------------------------------------------------------------------


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    checks = doctor.diagnose()
    print(doctor.to_json(checks) if args.json else doctor.report(checks))
    return 0 if doctor.usable(checks) else 1


# --- helpers ---------------------------------------------------------------------------------------------------------


def _percent(kept: int, total: int) -> str:
    return f"{100 * (1 - kept / total):.1f} %" if total else "–"


def _one_line(exc: BaseException, limit: int = 400) -> str:
    text = " ".join(str(exc).split()) or type(exc).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
