"""Checkpoints in every dialect, and weight files that are small, exact and checked."""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel

from sparseprune import pruning
from sparseprune.errors import FormatError
from sparseprune.files import load_pruned, load_weights, save_weights
from sparseprune.positions import decode_positions, encode_positions
from sparseprune.pruning import hold_zeros, prune, set_mask, summary

pytestmark = pytest.mark.filterwarnings("ignore:pruned to nothing")

get_mask: Any = pruning.get_mask
l1_unstructured: Any = torch_prune.l1_unstructured


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 64)
    )  # fmt: skip
    model(torch.randn(4, 3, 8, 8))  # batch statistics of its own
    return model


def plain(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the model computes with, under plain names; worked out by hand, since deepcopy fails on hooked models."""
    state, result = model.state_dict(), {}
    for key, value in state.items():
        if key.endswith("_orig"):
            key, value = key[:-5], value.where(state[f"{key[:-5]}_mask"] == 1, 0)
        elif key.endswith(".original"):
            value = value.where(state[key.replace("original", "0.mask")], 0)
            key = key.replace("parametrizations.", "").replace(".original", "")
        if not key.endswith("mask"):
            result[key] = value.clone()
    return result


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def hooked(model: Any) -> Any:
    for layer in (model[0], model[2], model[4]):
        l1_unstructured(layer, "weight", 0.8)
    return model


class TheirMask(nn.Module):
    """As other libraries write it: floats, under another name, multiplied."""

    keep: torch.Tensor

    def __init__(self, keep: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep.float())

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.keep


def dialects() -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Name -> (checkpoint, the plain state it means)."""
    masked = prune(network(), 0.9)
    masked[0].parametrizations.weight.original.data.add_(1)  # what lies under the mask must not show
    want = plain(masked)
    hooks = hooked(network())
    hooks[0].weight_orig.data.add_(1)
    theirs = network()
    keep = torch.rand(64, 128) > 0.5
    meant = {**theirs.state_dict(), "4.weight": theirs[4].weight.detach() * keep}
    parametrize.register_parametrization(theirs[4], "weight", TheirMask(keep))
    state = masked.state_dict()
    averaged = AveragedModel(masked)
    return {
        "masks": (state, want),
        "plain zeros": (want, want),
        "module.": ({f"module.{k}": v for k, v in state.items()}, want),
        "_orig_mod. and module.": ({f"_orig_mod.module.{k}": v for k, v in want.items()}, want),
        "nested": ({"state_dict": state, "epoch": 3, "best": torch.tensor(0.9)}, want),
        "twice nested": ({"model": {"state_dict": {f"module.{k}": v for k, v in want.items()}}}, want),
        "averaged": (averaged.state_dict(), want),
        "hooks": (hooks.state_dict(), plain(hooks)),
        "their parametrization": (theirs.state_dict(), meant),
        "without num_batches_tracked": (
            {k: v for k, v in state.items() if "num_batches" not in k},
            {**want, "1.num_batches_tracked": torch.tensor(1)},
        ),
    }  # fmt: skip


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "plain": lambda: network(1), "masked": lambda: prune(network(1), 0.5), "hooked": lambda: hooked(network(1))
}  # fmt: skip


@pytest.mark.parametrize("into", list(MODELS))
@pytest.mark.parametrize("dialect", list(dialects()))
def test_load_pruned_understands(dialect: str, into: str) -> None:
    checkpoint, expected = dialects()[dialect]
    model: Any = MODELS[into]()
    assert load_pruned(model, checkpoint) is model
    assert same(plain(model), expected)
    if into == "plain":
        assert get_mask(model[0]) is None
    else:
        assert torch.equal(get_mask(model[4]), expected["4.weight"] != 0)
        assert torch.equal(model[4].weight, expected["4.weight"])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_load_pruned_reads_files(tmp_path: Path, suffix: str) -> None:
    checkpoint, expected = dialects()["masks"]
    path = tmp_path / f"model{suffix}"
    torch.save(checkpoint, path) if suffix == ".pt" else save_file(checkpoint, path)
    assert same(plain(load_pruned(network(1), path)), expected)
    assert same(plain(load_pruned(network(1), str(path))), expected)
    save_weights(prune(network(), 0.5), tmp_path / "weights.bin")  # recognised by content
    assert same(plain(load_pruned(network(1), tmp_path / "weights.bin")), plain(prune(network(), 0.5)))


