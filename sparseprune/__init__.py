"""sparseprune makes pruned PyTorch models actually fast. Names load when first used: importing this costs nothing."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> the module it lives in
_HOMES = {
    "BlockCSR": "bsr",
    "convert": "conversion",
    "SparseModule": "module",
    "load": "module",
    "load_pruned": "files",
    "load_weights": "files",
    "save_weights": "files",
    "prune": "pruning",
    "apply_masks": "pruning",
    "compact": "pruning",
    "hold_zeros": "pruning",
    "to_torch_prune": "pruning",
    "finalize": "pruning",
    "summary": "pruning",
    "Pruner": "pruning",
    "finetune": "training",
    "Distillation": "distillation",
    "evaluate": "evaluation",
    "autoprune": "autopruning",
    "AutopruneResult": "autoprune_results",
    "LatencyTable": "latency",
    "sensitivity": "sensitivities",
    "Sensitivity": "sensitivities",
    "recalibrate_bn": "calibration",
    "benchmark": "benchmarking",
    "BenchmarkResult": "benchmarking",
    "prune_uniform": "synthetic",
    "num_threads": "threads",
    "set_num_threads": "threads",
    "CudaError": "errors",
    "FormatError": "errors",
    "SparsepruneError": "errors",
    "SparsepruneWarning": "errors",
    "UnsupportedError": "errors",
    "VerificationError": "errors",
}
_MODULES = ("errors", "graph", "nn", "ops", "pruning", "regularizers", "runtime", "testing", "training", "zoo")

__all__ = ["__version__", *_HOMES, *(name for name in _MODULES if name != "nn")]  # a star would hide torch's nn


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "nn"])
