"""Weights in files: pruned checkpoints of any dialect in, non-zeros only out (safetensors, never a pickle)."""

from __future__ import annotations

import json
import math
import os
import pickle
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor, nn

from .checkpoints import check_mapping, install, plain_entries, unwrap
from .errors import FormatError
from .positions import decode_positions, encode_positions

__all__ = ["load_pruned", "load_weights", "save_weights", "weights_size"]

_Model = TypeVar("_Model", bound=nn.Module)
_Path = str | os.PathLike[str]

_KEY, _VERSION = "sparseprune.weights", 1
_DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool)}  # fmt: skip
_SPARSE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load_pruned(model: _Model, state_dict: Mapping[str, Any] | _Path) -> _Model:
    """Load a pruned checkpoint, in whatever dialect it was saved, into `model`.

    Understood are plain zeros; `x_orig` with `x_mask` (`torch.nn.utils.prune`); `parametrizations.x.original` with
    masks, ours or others'; `module.` and `_orig_mod.` before every name; a state dict inside {"state_dict": ...},
    {"model": ...} and the like; files of `save_weights`. Masked entries become plain zeros; where `model` itself has a
    mask already, that mask becomes the non-zeros of what was loaded. To train on, `hold_zeros(model)` first.

    Args:
        model: plain, masked or hooked; changed only if everything fits.
        state_dict: a mapping from names to tensors, or the path of a `.safetensors` file or of a torch checkpoint,
            which is read with `weights_only=True`.

    Returns:
        `model` itself.

    Raises:
        ValueError: names are missing or unexpected, or shapes differ; all are listed.
        TypeError: `state_dict` is a module, or an entry is no tensor.
        FormatError: the file is damaged, or holds something else.
        OSError: it cannot be read.

    Example:
        >>> load_pruned(resnet18(), "resnet18-pruned.pt")
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    own = plain_entries({k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)})
    if isinstance(state_dict, (str, os.PathLike)):
        checkpoint = _read_checkpoint(Path(state_dict), _elements(model))
    else:
        checkpoint = check_mapping(state_dict)
    entries = plain_entries(unwrap(checkpoint, set(own)))
    install(model, {name: entry.value for name, entry in entries.items()}, "state_dict")
    return model


def save_weights(model: nn.Module, path: _Path) -> None:
    """Store a pruned model's parameters and buffers, of sparse ones only the non-zeros, in a safetensors file.

    Each tensor is stored dense or as values plus positions (a bitmap, or 8 or 16 bit gaps), whichever is smallest; at
    95 % sparsity that is about 5 bytes a kept float32. Masks are applied, not stored: names are those of the plain
    model. Equal bytes for equal weights. The file is written beside `path` and then moved there.

    Args:
        model: plain, masked or hooked by `torch.nn.utils.prune`.
        path: where to, usually `*.safetensors`.

    Raises:
        TypeError, ValueError: the model's state dict holds something else than tensors, or an unusual dtype.
        OSError: the file cannot be written.

    Example:
        >>> save_weights(model, "resnet18-98.safetensors")
    """
    _write(Path(path), _encoded(model))


def weights_size(model: nn.Module, *, dense: bool = False) -> int:
    """How many bytes `save_weights` would write; `dense`: if nothing were zero."""
    return len(_encoded(model, dense))


def load_weights(model: _Model, path: _Path) -> _Model:
    """Load a file of `save_weights` into a model of the same architecture, bit for bit.

    (Negative zeros come back as +0.) Where the model has a mask, the mask becomes the non-zeros of what was loaded;
    elsewhere zeros stay plain, and `hold_zeros(model)` makes them a mask. Nothing is changed if an error is raised.

    Args:
        model: plain, masked or hooked.
        path: the file.

    Returns:
        `model` itself.

    Raises:
        FormatError: the file is damaged or no such file; the message names the tensor.
        ValueError: names, shapes or dtypes differ from the model's; all are listed.
        OSError: it cannot be read.

    Example:
        >>> load_weights(resnet18(), "resnet18-98.safetensors")
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    tensors = _read_safetensors(Path(path), _elements(model))
    if tensors is None:
        raise FormatError(f"{os.fspath(path)} is a safetensors file, but not one of save_weights; try load_pruned")
    install(model, tensors, "the file", exact=True)
    return model


def _encoded(model: nn.Module, dense: bool = False) -> bytes:
    """The file of `save_weights`."""
    state = model.state_dict()
    described: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, entry in plain_entries(state).items():
        if _dtype_name(entry.value) not in _DTYPES:
            raise ValueError(f"{name} has dtype {entry.value.dtype}, expected one of {', '.join(_DTYPES)}")
        twin = first.setdefault(tuple(_identity(state[key]) for key in (entry.value_key, *entry.mask_keys)), name)
        if twin != name and entry.value.numel():  # tied parameters are stored once
            described[name] = {"same_as": twin}
            continue
        described[name], stored = _encode(name, entry.value.cpu().contiguous(), dense)
        for key, tensor in stored.items():
            if key in tensors:
                raise ValueError(f"{name} cannot be stored: the name {key!r} is taken")
            tensors[key] = tensor
    header = json.dumps({"version": _VERSION, "tensors": described}, separators=(",", ":"), sort_keys=True)
    return safetensors_torch.save(tensors, metadata={_KEY: header})


