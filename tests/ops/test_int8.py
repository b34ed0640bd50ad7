"""int8 activations: every row bit for bit against the reference and integer matmuls, quantization, requantization,
formats, errors, autograd, modules and torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lowbit
from lowbit import _C, int8, layouts, reference
from lowbit.backends.cpu import activations
from lowbit.formats import Format, parse
from lowbit.nn import QuantLinear
from lowbit.ops.terms import matrix
from weights import random_weight

KERNELS = [k for k in _C.kernels() if k["compute"] == "int8"]
BITS = (1, 2, 3, 4, 5, 6, 8)
SHAPES = ((70, 96), (64, 600), (1, 33), (130, 64))
ROWS = (0, 1, 2, 3, 5, 8, 13, 197)  # around tiles of 1, 2, 4, 6, 8 and past a row block of 192
MIXED = (
    "int4_g32_a8", "uint4_g64_a8", "q4_1_a8", "uint2_zfloat_a8", "uint8_a8", "uint3_g96_a8", "int5_row_a8",
    "uint6_a8", "binary_a8", "ternary_trits_a8", "fp4_a8", "iq4_nl_a8", "mxfp4_a8", "nvfp4_a8", "int4_g20_a8",
    "int4_g32_dq8_a8", "kmeans4_g16_dq8_a8t",
    "nf4_a8t", "nf3_a8t", "kmeans5_a8t", "kmeans6_a8t", "kmeans8_a8t", "e4m3_a8t", "e5m2_a8t",
)  # fmt: skip


def serves(format: Format, kernel: dict, k: int) -> bool:
    group = format.group or k
    return (
        kernel["bits"] == format.bits
        and (kernel["codec"] == "int") == (format.codec == "affine")
        and (
            group >= k
            or group % kernel["group_multiple"] == 0
            or (group == 16 and kernel["half_groups"])
        )
    )


def run_row(op, q, x_scales, kernel: dict, dtype=torch.float32, out_scale=None, bias=None):
    return activations.int8_linear(q, x_scales, op, bias, dtype, out_scale, kernel["index"])


def expected(qt, q, x_scales, bias=None):
    scales = reference.effective_scales(qt)
    return reference.int8_linear(
        q, x_scales, qt.unpack(), qt.format, scales, reference.effective_zeros(qt), qt.table, bias
    )


@pytest.mark.parametrize("name", MIXED)
def test_rows_are_the_reference_bit_for_bit(name: str) -> None:
    format, ran = parse(name), 0
    for n, k in SHAPES:
        qt = random_weight(format, n, k)
        op = matrix(qt)
        bias = torch.randn(n)
        for m in ROWS:
            q = torch.randint(-128, 128, (m, k + 3), dtype=torch.int8)[:, :k]
            x_scales = torch.rand(m) + 0.1
            want = expected(qt, q, x_scales, bias)
            for kernel in KERNELS:
                if kernel["available"] and serves(format, kernel, k):
                    y = run_row(op, q, x_scales, kernel, bias=bias)
                    assert torch.equal(y, want), (n, k, m, kernel["name"])
                    ran += 1
    assert ran


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k["name"])
def test_sums_are_exact_integers(kernel: dict) -> None:
    """Extreme codes and activations: no product or sum may saturate. int64 matmul is the oracle."""
    if not kernel["available"]:
        pytest.skip(f"this CPU has no {kernel['isa']}")
    bits, n, k = kernel["bits"], 66, 672
    if kernel["codec"] == "int":
        format = Format(
            name="i", codec="affine", bits=bits, scale="fp32", zero="int", activation="int8"
        )
        table = torch.arange(2**bits)
    else:
        table = torch.linspace(-128, 127, 2**bits).round()
        format = Format.lut(bits=bits, table=table, group=None, scale=None, activation="int8")
    qt = random_weight(format, n, k)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    codes[:4] = torch.tensor([[0], [2**bits - 1], [0], [2**bits - 1]], dtype=torch.uint8)
    qt.tensors["codes"] = torch.ops.lowbit.pack(codes, format.spec)
    weight = table[codes.long()].long()
    if format.zero == "int":
        qt.scales.fill_(1)
        qt.zeros.copy_(torch.randint(0, 2, (n, 1)) * (2**bits - 1))
        weight = weight - qt.zeros.long()
    op = matrix(qt)
    q = torch.randint(-128, 128, (7, k), dtype=torch.int8)
    q[:3] = torch.tensor([[-128], [127], [-127]], dtype=torch.int8)
    exact = q.long() @ weight.T
    for m in (1, 2, 4, 7):
        y = run_row(op, q[:m], torch.ones(m), kernel)
        # fp32 holds the int32 sum rounded once; the step of the table is 1.
        assert torch.equal(y, exact[:m].float()), m


def long_format(zero: str | None, group: int | None, codec: str = "affine") -> Format:
    if codec == "affine":
        return Format(
            name="i", codec=codec, bits=8, scale="fp32", zero=zero, group=group, activation="int8"
        )
    table = torch.linspace(-128, 127, 16).round()
    return Format.lut(bits=4, table=table, group=group, scale="fp32", activation="int8")


# (K, group): up to where int32 holds a sum, and beyond; whole rows, ragged, of a prime number of chunks, and a prime.
LONG = (
    (65536, None), (65568, None), (65537, None), (131072, None), (140000, 70016), (300000, None),
    (140000, 65537), (200000, 65696), (200000, 98304),
)  # fmt: skip


@pytest.mark.parametrize(("k", "group"), LONG)
@pytest.mark.parametrize("zero", [None, "int", "float", "min"])
def test_long_groups(k: int, group: int | None, zero: str | None) -> None:
    """Extreme codes and activations whose sums int32 would not hold; int64 sums and the reference are the oracles."""
    for format in [long_format(zero, group)] + ([long_format(None, group, "lut")] * (not zero)):
        qt = random_weight(format, 3, k)
        codes = torch.randint(0, format.num_codes, (3, k), dtype=torch.uint8)
        codes[:2] = torch.tensor([[0], [format.num_codes - 1]], dtype=torch.uint8)
        qt.tensors["codes"] = torch.ops.lowbit.pack(codes, format.spec)
        qt.scales.copy_(torch.rand(qt.scales.shape) + 0.5)
        if zero == "int":
            qt.zeros[:] = torch.tensor([[255], [0], [100]])
        q = torch.randint(-128, 128, (7, k), dtype=torch.int8)
        q[0], q[1] = -128, 127
        weight = reference.dequantize(qt).double()
        op, exact = matrix(qt), q.double() @ weight.T
        bound = q.double().abs() @ weight.abs().T * 2**-21
        for m in (1, 2, 7):
            want = expected(qt, q[:m], torch.ones(m))
            assert ((want - exact[:m]).abs() <= bound[:m]).all()
            for kernel in KERNELS:
                if kernel["available"] and serves(format, kernel, k):
                    y = run_row(op, q[:m], torch.ones(m), kernel)
                    assert torch.equal(y, want), (kernel["name"], m)
        x = torch.randn(2, k)
        y = lowbit.linear(x, qt)
        assert torch.equal(y, reference.linear(x, qt)), format


def test_long_groups_with_scales_of_x() -> None:
    format = parse("int8_g70016_a8")
    qt = random_weight(format, 70, 140100)
    q, x_scales = int8.quantize(torch.randn(3, 140100), group=format.group)
    assert x_scales.shape == (3, 3)
    assert torch.equal(int8.linear(q, x_scales, qt), expected(qt, q, x_scales))


@pytest.mark.parametrize("name", ("int4_g64_a8", "q4_1_a8", "nf4_a8t"))
def test_group_scales_of_x(name: str) -> None:
    format = parse(name)
    qt = random_weight(format, 70, 300)
    op = matrix(qt)
    for m in (1, 3, 13):
        q, x_scales = int8.quantize(torch.randn(m, 300), group=format.group)
        want = expected(qt, q, x_scales)
        for kernel in KERNELS:
            if kernel["available"] and serves(format, kernel, 300):
                assert torch.equal(run_row(op, q, x_scales, kernel), want), kernel["name"]


@pytest.mark.parametrize("isa", ("scalar", "avx2", "avx512vnni"))
def test_requantization_saturates(isa: str) -> None:
    qt = random_weight(parse("int4_g32_a8"), 70, 96)
    op = matrix(qt)
    q = torch.randint(-128, 128, (9, 96), dtype=torch.int8)
    x_scales = torch.rand(9)
    kernels = [k for k in KERNELS if k["isa"] == isa and serves(qt.format, k, 96)]
    if not kernels[0]["available"]:
        pytest.skip(f"this CPU has no {isa}")
    want = reference.requantize(expected(qt, q, x_scales), 1.7)
    assert want.min() == -128
    assert want.max() == 127
    for kernel in kernels:
        assert torch.equal(run_row(op, q, x_scales, kernel, torch.int8, 1.7), want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_quantize_is_the_reference(dtype: torch.dtype) -> None:
    for k in (1, 15, 64, 300):
        x = torch.randn(9, k).to(dtype)
        x[3], x[4, 0], x[5, 0] = 0, torch.nan, torch.inf
        for group in (None, 32, 7):
            q, scales = int8.quantize(x, group)
            want, want_scales = reference.quantize_int8(x, group)
            assert torch.equal(q, want)
            torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)
        static = torch.rand(9) * 0.02 + 1e-3
        assert torch.equal(
            int8.quantize(x, scale=static)[0], reference.quantize_int8(x, None, static)[0]
        )
        q, scales = int8.quantize(x, scale=0.01)
        assert q.min() >= -127
        given = torch.full((9,), 0.01)
        given[4] = torch.nan  # as x there
        torch.testing.assert_close(scales, given, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", (layouts.CANONICAL, layouts.N16))
@pytest.mark.parametrize("name", ("int4_g32_a8", "nf4_a8t", "uint3_g20_a8"))
def test_linear_quantizes_x(name: str, layout: str) -> None:
    qt = random_weight(parse(name), 70, 96)
    w = layouts.to_operands(qt, layout)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2, 5, 96).to(dtype)
        assert torch.equal(lowbit.linear(x, w), reference.linear(x, qt))


def test_a_rounded_table_is_within_its_bound() -> None:
    for name in ("nf4_a8t", "kmeans6_a8t"):
        qt = random_weight(parse(name), 2, 64)
        table = torch.tensor(qt.format.values()) if qt.table is None else qt.table
        rounded, step = reference.table_int8(table, None)
        # The division and the product round once each.
        slack = 1 + 2**-20
        assert (rounded * step - table).abs().max() <= table.abs().max() / 254 * slack


def test_formats() -> None:
    assert parse("int4_g32_a8").activation == "int8"
    assert parse("nf4_a8t").activation == "int8_table"
    assert parse("fp4_a8").int8_step == 0.5
    assert parse(parse("nf4_g32_a8t").spec) == parse("nf4_g32_a8t")
    for name in ("nf4_a8", "kmeans4_a8", "e4m3_a8"):
        with pytest.raises(ValueError, match=f"'{name}': its table is not exact in int8.*_a8t"):
            parse(name)
    with pytest.raises(ValueError, match="integers"):
        parse("int4_a8t")
    with pytest.raises(ValueError, match="table_scope"):
        parse("kmeans4_pr_a8t")
    with pytest.raises(ValueError, match="twice"):
        parse("int4_a8_a8")


def test_bad_input() -> None:
    qt = random_weight(parse("int4_g32"), 70, 96)
    q, s = torch.zeros(3, 96, dtype=torch.int8), torch.ones(3)
    for arguments, error, message in (
        ((q.float(), s, qt), TypeError, "q must be int8, got torch.float32"),
        ((q[:, :95], s, qt), ValueError, r"q must have shape \(M, 96\), got \(3, 95\)"),
        ((q, s.double(), qt), TypeError, "x_scales must be float32"),
        ((q, s[:2], qt), ValueError, "x_scales must have shape"),
        ((q, s, qt, torch.ones(3)), ValueError, "bias must have shape"),
        ((q, s, qt, None, torch.int32), TypeError, "out_dtype must be"),
        ((q, s, qt, None, torch.int8), ValueError, "out_scale must be given"),
        ((q, s, qt, None, torch.int8, -1.0), ValueError, "out_scale must be positive"),
        ((q, s, random_weight(parse("nf4"), 70, 96)), ValueError, "not exact in int8"),
        ((q, torch.ones(3, 5), random_weight(parse("int4_g20"), 70, 96)), ValueError, "multiples of 32"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            int8.linear(*arguments)
    for arguments, error, message in (
        ((torch.zeros(3, dtype=torch.int32),), TypeError, "x must be float32"),
        ((torch.zeros(3),), ValueError, "x must have shape"),
        ((torch.zeros(3, 4), 0), ValueError, "group must be positive, got 0"),
        ((torch.zeros(3, 4), 2, 1.0), ValueError, "group must be None"),
        ((torch.zeros(3, 4), None, 0.0), ValueError, "scale must be positive"),
        ((torch.zeros(3, 4), None, torch.ones(2)), ValueError, "scale must have 1 or 3 elements"),
    ):
        with pytest.raises(error, match=message):
            int8.quantize(*arguments)


def test_gradients_pass_straight_through() -> None:
    qt = random_weight(parse("nf4_a8t"), 70, 64)
    x = torch.randn(3, 64, requires_grad=True)
    grad = torch.randn(3, 70)
    lowbit.linear(x, qt).backward(grad)
    assert torch.equal(x.grad, grad @ reference.dequantize(qt))


def test_module_keeps_its_activations_in_a_state_dict() -> None:
    linear = torch.nn.Linear(96, 70)
    layer = QuantLinear.from_linear(linear, "int4_g32_a8")
    other = QuantLinear(96, 70, format="int4_g32_a8")
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 96)
    assert torch.equal(other(x), layer(x))
    assert not torch.equal(layer(x), QuantLinear.from_linear(linear, "int4_g32")(x))
    # 4-bit weights differ from dense by far more than activations of 8 bits do.
    assert F.cosine_similarity(layer(x), linear(x)).min() > 0.98
    with pytest.raises(RuntimeError, match="format must be"):
        QuantLinear(96, 70, format="int4_g32").load_state_dict(layer.state_dict())


def test_opcheck_and_compile() -> None:
    w = matrix(random_weight(parse("int4_g32_a8"), 70, 96))
    x = torch.randn(3, 96)
    q, s = int8.quantize(x)
    torch.library.opcheck(torch.ops.lowbit.int8_quantize.default, (x, 32, None))
    torch.library.opcheck(torch.ops.lowbit.int8_quantize.default, (x, None, torch.ones(3)))
    for last in ((torch.bfloat16, None), (torch.int8, 0.5)):
        args = (q, s, *w, torch.randn(70), *last)
        torch.library.opcheck(torch.ops.lowbit.int8_linear.default, args)

    def f(x: torch.Tensor) -> torch.Tensor:
        return int8.linear(*int8.quantize(x), w)

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_rows_of_subnormal_numbers() -> None:
    """The inverse of the scale is at most the largest fp32: 0 stays 0 and nothing is NaN."""
    tiny = torch.tensor([1e-40, 0.0, -5e-41, 3e-45])
    x = torch.stack([tiny, -tiny, torch.tensor([1.0, -127.0, 0.0, 2.0]), torch.zeros(4)])
    top = torch.finfo(torch.float32).max
    inverse = (127 / x.double().abs().amax(1)).clamp(max=top)
    wanted = (x.double() * inverse[:, None]).round()
    for q, scales in (int8.quantize(x), reference.quantize_int8(x)):
        assert torch.equal(q.double(), wanted)
        assert bool(scales.isfinite().all())


@pytest.mark.parametrize("group", [16, 48, 20])
def test_scales_by_group_need_groups_of_whole_chunks(group: int) -> None:
    qt = random_weight(parse(f"int4_g{group}"), 8, 240)
    q = torch.ones(2, 240, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"multiples of 32, got {group}"):
        int8.linear(q, torch.ones(2, -(-240 // group)), qt)
