"""Make fashion-mnist-subset.npz from the four IDX files of Fashion-MNIST (raw or .gz). NumPy only.

    python examples/data/make_subset.py DIR [--output FILE] [--train 10000] [--test 2000]

DIR holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each with
or without ".gz" (https://github.com/zalandoresearch/fashion-mnist; on Debian the package dataset-fashion-mnist). The
subset is the first images of each class, equally many per class, in their order in the original files: no randomness,
so anybody gets the same arrays.

`read_idx` and `load` are what `examples/demo.py` reads its images with.
"""

from __future__ import annotations

import argparse
import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
SUBSET = Path(__file__).with_name("fashion-mnist-subset.npz")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def read_idx(path: Path) -> Bytes:
    """The unsigned bytes of an IDX file, raw or gzip: images (N, 28, 28) or labels (N,), as uint8."""
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":  # two zero bytes, 8 = unsigned byte, then the rank
        raise ValueError(f"{path}: not an IDX file of unsigned bytes (starts with {raw[:4].hex()})")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise ValueError(f"{path}: the header is cut off, {len(raw)} bytes are all there is")
    shape = tuple(int(n) for n in np.frombuffer(raw[4:start], dtype=">u4"))
    data = np.frombuffer(raw, dtype=np.uint8)[start:]
    if data.size != math.prod(shape):
        raise ValueError(f"{path}: the header says {shape}, the file holds {data.size} bytes")
    return data.reshape(shape)


def load(directory: Path | None = None) -> dict[str, Bytes]:
    """`train_images` (N, 28, 28), `train_labels` (N,), `test_images`, `test_labels`, all uint8.

    From the IDX files in `directory`, or from the subset beside this script when it is None.
    """
    if directory is None:
        with np.load(SUBSET) as archive:
            return {name: archive[name] for name in archive.files}
    found: dict[str, Bytes] = {}
    for part, stem in (("train", "train"), ("test", "t10k")):
        for what, kind in (("images", "idx3"), ("labels", "idx1")):
            name = f"{stem}-{what}-{kind}-ubyte"
            paths = [p for p in (directory / name, directory / f"{name}.gz") if p.is_file()]
            if not paths:
                raise FileNotFoundError(f"{directory}: neither {name} nor {name}.gz is there")
            found[f"{part}_{what}"] = read_idx(paths[0])
    return found


def first_of_each_class(labels: Bytes, count: int) -> NDArray[np.intp]:
    """Sorted indices of the first `count / 10` entries of each of the ten classes."""
    if count % len(CLASSES):
        raise ValueError(f"count={count} is not a multiple of {len(CLASSES)} classes")
    each = count // len(CLASSES)
    picked = [np.flatnonzero(labels == c)[:each] for c in range(len(CLASSES))]
    for c, indices in enumerate(picked):
        if len(indices) < each:
            raise ValueError(f"class {c} has {len(indices)} images, {each} are wanted")
    return np.sort(np.concatenate(picked))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the subset of Fashion-MNIST from its IDX files.")
    parser.add_argument("directory", type=Path, help="folder with the four IDX files, raw or .gz")
    parser.add_argument("--output", type=Path, default=SUBSET)
    parser.add_argument("--train", type=int, default=10_000, help="training images, a multiple of 10")
    parser.add_argument("--test", type=int, default=2_000, help="test images, a multiple of 10")
    args = parser.parse_args()
    full = load(args.directory)
    subset: dict[str, Any] = {}
    for part, count in (("train", args.train), ("test", args.test)):
        indices = first_of_each_class(full[f"{part}_labels"], count)
        for what in ("images", "labels"):
            subset[f"{part}_{what}"] = full[f"{part}_{what}"][indices]
    np.savez_compressed(args.output, **subset)
    print(f"{args.output}: {args.train} + {args.test} images, {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
