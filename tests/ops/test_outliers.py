"""Outliers: W = Q + S with a sparse S. What is multiplied, saved and refused."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import normal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lowbit
from lowbit import _C, int8, layouts, reference
from lowbit.backends import pytorch
from lowbit.backends.cpu.sparse import sparse_linear
from lowbit.backends.pytorch import PYTORCH
from lowbit.decoder.bound import bind_linear
from lowbit.formats import Format, parse
from lowbit.layouts import CANONICAL, K16, N16
from lowbit.nn import QuantEmbedding, QuantLinear, fuse
from lowbit.ops.terms import kernel_weight
from lowbit.ops.weights import embedding
from lowbit.weights.quantized import QuantTensor
from lowbit.weights.sparse import SparseTerm
from weights import random_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One format for every operand that can be present or absent, both dtypes of outliers.
NAMES = ("int4_g32_o3", "uint3_o5fp32", "uint4_zfloat_o1", "q5_1_o2", "nvfp4_o4", "nf4_g64_dq8_o8")
FORMATS = (
    *map(parse, NAMES),
    Format.lut(bits=3, group=32, table_scope="group", outliers=6),
    parse("kmeans3_pr_o96"),
)
BY_FORMAT = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)


def sparse_of(qt: QuantTensor) -> torch.Tensor:
    """S as a matrix, entry by entry, fp64."""
    made = torch.zeros(qt.shape, dtype=torch.float64)
    for n, (columns, values) in enumerate(
        zip(qt.outlier_columns.tolist(), qt.outlier_values.tolist(), strict=True)
    ):
        for column, value in zip(columns, values, strict=True):
            made[n, column] = value
    return made


# Formats


def test_names_and_specs() -> None:
    f = parse("int3_g64_o16")
    assert (f.bits, f.group, f.outliers, f.outlier_dtype) == (3, 64, 16, "fp16")
    assert f.matrix == parse("int3_g64")
    assert parse("nf4_o4fp32_bf16").outlier_dtype == "fp32"
    assert parse("nf4_o4fp32_bf16").matrix.spec == "nf4_bf16"
    own = Format.lut(bits=3, table=(0, 1, -1), outliers=2)
    assert own.name == "lut3_g64_o2"
    for g in (f, own, dataclasses.replace(own, outlier_dtype="fp32")):
        assert parse(g.spec) == g
        assert parse(g.matrix.spec) == dataclasses.replace(
            g, name=g.matrix.name, outliers=0, outlier_dtype="fp16"
        )
    assert parse("int4_o0").matrix is parse("int4_o0")


@pytest.mark.parametrize("change", ({"outliers": -1}, {"outliers": 1.0}, {"outlier_dtype": "bf16"}))
def test_bad_formats(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(parse("int4"), **change)
    with pytest.raises(ValueError, match="outliers twice"):
        parse("int4_o3_o4")


def test_bytes_are_counted() -> None:
    qt = random_weight(parse("int4_g32_o3"), 70, 96)
    assert qt.nbytes == qt.matrix.nbytes + 70 * 3 * (4 + 2)
    assert qt.bits_per_weight == 8 * qt.nbytes / (70 * 96)


# Products


@BY_FORMAT
@pytest.mark.parametrize("layout", (CANONICAL, N16))
def test_identity_returns_the_weight(format: Format, layout: str) -> None:
    """Q + S in fp32, rounded once: no tolerance."""
    for n, k in ((70, 96), (1, 33), (65, 7)):
        qt = random_weight(format, n, k)
        # Each of them is one fp32 number, so fp64 holds the sum before it is rounded.
        dense = reference.dequantize(qt.matrix).double() + sparse_of(qt)
        expected = dense.float()
        assert torch.equal(reference.dequantize(qt), expected)
        w = layouts.to_kernel(qt, layout)
        assert torch.equal(lowbit.linear(torch.eye(k), w).T, expected)
        for dtype in DTYPES:
            assert torch.equal(lowbit.dequantize(w, dtype), expected.to(dtype))
            indices = torch.arange(n).flip(0).view(1, n)
            assert torch.equal(embedding(indices.int(), w, dtype)[0].flip(0), expected.to(dtype))


def test_identity_in_bf16_rounds_once() -> None:
    """Integers are exact in bf16, so nothing but the sum Q + S is rounded to it."""
    qt = lowbit.quantize(normal(70, 96), "int4_g32_o5")
    for dtype in DTYPES:
        y = lowbit.linear(torch.eye(96, dtype=dtype), qt)
        assert torch.equal(y.T, qt.dequantize(dtype)), dtype


def assert_close(y: torch.Tensor, x: torch.Tensor, qt: QuantTensor, exact: torch.Tensor) -> None:
    """Products and sums of both parts are fp32: 2 (K + P) roundings of 2^-24 of sum |x| (|Q'| + |S|), where |Q'|
    counts code and zero apart; the table may be rounded to bf16, which moves an entry by 2^-9. y is rounded once.
    """
    codes = reference.values_of(qt).abs()
    zeros = None if qt.zeros is None else -reference.effective_zeros(qt).abs()
    scales = reference.effective_scales(qt)
    if qt.format.zero == "min":
        zeros = -zeros
    size = reference.apply_scales(codes, qt.format, None if scales is None else scales.abs(), zeros)
    table = 2**-9 if not qt.format.exact_in_bf16 and x.dtype == torch.bfloat16 else 0
    eps = 2 * (x.shape[-1] + 2) * 2**-24 + table
    bound = eps * F.linear(x.double().abs(), size.double() + sparse_of(qt).abs())
    bound = bound + torch.finfo(y.dtype).eps * exact.abs() + torch.finfo(y.dtype).tiny
    assert bool(((y.double() - exact).abs() <= bound).all())


@BY_FORMAT
def test_random_x(format: Format) -> None:
    qt = random_weight(format, 70, 33)
    weight = reference.dequantize(qt.matrix).double() + sparse_of(qt)
    bias = torch.randn(70)
    # Below, at and above a tile of 16 rows.
    for shape in ((33,), (2, 2, 33), (5, 33), (17, 33), (0, 33)):
        for dtype in DTYPES:
            x = torch.randn(shape).to(dtype)
            y = lowbit.linear(x, qt, bias)
            assert y.shape == (*shape[:-1], 70)
            assert y.dtype == dtype
            assert_close(y, x, qt, F.linear(x.double(), weight, bias.double()))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 40), st.integers(0, 70), st.integers(1, 90), st.integers(0, 90),
    st.sampled_from(DTYPES), st.sampled_from((torch.float16, torch.float32)),
    st.sampled_from([isa for isa in _C.isa_active() if isa in ("scalar", "avx2", "avx512")]),
)  # fmt: skip
def test_the_sparse_kernel_is_exact_on_integers(m, n, k, count, dtype, values_dtype, isa) -> None:
    """Small integers: every sum is exact in fp32. Any number of entries, tiles and threads."""
    count = min(count, k)
    columns = torch.rand(n, k).argsort(1)[:, :count].sort(1).values.int()
    values = torch.randint(-8, 9, (n, count)).to(values_dtype)
    x = torch.randint(-8, 9, (m, k + 3)).to(dtype)[:, 3:]
    expected = x.double() @ torch.zeros(n, k).double().scatter(1, columns.long(), values.double()).T
    term = SparseTerm(columns, values)
    assert torch.equal(sparse_linear(x, term, isa).double(), expected)
    plain = PYTORCH.sparse_linear(x, term)
    assert torch.equal(plain.double(), expected)


def test_rows_of_more_entries_than_are_converted_at_a_time() -> None:
    k = 2500
    qt = random_weight(parse("int4_o2100"), 5, k)
    x = torch.randint(-2, 3, (18, k))
    values = torch.randint(-4, 5, (5, 2100)).half()
    expected = (
        x.double()
        @ torch.zeros(5, k).double().scatter(1, qt.outlier_columns.long(), values.double()).T
    )
    for m in (2, 18):
        y = sparse_linear(x[:m].float(), SparseTerm(qt.outlier_columns, values))
        assert torch.equal(y.double(), expected[:m])


def test_int8_activations_leave_outliers_as_they_are() -> None:
    """The product of the rest is the exact int8 one, and S multiplies x as it is given."""
    qt = lowbit.quantize(normal(70, 96), "int4_g32_a8_o5")
    x = torch.randn(4, 96)
    q, scales = int8.quantize(x)
    rest = int8.linear(q, scales, qt.matrix)
    y = lowbit.linear(x, qt)
    # Two fp32 sums: of P products, and of both parts.
    size = F.linear(x.abs().double(), sparse_of(qt).abs())
    exact = rest.double() + x.double() @ sparse_of(qt).T
    assert bool(((y - exact).abs() <= 7 * 2**-24 * size + 2**-23 * exact.abs()).all())
    assert bool(((y - reference.linear(x, qt)).abs() <= 7 * 2**-24 * size + 2**-23 * exact.abs()).all())  # fmt: skip


def test_epilogue_is_fp32_before_the_one_rounding() -> None:
    qt = lowbit.quantize(normal(70, 96), "int4_g32_o5")
    bias = torch.randn(70)
    for m in (1, 20):
        x = torch.randn(m, 96).bfloat16()
        gate, residual = (torch.randn(m, 70).bfloat16() for _ in range(2))
        y = lowbit.linear(x.float(), qt, bias)
        for case in (("silu", None, residual), ("gelu", gate, residual), (None, gate, residual)):
            arguments = dict(zip(("activation", "gate", "residual"), case, strict=True))
            exact = reference.apply_epilogue(y, *case)
            got = lowbit.linear(x, qt, bias, **arguments)
            assert got.dtype == torch.bfloat16
            # Half a unit in the last place of bf16, and fp32 sums in another order.
            assert bool(((got.float() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all())
        got = lowbit.linear(x, qt, bias, residual=residual)
        assert bool(((got - y - residual).abs() <= 2**-8 * (y + residual).abs() + 1e-4).all())


def test_many_and_bound_products() -> None:
    plain = lowbit.quantize(normal(64, 96), "int4_g32")
    sparse = lowbit.quantize(normal(70, 96, 1), "int4_g32_o5")
    x = torch.randn(3, 96)
    for y, qt in zip(lowbit.linear_many(x, [plain, sparse]), (plain, sparse), strict=True):
        assert torch.equal(y, lowbit.linear(x, qt))
    out = torch.empty(3, 70)
    bind_linear(x, kernel_weight(sparse), out)()
    assert torch.equal(out, lowbit.linear(x, sparse))


def test_explain(caplog: pytest.LogCaptureFixture) -> None:
    qt = lowbit.quantize(normal(70, 96), "int4_g32_o5")
    found = lowbit.explain(torch.randn(1, 96), qt)
    assert found.selected in {row["name"] for row in _C.kernels()}
    isa = [name for name in _C.isa_active() if name in ("scalar", "avx2", "avx512")][-1]
    assert f"outliers: 5 a row in fp16, outliers_{isa}" in str(found)
    assert lowbit.explain(torch.randn(1, 96), qt.matrix).outliers is None
    pytorch._log_sparse_once.cache_clear()
    with caplog.at_level(logging.INFO, "lowbit"):
        for _ in range(2):
            PYTORCH.sparse_linear(torch.randn(1, 96), kernel_weight(qt).sparse)
    assert caplog.text.count("plain torch multiplies the outliers") == 1


def test_triton_layout() -> None:
    pytest.importorskip("triton")
    qt = lowbit.quantize(normal(33, 64), "int4_g32_o5")
    w = layouts.to_kernel(qt, K16)
    assert torch.equal(lowbit.linear(torch.eye(64), w).T, qt.dequantize())
    assert torch.equal(lowbit.dequantize(w), qt.dequantize())
    assert "5 a row in fp16, outliers_" in str(lowbit.explain(torch.randn(1, 64), w))
    assert all(
        torch.equal(a, b)
        for a, b in zip(layouts.from_kernel(w).tensors.values(), qt.tensors.values(), strict=True)
    )


# torch's machinery


def test_opcheck() -> None:
    w = kernel_weight(random_weight(parse("kmeans3_g32_fp32_o4"), 70, 96))
    x, gate, added = torch.randn(2, 3, 96), torch.randn(2, 3, 70), torch.randn(2, 3, 70)
    epilogue = (x, *w.operands, torch.randn(70), gate, None, added, "silu")
    torch.library.opcheck(torch.ops.lowbit.linear_epilogue.default, epilogue)
    for leaf in (x, x.clone().requires_grad_()):
        torch.library.opcheck(torch.ops.lowbit.sparse_linear.default, (leaf, *w.sparse))


def test_gradients_equal_those_of_the_dense_layer() -> None:
    qt = random_weight(parse("kmeans3_g32_o4"), 70, 96)
    x, bias = torch.randn(2, 3, 96, requires_grad=True), torch.randn(70, requires_grad=True)
    out = torch.randn(2, 3, 70)
    lowbit.linear(x, qt, bias).backward(out)
    xd, bd = (t.detach().double().requires_grad_() for t in (x, bias))
    F.linear(xd, qt.dequantize().double(), bd).backward(out.double())
    torch.testing.assert_close(x.grad.double(), xd.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(bias.grad.double(), bd.grad, rtol=1e-5, atol=1e-5)
    # Scales see the gradient of the whole weight.
    layer = QuantLinear.from_quant_tensor(qt)
    plain = QuantLinear.from_quant_tensor(qt.matrix)
    for each in (layer, plain):
        each.train_parameters(["scales"])
        each(x.detach()).backward(out)
    assert torch.equal(layer.scales.grad, plain.scales.grad)


def test_compiles_as_one_graph() -> None:
    layer = QuantLinear.from_linear(nn.Linear(96, 70), "int4_g32_o4")
    x = torch.randn(3, 96)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    qt = layer.quant_tensor()
    w = kernel_weight(qt)

    def call(x: torch.Tensor) -> torch.Tensor:
        return lowbit.linear(x, w, activation="relu")

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
    grads = []
    for each in (layer, compiled):
        leaf = x.clone().requires_grad_()
        each(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


# Modules and files


def test_modules_keep_outliers() -> None:
    linear = nn.Linear(96, 70)
    layer = QuantLinear.from_linear(linear, "uint3_g32_o4")
    qt = lowbit.quantize(linear.weight.detach(), "uint3_g32_o4")
    x = torch.randn(3, 96)
    assert torch.equal(layer(x), lowbit.linear(x, qt, linear.bias))
    empty = QuantLinear(96, 70, format="uint3_g32_o4")
    empty.quant_tensor().validate()
    empty.load_state_dict(layer.state_dict())
    meta = QuantLinear(96, 70, format="uint3_g32_o4", device="meta")
    meta.load_state_dict(layer.state_dict(), assign=True)
    moved = copy.deepcopy(layer).half()
    tied = QuantLinear.tied_to(layer, linear.bias)
    for other in (empty, meta, moved, tied):
        assert other.quant_tensor().tensors.keys() == qt.tensors.keys()
        for name, t in other.quant_tensor().tensors.items():
            assert torch.equal(t, qt.tensors[name]), name
            assert t.dtype == qt.tensors[name].dtype
    embedding = QuantEmbedding.from_embedding(nn.Embedding(70, 96), "int4_g32_o4")
    indices = torch.tensor([[3, 69], [0, 3]])
    assert torch.equal(embedding(indices), embedding.quant_tensor().dequantize()[indices])


def test_siblings_with_outliers_are_not_fused() -> None:
    class Block(nn.Module):
        def __init__(self, *formats: str) -> None:
            super().__init__()
            for name, f in zip(("gate_proj", "up_proj"), formats, strict=True):
                setattr(self, name, QuantLinear.from_linear(nn.Linear(96, 64), f))

    assert fuse(Block("int4_g32", "int4_g32")) == 1
    assert fuse(Block("int4_g32", "int4_g32_o2")) == 0


def test_save_and_load_bit_for_bit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(96, 70), nn.ReLU(), nn.Linear(70, 5))
    dense = copy.deepcopy(model)
    report = lowbit.quantize_model(model, {"0": "int3_g32_o4", "2": "nf4_o3fp32"}, progress=False)
    assert report.nbytes == sum(model[i].quant_tensor().nbytes for i in (0, 2))
    x = torch.randn(4, 96)
    loaded = lowbit.load(dense, lowbit.save(model, tmp_path))
    assert torch.equal(loaded(x), model(x))
    for i in (0, 2):
        a, b = model[i].quant_tensor(), loaded[i].quant_tensor()
        assert a.format == b.format
        assert all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())


@pytest.mark.parametrize("columns", ([0, 96], [-1, 5], [5, 5], [7, 3]))
def test_bad_columns_in_a_file(columns: list[int], tmp_path: Path) -> None:
    qt = lowbit.quantize(normal(4, 96), "int4_g32_o2")
    path = lowbit.save({"w": qt}, tmp_path)
    tensors = load_file(path)
    tensors["w.outlier_columns"][2] = torch.tensor(columns, dtype=torch.int32)
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"layer 'w'.*outlier_columns must be ascending"):
        lowbit.load(nn.ModuleDict({"w": nn.Linear(96, 4, bias=False)}), path)
    bad = {**qt.tensors, "outlier_columns": tensors["w.outlier_columns"]}
    with pytest.raises(ValueError, match="outlier_columns must be ascending"):
        lowbit.linear(torch.randn(1, 96), QuantTensor(qt.format, qt.shape, bad))


def test_bad_input_of_the_ops() -> None:
    qt = lowbit.quantize(normal(64, 96), "int4_g32_o2")
    w = kernel_weight(qt)
    x = torch.randn(1, 96)
    with pytest.raises(ValueError, match="'int4_g32_o2' has outliers: operands are those of"):
        torch.ops.lowbit.linear(x, *w.operands._replace(spec="int4_g32_o2"), None)
    with pytest.raises(ValueError, match="has outliers"):
        int8.linear(*int8.quantize(x), qt)
    layer = QuantLinear.from_linear(nn.Linear(96, 64), "int8_a8_o2")
    with pytest.raises(ValueError, match="outliers, which multiply activations as they are"):
        layer.set_input_scale(0.1)

    def call(columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return lowbit.linear(x, dataclasses.replace(w, sparse=SparseTerm(columns, values)))

    columns, values = qt.outlier_columns, qt.outlier_values
    with pytest.raises(TypeError, match="must be int32"):
        call(columns.long(), values)
    with pytest.raises(TypeError, match="torch.bfloat16"):
        call(columns, values.bfloat16())
    with pytest.raises(ValueError, match=r"shape \(N, P\)"):
        call(columns[:, :1], values)
    with pytest.raises(ValueError, match=r"added must be float32 of shape \(1, 64\)"):
        call(columns[1:].contiguous(), values[1:].contiguous())
    with pytest.raises(ValueError, match="contiguous"):
        call(columns.T.contiguous().T, values)


@pytest.mark.parametrize("layout", (CANONICAL, N16, K16))
@pytest.mark.parametrize("m", (1, 4, 5, 40))
def test_no_outliers_and_wrong_columns(layout: str, m: int) -> None:
    """P = 0 is the product of the rest, bit for bit; a column that x lacks is refused, wherever it stands."""
    if layout == K16:
        pytest.importorskip("triton")
    w = layouts.to_kernel(lowbit.quantize(normal(70, 96), "int4_g32"), layout)
    x, bias = torch.randn(m, 96), torch.randn(70, requires_grad=True)

    def call(*term: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = dataclasses.replace(w, sparse=SparseTerm(*term))
        return lowbit.linear(x, whole, bias.detach()), lowbit.linear(x, whole, bias)

    nothing = torch.empty(70, 0, dtype=torch.int32), torch.empty(70, 0, dtype=torch.float16)
    assert all(torch.equal(y, lowbit.linear(x, w, bias)) for y in call(*nothing))
    for wrong in (-1, 96, 10**6, -(2**31), 2**31 - 1):
        for row, i in ((0, 0), (69, 1), (64, 0)):
            columns = torch.arange(2, dtype=torch.int32).repeat(70, 1)
            columns[row, i] = wrong
            message = rf"outlier_columns must be in \[0, 96\), got {wrong}"
            with pytest.raises(ValueError, match=message):
                call(columns, torch.ones(70, 2, dtype=torch.float16))
