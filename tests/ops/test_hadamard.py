"""The randomized Hadamard transform: its matrices exactly, products, gradients, what it does to weights, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from lowbit import reference
from lowbit.ops.hadamard import hadamard

# One of each construction and field: Sylvester alone; Paley 1 of 11, 3^3, 7^3; Paley 2 of 17, 5^2, 37.
SIZES = (1, 2, 8, 64, 12, 24, 28 * 4, 344, 36 * 16, 52, 76 * 2)


def dense(k: int) -> Tensor:  # fp64
    """H by its definition, a Kronecker product."""
    m = reference.hadamard_order(k)
    sylvester = torch.from_numpy(scipy.linalg.hadamard(k // m)).double()
    return torch.kron(reference.hadamard_matrix(m).double(), sylvester) / math.sqrt(k)


def bound(k: int, x: Tensor) -> Tensor:
    """Of the error of K-term sums in fp32: p additions of pairs, at most m more, the products and the scale."""
    m = reference.hadamard_order(k)
    steps = math.log2(k // m) + m + 3
    return steps * 2**-24 * x.double().abs().sum(-1, keepdim=True) / math.sqrt(k)


@pytest.mark.parametrize(
    "m", (1, 12, 20, 28, 36, 44, 52, 60, 68, 76, 82 * 2, 100, 108, 124, 148, 344)
)
def test_matrices_are_hadamard(m: int) -> None:
    h = reference.hadamard_matrix(m).double()
    assert bool((h.abs() == 1).all())
    assert torch.equal(h @ h.t(), m * torch.eye(m, dtype=torch.float64))


def test_orders() -> None:
    """The sizes of known models: Qwen2.5-0.5B, SmolLM2, Gemma 3, Llama 2 and 3."""
    given = {
        896: 28,
        4864: 76,
        576: 36,
        1536: 12,
        640: 20,
        2048: 1,
        1152: 36,
        6912: 108,
        4096: 1,
        11008: 344,
        14336: 28,
    }
    assert {k: reference.hadamard_order(k) for k in given} == given


@pytest.mark.parametrize("k", SIZES)
def test_is_the_matrix(k: int) -> None:
    """Integers up to 2^24 are exact in fp32, so that each entry of sqrt(K) H comes out to the bit of the scale."""
    scale = torch.tensor(1 / math.sqrt(k), dtype=torch.float64).float()
    made = hadamard(torch.eye(k)).t()
    assert torch.equal(made, torch.sign(dense(k)).float() * scale)
    assert torch.equal(hadamard(torch.eye(k), transposed=True).t(), made.t())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("k", SIZES)
def test_products(k: int, dtype: torch.dtype) -> None:
    x, signs, h = torch.randn(3, 2, k).to(dtype), torch.randn(k), dense(k)
    for transposed in (False, True):
        y = hadamard(x, signs, transposed=transposed)
        given = x.double() if transposed else x.double() * signs.double()
        exact = given @ h * signs.double() if transposed else given @ h.t()
        error = bound(k, given) * (signs.abs() if transposed else 1)
        error = error + exact.abs() * torch.finfo(dtype).eps / 2
        assert (y.dtype, y.shape) == (dtype, x.shape)
        assert bool(((y.double() - exact).abs() <= error).all())


@pytest.mark.parametrize("k", (64, 576, 4864))
def test_transposed_undoes_it(k: int) -> None:
    x, signs = torch.randn(5, k), torch.randint(0, 2, (k,)) * 2.0 - 1
    back = hadamard(hadamard(x, signs), signs, transposed=True)
    assert bool(((back - x).abs() <= 4 * bound(k, x)).all())


def test_weights_become_normal() -> None:
    """Kurtosis near 3, that of a normal distribution: Student's t with 3 degrees of freedom has none."""
    w = torch.from_numpy(np.random.default_rng(0).standard_t(3, (576, 896))).float()

    def kurtosis(w: Tensor) -> float:
        w = w - w.mean()
        return float(w.pow(4).mean() / w.pow(2).mean() ** 2)

    left, right = (torch.randint(0, 2, (size,)) * 2.0 - 1 for size in w.shape)
    made = hadamard(hadamard(w, right).t(), left).t()
    assert kurtosis(w) > 10
    # Of n normal numbers its standard deviation is sqrt(24 / n), here 0.007.
    assert abs(kurtosis(made) - 3) < 0.1
    torch.testing.assert_close(made.norm(), w.norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("k", (8, 24))
def test_gradients(k: int, transposed: bool) -> None:
    x, signs, g = torch.randn(2, 3, k), torch.randn(k), torch.randn(2, 3, k)

    def of_dense(x: Tensor, signs: Tensor) -> Tensor:
        h = dense(k)
        return x @ h * signs if transposed else (x * signs) @ h.t()

    def second(f: object, x: Tensor, signs: Tensor, g: Tensor) -> list[Tensor]:
        x, signs = x.requires_grad_(), signs.requires_grad_()
        first = torch.autograd.grad(f(x, signs), (x, signs), g, create_graph=True)
        more = torch.autograd.grad(sum(t.pow(2).sum() for t in first), (x, signs))
        return [*first, *more]

    made = second(lambda x, s: hadamard(x, s, transposed=transposed), x.clone(), signs.clone(), g)
    want = second(of_dense, x.double(), signs.double(), g.double())
    for a, b in zip(made, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's own jvp
def test_transforms_and_compile() -> None:
    x, signs = torch.randn(4, 24), torch.randn(24)
    for args in (
        (x, signs, False),
        (x.bfloat16(), None, True),
        (x.requires_grad_(), signs.requires_grad_(), True),
    ):
        torch.library.opcheck(torch.ops.lowbit.hadamard.default, args)
    f = torch.compile(hadamard, fullgraph=True, backend="aot_eager")
    assert torch.equal(f(x, signs), hadamard(x, signs))
    x, signs = x.detach(), signs.detach()
    torch.testing.assert_close(torch.vmap(lambda row: hadamard(row, signs))(x), hadamard(x, signs))
    y, tangent = torch.func.jvp(lambda s: hadamard(x, s), (signs,), (2 * signs,))
    torch.testing.assert_close(tangent, 2 * y)


def test_autocast_changes_nothing() -> None:
    x, signs = torch.randn(3, 576, requires_grad=True), torch.randn(576)
    y = hadamard(x, signs)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        made = hadamard(x, signs)
        assert torch.equal(made, y)
        assert torch.equal(torch.autograd.grad(made.sum(), x)[0], gradient)
        assert torch.equal(torch.func.vjp(hadamard, x.detach(), signs)[0], y)


def test_empty() -> None:
    for shape in ((0, 24), (2, 0, 8)):
        assert hadamard(torch.zeros(shape), torch.ones(shape[-1])).shape == shape


def test_bad_input() -> None:
    for k in (0, 3, 6, 172, 13696, 2 * 1031):
        with pytest.raises(ValueError, match=rf"Hadamard transform.*{k}"):
            hadamard(torch.zeros(2, k))
    x = torch.zeros(2, 8)
    for signs in (torch.ones(7), torch.ones(1, 8), torch.ones(8, device="meta")):
        with pytest.raises(ValueError, match="signs must have shape"):
            hadamard(x, signs)
    with pytest.raises(TypeError, match="signs must be float32"):
        hadamard(x, torch.ones(8, dtype=torch.int8))
    with pytest.raises(TypeError, match="x must be float32"):
        hadamard(x.int())
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
        hadamard([1.0])
    with pytest.raises(ValueError, match="x must have shape"):
        hadamard(torch.tensor(1.0))
    with pytest.raises(ValueError, match="order 92"):
        reference.hadamard_matrix(92)
