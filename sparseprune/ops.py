"""Single sparse operators on tensors, for those who want just them. Outputs carry no gradient.

Registered through `torch.library` (`sparseprune::linear`, `sparseprune::conv2d`) with fakes; the registration layer
costs about ten microseconds a call, so it is used only while torch is compiling or exporting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from . import _native
from .bsr import BlockCSR
from .cuda_layers import DTYPES, CudaLayer, Window, is_channels_last

__all__ = ["conv2d", "linear"]

_Pair = int | Sequence[int]


def linear(x: Tensor, weight: BlockCSR, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` with a sparse weight. The output carries no gradient, whatever `x` requires.

    Args:
        x: float32 on the CPU, or float32, float16 or bfloat16 on a CUDA device, `(..., in)`.
        weight: `(out, in)`.
        bias: `(out,)`, of the dtype and device of `x`.

    Returns:
        `(..., out)`, likewise. On CUDA, a shape's first call measures what is fastest, dense ways among it; the rest
        can be captured in CUDA graphs.

    Raises:
        TypeError: An argument is no tensor, or not of such a dtype.
        ValueError: Shapes or devices that do not fit.
        CudaError: `x` is on a CUDA device, and this build, the driver or a call fails there.

    Example:
        >>> y = sparseprune.ops.linear(x, BlockCSR.from_dense(layer.weight), layer.bias)
    """
    _check(x, weight, bias, 2)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected shape (..., {weight.shape[1]}), got {tuple(x.shape)}")
    if torch.compiler.is_compiling():
        return torch.ops.sparseprune.linear(x.detach(), *_tensors(weight), _detached(bias))  # type: ignore[no-any-return]
    return _linear(x, weight, bias)


