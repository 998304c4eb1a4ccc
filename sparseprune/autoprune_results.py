"""What `autoprune` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .latency import LatencyTable
from .tables import aligned

__all__ = ["Attempt", "AutopruneResult", "PrunedLayer"]


@dataclass(frozen=True)
class PrunedLayer:
    """One layer's choice: its final `sparsity`, the `error` it counted with, and its predicted milliseconds."""

    name: str
    shape: tuple[int, ...]
    sparsity: float
    error: float
    ms: float


@dataclass(frozen=True)
class Attempt:
    """One round: what was asked of the table, what it predicted of its answer, and what was measured, milliseconds.

    `chosen` is the answer: for each layer, the number of its option.
    """

    budget_ms: float
    predicted_ms: float
    measured_ms: float | None
    chosen: tuple[int, ...]


@dataclass(frozen=True)
class AutopruneResult:
    """What `autoprune` chose. `str()` is a table, `to_dict()` plain data.

    Attributes:
        layers: In the model's order.
        target_ms: What was asked.
        predicted_ms: By the latency table, of what was chosen.
        measured_ms: The converted model's, in the latency table's terms (`LatencyTable.yardstick`); None with
            `verify=False`.
        dense_ms: Dense torch's, in the faster of its two layouts.
        attempts: Every round; chosen is the one whose measured time is nearest to the target.
        table: The latency table, to save and use again.
    """

    layers: tuple[PrunedLayer, ...]
    target_ms: float
    predicted_ms: float
    measured_ms: float | None
    dense_ms: float
    attempts: tuple[Attempt, ...]
    table: LatencyTable

    @property
    def sparsities(self) -> dict[str, float]:
        """Layer -> final sparsity, as `prune`'s `amounts` and `LatencyTable.predict` take them."""
        return {layer.name: layer.sparsity for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON, without the latency table."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "target_ms": self.target_ms,
            "predicted_ms": self.predicted_ms,
            "measured_ms": self.measured_ms,
            "dense_ms": self.dense_ms,
            "attempts": [asdict(attempt) for attempt in self.attempts],
        }

    def __str__(self) -> str:
        rows = [("layer", "weight", "sparsity", "ms", "error")]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            rows.append((layer.name, shape, f"{layer.sparsity:.2%}", f"{layer.ms:.4f}", f"{layer.error:.3g}"))
        found = "not measured" if self.measured_ms is None else f"measured {self.measured_ms:.3f}"
        taken = self.predicted_ms if self.measured_ms is None else self.measured_ms
        times = f"target {self.target_ms:.3f} ms, predicted {self.predicted_ms:.3f}, {found}"
        times += f"; dense torch {self.dense_ms:.3f}, {self.dense_ms / taken:.2f} times as much"
        times += f"; {self.table.threads} thread(s), {len(self.attempts)} round(s)"
        return "\n".join([*aligned(rows, "<<>>>"), "", times])