def test_load_pruned_lists_everything_that_does_not_fit() -> None:
    state = plain(network())
    state["extra"] = state.pop("0.bias")
    state["4.weight"] = torch.zeros(2, 2)
    model = network(1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as caught:
        load_pruned(model, state)
    text = str(caught.value)
    assert "missing: 0.bias" in text and "unexpected: extra" in text and "(2, 2), the model (64, 128)" in text
    assert same(before, model.state_dict())


def test_load_pruned_rejects_other_things(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"pass module\.state_dict"):
        load_pruned(network(), network())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"state_dict\['0.bias'\] must be a tensor"):
        load_pruned(network(), {**plain(network()), "0.bias": [1.0]})
    with pytest.raises(ValueError, match="weight_mask has shape"):
        load_pruned(network(), {"0.weight_orig": torch.ones(2, 2), "0.weight_mask": torch.ones(3, 2)})
    torch.save(network(), tmp_path / "whole.pt")
    with pytest.raises(FormatError, match="unsafe"):
        load_pruned(network(), tmp_path / "whole.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(FormatError, match="holds list"):
        load_pruned(network(), tmp_path / "list.pt")
    for name in ("junk.pt", "junk.safetensors"):
        (tmp_path / name).write_bytes(b"\x00" * 100)
        with pytest.raises(FormatError, match="junk"):
            load_pruned(network(), tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_pruned(network(), tmp_path / "none.pt")


def test_weight_norm_checkpoints_keep_their_keys() -> None:
    model, other = (nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))) for _ in range(2))
    loaded: Any = load_pruned(other, model.state_dict())
    assert torch.equal(loaded[0].weight, model.get_submodule("0").weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("into", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_weights_survive_bit_for_bit(tmp_path: Path, dtype: torch.dtype, into: str) -> None:
    model = prune(network(), 0.95).to(dtype)
    model[4].bias.data[0] = float("nan")
    path = tmp_path / "w.safetensors"
    save_weights(model, path)
    other = load_weights(MODELS[into]().to(dtype), path)
    for key, value in plain(model).items():
        assert value.reshape(-1).view(torch.uint8).equal(plain(other)[key].reshape(-1).view(torch.uint8)), key
    assert summary(hold_zeros(other)).kept == summary(model).kept
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_files_are_as_small_as_the_non_zeros(tmp_path: Path) -> None:
    for amount, bytes_each in ((0.95, 5.1), (0.98, 5.1), (0.5, 4.3)):
        model = prune(nn.Linear(512, 512, bias=False), amount)
        save_weights(model, tmp_path / "w")
        assert (tmp_path / "w").stat().st_size < summary(model).kept * bytes_each + 500
    save_weights(nn.Linear(512, 512), tmp_path / "dense")
    assert (tmp_path / "dense").stat().st_size < 512 * 513 * 4 + 500
    save_weights(model, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "w").read_bytes()


def test_extremes(tmp_path: Path) -> None:
    makes: list[Callable[[torch.Tensor], object]]
    makes = [lambda w: w.zero_(), lambda w: w.zero_()[-1].fill_(2), lambda w: w.mul_(-0.0), lambda w: w]
    for make in makes:
        model, other = nn.Linear(700, 600), nn.Linear(700, 600)
        with torch.no_grad():
            make(model.weight)
        save_weights(model, tmp_path / "w")
        assert torch.equal(load_weights(other, tmp_path / "w").weight, model.weight)
    save_weights(nn.ReLU(), tmp_path / "w")
    load_weights(nn.ReLU(), tmp_path / "w")


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    def tied() -> Any:
        model: Any = nn.Sequential(nn.Embedding(50, 40), nn.Linear(40, 50, bias=False))
        model[1].weight = model[0].weight
        return model

    for model in (tied(), prune(tied(), 0.5)):
        save_weights(model, tmp_path / "w")
        assert (tmp_path / "w").stat().st_size < 50 * 40 * 4 + 500
        other = load_weights(tied(), tmp_path / "w")
        assert torch.equal(other[0].weight, model[1].weight) and other[0].weight is other[1].weight


def test_a_file_for_another_model(tmp_path: Path) -> None:
    save_weights(prune(network(), 0.9), tmp_path / "w")
    with pytest.raises(ValueError, match=r"shape of 4.weight.*\(64, 128\), the model \(60, 128\)"):
        load_weights(nn.Sequential(*list(network())[:4], nn.Linear(128, 60)), tmp_path / "w")
    with pytest.raises(ValueError, match="dtype of 0.weight"):
        load_weights(network().half(), tmp_path / "w")
    with pytest.raises(ValueError, match="unexpected: 0.weight"):
        load_weights(nn.ReLU(), tmp_path / "w")
    save_file(plain(network()), tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match="not one of save_weights"):
        load_weights(network(), tmp_path / "other.safetensors")
    with pytest.raises(OSError):
        save_weights(network(), tmp_path / "no" / "such" / "folder")
    with pytest.raises(ValueError, match="dtype torch.complex64"):
        save_weights(nn.Linear(2, 2, dtype=torch.complex64), tmp_path / "w")


KEY = "sparseprune.weights"


def edited(path: Path, edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    with safe_open(path, framework="pt") as reader:
        header = json.loads(reader.metadata()[KEY])
    tensors = load_file(path)
    edit(header, tensors)
    save_file(tensors, path, metadata={KEY: json.dumps(header)})


EDITS: dict[str, tuple[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]]] = {
    "version": ("version is 2", lambda h, t: h.update(version=2)),
    "no tensors": ("must hold version and tensors", lambda h, t: h.pop("tensors")),
    "entries are lists": ("must be objects", lambda h, t: h.update(tensors={"4.weight": []})),
    "unknown key": ("'4.weight': the header has", lambda h, t: h["tensors"]["4.weight"].update(pickle=1)),
    "dtype": ("'4.weight': dtype is", lambda h, t: h["tensors"]["4.weight"].update(dtype="object")),
    "other dtype": ("'4.weight': stored as", lambda h, t: h["tensors"]["4.weight"].update(dtype="float64")),
    "negative size": ("'4.weight': shape is", lambda h, t: h["tensors"]["4.weight"].update(shape=[-64, -128])),
    "huge": ("'4.weight': shape .* too large", lambda h, t: h["tensors"]["4.weight"].update(shape=[2**39, 2**39])),
    "encoding": ("'4.weight': the file lacks", lambda h, t: h["tensors"]["4.weight"].update(encoding="lz")),
    "count": ("'4.weight': stored as", lambda h, t: h["tensors"]["4.weight"].update(kept=3)),
    "twin": ("'new': same_as", lambda h, t: h["tensors"].update({"new": {"same_as": []}})),
    "lost": ("'4.weight': the file lacks", lambda h, t: t.pop("4.weight#gaps8")),
    "too many": ("does not describe", lambda h, t: t.update(extra=torch.zeros(2))),
    "dense shape": ("'0.bias': stored as", lambda h, t: t.update({"0.bias": torch.zeros(3)})),
    "beyond": ("'4.weight': gaps reach", lambda h, t: t["4.weight#gaps8"].fill_(254)),
    "ends in a skip": ("'4.weight': gaps end", lambda h, t: t["4.weight#gaps8"].fill_(255)),
    "fewer": ("'4.weight': gaps8 holds", lambda h, t: t.update({"4.weight#gaps8": t["4.weight#gaps8"][:-1].clone()})),
    "gaps dtype": ("'4.weight': gaps are", lambda h, t: t.update({"4.weight#gaps8": t["4.weight#gaps8"].int()})),
    "a zero": ("'4.weight': a kept value is zero", lambda h, t: t["4.weight#values"][:1].zero_()),
}


@pytest.mark.parametrize("case", list(EDITS))
def test_damaged_headers_and_tensors_are_named(tmp_path: Path, case: str) -> None:
    path, (message, edit) = tmp_path / "w.safetensors", EDITS[case]
    save_weights(prune(network(), 0.9), path)
    model = network(1)
    before = copy.deepcopy(model.state_dict())
    edited(path, edit)
    with pytest.raises(FormatError, match=message):
        load_weights(model, path)
    assert same(before, model.state_dict())


def test_a_declared_size_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(prune(network(), 0.9), path)
    edited(path, lambda h, t: h["tensors"]["4.weight"].update(shape=[2**19, 2**19]))  # 1 TiB of zeros
    for load in (load_weights, load_pruned):
        with pytest.raises(ValueError, match="shape of 4.weight"):
            load(network(), path)


def test_truncated_and_mutated_files_never_crash(tmp_path: Path) -> None:
    model = prune(nn.Linear(40, 30), 0.9)
    path = tmp_path / "w.safetensors"
    save_weights(model, path)
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            load_weights(nn.Linear(40, 30), path)
    generator = np.random.default_rng(0)
    (header,) = struct.unpack("<Q", whole[:8])
    for _ in range(300):
        data = bytearray(whole)
        for place in generator.integers(0, header + 8, 2):
            data[place] = generator.integers(256)
        path.write_bytes(data)
        try:
            load_weights(nn.Linear(40, 30), path)
        except ValueError:  # FormatError, or names that no longer fit
            pass


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 70000), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_positions_round_trip(size: int, density: float, seed: int) -> None:
    kept = np.random.default_rng(seed).random(size) < density**4
    encoding, data = encode_positions(kept)
    assert data.nbytes <= (size + 7) // 8
    assert np.array_equal(decode_positions(encoding, data, size, int(kept.sum())), np.flatnonzero(kept))


def test_long_gaps() -> None:
    for places in ([0], [254], [255], [256], [65534], [65535], [65536], [3, 262144], [131069, 131070, 199999], []):
        kept = np.zeros(300000, dtype=bool)
        kept[places] = True
        encoding, data = encode_positions(kept)
        assert encoding != "bitmap" and data.nbytes < 2000
        assert decode_positions(encoding, data, kept.size, len(places)).tolist() == places
    with pytest.raises(FormatError, match="beyond"):
        decode_positions("bitmap", np.array([255], dtype=np.uint8), 7, 7)


def test_a_mask_without_zeros_and_a_masked_batchnorm(tmp_path: Path) -> None:
    model = prune(network(), 0.5, include=nn.BatchNorm2d)
    set_mask(model[4], torch.ones(64, 128, dtype=torch.bool))
    save_weights(model, tmp_path / "w")
    assert same(plain(load_weights(network(1), tmp_path / "w")), plain(model))
