"""Which weights go: three choices (criterion, pattern, scope) and the masks that hold the answer."""

from __future__ import annotations

from .api import apply_masks, finalize, hold_zeros, prune
from .criteria import Criterion, Magnitude, Random, Scores
from .interop import to_torch_prune
from .masks import Mask, get_mask, set_mask
from .obs import OBS
from .patterns import Block, NofM, Pattern, Slice
from .removal import CompactLayer, CompactReport, Stayed, compact
from .schedule import Pruner
from .scopes import ErdosRenyi, Global, Local, Scope
from .slimming import BNScale
from .statistics import LayerSummary, Summary, summary
from .taylor import Taylor

__all__ = [
    "BNScale", "Block", "CompactLayer", "CompactReport", "Criterion", "ErdosRenyi", "Global", "LayerSummary", "Local",
    "Magnitude", "Mask", "NofM", "OBS", "Pattern", "Pruner", "Random", "Scope", "Scores", "Slice", "Stayed",
    "Summary", "Taylor", "apply_masks", "compact", "finalize", "get_mask", "hold_zeros", "prune", "set_mask", "summary",
    "to_torch_prune",
]  # fmt: skip
