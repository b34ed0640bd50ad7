"""Nothing is read or written beyond what a call was given: operands and results end at a page that nobody may touch.

Each result is bit for bit that of the same call on plain tensors. The kernels' own memory is poisoned and guarded in
every test (conftest.py); all kernels, instruction sets and ends of vectors are walked in tests/cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from guarded import Guard
from torch import Tensor

import lowbit
from lowbit import _C, binary, fp8, int8, layouts
from lowbit.decoder.bound import bind_linear
from lowbit.float8 import GRANULARITIES
from lowbit.formats import parse
from lowbit.layouts import CANONICAL, K16, N16
from lowbit.ops.terms import kernel_weight
from lowbit.ops.weights import embedding
from lowbit.optim import FP8AdamW
from weights import random_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One for each way to decode, and of each kind of scale, zero and table.
FORMATS = (
    "binary", "int2_g32", "uint3_g48", "uint4_zfloat", "int4_g32", "nf4", "nf4_g64_dq8", "int5", "uint6_g5", "int8",
    "uint8_g33", "e4m3", "e5m2", "mxfp4", "nvfp4", "kmeans3_pr", "kmeans4", "kmeans6_pr", "kmeans8", "ternary_trits",
    "q5_1", "q2_k", "q3_k", "q4_k", "int8_row_a8", "int4_g32_a8", "kmeans4_a8t", "int4_g32_o3", "nf4_o2fp32",
)  # fmt: skip
# Triton's interpreter takes a second for each.
LAYOUTS = {CANONICAL: FORMATS, N16: FORMATS, K16: FORMATS[::5]}
# Ends of every tile: one less and one more than a vector, a chunk, a block.
SHAPES = ((1, 1), (17, 33), (65, 100), (130, 257))


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]) -> Guard:
    """Copies, and results of torch.empty, that end at a closed page."""
    guard = Guard()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _guarding(getattr(owner, name), guard))
    yield guard
    record_property("guarded operands and results", guard.count)
    print(f"{guard.count} guarded operands and results")  # pytest -rP
    assert guard.count


def _guarding(make: Callable[..., Tensor], guard: Guard) -> Callable[..., Tensor]:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        t = make(*args, **kwargs)
        plain = type(t) is Tensor and t.device.type == "cpu" and t.is_contiguous()
        return guard.tensor(t) if plain and not t.requires_grad else t

    return made


def check(guard: Guard, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """`function` of guarded copies of its arguments returns what it returns of plain ones."""
    want = _flat(function(*args, **kwargs))
    found = _flat(function(*guard.all(args), **{k: guard.all(v) for k, v in kwargs.items()}))
    assert len(want) == len(found) > 0
    for a, b in zip(want, found, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(_bytes(a), _bytes(b))


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _bytes(t: Tensor) -> Tensor:
    return t.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", FORMATS)
def test_products(name: str, dtype: torch.dtype, guard: Guard) -> None:
    """linear, also with what follows it, with rows apart, for siblings and bound."""
    for n, k in SHAPES:
        w = layouts.to_kernel(random_weight(parse(name), n, k), N16)
        bias = torch.randn(n).to(dtype)
        for m in (1, 2, 5, 17):
            x = torch.randn(m, k).to(dtype)
            gate, residual = (torch.randn(m, n).to(dtype) for _ in range(2))
            check(guard, lowbit.linear, x, w, bias)
            if m == 1:
                continue
            check(guard, lowbit.linear, x, w, bias, activation="silu", gate=gate, residual=residual)
            apart = lowbit.linear(guard.rows(x, 3), guard.all(w), bias)
            assert torch.equal(apart, lowbit.linear(x, w, bias))
            check(guard, lowbit.linear_many, x, [w, w], [bias, None])
        out = guard.tensor(torch.zeros(m, n, dtype=dtype))
        bind_linear(guard.all(x), guard.all(w), out, guard.all(bias))()
        assert torch.equal(out, lowbit.linear(x, w, bias))


@pytest.mark.parametrize(
    ("name", "layout"),
    [(f, layout) for layout, formats in LAYOUTS.items() for f in formats],
)
def test_weights(name: str, layout: str, guard: Guard) -> None:
    """dequantize and embedding, and a product in the layouts that other tests leave out."""
    if layout == K16:
        pytest.importorskip("triton")
    for n, k in SHAPES[:3] if layout == N16 else SHAPES[1:2]:
        w = layouts.to_kernel(random_weight(parse(name), n, k), layout)
        for dtype in DTYPES:
            check(guard, lowbit.dequantize, w, dtype)
            for ids in (
                torch.tensor([n - 1, 0, n // 2]),
                torch.tensor([[n - 1]], dtype=torch.int32),
            ):
                check(guard, embedding, ids, w, dtype)
        if layout != N16 and w.format.activation is None:
            # The last rows of the identity: sums of one number, which no order of additions rounds.
            check(guard, lowbit.linear, torch.eye(k)[-3:], w)


@pytest.mark.parametrize("name", FORMATS)
def test_packing(name: str, guard: Guard) -> None:
    """pack, unpack and the kernel's layout of the canonical tensors, and back."""
    format = parse(name)
    plain = format.matrix
    for n, k in SHAPES:
        qt = random_weight(format, n, k)
        codes = qt.unpack()
        check(guard, torch.ops.lowbit.pack, codes, plain.spec)
        check(guard, torch.ops.lowbit.unpack, qt.codes, plain.spec, k)
        check(guard, lambda q: [layouts.to_kernel(q, N16).operands.codes], qt)
        check(
            guard,
            lambda w: layouts.from_kernel(w).tensors.values(),
            kernel_weight(qt),
        )
        check(guard, lambda q: q.dequantize(), qt)


