"""Weights of GGUF's blocks IQ1_S to IQ3_S: their values, products, gradients, rows, files and layers."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from guarded import Guard
from torch import Tensor, nn

gguf = pytest.importorskip("gguf")

import lowbit  # noqa: E402
from gguf_files import GGMLType, random_blocks  # noqa: E402
from lowbit import packing, reference  # noqa: E402
from lowbit.backends.cpu import structured  # noqa: E402
from lowbit.codebooks import grids  # noqa: E402
from lowbit.formats import Format, parse  # noqa: E402
from lowbit.ops.terms import matrix  # noqa: E402
from lowbit.ops.weights import embedding  # noqa: E402
from lowbit.structured import BLOCK_BYTES  # noqa: E402
from lowbit.weights.quantized import QuantTensor  # noqa: E402
from lowbit.weights.slices import columns_of, rows_of  # noqa: E402

BY_NAME = pytest.mark.parametrize("name", BLOCK_BYTES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def made(name: str, n: int, k: int, scale: float | None = None) -> tuple[QuantTensor, Tensor]:
    """A weight of random blocks, and its values by package gguf."""
    kind = GGMLType[name.upper()]
    blocks = random_blocks(kind, n, k // 256, np.random.default_rng(n), scale)
    qt = QuantTensor(name, (n, k), {"codes": torch.from_numpy(blocks)}).validate()
    return qt, torch.from_numpy(gguf.dequantize(blocks, kind))


@BY_NAME
@pytest.mark.parametrize(("n", "k"), [(1, 256), (37, 512), (5, 1280), (300, 256)])
def test_values_are_those_of_gguf(name, n, k):
    qt, values = made(name, n, k)
    assert torch.equal(qt.dequantize(), values)
    assert torch.equal(reference.dequantize(qt), values)
    assert 8 * qt.nbytes == n * k * qt.format.stored_bits == n * k // 256 * BLOCK_BYTES[name] * 8
    assert torch.equal(lowbit.linear(torch.eye(k), qt), values.t())
    few = [lowbit.linear(torch.eye(k)[i : i + 8], qt) for i in range(0, k, 8)]
    assert torch.equal(torch.cat(few), values.t())
    indices = torch.tensor([[n - 1, 0]])
    assert torch.equal(embedding(indices, qt, torch.float16), values[indices].half())


@BY_NAME
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_those_of_the_values(name, dtype):
    qt, values = made(name, 37, 768, 0.01)
    bias = torch.randn(37)
    for m in (0, 1, 3, 8, 33):
        x = torch.randn(m, 768).to(dtype)
        y, exact = lowbit.linear(x, qt, bias), F.linear(x.double(), values.double(), bias.double())
        size = F.linear(x.double().abs(), values.double().abs(), bias.double().abs())
        # K + 2 roundings of fp32 sums, and one to the dtype.
        bound = 2 * 770 * 2**-24 * size + exact.abs() * torch.finfo(dtype).eps
        assert y.dtype == dtype
        assert bool(((y.double() - exact).abs() <= bound).all()), m


@BY_NAME
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", ""])
def test_kernels_of_every_instruction_set(name, isa):
    """K that ends within a block, too, which no file has."""
    format = parse(name)
    for n, k in ((19, 256), (3, 600), (2, 5)):
        full, values = made(name, n, -(-k // 256) * 256, 0.01)
        qt, values = QuantTensor(format, (n, k), full.tensors), values[:, :k]
        w = matrix(qt)
        for dtype in DTYPES:
            assert torch.equal(structured.decode(None, w, dtype, isa), values.to(dtype))
            for m in range(1, 9):
                x = torch.randn(m, k).to(dtype)
                y = structured.few_rows(x, w, None, torch.float32, isa).double()
                size = F.linear(x.double().abs(), values.double().abs())
                off = (y - F.linear(x.double(), values.double())).abs()
                assert bool((off <= 2 * (k + 2) * 2**-24 * size).all()), (n, k, m, dtype)
        taken = structured.decode(torch.tensor([n - 1, 0, n - 1]), w, torch.float32, isa)
        assert torch.equal(taken, values[[n - 1, 0, n - 1]])


@BY_NAME
def test_nothing_is_read_beyond_a_row(name):
    """The last row ends where a page ends that is followed by one that nobody may read."""
    guard = Guard()
    qt, values = made(name, 3, 512, 0.01)
    w = matrix(qt)
    near_end = guard.all(w)
    assert torch.equal(structured.decode(None, near_end, torch.float32), values)
    for dtype in DTYPES:
        x = guard.tensor(torch.randn(2, 512).to(dtype))
        assert torch.equal(lowbit.linear(x, near_end), lowbit.linear(x, w))


@BY_NAME
def test_gradients_are_those_of_the_dense_weight(name):
    qt, values = made(name, 6, 512, 0.01)
    x = torch.randn(5, 512, requires_grad=True)
    grad = torch.randn(5, 6)
    lowbit.linear(x, qt).backward(grad)
    torch.testing.assert_close(x.grad, grad @ values, rtol=1e-5, atol=1e-5)


@BY_NAME
def test_files_layers_and_pickle_keep_the_bits(name, tmp_path: Path):
    qt, values = made(name, 20, 512)

    def same(other: QuantTensor) -> bool:
        return other.format == qt.format and torch.equal(other.codes, qt.codes)

    assert same(pickle.loads(pickle.dumps(qt)))
    layer = lowbit.nn.QuantLinear.from_quant_tensor(qt)
    assert same(copy.deepcopy(layer).quant_tensor())
    lowbit.save(nn.Sequential(layer), tmp_path / "m.safetensors")
    loaded = lowbit.load(nn.Sequential(nn.Linear(512, 20, bias=False)), tmp_path / "m.safetensors")
    assert same(loaded[0].quant_tensor())
    assert torch.equal(loaded[0].weight.float(), values)


@BY_NAME
def test_rows_and_columns_are_cut_at_blocks(name):
    qt, values = made(name, 20, 768)
    assert torch.equal(rows_of(qt, slice(3, 9)).dequantize(), values[3:9])
    assert torch.equal(columns_of(qt, 256, 768).dequantize(), values[:, 256:])
    with pytest.raises(ValueError, match="a code stands for 256 weights"):
        columns_of(qt, 0, 768, 128)


@BY_NAME
def test_grids_as_kernels_read_them(name):
    """A nibble is the number of a level; what lies apart negates it, or takes 1/4 away."""
    vectors, words, levels = grids.vectors(name), grids.words(name), grids.levels(name)
    for j in range(vectors.shape[1]):
        number = words >> 4 * j & 15
        assert np.array_equal(levels[0][number], vectors[:, j] + 0.125 * name.startswith("iq1"))
        other = vectors[:, j] - 0.125 if name.startswith("iq1") else -vectors[:, j]
        assert np.array_equal(levels[1][number], other)


def test_without_the_package_of_the_vectors(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    with pytest.raises(ModuleNotFoundError, match="weights in format 'iq3_s' need package gguf"):
        grids.vectors.__wrapped__("iq3_s")


def test_formats_of_blocks():
    for name, size in BLOCK_BYTES.items():
        format = parse(name)
        assert (format.spec, format.bits, format.dim) == (name, 8 * size, 256)
        assert format.structured
        plain = Format(
            **{**{f: getattr(format, f) for f in format.__dataclass_fields__}, "name": "mine"}
        )
        assert parse(plain.spec) == plain
        assert name in lowbit.formats()
    for bad, match in (
        ("iq2_xxs_g32", "group must be None"),
        ("iq3_s_fp16", "scale must be None"),
        ("iq1_s_a8", "activation must be None"),
    ):
        with pytest.raises(ValueError, match=match):
            parse(bad)
    codes = torch.zeros(2, 3, 65, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"shape \(N, C, 66\) for format 'iq2_xxs'"):
        packing.pack_codes(codes, parse("iq2_xxs"))


def test_nothing_makes_them():
    for call in (
        lambda: lowbit.quantize(torch.randn(4, 256), "iq2_xxs"),
        lambda: lowbit.quantize(torch.randn(4, 256), "iq3_s", method="rtn"),
        lambda: lowbit.quantize_model(nn.Sequential(nn.Linear(256, 4)), "iq1_m", progress=False),
    ):
        with pytest.raises(NotImplementedError, match="whose weights are read from GGUF files"):
            call()


def test_explain_says_what_runs():
    qt, _ = made("iq3_xxs", 20, 256)
    assert lowbit.explain(torch.ones(8, 256), qt).selected.startswith("gemv_iq3_xxs_rows_")
    assert lowbit.explain(torch.ones(9, 256), qt).selected.startswith("panel_iq3_xxs_rows_")
