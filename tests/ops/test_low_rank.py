"""Low-rank terms: W = Q + L R. What is multiplied, learned, saved and refused, with dense and quantized factors."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit import int8, layouts, reference
from lowbit.backends.pytorch import PYTORCH
from lowbit.decoder.bound import bind_linear
from lowbit.formats import Format, parse
from lowbit.layouts import CANONICAL, K16, N16
from lowbit.nn import QuantEmbedding, QuantLinear, fuse
from lowbit.ops.lowrank import low_rank_linear
from lowbit.ops.terms import kernel_weight
from lowbit.ops.weights import embedding
from lowbit.weights.composite import CompositeWeight
from lowbit.weights.lowrank import LowRank
from lowbit.weights.quantized import stored_bytes
from lowbit.weights.sparse import SparseTerm
from weights import random_weight

N, K = 70, 96
# Dense factors of each dtype and quantized ones, with and without zeros and a fitted table; ragged groups.
NAMES = (
    "int4_g32_r8",
    "nf4_r1fp16",
    "uint3_r13fp32",
    "int2_g64_r16int4",
    "kmeans3_pr_r9uint4",
    "nvfp4_r5kmeans3",
)
BY_NAME = pytest.mark.parametrize("name", NAMES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dense_of(factor: Tensor | lowbit.QuantTensor) -> Tensor:  # fp64
    return (
        reference.dequantize(factor) if isinstance(factor, lowbit.QuantTensor) else factor
    ).double()


def whole(qt: lowbit.QuantTensor) -> Tensor:
    """Q + L R in fp64."""
    left, right = map(dense_of, qt.factors)
    return reference.dequantize(qt.matrix).double() + left @ right


def error_bound(x: Tensor, qt: lowbit.QuantTensor) -> Tensor:
    """Of sums in fp32: of K products for Q, of K and then r for L R; each term rounds at most (length + 3) times."""
    left, right = (dense_of(f).abs() for f in qt.factors)
    q = reference.dequantize(qt.matrix).double().abs()
    x = x.double().abs()
    steps = K + qt.format.rank + 6
    return 2**-24 * steps * (x @ q.t() + x @ right.t() @ left.t())


# Formats


def test_names_and_specs() -> None:
    f = parse("int2_g64_r16int4")
    assert (f.rank, f.factor, f.matrix, f.factor_format) == (
        16,
        "int4",
        parse("int2_g64"),
        parse("int4"),
    )
    f = parse("nf4_r8_bf16")
    assert (f.rank, f.factor, f.scale, f.factor_format, f.matrix.spec) == (
        8,
        "bf16",
        "bf16",
        None,
        "nf4_bf16",
    )
    own = Format.lut(bits=3, table=(0, 1, -1)).with_rank(3, parse("int4").spec)
    odd = parse("int4").with_rank(2, Format.lut(bits=2, table=(0, 1, -1), name="own").spec)
    for g in (f, own, odd):
        assert parse(g.spec) == g
        assert parse(g.matrix.spec) == g.matrix
        assert g.matrix.rank == 0
    assert odd.factor_format == Format.lut(bits=2, table=(0, 1, -1), name="own")
    assert parse("nf4_r0").matrix is parse("nf4_r0")


@pytest.mark.parametrize(
    ("name", "message"),
    (
        ("int4_o2_r3", "rank must be 0 with outliers"),
        ("int4_r3_r4", "rank twice"),
        ("int4_r3xx8", "unknown format 'xx8'"),
        ("int4_r3mxfp4", "factor must be one of"),
        ("int4_r0int4", "factor must be 'bf16' without a rank"),
    ),
)
def test_bad_formats(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(name)


def test_other_bad_formats() -> None:
    for rank in (-1, 1.0, True):
        with pytest.raises(ValueError, match="rank must be an integer"):
            parse("int4").with_rank(rank)
    for factor in ("int4_a8", "int4_o1", "int4_r1", "nf4_dq8"):
        with pytest.raises(ValueError, match="factor must be one of"):
            parse("int4").with_rank(2, factor)


@pytest.mark.parametrize("rank", (70, 96, 1000))
def test_a_rank_as_large_as_the_weight_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank must be below 70 .*got {rank}"):
        QuantLinear(K, N, format=f"int4_r{rank}")
    with pytest.raises(ValueError, match="rank must be below 70"):
        lowbit.quantize(torch.randn(N, K), f"int4_r{rank}")


@BY_NAME
def test_bytes_are_counted(name: str) -> None:
    f = parse(name)
    qt = random_weight(f, N, K)
    shapes = ((N, f.rank), (f.rank, K))
    if f.factor_format is None:
        factors = sum(n * k * (4 if f.factor == "fp32" else 2) for n, k in shapes)
    else:
        factors = sum(stored_bytes(f.factor_format, *shape) for shape in shapes)
    assert qt.nbytes == qt.matrix.nbytes + factors == stored_bytes(f, N, K)
    assert qt.bits_per_weight == 8 * qt.nbytes / (N * K)


# Products


@BY_NAME
def test_products(name: str) -> None:
    qt = random_weight(parse(name), N, K)
    w, bias = whole(qt), torch.randn(N)
    for dtype in DTYPES:
        for m in (1, 5, 33):
            x = torch.randn(m, K).to(dtype)
            exact = x.double() @ w.t() + bias.double()
            bound = (
                error_bound(x, qt)
                + exact.abs() * torch.finfo(dtype).eps / 2
                + 2**-23 * bias.double().abs()
            )
            if dtype is torch.bfloat16:  # some kernels round a table's entries to it
                q = reference.dequantize(qt.matrix).double().abs()
                bound = bound + 2**-8 * x.double().abs() @ q.t()
            for weight in (qt, CompositeWeight.of(qt), kernel_weight(qt)):
                y = lowbit.linear(x, weight, bias)
                assert y.dtype == dtype
                assert bool(((y.double() - exact).abs() <= bound).all())
            assert torch.equal(reference.linear(x, qt, bias), exact.to(dtype))


@BY_NAME
def test_dequantize_and_embedding(name: str) -> None:
    qt = random_weight(parse(name), N, K)
    w = whole(qt)
    left, right = (dense_of(f).abs() for f in qt.factors)
    bound = 2**-23 * ((qt.format.rank + 2) * (left @ right) + w.abs())
    rows = torch.tensor([[3, 69], [0, 3]])
    for weight in (
        qt,
        CompositeWeight.of(qt),
        *(layouts.to_kernel(qt, each) for each in (N16, CANONICAL, K16)),
    ):
        made = lowbit.dequantize(weight)
        assert bool(((made.double() - w).abs() <= bound).all())
        torch.testing.assert_close(embedding(rows, weight), made[rows])
    torch.testing.assert_close(reference.dequantize(qt), made)


def test_identity_returns_the_sum_bit_for_bit() -> None:
    """Integers up to 2^11: L R is exact in fp32, and so is its sum with small integers of Q."""
    qt = lowbit.QuantTensor("int4_row_fp32", (N, K), {
        **random_weight(parse("int4_row_fp32"), N, K).tensors, "scales": torch.ones(N, 1),
    })  # fmt: skip
    left, right = torch.randint(-8, 9, (N, 7)), torch.randint(-8, 9, (7, K))
    for dtype in DTYPES:
        w = CompositeWeight(qt, LowRank(left.to(dtype), right.to(dtype)))
        exact = reference.dequantize(qt) + (left @ right).float()
        assert torch.equal(lowbit.linear(torch.eye(K), w).t(), exact)
        assert torch.equal(lowbit.dequantize(w), exact)


@BY_NAME
def test_what_follows_a_product(name: str) -> None:
    qt = random_weight(parse(name), N, K)
    x, gate, residual = (torch.randn(3, size) for size in (K, N, N))
    y = lowbit.linear(x, qt)
    made = lowbit.linear(x, qt, activation="silu", gate=gate, residual=residual)
    torch.testing.assert_close(made, F.silu(gate) * y + residual)
    torch.testing.assert_close(lowbit.linear_many(x, [qt, qt.matrix])[0], y)
    out = torch.empty(3, N)
    bind_linear(x, kernel_weight(qt), out)()
    assert torch.equal(out, y)
    assert lowbit.linear(x[:0], qt).shape == (0, N)


def test_plain_torch_computes_the_same() -> None:
    qt = random_weight(parse("int4_g32_r8"), N, K)
    left, right = qt.factors
    x = torch.randn(4, K)
    assert torch.equal(PYTORCH.low_rank_linear(x, left, right), low_rank_linear(x, left, right))


# Gradients


@BY_NAME
def test_gradients_for_x(name: str) -> None:
    qt = random_weight(parse(name), N, K)
    x, g = torch.randn(3, K, requires_grad=True), torch.randn(3, N)
    (made,) = torch.autograd.grad(lowbit.linear(x, qt), x, g)
    torch.testing.assert_close(made.double(), g.double() @ whole(qt), rtol=1e-4, atol=1e-4)
    (made,) = torch.autograd.grad(lowbit.linear(x, qt, activation="silu"), x, g)
    dense = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(F.silu(dense @ whole(qt).t()), dense, g.double())
    torch.testing.assert_close(made.double(), want, rtol=1e-3, atol=1e-3)


def test_dense_factors_learn() -> None:
    """The trainable slice of CALDERA: L and R as Parameters, rounded to bf16 in the product."""
    layer = QuantLinear.from_quant_tensor(random_weight(parse("int2_g64_r6"), N, K))
    before = layer.quant_tensor()
    left, right = layer.train_parameters(("lowrank_l", "lowrank_r"))
    assert (left.shape, right.shape, left.dtype) == ((N, 6), (6, K), torch.float32)
    assert torch.equal(layer.quant_tensor().tensors["lowrank_l"], before.tensors["lowrank_l"])
    x, target = torch.randn(64, K), torch.randn(64, N)
    y = layer(x)
    torch.testing.assert_close(y, lowbit.linear(x, before))
    g = torch.randn_like(y)
    made = torch.autograd.grad(y, (left, right), g)
    exact = [t.detach().double().requires_grad_() for t in (left, right)]
    want = torch.autograd.grad(x.double() @ exact[1].t() @ exact[0].t(), exact, g.double())
    for a, b in zip(made, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.Adam([left, right], lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append((layer(x) - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    layer.train_parameters(())
    assert layer.quant_tensor().tensors["lowrank_l"].dtype == torch.bfloat16
    assert torch.equal(layer(x).detach(), lowbit.linear(x, layer.quant_tensor()))
    with pytest.raises(ValueError, match="no learnable"):
        QuantLinear.from_quant_tensor(random_weight(parse("int4_r4int4"), N, K)).train_parameters(
            ["lowrank_l"]
        )


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's own jvp
def test_opcheck_transforms_and_compile() -> None:
    x, left, right = torch.randn(3, K), torch.randn(N, 4), torch.randn(4, K)
    op = torch.ops.lowbit.low_rank_linear.default
    torch.library.opcheck(op, (x, left, right.bfloat16()))
    torch.library.opcheck(op, tuple(t.requires_grad_() for t in (x, left, right)))
    x, left, right = (t.detach() for t in (x, left, right))
    y, tangent = torch.func.jvp(lambda x: low_rank_linear(x, left, right), (x,), (2 * x,))
    torch.testing.assert_close(tangent, 2 * y)
    torch.testing.assert_close(torch.vmap(lambda x: low_rank_linear(x, left, right))(x), y)
    for name in ("int4_g32_r8", "int4_g32_r8int4"):
        layer = QuantLinear.from_quant_tensor(random_weight(parse(name), N, K))
        made = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(made, layer(x))
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert torch.equal(y, layer(x.bfloat16()))


# Layers, files, models


@BY_NAME
def test_layers_hold_it(name: str, tmp_path: Path) -> None:
    qt = random_weight(parse(name), N, K)
    layer = QuantLinear.from_quant_tensor(qt, torch.randn(N))
    x = torch.randn(4, K)
    y = layer(x)
    assert torch.equal(y, lowbit.linear(x, qt, layer.bias))
    assert set(layer.state_dict()) == {*qt.tensors, "bias", "_extra_state"}
    for key, t in layer.quant_tensor().tensors.items():
        assert torch.equal(t.float(), qt.tensors[key].float())
    other = QuantLinear(K, N, format=name)
    other.load_state_dict(layer.state_dict())
    loaded = torch.load(_saved(layer, tmp_path / "layer.pt"), weights_only=False)
    cast = copy.deepcopy(layer).to("cpu", torch.bfloat16).float()
    cast.bias = layer.bias
    for made in (other, copy.deepcopy(layer), loaded, pickle.loads(pickle.dumps(layer)), cast):
        assert torch.equal(made(x), y)
    torch.testing.assert_close(layer.weight.detach() @ torch.eye(K), lowbit.dequantize(qt))
    layer.scale_weight(0.5)
    torch.testing.assert_close(layer(x) - layer.bias, (y - layer.bias) / 2)
    meta = QuantLinear(K, N, format=name, device="meta").to_empty(device="cpu")
    assert meta(x).shape == y.shape
    table = QuantEmbedding.from_quant_tensor(qt)
    assert torch.equal(table(torch.tensor([5, 0])), embedding(torch.tensor([5, 0]), qt))
    assert name in repr(layer)


def _saved(layer: nn.Module, path: Path) -> Path:
    torch.save(layer, path)
    return path


def test_files(tmp_path: Path) -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 40))

    torch.manual_seed(1)
    made, x = model(), torch.randn(3, K)
    report = lowbit.quantize_model(made, {"0": "int4_g32_r8int4", "2": "nf4_r4"}, progress=False)
    y = made(x)
    assert [8 * row.nbytes / math.prod(row.shape) for row in report.layers] == [
        8 * stored_bytes(parse(f), *s) / (s[0] * s[1])
        for f, s in (("int4_g32_r8int4", (N, K)), ("nf4_r4", (40, N)))
    ]
    lowbit.save(made, tmp_path / "m.safetensors")
    other = model()
    lowbit.load(other, tmp_path / "m.safetensors")
    assert torch.equal(other(x), y)


def test_explain() -> None:
    qt = random_weight(parse("int4_g32_r8int4"), N, K)
    said = lowbit.explain(torch.randn(1, K), qt)
    assert said.lowrank.startswith("rank 8 in int4, ")
    assert said.selected == lowbit.explain(torch.randn(1, K), qt.matrix).selected
    assert lowbit.explain(torch.randn(1, K), CompositeWeight.of(qt)).lowrank == said.lowrank
    dense = lowbit.explain(torch.randn(1, K), random_weight(parse("int4_g32_r8"), N, K))
    assert "  low rank: rank 8 in bf16, torch" in str(dense)
    assert lowbit.explain(torch.randn(1, K), qt.matrix).lowrank is None


def test_sums_of_several_terms() -> None:
    qt = random_weight(parse("nf4"), N, K)
    terms = (
        LowRank(torch.randn(N, 3), torch.randn(3, K)),
        SparseTerm(torch.zeros(N, 1, dtype=torch.int32), torch.randn(N, 1)),
        LowRank(
            lowbit.quantize(torch.randn(N, 20), "int8_row"),
            lowbit.quantize(torch.randn(20, K), "int4"),
        ),
    )
    w, x = CompositeWeight(qt, *terms), torch.randn(2, K)
    assert w.nbytes == qt.nbytes + sum(t.nbytes for term in terms for t in term)
    torch.testing.assert_close(
        lowbit.linear(x, w), x @ lowbit.dequantize(w).t(), rtol=1e-4, atol=1e-4
    )
    assert repr(w).endswith("rank 3 in float32, 1 a row, rank 20 in int8_row)")


# Bad input


def test_bad_terms() -> None:
    qt = random_weight(parse("nf4"), N, K)
    left, right = torch.randn(N, 3), torch.randn(3, K)
    packed = lowbit.quantize(left, "int8_row")
    for term, error, message in (
        (LowRank(left, right.t()), ValueError, r"must be \(70, r\) and \(r, 96\)"),
        (LowRank(left[:5], right), ValueError, r"must be \(70, r\)"),
        (LowRank(left.double(), right), TypeError, "left must be a matrix in float32"),
        (LowRank(left, right[0]), TypeError, "right must be a matrix"),
        (LowRank(left, "r"), TypeError, r"right must be a torch\.Tensor"),
        (LowRank(left.to("meta"), right), ValueError, "left must be on cpu"),
        (LowRank(packed, right), TypeError, "both be dense or both be quantized"),
        (
            LowRank(lowbit.quantize(torch.randn(N, 30), "int8_row_r2"), right),
            ValueError,
            "no a low-rank term",
        ),
    ):
        with pytest.raises(error, match=message):
            CompositeWeight(qt, term)
    with pytest.raises(ValueError, match="use CompositeWeight.of"):
        CompositeWeight(random_weight(parse("nf4_r2"), N, K))


def test_products_that_do_not_take_it() -> None:
    qt = random_weight(parse("int8_row_a8_r4"), N, K)
    q, scales = int8.quantize(torch.randn(2, K))
    with pytest.raises(ValueError, match="a low-rank term, which this product does not take"):
        int8.linear(q, scales, qt)
    layer = QuantLinear.from_quant_tensor(qt)
    with pytest.raises(ValueError, match="a low-rank term, which multiply activations as they are"):
        layer.set_input_scale(0.1)
    x = torch.randn(2, K)
    torch.testing.assert_close(layer(x), reference.linear(x, qt))
    model = nn.ModuleDict(
        {n: QuantLinear.from_quant_tensor(qt) for n in ("q_proj", "k_proj", "v_proj")}
    )
    fuse(model)
    assert all(layer._siblings is None for layer in model.values())


def test_bad_operands_of_the_op() -> None:
    x, left, right = torch.randn(3, K), torch.randn(N, 4), torch.randn(4, K)
    for args, error, message in (
        ((x.int(), left, right), TypeError, "x must be float32"),
        ((x, left.double(), right), TypeError, "left must be float32"),
        ((x, left[0], right), ValueError, "must be matrices"),
        ((x, left, right[:3]), ValueError, r"must have shapes \(N, r\) and \(r, 96\)"),
        ((x[:, 1:], left, right), ValueError, r"\(r, 95\)"),
        ((torch.tensor(1.0), left, right), ValueError, "x must have shape"),
    ):
        with pytest.raises(error, match=message):
            low_rank_linear(*args)
