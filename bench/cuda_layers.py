"""Single layers on a GPU: what `convert` makes of each against every dense and sparse way that torch has, in one run.

    python bench/layers.py --device cuda --json layers.json           # this; --resume goes on where a run was cut off
    python bench/layers.py --device cuda --only cases                 # the layers of issue 6, with the ratios asked
    python bench/layers.py --device cuda --only table --shapes resnet50 --batch 64 --dtype float16 --sparsity 0.9

Two parts. The *cases* run all our kernels against all that torch has: dense, CSR (cuSPARSE), BSR (Triton), 2:4. The
*table* has every distinct layer of the CPU's table (`layer_shapes.py`) at each sparsity and pattern: what `convert`
chooses for it, by its own code and timer, and how often that is slower than dense. A pattern RxC has its zeros in whole
blocks of R outputs x C inputs of a tap. Layers have no bias, which only torch may run as a kernel of its own.

Every way is captured in a CUDA graph and replayed between events, in turns: `warm`, right after the same replay, and
`cold`, after the second-level cache was flushed. Dense runs with `cudnn.benchmark`, contiguous and channels_last, and
compiled with `--compile` (max-autotune; minutes a shape). Float32 is measured without TF32 and with, all ways alike.
Each side counts in the layout that suits it. The whole table has thousands of cells: be ready to wait, or narrow it.
Needs a CUDA device and the extension `_cuda`; exits with 2 where there is none.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import cuda_table
from bench_options import need_json, positive, positives, refuse, regex, resumed, shares, some_of
from cuda_timing import DTYPES, Events, Timer, device_facts, graph_times, unready
from cuda_ways import Case, measure

from sparseprune.cli_common import write
from sparseprune.cuda_layers import Window

SPARSITIES = "0,0.5,0.7,0.8,0.9,0.95,0.98"
BLOCK_SPARSITIES = "0.5,0.7,0.95"
PATTERNS = "1x1,8x1,32x32"
SETTINGS = ("sparsity", "block_sparsity", "patterns", "batch", "dtype", "tf32", "compile", "rounds")


def cases() -> list[Case]:
    """The layers of issue 6, with what it asks, and some beside them."""
    found = []
    for dtype, asked in (("float32", (2.5, 4, 6)), ("float16", (1.5, 2, 2.5))):
        for sparsity, ratio in zip((0.8, 0.9, 0.95), asked, strict=True):
            name = f"linear 4096-4096, batch 1, {dtype}, {sparsity:.0%}"
            found.append(Case(name, (4096, 4096), (1, 4096), sparsity, dtype, at_least=ratio, cold=True))
    conv, pad = ((256, 256, 3, 3), (64, 256, 14, 14)), Window(padding=(1, 1))
    for sparsity, ratio in zip((0.9, 0.95, 0.98), (1.8, 3, 5), strict=True):
        found.append(Case(f"conv 3x3 256, float32, {sparsity:.0%}", *conv, sparsity, window=pad, at_least=ratio))
    for sparsity, ratio in zip((0.8, 0.9, 0.95), (1.3, 2.3, 3.5), strict=True):
        name = f"conv 3x3 256, bfloat16, 32x32 blocks, {sparsity:.0%}"
        found.append(Case(name, *conv, sparsity, "bfloat16", (32, 32), pad, at_least=ratio))
    found.append(Case("conv 3x3 256, TF32, 16x1 vectors, 90%", *conv, 0.9, "float32", (16, 1), pad, tf32=True))
    found.append(Case("conv 3x3 256, strict float32, 16x1 vectors, 90%", *conv, 0.9, "float32", (16, 1), pad))
    found.append(Case("conv 3x3 256, float32, 4x1, 90%", *conv, 0.9, "float32", (4, 1), pad))
    found.append(Case("conv 1x1 256-64 at 56, bfloat16, 90%", (64, 256, 1, 1), (64, 256, 56, 56), 0.9, "bfloat16"))
    found.append(Case("linear 768-3072, 128 inputs, float16, 95%", (3072, 768), (128, 768), 0.95, "float16"))
    return found


def main(arguments: list[str] | None = None, program: str | None = None) -> int:
    """Exit status: 0 where all was measured, whatever came out; 2 where nothing can be, or options are wrong."""
    parser = _parser(program)
    options = _options(parser, arguments)
    layers = cuda_table.layers(options.batch, options.shapes) if options.only != "cases" else {}
    if options.only != "cases" and not layers:
        parser.error("--shapes finds no layer of the table")
    if why := unready():
        print(why, file=sys.stderr)
        return 2
    settings = {name: getattr(options, name) for name in SETTINGS}
    fresh: dict[str, Any] = {"settings": settings, "machine": device_facts(), "cases": [], "layers": []}
    document = resumed(options, settings) or fresh
    timer = graph_times(options.rounds, Events())
    if options.only != "table":
        _run_cases(document, options, timer)
    for line in cuda_table.run(document, layers, options, timer):
        print(line, flush=True)
        _save(document, options.json)
    if layers:
        found, text = cuda_table.summary(document)
        document["summary"] = found
        print(f"\n{text}")
    _save(document, options.json)
    return 0


def _run_cases(document: dict[str, Any], options: argparse.Namespace, timer: Timer) -> None:
    done = {record["case"]["name"] for record in document["cases"]}
    for case in cases():
        if case.name in done or not options.cases.search(case.name):
            continue
        found = measure(case, options.compile, timer)
        document["cases"].append(found)
        _save(document, options.json)
        ends = [f"{k} {found[k]['ratio']:.2f}x ({found[k]['ours']} to {found[k]['other']})" for k in ("warm", "cold")]
        asked = "" if case.at_least is None else f"; asked {case.at_least}x {'cold' if case.cold else 'warm'}"
        print(f"{case.name}: {', '.join(ends)}{asked}", flush=True)


def _save(document: dict[str, Any], path: Path | None) -> None:
    if path:
        write(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _parser(program: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("cases", "table"), help="default both")
    parser.add_argument("--cases", type=regex, default=re.compile(""), help="regular expression: cases whose name it "
                        "finds")  # fmt: skip
    parser.add_argument("--shapes", type=regex, default=re.compile(""), help="regular expression: layers of the table "
                        "whose name, group or network it finds")  # fmt: skip
    parser.add_argument("--sparsity", type=shares, help=f"of the table; default {SPARSITIES}")
    parser.add_argument("--block-sparsity", type=shares, help="of the patterns but 1x1; default what is given as "
                        f"--sparsity, else {BLOCK_SPARSITIES}")  # fmt: skip
    parser.add_argument("--patterns", type=_patterns, default=_patterns(PATTERNS), help=f"default {PATTERNS}")
    parser.add_argument("--batch", type=positives, default=[1, 64], help="images, and inputs of linear layers (BERT: "
                        "x 128); default 1,64")  # fmt: skip
    parser.add_argument("--dtype", type=some_of(*DTYPES), default=["float32"], help=f"of {', '.join(DTYPES)} some; "
                        "default float32")  # fmt: skip
    parser.add_argument("--tf32", type=some_of("off", "on"), default=["off", "on"], help="for float32; default off,on")
    parser.add_argument("--compile", action="store_true", help="torch.compile's max-autotune too; takes minutes")
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--json", type=Path, help="written after each layer")
    parser.add_argument("--resume", action="store_true", help="keep what --json holds, measure what it lacks")
    refuse(parser, "cpu", "--full", "--threads", "--seconds", "--plot")
    return parser


def _options(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    options.block_sparsity = options.block_sparsity or options.sparsity or shares(BLOCK_SPARSITIES)
    options.sparsity = options.sparsity or shares(SPARSITIES)
    need_json(parser, options)
    return options


def _patterns(text: str) -> list[str]:
    for part in text.split(","):
        if not re.fullmatch(r"[1-9]\d?x[1-9]\d?", part):
            raise argparse.ArgumentTypeError(f"{part!r} is no pattern: 1x1, or rows x columns such as 8x1 or 32x32")
    return list(dict.fromkeys(text.split(",")))


if __name__ == "__main__":
    sys.exit(main())
