"""Checkpoints: written as the safetensors library reads them, loaded bit for bit, atomic, strict,
and refused with the file and the tensor named if anything is wrong with them.
"""

from __future__ import annotations

import copy
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lowbit import nn as qnn
from lowbit.formats import FORMATS
from lowbit.io import safetensors_file
from lowbit.io.readers.native import NativeReader
from lowbit.io.safetensors_file import Source
from lowbit.io.save_load import load, load_tensors, save
from lowbit.methods import quantize
from lowbit.ptq import quantize_model
from lowbit.weights.quantized import QuantTensor
from weights import ALL_FORMATS, random_weight

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, NaN and -0.0 included."""
    same = (a.shape, a.dtype) == (b.shape, b.dtype)
    return same and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))


def equal_weights(a: QuantTensor, b: QuantTensor) -> bool:
    same = (a.format, a.shape, list(a.tensors)) == (b.format, b.shape, list(b.tensors))
    return same and all(equal(t, b.tensors[key]) for key, t in a.tensors.items())


def dense_tensors() -> dict[str, torch.Tensor]:
    """Every dtype in shapes that differ, with random bits."""
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype, shape in zip(
        DTYPES, [(), (0,), (0, 3), (1,), (3,), (2, 3), (3, 1, 5)] * 2, strict=False
    ):
        size = torch.Size(shape).numel() * dtype.itemsize
        high = 2 if dtype == torch.bool else 256
        data = torch.randint(0, high, (size,), generator=g, dtype=torch.uint8)
        tensors[str(dtype)] = data.view(dtype).view(shape)
    return tensors


def model(tied: bool = True) -> nn.ModuleDict:
    """Modules of every kind: embedding with a tied head, bias or none, a buffer, something not
    quantized.
    """
    torch.manual_seed(1)
    parts = nn.ModuleDict(
        {
            "embed": nn.Embedding(40, 24),
            "up": nn.Linear(24, 50),
            "down": nn.Linear(50, 24, bias=False),
            "norm": nn.BatchNorm1d(24),
            "lm_head": nn.Linear(24, 40, bias=False),
        }
    )
    if tied:
        parts["lm_head"].weight = parts["embed"].weight
    return parts


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.state_dict())


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = state(a), state(b)
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert equal(value, theirs[key]), key


@pytest.mark.parametrize("format", ALL_FORMATS, ids=lambda f: f.name)
def test_every_format_round_trips(format, tmp_path: Path):
    """The library reads what is written, and what it reads is what was given."""
    weight = random_weight(format, 6, 150)
    path = save({"a.b": weight, "c": torch.arange(3)}, tmp_path / "x.safetensors")
    by_library = load_file(path)
    assert set(by_library) == {"c", *(f"a.b.{key}" for key in weight.tensors)}
    assert all(equal(by_library[f"a.b.{key}"], t) for key, t in weight.to_file().items())
    back = load_tensors(path)
    assert list(back) == ["a.b", "c"]
    assert equal_weights(back["a.b"], weight)
    assert back["a.b"].format == format


def test_every_dtype_and_shape_round_trips(tmp_path: Path):
    tensors = dense_tensors()
    path = save(tensors, tmp_path / "x.safetensors")
    for read in (load_file(path), load_tensors(path)):
        assert read.keys() == tensors.keys()
        assert all(equal(read[name], t) for name, t in tensors.items())


def test_the_container_is_that_of_the_library(tmp_path: Path):
    """Byte for byte what safetensors writes; dtypes of one size each, whose order it leaves
    open.
    """
    tensors = {
        "bytes": torch.arange(5, dtype=torch.uint8),
        "b": torch.randn(3, 2),
        "a": torch.randn(4),
        "longs": torch.arange(3),
        "halves": torch.randn(7).half(),
        "none": torch.zeros(0, 2),
    }
    metadata = {"lowbit": '{"a": "\u00e9"}'}
    sources = [
        Source({name: (tuple(t.shape), t.dtype)}, lambda name=name, t=t: {name: t})
        for name, t in tensors.items()
    ]
    safetensors_file.write(tmp_path / "ours", sources, metadata)
    save_file(tensors, tmp_path / "theirs", metadata)
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    sizes = [struct.unpack("<Q", data[:8])[0] for data in (ours, theirs)]
    assert all(size % 8 == 0 for size in sizes)
    headers = [json.loads(d[8 : 8 + s]) for d, s in zip((ours, theirs), sizes, strict=True)]
    assert headers[0] == headers[1]
    assert ours[8 + sizes[0] :] == theirs[8 + sizes[1] :]


def test_views_are_written_as_they_look(tmp_path: Path):
    base = torch.arange(24.0).view(4, 6)
    tensors = {"t": base.t(), "s": base[::2, 1:4], "e": torch.tensor(5.0).expand(3)}
    read = load_file(save(tensors, tmp_path / "x.safetensors"))
    assert all(torch.equal(read[k], t) for k, t in tensors.items())


RECIPES = {
    "linears": {"up|down": "nf4"},
    "two-level": {"up": "nf4_dq8", "down": "nvfp4"},
    "fitted": {"up": "kmeans3", "down": "kmeans2_pr"},
    "embedding and head": {"embed|lm_head": "int8_g32", "up": "uint4_g32"},
    "nothing": {},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("meta", [False, True], ids=["dense", "meta"])
def test_a_model_round_trips(recipe, meta: bool, tmp_path: Path):
    saved = model()
    saved["norm"].running_mean.fill_(3)
    quantize_model(saved, recipe, skip=(), progress=False)
    path = save(saved, tmp_path / "folder")
    assert path == tmp_path / "folder" / "model.safetensors"
    if meta:
        with torch.device("meta"):
            loaded = model()
    else:
        loaded = model()
        with torch.no_grad():
            for p in loaded.parameters():
                p.fill_(7)
    assert load(loaded, path) is loaded
    assert_same_state(loaded, saved)
    if isinstance(saved["embed"], qnn.QuantEmbedding):
        assert loaded["lm_head"].codes is loaded["embed"].codes
    else:
        assert loaded["lm_head"].weight is loaded["embed"].weight
    x = torch.arange(10)
    for part in (saved, loaded):
        part.eval()
    run = [m["lm_head"](m["norm"](m["down"](m["up"](m["embed"](x))))) for m in (saved, loaded)]
    assert torch.equal(*run)
    with safe_open(path, "pt") as f:
        stored = sum(f.get_tensor(name).nbytes for name in f.keys())  # noqa: SIM118
    own = {
        t.data_ptr(): t.nbytes
        for name, t in state(saved).items()
        if not name.endswith("_extra_state") and t.numel()
    }
    assert stored == sum(own.values()), "what is shared is stored once"


@pytest.mark.parametrize("meta", [False, True], ids=["filled", "meta"])
def test_loading_into_a_quantized_model(meta: bool, tmp_path: Path):
    saved = model()
    recipe = RECIPES["embedding and head"]
    quantize_model(saved, recipe, skip=(), progress=False)
    path = save(saved, tmp_path / "x.safetensors")
    loaded = copy.deepcopy(saved)
    if meta:
        loaded.to("meta")
    for t in loaded.state_dict().values():
        if isinstance(t, torch.Tensor) and not meta:
            t.zero_()
    before = loaded["embed"]
    load(loaded, path)
    assert loaded["embed"] is before
    assert_same_state(loaded, saved)
    assert loaded["lm_head"].codes is loaded["embed"].codes


def test_shared_modules_are_stored_once(tmp_path: Path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        m = nn.Module()
        m.a = nn.Linear(10, 10)
        m.b = m.a
        m.c = nn.Linear(10, 10)
        m.c.weight = m.a.weight
        m.d = nn.Embedding(10, 10)
        m.d.weight = m.a.weight
        return m

    saved = make()
    quantize_model(saved, {".*": "int4"}, progress=False)
    path = save(saved, tmp_path / "x.safetensors")
    assert len(load_file(path)) == len({"codes", "scales", "bias", "c.bias"})
    read = load_tensors(path)
    assert read["a"] is read["b"] is read["c"] is read["d"]
    loaded = load(make(), path)
    assert loaded.b is loaded.a is not loaded.c
    assert loaded.c.codes is loaded.a.codes is loaded.d.codes
    assert_same_state(loaded, saved)


def test_a_file_without_the_tied_head_fits_a_tied_model(tmp_path: Path):
    """As transformers writes its files."""
    weight = quantize(model()["embed"].weight, "int8")
    rest = {k: v for k, v in state(model()).items() if k.split(".")[0] in ("up", "down", "norm")}
    path = save({"embed": weight, **rest}, tmp_path / "x.safetensors")
    loaded = load(model(), path)
    assert isinstance(loaded["lm_head"], qnn.QuantLinear)
    assert loaded["lm_head"].codes is loaded["embed"].codes
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing in the file"):
        load(model(tied=False), path)
    dense = save({"embed.weight": model()["embed"].weight, **rest}, tmp_path / "dense.safetensors")
    with torch.device("meta"):
        empty = model()
    loaded = load(empty, dense)
    assert loaded["lm_head"].weight is loaded["embed"].weight
    assert not loaded["embed"].weight.is_meta


def test_dense_tensors_take_the_dtype_of_the_model(tmp_path: Path):
    saved = model()
    quantize_model(saved, {"up": "int4"}, progress=False)
    path = save(saved, tmp_path / "x.safetensors")
    loaded = load(model().bfloat16(), path)
    assert loaded["down"].weight.dtype == loaded["up"].bias.dtype == torch.bfloat16
    assert equal_weights(loaded["up"].quant_tensor(), saved["up"].quant_tensor())
    assert torch.equal(loaded["down"].weight, saved["down"].weight.bfloat16())


def test_trained_parameters_are_saved(tmp_path: Path):
    saved = model()
    quantize_model(saved, {"up": "kmeans2"}, progress=False)
    for p in saved["up"].train_parameters({"scales", "table", "bias"}):
        p.data.mul_(1.25)
    path = save(saved, tmp_path / "x.safetensors")
    assert equal_weights(load_tensors(path)["up"], saved["up"].quant_tensor())
    assert torch.equal(load(model(), path)["up"].bias, saved["up"].bias)


MISMATCHES = {
    "a module is missing": (lambda m: m.pop("up"), r"layer 'up' is not a module of the model"),
    "another kind": (lambda m: m.update({"up": nn.LayerNorm(3)}), "layer 'up' is a LayerNorm"),
    "another shape": (
        lambda m: m.update({"up": nn.Linear(24, 51)}),
        r"layer 'up' has shape \(51, 24\) in the model, \(50, 24\) in the file",
    ),
    "no bias": (
        lambda m: m.update({"up": nn.Linear(24, 50, bias=False)}),
        r"up\.bias is not part of the model",
    ),
    "a bias": (
        lambda m: m.update({"down": nn.Linear(50, 24)}),
        r"down\.bias is missing in the file",
    ),
    "more": (
        lambda m: m.update({"new": nn.Linear(3, 3)}),
        r"new\.weight is missing in the file; new\.bias is missing in the file",
    ),
    "less": (lambda m: m.pop("norm"), r"norm\.bias is not part of the model"),
    "another dense shape": (
        lambda m: m.update({"norm": nn.BatchNorm1d(25)}),
        r"norm\.weight has shape \(25,\) in the model, \(24,\) in the file",
    ),
    "quantized there": (
        lambda m: quantize_model(m, {"down": "int4"}, progress=False),
        r"layer 'down' is int4 in the model and not in the file",
    ),
    "another format": (
        lambda m: quantize_model(m, {"up": "int3"}, progress=False),
        r"layer 'up' is int3 \(50, 24\) in the model, int4 \(50, 24\) in the file",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_a_model_that_does_not_fit_is_not_touched(change, message, tmp_path: Path):
    saved = model()
    quantize_model(saved, {"up": "int4"}, progress=False)
    path = save(saved, tmp_path / "x.safetensors")
    other = model()
    change(other)
    modules, before = dict(other.named_modules()), copy.deepcopy(state(other))
    with pytest.raises(ValueError, match=message) as error:
        load(other, path)
    assert str(path) in str(error.value)
    assert dict(other.named_modules()) == modules
    for key, value in state(other).items():
        if isinstance(value, torch.Tensor):
            assert equal(value, before[key])


def test_describe(tmp_path: Path):
    weight = random_weight(FORMATS["nf4"], 6, 150)
    path = save(
        {"w": weight, "b": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / "x.safetensors"
    )
    rows = {row.name: row for row in NativeReader(path).describe()}
    assert (rows["w"].format, rows["w"].shape, rows["w"].quantized) == ("nf4", (6, 150), True)
    assert rows["w"].nbytes == weight.nbytes
    assert (rows["b"].format, rows["b"].nbytes, rows["b"].quantized) == ("bfloat16", 10, False)


class Broken(Exception):
    pass


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over an old file"])
def test_a_failed_save_leaves_nothing_behind(existing: bool, tmp_path: Path, monkeypatch):
    path = tmp_path / "x.safetensors"
    if existing:
        path.write_bytes(b"old")
    saved = model()
    quantize_model(saved, {"up|down": "int4"}, progress=False)

    def fail(*args: object) -> None:
        raise Broken

    # The last tensor of the second layer cannot be made: some of the file is written by then.
    monkeypatch.setattr(saved["down"], "quant_tensor", fail)
    with pytest.raises(Broken):
        save(saved, path)
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Broken):
        save(saved, path)
    assert [p.name for p in tmp_path.iterdir()] == (["x.safetensors"] if existing else [])
    assert not existing or path.read_bytes() == b"old"
    monkeypatch.undo()
    save(saved, path)
    assert_same_state(load(model(), path), saved)


def test_file_permissions_follow_the_umask(tmp_path: Path):
    old = os.umask(0o027)
    try:
        path = save({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (3, TypeError, "must be an nn.Module or a mapping, got int"),
        ({"a": [1]}, TypeError, "a must be a Tensor or a QuantTensor, got list"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, TypeError, "safetensors cannot hold"),
        ({"a": torch.zeros(2, device="meta")}, ValueError, "a is on the meta device"),
        (
            {"a": random_weight(FORMATS["int4"], 2, 8), "a.codes": torch.zeros(1)},
            ValueError,
            "tensor 'a.codes' comes twice",
        ),
    ],
)
def test_what_cannot_be_saved(state, error, message, tmp_path: Path):
    with pytest.raises(error, match=message):
        save(state, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
