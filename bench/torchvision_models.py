"""Converts torchvision's architectures, random weights with uniformly 90 % zeros, and says how each fared.

    pip install --no-deps torchvision==0.28.0 pillow     # the release for torch 2.13; sparseprune does not depend on it
    python bench/torchvision_models.py --json out.json   # again: goes on where it stopped; --retry: and tries failures
    python bench/torchvision_models.py --only 'resnet|mobilenet' --sparsity 0.95 --size 160

Prints a line a network as it goes: the native segments' share of the time (100 % where all is one native program), the
number of segments (0 where only single layers were swapped), the speed-up against the fastest of eager and
channels_last, the largest error against float64, and beside it the largest difference to eager torch on another input,
in parts of the largest output; or the error's first line. A network "agrees" where that
difference is at most 1e-3. Each runs in a process of its own, so that none can take the others along.

Stems and depthwise convolutions keep their weights, and so do attention's input projections, which are no layers
(`sparseprune.prune_uniform`). Detectors are measured without their heads, whose box arithmetic needs torchvision's own
operators. These are declared here as empty schemas, for a torchvision that was built for another torch than the one
installed, whose compiled part then cannot be loaded: nothing here calls them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INSTALL = "pip install --no-deps torchvision==0.28.0 pillow  (the release that fits your torch; 0.28 is for 2.13)"
AGREES = 1e-3  # of the largest output
FIT_SIZE = 224  # batch norms get their statistics from images of at most this size

# Operators that torchvision's Python files look up when they are imported.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_LIBRARIES: list[Any] = []  # the schemas live as long as this


@dataclass(frozen=True)
class Network:
    """A name for `torchvision.models.get_model`, the usual image size, and what else the factory wants."""

    name: str
    size: int = 224
    options: dict[str, Any] = field(default_factory=dict)
    backbone: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}.backbone" if self.backbone else self.name


_QUICK = {"init_weights": False}  # torchvision's own initialisation takes half a minute
_BARE: dict[str, Any] = {"weights_backbone": None}

NETWORKS = (
    Network("alexnet"),
    Network("vgg11"),
    Network("vgg16"),
    Network("vgg16_bn"),
    Network("resnet18"),
    Network("resnet34"),
    Network("resnet50"),
    Network("resnet101"),
    Network("resnext50_32x4d"),
    Network("wide_resnet50_2"),
    Network("densenet121"),
    Network("densenet169"),
    Network("googlenet", options=_QUICK),
    Network("inception_v3", 299, _QUICK),
    Network("mnasnet0_5"),
    Network("mnasnet1_0"),
    Network("mobilenet_v2"),
    Network("mobilenet_v3_small"),
    Network("mobilenet_v3_large"),
    Network("shufflenet_v2_x0_5"),
    Network("shufflenet_v2_x1_0"),
    Network("squeezenet1_0"),
    Network("squeezenet1_1"),
    Network("efficientnet_b0"),
    Network("efficientnet_b1", 240),
    Network("efficientnet_b3", 300),
    Network("efficientnet_v2_s", 384),
    Network("regnet_x_400mf"),
    Network("regnet_x_1_6gf"),
    Network("regnet_y_400mf"),
    Network("regnet_y_1_6gf"),
    Network("convnext_tiny"),
    Network("vit_b_16"),
    Network("vit_b_32"),
    Network("swin_t"),
    Network("swin_v2_t", 256),
    Network("maxvit_t"),
    Network("fcn_resnet50", 520, _BARE),
    Network("deeplabv3_resnet50", 520, _BARE),
    Network("deeplabv3_mobilenet_v3_large", 520, _BARE),
    Network("lraspp_mobilenet_v3_large", 520, _BARE),
    Network("fasterrcnn_resnet50_fpn", 800, _BARE, backbone=True),
    Network("retinanet_resnet50_fpn", 800, _BARE, backbone=True),
    Network("fasterrcnn_mobilenet_v3_large_320_fpn", 320, _BARE, backbone=True),
    Network("ssd300_vgg16", 300, _BARE, backbone=True),
    Network("ssdlite320_mobilenet_v3_large", 320, _BARE, backbone=True),
)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", help="networks whose name holds a match")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="for all, instead of each one's usual size")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--threads", type=int, help="default: every core this process may use")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results; what it holds already is not run again")
    parser.add_argument("--retry", action="store_true", help="run what failed or disagreed, by --json FILE, again")
    parser.add_argument("--timeout", type=float, default=900, metavar="SECONDS", help="for each network (default 900)")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)  # a child: its row goes to stdout
    options = parser.parse_args()
    networks = [n for n in NETWORKS if not options.only or re.search(options.only, n.label)]
    if options.list:
        print("\n".join(n.label for n in networks))
    elif options.one:
        network = next(n for n in NETWORKS if n.label == options.one)
        print(json.dumps(measure(network, options.size or network.size, options.sparsity, options.threads)))
    else:
        run_all(networks, options)


def run_all(networks: list[Network], options: argparse.Namespace) -> None:
    """Runs what the file does not hold yet; it is written after every network."""
    done = _load(options.json)
    rows = []
    width = max((len(n.label) for n in networks), default=0)
    print(f"{'':{width}} {'size':>5} {'native':>7} {'segments':>8} {'speed-up':>9} {'error':>9} {'to eager':>9}")
    for network in networks:
        size = options.size or network.size
        key = [network.label, size, options.sparsity, options.threads]
        row = next((r for r in done if r["key"] == key), None)
        if row is None or (options.retry and not agrees(row)):
            row = {"key": key} | _child(network, size, options)
            done = [r for r in done if r["key"] != key] + [row]
            _store(options.json, done)
        rows.append(row)
        print(line(row, width), flush=True)
    print(totals(rows))


def measure(network: Network, size: int, sparsity: float, threads: int | None) -> Row:
    """Converts one network; what goes wrong in conversion is part of the row."""
    import torch

    import sparseprune
    from sparseprune.synthetic import fit_scale, prune_uniform

    if threads:
        torch.set_num_threads(threads)
        sparseprune.set_num_threads(threads)
    torch.manual_seed(0)
    model = make(network).eval()
    prune_uniform(model, sparsity)
    fixed = network.name.startswith(("vit", "swin", "maxvit", "ssd"))  # these take no size of ours, or none smaller
    fit = size if fixed else min(size, FIT_SIZE)
    fit_scale(model, [torch.zeros(1, 3, fit, fit)])
    x, other = torch.randn(2, 1, 3, size, size).unbind()
    start = time.perf_counter()
    try:
        fast = sparseprune.convert(model, x)
        taken = time.perf_counter() - start
        with torch.no_grad():
            difference = _difference(fast(other), model(other))
    except Exception as exc:  # reported, whatever it is
        return {"failure": _first_line(exc)}
    return _row(fast.report) | {"difference": difference, "seconds": taken}


def make(network: Network) -> Any:
    """The torch module, random weights."""
    import torch

    model = _torchvision_models().get_model(network.name, weights=None, **network.options)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and not layer.weight.any():
            layer.reset_parameters()  # vision transformers' last one: with zeros any output agrees
    return model.backbone if network.backbone else model


def _torchvision_models() -> Any:
    try:
        return importlib.import_module("torchvision.models")
    except ImportError as exc:
        sys.exit(f"torchvision cannot be imported ({exc}): {INSTALL}")
    except RuntimeError as exc:  # its compiled part was built for another torch
        if "does not exist" not in str(exc) or _LIBRARIES:
            raise
    import torch

    library: Any = torch.library
    _LIBRARIES.append(library.Library("torchvision", "FRAGMENT"))
    for schema in SCHEMAS:
        _LIBRARIES[0].define(schema)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    return _torchvision_models()


def _row(report: Any) -> Row:
    times = dict(report.times_ms)
    dense = min((times[name] for name in ("eager", "channels_last") if name in times), default=None)
    ours = min((ms for name, ms in times.items() if name not in ("eager", "channels_last")), default=None)
    return {
        "failure": None,
        "runs": report.runs,
        "times_ms": times,
        "speedup": dense / ours if dense and ours else None,
        "max_error": report.max_error,
        "bound": report.bound,
    } | _segments(report)


def _segments(report: Any) -> Row:
    """How many segments there are, and the native ones' share of the time; 0 where only single layers were swapped."""
    segments = getattr(report, "segments", ())
    if any(layer.choice in ("sparse layer", "torch") for layer in report.layers):
        return {"segments": 0, "native": None}
    if not segments:
        return {"segments": 1, "native": 1.0}
    shares = [s.share for s in segments if s.kind == "native"]
    return {"segments": len(segments), "native": None if None in shares else sum(shares)}


