"""The Triton kernels in Triton's interpreter, on the CPU: every format x activation dtype x ragged shapes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import lowbit
from lowbit import binary, int8, layouts, reference
from lowbit.backends.base import compute_dtype
from lowbit.backends.triton import TRITON, launch
from lowbit.formats import FORMATS, Format
from lowbit.layouts import K16, Operands, k16
from lowbit.ops.weights import embedding
from lowbit.weights.quantized import QuantTensor
from weights import ALL_FORMATS, assert_close, random_weight

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOAT_FORMATS = [f for f in ALL_FORMATS if f.activation is None]
# (N, K) around the tile of 64 columns, the step of 64 weights and the chunk of 16.
SHAPES = ((70, 136), (3, 33), (5, 1))
# The interpreter takes most of a second for a call.
TYPES_OF = {
    SHAPES[0]: (torch.float32, torch.bfloat16),
    SHAPES[1]: (torch.float32, torch.float16),
    SHAPES[2]: (torch.float16,),
}


def config(k: int, format: Format, **changes: int):
    """The chosen tile with changes."""
    configs = launch.kernels().configs
    return dataclasses.replace(configs.choose(8, 64, k, format.group or k, 1), **changes)


def linear(
    w: Operands, x: torch.Tensor, bias: torch.Tensor | None = None, **kwargs
) -> torch.Tensor:
    return TRITON.linear(x, w, bias, **kwargs)


def weight_of(qt: QuantTensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight that the kernel multiplies with, fp32: entries rounded to the compute dtype and scaled in fp32, or
    the scaled weight rounded where steps do not lie in groups.
    """
    f, k = qt.format, qt.shape[1]
    compute = compute_dtype(dtype, f)
    if config(k, f).apart:
        values = reference.values_of(qt).to(compute).float()
        return reference.apply_scales(
            values, f, reference.effective_scales(qt), reference.effective_zeros(qt)
        )
    return reference.dequantize(qt).to(compute).float()


@pytest.mark.parametrize("format", FLOAT_FORMATS, ids=lambda f: f.name)
def test_identity_returns_the_weight(format: Format) -> None:
    """x = I makes the product return the weight: no tolerance. Outputs are poisoned."""
    for (n, k), dtypes in TYPES_OF.items():
        qt = random_weight(format, n, k)
        w = layouts.to_operands(qt, K16)
        for dtype in dtypes:
            y = linear(w, torch.eye(k, dtype=dtype))
            assert torch.equal(y.T, weight_of(qt, dtype).to(dtype)), (n, k, dtype)


