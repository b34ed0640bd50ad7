"""Imatrix files: against bytes put together by hand and package gguf's own writer and reader; damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from lowbit.io.imatrix import Entry, Imatrix, read, tensor_names, write  # noqa: E402

NAME = "blk.0.attn_q.weight"


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 32)


def gguf_bytes(
    tensors: dict[str, list[float]], kind: str = "imatrix", chunks: int = 2, kinds: int = 0
) -> bytes:
    """A GGUF file of version 3 with vectors of F32, after the specification."""
    keys = [
        string("general.type") + struct.pack("<I", 8) + string(kind),
        string("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 1) + string("wiki.txt"),
        string("imatrix.chunk_count") + struct.pack("<II", 4, chunks),
        string("imatrix.chunk_size") + struct.pack("<II", 4, 512),
    ]
    infos, data = [], b""
    for name, values in tensors.items():
        infos.append(string(name) + struct.pack("<IQIQ", 1, len(values), kinds, len(data)))
        data += padded(struct.pack(f"<{len(values)}f", *values))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    return padded(head + b"".join(keys) + b"".join(infos)) + data


def legacy_bytes(entries: list[tuple[str, int, list[float]]], tail: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack(f"<ii{len(values)}f", calls, len(values), *values)
    return data + tail


TAIL = struct.pack("<ii", 7, 8) + b"wiki.txt"


def stored(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "m.imatrix"
    path.write_bytes(data)
    return path


def test_gguf_by_hand(tmp_path):
    tensors = {f"{NAME}.in_sum2": [8.0, 0.0, 2.0], f"{NAME}.counts": [4.0], f"{NAME}.in_sum": [1.0]}
    found = read(stored(tmp_path, gguf_bytes(tensors)))
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("wiki.txt",), 2, 512)
    assert list(found.entries) == [NAME]
    assert found.entries[NAME].means.tolist() == [[2.0, 0.0, 0.5]]


@pytest.mark.parametrize("tail", [b"", TAIL[:4], TAIL])
def test_legacy_by_hand(tmp_path, tail):
    """Values are means times calls; without calls, means."""
    entries = [(NAME, 4, [8.0, 0.0, 2.0]), ("output.weight", 0, [3.0])]
    found = read(stored(tmp_path, legacy_bytes(entries, tail)))
    assert found.entries[NAME].means.tolist() == [[2.0, 0.0, 0.5]]
    assert found.entries["output.weight"].means.tolist() == [[3.0]]
    assert found.entries["output.weight"].counts.tolist() == [1.0]
    assert found.chunk_count == (7 if tail else 0)
    assert found.datasets == (("wiki.txt",) if tail == TAIL else ())


def test_experts_of_package_gguf(tmp_path):
    """Three of them, one never picked; a single count stands for all."""
    sums = np.arange(6, dtype=np.float32).reshape(3, 2)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_type("imatrix")
    for name, counts in (("a", [[2.0], [0.0], [1.0]]), ("b", [2.0])):
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", np.array(counts, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read(tmp_path / "m.gguf")
    assert found.entries["a"].means.tolist() == [[0.0, 0.5], [2.0, 3.0], [4.0, 5.0]]
    assert found.entries["a"].counts.tolist() == [2.0, 0.0, 1.0]
    assert found.entries["b"].means.tolist() == [[0.0, 0.5], [1.0, 1.5], [2.0, 2.5]]
    assert (found.datasets, found.chunk_count, found.chunk_size) == ((), 0, 0)


def example() -> Imatrix:
    generator = torch.Generator().manual_seed(0)
    entries = {
        name: Entry(torch.rand(rows, 5, generator=generator), torch.full((rows,), 3.0), name)
        for name, rows in (("output.weight", 1), ("blk.0.ffn_up_exps.weight", 4))
    }
    return Imatrix(entries, ("text", "more"), 3, 128)


def test_what_is_written_is_read_by_package_gguf(tmp_path):
    written = example()
    write(tmp_path / "m.gguf", written)
    file = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {name: file.get_field(name).contents() for name in file.fields if "." in name and name[:4] != "GGUF"} == {
        "general.type": "imatrix",
        "imatrix.datasets": ["text", "more"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 128,
    }  # fmt: skip
    tensors = {t.name: t for t in file.tensors}
    assert list(tensors) == [
        f"{name}.{part}" for name in sorted(written.entries) for part in ("in_sum2", "counts")
    ]
    # ggml's dimensions, the inner one first.
    assert tensors["output.weight.in_sum2"].shape.tolist() == [5]
    assert tensors["output.weight.counts"].shape.tolist() == [1]
    assert tensors["blk.0.ffn_up_exps.weight.in_sum2"].shape.tolist() == [5, 4]
    assert tensors["blk.0.ffn_up_exps.weight.counts"].shape.tolist() == [1, 4]
    for name, entry in written.entries.items():
        np.testing.assert_array_equal(
            tensors[f"{name}.in_sum2"].data.reshape(entry.sums.shape), entry.sums.numpy()
        )
    again = read(tmp_path / "m.gguf")
    assert again.datasets == written.datasets
    assert again.entries.keys() == written.entries.keys()
    for name, entry in written.entries.items():
        assert torch.equal(again.entries[name].sums, entry.sums)
        assert torch.equal(again.entries[name].counts, entry.counts)


def test_nothing_is_written_of_bad_values(tmp_path):
    path = stored(tmp_path, b"before")
    bad = Imatrix({"a": Entry(torch.tensor([[1.0, float("inf")]]), torch.ones(1), "a")})
    with pytest.raises(ValueError, match=r"tensor 'a': value 1 is inf; expected a finite number"):
        write(path, bad)
    assert path.read_bytes() == b"before"


SUMS, COUNTS = f"{NAME}.in_sum2", f"{NAME}.counts"
BAD_GGUF = {
    "a model": (gguf_bytes({}, "model"), r"general.type is 'model'; expected 'imatrix'"),
    "empty": (gguf_bytes({}), r"holds no entry"),
    "no counts": (gguf_bytes({SUMS: [1.0]}), rf"tensor '{COUNTS}' is missing"),
    "no sums": (gguf_bytes({COUNTS: [1.0]}), rf"tensor '{SUMS}' is missing"),
    "counts": (gguf_bytes({SUMS: [1.0], COUNTS: [1.0, 2.0]}), rf"'{COUNTS}' has 2 values; expected 1"),
    "nan": (gguf_bytes({SUMS: [1.0, float("nan")], COUNTS: [1.0]}), rf"tensor '{SUMS}' .*NaN or inf"),
    "negative": (gguf_bytes({SUMS: [1.0, -2.0], COUNTS: [1.0]}), rf"'{SUMS}': value 1 is -2.0; expected"),
    "count": (gguf_bytes({SUMS: [1.0], COUNTS: [-1.0]}), rf"'{SUMS}': count 0 is -1.0; expected"),
    "integers": (gguf_bytes({SUMS: [1.0], COUNTS: [1.0]}, kinds=26), rf"'{SUMS}' has type I32; expected F32"),
}  # fmt: skip
GOOD = legacy_bytes([(NAME, 4, [8.0, 2.0])], TAIL)
BAD_LEGACY = {
    "nothing": (b"", r"the number of entries: 4 bytes at offset 0 .*the file is cut or damaged"),
    "html": (b"<html>no such file</html>", r"is no imatrix: \d+ entries do not fit in 25 bytes: it is an HTML page"),
    "none": (struct.pack("<i", 0), r"0 entries do not fit"),
    "name": (struct.pack("<iiii", 1, -1, 1, 1), r"the name of entry 0 has -1 bytes"),
    "calls": (legacy_bytes([("a", -3, [1.0])]), r"tensor 'a' has -3 calls"),
    "values": (legacy_bytes([("a", 1, [])]), r"tensor 'a' has 0 values; expected at least 1"),
    "twice": (legacy_bytes([("a", 1, [1.0]), ("a", 1, [1.0])]), r"entry 1: tensor 'a' is there twice"),
    "inf": (legacy_bytes([("a", 1, [1.0, float("-inf")])]), r"tensor 'a': value 1 is -inf; expected"),
    "more": (GOOD + b"more", r"4 bytes follow the end"),
    "utf-8": (struct.pack("<ii", 1, 2) + b"\xff\xff" + bytes(12), r"the name of entry 0 is no UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), [*BAD_GGUF.values(), *BAD_LEGACY.values()],
                         ids=[*BAD_GGUF, *BAD_LEGACY])  # fmt: skip
def test_damaged_files(tmp_path, data, message):
    path = stored(tmp_path, data)
    with pytest.raises(ValueError, match=rf"^{path}.*{message}"):
        read(path)


@pytest.mark.parametrize("form", ["gguf", "legacy"])
def test_cut_files(tmp_path, form):
    """At every length; the older form may end before what it says of the text, and of its name."""
    data = GOOD if form == "legacy" else gguf_bytes({SUMS: [1.0] * 8, COUNTS: [1.0]})
    whole = {len(GOOD) - len(TAIL), len(GOOD) - len(TAIL) + 4} if form == "legacy" else set()
    # Padding after the last tensor may be missing.
    whole |= set(range(len(data) - 28, len(data))) if form == "gguf" else set()
    for length in set(range(len(data))) - whole:
        path = stored(tmp_path, data[:length])
        with pytest.raises(ValueError, match=rf"^{path}"):
            read(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing"):
        read(tmp_path / "nothing")


def test_names():
    names = ["model.layers.1.self_attn.q_proj", "layers.0.mlp.down_proj", "lm_head", "adapter"]
    assert tensor_names("llama", 2, names) == {
        names[0]: "blk.1.attn_q.weight",
        names[1]: "blk.0.ffn_down.weight",
        "lm_head": "output.weight",
    }
    assert tensor_names("llama", 1, names[:1]) == {}  # no second layer
    assert tensor_names("qwen3_moe", 1, ["lm_head"]) == {"lm_head": "output.weight"}
    assert tensor_names("unheard of", 2, names) == tensor_names(None, 2, names) == {}
