"""GGUF reader: block types equal package `gguf` and libggml bit for bit; damage is refused."""

from __future__ import annotations

import ctypes
import importlib.util
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from gguf import GGMLQuantizationType as GGMLType  # noqa: E402

from gguf_files import HALF_FIELDS, random_blocks, raw_file, string, tensor_entry, write  # noqa: E402
from lowbit import reference  # noqa: E402
from lowbit.io import gguf as reader  # noqa: E402
from lowbit.io.gguf import GGUFFile  # noqa: E402
from lowbit.tensor import QuantTensor  # noqa: E402

TYPES = list(HALF_FIELDS)
each_type = pytest.mark.parametrize("kind", TYPES, ids=lambda t: t.name)


@pytest.fixture(scope="module")
def libggml() -> ctypes.CDLL:
    spec = importlib.util.find_spec("libggml")
    if spec is None:
        pytest.skip("libggml-python is not installed")
    path = Path(spec.submodule_search_locations[0]) / "lib64" / "libggml-base.so"
    if not path.exists():
        pytest.skip(f"libggml-python has no {path.name}")
    lib = ctypes.CDLL(str(path))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    return lib


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def ggml_dequantize(lib: ctypes.CDLL, data: np.ndarray, kind: GGMLType, k: int) -> np.ndarray:
    out = np.empty((len(data), k), np.float32)
    data = np.ascontiguousarray(data)
    getattr(lib, f"dequantize_row_{kind.name.lower()}")(
        pointer(data), pointer(out), ctypes.c_int64(out.size)
    )
    return out


