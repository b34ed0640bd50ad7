"""Damaged files of every kind, by hypothesis: a reader returns a valid weight or a clear error."""

from __future__ import annotations

import functools
import json
import struct
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lowbit

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from gguf_files import (
    Llama,
    llama_fields,
    llama_tensors,
    raw_file,
    string,
    tensor_entry,
    write,
    write_llama,
)
from lowbit.io.readers.gguf import GGUFFile
from lowbit.io.save_load import load_tensors, save
from lowbit.weights.quantized import QuantTensor

# Examples are made from the seed of the test's name, so that a failure is found again.
fuzz = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
BOUNDARIES = [0, 1, 2, 31, 32, 33, 255, 256]
BOUNDARIES += [2**b - d for b in (31, 32, 63, 64) for d in (1, 0)][:-1]
u64 = st.sampled_from(BOUNDARIES) | st.integers(0, 2**64 - 1)
u32 = st.sampled_from([b for b in BOUNDARIES if b < 2**32]) | st.integers(0, 2**32 - 1)


def outcome(read, *names: str):
    """What `read` returns, or None after an error that names the file and what else is due."""
    try:
        return read()
    except (ValueError, NotImplementedError) as e:
        message = str(e)
    assert all(name in message for name in names), message
    return None


def check(tensor: torch.Tensor | QuantTensor) -> None:
    if isinstance(tensor, QuantTensor):
        # Finite scales times finite codes: only the product may overflow, and only to inf.
        assert not torch.isnan(tensor.validate().dequantize()).any()


def read_gguf(data: bytes) -> int:
    """Opens a file of these bytes and reads every tensor; returns how many were valid."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as f:
        f.write(data)
        f.flush()
        file = outcome(lambda: GGUFFile(f.name), f.name)
        if file is None:
            return 0
        valid = 0
        for name, info in file.tensors.items():
            assert info.offset + info.nbytes <= len(data)
            tensor = outcome(lambda name=name: file[name], f.name, repr(name))
            if tensor is None:
                continue
            assert tuple(tensor.shape) == info.shape
            check(tensor)
            valid += 1
        return valid


@functools.cache
def valid_gguf() -> bytes:
    spec = Llama(vocab=32, hidden=32, mlp=32, layers=1, heads=1)
    with tempfile.TemporaryDirectory() as folder:
        path = write(
            Path(folder) / "a.gguf",
            llama_tensors(spec),
            tokens=["a", "bc"],
            numbers=[1, 2, 3],
            eps=0.5,
        )
        return path.read_bytes()


def test_the_undamaged_gguf_is_read():
    assert read_gguf(valid_gguf()) == 11


@fuzz
@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated_gguf(cut):
    """Data follows the header, so a cut file has always lost bytes of its last tensor."""
    data = valid_gguf()
    assert read_gguf(data[: int(len(data) * cut)]) == 0


edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=6,
)


def overwrite(data: bytes, edits: list[tuple[float, bytes]], reach: int) -> bytes:
    """`data` with patches at fractions of its first `reach` bytes."""
    damaged = bytearray(data)
    for place, patch in edits:
        start = int(reach * place)
        damaged[start : start + len(patch)] = patch
    return bytes(damaged)


@fuzz
@given(edits=edits, header_only=st.booleans())
def test_overwritten_gguf(edits, header_only):
    data = valid_gguf()
    # Of the bytes, about 1200 are the header with its strings and tensor table.
    read_gguf(overwrite(data, edits, 1200 if header_only else len(data)))


@functools.cache
def valid_llama() -> bytes:
    spec = Llama(vocab=288, hidden=32, mlp=32, layers=1, heads=1)
    with tempfile.TemporaryDirectory() as folder:
        return write_llama(Path(folder) / "a.gguf", spec).read_bytes()


def load_llama(data: bytes) -> int:
    """Loads a model and its tokenizer from these bytes; returns how many of both were valid."""
    from lowbit.integrations.transformers import load_gguf, load_tokenizer

    with tempfile.NamedTemporaryFile(suffix=".gguf") as f:
        f.write(data)
        f.flush()
        model = outcome(lambda: load_gguf(f.name), f.name)
        if model is not None:
            # Damaged weights may be large, but not outside their tables.
            ids = torch.zeros(1, 2, dtype=torch.int64)
            with torch.inference_mode():
                assert model(ids).logits.shape == (1, 2, model.config.vocab_size)
        tokenizer = outcome(lambda: load_tokenizer(f.name), f.name)
        return (model is not None) + (tokenizer is not None)


def test_the_undamaged_llama_is_loaded():
    assert load_llama(valid_llama()) == 2


@settings(fuzz, max_examples=100)
@given(edits=edits, header_only=st.booleans())
def test_overwritten_llama(edits, header_only):
    """The first 700 bytes are numbers of the model."""
    data = valid_llama()
    load_llama(overwrite(data, edits, 700 if header_only else len(data)))


@settings(fuzz, max_examples=100)
@given(
    changes=st.dictionaries(
        st.sampled_from(sorted(k for k in llama_fields(Llama()) if k != "tokenizer.ggml.tokens")),
        st.sampled_from([0, 1, 2, 3, 33, 2**31 - 1, 2**32 - 1, 0.0, -1.0, 1e38, float("nan")])
        | st.sampled_from(["", "none", "linear", "llama", "gpt2", "x" * 300, True, False])
        | st.lists(st.integers(0, 3), min_size=1, max_size=3)
        | st.lists(st.text(max_size=2), min_size=1, max_size=3),
        min_size=1,
        max_size=3,
    )
)
def test_hostile_llama(changes):
    spec = Llama(vocab=288, hidden=32, mlp=32, layers=1, heads=1)
    with tempfile.TemporaryDirectory() as folder:
        data = write_llama(Path(folder) / "a.gguf", spec, **changes).read_bytes()
    load_llama(data)


@fuzz
@given(
    dims=st.lists(u64, max_size=5),
    kind=st.integers(0, 45) | u32,
    offset=u64,
    num_tensors=st.just(1) | u64,
    data=st.binary(max_size=200),
)
def test_hostile_tensor_table(dims, kind, offset, num_tensors, data):
    entry = tensor_entry(dims=tuple(dims), kind=kind, offset=offset)
    read_gguf(raw_file([entry], num_tensors=num_tensors, data=data))


@fuzz
@given(
    kind=st.integers(0, 14),
    item=st.integers(0, 14),
    count=u64,
    payload=st.binary(max_size=64),
    num_fields=st.just(1) | u64,
)
def test_hostile_metadata(kind, item, count, payload, num_fields):
    value = struct.pack("<IQ", item, count) if kind == 9 else b""
    field = string(b"key") + struct.pack("<I", kind) + value + payload
    read_gguf(raw_file([], fields=field, num_fields=num_fields))


@fuzz
@given(data=st.binary(max_size=300))
def test_noise_after_the_magic(data):
    assert read_gguf(b"GGUF" + struct.pack("<I", 3) + data) == 0


def read_safetensors(data: bytes) -> int:
    """As `read_gguf`, with `load_tensors`, which reads all or nothing."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as f:
        f.write(data)
        f.flush()
        state = outcome(lambda: load_tensors(f.name), f.name)
        for tensor in (state or {}).values():
            check(tensor)
        return len(state or {})


