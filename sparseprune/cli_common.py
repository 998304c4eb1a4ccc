"""What the commands of `sparseprune` share: arguments, models, files. torch is imported only where a model is."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["NETWORKS", "UsageError", "count", "load_model", "load_weights", "named", "names", "need_file",
           "need_folder", "share", "sizes", "write"]  # fmt: skip

# The names in zoo.NETWORKS, which cannot be imported without torch.
NETWORKS = ("resnet18-32", "resnet18", "resnet50", "vgg16", "vgg16-bn", "mobilenetv2", "yolov4-tiny",
             "ssd300-mobilenetv2", "unet", "tutorial-cnn", "lenet-300-100")  # fmt: skip


class UsageError(Exception):
    """What the user gave cannot be used; the message is the one line to print."""


def count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not in [0, 1)")
    return value


def sizes(text: str) -> tuple[int, ...]:
    return tuple(count(part.strip()) for part in text.split(","))


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def need_file(path: Path | None, option: str) -> None:
    if path is not None and not path.is_file():
        raise UsageError(f"{option}: {path} is not a file")


def need_folder(path: Path | None, option: str) -> None:
    """Whether a file can be written there, before anything is computed for it."""
    if path is not None and path.is_dir():
        raise UsageError(f"{option}: {path} is a folder, not a file")
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"{option}: {path.parent} is not a folder")


def load_model(
    spec: str, input_shapes: list[tuple[int, ...]] | None, *, shapes_needed: bool = True
) -> tuple[nn.Module, list[tuple[int, ...]], Sequence[str] | None]:
    """The model, its input shapes (batch first), and which layers stay dense (None: the default)."""
    from torch import nn

    from .zoo import NETWORKS

    if spec in NETWORKS:
        network = NETWORKS[spec]
        return network.factory(), input_shapes or [(1, *network.input_shape)], network.keep_dense
    module_name, colon, attribute = spec.partition(":")
    if not colon or not module_name or not attribute:
        raise UsageError(f"MODEL: {spec!r} is neither one of {', '.join(NETWORKS)} nor package.module:factory")
    if shapes_needed and not input_shapes:
        raise UsageError(f"{spec} needs --input-shape, for example --input-shape 1,3,224,224")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
        model = factory if isinstance(factory, nn.Module) else factory()
    except Exception as exc:
        raise UsageError(f"MODEL: {spec}: {named(exc)}") from exc
    if not isinstance(model, nn.Module):
        raise UsageError(f"MODEL: {spec} returned {type(model).__name__}, not a torch.nn.Module")
    return model, input_shapes or [], None


def load_weights(model: nn.Module, path: Path) -> None:
    from .files import load_pruned

    try:
        load_pruned(model, path)
    except Exception as exc:
        raise UsageError(f"--weights {path}: {exc}") from exc


def write(path: Path, data: str | bytes) -> None:
    """Written beside and renamed, so that a reader never sees half a file."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp's is 0600
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def named(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}"
