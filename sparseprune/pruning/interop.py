"""To `torch.nn.utils.prune` and back."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrize import is_parametrized

from .masks import get_mask, has_only_masks, iter_masked, remove_mask

__all__ = ["to_torch_prune"]

_Model = TypeVar("_Model", bound=nn.Module)


def to_torch_prune(model: _Model) -> _Model:
    """Turn every mask of `model` into a hook of `torch.nn.utils.prune`, in place: `weight_orig`, `weight_mask`.

    For tools that know only those. Masks, effective weights and Parameter objects stay the same, so optimizers do too;
    tied layers stay tied. The way back needs no call: `prune`, `hold_zeros`, `finetune`, `convert` and `finalize` take
    hooks as they are, `prune(model, present_sparsity)` makes masks of them.

    Args:
        model: any module. Layers that carry hooks already are left alone.

    Returns:
        `model` itself.

    Raises:
        ValueError: a masked parameter has other parametrizations as well (weight_norm, say), which hooks cannot hold.

    Example:
        >>> to_torch_prune(prune(model, 0.9))
        >>> torch.nn.utils.prune.l1_unstructured(model.fc, "weight", amount=0.5)
    """
    masked = [(layer, module, name) for layer, module, name in iter_masked(model) if is_parametrized(module, name)]
    for layer, module, name in masked:
        if not has_only_masks(module, name):
            raise ValueError(
                f"{layer}.{name} has a mask and other parametrizations; finalize(model) would bake both, "
                "torch.nn.utils.prune cannot hold them"
            )
    masks = [get_mask(module, name) for _, module, name in masked]
    for (_, module, name), mask in zip(masked, masks, strict=True):
        assert mask is not None
        remove_mask(module, name)
        torch_prune.custom_from_mask(module, name, mask)  # type: ignore[no-untyped-call]
    return model
