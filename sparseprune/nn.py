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
    """`torch.nn.Linear` with a packed weight; the output carries no gradient.

    Example:
        >>> layer = sparseprune.nn.SparseLinear.from_linear(model.fc)
        >>> y = layer(x)  # (..., in_features)
    """

    def __init__(self, weight: BlockCSR, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias, 2)
        self.out_features, self.in_features = weight.shape

    @classmethod
    def from_linear(cls, layer: nn.Linear, weight: BlockCSR | None = None) -> SparseLinear:
        """A copy of `layer` as it computes now, masks and parametrizations applied.

        Args:
            layer: float32, on the CPU.
            weight: `layer.weight`, packed already: for layers that share one.

        Raises:
            TypeError: `layer` is something else, or not float32.
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
    """`torch.nn.Conv2d` with a packed weight and zero padding; the output carries no gradient.

    Example:
        >>> layer = sparseprune.nn.SparseConv2d.from_conv2d(model.conv1)
        >>> y = layer(x)  # (N, C, H, W) or (C, H, W)
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
        self.in_channels = weight.shape[1] * groups
        self.stride, self.dilation, self.groups = _pair(stride), _pair(dilation), groups
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f"padding={padding!r}: expected 'same', 'valid', an int or two of them")
        if padding == "same" and self.stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got {self.stride}")

    @classmethod
    def from_conv2d(cls, layer: nn.Conv2d, weight: BlockCSR | None = None) -> SparseConv2d:
        """A copy of `layer` as it computes now, masks and parametrizations applied.

        Args:
            layer: float32, on the CPU.
            weight: `layer.weight`, packed already: for layers that share one.

        Raises:
            TypeError: `layer` is something else, or not float32.
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
            stride=_pair(layer.stride),
            padding=layer.padding if isinstance(layer.padding, str) else _pair(layer.padding),
            dilation=_pair(layer.dilation),
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
    bias = None if frozen.bias is None else frozen.bias.detach().cpu().clone()

    def pack() -> BlockCSR:
        return BlockCSR.from_dense(np.ascontiguousarray(frozen.weight.detach().cpu().numpy()))

    return pack, bias


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)
