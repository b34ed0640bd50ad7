"""Sizes of 0 in every function that hands addresses to a kernel: an empty result, or an error that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import lowbit
from lowbit import _C, binary, fp8, int8
from lowbit.float8 import GRANULARITIES
from lowbit.ops.weights import embedding
from lowbit.optim import FP8AdamW

FORMATS = (
    "binary",
    "int4_g32",
    "uint3_zfloat",
    "nf4",
    "kmeans4_pr",
    "e4m3",
    "int8_row_a8",
    "nf4_o3",
)


@pytest.mark.parametrize("name", FORMATS)
def test_products(name: str) -> None:
    qt = lowbit.quantize(torch.randn(5, 7), name)
    for shape in ((0, 7), (2, 0, 7), (0, 0, 7)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(shape).to(dtype)
            y = torch.zeros(*shape[:-1], 5, dtype=dtype)
            assert torch.equal(lowbit.linear(x, qt), y)
            assert torch.equal(lowbit.linear(x, qt, activation="silu", gate=y, residual=y), y)
            assert torch.equal(lowbit.linear_many(x, [qt, qt])[1], y)
    assert lowbit.linear_many(torch.randn(3, 7), []) == []
    assert embedding(torch.zeros(0, 3, dtype=torch.int64), qt).shape == (0, 3, 7)
    for n, k in ((0, 7), (5, 0), (0, 0)):
        with pytest.raises(ValueError, match=rf"non-empty \(N, K\) matrix, got shape \({n}, {k}\)"):
            lowbit.quantize(torch.randn(n, k), name)


def test_activations() -> None:
    for make in (int8.quantize, lambda x: int8.quantize(x, 4), binary.quantize):
        q, scales = make(torch.randn(0, 7))
        assert len(q) == len(scales) == 0
        for m in (0, 3):
            with pytest.raises(ValueError, match=rf"K >= 1, got \({m}, 0\)"):
                make(torch.randn(m, 0))
    with pytest.raises(ValueError, match="group must be"):
        int8.quantize(torch.randn(3, 7), 0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fp8(granularity: str) -> None:
    for m, k in ((0, 7), (3, 0), (0, 0)):
        x = torch.randn(m, k)
        q, scale, q_t = fp8.quantize(x, granularity=granularity, transposed=True)
        shape = GRANULARITIES[granularity].scale_shape(m, k)
        assert (q.shape, scale.shape, q_t.shape) == ((m, k), shape, (k, m))
        assert fp8.absmax(x, granularity).shape == shape
        assert fp8.dequantize(q, scale).shape == fp8.cast(x).shape == (m, k)
    q, scale = fp8.quantize(torch.randn(3, 7), granularity=granularity)
    none, no_scale = fp8.quantize(torch.randn(0, 7), granularity=granularity)
    assert fp8.scaled_mm(none, q, no_scale, scale).shape == (0, 3)
    assert fp8.scaled_mm(q, none, scale, no_scale).shape == (3, 0)


def test_adamw_and_packing() -> None:
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.grad = torch.empty(0)
    FP8AdamW([parameter]).step()
    for n, k in ((0, 7), (3, 0), (0, 0)):
        codes = torch.zeros(n, k, dtype=torch.uint8)
        packed = torch.ops.lowbit.pack(codes, "int4")
        assert torch.equal(torch.ops.lowbit.unpack(packed, "int4", k), codes)
        n16 = _C.prepack(packed.numpy(), n, k, 4)
        assert np.array_equal(_C.unprepack(n16, n, k, 4), packed.numpy())


def _outliers(k: int) -> None:
    names = ("x", "x_dtype", "x_stride", "columns", "values", "value_dtype", "count", "out")
    _C.multiply_outliers_ptr(**dict.fromkeys(names, 0), m=1, k=k, n=1, threads=1)


def _maxima(block_rows: int, block_k: int) -> None:
    _C.Fp8Blocks(rows=3, k=0, block_rows=block_rows, block_k=block_k, row_blocks=1)


def _product(k: int) -> None:
    names = ("codes", "stride", "type", "scales", "scale_type", "row_shift", "scale_stride")
    none = _C.Fp8Operand(**dict.fromkeys(names, 0), k_shift=-1)
    others = dict.fromkeys(("bias", "bias_dtype", "out", "out_dtype"), 0)
    _C.fp8_matmul_ptr(m=1, n=1, k=k, a=none, b=none, threads=1, **others)


def _int8(k: int, group: int) -> None:
    names = ("x", "x_dtype", "x_stride", "scales", "static_scales", "q")
    _C.quantize_int8_ptr(**dict.fromkeys(names, 0), m=1, k=k, group=group, threads=1)


def _binary(k: int) -> None:
    names = ("x", "x_dtype", "x_stride", "scales", "bits")
    _C.quantize_binary_ptr(**dict.fromkeys(names, 0), m=1, k=k, threads=1)


def _dense(n: int) -> _C.DecoderLinear:
    return _C.dense_linear(n=n, k=1, weight=0, bias=0, bias_dtype=0)


def _decoder(**sizes: int) -> None:
    names = ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "max_length")
    config, model = _C.DecoderConfig(), _C.DecoderModel()
    for name, size in (dict.fromkeys((*names, "sequences", "threads"), 1) | sizes).items():
        setattr(config, name, size)
    model.embedding = model.head = _dense(1)
    _C.Decoder(config, model)


def _weight(**sizes: Any) -> None:
    _C.Weight(**{"n": 4, "k": 8, "bits": 4, "group": 8} | sizes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _int8(0, 1), "k must be at least 1"),
        (lambda: _int8(8, 0), "group must be at least"),
        (lambda: _binary(0), "k must be at least 1, got 0"),
        (lambda: _outliers(0), "k must be at least 1, got 0"),
        (lambda: _maxima(1, 0), "block_k must be at least 1, got 0"),
        (lambda: _maxima(0, 1), "block_rows must be at least 1, got 0"),
        (lambda: _product(0), "k must be at least 1, got 0"),
        (lambda: _dense(0), "n must be at least 1, got 0"),
        (lambda: _decoder(kv_heads=0), "kv_heads must be at least 1, got 0"),
        (lambda: _decoder(hidden=-3), "hidden must be at least 1, got -3"),
        (lambda: _decoder(heads=3, kv_heads=2, head_dim=2), "heads % kv_heads must be 0, got 1"),
        (lambda: _weight(k=0), r"k >= 1\) and below 2\^31, got \(4, 0\)"),
        (lambda: _weight(group=0), "group must be positive, got 0"),
        (lambda: _weight(scope="column", table_groups=0), "table_groups must be 1 or"),
        (lambda: _C.kmeans_1d(np.zeros(0, np.float32), None, 4), "not empty"),
        (lambda: _C.kmeans_rows(np.zeros((3, 0), np.float32), None, 4), "not empty"),
        (lambda: _C.kmeans_1d(np.zeros(3, np.float32), None, 0), "k must be 1 to 256, got 0"),
        (lambda: _C.pack(np.zeros((2, 2), np.uint8), 0), "bits must be 1 to 8, got 0"),
        (lambda: _C.pack(np.zeros((2, 2), np.uint8), 3, 1), "base must be 0 or from 2"),
        (lambda: _C.unprepack(np.zeros(0, np.uint8), 2**62, 2**62, 8), r"below 2\^31"),
        (lambda: lowbit.Format.lut(bits=2, table=[]), "table must be a tuple of 2 to 4 values"),
    ],
)  # fmt: skip
def test_the_module_divides_by_no_zero(call: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
