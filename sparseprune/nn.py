"""Sparse layers as modules, for models that cannot become a program, and for those who want just layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from . import ops
from .bsr import BlockCSR
from .errors import SparsepruneError, UnsupportedError

__all__ = ["SparseConv2d", "SparseLinear"]


class _Sparse(nn.Module):
    """Evaluation only: a packed weight, a bias, no parameters."""

    bias: Tensor | None

    def __init__(self, weight: BlockCSR, bias: Tensor | None, dims: int) -> None:
        super().__init__()
        if not isinstance(weight, BlockCSR):
            raise TypeError(f"weight: expected a BlockCSR, got {type(weight).__name__}; see BlockCSR.from_dense")
        if len(weight.shape) != dims:
            raise ValueError(f"weight: expected {dims} dimensions, got shape {weight.shape}")
        self.packed = weight
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        super().train(False)

    @property
    def weight(self) -> Tensor:
        """The weight, unpacked afresh at each look."""
        return torch.from_numpy(self.packed.to_dense())

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise SparsepruneError("a sparse layer cannot be trained: train the dense layer and pack it again")
        return self

    def _described(self) -> str:
        return f"bias={self.bias is not None}, sparsity={1 - self.packed.density:.1%}"


class SparseLinear(_Sparse):
    """`torch.nn.Linear` with a packed weight; for evaluation: the output carries no gradient.

    Takes float32 `(..., in_features)` on the CPU, or float32, float16 or bfloat16 on a CUDA device (see `ops.linear`);
    returns `(..., out_features)` likewise. `to` moves it and changes its dtype; the packed weight follows the input.

    Args:
        weight: `(out_features, in_features)`.
        bias: `(out_features,)`, of the input's dtype.

    Raises:
        TypeError: `weight` is no `BlockCSR`. A call: the input is no tensor, or it or the bias of another dtype.
        ValueError: `weight` has not two dimensions. A call: shapes or devices that do not fit.
        SparsepruneError: From `train`.

    Example:
        >>> layer = sparseprune.nn.SparseLinear.from_linear(torch.nn.Linear(64, 10))
        >>> layer(torch.zeros(2, 7, 64)).shape
        torch.Size([2, 7, 10])
    """

    def __init__(self, weight: BlockCSR, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias, 2)
        self.out_features, self.in_features = weight.shape

    @classmethod
    def from_linear(cls, layer: nn.Linear, weight: BlockCSR | None = None) -> SparseLinear:
        """A copy of `layer` as it computes now, masks and parametrizations applied.

        Args:
            layer: float32, or on a CUDA device float16 or bfloat16 too.
            weight: `layer.weight`, packed already: for layers that share one.

        Raises:
            TypeError: `layer` is something else, or of another dtype.
        """
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"layer: expected a torch.nn.Linear, got {type(layer).__name__}")
        packed, bias = _packed(layer)
        return cls(weight if weight is not None else packed(), bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._described()}"


class SparseConv2d(_Sparse):
    """`torch.nn.Conv2d` with a packed weight and zero padding; for evaluation: the output carries no gradient.

    Takes float32 `(N, in_channels, H, W)` or `(in_channels, H, W)` on the CPU, or one of the types of `ops.conv2d` on a
    CUDA device; returns `(N, out_channels, H', W')` or `(out_channels, H', W')` likewise. Computed
    directly, without a dense weight and mostly without im2col, as first in Park et al., *Faster CNNs with Direct Sparse
    Convolutions and Guided Pruning*, 2016 (arXiv 1608.01409). `to` moves it; the packed weight follows the input.

    Args:
        weight: `(out_channels, in_channels/groups, kh, kw)`.
        bias: `(out_channels,)`, of the input's dtype.
        stride, padding, dilation: An int, or `(h, w)`; `padding` may be `"same"` (stride 1 only) or `"valid"`.
        groups: Divides both numbers of channels.

    Raises:
        TypeError: `weight` is no `BlockCSR`. A call: the input is no tensor, or it or the bias of another dtype.
        ValueError: `weight` has not four dimensions, or an attribute does not fit. A call: shapes or devices that do
            not fit.
        SparsepruneError: From `train`.

    Example:
        >>> layer = sparseprune.nn.SparseConv2d.from_conv2d(torch.nn.Conv2d(3, 16, 3, stride=2))
        >>> layer(torch.zeros(1, 3, 33, 33)).shape
        torch.Size([1, 16, 16, 16])
    """

    def __init__(
        self,
        weight: BlockCSR,
        bias: Tensor | None = None,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
    ) -> None:
        super().__init__(weight, bias, 4)
        self.out_channels, self.kernel_size = weight.shape[0], weight.shape[2:]
        if groups < 1 or self.out_channels % groups:
            raise ValueError(f"groups={groups} does not divide out_channels={self.out_channels}")
        self.in_channels = weight.shape[1] * groups
        self.stride, self.dilation, self.groups = _pair("stride", stride), _pair("dilation", dilation), groups
        self.padding = padding if isinstance(padding, str) else _pair("padding", padding)
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f"padding={padding!r}: expected 'same', 'valid', an int or two of them")
        if padding == "same" and self.stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got {self.stride}")

    @classmethod
    def from_conv2d(cls, layer: nn.Conv2d, weight: BlockCSR | None = None) -> SparseConv2d:
        """A copy of `layer` as it computes now, masks and parametrizations applied.

        Args:
            layer: float32, or on a CUDA device float16 or bfloat16 too.
            weight: `layer.weight`, packed already: for layers that share one.

        Raises:
            TypeError: `layer` is something else, or of another dtype.
            UnsupportedError: Its padding is not zeros.
        """
        if not isinstance(layer, nn.Conv2d):
            raise TypeError(f"layer: expected a torch.nn.Conv2d, got {type(layer).__name__}")
        if layer.padding_mode != "zeros":
            raise UnsupportedError(f"padding_mode={layer.padding_mode!r} is not supported, only 'zeros'")
        packed, bias = _packed(layer)
        return cls(
            weight if weight is not None else packed(),
            bias,
            stride=_pair("stride", layer.stride),
            padding=layer.padding if isinstance(layer.padding, str) else _pair("padding", layer.padding),
            dilation=_pair("dilation", layer.dilation),
            groups=layer.groups,
        )

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        padding = self.padding
        if padding == "valid":
            padding = (0, 0)
        elif isinstance(padding, str):
            # torch pads the odd element of an even kernel on the right and at the bottom.
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            padding = (total[0] // 2, total[1] // 2)
            odd = [t % 2 for t in total]
            if any(odd):
                x = functional.pad(x, (padding[1], padding[1] + odd[1], padding[0], padding[0] + odd[0]))
                padding = (0, 0)
        if x.dim() == 4 and x.shape[0] == 0:
            return x.new_zeros((0, self.out_channels, *self._size(x, padding)))
        return ops.conv2d(
            x, self.packed, self.bias,
            stride=self.stride, padding=padding, dilation=self.dilation, groups=self.groups,
        )  # fmt: skip

    def _size(self, x: Tensor, padding: tuple[int, int]) -> list[int]:
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return [(x.shape[2 + i] + 2 * padding[i] - reach[i]) // self.stride[i] + 1 for i in (0, 1)]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={tuple(self.kernel_size)}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, {self._described()}"
        )


def _packed(layer: nn.Linear | nn.Conv2d) -> tuple[Any, Tensor | None]:
    """What packs the effective weight, and a copy of the bias."""
    from .graph.snapshot import snapshot

    frozen: Any = snapshot(layer)
    bias = None if frozen.bias is None else frozen.bias.detach().clone()

    def pack() -> BlockCSR:
        weight = frozen.weight.detach()
        if weight.is_cuda:
            weight = weight.float()  # exact: both 16-bit types are parts of float32
        return BlockCSR.from_dense(np.ascontiguousarray(weight.cpu().numpy()))

    return pack, bias


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(f"{name}: expected an int or two of them, got {value!r}")
    return int(pair[0]), int(pair[1])
