"""Integer scales of 4 and 6 bits in lowbit's own files: packed, and as before in files of before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lowbit
from lowbit import layouts
from lowbit.formats import parse
from lowbit.io.readers.native import NativeReader
from lowbit.io.save_load import load_tensors
from lowbit.layouts import N16
from lowbit.nn import QuantLinear
from lowbit.packing import pack_scales
from lowbit.weights.quantized import QuantTensor, tensor_specs
from weights import random_weight

# Bits of a weight in a GGUF file.
K_QUANTS = {"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "iq4_xs": 4.25}
# With an odd number of groups too, of signed and unsigned scales.
FORMATS = (*K_QUANTS, "int4_g16_int6s32", "uint3_g8_uint4", "int4_g32_int6_o2")


def assert_equal(a: QuantTensor, b: QuantTensor) -> None:
    assert (a.format, a.shape, a.tensors.keys()) == (b.format, b.shape, b.tensors.keys())
    for name, t in a.tensors.items():
        assert t.dtype == b.tensors[name].dtype
        assert torch.equal(t, b.tensors[name]), name


def content(file: Path) -> dict[str, object]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["lowbit"])


def save_old(file: Path, qt: QuantTensor) -> None:
    """As versions before wrote it: a byte for each scale."""
    layers = {"w": {"format": qt.format.spec, "shape": list(qt.shape)}}
    metadata = {"lowbit": json.dumps({"version": 1, "layers": layers, "tied": {}})}
    save_file({f"w.{name}": t for name, t in qt.tensors.items()}, file, metadata)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 100), (64, 512)])
def test_round_trip(tmp_path: Path, name: str, n: int, k: int) -> None:
    qt = random_weight(parse(name), n, k)
    new, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    lowbit.save({"w": qt}, new)
    save_old(old, qt)
    for file in (new, old):
        assert_equal(load_tensors(file)["w"], qt)
        assert_equal(NativeReader(file).layer("w"), qt)
    assert content(new)["version"] == 2
    stored = load_file(new)
    assert stored["w.scales"].dtype == torch.uint8
    assert (
        sum(t.nbytes for t in stored.values())
        == qt.nbytes
        == NativeReader(new).describe()[0].nbytes
    )
    assert NativeReader(old).describe()[0].nbytes == sum(t.nbytes for t in qt.tensors.values())


@pytest.mark.parametrize(("name", "bits"), K_QUANTS.items())
def test_files_are_no_larger_than_memory(tmp_path: Path, name: str, bits: float) -> None:
    """The bits of GGUF; kernels hold the table besides."""
    n, k = 512, 1024
    qt = random_weight(parse(name), n, k)
    lowbit.save({"w": qt}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        size = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert 8 * size / (n * k) == bits == qt.bits_per_weight
    assert size <= 1.02 * layouts.to_kernel(qt, N16).nbytes


def test_other_files_stay_as_they_were(tmp_path: Path) -> None:
    qt = random_weight(parse("q6_k"), 4, 256)
    lowbit.save({"w": qt}, tmp_path / "a.safetensors")
    assert content(tmp_path / "a.safetensors")["version"] == 1
    assert {name: (tuple(t.shape), t.dtype) for name, t in qt.to_file().items()} == tensor_specs(
        qt.format, 4, 256
    )


@pytest.mark.parametrize("packed", [True, False])
def test_headers_and_tensors_agree(tmp_path: Path, packed: bool) -> None:
    """Scales of the other version are errors."""
    qt, file = random_weight(parse("q4_k"), 4, 256), tmp_path / "a.safetensors"
    lowbit.save({"w": qt}, file)
    header = {**content(file), "version": 1 if packed else 2}
    tensors = load_file(file) if packed else {f"w.{name}": t for name, t in qt.tensors.items()}
    save_file(tensors, file, {"lowbit": json.dumps(header)})
    found = r"torch.uint8 of shape \(4, 6\)" if packed else r"torch.int8 of shape \(4, 8\)"
    with pytest.raises(
        ValueError, match=rf"w\.scales of a \(4, 256\) weight in format 'q4_k' .* got {found}"
    ):
        load_tensors(file)


def test_state_dicts_of_files() -> None:
    """What `load_state_dict` is given of a file that `save_pretrained` wrote."""
    qt = random_weight(parse("q4_k"), 8, 100)
    layer = QuantLinear.from_quant_tensor(random_weight(parse("q4_k"), 8, 100, seed=1))
    layer.load_state_dict({**layer.state_dict(), **qt.to_file()})
    assert_equal(layer.quant_tensor(), qt)


def test_scales_out_of_range() -> None:
    qt = random_weight(parse("q4_k"), 4, 256)
    qt.tensors["scales"][1, 2] = 64
    with pytest.raises(ValueError, match=r"scales must be in \[0, 63\] in format 'q4_k', got 64"):
        qt.to_file()


def test_rows_are_as_documented() -> None:
    """Bit by bit: a little-endian stream, three bytes for four scales of 6 bits."""
    qt = random_weight(parse("q4_k"), 3, 5 * 32)
    for row, codes in zip(qt.to_file()["scales"].tolist(), qt.scales.tolist(), strict=True):
        stream = sum(code << 6 * i for i, code in enumerate(codes))
        assert bytes(row) == stream.to_bytes(6, "little")
    assert torch.equal(qt.to_file()["zeros"], pack_scales(qt.zeros, 6))
