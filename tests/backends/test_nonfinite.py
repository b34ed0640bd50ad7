"""NaN and infinity in x reach the results that depend on them as in a dense product of the weight, and no others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lowbit
from lowbit import _C, int8, layouts, reference
from lowbit.backends.cpu import weights as cpu
from lowbit.formats import Format, parse
from lowbit.layouts import CANONICAL, K16
from lowbit.nn import QuantLinear
from lowbit.ops.terms import matrix
from weights import ALL_FORMATS, random_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = (float("nan"), float("inf"), -float("inf"))
N, K = 70, 160
EXACT = [f for f in ALL_FORMATS if f.activation is None and not f.outliers]
ZEROS = [f for f in EXACT if f.zero]
LINEAR_ROWS = [
    k for k in _C.kernels() if k["op"] == "linear" and k["compute"] not in ("int8", "b1")
]


def spoilt(m: int, dtype: torch.dtype, value: float) -> torch.Tensor:
    """x whose rows have no special value, one, two of one sign, two of both, and many, from row 0 on again."""
    x = torch.randn(m, K).to(dtype)
    for row in range(m):
        kind = row % 5 if m > 1 else 1
        at = [(), (37,), (3, 150), (64, 65), range(0, K, 3)][kind]
        for i, column in enumerate(at):
            x[row, column] = -value if kind == 3 and i else value
    return x


def assert_alike(y: torch.Tensor, want: torch.Tensor, what: object) -> None:
    """NaN and each infinity stand where they do in `want`, and nowhere else."""
    y, want = y.float(), want.float()
    for name, a, b in (
        ("NaN", y.isnan(), want.isnan()),
        ("infinity", y == torch.inf, want == torch.inf),
        ("-infinity", y == -torch.inf, want == -torch.inf),
    ):
        assert torch.equal(a, b), (what, name, int(a.sum()), int(b.sum()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", EXACT, ids=lambda f: f.name)
def test_products_are_those_of_a_dense_weight(format: Format, dtype: torch.dtype) -> None:
    # Random codes of FP8 are NaN and infinity themselves.
    finite = format.codec not in ("e4m3", "e5m2")
    qt = random_weight(format, N, K) if finite else lowbit.quantize(torch.randn(N, K), format)
    weight = qt.dequantize()
    for m in (1, 2, 3, 5, 40):
        for value in SPECIAL:
            x = spoilt(m, dtype, value)
            want = F.linear(x.float(), weight).to(dtype)
            assert_alike(lowbit.linear(x, qt), want, (m, value))
            for y in lowbit.linear_many(x, [qt, qt]):
                assert_alike(y, want, (m, value, "many"))


@pytest.mark.parametrize("format", ZEROS, ids=lambda f: f.name)
def test_every_row_of_the_kernel_table(format: Format) -> None:
    qt = random_weight(format, N, K)
    op, weight, ran = matrix(qt), qt.dequantize(), 0
    codec = "int" if format.codec == "affine" else format.codec
    for kernel in LINEAR_ROWS:
        group = format.group or K
        half = group == 16 and kernel["half_groups"]
        fits = group >= K or half or group % kernel["group_multiple"] == 0
        if (
            not kernel["available"]
            or kernel["bits"] != format.bits
            or kernel["codec"] not in ("lut", codec)
            or kernel["scope"] != "shared"
            or not fits
        ):
            continue
        if "columns" in kernel["name"]:
            continue
        for name, dtype in (
            ("fp32", torch.float32),
            ("bf16", torch.bfloat16),
            ("fp16", torch.float16),
        ):
            if name not in kernel["x"] or (kernel["bits"] == 8 and "_f16_" in kernel["name"]):
                continue
            # Past a block of 516 rows where there are such.
            blocks = format.name == "uint4" and kernel["name"].startswith(("gemm_bf16", "gemm_f16"))
            for m in (1, 9, 600) if blocks else (1, 9):
                x = spoilt(m, dtype, torch.inf)
                y = cpu.linear(x, op, None, kernel=kernel["index"])
                want = F.linear(x.float(), weight).to(dtype)
                assert_alike(y, want, (kernel["name"], m, dtype))
                ran += 1
    assert ran


@pytest.mark.parametrize("format", ["uint4", "uint4_zfloat", "q4_1"])
def test_what_follows_a_product_of_spoilt_rows(format: str) -> None:
    """Bias, gate and residual of the same rows, and results of the rows between them bit for bit."""
    qt, bias = random_weight(parse(format), N, K), torch.randn(N)
    for m in (1, 7, 30):
        x = spoilt(m, torch.float32, torch.inf)
        gate, residual = torch.randn(m, N + 3)[:, :N], torch.randn(m, N)
        y = lowbit.linear(x, qt, bias, activation="silu", gate=gate, residual=residual)
        dense = F.silu(gate) * F.linear(x, qt.dequantize(), bias) + residual
        assert_alike(y, dense, m)
        finite = x.isfinite().all(1)
        calm = lowbit.linear(
            torch.where(x.isfinite(), x, 0),
            qt,
            bias,
            activation="silu",
            gate=gate,
            residual=residual,
        )
        assert torch.equal(y[finite], calm[finite])


def test_sums_beyond_fp32_are_those_of_a_dense_weight() -> None:
    """x of 1e38 has sums that overflow, where products with small weights do not."""
    qt = lowbit.quantize(torch.randn(N, K) * 1e-3, "uint4_zfloat")
    x = torch.full((2, K), 3e37)
    y, want = lowbit.linear(x, qt), F.linear(x.double(), qt.dequantize().double()).float()
    assert y.isfinite().all()
    torch.testing.assert_close(y, want, rtol=1e-4, atol=float(want.abs().max()) * 1e-5)


@pytest.mark.parametrize(
    "format", ["int8_row_a8", "int4_g32_a8", "nf4_a8t", "uint4_g32_a8", "int4_g20_a8"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_activations(format: str, dtype: torch.dtype) -> None:
    """A row with NaN gives NaN and one with infinity nothing finite, by its own scale; a static one saturates."""
    layer = QuantLinear.from_linear(torch.nn.Linear(K, N), format)
    qt = layer.quant_tensor()
    for m in (1, 2, 9, 40):
        for value in SPECIAL:
            x = spoilt(m, dtype, value)
            bad = ~x.isfinite().all(1)
            layer.set_input_scale(None)
            y = layer(x)
            assert not y[bad].isfinite().any()
            assert y[~bad].isfinite().all()
            layer.set_input_scale(0.02)
            y = layer(x)
            if value == value:
                assert y.isfinite().all()
                assert torch.equal(y, layer(x.clamp(-127 * 0.02, 127 * 0.02)))
            else:
                assert y[bad].isnan().all()
                assert torch.equal(y[~bad], layer(torch.where(x.isnan(), 0, x))[~bad])
            scale = torch.full((m,), 0.02)
            for backend in (CANONICAL, K16):
                w = layouts.to_operands(qt, backend)
                again = int8.static_linear(x, layer.input_scale, w, layer.bias)
                torch.testing.assert_close(again, y, rtol=0, atol=0, equal_nan=True)
            q, scales = int8.quantize(x, scale=0.02)
            want_q, want_scales = reference.quantize_int8(x, None, scale)
            assert torch.equal(q, want_q)
            torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(scales.isnan(), x.isnan().any(1))


def test_a_given_scale_is_not_written_to() -> None:
    x = torch.randn(3, 40)
    x[1, 5] = torch.nan
    scale = torch.full((3,), 0.1)
    int8.quantize(x, scale=scale)
    assert torch.equal(scale, torch.full((3,), 0.1))


def test_int8_results_have_no_nan() -> None:
    """It becomes 0, as the docstring says."""
    qt = random_weight(parse("int4_g32_a8"), N, K)
    x = torch.randn(2, K)
    x[0, 3] = torch.nan
    q, scales = int8.quantize(x, scale=0.02)
    y = int8.linear(q, scales, qt, None, torch.int8, 0.1)
    assert (y[0] == 0).all()
    assert (y[1] != 0).any()


# numpy, which the interpreter computes with, warns of it.
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ZEROS, ids=lambda f: f.name)
def test_triton(format: Format, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    qt = random_weight(format, N, K)
    w = layouts.to_operands(qt, K16)
    for m in (1, 5):
        x = spoilt(m, dtype, torch.inf)
        assert_alike(lowbit.linear(x, w), F.linear(x.float(), qt.dequantize()).to(dtype), m)
