"""int8 activations with a scale for each block of a row: bit for bit the reference, which is near the real product."""

from __future__ import annotations

import pytest
import torch

import lowbit
from lowbit import _C, int8, layouts, reference
from lowbit.backends.cpu import activations
from lowbit.formats import parse
from lowbit.nn import QuantLinear, fuse
from lowbit.ops.terms import matrix
from weights import random_weight

KERNELS = [k for k in _C.kernels() if k["compute"] == "int8" and k["available"]]
# Blocks that are a group, several, a part of one, and longer than the row; zeros of each kind; groups of half a chunk,
# and those that only the kernel for any group takes.
NAMES = (
    "int4_g32_a8b32", "int4_g128_a8b32", "int4_g32_a8b128", "int4_g32_a8b4096", "int8_row_a8b32", "int8_row_a8b7",
    "uint4_g64_a8b128", "uint3_g96_a8b32", "uint2_zfloat_a8b16", "q4_1_a8b32", "q4_1_a8b256", "q6_k_a8b32",
    "q4_k_a8b32", "q2_k_a8b16", "km4_g16_a8tb32", "nvfp4_a8b32", "int4_g20_a8b100", "int4_g20_a8b5", "nf4_a8tb32",
    "kmeans3_a8tb128", "ternary_a8b32", "binary_a8b64",
)  # fmt: skip
SHAPES = ((70, 96), (66, 408), (1, 33), (130, 1))
ROWS = (197, 13, 1, 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float32, torch.float16)


def serves(format, kernel, k):
    """What a group and a block have in common is a whole number of chunks, or half a chunk, or the row."""
    part = min(format.group or k, format.activation_group)
    chunks = part % kernel["group_multiple"] == 0 or (part == 16 and kernel["half_groups"])
    codec = "int" if format.codec == "affine" else "lut"
    return (kernel["bits"], kernel["codec"]) == (format.bits, codec) and (part >= k or chunks)


def real_product(x, qt):
    """x rounded in blocks of the format, times the weight, in float64; and x so rounded."""
    rounded = x.double().clone()
    for piece in rounded.split(qt.format.activation_group, dim=1):
        step = piece.abs().amax(1, keepdim=True) / 127
        piece.copy_(torch.where(step > 0, (piece / step).round() * step, 0.0))
    return rounded @ reference.dequantize(qt).double().T, rounded


@pytest.mark.parametrize("name", NAMES)
def test_linear_is_the_reference_bit_for_bit(name):
    format = parse(name)
    _C.take_kernels_run()
    for (n, k), m, dtype in zip(SHAPES, ROWS, DTYPES, strict=True):
        qt = random_weight(format, n, k)
        bias = torch.randn(n)
        x = torch.randn(m, k + 3).to(dtype)[:, :k]
        want = reference.linear(x, qt, bias)
        for layout in (layouts.N16, layouts.CANONICAL):
            y = lowbit.linear(x, layouts.to_operands(qt, layout), bias)
            assert torch.equal(y, want), (n, k, m, layout)
    assert any("_i8_" in kernel for kernel in _C.take_kernels_run())


