"""What `save` can be given: either it comes back as it was, or it is refused before a byte is
written.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowbit.formats import FORMATS
from lowbit.io import safetensors_file
from lowbit.io.readers.native import NativeReader
from lowbit.io.save_load import load, load_tensors, save
from lowbit.nn import QuantLinear
from lowbit.ptq.file import quantize_file
from lowbit.weights.quantized import TENSOR_NAMES
from weights import random_weight

LAYER = random_weight(FORMATS["int4"], 2, 8)
NOT_OF_INT4 = [name for name in TENSOR_NAMES if name not in LAYER.tensors]
ONE = torch.ones(1)


def refused(state: object, error: type[Exception], message: str, folder: Path) -> None:
    with pytest.raises(error, match=message):
        save(state, folder / "made" / "x.safetensors")
    assert not list(folder.iterdir()), "not even its folder was made"


REFUSED = {
    "the header's name": ({"w": LAYER, "__metadata__": ONE}, ValueError, "named '__metadata__'"),
    "a half character": ({"\ud800": ONE}, ValueError, r"'\\ud800': the name cannot be written"),
    "a layer of half a character": ({"\udcff": LAYER}, ValueError, "the name cannot be written"),
    "a number": ({1: ONE}, TypeError, "names must be strings, got 1"),
    "a layer named by a number": ({1: LAYER}, TypeError, "names must be strings, got 1"),
    "bytes": ({b"w": ONE}, TypeError, "names must be strings, got b'w'"),
    "a sparse tensor": ({"a": torch.eye(2).to_sparse()}, TypeError, "a must be a dense tensor"),
    "a layer without values": ({"a": LAYER.to("meta")}, ValueError, "a is on the meta device"),
    "a module without values": (
        nn.ModuleDict({"a": QuantLinear.from_quant_tensor(LAYER)}).to("meta"), ValueError,
        "a is on the meta device",
    ),
    **{
        f"{name} beside a layer": (
            {"a": LAYER, f"a.{name}": ONE}, ValueError,
            f"tensor 'a.{name}' would be read as a part of the layer 'a'",
        )
        for name in NOT_OF_INT4
    },
    "at the root": ({"": LAYER, "zeros": ONE}, ValueError, "'zeros' would be .* the layer ''"),
    "a shared one": (
        {"a": LAYER, "b": ONE, "a.table": ONE}, ValueError, "'a.table' would be read as a part"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_read_is_refused(case: str, tmp_path: Path):
    refused(*REFUSED[case], tmp_path)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # both are prototypes
def test_tensors_of_other_layouts_are_refused(tmp_path: Path):
    csr = torch.eye(2).to_sparse_csr()
    jagged = torch.nested.nested_tensor([ONE, ONE], layout=torch.jagged)
    for t in (csr, jagged):
        refused(
            {"a": t}, TypeError, f"a must be a dense tensor, got one of layout {t.layout}", tmp_path
        )


def test_a_header_that_no_reader_takes_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "_MAX_HEADER", 1000)
    refused({"x" * 1000: ONE}, ValueError, "the header must take at most 1000 bytes", tmp_path)


@pytest.mark.parametrize(
    "name", ["", ".", "a.b", "codes", "scales", "lowbit", "é", "\0", "\n", '"', "a" * 10**5]
)
def test_any_other_name_comes_back(name: str, tmp_path: Path):
    path = save({name: torch.arange(3)}, tmp_path / "dense.safetensors")
    assert torch.equal(load_tensors(path)[name], torch.arange(3))
    assert torch.equal(load_file(path)[name], torch.arange(3)), "the library reads it too"
    path = save({name: LAYER, f"{name}.bias": ONE}, tmp_path / "layer.safetensors")
    back = load_tensors(path)
    assert set(back) == {name, f"{name}.bias"}
    assert torch.equal(back[name].codes, LAYER.codes)


def test_lazy_conjugates_and_negations_are_saved_as_they_look(tmp_path: Path):
    z = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    state = {"z": z, "conj": z.conj(), "imag": z.conj().imag, "same": z}
    assert state["imag"].is_neg()
    back = load_tensors(save(state, tmp_path / "x.safetensors"))
    assert all(torch.equal(back[name], t) for name, t in state.items())
    assert back["same"] is back["z"]


@pytest.mark.parametrize("name", ["w.zeros", "w.table"])
def test_a_dense_file_with_a_clashing_name_is_not_converted(name: str, tmp_path: Path):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"w.weight": torch.randn(4, 32), name: ONE}, source)
    with pytest.raises(ValueError, match=f"tensor '{name}' would be read as a part of the layer"):
        quantize_file(source, target, "int4_g32", progress=False)
    assert not target.exists()


NAMES = {
    "plain": b"m",
    "bytes that are not UTF-8": b"\xff\xfe",
    "two encodings": "é".encode() + b"\xe9",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("mmap", [True, False])
def test_any_path_is_written_and_read(name: bytes, mmap: bool, tmp_path: Path):
    folder = tmp_path / os.fsdecode(name)
    path = save({"w": LAYER}, folder / f"{os.fsdecode(name)}.safetensors")
    for place in (path, folder):
        assert torch.equal(load_tensors(place, mmap=mmap)["w"].codes, LAYER.codes)
    assert NativeReader(path).describe()[0].name == "w"
    model = load(nn.ModuleDict({"w": nn.Linear(8, 2, bias=False)}), path, mmap=mmap)
    assert torch.equal(model["w"].quant_tensor().codes, LAYER.codes)
