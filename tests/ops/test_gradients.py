"""Gradients of linear_trainable against torch's autograd through the formula of formats.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lowbit
from lowbit import layouts, reference
from lowbit.formats import Format, parse
from lowbit.layouts import CANONICAL, N16
from lowbit.layouts.base import CODE_DTYPES
from lowbit.ops.linear import call_linear
from lowbit.ops.terms import matrix
from lowbit.weights.quantized import QuantTensor
from weights import ALL_FORMATS, random_weight

LAYOUTS = (CANONICAL, N16)
FORMATS = (
    *(parse(s) for s in ("nf4", "int4_g32", "uint3_g32", "uint4_zfloat_g20", "q5_1", "e4m3")),
    *(parse(s) for s in ("kmeans2_g32", "kmeans3_pr", "mxfp4", "nvfp4", "q4_k", "ternary_trits")),
    *(f for f in ALL_FORMATS if f.fitted and ("tables" in f.name or f.table_scope == "pair")),
)


def leaves_of(qt: QuantTensor) -> dict[str, torch.Tensor]:
    """Canonical fp64 scales, float zeros and table of a weight, as leaves; scales that are codes are none."""
    learnable = qt.format.scale not in CODE_DTYPES
    scales = reference.effective_scales(qt) if learnable else None
    found = {"scales": scales, "zeros": qt.zeros, "table": qt.table}
    return {
        name: t.double().requires_grad_()
        for name, t in found.items()
        if t is not None and t.is_floating_point()
    }


def dense_weight(qt: QuantTensor, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    """W = scale * (T - zero) or scale * T + zero, differentiable in the leaves."""
    f, (n, k) = qt.format, qt.shape
    codes, group = qt.unpack().long(), reference.group_index(qt.format, k, qt.device)
    if "table" not in leaves:
        w = torch.tensor(f.values(), dtype=torch.float64)[codes]
    elif f.table_scope == "tensor":
        w = leaves["table"][codes]
    elif f.table_scope == "pair":
        w = leaves["table"][reference.chosen_tables(qt.scales, f)[:, group], codes]
    else:
        table = leaves["table"].view(n, -1, 2**f.bits)
        w = table[torch.arange(n)[:, None], group if f.table_scope == "group" else 0, codes]
    zeros = leaves.get("zeros", reference.effective_zeros(qt))
    scales = leaves.get("scales", reference.effective_scales(qt))
    if zeros is not None and f.zero != "min":
        w = w - zeros[:, group]
    if scales is not None:
        w = w * scales[:, group]
    return w + zeros[:, group] if f.zero == "min" else w


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_every_gradient_equals_autograds(format: Format, layout: str) -> None:
    qt = random_weight(format, 70, 96)
    leaves = leaves_of(qt)
    x = torch.randn(2, 3, 96)
    bias = torch.randn(70)
    out_grad = torch.randn(2, 3, 70)

    xd, bd = x.double().requires_grad_(), bias.double().requires_grad_()
    F.linear(xd, dense_weight(qt, leaves), bd).backward(out_grad.double())

    weight = layouts.to_kernel(qt, layout)
    w = weight.operands
    fp32 = {
        name: getattr(w, name).float().requires_grad_()
        for name in leaves
        if name != "scales" or not weight.second
    }
    x.requires_grad_()
    bias.requires_grad_()
    lowbit.linear(x, w._replace(**fp32), bias).backward(out_grad)

    lanes = layout == N16
    expected = {
        name: t.grad
        if not lanes
        else layouts.find(layout).pack_table(t.grad, format)
        if name == "table"
        else layouts.find(layout).from_rows(t.grad)
        for name, t in leaves.items()
    }
    found = {"x": (x.grad, xd.grad), "bias": (bias.grad, bd.grad)}
    found |= {name: (t.grad, expected[name]) for name, t in fp32.items()}
    for name, (ours, theirs) in found.items():
        # Sums of at most 6 * 96 * 70 fp32 products, each rounded once, in some order of some depth: far below 2^-14
        # of the largest element. A wrong member, sign or group is off by its whole size.
        bound = 2**-14 * float(theirs.abs().max())
        assert float((ours - theirs).abs().max()) <= bound, name


def test_padded_lanes_have_no_gradient() -> None:
    w = matrix(random_weight(parse("int4_g32_fp32"), 70, 96))
    scales = w.scales.clone().requires_grad_()
    lowbit.linear(torch.ones(1, 96), w._replace(scales=scales)).sum().backward()
    assert bool((scales.grad[-1, :, 70 - 64 :] == 0).all())
    assert bool((scales.grad[-1, :, : 70 - 64] != 0).any())


def test_only_what_is_wanted_is_computed() -> None:
    w = matrix(random_weight(parse("kmeans3_g32"), 70, 96))
    x = torch.randn(3, 96, requires_grad=True)
    table = w.table.clone().requires_grad_()
    (grad,) = torch.autograd.grad(lowbit.linear(x, w).sum(), x)
    # A sum of 70 fp32 numbers in another order.
    expected = lowbit.dequantize(w).sum(0).expand(3, 96)
    bound = 70 * 2**-23 * float(lowbit.dequantize(w).abs().sum(0).max())
    assert float((grad - expected).abs().max()) <= bound
    (grad,) = torch.autograd.grad(lowbit.linear(x.detach(), w._replace(table=table)).sum(), table)
    assert grad.shape == table.shape


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_gradient_of_x_is_that_of_a_dense_layer(dtype: torch.dtype) -> None:
    """The weight is rounded to the dtype of x, as a dense layer of this dtype holds it: the same product."""
    qt = random_weight(parse("nf4"), 70, 128)
    x = torch.randn(3, 128).to(dtype).requires_grad_()
    out_grad = torch.randn(3, 70).to(dtype)
    (ours,) = torch.autograd.grad(lowbit.linear(x, qt), x, out_grad)
    (dense,) = torch.autograd.grad(F.linear(x, qt.dequantize(dtype)), x, out_grad)
    assert ours.dtype == dtype
    assert torch.equal(ours, dense)


def test_compiled_backward() -> None:
    w = matrix(random_weight(parse("kmeans3_g32_fp32"), 70, 96))
    x = torch.randn(4, 96)

    def gradients(f) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, w.scales, w.table)]
        return list(torch.autograd.grad(f(*leaves), leaves))

    def loss(x: torch.Tensor, scales: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        y = call_linear(x, w._replace(scales=scales, table=table))
        return y.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(gradients(compiled), gradients(loss), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("op", ("linear", "dequantize", "embedding"))
def test_inference_ops_refuse_gradients(op: str) -> None:
    w = matrix(random_weight(parse("nf4"), 70, 96))
    scales = w.scales.clone().requires_grad_()
    w = w._replace(scales=scales)
    args = {
        "linear": (torch.randn(1, 96), *w, None),
        "dequantize": (*w, torch.float32),
        "embedding": (torch.tensor([1]), *w, torch.float32),
    }[op]
    call = getattr(torch.ops.lowbit, op)
    with pytest.raises(ValueError, match=f"lowbit::{op} has no gradients"):
        call(*args)
    with pytest.raises(Exception, match=f"lowbit::{op} has no gradients"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(*args)
    with torch.no_grad():
        assert not call(*args).requires_grad


@pytest.mark.parametrize(
    ("name", "operand", "message"),
    (
        ("int4_g32", "table", "fixed by its codec 'affine'"),
        ("nf4", "zeros", "no floating-point zeros"),
        ("uint4_g32", "zeros", "no floating-point zeros"),
    ),
)
def test_what_has_no_gradient(name: str, operand: str, message: str) -> None:
    w = matrix(random_weight(parse(name), 70, 96))
    wanted = [operand == t for t in ("scales", "zeros", "table")]
    with pytest.raises(ValueError, match=message):
        torch.ops.lowbit.codebook_grad(torch.zeros(70, 96), *w, wanted)


def test_shape_of_the_weights_gradient() -> None:
    w = matrix(random_weight(parse("nf4"), 70, 96))
    with pytest.raises(ValueError, match=r"grad_weight must be float32 of shape \(70, 96\)"):
        torch.ops.lowbit.codebook_grad(torch.zeros(96, 70), *w, [True, False, False])


@pytest.mark.parametrize("compiled", (False, True))
def test_backward_inside_autocast(compiled: bool) -> None:
    """The gradient of the table is summed in fp32 whatever autocast says."""
    w = matrix(random_weight(parse("kmeans3_g32"), 70, 96))
    x, out_grad = torch.randn(4, 96), torch.randn(4, 70).bfloat16()

    def product(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return call_linear(x, w._replace(table=table))

    f = torch.compile(product, fullgraph=True, backend="aot_eager") if compiled else product
    found = []
    for inside in (True, False):
        table = w.table.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = f(x, table)
            if inside:
                y.backward(out_grad)
        if not inside:
            product(x.bfloat16(), table).backward(out_grad)
        found.append(table.grad)
    assert torch.equal(*found)
