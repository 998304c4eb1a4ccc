from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

DATA = Path(__file__).parents[1] / "examples" / "data"


@pytest.fixture(scope="module")
def make_subset() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_subset", DATA / "make_subset.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_subset"] = module
    spec.loader.exec_module(module)
    return module


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def test_committed_subset(make_subset: ModuleType) -> None:
    assert sum(file.stat().st_size for file in DATA.iterdir() if file.is_file()) <= 6_000_000
    assert "Zalando" in (DATA / "LICENSE").read_text(encoding="utf-8")
    arrays = make_subset.load()
    for part, count in (("train", 10_000), ("test", 2_000)):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        assert images.shape == (count, 28, 28) and images.dtype == np.uint8
        assert np.bincount(labels).tolist() == [count // 10] * 10
        assert 65 < images.mean() < 80  # the full set's mean is 72.9
    assert not (set(map(bytes, arrays["test_images"])) & set(map(bytes, arrays["train_images"])))


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_are_read(make_subset: ModuleType, tmp_path: Path, compress: bool) -> None:
    random = np.random.default_rng(0)
    expected: dict[str, np.ndarray] = {}
    for part, stem in (("train", "train"), ("test", "t10k")):
        for what, kind, shape in (("images", "idx3", (20, 28, 28)), ("labels", "idx1", (20,))):
            array = random.integers(0, 256, shape, dtype=np.uint8)
            expected[f"{part}_{what}"] = array
            name, raw = f"{stem}-{what}-{kind}-ubyte", idx(array)
            if compress:
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw))
            else:
                (tmp_path / name).write_bytes(raw)
    found = make_subset.load(tmp_path)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("raw", [b"", b"\0\0\x08", b"\0\0\x09\1\0\0\0\1x", b"\0\0\x08\1\0\0\0\2x", b"\0\0\x08\3\0\0"])
def test_files_that_are_not_idx(make_subset: ModuleType, tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "wrong"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="wrong"):
        make_subset.read_idx(path)


def test_missing_file(make_subset: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither train-images-idx3-ubyte nor"):
        make_subset.load(tmp_path)


def test_choice_of_images(make_subset: ModuleType) -> None:
    labels = np.tile(np.arange(10, dtype=np.uint8), 3)
    assert make_subset.first_of_each_class(labels, 20).tolist() == list(range(20))
    with pytest.raises(ValueError, match="count=15"):
        make_subset.first_of_each_class(labels, 15)
    with pytest.raises(ValueError, match="class 0 has 3 images, 4"):
        make_subset.first_of_each_class(labels, 40)
