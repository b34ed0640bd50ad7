"""Binary activations: every row against integer matmuls bit for bit, quantization, errors, explain, torch.compile."""

from __future__ import annotations

import pytest
import torch

import lowbit
from lowbit import _C, binary, int8, layouts, packing, reference
from lowbit.backends.cpu import activations
from lowbit.formats import FORMATS, parse
from lowbit.ops.terms import matrix
from weights import random_weight

KERNELS = [k for k in _C.kernels() if k["compute"] == "b1"]
# Groups of a chunk, of several, past 31 chunks (whose counts no longer fit a byte), whole rows, no scales at all.
FORMATS_HERE = ("binary", "binary_g32_bf16", "binary_g1024", "binary_row_fp32", "binary_g64_fp32")
SHAPES = ((70, 96), (64, 1200), (1, 33), (130, 2051), (63, 1))
ROWS = (0, 1, 2, 3, 5, 8, 13)


def signs(m: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, K) int8 of -1 and 1, and their bits with a row stride and ones beyond K."""
    codes = torch.randint(0, 2, (m, k), dtype=torch.uint8)
    packed = packing.pack_codes(codes, FORMATS["binary"])
    if k % 8:
        packed[:, -1] |= 256 - 2 ** (k % 8)
    rows = torch.full((m, packed.shape[1] + 3), 255, dtype=torch.uint8)
    rows[:, : packed.shape[1]] = packed
    return codes.to(torch.int8) * 2 - 1, rows[:, : packed.shape[1]]


def run_row(op, bits, x_scales, kernel: dict, bias=None, dtype=torch.float32):
    return activations.binary_linear(bits, x_scales, op, bias, dtype, kernel["index"])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k["name"])
def test_rows_are_the_reference_bit_for_bit(kernel: dict) -> None:
    if not kernel["available"]:
        pytest.skip(f"this CPU has no {kernel['isa']}")
    for name in FORMATS_HERE:
        for n, k in SHAPES:
            qt = random_weight(parse(name), n, k)
            op = matrix(qt)
            weight = reference.effective_scales(qt)
            bias = torch.randn(n)
            for m in ROWS:
                q, bits = signs(m, k)
                x_scales = torch.rand(m) + 0.1
                want = reference.binary_linear(
                    (q > 0).to(torch.uint8), x_scales, qt.unpack(), qt.format, weight, bias
                )
                y = run_row(op, bits, x_scales, kernel, bias)
                assert torch.equal(y, want), (name, n, k, m)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k["name"])
def test_sums_are_exact_integers(kernel: dict) -> None:
    """All signs equal or opposite, and random ones; a matmul of int64 is the oracle."""
    if not kernel["available"]:
        pytest.skip(f"this CPU has no {kernel['isa']}")
    for k in (1, 31, 32, 63, 2048, 4096 + 17):
        qt = random_weight(parse("binary_row_fp32"), 66, k)
        qt.scales.fill_(1)
        codes = torch.randint(0, 2, (66, k), dtype=torch.uint8)
        codes[0], codes[1] = 0, 1
        qt.tensors["codes"] = torch.ops.lowbit.pack(codes, qt.format.spec)
        q, bits = signs(7, k)
        q[0], q[1], bits[0], bits[1] = -1, 1, 0, 255
        exact = q.long() @ (codes.long() * 2 - 1).T
        op = matrix(qt)
        for m in (1, 2, 4, 7):
            y = run_row(op, bits[:m], torch.ones(m), kernel)
            assert torch.equal(y, exact[:m].float()), (k, m)


def test_linear_is_the_int8_product_of_the_signs() -> None:
    for name in ("binary", "binary_g32", "binary_row_fp32"):
        qt = random_weight(parse(name), 70, 300)
        bias = torch.randn(70).to(torch.bfloat16)
        q, bits = signs(5, 300)
        x_scales = torch.rand(5)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            want = int8.linear(q, x_scales, qt, bias, dtype)
            assert torch.equal(binary.linear(bits, x_scales, qt, bias, dtype), want)
            canonical = layouts.to_operands(qt, layouts.CANONICAL)
            assert torch.equal(binary.linear(bits, x_scales, canonical, bias, dtype), want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_quantize(dtype: torch.dtype) -> None:
    for k in (1, 15, 64, 300, 4100):
        x = torch.randn(9, k + 5).to(dtype)[:, :k]
        x[2, 0], x[3, 0], x[4] = 0.0, -0.0, 0
        x[5, -1], x[6, -1] = torch.nan, -torch.inf
        bits, scales = binary.quantize(x)
        want, want_scales = reference.quantize_binary(x)
        assert torch.equal(bits, packing.pack_codes(want, FORMATS["binary"]))
        # K additions in fp32, in another order, and one division.
        rtol = (k + 1) * 2**-24
        torch.testing.assert_close(scales, want_scales, rtol=rtol, atol=0, equal_nan=True)


def test_the_product_of_quantized_x() -> None:
    """Against a dense product with scale * sign of both."""
    x = torch.randn(6, 512)
    qt = lowbit.quantize(torch.randn(96, 512), "binary")
    y = binary.linear(*binary.quantize(x), qt)
    dense = x.abs().mean(1, keepdim=True) * torch.where(x >= 0, 1.0, -1.0)
    torch.testing.assert_close(y, dense @ qt.dequantize().T, rtol=1e-4, atol=1e-4)


def test_explain_shows_the_row() -> None:
    qt = random_weight(parse("binary"), 70, 300)
    bits, _ = binary.quantize(torch.randn(3, 300))
    shown = lowbit.explain(bits, qt)
    assert shown.selected in {k["name"] for k in KERNELS}
    assert {k["name"] for k in KERNELS} <= {row.name for row in shown.kernels}
    assert lowbit.explain(torch.randn(3, 300), qt).selected not in {k["name"] for k in KERNELS}
    with pytest.raises(ValueError, match=r"x must have shape \(..., 38\), got \(3, 37\)"):
        lowbit.explain(bits[:, 1:], qt)


def test_bad_input() -> None:
    qt = random_weight(parse("binary"), 70, 100)
    bits, s = torch.zeros(3, 13, dtype=torch.uint8), torch.ones(3)
    for arguments, error, message in (
        ((bits.char(), s, qt), TypeError, "bits must be uint8, got torch.int8"),
        ((bits[:, :12], s, qt), ValueError, r"bits must have shape \(M, 13\) for K = 100, got \(3, 12\)"),
        ((bits, s.double(), qt), TypeError, "x_scales must be float32"),
        ((bits, s[:2], qt), ValueError, r"x_scales must have shape \(3,\)"),
        ((bits, s, qt, torch.ones(3)), ValueError, "bias must have shape"),
        ((bits, s, qt, None, torch.int8), TypeError, "out_dtype must be"),
        ((bits, s, random_weight(parse("ternary"), 70, 100)), ValueError, "must have 1 bit"),
        ((bits, s, random_weight(parse("kmeans1"), 70, 100)), ValueError, "must have 1 bit"),
        ((bits, s, random_weight(parse("binary_g20"), 70, 100)), ValueError, "multiples of 32, got 20"),
        ((bits, s.requires_grad_(), qt), ValueError, "no gradients"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            binary.linear(*arguments)
    for x, error, message in (
        (torch.zeros(3, dtype=torch.int32), TypeError, "x must be float32"),
        (torch.zeros(3), ValueError, "x must have shape"),
        (torch.zeros(3, 0), ValueError, "x must have shape"),
    ):
        with pytest.raises(error, match=message):
            binary.quantize(x)


def test_opcheck_and_compile() -> None:
    w = matrix(random_weight(parse("binary"), 70, 96))
    x = torch.randn(3, 96)
    bits, s = binary.quantize(x)
    torch.library.opcheck(torch.ops.lowbit.binary_quantize.default, (x,))
    args = (bits, s, *w, torch.randn(70), torch.bfloat16)
    torch.library.opcheck(torch.ops.lowbit.binary_linear.default, args)

    def f(x: torch.Tensor) -> torch.Tensor:
        return binary.linear(*binary.quantize(x), w)

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_bits_and_activations_by_column() -> None:
    """A stride along K other than 1: the values count, not where they lie."""
    qt = random_weight(parse("binary_g64_fp32"), 70, 192)
    codes, bits = signs(5, 192)
    x_scales = torch.rand(5)
    want = binary.linear(bits, x_scales, qt)
    across = bits.t().contiguous().t()
    assert across.stride(1) != 1
    assert torch.equal(binary.linear(across, x_scales, qt), want)
    x = codes.float() * 3
    for got, expected in zip(
        binary.quantize(x.t().contiguous().t()), binary.quantize(x), strict=True
    ):
        assert torch.equal(got, expected)