def _difference(found: Any, expected: Any) -> float:
    """The largest absolute difference, in parts of the largest output."""
    import torch
    from torch.utils._pytree import tree_leaves

    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    worst = torch.stack([(x.double() - y.double()).abs().max() for x, y in pairs]).max().item()  # NaN if any is
    largest = torch.stack([y.double().abs().max() for _, y in pairs]).max().item()
    return float(worst / largest if largest else worst)


# --- processes, files and lines --------------------------------------------------------------------------------------


def _child(network: Network, size: int, options: argparse.Namespace) -> Row:
    command = [sys.executable, __file__, "--one", network.label, "--size", str(size), "--sparsity",
               str(options.sparsity)]  # fmt: skip
    command += ["--threads", str(options.threads)] if options.threads else []
    try:
        found = subprocess.run(command, capture_output=True, timeout=options.timeout, check=False, text=True,
                               errors="replace")  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failure": f"took longer than {options.timeout:g} s"}
    if found.returncode == 0 and found.stdout.strip():
        return dict(json.loads(found.stdout.strip().splitlines()[-1]))
    last = found.stderr.strip().splitlines()[-1:] or ["no message"]
    if "torchvision cannot be imported" in last[0]:
        sys.exit(last[0])
    return {"failure": f"exit status {found.returncode}: {last[0]}"}


