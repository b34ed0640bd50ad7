"""The list of checkpoint formats: each is recognized, and each reader lists what it reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit.formats import FORMATS
from lowbit.io.readers.base import Reader, TensorInfo
from lowbit.io.readers.dense import DenseReader
from lowbit.io.readers.folder import FolderReader
from lowbit.io.readers.native import NativeReader
from lowbit.io.readers.registry import READERS, open_checkpoint
from lowbit.io.save_load import save
from lowbit.weights.quantized import QuantTensor
from weights import random_weight

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from gguf_files import GGMLType, random_blocks, write

LAYER = random_weight(FORMATS["nf4"], 3, 70)
DENSE = torch.arange(6, dtype=torch.float32).reshape(2, 3)


def native(folder: Path) -> Path:
    return save({"a": LAYER, "b": DENSE, "again": LAYER}, folder / "packed.safetensors")


def dense(folder: Path) -> Path:
    save_file({"b": DENSE}, folder / "dense.safetensors")
    return folder / "dense.safetensors"


def gguf(folder: Path) -> Path:
    blocks = random_blocks(GGMLType.Q8_0, 2, 1, np.random.default_rng(0))
    return write(folder / "a.gguf", {"a": (blocks, GGMLType.Q8_0), "b": (DENSE.numpy(), None)})


ROW = TensorInfo("b", "float32", (2, 3), 24, False)
CASES = {
    "lowbit": (native, [TensorInfo("a", "nf4", (3, 70), LAYER.nbytes, True), ROW], ["a", "b", "again"]),
    "dense": (dense, [ROW], ["b"]),
    "gguf": (
        gguf,
        [TensorInfo("a", "q8_0", (2, 32), 68, True), TensorInfo("b", "f32", (2, 3), 24, False)],
        ["a", "b"],
    ),
}  # fmt: skip


def test_every_reader_has_a_case() -> None:
    """Those of folders that other programs quantized have theirs in `readers/`."""
    others = {reader.name for reader in READERS if not issubclass(reader, FolderReader)}
    assert others == CASES.keys()
    assert READERS[-1] is DenseReader  # which takes whatever is left


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_recognized_listed_and_read(tmp_path: Path, name: str, mmap: bool) -> None:
    make, rows, names = CASES[name]
    path = make(tmp_path)
    checkpoint: Reader = open_checkpoint(path, mmap)
    assert (checkpoint.name, checkpoint.names(), checkpoint.describe()) == (name, names, rows)
    for row in rows:
        read = checkpoint.layer(row.name)
        assert isinstance(read, QuantTensor if row.quantized else Tensor)
        assert tuple(read.shape) == row.shape
    assert torch.equal(checkpoint.layer("b"), DENSE)
    if name == "lowbit":
        assert torch.equal(checkpoint.layer("again").codes, LAYER.codes)


@pytest.mark.parametrize("name", CASES)
def test_the_name_of_a_file_does_not_matter(tmp_path: Path, name: str) -> None:
    path = CASES[name][0](tmp_path)
    assert open_checkpoint(path.rename(tmp_path / "weights.bin")).name == name


def test_a_folder_is_recognized(tmp_path: Path) -> None:
    save({"a": LAYER}, tmp_path)
    assert isinstance(open_checkpoint(tmp_path), NativeReader)


@pytest.mark.parametrize("mmap", [True, False])
def test_dense_tensors_are_converted_when_asked(tmp_path: Path, mmap: bool) -> None:
    save_file({"b": DENSE, "i": torch.ones(2, dtype=torch.int32)}, tmp_path / "x.safetensors")
    checkpoint = DenseReader(tmp_path, mmap, torch.bfloat16)
    assert {row.name: row.format for row in checkpoint.describe()} == {
        "b": "bfloat16",
        "i": "int32",
    }
    assert torch.equal(checkpoint.layer("b"), DENSE.bfloat16())
    assert torch.equal(checkpoint.layer("i"), torch.ones(2, dtype=torch.int32))
    assert torch.equal(checkpoint.files[0].tensor("b", 1), DENSE[1].bfloat16())


def test_what_no_reader_takes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"l.qweight": DENSE.int(), "l.g_idx": torch.zeros(2, dtype=torch.int32)}, path)
    with pytest.raises(ValueError, match=r"x\.safetensors: is quantized already \(GPTQ"):
        open_checkpoint(path)
    path.write_bytes(b"PK\x03\x04" + bytes(20))
    with pytest.raises(ValueError, match="it is a zip archive"):
        open_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="nothing"):
        open_checkpoint(tmp_path / "nothing")
