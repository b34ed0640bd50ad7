"""Where loaded tensors lie: in the mapped file, or in memory of their own, which nobody can cut."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_io import dense_tensors, equal
from torch import nn

import lowbit
from lowbit.io.safetensors_file import SafetensorsFile
from lowbit.io.save_load import load, load_tensors, save

STATE = {"w": lowbit.quantize(torch.randn(64, 64), "int4_g32_o2"), "d": torch.randn(2048)}


def mapped(path: Path) -> bool:
    """Whether this process has the file mapped."""
    return str(path) in Path("/proc/self/maps").read_text()


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


@linux
@pytest.mark.parametrize("mmap", [True, False])
def test_tensors_stay_in_the_file_only_if_asked(mmap: bool, tmp_path: Path):
    path = save(STATE, tmp_path / "x.safetensors")
    kept = load_tensors(path, mmap=mmap)
    assert mapped(path) == mmap
    del kept
    assert not mapped(path)


@linux
@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_models_stay_in_the_file_only_if_asked(mmap: bool, device: str, tmp_path: Path):
    saved = nn.ModuleDict({"w": nn.Linear(64, 64), "d": nn.Linear(64, 64)})
    lowbit.quantize_model(saved, {"w": "int4_g32_o2"}, progress=False)
    path = save(saved, tmp_path / "x.safetensors")
    with torch.device(device):
        model = nn.ModuleDict({"w": nn.Linear(64, 64), "d": nn.Linear(64, 64)})
    load(model, path, mmap=mmap)
    assert torch.equal(model["d"].weight, saved["d"].weight)
    if not mmap:
        assert not mapped(path)


@pytest.mark.parametrize("damage", ["cut", "overwrite"])
def test_copies_survive_a_file_that_changes(damage: str, tmp_path: Path):
    path = save(STATE, tmp_path / "x.safetensors")
    state = load_tensors(path, mmap=False)
    if damage == "cut":
        os.truncate(path, 100)
    else:
        path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(state["d"], STATE["d"])
    x = torch.randn(1, 64)
    assert torch.equal(lowbit.linear(x, state["w"]), lowbit.linear(x, STATE["w"]))


@linux
def test_a_mapped_file_that_is_cut_kills_the_process_as_documented(tmp_path: Path):
    path = save({"d": torch.randn(1 << 20)}, tmp_path / "x.safetensors")
    code = (
        "import os, sys; from lowbit.io.save_load import load_tensors\n"
        "t = load_tensors(sys.argv[1], mmap=sys.argv[2] == 'mmap')['d']; os.truncate(sys.argv[1], 4096); print(t.sum())"
    )
    codes = [
        subprocess.run([sys.executable, "-c", code, str(path), how], capture_output=True, check=False).returncode
        for how in ("copy", "mmap")
    ]  # fmt: skip
    assert codes[0] == 0
    assert "SIGBUS" in load_tensors.__doc__
    assert codes[1] != 0


def test_a_cut_file_is_an_error_when_it_is_copied(tmp_path: Path):
    path = save(STATE, tmp_path / "x.safetensors")
    reader = SafetensorsFile(path, mmap=False)
    os.truncate(path, 8)
    with pytest.raises(ValueError, match=r"x\.safetensors, tensor 'd': .* the file was cut to"):
        reader.tensor("d")


@pytest.mark.parametrize("mmap", [True, False])
def test_the_reader_equals_the_library(mmap: bool, tmp_path: Path):
    path = save(dense_tensors(), tmp_path / "x.safetensors")
    reader, oracle = SafetensorsFile(path, mmap), load_file(path)
    assert list(reader.specs) == sorted(oracle)
    for name, t in oracle.items():
        assert equal(reader.tensor(name), t)
        assert reader.specs[name] == (tuple(t.shape), t.dtype)


@pytest.mark.parametrize("mmap", [True, False])
def test_writing_to_a_loaded_tensor_leaves_the_file(mmap: bool, tmp_path: Path):
    path = save(STATE, tmp_path / "x.safetensors")
    before = path.read_bytes()
    load_tensors(path, mmap=mmap)["d"].zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("mmap", [True, False])
def test_tensors_that_are_not_aligned_are_read(mmap: bool, tmp_path: Path):
    """Any header length is allowed; the library pads it, others do not."""
    path = tmp_path / "x.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    header += b" " * (1 - len(header) % 4 + 4)
    assert (8 + len(header)) % 4 == 1
    values = torch.tensor([1.0, -2.0, 3.5])
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    assert torch.equal(SafetensorsFile(path, mmap).tensor("a"), values)
    assert SafetensorsFile(path, mmap).tensor("a").data_ptr() % 4 == 0