def conv2d(
    x: Tensor,
    weight: BlockCSR,
    bias: Tensor | None = None,
    *,
    stride: _Pair = 1,
    padding: _Pair = 0,
    dilation: _Pair = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` with a sparse weight. The output carries no gradient, whatever `x` requires.

    Args:
        x: float32 on the CPU, or float32, float16 or bfloat16 on a CUDA device, `(N, in, H, W)`; any strides.
        weight: `(out, in/groups, kh, kw)`.
        bias: `(out,)`, of the dtype and device of `x`.
        stride, padding, dilation: an int, or `(h, w)`; in pixels.

    Returns:
        `(N, out, H', W')`, likewise; on CUDA channels_last where `x` is. See `linear` for what a first call does there.

    Raises:
        TypeError: An argument is no tensor, or not of such a dtype.
        ValueError: Shapes, devices or attributes that do not fit.
        CudaError: As of `linear`.

    Example:
        >>> y = sparseprune.ops.conv2d(x, BlockCSR.from_dense(conv.weight), conv.bias, padding=1)
    """
    _check(x, weight, bias, 4)
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (N, C, H, W), got {tuple(x.shape)}")
    pairs = _pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation)
    if torch.compiler.is_compiling():
        op = torch.ops.sparseprune.conv2d
        return op(x.detach(), *_tensors(weight), _detached(bias), *map(list, pairs), groups)  # type: ignore[no-any-return]
    return _conv2d(x, weight, bias, *pairs, groups)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _linear(x: Tensor, weight: BlockCSR, bias: Tensor | None) -> Tensor:
    if x.numel() == 0:
        return x.new_zeros((*x.shape[:-1], weight.shape[0]))
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    if x.device.type == "cuda":
        return _cuda_layer(weight, Window())(rows, bias).reshape(*x.shape[:-1], weight.shape[0])
    return _run(weight, (0, (1, 1), (0, 0, 0, 0), (1, 1), 1), rows, bias).reshape(*x.shape[:-1], weight.shape[0])


def _conv2d(
    x: Tensor,
    weight: BlockCSR,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    if x.device.type == "cuda":
        return _cuda_layer(weight, Window(stride, padding, dilation, groups))(x, bias)
    sides = (padding[0], padding[0], padding[1], padding[1])
    return _run(weight, (2, stride, sides, dilation, groups), x.detach().contiguous(), bias)


def _cuda_layer(weight: BlockCSR, window: Window) -> CudaLayer:
    layer = weight._cuda_layers.get(window)
    return layer if layer is not None else weight._cuda_layers.setdefault(window, CudaLayer(weight, window))


def _run(weight: BlockCSR, layer: tuple[Any, ...], x: Tensor, bias: Tensor | None) -> Tensor:
    program = weight._programs.get(layer)
    if program is None:
        program = weight._programs.setdefault(layer, _native.Program.layer(weight._native, *layer))
    plan = program.plan([tuple(x.shape)])
    out = torch.empty(plan.output_shapes[0], dtype=torch.float32, device="cpu")
    plan.run([x.numpy()], [out.numpy()])
    if bias is not None:
        out += bias.detach().reshape(-1, *(1,) * (out.dim() - 2))
    return out


def _check(x: Tensor, weight: BlockCSR, bias: Tensor | None, rank: int) -> None:
    if not isinstance(weight, BlockCSR):
        raise TypeError(f"weight: expected a BlockCSR, got {type(weight).__name__}; see BlockCSR.from_dense")
    if len(weight.shape) != rank:
        raise ValueError(f"weight: expected {rank} dimensions, got shape {weight.shape}")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name}: expected a tensor on the CPU or a CUDA device, got one on {tensor.device}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device}, where x is, got one on {tensor.device}")
        if x.device.type == "cuda" and tensor is x and x.dtype not in DTYPES:
            raise TypeError(f"x: expected dtype float32, float16 or bfloat16, got {x.dtype}")
        expected = x.dtype if x.device.type == "cuda" else torch.float32
        if tensor.dtype != expected:
            raise TypeError(f"{name}: expected dtype {str(expected).removeprefix('torch.')}, got {tensor.dtype}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _pair(name: str, value: _Pair) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name}: expected an int or two of them, got {value!r}")
    return int(value[0]), int(value[1])


# ---- torch.library ----

_weights: dict[tuple[Any, ...], tuple[BlockCSR, list[StorageWeakRef]]] = {}


# A weight is immutable, and no part of what is traced: else export would copy it at each call, or store fake tensors.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _tensors(weight: BlockCSR) -> list[Any]:
    """A weight as the operators take it: crow_indices, col_indices, masks (int64 bits), values, shape, block_shape."""
    arrays = (weight.crow_indices, weight.col_indices, weight.masks.view("int64"), weight.values)
    with _disable_current_modes():
        return [*(torch.from_numpy(a) for a in arrays), list(weight.shape), list(weight.block_shape)]


def _weight(
    crow: Tensor, col: Tensor, masks: Tensor, values: Tensor, shape: Sequence[int], block: Sequence[int]
) -> BlockCSR:
    """The weight of these tensors, checked and packed once as long as they live, unwritten."""
    tensors = (crow, col, masks, values)
    key = (*((t.data_ptr(), t._version, t.numel()) for t in tensors), tuple(shape), tuple(block))
    found = _weights.get(key)
    if found is None or _expired(found[1]):  # another tensor may have been given a dead one's memory
        for old in [old for old, (_, storages) in list(_weights.items()) if _expired(storages)]:
            _weights.pop(old, None)
        bits = masks.contiguous().numpy().view("uint64")
        weight = BlockCSR(shape, (block[0], block[1]), crow.numpy(), col.numpy(), bits, values.detach().numpy())
        storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]  # type: ignore[no-untyped-call]
        found = _weights[key] = (weight, storages)
    return found[0]


def _expired(storages: list[StorageWeakRef]) -> bool:
    return any(storage.expired() for storage in storages)  # type: ignore[no-untyped-call]


# written out: torch 2.6 reads neither list[int] nor Tensor | None from annotations
_WEIGHT_SCHEMA = (
    "Tensor x, Tensor crow_indices, Tensor col_indices, Tensor masks, Tensor values, int[] shape, int[] block_shape"
)


@torch.library.custom_op("sparseprune::linear", mutates_args=(), schema=f"({_WEIGHT_SCHEMA}, Tensor? bias) -> Tensor")
def _linear_op(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    masks: Tensor,
    values: Tensor,
    shape: list[int],
    block_shape: list[int],
    bias: Tensor | None,
) -> Tensor:
    return _linear(x, _weight(crow_indices, col_indices, masks, values, shape, block_shape), bias)


@_linear_op.register_fake
def _linear_fake(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    masks: Tensor,
    values: Tensor,
    shape: list[int],
    block: list[int],
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.custom_op(
    "sparseprune::conv2d", mutates_args=(),
    schema=f"({_WEIGHT_SCHEMA}, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
)  # fmt: skip
def _conv2d_op(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    masks: Tensor,
    values: Tensor,
    shape: list[int],
    block_shape: list[int],
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    weight = _weight(crow_indices, col_indices, masks, values, shape, block_shape)
    pairs = _pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation)
    return _conv2d(x, weight, bias, *pairs, groups)


@_conv2d_op.register_fake
def _conv2d_fake(
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    masks: Tensor,
    values: Tensor,
    shape: list[int],
    block: list[int],
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    size = [(x.shape[2 + a] + 2 * padding[a] - dilation[a] * (shape[2 + a] - 1) - 1) // stride[a] + 1 for a in (0, 1)]
    y = x.new_empty((x.shape[0], shape[0], *size))
    last = x.device.type == "cuda" and is_channels_last(x)
    return y.contiguous(memory_format=torch.channels_last) if last else y
