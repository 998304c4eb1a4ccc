"""Which weights go: three choices (criterion, pattern, scope) and the masks that hold the answer."""

from __future__ import annotations

from .api import finalize, hold_zeros, prune
from .criteria import Criterion, Magnitude, Random, Scores
from .masks import Mask, get_mask, set_mask
from .patterns import Block, Pattern
from .removal import CompactLayer, CompactReport, Stayed, compact
from .scopes import Global, Local, Scope
from .statistics import LayerSummary, Summary, summary

__all__ = [
    "Block", "CompactLayer", "CompactReport", "Criterion", "Global", "LayerSummary", "Local", "Magnitude", "Mask",
    "Pattern", "Random", "Scope", "Scores", "Stayed", "Summary", "compact", "finalize", "get_mask", "hold_zeros",
    "prune", "set_mask", "summary",
]  # fmt: skip