@pytest.mark.parametrize("k", (1, 7, 16, 17, 33, 100, 129))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_int8(dtype: torch.dtype, k: int, guard: Guard) -> None:
    for m in (1, 5, 17):
        x = torch.randn(m, k).to(dtype)
        check(guard, int8.quantize, x)
        check(guard, int8.quantize, x, 16)
        check(guard, int8.quantize, x, None, torch.full((m,), 0.02))
        assert torch.equal(int8.quantize(guard.rows(x, 3))[0], int8.quantize(x)[0])
        w = layouts.to_kernel(random_weight(parse("int4_a8"), 17, k), N16)
        q, scales = int8.quantize(x)
        check(guard, int8.linear, q, scales, w, torch.randn(17))
        check(guard, int8.linear, q, scales, w, None, torch.int8, 0.5)


@pytest.mark.parametrize("k", (1, 7, 9, 31, 33, 64, 100, 257))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_binary(dtype: torch.dtype, k: int, guard: Guard) -> None:
    for m in (1, 5, 17):
        x = torch.randn(m, k).to(dtype)
        check(guard, binary.quantize, x)
        assert torch.equal(binary.quantize(guard.rows(x, 3))[0], binary.quantize(x)[0])
        w = layouts.to_kernel(random_weight(parse("binary_row"), 33, k), N16)
        check(guard, binary.linear, *binary.quantize(x), w, torch.randn(33))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_fp8(dtype: torch.dtype, granularity: str, guard: Guard) -> None:
    """quantize with all that it returns, absmax, dequantize, cast."""
    for rows, k in ((1, 1), (5, 17), (17, 33), (130, 129), (33, 48)):
        x = torch.randn(rows, k).to(dtype)
        check(guard, fp8.quantize, x, granularity=granularity, transposed=True)
        check(guard, fp8.quantize, x, torch.float8_e5m2, granularity, rounding="stochastic", seed=1)
        check(guard, fp8.absmax, x, granularity)
        maxima = fp8.absmax(x, granularity)
        check(guard, fp8.quantize, x, granularity=granularity, maxima=maxima)
        q, scale = fp8.quantize(x, granularity=granularity)
        check(guard, fp8.dequantize, q, scale, dtype)
        check(guard, fp8.cast, x)
        apart, scales = fp8.quantize(guard.rows(x, 3), granularity=granularity)
        assert torch.equal(_bytes(apart), _bytes(q))
        assert torch.equal(_bytes(scales), _bytes(scale))


@pytest.mark.parametrize("granularity_b", GRANULARITIES)
@pytest.mark.parametrize("granularity_a", GRANULARITIES)
def test_fp8_products(granularity_a: str, granularity_b: str, guard: Guard) -> None:
    """Of few and many rows; K ends in and after a group."""
    for m in (1, 3, 5, 17, 130):
        for k in (1, 17, 48, 100, 144):
            a, scale_a = fp8.quantize(torch.randn(m, k), granularity=granularity_a)
            b, scale_b = fp8.quantize(torch.randn(33, k), granularity=granularity_b)
            check(guard, fp8.scaled_mm, a, b, scale_a, scale_b, torch.randn(33))
    check(guard, fp8.scaled_mm, a, b, scale_a, scale_b, requantize="1x16")


@pytest.mark.parametrize("expand", (True, False))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_adamw(dtype: torch.dtype, expand: bool, guard: Guard) -> None:
    """Parameters, gradients and both states."""

    def steps(p: Tensor, gradients: list[Tensor], guard: Guard | None) -> list[Tensor]:
        parameter = torch.nn.Parameter(p)
        optimizer = FP8AdamW([parameter], expand=expand)
        for g in gradients:
            parameter.grad = g
            optimizer.step()
            if guard:
                state = optimizer.state[parameter]
                state |= {name: guard.tensor(t) for name, t in state.items() if name != "step"}
        return [parameter.detach(), *optimizer.state[parameter].values()]

    for size in (1, 7, 127, 128, 129, 300):
        p, *gradients = (torch.randn(size).to(dtype) for _ in range(4))
        want = steps(p.clone(), gradients, None)
        found = steps(guard.tensor(p), guard.all(gradients), guard)
        assert all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip(want, found, strict=True))


def test_kmeans(guard: Guard) -> None:
    """Of arrays of numpy, which the module reads where they lie."""
    for size, k in ((1, 1), (5, 2), (300, 16), (300, 256)):
        values = torch.randn(3, size).sort().values
        weights = torch.rand(3, size).double()

        def centers(values: Tensor, weights: Tensor, k: int = k) -> list[Tensor]:
            one = _C.kmeans_1d(values[2].numpy(), weights[2].numpy(), k)
            many = _C.kmeans_rows(values.numpy(), weights.numpy(), k, 2)
            assert np.array_equal(many[2], one)
            return [torch.from_numpy(many)]

        check(guard, centers, values, weights)