@pytest.mark.parametrize("format", FLOAT_FORMATS[::3], ids=lambda f: f.name)
def test_random_x_with_bias(format: Format) -> None:
    """Against float64 on the same weight: ragged M, strides, K in one part and in several."""
    n, k = 70, 136
    qt = random_weight(format, n, k, seed=1)
    w = layouts.to_operands(qt, K16)
    for dtype in DTYPES.values():
        weight = weight_of(qt, dtype).double()
        bias = torch.randn(n).to(dtype)
        for m, splits in ((1, 1), (3, 2), (17, 1)) if dtype == torch.float32 else ((3, 2),):
            x = torch.randn(k + 3, m).to(dtype).T[:, :k]
            c = config(k, format, splits=splits, chunks_per_split=-(-9 // splits) // 4 * 4 + 4)
            y = linear(w, x, bias, config=c)
            exact = F.linear(x.double(), weight, bias.double())
            assert_close(y, exact, x, qt, weight)


@pytest.mark.parametrize("format", ALL_FORMATS, ids=lambda f: f.name)
def test_layout_and_rows(format: Format) -> None:
    """The layout is invertible bit for bit, dequantize and embedding are exact."""
    for n, k in SHAPES:
        qt = random_weight(format, n, k)
        w = layouts.to_operands(qt, K16)
        for name, (shape, dtype) in layouts.find(K16).specs(format, n, k).items():
            assert getattr(w, name).shape == shape, name
            assert getattr(w, name).dtype == dtype, name
        back = layouts.from_kernel(layouts.to_kernel(qt, K16))
        for name, t in qt.tensors.items():
            assert torch.equal(raw(back.tensors[name]), raw(t)), name
        indices = torch.tensor([n - 1, 0, 0])
        for dtype in TYPES_OF[n, k]:
            exact = reference.dequantize(qt, dtype)
            assert torch.equal(lowbit.dequantize(w, dtype), exact), (n, k, dtype)
            assert torch.equal(embedding(indices, w, dtype), exact[indices])


def raw(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("bits", (1, 2, 3, 4, 5, 6, 8))
def test_planes_are_as_documented(bits: int) -> None:
    """layouts/k16.py, computed bit by bit from its words."""
    n, k = 3, 300
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    words = [0] * k16.num_words(bits, n, k)
    start = low = 0
    for p in {3: (2, 1), 5: (4, 1), 6: (4, 2)}.get(bits, (bits,)):
        per_word = 32 // p
        for row in range(n):
            for col in range(k):
                chunk, w = divmod(col, 16)
                at = start + (chunk // per_word * n + row) * 16 + w
                field = int(codes[row, col]) >> low & (2**p - 1)
                words[at] |= field << chunk % per_word * p
        start += -(-k // (16 * per_word)) * n * 16
        low += p
    assert start == len(words)
    expected = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    assert torch.equal(k16.pack_planes(codes, bits), expected)
    assert torch.equal(k16.unpack_planes(expected, bits, n, k), codes)


def test_ops_take_the_layout() -> None:
    """Through torch.ops: bias, epilogue, several weights, no rows, int8 activations, gradients."""
    qt = random_weight(FLOAT_FORMATS[0], 70, 136)
    w, x = layouts.to_operands(qt, K16), torch.randn(2, 3, 136)
    y = lowbit.linear(x, w)
    assert y.shape == (2, 3, 70)
    gate, residual = torch.randn(2, 3, 70), torch.randn(2, 3, 70)
    z = lowbit.linear(x, w, activation="silu", gate=gate, residual=residual)
    torch.testing.assert_close(z, F.silu(gate) * y + residual)
    many = lowbit.linear_many(x, [w, w])
    assert all(torch.equal(t, y) for t in many)
    assert lowbit.linear(torch.empty(0, 136), w).shape == (0, 70)
    a8 = random_weight(
        Format(name="a8", codec="affine", bits=4, group=32, activation="int8"), 5, 64
    )
    x8 = torch.randn(3, 64)
    assert torch.equal(lowbit.linear(x8, layouts.to_operands(a8, K16)), reference.linear(x8, a8))
    q, q_scales = int8.quantize(x8)
    assert torch.equal(
        int8.linear(q, q_scales, layouts.to_operands(a8, K16)), int8.linear(q, q_scales, a8)
    )
    signs = random_weight(FORMATS["binary"], 5, 64)
    bits, bit_scales = binary.quantize(x8)
    assert torch.equal(
        binary.linear(bits, bit_scales, layouts.to_operands(signs, K16)),
        binary.linear(bits, bit_scales, signs),
    )
    grad = x.clone().requires_grad_()
    lowbit.linear(grad, w).sum().backward()
    torch.testing.assert_close(grad.grad, qt.dequantize().sum(0).expand_as(x))
    assert "triton_linear_16x64x64" in lowbit.explain(x, w).selected


def test_choice_is_within_limits() -> None:
    """The host-side rule: splits cover K, steps lie within groups, many programs for few rows."""
    choose = launch.kernels().configs.choose
    for m in (1, 8, 16, 17, 64, 100, 512, 4096):
        for n, k in ((8192, 8192), (576, 576), (1, 1), (28672, 8192), (10944, 4096), (70, 7392)):
            for group in (k, 16, 32, 48, 64, 128, 7):
                c = choose(m, n, k, group, 132)
                assert c.chunks_per_split % c.chunks == 0
                assert (
                    (c.splits - 1) * c.chunks_per_split * 16
                    < k
                    <= c.splits * c.chunks_per_split * 16
                )
                assert c.apart == (group >= k or group % 16 == 0)
                assert not c.apart or group >= k or group % (16 * c.chunks) == 0
                assert c.splits == 1 or m <= 16
    assert choose(1, 8192, 8192, 128, 132).splits * 128 >= 4 * 132 - 128
