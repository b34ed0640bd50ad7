"""CompositeWeight: a sum of a quantized matrix and sparse terms. What it computes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import lowbit
from lowbit import reference
from lowbit.formats import parse
from lowbit.ops.weights import embedding
from lowbit.weights.composite import CompositeWeight
from lowbit.weights.sparse import SparseTerm
from weights import random_weight

N, K = 70, 96


def sparse_term(count: int, dtype: torch.dtype = torch.float16) -> SparseTerm:
    columns = torch.rand(N, K).argsort(1)[:, :count].sort(1).values.int()
    return SparseTerm(columns, torch.randn(N, count).to(dtype))


def matrix_of(term: SparseTerm) -> torch.Tensor:
    return torch.zeros(N, K).scatter(1, term.columns.long(), term.values.float())


def test_outlier_formats_are_sums_of_two_terms() -> None:
    qt = random_weight(parse("int4_g32_o4"), N, K)
    w = CompositeWeight.of(qt)
    assert [type(t) for t in w.terms] == [type(qt), SparseTerm]
    assert w.nbytes == qt.nbytes
    assert w.bits_per_weight == qt.bits_per_weight
    assert torch.equal(lowbit.dequantize(w), reference.dequantize(qt))
    for dtype in (torch.float32, torch.bfloat16):
        x, bias = torch.randn(2, 3, K).to(dtype), torch.randn(N)
        assert torch.equal(lowbit.linear(x, w, bias), lowbit.linear(x, qt, bias))
    plain = random_weight(parse("int4_g32"), N, K)
    assert CompositeWeight.of(plain).terms == (plain,)
    said = lowbit.explain(torch.randn(1, K), CompositeWeight(plain, sparse_term(3), sparse_term(2)))
    assert said.selected == lowbit.explain(torch.randn(1, K), plain).selected
    assert "outliers: 3 a row + 2 a row, outliers_" in str(said)


def test_identity_returns_the_sum_bit_for_bit() -> None:
    """Q, then each S in its order, in fp32; bf16 rounds once."""
    qt, terms = random_weight(parse("nf4"), N, K), (sparse_term(3), sparse_term(5, torch.float32))
    w = CompositeWeight(qt, *terms)
    # The kernel adds the sum of the sparse products to that of Q; `dequantize` adds them one by one.
    expected = reference.dequantize(qt) + (matrix_of(terms[0]) + matrix_of(terms[1]))
    assert torch.equal(lowbit.linear(torch.eye(K), w).T, expected)
    one_by_one = reference.dequantize(qt) + matrix_of(terms[0]) + matrix_of(terms[1])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(lowbit.dequantize(w, dtype), one_by_one.to(dtype))
        rows = torch.tensor([[5, 69], [0, 5]])
        assert torch.equal(embedding(rows, w, dtype), one_by_one.to(dtype)[rows])
    y = lowbit.linear_many(torch.eye(K), [w, qt])
    assert torch.equal(y[0].T, expected)
    assert torch.equal(y[1].T, reference.dequantize(qt))


# Of torch's own rule for relu in forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_gradients_are_those_of_the_dense_sum() -> None:
    w = CompositeWeight(random_weight(parse("nf4"), N, K), sparse_term(3), sparse_term(2))
    dense, out = lowbit.dequantize(w).double(), torch.randn(4, N)
    x = torch.randn(4, K, requires_grad=True)
    y = lowbit.linear(x, w, activation="relu")
    y.backward(out)
    xd = x.detach().double().requires_grad_()
    F.relu(F.linear(xd, dense)).backward(out.double())
    # Sums of at most 96 fp32 products in another order.
    torch.testing.assert_close(x.grad.double(), xd.grad, rtol=1e-5, atol=1e-4)
    tangent = torch.func.jvp(lambda t: lowbit.linear(t, w), (x.detach(),), (out @ dense.float(),))[
        1
    ]
    torch.testing.assert_close(
        tangent.double(), (out.double() @ dense) @ dense.T, rtol=1e-4, atol=1e-2
    )


def test_what_is_refused() -> None:
    qt, (columns, values) = random_weight(parse("nf4"), N, K), sparse_term(3)
    with pytest.raises(TypeError, match="matrix must be a QuantTensor, got Tensor"):
        CompositeWeight(torch.zeros(N, K))
    with pytest.raises(TypeError, match="added must be SparseTerms or LowRanks, got tuple"):
        CompositeWeight(qt, (columns, values))
    with pytest.raises(ValueError, match=r"shape \(70, P\), got \(69, 3\)"):
        CompositeWeight(qt, SparseTerm(columns[1:], values[1:]))
    with pytest.raises(ValueError, match=r"columns must be in \[0, 96\), got 96"):
        CompositeWeight(qt, SparseTerm(torch.full_like(columns, 96), values))
    with pytest.raises(ValueError, match="must be on cpu, got meta"):
        CompositeWeight(qt, SparseTerm(columns.to("meta"), values.to("meta")))
    with pytest.raises(ValueError, match="matrix must have no outliers"):
        CompositeWeight(random_weight(parse("int4_g32_o4"), N, K))
