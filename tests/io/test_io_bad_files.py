"""Damaged and hostile checkpoints: a ValueError that names the file and what is wrong, and never
more.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lowbit.formats import FORMATS
from lowbit.io.safetensors_file import SafetensorsFile
from lowbit.io.save_load import load_tensors, save
from lowbit.methods import quantize

WEIGHT = quantize(torch.randn(4, 100, generator=torch.Generator().manual_seed(0)), "ternary")
DEEP = "[" * 100_000


def write(path: Path, *, lowbit: Any = None, **changes: torch.Tensor | None) -> Path:
    """A good file of one layer "w", but for the header `lowbit` and tensors that are changed
    (None: removed).
    """
    tensors = {f"w.{key}": t for key, t in WEIGHT.tensors.items()}
    for name, t in changes.items():
        tensors[name.replace("__", ".")] = t
    header = {"version": 1, "layers": {"w": {"format": "ternary", "shape": [4, 100]}}, "tied": {}}
    header = header if lowbit is None else lowbit
    text = header if isinstance(header, str) else json.dumps(header)
    save_file({k: t for k, t in tensors.items() if t is not None}, path, {"lowbit": text})
    return path


def layer(**fields: Any) -> dict[str, Any]:
    return {"version": 1, "layers": {"w": {"format": "ternary", "shape": [4, 100], **fields}}}


def test_the_undamaged_file_is_read(tmp_path: Path):
    assert load_tensors(write(tmp_path / "x.safetensors"))["w"].format == FORMATS["ternary"]


BAD_HEADERS = {
    "not JSON": ("nonsense", "the 'lowbit' metadata are not JSON"),
    "deep JSON": (DEEP, "the 'lowbit' metadata are not JSON"),
    "a list": ([], r"version must be 1 or 2, got \[\]"),
    "no version": ({}, "version must be 1 or 2, got None"),
    "a later version": ({"version": 3, "layers": {}}, "version must be 1 or 2, got 3"),
    "no layers": ({"version": 1}, "'layers' and 'tied' of the header must be objects"),
    "layers in a list": ({"version": 1, "layers": ["w"]}, "must be objects"),
    "tied is no object": ({"version": 1, "layers": {}, "tied": 3}, "must be objects"),
    "tied to a number": ({"version": 1, "layers": {}, "tied": {"a": 3}}, "'a' is tied to 3"),
    "tied to nothing": ({**layer(), "tied": {"a": "b"}}, "ties 'a' to 'b', which cannot be"),
    "tied to itself": ({**layer(), "tied": {"w": "w"}}, "ties 'w' to 'w', which cannot be"),
    "an empty layer": ({"version": 1, "layers": {"w": None}}, "layer 'w' must have a format and a"),
    "an unknown format": (layer(format="int7"), "layer 'w': unknown format 'int7'"),
    "a format that is a number": (layer(format=4), "layer 'w' must have a format and a shape"),
    "a format of bad JSON": (layer(format="{"), "layer 'w': format spec is not JSON"),
    "a format of deep JSON": (layer(format='{"name":' + DEEP), "layer 'w'"),
    "a format of bad fields": (layer(format='{"name":[],"codec":{},"bits":1}'), "name must be"),
    "a format with a huge table": (
        layer(format='{"name":"x","codec":"lut","bits":1,"table":[0,1%s]}' % ("0" * 400)),
        "layer 'w': table value 1.* does not fit fp32|layer 'w': table value",
    ),
    "no shape": ({"version": 1, "layers": {"w": {"format": "int4"}}}, "shape must be two integers"),
    "a shape of one": (layer(shape=[4]), "shape must be two integers"),
    "a negative shape": (layer(shape=[-4, 100]), r"shape must be two integers .* got \[-4, 100\]"),
    "a shape of floats": (layer(shape=[4.0, 100]), "shape must be two integers"),
    "a shape of bools": (layer(shape=[True, 100]), "shape must be two integers"),
    "an overflowing shape": (layer(shape=[4, 2**62]), "shape must be two integers"),
    "a large shape": (layer(shape=[2**31 - 1] * 2), r"w\.codes of a .* must be torch.uint8 of shape"),
    "another shape": (layer(shape=[4, 104]), r"w\.codes of a \(4, 104\) .* got torch.uint8 of shape \(4, 25\)"),
    "another format": (layer(format="int4"), r"w\.codes of a \(4, 100\) weight in format 'int4'"),
    "another scale": (layer(format="ternary_bf16"), r"w\.scales .* got torch.float16"),
    "a second level": (layer(format="ternary_dq8"), r"w\.scales .* must be torch.uint8"),
    "another name": (
        {"version": 1, "layers": {"v": {"format": "ternary", "shape": [4, 100]}}},
        r"v\.codes is missing, layer 'v' is 'ternary'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("header", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_headers(header, message, tmp_path: Path):
    path = write(tmp_path / "x.safetensors", lowbit=header)
    with pytest.raises(ValueError, match=message) as error:
        load_tensors(path)
    assert str(path) in str(error.value)


def codes_above_the_table() -> torch.Tensor:
    codes = WEIGHT.codes.clone()
    codes[2, 3] |= 0b1100
    return codes


BAD_TENSORS = {
    "codes beyond the table": (
        {"w__codes": codes_above_the_table()},
        "layer 'w': codes of format 'ternary' hold a code above 2",
    ),
    "scales with NaN": (
        {"w__scales": torch.full((4, 1), torch.nan, dtype=torch.float16)},
        "layer 'w': scales of a 'ternary' weight holds NaN or inf",
    ),
    "no codes": ({"w__codes": None}, r"w\.codes is missing"),
    "no scales": ({"w__scales": None}, r"w\.scales is missing"),
    "a zero too many": (
        {"w__zeros": torch.zeros(4, 1, dtype=torch.uint8)},
        r"w\.zeros is not part of format 'ternary'",
    ),
    "codes of another dtype": (
        {"w__codes": WEIGHT.codes.view(torch.int8)},
        r"w\.codes .* got torch.int8",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensors(changes, message, tmp_path: Path):
    path = write(tmp_path / "x.safetensors", **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_tensors(path)
    assert str(path) in str(error.value)


def test_files_that_are_something_else(tmp_path: Path):
    dense = tmp_path / "dense.safetensors"
    save_file({"a": torch.zeros(1)}, dense)
    with pytest.raises(ValueError, match="not a lowbit checkpoint, its metadata have no 'lowbit'"):
        load_tensors(dense)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_tensors(tmp_path / "nothing.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="must hold one .safetensors file"):
        load_tensors(tmp_path / "empty")
    text = tmp_path / "text.safetensors"
    for content in (b"", b"abc", b"<html>" * 100, b"\xff" * 64, bytes(8), bytes(4096)):
        text.write_bytes(content)
        with pytest.raises(ValueError, match=r"text\.safetensors: not a readable safetensors file"):
            load_tensors(text)


INDEXES = {
    "not JSON": ("{", "not an index"),
    "no map": ("{}", "not an index"),
    "a list": ("[]", "not an index"),
    "deep": (DEEP, "not an index"),
    "a number": ('{"weight_map": {"a": 3}}', "3 is not a file name in this folder"),
    "outside": ('{"weight_map": {"a": "../x.safetensors"}}', "is not a file name in this folder"),
    "absolute": ('{"weight_map": {"a": "/etc/passwd"}}', "is not a file name in this folder"),
}


@pytest.mark.parametrize(("text", "message"), INDEXES.values(), ids=INDEXES)
def test_bad_indexes(text, message, tmp_path: Path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_tensors(tmp_path)
    assert str(index) in str(error.value)


def test_index_of_a_missing_file(tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    with pytest.raises(FileNotFoundError, match="the file 'b.safetensors' is missing"):
        load_tensors(tmp_path)


LONG = "n" * 10**6
HOSTILE = {
    "tensor": lambda: {LONG: {"dtype": "F32", "shape": [1], "data_offsets": [0, 3]}},
    "dtype": lambda: {"a": {"dtype": LONG, "shape": [1], "data_offsets": [0, 4]}},
    "entry": lambda: {"a": LONG},
    "shape": lambda: {"a": {"dtype": "F32", "shape": [LONG], "data_offsets": [0, 4]}},
    "metadata": lambda: {"__metadata__": {LONG: 1}},
    "version": lambda: {"__metadata__": {"lowbit": json.dumps({"version": LONG})}},
    **{
        f"layer {name}": lambda name=name, entry=entry: {
            "__metadata__": {"lowbit": json.dumps({"version": 1, "layers": {name: entry}})}
        }
        for name, entry in {
            LONG: {"format": "int4", "shape": [4, 100]},
            "w": {"format": LONG, "shape": [4, 100]},
            "v": {"format": json.dumps({"name": LONG, "codec": "affine", "bits": 4}), "shape": [4, 4]},
            "u": {"format": json.dumps({"name": "x", "codec": LONG, "bits": 4}), "shape": [4, 4]},
            "t": {"format": json.dumps({"name": "x", LONG: 4}), "shape": [4, 4]},
            "s": {"format": "{" + LONG, "shape": [4, 4]},
            "r": {"format": "int4", "shape": LONG},
            "q": LONG,
        }.items()
    },
    "tie": lambda: {"__metadata__": {"lowbit": json.dumps({"version": 1, "layers": {}, "tied": {LONG: LONG}})}},
}  # fmt: skip


@pytest.mark.parametrize("case", range(len(HOSTILE)))
def test_long_names_are_cut_in_errors(case: int, tmp_path: Path):
    text = json.dumps(list(HOSTILE.values())[case]()).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match=r"x\.safetensors") as e:
        load_tensors(path)
    assert len(str(e.value)) < 2500


@pytest.mark.parametrize("name", ["n" * 256, LONG, "\ud800", "a\0b"], ids=range(4))
def test_indexes_name_files_that_no_folder_can_hold(name: str, tmp_path: Path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FileNotFoundError, match="the file 'n*.*is missing") as e:
        load_tensors(tmp_path)
    assert len(str(e.value)) < 1000
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_tensors(tmp_path / name)


@pytest.mark.parametrize(
    ("offsets", "size"),
    [
        ([[0, 4], [8, 12]], 12),
        ([[0, 4], [0, 4]], 4),
        ([[4, 8], [8, 12]], 12),
        ([[0, 4], [4, 8]], 12),
    ],
    ids=["a hole", "twice the same", "a hole first", "bytes left"],
)
def test_tensors_fill_the_file_without_overlap(offsets, size: int, tmp_path: Path):
    """Bytes of nobody, or of two, are what a polyglot file is made of; the library says no too."""
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": place}
        for name, place in zip("ab", offsets, strict=True)
    }
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(SafetensorError):
        safe_open(path, "pt")
    with pytest.raises(ValueError, match=r"x\.safetensors: .*(invalid offset|not fully covered)"):
        SafetensorsFile(path)


def test_an_index_that_is_a_folder(tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").mkdir()
    with pytest.raises(ValueError, match="must be a file, it is something else"):
        load_tensors(tmp_path)


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    return save({"w": WEIGHT, "b": torch.ones(3)}, folder / "good.safetensors")


fuzz = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def read_or_refuse(path: Path) -> None:
    """Whatever the bytes are: valid weights, or a ValueError that names the file."""
    message = None
    try:
        weights = load_tensors(path)
    except ValueError as e:
        message = str(e)
    if message is None:
        for weight in weights.values():
            if not isinstance(weight, torch.Tensor):
                weight.validate().dequantize()
    else:
        assert str(path) in message


@fuzz
@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated_files(cut: float, good_file: Path):
    data = good_file.read_bytes()
    path = good_file.with_name("cut.safetensors")
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(ValueError, match=r"cut\.safetensors: not a readable safetensors file"):
        load_tensors(path)


@fuzz
@given(place=st.floats(0, 1, exclude_max=True), values=st.binary(min_size=1, max_size=4))
def test_overwritten_bytes(place: float, values: bytes, good_file: Path):
    data = bytearray(good_file.read_bytes())
    at = int(place * len(data))
    data[at : at + len(values)] = values
    path = good_file.with_name("overwritten.safetensors")
    path.write_bytes(data)
    read_or_refuse(path)


numbers = st.sampled_from([-1, 0, 1, 2, 8, 4, 25, 100, 2**31, 2**63, 2**64]) | st.integers()
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F16", "F32", "F8_E4M3", "F8_E8M0", "F4", "X"]),
        "shape": st.lists(numbers, max_size=3),
        "data_offsets": st.lists(numbers, max_size=3),
    }
)


small = st.integers(0, 4)
likely = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F16", "I64"]),
        "shape": st.lists(small, max_size=2),
        "data_offsets": st.tuples(small, small).map(lambda p: [2 * p[0], 2 * p[0] + 2 * p[1]]),
    }
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", ""]), likely | entries, max_size=2),
    metadata=st.none() | st.just({}) | st.just({"k": "v"}) | st.just({"k": 1}) | st.just([]),
    lead=st.sampled_from(["", "", "", " ", "["]),
    tail=st.sampled_from(["", "", "  ", "x", "\0"]),
    data=st.sampled_from([0, 0, 2, 4, 8, 16]),
)
def test_the_library_refuses_what_the_reader_refuses(
    header, metadata, lead, tail, data, tmp_path_factory
):
    """And takes what it takes, but for dtypes that torch has not."""
    path = tmp_path_factory.getbasetemp() / "differs.safetensors"
    if metadata is not None:
        header = {**header, "__metadata__": metadata}
    text = (lead + json.dumps(header) + tail).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    try:
        with safe_open(path, "pt") as f:
            theirs = {name: f.get_slice(name).get_shape() for name in f.keys()}  # noqa: SIM118
    except SafetensorError:
        theirs = None
    try:
        ours = {name: list(shape) for name, (shape, _) in SafetensorsFile(path).specs.items()}
    except ValueError as e:
        if "does not know" in str(e):
            return
        ours = None
    assert ours == theirs


@fuzz
@given(codes=entries, scales=entries, size=st.none() | numbers)
def test_hostile_containers(codes, scales, size, good_file: Path):
    """Offsets outside the file, shapes that overflow, a header longer than the file."""
    metadata = {"lowbit": json.dumps(layer())}
    header = json.dumps({"__metadata__": metadata, "w.codes": codes, "w.scales": scales}).encode()
    length = len(header) if size is None else size % 2**64
    path = good_file.with_name("hostile.safetensors")
    path.write_bytes(struct.pack("<Q", length) + header + bytes(108))
    read_or_refuse(path)
