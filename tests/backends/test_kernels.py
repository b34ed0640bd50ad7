"""Every kernel against the reference: format x kernel x activation dtype x ragged shapes.

A new format or row is covered by existing. Rows of instruction sets that this CPU lacks are skipped and counted; the
C++ test runs them under emulation.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lowbit import _C, layouts, reference
from lowbit.backends.cpu import weights as cpu
from lowbit.formats import Format, parse
from lowbit.layouts import Operands
from lowbit.ops.terms import kernel_weight, matrix
from weights import ALL_FORMATS, assert_close, random_weight

KERNELS = _C.kernels()
FLOAT_KERNELS = [k for k in KERNELS if k["compute"] not in ("int8", "b1")]
SCOPES = {"tensor": "shared", "row": "column", "group": "column", "pair": "pair"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (N, K) around the 64-column block and the 32-weight chunk.
SHAPES = ((70, 96), (64, 300), (1, 33), (130, 64), (63, 1))
# M around the row tiles of 1, 2, 4 (GEMV) and 6 (GEMM), and past a row block of 96 and 192.
ROWS = (0, 1, 2, 3, 5, 13, 100, 197)


def legal(format: Format, kernel: dict, op: str) -> bool:
    """Whether a row could serve the format, apart from group size and instruction set."""
    return (
        kernel["op"] == op
        and kernel["bits"] == format.bits
        and kernel["scope"] == SCOPES[format.table_scope]
        and kernel["codec"] in ("lut", "int" if format.codec == "affine" else format.codec)
        and (format.exact_in_bf16 or not kernel["bf16_table"])
        and not (kernel["x"] == ["fp16"] and kernel["bits"] == 8 and format.codec == "affine")
    )


def fits_groups(format: Format, kernel: dict, k: int) -> bool:
    whole = format.group is None or format.group >= k
    half = format.group == 16 and kernel["half_groups"]
    return whole or half or format.group % kernel["group_multiple"] == 0


def cases(op: str) -> list:
    out = []
    for format in ALL_FORMATS:
        for kernel in FLOAT_KERNELS:
            if legal(format, kernel, op):
                skip = pytest.mark.skip(reason=f"this CPU has no {kernel['isa']}")
                marks = () if kernel["available"] else (skip,)
                out.append(
                    pytest.param(format, kernel, id=f"{format.name}-{kernel['name']}", marks=marks)
                )
    return out


def linear(
    op: Operands, x: torch.Tensor, kernel: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return cpu.linear(x, op, bias, kernel=kernel)


def expected_weight(qt, kernel: dict) -> torch.Tensor:
    """The weight that a row multiplies with: table entries rounded to bf16 where it multiplies in bf16."""
    values = reference.values_of(qt)
    if kernel["compute"] == "bf16":
        values = values.to(torch.bfloat16).to(torch.float32)
    return reference.apply_scales(
        values, qt.format, reference.effective_scales(qt), reference.effective_zeros(qt)
    )


@pytest.mark.parametrize(("format", "kernel"), cases("linear"))
def test_identity_returns_the_weight(format: Format, kernel: dict) -> None:
    """x = I makes the product return the dequantized weight: no tolerance."""
    ran = 0
    for n, k in SHAPES:
        if not fits_groups(format, kernel, k):
            continue
        qt = random_weight(format, n, k)
        op = matrix(qt)
        weight = expected_weight(qt, kernel)
        for name in kernel["x"]:
            y = linear(op, torch.eye(k, dtype=DTYPES[name]), kernel["index"])
            assert torch.equal(y.T, weight.to(DTYPES[name])), (n, k, name)
            ran += 1
    assert ran


@pytest.mark.parametrize(("format", "kernel"), cases("dequantize"))
def test_dequantize_is_exact(format: Format, kernel: dict) -> None:
    for n, k in SHAPES:
        qt = random_weight(format, n, k)
        op = matrix(qt)
        for dtype in DTYPES.values():
            got = cpu.dequantize(op, dtype, kernel["index"])
            assert torch.equal(got, reference.dequantize(qt, dtype)), (n, k, dtype)


@pytest.mark.parametrize(("format", "kernel"), cases("linear"))
def test_random_x_with_bias(format: Format, kernel: dict) -> None:
    """Ragged M against float64 on the same weight, x with a row stride, output from poisoned memory."""
    n, k = 70, 160
    if not fits_groups(format, kernel, k):
        n, k = 70, 20 if format.group == 20 else 16
        if not fits_groups(format, kernel, k):
            pytest.skip(f"groups of {format.group} are for the rows that take any group")
    qt = random_weight(format, n, k, seed=1)
    op = matrix(qt)
    weight = expected_weight(qt, kernel).double()
    for name in kernel["x"]:
        dtype = DTYPES[name]
        for m in ROWS:
            x = torch.randn(m, k + 3).to(dtype)[:, :k]
            bias = torch.randn(n).to(dtype)
            y = linear(op, x, kernel["index"], bias)
            exact = F.linear(x.double(), weight, bias.double())
            assert_close(y, exact, x, qt, weight)


@pytest.mark.parametrize("name", ("int4_g64", "mxfp4", "int8_g64", "e4m3"))
def test_every_fp16_enters_as_it_is(name: str) -> None:
    """All 65536 numbers of fp16, one to a row of x, come out as x * w: subnormals, infinities and NaN too."""
    format = parse(name)
    k = 64
    qt = random_weight(format, 1, k)
    op = matrix(qt)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = torch.zeros(2**16, k, dtype=torch.float16)
    x[:, 5] = every
    weight = reference.dequantize(qt)[0]
    exact = every.double() * weight[5].double()
    y = linear(op, x, -1)[:, 0].double()
    for m in (1, 2, 4):
        assert torch.equal(linear(op, x[1000 : 1000 + m], -1)[:, 0].double(), y[1000 : 1000 + m])
    finite = every.isfinite() & exact.abs().lt(65504)
    assert torch.equal(y[finite], exact[finite].to(torch.float32).to(torch.float16).double())
    assert not bool(y[every.isinf() | every.isnan()].isfinite().any())


@pytest.mark.parametrize("format", ALL_FORMATS, ids=lambda f: f.name)
def test_layout_is_invertible(format: Format) -> None:
    """Canonical -> n16 -> canonical returns every tensor bit for bit."""
    for n, k in SHAPES:
        qt = random_weight(format, n, k)
        back = layouts.from_kernel(kernel_weight(qt))
        for name, t in qt.tensors.items():
            assert torch.equal(raw(back.tensors[name]), raw(t)), name


def raw(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("bits", (1, 2, 3, 4, 5, 6, 8))
def test_layout_is_as_documented(bits: int) -> None:
    """csrc/core/n16.h, computed bit by bit from its words."""
    n, k = 70, 40
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
    packed = _C.pack(codes.numpy(), bits)
    n16 = _C.prepack(packed, n, k, bits)
    expected = bytearray(n16.size)
    chunks = -(-k // 32)
    whole = 16 // bits
    for row in range(n):
        for col in range(k):
            block, vector, lane = row // 64, row % 64 // 16, row % 16
            chunk, kk = col // 32, col % 32
            base = (((block * chunks) + chunk) * 4 + vector) * bits * 64
            j, parity, code = kk // 2, kk % 2, int(codes[row, col])
            # (unit, bit of the word, bits) of the pieces of the code, lowest bits first
            if j < whole * bits:
                pieces = [(j // whole, j % whole * bits, bits)]
            elif bits == 6:
                pieces = [(j - 12, 12, 4), (4 + (j - 12) // 2, 12 + 2 * (j % 2), 2)]
            else:
                pieces = [(unit, 15, 1) for unit in range(bits)]
            for unit, shift, width in pieces:
                word = (code & (2**width - 1)) << shift
                code >>= width
                at = base + unit * 64 + (2 * lane + parity) * 2
                expected[at] |= word & 255
                expected[at + 1] |= word >> 8
    assert n16.tobytes() == bytes(expected)


@pytest.mark.parametrize("format", ALL_FORMATS, ids=lambda f: f.name)
def test_embedding_rows(format: Format) -> None:
    n, k = 70, 100
    qt = random_weight(format, n, k)
    op = matrix(qt)
    indices = torch.tensor([0, 69, 64, 63, 1, 1])
    for dtype in DTYPES.values():
        got = cpu.embedding(indices, op, dtype)
        assert torch.equal(got, reference.dequantize(qt, dtype)[indices])


@pytest.mark.parametrize(
    "name", ("nf4", "int4_g64", "uint3_g32", "int8_g64", "nf3", "q4_1", "e4m3")
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("m", (1, 8))
def test_no_less_exact_than_dense(name: str, dtype: torch.dtype, m: int) -> None:
    """Against float64 on the dequantized weight: the mean error of the chosen row is at most that of torch's dense
    linear, whose weight is that one rounded to the activations' dtype.

    Where both round alike (a bf16 table against bf16 weights) chance decides: 2 % of slack. With fp32 x both only round
    their sums, and the error goes with the root of the additions in a chain: twice as much for chains four times as
    long as those that torch has on some CPUs.
    """
    slack = 2.0 if dtype == torch.float32 else 1.02
    format = parse(name)
    qt = random_weight(format, 256, 1024)
    op = matrix(qt)
    weight = reference.dequantize(qt)
    x = torch.randn(m, 1024).to(dtype)
    exact = F.linear(x.double(), weight.double())
    ours = (linear(op, x, -1).double() - exact).abs().mean()
    dense = (F.linear(x, weight.to(dtype)).double() - exact).abs().mean()
    assert ours <= dense * slack, f"{float(ours):.4g} against {float(dense):.4g}"
