"""FP8 products: every instruction set, pairing of granularities and pair of types against float64 on dequantized
operands, exact sums of integers, every code, strides, epilogues, errors and torch.compile."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from fp8_operands import PAIRINGS, TYPES, assert_close, check_neighbours, operand
from fp8_values import E4M3, E5M2
from lowbit import _C, float8, fp8
from lowbit.backends.cpu import fp8_matmul as matmul_cpu
from lowbit.float8 import scaled
from lowbit.reference import fp8 as reference

ISAS = ("scalar", "avx2", "avx512", "avx512bf16")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in _C.isa_active():
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


def run(isa: str, a, b, scale_a, scale_b, bias=None, dtype=torch.float32) -> Tensor:
    return matmul_cpu.scaled_mm(scaled(a, scale_a), scaled(b, scale_b), bias, dtype, isa)


@pytest.mark.parametrize("pairing", PAIRINGS, ids="-".join)
def test_every_pairing(pairing: tuple[str, str], isa: str) -> None:
    for m, n, k in ((1, 17, 201), (3, 5, 136), (19, 70, 290)):
        a, scale_a = operand(m, k, pairing[0])
        b, scale_b = operand(n, k, pairing[1], E5M2 if m == 3 else E4M3)
        assert_close(run(isa, a, b, scale_a, scale_b), a, b, scale_a, scale_b)


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_pairs_of_types(types: tuple[torch.dtype, torch.dtype], isa: str) -> None:
    for m in (1, 2, 4, 9):
        a, scale_a = operand(m, 190, "1x128", types[0])
        b, scale_b = operand(66, 190, "128x128", types[1])
        assert_close(run(isa, a, b, scale_a, scale_b), a, b, scale_a, scale_b)


@pytest.mark.parametrize("pairing", PAIRINGS, ids="-".join)
def test_long_sums(pairing: tuple[str, str]) -> None:
    k = 16384
    for m in (2, 7):
        a, scale_a = operand(m, k, pairing[0])
        b, scale_b = operand(3, k, pairing[1], E5M2)
        y = fp8.scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.float32)
        assert_close(y, a, b, scale_a, scale_b)


def test_sums_of_integers_are_exact(isa: str) -> None:
    """Ragged shapes around every tile; |sum| < 2^24, so that no order of additions rounds."""
    half, two = torch.tensor(0.5), torch.full((1, 1), 2.0)
    for m, n, k in itertools.product(
        (1, 2, 3, 4, 5, 7, 13), (1, 16, 17, 65), (1, 33, 64, 127, 200)
    ):
        a = torch.randint(-8, 9, (m, k)).float()
        b = torch.randint(-8, 9, (n, k)).float()
        a8, b8 = a.to(E4M3), b.to(E5M2)
        want = a @ b8.float().T
        assert torch.equal(run(isa, a8, b8, half, two.expand(n, 1).contiguous()), want), (m, n, k)


def test_more_rows_than_a_task(isa: str) -> None:
    a, b = (torch.randint(-8, 9, (rows, 40)).float() for rows in (521, 70))
    one = torch.tensor(1.0)
    assert torch.equal(run(isa, a.to(E4M3), b.to(E4M3), one, one), a @ b.T)


@pytest.mark.parametrize("granularity", float8.GRANULARITIES)
def test_scales_of_more_rows_than_a_task(granularity: str, isa: str) -> None:
    """Each row has its own, or its band's."""
    for m, k in ((517, 48), (1100, 17)):
        a, scale_a = operand(m, k, granularity)
        b, scale_b = operand(5, k, "row")
        assert_close(run(isa, a, b, scale_a, scale_b), a, b, scale_a, scale_b)


@pytest.mark.parametrize("pairing", PAIRINGS, ids="-".join)
def test_scales_end_where_they_end(pairing: tuple[str, str], isa: str) -> None:
    """K ends in every part of a group, a step and a slab; few and many rows."""
    for m in (2, 4, 5, 19):
        for k in (17, 33, 48, 63, 80, 144, 203, 720):
            check_neighbours(functools.partial(run, isa), pairing, m, k)