@functools.cache
def valid_safetensors() -> bytes:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    formats = ("nf4_g16", "uint3_g32", "kmeans2_g16", "ternary_trits_g20", "mxfp4", "nf4_g16_dq8")
    state = {f"layers.{name}": lowbit.quantize(weight, name) for name in formats}
    state["norm.weight"] = torch.ones(5)
    with tempfile.TemporaryDirectory() as folder:
        return save(state, Path(folder) / "a.safetensors").read_bytes()


def test_the_undamaged_safetensors_is_read():
    assert read_safetensors(valid_safetensors()) == 7


@fuzz
@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated_safetensors(cut):
    data = valid_safetensors()
    assert read_safetensors(data[: int(len(data) * cut)]) == 0


@fuzz
@given(edits=edits, header_only=st.booleans())
def test_overwritten_safetensors(edits, header_only):
    data = valid_safetensors()
    reach = 8 + int.from_bytes(data[:8], "little") if header_only else len(data)
    read_safetensors(overwrite(data, edits, reach))


json_values = st.recursive(
    st.none() | st.booleans() | u64 | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
spec_names = st.sampled_from(
    ["nf4", "int4_g8", "kmeans3", '{"codec":"lut","bits":4}', "{", "", "e4m3"]
)
layers = st.dictionaries(
    st.sampled_from(["a", "b", ""]),
    json_values
    | st.fixed_dictionaries(
        {"format": spec_names | json_values, "shape": st.lists(u64, max_size=3) | json_values}
    ),
    max_size=2,
)


@fuzz
@given(
    content=json_values
    | st.fixed_dictionaries(
        {
            "version": st.just(1) | json_values,
            "layers": layers | json_values,
            "tied": st.dictionaries(st.text(max_size=2), st.text(max_size=2)) | json_values,
        }
    ),
)
def test_hostile_lowbit_header(content):
    """The container is well formed; what the metadata claim about it is not."""
    tensors = {f"{m}.{t}": torch.zeros(2, 4, dtype=torch.uint8) for m in "ab" for t in ("codes",)}
    data = safetensors.torch.save(tensors, {"lowbit": json.dumps(content)})
    read_safetensors(data)