def _encode(name: str, value: Tensor, dense: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How one tensor is stored: its entry in the header, and the tensors of the file."""
    entry: dict[str, Any] = {"dtype": _dtype_name(value), "shape": list(value.shape)}
    if value.dtype in _SPARSE_DTYPES and not dense:
        flat = value.reshape(-1)
        kept = flat != 0
        encoding, positions = encode_positions(kept.numpy())
        values = flat[kept]
        if values.nbytes + positions.nbytes < value.nbytes:
            stored = {f"{name}#values": values, f"{name}#{encoding}": torch.from_numpy(positions)}
            return {**entry, "encoding": encoding, "kept": len(values)}, stored
    return {**entry, "encoding": "dense"}, {name: value.clone()}


def _read_safetensors(path: Path, budget: int) -> dict[str, Tensor] | None:
    """A `save_weights` file's tensors; None if it is some other safetensors file.

    Where the header declares more than `budget` elements, which cannot fit the model, tensors are on the meta device.
    """
    try:
        with safe_open(path, framework="pt") as reader:
            metadata = reader.metadata() or {}
            if _KEY not in metadata:
                return None
            stored = {key: reader.get_tensor(key) for key in reader.keys()}
    except (SafetensorError, RuntimeError) as error:
        raise FormatError(f"{path} is not a valid safetensors file: {error}") from error
    entries = _parse_header(metadata[_KEY], str(path))
    own = {name: _described(name, entry) for name, entry in entries.items() if "same_as" not in entry}
    fits = sum(math.prod(shape) for _, shape in own.values()) <= budget
    result: dict[str, Tensor] = {}
    for name, (dtype, shape) in own.items():
        result[name] = _decode(name, entries[name], dtype, shape, stored, fits)
    if stored:
        raise FormatError(f"{path} holds tensors that its header does not describe: {sorted(stored)[:5]}")
    for name, entry in entries.items():
        if "same_as" in entry:
            twin = entry["same_as"]
            if not isinstance(twin, str) or twin not in own or len(entry) != 1:
                raise FormatError(f"tensor {name!r}: same_as={twin!r} names no stored tensor")
            result[name] = result[twin]
    return result


def _parse_header(text: str, where: str) -> dict[str, dict[str, Any]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: the header is not valid JSON: {error}") from error
    if not isinstance(header, dict) or set(header) != {"version", "tensors"}:
        raise FormatError(f"{where}: the header must hold version and tensors")
    if header["version"] != _VERSION or isinstance(header["version"], bool):
        raise FormatError(f"{where}: version is {header['version']!r}, this release reads {_VERSION}")
    tensors = header["tensors"]
    if not isinstance(tensors, dict) or not all(isinstance(entry, dict) for entry in tensors.values()):
        raise FormatError(f"{where}: the header's tensors must be objects by name")
    return tensors


def _described(name: str, entry: dict[str, Any]) -> tuple[torch.dtype, tuple[int, ...]]:
    """The dtype and shape that a header's entry declares, checked."""
    expected = {"dtype", "shape", "encoding"} | (set() if entry.get("encoding") == "dense" else {"kept"})
    if set(entry) != expected:
        raise FormatError(f"tensor {name!r}: the header has {sorted(entry)}, expected {sorted(expected)}")
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise FormatError(f"tensor {name!r}: dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise FormatError(f"tensor {name!r}: shape is {str(shape)[:80]}, expected a list of sizes")
    if math.prod(size or 1 for size in shape) >= 2**40:
        raise FormatError(f"tensor {name!r}: shape {shape} is too large")
    return _DTYPES[dtype], tuple(shape)


def _decode(
    name: str, entry: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...], stored: dict[str, Tensor], fits: bool
) -> Tensor:
    """Rebuild one tensor, taking what it needs out of `stored`."""
    encoding = entry["encoding"]
    keys = [name] if encoding == "dense" else [f"{name}#values", f"{name}#{encoding}"]
    for key in keys:
        if key not in stored:
            raise FormatError(f"tensor {name!r}: the file lacks {key!r}")
    values, *rest = (stored.pop(key) for key in keys)
    length = shape if encoding == "dense" else (entry["kept"],)
    if values.dtype != dtype or tuple(values.shape) != length:
        raise FormatError(f"tensor {name!r}: stored as {values.dtype} {tuple(values.shape)}, expected {dtype} {length}")
    if encoding == "dense":
        return values
    if not fits:
        return torch.empty(shape, dtype=dtype, device="meta")
    try:
        positions = decode_positions(encoding, rest[0].numpy(), math.prod(shape), len(values))
    except FormatError as error:
        raise FormatError(f"tensor {name!r}: {error}") from error
    if bool((values == 0).any()):
        raise FormatError(f"tensor {name!r}: a kept value is zero")
    flat = torch.zeros(math.prod(shape), dtype=dtype)
    flat[torch.from_numpy(positions)] = values
    return flat.reshape(shape)


def _read_checkpoint(path: Path, budget: int) -> Mapping[str, Any]:
    with open(path, "rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        tensors = _read_safetensors(path, budget)
        return safetensors_torch.load_file(path) if tensors is None else tensors
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path} is no checkpoint of tensors alone, and unpickling code is unsafe; "
            f"save model.state_dict() instead of the model ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # torch.load raises nearly anything on damaged bytes
        raise FormatError(f"{path} is not a torch checkpoint: {error}") from error
    return check_mapping(checkpoint)


def _write(path: Path, data: bytes) -> None:
    """Write beside `path`, then move there: whoever reads sees the old file or the new one."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _elements(model: nn.Module) -> int:
    """How many elements a file for this model can declare at most."""
    return 16 + sum(value.numel() for value in model.state_dict().values() if isinstance(value, Tensor))