@pytest.mark.parametrize("dtype", (E4M3, E5M2), ids=str)
def test_every_code(dtype: torch.dtype, isa: str) -> None:
    """One product with 1: the value itself, with infinity and NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)[:, None]
    values, one = codes.float(), torch.tensor(1.0)
    for count in (1, 2, 4, 9):
        ones = torch.ones(count, 1).to(E4M3)
        for y in (run(isa, ones, codes, one, one).T, run(isa, codes, ones, one, one)):
            torch.testing.assert_close(y, values.expand(-1, count), rtol=0, atol=0, equal_nan=True)


def test_extreme_scales(isa: str) -> None:
    """Neither product of two scales is finite and not zero, all results are."""
    for scales in ((2.0**100, 2.0**30), (2.0**-100, 2.0**-40)):
        for granularity in ("row", "1x128"):
            shape = float8.find_granularity(granularity).scale_shape(3, 200)
            a = torch.full((3, 200), 2.0**-6 if scales[0] > 1 else 448.0).to(E4M3)
            each = [torch.full(shape, s) for s in scales]
            assert_close(run(isa, a, a, *each), a, a, *each)


def test_scales_are_arithmetic(isa: str) -> None:
    for granularity in ("row", "1x16"):
        for m in (3, 9):
            a, scale_a = operand(m, 64, granularity)
            b, scale_b = operand(5, 64, granularity)
            scale_a[0], scale_a[1], scale_b[2] = torch.nan, 0, -scale_b[2]
            y = run(isa, a, b, scale_a, scale_b)
            assert bool(y[0].isnan().all())
            assert bool((y[1] == 0).all())
            assert_close(y[1:], a[1:], b, scale_a[1:], scale_b)
    a, scale_a = operand(9, 64, "mx")
    b, scale_b = operand(5, 64, "mx")
    scale_a.view(torch.uint8)[4, 1] = 255
    y = run(isa, a, b, scale_a, scale_b)
    assert bool(y[4].isnan().all())
    assert y.isnan().sum() == 5


def test_strides_and_empty_operands() -> None:
    for m in (3, 9):
        wide, scale_a = operand(m, 203, "row")
        b, scale_b = operand(70, 200, "128x128")
        a = wide[:, 3:]
        want = fp8.scaled_mm(a.contiguous(), b, scale_a, scale_b)
        across = b.view(torch.uint8).t().contiguous().view(b.dtype).t()
        scales = torch.stack((scale_a, scale_a), 1)[:, 0]
        assert not scales.is_contiguous() or m == 1
        assert torch.equal(fp8.scaled_mm(a, across, scales, scale_b), want)
    one = torch.tensor(1.0)
    for m, n in ((0, 5), (5, 0), (0, 0)):
        a, b = (torch.zeros(rows, 7).to(E4M3) for rows in (m, n))
        assert fp8.scaled_mm(a, b, one, one).shape == (m, n)


def test_bias_and_output_types(isa: str) -> None:
    for m in (1, 3, 10):
        a, scale_a = operand(m, 100, "1x16")
        b, scale_b = operand(67, 100, "tensor")
        y = run(isa, a, b, scale_a, scale_b)
        for bias_dtype in (torch.float32, torch.bfloat16, torch.float16):
            bias = torch.randn(67).to(bias_dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                got = run(isa, a, b, scale_a, scale_b, bias, dtype)
                assert torch.equal(got, (y + bias.float()).to(dtype))


def test_bf16_scales_and_threads() -> None:
    for m in (1, 70):
        a, scale_a = operand(m, 300, "1x128")
        b, scale_b = operand(500, 300, "row")
        rounded = [s.bfloat16() for s in (scale_a, scale_b)]
        y = fp8.scaled_mm(a, b, *rounded, out_dtype=torch.float32)
        assert torch.equal(
            y, fp8.scaled_mm(a, b, *(s.float() for s in rounded), out_dtype=torch.float32)
        )
        torch.set_num_threads(1)
        alone = fp8.scaled_mm(a, b, *rounded, out_dtype=torch.float32)
        torch.set_num_threads(2)
        assert torch.equal(alone, y)


@pytest.mark.parametrize("requantize", ("row", "1x16"))
def test_requantized(requantize: str) -> None:
    a, scale_a = operand(9, 100, "1x128")
    b, scale_b = operand(67, 100, "128x128")
    bias = torch.randn(67)
    y = fp8.scaled_mm(a, b, scale_a, scale_b, bias, torch.float32)
    for dtype in (None, E4M3, E5M2):
        q, scale = fp8.scaled_mm(a, b, scale_a, scale_b, bias, dtype, requantize=requantize)
        want = reference.quantize(y, dtype or E4M3, float8.find_granularity(requantize))
        assert q.dtype == (dtype or E4M3)
        assert torch.equal(q.view(torch.uint8), want[0].view(torch.uint8))
        assert torch.equal(scale, want[1])


def test_bad_input() -> None:
    a, b, one = torch.zeros(3, 40).to(E4M3), torch.zeros(5, 40).to(E4M3), torch.tensor(1.0)
    for arguments, error, message in (
        ((a.float(), b, one, one), TypeError, "a must be float8_e4m3fn or float8_e5m2, got torch.float32"),
        ((a, b.view(torch.uint8), one, one), TypeError, "b must be float8.*got torch.uint8"),
        ((a[0], b, one, one), ValueError, r"a must have shape \(rows, K\).*got \(40,\)"),
        ((a[:, :0], b[:, :0], one, one), ValueError, r"K >= 1, got \(3, 0\)"),
        ((a[:, :39], b, one, one), ValueError, r"same K, got \(3, 39\) and \(5, 40\)"),
        ((a, b, torch.ones(3), one), ValueError, r"scale_a of a \(3, 40\) matrix must have"),
        ((a, b, one, torch.ones(3, 1)), ValueError, r"scale_b of a \(5, 40\) matrix must have"),
        ((a, b, one.double(), one), TypeError, "scale_a must be float32"),
        ((a, b, one, one, torch.ones(3)), ValueError, r"bias must have shape \(5,\)"),
        ((a, b, one, one, torch.ones(5).double()), TypeError, "bias must be float32"),
        ((a, b, one, one, None, torch.int8), TypeError, "out_dtype must be float32"),
        ((a, b, one.clone().requires_grad_(), one), ValueError, "no gradients"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            fp8.scaled_mm(*arguments)
    with pytest.raises(ValueError, match="requantize must be None or one of.*got '1x128'"):
        fp8.scaled_mm(a, b, one, one, requantize="1x128")
    with pytest.raises(TypeError, match="out_dtype must be.*with requantize, got torch.bfloat16"):
        fp8.scaled_mm(a, b, one, one, None, torch.bfloat16, requantize="row")


def test_opcheck_and_compile() -> None:
    a, scale_a = operand(9, 100, "1x128")
    b, scale_b = operand(67, 100, "128x128")
    # Not the schema test: it multiplies the arguments, which torch cannot do in FP8.
    check = functools.partial(
        torch.library.opcheck,
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    operands = (a, b, scale_a, scale_b, torch.randn(67))
    check(torch.ops.lowbit.fp8_scaled_mm.default, (*operands, torch.bfloat16))
    for granularity in ("row", "1x16"):
        check(torch.ops.lowbit.fp8_scaled_mm_quantized.default, (*operands, E5M2, granularity))

    def f(a: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return fp8.scaled_mm(a, b, scale, scale_b, requantize="1x16")

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(a, scale_a)
    for got, want in zip(compiled, f(a, scale_a), strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_products_are_bf16_unless_asked_otherwise() -> None:
    a, b = (torch.ones(2, 32).to(E4M3) for _ in range(2))
    one = torch.tensor(1.0)
    assert fp8.scaled_mm(a, b, one, one).dtype == torch.bfloat16
    assert fp8.scaled_mm(a, b, one, one, requantize="row")[0].dtype == E4M3
