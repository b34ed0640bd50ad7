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
from safetensors.torch import save_file

gguf = pytest.importorskip("gguf")

from gguf import GGMLQuantizationType as GGMLType  # noqa: E402

from gguf_files import HALF_FIELDS, random_blocks, raw_file, string, tensor_entry, write  # noqa: E402
from lowbit import reference  # noqa: E402
from lowbit.formats import parse  # noqa: E402
from lowbit.io.readers import gguf as reader  # noqa: E402
from lowbit.io.readers.gguf import GGUFFile  # noqa: E402
from lowbit.io.save_load import load_tensors  # noqa: E402
from lowbit.weights.quantized import QuantTensor  # noqa: E402

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
    getattr(lib, f"dequantize_row_{kind.name.lower().replace('_k', '_K')}")(
        pointer(data), pointer(out), ctypes.c_int64(out.size)
    )
    return out


def ggml_quantize(lib: ctypes.CDLL, w: np.ndarray, kind: GGMLType) -> np.ndarray:
    n, k = w.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((n, k // block * size), np.uint8)
    i64 = ctypes.c_int64
    importance = np.ones(k, np.float32)  # without which some types refuse
    lib.ggml_quantize_init(ctypes.c_int(kind))
    written = lib.ggml_quantize_chunk(
        ctypes.c_int(kind), pointer(w), pointer(out), i64(0), i64(n), i64(k), pointer(importance)
    )
    assert written == out.size
    return out


NAMES = {GGMLType.Q1_0: "binary"}


def assert_as_gguf(qt: QuantTensor, data: np.ndarray, kind: GGMLType) -> None:
    if kind == GGMLType.Q1_0:
        with pytest.raises(NotImplementedError):
            gguf.dequantize(data, kind)
    else:
        assert_same_bits(qt, gguf.dequantize(data, kind))


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
    assert qt.format.name == NAMES.get(kind, kind.name.lower())
    assert parse(qt.format.spec) == qt.format
    k = qt.shape[1]
    bits = 8 * data.size / (n * k)
    if kind == GGMLType.NVFP4:
        bits += 32 / (n * k)  # one number for the tensor
    if kind == GGMLType.TQ1_0:
        bits = 8 * -(-k // 5) / k + 16 / 256  # five trits in every byte of a row
    assert qt.bits_per_weight == pytest.approx(bits, abs=1e-12)
    assert_as_gguf(qt, data, kind)


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
    assert_as_gguf(qt, data, kind)
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


def test_long_vocabularies(tmp_path):
    """Strings that cross the MiB that is read at a time, and one that is longer."""
    rng = np.random.default_rng(0)
    words = ["é" * length for length in rng.integers(0, 700, 4000).tolist()]
    words[1500] = "x" * (3 << 20)
    path = write(tmp_path / "a.gguf", {}, words=words, last=["", "end"])
    assert path.stat().st_size > 5 << 20
    assert GGUFFile(path).metadata["words"] == words
    assert GGUFFile(path).metadata["last"] == ["", "end"]
    data = path.read_bytes()
    for cut in (len(data) // 3, data.rindex(b"end") + 2):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"a\.gguf: not a readable GGUF file"):
            GGUFFile(path)


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


def nested(*counts: int) -> bytes:
    """The field "k", an array of arrays of arrays ... of so many each."""
    head = string(b"k") + struct.pack("<I", 9)
    return head + b"".join(struct.pack("<IQ", 9, count) for count in counts)


CASES = {
    "magic": (raw_file([], magic=b"GGUX"), "its magic is b'GGUX', not b'GGUF'$"),
    "version": (raw_file([], version=99), "99"),
    "big_endian": (raw_file([], version=3 << 24), "the file is big-endian"),
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
        "outside the file",
    ),
    "nested_deep": (
        raw_file([], fields=nested(*[1] * 10**5), num_fields=1),
        "recursion",
    ),
    "nested_many": (
        raw_file([], fields=nested(2**60), num_fields=1),
        "outside the file",
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
    "block_inf": (
        GGMLType.IQ3_S,
        set_half(GGMLType.IQ3_S, np.inf),
        "codes of format 'iq3_s' hold NaN or inf",
    ),
    "block_nan": (
        GGMLType.IQ1_M,
        np.full((1, 56), 255, np.uint8),
        "codes of format 'iq1_m' hold NaN or inf",
    ),
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
    with pytest.raises(ValueError, match="'w' .* the file was cut to"):
        file["w"]


def test_what_is_not_supported(tmp_path):
    tensors = {
        "k": (np.zeros((2, 40), np.uint8), GGMLType.Q8_1),
        "experts": (np.zeros((3, 2, 18), np.uint8), GGMLType.Q4_0),
    }
    file = GGUFFile(write(tmp_path / "a.gguf", tensors))
    assert file.tensors["k"].shape == (2, 32)
    with pytest.raises(NotImplementedError, match="'k' has type Q8_1; expected one of Q4_0"):
        file["k"]
    with pytest.raises(NotImplementedError, match=r"shape \(3, 2, 32\); expected two dimensions"):
        file["experts"]
    with pytest.raises(KeyError, match="nothing"):
        file["nothing"]


def test_values_that_nobody_asked_for_do_not_matter(tmp_path):
    """Arrays of arrays, and strings that are not UTF-8, as vocabularies have them."""
    inner = struct.pack("<IQ", 4, 2) + struct.pack("<II", 1, 2)
    fields = nested(2) + inner + struct.pack("<IQ", 8, 1) + string(b"\xf0\x9f")
    fields += string(b"tokens") + struct.pack("<IIQ", 9, 8, 3)
    fields += string(b"\xf0\x9f") + string("é".encode()) + string(b"a\xffb")
    fields += string(b"name") + struct.pack("<I", 8) + string(b"\xff")
    path = tmp_path / "a.gguf"
    path.write_bytes(raw_file([tensor_entry()], fields=fields, num_fields=3))
    file = GGUFFile(path)
    numbers, words = file.metadata["k"]
    assert numbers.tolist() == [1, 2]
    assert words == [r"\xf0\x9f"]
    assert file.metadata["tokens"] == [r"\xf0\x9f", "é", r"a\xffb"]
    assert file.metadata["name"] == r"\xff"
    assert file["w"].shape == (2, 32)


SOMETHING_ELSE = {
    "page": (b"<html>Entry not found</html>" * 100, "it is an HTML page"),
    "doctype": (b"\n<!DOCTYPE html>" * 100, "it is an HTML page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS"),
    "old": (b"tjgg" + bytes(100), "a GGML file from before GGUF"),
    "zip": (b"PK\x03\x04" + bytes(100), "a zip archive"),
    "gzip": (b"\x1f\x8b" + bytes(100), "compressed by gzip"),
    "nothing": (b"", "the file is empty"),
    "one": (b"<", "outside the file"),
}


@pytest.mark.parametrize("case", SOMETHING_ELSE)
def test_a_file_of_another_kind_is_named(tmp_path, case):
    content, message = SOMETHING_ELSE[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.gguf: not a readable GGUF file: .*{message}"):
        GGUFFile(path)


def test_readers_name_each_others_files(tmp_path):
    dense = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(3)}, dense)
    with pytest.raises(ValueError, match="it is a safetensors file"):
        GGUFFile(dense)
    packed = write(tmp_path / "a.gguf", {"w": (np.ones(3, np.float32), None)})
    with pytest.raises(ValueError, match="it is a GGUF file"):
        load_tensors(packed)
    packed.write_bytes(SOMETHING_ELSE["pointer"][0])
    with pytest.raises(ValueError, match="it is a Git LFS pointer"):
        load_tensors(packed)
    for read in (GGUFFile, load_tensors):
        with pytest.raises(FileNotFoundError, match="nothing"):
            read(tmp_path / "nothing.gguf")
    with pytest.raises(ValueError, match="must be a file, it is something else"):
        GGUFFile(tmp_path)


@pytest.fixture
def parts(tmp_path):
    """Three parts of a split file, as llama-gguf-split writes them; the first has no tensors."""
    w = np.arange(12, dtype=np.float32).reshape(4, 3)
    held = [{}, {"a": (w, None), "b": (w + 1, None)}, {"c": (w + 2, None)}]
    paths = [tmp_path / f"m-{i + 1:05}-of-00003.gguf" for i in range(3)]
    for i, (path, tensors) in enumerate(zip(paths, held, strict=True)):
        fields = {"split.no": i, "split.count": 3, "split.tensors.count": 3}
        write(path, tensors, **fields, **({"llama.block_count": 7} if i == 0 else {}))
    return paths


def test_any_part_stands_for_a_split_file(parts):
    for path in parts:
        file = GGUFFile(path)
        assert list(file) == ["a", "b", "c"]
        assert [t.flatten()[0].item() for t in file.values()] == [0, 1, 2]
        assert file.metadata["llama.block_count"] == 7
        assert file.files == parts


def rewrite(path, tensors, **fields):
    path.unlink()
    write(path, tensors, **fields)


ONE = {"a": (np.ones(3, np.float32), None)}
BAD_PARTS = {
    "missing": (
        lambda parts: parts[1].unlink(),
        "is one of 3 parts of a split file, and m-00002-of-00003.gguf must lie beside it",
    ),
    "renamed": (
        lambda parts: [p.rename(p.with_name(f"{i}.gguf")) for i, p in enumerate(parts)],
        "is one of 3 parts of a split file, whose names must be NAME-00001-of-0000N.gguf",
    ),
    "another count": (
        lambda parts: rewrite(parts[2], ONE, **{"split.no": 2, "split.count": 4}),
        r"split.no and split.count must be 2 and 3, got \(2, 4\)",
    ),
    "another place": (
        lambda parts: rewrite(parts[2], ONE, **{"split.no": 1, "split.count": 3}),
        r"must be 2 and 3, got \(1, 3\)",
    ),
    "no part": (lambda parts: rewrite(parts[2], ONE), r"must be 2 and 3, got \(None, None\)"),
    "twice": (
        lambda parts: rewrite(parts[2], ONE, **{"split.no": 2, "split.count": 3}),
        "m-00003-of-00003.gguf: tensor 'a' is in an earlier part too",
    ),
    "too few": (
        lambda parts: rewrite(parts[2], {}, **{"split.no": 2, "split.count": 3}),
        "split.tensors.count is 3, the parts hold 2 tensors",
    ),
    "damaged": (
        lambda parts: parts[2].write_bytes(b"GGUF"),
        "m-00003-of-00003.gguf: not a readable GGUF file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PARTS)
def test_bad_parts(parts, case):
    damage, message = BAD_PARTS[case]
    damage(parts)
    first = parts[0] if parts[0].exists() else parts[0].with_name("0.gguf")
    with pytest.raises(ValueError, match=message):
        GGUFFile(first)


def test_tensors_do_not_follow_the_file(tmp_path):
    w = np.arange(3, dtype=np.float32)
    path = write(tmp_path / "a.gguf", {"w": (w, None), "v": (w + 1, None)})
    file = GGUFFile(path)
    read = file["w"]
    path.with_name("b").write_bytes(b"another file")
    path.with_name("b").replace(path)
    assert file["v"].tolist() == [1, 2, 3], "the file that was opened, not the one of its name"
    assert read.tolist() == [0, 1, 2]
    assert "a.gguf" not in Path("/proc/self/maps").read_text()


def test_many_keys_cost_little(tmp_path):
    """131,000 keys of 20 bytes: 8 s and 400 MB when each was an object of numpy."""
    fields = b"".join(string(b"%06d" % i) + struct.pack("<IH", 2, i % 999) for i in range(131_000))
    path = tmp_path / "a.gguf"
    path.write_bytes(raw_file([], fields=fields, num_fields=131_000))
    tracemalloc.start()
    file = GGUFFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(file.metadata) == 131_003
    assert file.metadata["130999"] == 130_999 % 999
    assert peak < 40 << 20


@pytest.mark.parametrize("place", ["key", "tensor", "key twice", "tensor twice"])
def test_long_names_are_cut_in_errors(tmp_path, place):
    name = b"n" * 10**6
    key = string(name) + struct.pack("<IB", 0, 1)
    data = {
        "key": raw_file([], fields=string(name) + struct.pack("<I", 77), num_fields=1),
        "tensor": raw_file([tensor_entry(name, kind=999)]),
        "key twice": raw_file([], fields=2 * key, num_fields=2),
        "tensor twice": raw_file(2 * [tensor_entry(name)]),
    }[place]
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a.gguf") as e:
        GGUFFile(path)
    assert len(str(e.value)) < 1000