def test_outliers_multiply_x_as_it_is():
    qt = random_weight(parse("int4_g32_o3_a8b32"), 70, 96)
    x = torch.randn(5, 96)
    plain = qt.matrix
    rest = reference.outlier_product(x.double(), qt.outlier_columns, qt.outlier_values)
    # Three products in fp32.
    torch.testing.assert_close(
        lowbit.linear(x, qt), lowbit.linear(x, plain) + rest.float(), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_that_serves_it(name):
    """Also the kernels that are not chosen, with x that is quantized before."""
    format, ran = parse(name), 0
    for n, k in SHAPES[:2]:
        qt = random_weight(format, n, k)
        w = matrix(qt)
        zeros = reference.effective_zeros(qt)
        for m in (1, 4, 9):
            q, scales = int8.quantize(torch.randn(m, k), format.activation_group)
            want = reference.int8_linear(
                q, scales, qt.unpack(), format, reference.effective_scales(qt), zeros, qt.table
            )
            assert torch.equal(int8.linear(q, scales, qt), want)
            for kernel in KERNELS:
                if serves(format, kernel, k):
                    y = activations.int8_linear(
                        q, scales, w, None, torch.float32, None, kernel["index"]
                    )
                    assert torch.equal(y, want), (kernel["name"], n, k, m)
                    ran += 1
    assert ran


@pytest.mark.parametrize("name", ["int4_g128_a8b32", "q4_1_a8b64", "uint3_g96_a8b32", "km4_a8tb32"])
def test_reference_is_near_the_product_of_what_is_rounded(name):
    """An oracle without groups, parts or integers. A value of x whose code is nearly half between two may go either way
    in fp32, and then moves by a step.
    """
    qt = random_weight(parse(name), 40, 300)
    if qt.format.activation == "int8_table":  # its values as the kernels have them
        table, step = reference.table_int8(qt.table, None)
        qt.tensors["table"] = table * step
    x = torch.randn(5, 300)
    want, rounded = real_product(x, qt)
    q, scales = reference.quantize_int8(x, qt.format.activation_group)
    columns = torch.arange(300) // qt.format.activation_group
    assert (q * scales[:, columns] - rounded).abs().max() < 1e-6
    y = reference.linear(x, qt)
    size = rounded.abs() @ reference.dequantize(qt).double().abs().T
    # A part's sum is rounded, scaled twice and added: 4 roundings a part, and those of scales and step. Zeros that are
    # taken away are larger than what is left, by less than 2^bits.
    assert ((y - want).abs() <= 40 * 2**-24 * size * 16).all()


def test_blocks_are_nearer_than_rows():
    """Of x with a channel far above the others, which takes the steps of its whole row."""
    x, w = torch.randn(6, 512), torch.randn(50, 512)
    x[:, 7] = 100
    errors = []
    for name in ("int8_g32_a8", "int8_g32_a8b256", "int8_g32_a8b32"):
        qt = lowbit.quantize(w, name)
        exact = x.double() @ lowbit.dequantize(qt).double().T
        errors.append((lowbit.linear(x, qt) - exact).norm())
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.5 * errors[1]


def test_what_is_not_finite_stays_in_its_row():
    qt = random_weight(parse("int4_g32_a8b32"), 70, 96)
    x = torch.randn(4, 96)
    want = lowbit.linear(x, qt)
    x[1, 40], x[2, 0] = torch.nan, torch.inf
    y = lowbit.linear(x, qt)
    assert torch.equal(y[[0, 3]], want[[0, 3]])
    assert not y[1:3].isfinite().any()
    assert torch.equal(y.isnan(), reference.linear(x, qt).isnan())


def test_fused_products_and_what_follows_them():
    """Weights whose blocks differ must not share what one of them made of x."""
    names = (
        "int4_g32_a8",
        "int4_g32_a8b32",
        "int4_g128_a8b32",
        "int8_row_a8b32",
        "nf4_a8tb32",
        "int4",
    )
    weights = [random_weight(parse(name), 70 + i, 256, seed=i) for i, name in enumerate(names)]
    for m in (1, 5):
        x = torch.randn(m, 256)
        for y, qt in zip(lowbit.linear_many(x, weights), weights, strict=True):
            assert torch.equal(y, lowbit.linear(x, qt))
        gate, residual = torch.randn(m, 71), torch.randn(m, 71)
        y = lowbit.linear(x, weights[1], activation="silu", gate=gate, residual=residual)
        plain = reference.apply_epilogue(lowbit.linear(x, weights[1]), "silu", gate, residual)
        torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)
    module = torch.nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(module, name, QuantLinear(256, 64, format="int4_g32_a8b32"))
        getattr(module, name).load_state_dict(
            QuantLinear.from_linear(torch.nn.Linear(256, 64), "int4_g32_a8b32").state_dict()
        )
    x = torch.randn(3, 256)
    apart = [module.q_proj(x), module.k_proj(x), module.v_proj(x)]
    assert fuse(module) == 1
    for y, layer in zip(apart, (module.q_proj, module.k_proj, module.v_proj), strict=True):
        assert torch.equal(layer(x), y)
    module.k_proj.set_activations(None)
    exact = lowbit.linear(x, module.k_proj.quant_tensor(), module.k_proj.bias)
    assert module.q_proj(x) is not None
    assert torch.equal(module.k_proj(x), exact)


def test_one_static_scale_takes_the_place_of_all_blocks():
    for name in ("int4_g48_a8b16", "int4_g32_a8b32", "int8_row_a8b32"):
        layer = QuantLinear.from_linear(torch.nn.Linear(240, 70), name)
        layer.set_input_scale(0.03)
        x = torch.randn(5, 240)
        qt = layer.quant_tensor()
        q, scales = int8.quantize(x, scale=0.03)
        terms = (reference.effective_scales(qt), None, None)
        want = reference.int8_linear(q, scales, qt.unpack(), qt.format, *terms, layer.bias)
        assert torch.equal(layer(x), want)


def test_gradients_compile_and_explain():
    qt = random_weight(parse("int4_g64_a8b32"), 70, 128)
    x = torch.randn(3, 128, requires_grad=True)
    grad = torch.randn(3, 70)
    lowbit.linear(x, qt).backward(grad)
    assert torch.equal(x.grad, grad @ reference.dequantize(qt))
    w, x = matrix(qt), x.detach()
    q, scales = int8.quantize(x, 32)
    args = (q, scales, *w, torch.randn(70), torch.bfloat16, None)
    torch.library.opcheck(torch.ops.lowbit.int8_linear.default, args)
    run = torch.compile(lambda x: lowbit.linear(x, qt), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(x), lowbit.linear(x, qt))
    for m, block in ((1, 32), (1, 20), (64, 32)):
        weight = random_weight(parse(f"int4_g640_a8b{block}"), 70, 640)
        found = lowbit.explain(torch.empty(m, 640), weight)
        _C.take_kernels_run()
        lowbit.linear(torch.randn(m, 640), weight)
        assert _C.take_kernels_run() == [found.selected]
        reasons = {k.name: k.reason for k in found.kernels if "_i8_int4_" in k.name}
        whole_chunks = block % 32 == 0
        assert (
            any(reason is None for name, reason in reasons.items() if name.startswith("gemv"))
            == whole_chunks
        )
        assert any("multiple" in (reason or "") for reason in reasons.values()) != whole_chunks


def test_bad_input():
    qt = random_weight(parse("int4_g64_a8b32"), 70, 128)
    q = torch.zeros(3, 128, dtype=torch.int8)
    with pytest.raises(
        ValueError, match=r"x_scales must have shape \(3,\) or \(3, 4\).*got \(3, 2\)"
    ):
        int8.linear(q, torch.ones(3, 2), qt)
    weight = {"n": 64, "k": 256, "bits": 4, "group": 64, "int8_x": True}
    for x_group in (-1, 48, 96):
        with pytest.raises(ValueError, match=f"x_group must be 0, or divide.*got {x_group}"):
            _C.Weight(**weight, x_group=x_group)
    for x_group in (0, 16, 64, 128, 256, 1000):
        _C.Weight(**weight, x_group=x_group)