def ggml_quantize(lib: ctypes.CDLL, w: np.ndarray, kind: GGMLType) -> np.ndarray:
    n, k = w.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((n, k // block * size), np.uint8)
    i64 = ctypes.c_int64
    written = lib.ggml_quantize_chunk(
        ctypes.c_int(kind), pointer(w), pointer(out), i64(0), i64(n), i64(k), None
    )
    assert written == out.size
    return out


def assert_same_bits(qt: QuantTensor, expected: np.ndarray) -> None:
    """Zeros lose their sign: OCP's -0 of MXFP4 is +0 in ggml."""
    for got in (qt.dequantize(), reference.dequantize(qt)):
        assert got.shape == expected.shape
        np.testing.assert_array_equal(
            (got.numpy() + 0.0).view(np.uint32), (expected + np.float32(0)).view(np.uint32)
        )


@each_type
@pytest.mark.parametrize(("n", "blocks"), [(1, 1), (7, 3), (65, 2)])
def test_random_blocks_equal_gguf(tmp_path, kind, n, blocks):
    data = random_blocks(kind, n, blocks, np.random.default_rng(n))
    qt = GGUFFile(write(tmp_path / "a.gguf", {"w": (data, kind)}))["w"]
    assert qt.format.name == kind.name.lower()
    assert qt.bits_per_weight == pytest.approx(8 * data.size / (n * qt.shape[1]), abs=0)
    assert_same_bits(qt, gguf.dequantize(data, kind))


@each_type
def test_random_blocks_equal_libggml(tmp_path, libggml, kind):
    data = random_blocks(kind, 33, 4, np.random.default_rng(1))
    qt = GGUFFile(write(tmp_path / "a.gguf", {"w": (data, kind)}))["w"]
    assert_same_bits(qt, ggml_dequantize(libggml, data, kind, qt.shape[1]))


@each_type
def test_quantized_weights_equal_both(tmp_path, libggml, kind):
    w = np.random.default_rng(2).standard_normal((9, 512), dtype=np.float32)
    data = ggml_quantize(libggml, w, kind)
    qt = GGUFFile(write(tmp_path / "a.gguf", {"w": (data, kind)}))["w"]
    assert_same_bits(qt, gguf.dequantize(data, kind))
    assert_same_bits(qt, ggml_dequantize(libggml, data, kind, 512))


@each_type
def test_slices_do_not_change_the_result(tmp_path, monkeypatch, kind):
    data = random_blocks(kind, 11, 2, np.random.default_rng(3))
    path = write(tmp_path / "a.gguf", {"w": (data, kind)})
    whole = GGUFFile(path)["w"]
    monkeypatch.setattr(reader, "_SLICE_BYTES", data.shape[1] * 4)
    for name, t in GGUFFile(path)["w"].tensors.items():
        assert torch.equal(t, whole.tensors[name])


def test_dense_types(tmp_path):
    rng = np.random.default_rng(4)
    w = rng.standard_normal((5, 6)).astype(np.float32)
    bf16 = torch.from_numpy(w).bfloat16()
    tensors = {
        "f32": (w, None),
        "f16": (w.astype(np.float16), None),
        "bf16": (bf16.view(torch.uint8).numpy(), GGMLType.BF16),
        "cube": (w.reshape(5, 3, 2), None),
    }
    file = GGUFFile(write(tmp_path / "a.gguf", tensors))
    assert torch.equal(file["f32"], torch.from_numpy(w))
    assert torch.equal(file["f16"], torch.from_numpy(w).half())
    assert torch.equal(file["bf16"], bf16)
    assert file["cube"].shape == (5, 3, 2)


def test_header_equals_ggufs(tmp_path):
    fields = {"a": "x" * 300, "b": 7, "c": 0.1, "s": ["", "é", "token"], "n": [1, 2, 3], "f": [0.5]}
    tensors = {
        "w": (np.zeros((4, 18), np.uint8), GGMLType.Q4_0),
        "v": (np.ones(3, np.float32), None),
    }
    path = write(tmp_path / "a.gguf", tensors, **fields)
    file, oracle = GGUFFile(path), gguf.GGUFReader(path)
    assert set(file.metadata) == set(oracle.fields)
    for name, field in oracle.fields.items():
        got = file.metadata[name]
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == field.contents()
    assert list(file) == [t.name for t in oracle.tensors]
    for t in oracle.tensors:
        info = file.tensors[t.name]
        assert info.shape == tuple(reversed(t.shape.tolist()))
        assert (info.offset, info.nbytes) == (t.data_offset, t.n_bytes)


def test_reading_is_lazy(tmp_path):
    """A 1 TiB hole costs nothing to open, and a tensor is converted in pieces."""
    entries = [tensor_entry(b"big", (32, 2**35)), tensor_entry(b"small", (4096, 4096))]
    path = tmp_path / "a.gguf"
    path.write_bytes(raw_file(entries, data=b""))
    with path.open("r+b") as f:
        f.truncate(2**35 * 18 + 4096)
    tracemalloc.start()
    qt = GGUFFile(path)["small"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert qt.shape == (4096, 4096)
    # numpy's share: the bytes of one slice, their nibbles twice and their concatenation, about 6
    # MiB.
    assert peak < 8 << 20


CASES = {
    "magic": (raw_file([], magic=b"GGUX"), "magic"),
    "version": (raw_file([], version=99), "99"),
    "big_endian": (raw_file([], version=3 << 24), "."),
    "header_cut": (raw_file([tensor_entry()])[:50], "outside the file"),
    "empty": (b"", "empty"),
    "three_bytes": (b"GGU", "outside the file"),
    "data_cut": (raw_file([tensor_entry()])[:-1], "'w' takes bytes"),
    "offset": (raw_file([tensor_entry(offset=64)]), "'w' takes bytes"),
    "offset_overflow": (raw_file([tensor_entry(offset=2**64 - 1)]), "'w' takes bytes"),
    "dims_overflow": (raw_file([tensor_entry(dims=(2**32, 2**32, 2))]), "'w' takes bytes"),
    "zero_dim": (raw_file([tensor_entry(dims=(32, 0))]), r"positive dimensions, got \[32, 0\]"),
    "no_dims": (raw_file([tensor_entry(dims=())]), "1 to 4"),
    "five_dims": (raw_file([tensor_entry(dims=(32, 1, 1, 1, 1))]), "1 to 4"),
    "ragged_k": (raw_file([tensor_entry(dims=(40, 1))]), "rows of 40 weights.*multiple of 32"),
    "type": (raw_file([tensor_entry(kind=999)]), "'w' has the unknown type 999"),
    "twice": (raw_file([tensor_entry(), tensor_entry()]), "twice"),
    "tensor_count": (raw_file([], num_tensors=2**63), "tensor_count must be at most"),
    "kv_count": (raw_file([], num_fields=2**63), "kv_count must be at most"),
    "one_too_few": (raw_file([tensor_entry()], num_tensors=2), "."),
    "name_utf8": (raw_file([tensor_entry(b"\xff")]), "utf-8"),
    "name_length": (raw_file([struct.pack("<Q", 2**62)]), "outside the file"),
    "key_twice": (
        raw_file([], fields=2 * (string(b"k") + struct.pack("<IB", 0, 1)), num_fields=2),
        "Duplicate k",
    ),
    "field_type": (
        raw_file([], fields=string(b"k") + struct.pack("<I", 77), num_fields=1),
        "77",
    ),
    "array_length": (
        raw_file([], fields=string(b"k") + struct.pack("<IIQ", 9, 0, 2**62), num_fields=1),
        "outside the file",
    ),
    "strings_length": (
        raw_file([], fields=string(b"k") + struct.pack("<IIQ", 9, 8, 2**62), num_fields=1),
        "past the end",
    ),
    "nested": (
        raw_file([], fields=string(b"k") + struct.pack("<IIQ", 9, 9, 1), num_fields=1),
        "arrays of arrays",
    ),
    "alignment": (
        raw_file([], fields=string(b"general.alignment") + struct.pack("<II", 4, 3), num_fields=1),
        "alignment",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_damaged_header_is_refused(tmp_path, case):
    data, message = CASES[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as e:
        GGUFFile(path)
    assert "bad.gguf" in str(e.value)


def set_half(kind: GGMLType, value: float) -> np.ndarray:
    data = random_blocks(kind, 2, 1, np.random.default_rng(5))
    start = HALF_FIELDS[kind][-1]
    data[1, start : start + 2] = np.array([value], np.float16).view(np.uint8)
    return data


BAD_VALUES = {
    "scale_nan": (GGMLType.Q4_0, set_half(GGMLType.Q4_0, np.nan), "scales of a 'q4_0'.*NaN or inf"),
    "zero_inf": (GGMLType.Q4_1, set_half(GGMLType.Q4_1, np.inf), "zeros of a 'q4_1'.*NaN or inf"),
    "e8m0_nan": (GGMLType.MXFP4, np.full((1, 17), 255, np.uint8), "E8M0 NaN"),
    "tq2_code_3": (GGMLType.TQ2_0, np.full((1, 66), 3, np.uint8), "below 3.*got 3"),
    "dense_nan": (None, np.array([[1.0, np.nan]], np.float32), "NaN or inf"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_damaged_values_are_refused(tmp_path, case):
    kind, data, message = BAD_VALUES[case]
    file = GGUFFile(write(tmp_path / "a.gguf", {"blk.w": (data, kind)}))
    with pytest.raises(ValueError, match=message) as e:
        file["blk.w"]
    assert "a.gguf" in str(e.value)
    assert "'blk.w'" in str(e.value)


def test_file_cut_after_opening(tmp_path):
    path = write(tmp_path / "a.gguf", {"w": (np.zeros((4, 18), np.uint8), GGMLType.Q4_0)})
    file = GGUFFile(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="before the tensor does"):
        file["w"]


def test_what_is_not_supported(tmp_path):
    tensors = {
        "k": (np.zeros((2, 144), np.uint8), GGMLType.Q4_K),
        "experts": (np.zeros((3, 2, 18), np.uint8), GGMLType.Q4_0),
    }
    file = GGUFFile(write(tmp_path / "a.gguf", tensors))
    assert file.tensors["k"].shape == (2, 256)
    with pytest.raises(NotImplementedError, match="'k' has type Q4_K; expected one of Q4_0"):
        file["k"]
    with pytest.raises(NotImplementedError, match=r"shape \(3, 2, 32\); expected two dimensions"):
        file["experts"]
    with pytest.raises(KeyError, match="nothing"):
        file["nothing"]
