"""What torch 2.6 cannot do, which the tests run on too (docs/reliability.md)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparseprune.graph.ir import Graph

OLD = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7)
open_sizes = pytest.mark.skipif(OLD, reason="torch 2.6 exports this model for the example's sizes only")
traced_weights = pytest.mark.skipif(OLD, reason="torch 2.6 does not trace functions that give constants")


def fixes_another_size(graph: Graph, shapes: Any) -> bool:
    """Whether `graph` was exported for other sizes only, as torch 2.6 does with some models; newer ones must not."""
    pairs = zip(graph.inputs, shapes, strict=True)
    return OLD and any(isinstance(d, int) and d != n for i, shape in pairs for d, n in zip(i.shape, shape, strict=True))
