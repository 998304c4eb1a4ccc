"""What a conversion did, layer by layer: the report of a `SparseModule`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["LayerReport", "Report", "SegmentReport"]


@dataclass(frozen=True)
class LayerReport:
    """One convolution or linear layer.

    Attributes:
        name: The torch layer's qualified name.
        op: `conv` or `linear`.
        shape: The weight's, as it runs: without channels that are constant or that nobody reads.
        sparsity: Zeros / total of that.
        block_density: Stored blocks / all blocks of the packed weight.
        dense_ms: The fastest dense way measured inside the running network (torch's best layout, or our dense kernel),
            milliseconds; None where nothing was timed.
        sparse_ms: Ours as chosen, measured inside the running network, with its packing; milliseconds.
        choice: What runs: form of the packed input / kind of the packed weight / vectors a tile; where single layers
            were swapped (`sparseprune.nn`), `sparse layer` or `torch`.
        reason: Why.
        error: Largest absolute difference of this layer's output from float64 on the same input; None: not verified.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    sparsity: float
    block_density: float
    dense_ms: float | None
    sparse_ms: float | None
    choice: str
    reason: str
    error: float | None


@dataclass(frozen=True)
class SegmentReport:
    """A part of a model that is not wholly native.

    Attributes:
        kind: `native` or `torch`.
        operators: A summary: the layers of a native segment, the operators of a torch one.
        nodes: How many operators it has.
        share: Of the time of all segments, on the example inputs, from 0 to 1; None where nothing was timed.

    Example:
        >>> [(segment.kind, segment.share) for segment in fast.report.segments]
        [('native', 0.83), ('torch', 0.17)]
    """

    kind: str
    operators: str
    nodes: int
    share: float | None


@dataclass(frozen=True)
class Report:
    """A conversion's report. `str(report)` is a table.

    Attributes:
        layers: Every convolution and linear layer, in order; of all native segments where there are several.
        runs: `sparse` (the native program, or segments, or swapped layers), or `eager` / `channels_last` where that
            dense way was faster.
        reason: Why.
        times_ms: Median milliseconds of the whole model: `sparse`, `eager`, `channels_last`; empty if none was timed.
        max_error, bound: Largest absolute difference from float64 on the examples, and what was allowed there.
        input_shapes, threads, isa, torch: What it was measured with.
        notes: What else is worth knowing, such as sizes that had to be fixed, and how many channels were removed.
        segments: In order, where the model is not wholly native; else empty, also where single layers were swapped
            (a note says so then).

    Example:
        >>> print(fast.report)
        >>> slow = [layer.name for layer in fast.report.layers if layer.choice == "torch"]
        >>> json.dumps(fast.report.to_dict())
    """

    layers: tuple[LayerReport, ...]
    runs: str
    reason: str
    input_shapes: tuple[tuple[int, ...], ...]
    threads: int
    isa: str
    torch: str
    times_ms: dict[str, float] = field(default_factory=dict)
    max_error: float | None = None
    bound: float | None = None
    notes: tuple[str, ...] = ()
    segments: tuple[SegmentReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [("layer", "weight", "sparsity", "dense ms", "ours ms", "runs as", "why", "error")]
        for layer in self.layers:
            rows.append(
                (
                    layer.name,
                    "x".join(map(str, layer.shape)),
                    f"{layer.sparsity:.1%}",
                    _number(layer.dense_ms, "{:.3f}"),
                    _number(layer.sparse_ms, "{:.3f}"),
                    layer.choice,
                    layer.reason,
                    _number(layer.error, "{:.1e}"),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append("")
        lines.append(
            f"runs: {self.runs} ({self.reason}); inputs {self.input_shapes}, {self.threads} threads, {self.isa}"
        )
        if self.times_ms:
            lines.append("whole model, ms: " + ", ".join(f"{name} {ms:.3f}" for name, ms in self.times_ms.items()))
        if self.max_error is not None:
            lines.append(
                f"largest error against float64: {self.max_error:.2e} (allowed there: {_number(self.bound, '{:.2e}')})"
            )
        for segment in self.segments:
            share = "not timed" if segment.share is None else f"{segment.share:.0%} of the time"
            count = f"{segment.nodes} operator{'' if segment.nodes == 1 else 's'}"
            lines.append(f"{segment.kind} segment, {share}: {count} ({segment.operators})")
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
