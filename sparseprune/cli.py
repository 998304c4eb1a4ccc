"""The `sparseprune` command: `benchmark` a network, `convert` one, `inspect` a file, `doctor` says what is missing.

A user's mistake is one line on stderr and exit status 2. torch is imported only by `benchmark` and `convert`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .cli_convert import add_convert
from .errors import SparsepruneError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["main"]

_EPILOG = """examples:
  sparseprune benchmark resnet18-32 --sparsity 0.95 --threads 2
  sparseprune benchmark my_models:make_net --weights pruned.pt --input-shape 1,3,224,224 --json out.json
  sparseprune convert my_models:make_net pruned.pt -o model.spr --input-shape 1,3,224,224
  sparseprune inspect model.spr
  sparseprune doctor
"""

# The names in zoo.NETWORKS, which cannot be imported without torch.
_NETWORKS = ("resnet18-32", "resnet18", "resnet50", "vgg16", "vgg16-bn", "mobilenetv2", "yolov4-tiny",
             "ssd300-mobilenetv2", "unet", "tutorial-cnn", "lenet-300-100")  # fmt: skip


class UsageError(Exception):
    """What the user gave cannot be used; the message is the one line to print."""


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
    bench.add_argument("model", metavar="MODEL", help=f"{', '.join(_NETWORKS)}, or package.module:factory")
    bench.add_argument("--weights", type=Path, metavar="FILE", help="a state dict (.pt) or safetensors to load")
    bench.add_argument("--sparsity", type=_share, metavar="S",
                       help="write random zeros, this share of every layer but the first convolution "
                            "(without it the weights stay as they are)")  # fmt: skip
    bench.add_argument("--batch", type=_count, metavar="N", help="images at a time (default 1)")
    bench.add_argument("--threads", type=_count, metavar="N", help="default: every core this process may use")
    bench.add_argument("--input-shape", type=_shape, action="append", metavar="N,C,H,W",
                       help="with the batch; needed for package.module:factory; once for each input")  # fmt: skip
    bench.add_argument("--baselines", type=_names, metavar="A,B",
                       help="some of eager,channels_last,compile,compile_channels_last (default all)")  # fmt: skip
    bench.add_argument("--rounds", type=_count, default=8, metavar="N", help="short blocks per candidate (default 8)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    bench.set_defaults(run=_benchmark)

    add_convert(commands)

    inspect = commands.add_parser("inspect", help="print what a program (.spr) or a weights file holds")
    inspect.add_argument("file", type=Path, metavar="FILE")
    inspect.set_defaults(run=_inspect)

    doctor = commands.add_parser("doctor", help="print what is here, and what to type for what is missing")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not in [0, 1)")
    return value


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_count(part.strip()) for part in text.split(","))


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


# --- benchmark -------------------------------------------------------------------------------------------------------


def _benchmark(args: argparse.Namespace) -> int:
    if args.json is not None and not args.json.parent.is_dir():
        raise UsageError(f"--json: {args.json.parent} is not a folder")
    if args.weights is not None and not args.weights.is_file():
        raise UsageError(f"--weights: {args.weights} is not a file")
    try:
        import torch
    except ImportError as exc:
        raise UsageError(f"the benchmark needs torch: pip install 'sparseprune[torch]' ({exc})") from None
    from .benchmarking import BASELINES, benchmark
    from .synthetic import fit_scale, prune_uniform

    model, shapes, keep_dense = _model(args.model, args.input_shape)
    if args.batch is not None:
        shapes = [(args.batch, *shape[1:]) for shape in shapes]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    if args.weights is not None:
        _load_weights(model, args.weights)
    model.eval()
    if args.sparsity is not None:
        prune_uniform(model, args.sparsity, exclude=keep_dense)
    try:
        if args.sparsity is not None or (keep_dense is not None and args.weights is None):
            fit_scale(model, inputs)
        with torch.inference_mode():
            model(*inputs)
    except Exception as exc:
        raise UsageError(f"{args.model} fails on inputs of shape {shapes}: {_named(exc)}") from exc
    result = benchmark(model, inputs, threads=args.threads, rounds=args.rounds, name=args.model,
                       baselines=args.baselines or BASELINES)  # fmt: skip
    print(result)
    if args.json is not None:
        _write(args.json, result.to_json())
    return 0


def _model(
    spec: str, input_shapes: list[tuple[int, ...]] | None
) -> tuple[nn.Module, list[tuple[int, ...]], Sequence[str] | None]:
    """The model, its input shapes (batch first), and which layers stay dense (None: the default)."""
    from torch import nn

    from .zoo import NETWORKS

    if spec in NETWORKS:
        network = NETWORKS[spec]
        return network.factory(), input_shapes or [(1, *network.input_shape)], network.keep_dense
    module_name, colon, attribute = spec.partition(":")
    if not colon or not module_name or not attribute:
        raise UsageError(f"MODEL: {spec!r} is neither one of {', '.join(NETWORKS)} nor package.module:factory")
    if not input_shapes:
        raise UsageError(f"{spec} needs --input-shape, for example --input-shape 1,3,224,224")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
        model = factory if isinstance(factory, nn.Module) else factory()
    except Exception as exc:
        raise UsageError(f"MODEL: {spec}: {_named(exc)}") from exc
    if not isinstance(model, nn.Module):
        raise UsageError(f"MODEL: {spec} returned {type(model).__name__}, not a torch.nn.Module")
    return model, input_shapes, None


def _load_weights(model: nn.Module, path: Path) -> None:
    from .files import load_pruned

    try:
        load_pruned(model, path)
    except Exception as exc:
        raise UsageError(f"--weights {path}: {exc}") from exc


def _write(path: Path, text: str) -> None:
    """Written beside and renamed, so that a reader never sees half a file."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp's is 0600
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


# --- inspect ---------------------------------------------------------------------------------------------------------


def _inspect(args: argparse.Namespace) -> int:
    if not args.file.is_file():
        raise UsageError(f"{args.file} is not a file")
    header = _safetensors_header(args.file)
    if header is None:
        raise UsageError(f"{args.file} is neither a sparseprune program (.spr) nor a safetensors weights file")
    if "sparseprune" in header.get("__metadata__", {}):
        from . import runtime

        print(_program_report(runtime.load(args.file).describe(), args.file))
    else:
        print(_weights_report(header, args.file))
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
        raise UsageError(f"{path} is damaged: its header does not describe tensors ({_named(exc)})") from exc
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


def _named(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}"


def _one_line(exc: BaseException, limit: int = 400) -> str:
    text = " ".join(str(exc).split()) or type(exc).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