def _load(path: Path | None) -> list[Row]:
    return list(json.loads(path.read_text(encoding="utf-8"))) if path is not None and path.exists() else []


def _store(path: Path | None, rows: list[Row]) -> None:
    if path is not None:
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)


def line(row: Row, width: int) -> str:
    """A row as it is printed."""
    head = f"{row['key'][0]:{width}} {row['key'][1]:5}"
    if row["failure"] is not None:
        return f"{head} {row['failure']}"
    text = f"{head} {_form(row['native'], '{:.0%}'):>7} {row['segments']:8} {_form(row['speedup'], '{:.2f}x'):>9}"
    text += f" {_form(row['max_error'], '{:.1e}'):>9} {row['difference']:9.1e}"
    return text + ("" if agrees(row) else "  DISAGREES") + ("" if row["runs"] == "sparse" else f"  runs {row['runs']}")


def agrees(row: Row) -> bool:
    """Whether it converted and gives eager's numbers; NaN does not."""
    return row["failure"] is None and bool(row["difference"] <= AGREES)


def totals(rows: list[Row]) -> str:
    """The lines at the end."""
    good = [row for row in rows if agrees(row)]
    timed = [row for row in good if row["speedup"] is not None]
    slower = [row["key"][0] for row in timed if row["speedup"] < 1]
    lines = ["", f"{len(good)} of {len(rows)} convert and agree (difference at most {AGREES:g} of the largest output)"]
    lines.append(f"{sum(row['segments'] == 1 for row in good)} of these are one native program")
    lines.append(f"{len(slower)} of these are slower than the fastest of eager and channels_last"
                 + (f": {', '.join(slower)}" if slower else ""))  # fmt: skip
    return "\n".join(lines)


def _form(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {lines[0] if lines else ''}"[:300]


if __name__ == "__main__":
    main()
