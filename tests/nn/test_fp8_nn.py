"""FP8Linear and the activations that are saved in FP8: products, gradients, what is saved, and use as plain modules."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import float8
from lowbit.nn import (
    FP8LayerNorm,
    FP8Linear,
    FP8RMSNorm,
    fp8_add,
    fp8_gelu,
    fp8_layer_norm,
    fp8_mul,
    fp8_rms_norm,
    fp8_silu,
)
from lowbit.reference import fp8 as reference

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GRANULARITIES = {
    "tensor": ("tensor", "tensor"),
    "row": ("row", "row"),
    "128x128": ("1x128", "128x128"),
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def exact(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """x after FP8, in float64, by the plain reference."""
    return reference.dequantize(
        *reference.quantize(x, dtype, float8.find_granularity(name))
    ).double()


def assert_near(y: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """fp32 sums: 1e-3 of the sum of magnitudes; then one rounding to the dtype of y."""
    bound = 1e-3 * magnitude + torch.finfo(y.dtype).eps * expected.abs() + 1e-30
    error = (y.double() - expected).abs()
    assert bool((error <= bound).all()), (error / bound).max()


def layer_of(n: int, k: int, granularity: str, bias: bool = True, seed: int = 0) -> FP8Linear:
    torch.manual_seed(seed)
    return FP8Linear(k, n, bias, granularity)


def saved_by(
    fn: Callable[[], Tensor], ignored: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
    """The result, and what autograd saves for it apart from `ignored`."""
    found: list[Tensor] = []
    pointers = {t.data_ptr() for t in ignored}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (found.append(t), t)[1], lambda t: t):
        y = fn()
    return y, [t for t in found if t.data_ptr() not in pointers]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", ((5, 33, 20), (130, 200, 140), (16, 128, 256)), ids=str)
def test_linear_and_its_gradients(granularity: str, shape: tuple[int, int, int]) -> None:
    """All three products against float64 on operands that the reference has quantized."""
    m, n, k = shape
    values, weights = GRANULARITIES[granularity]
    for dtype, bias in zip(FLOATS, (True, False, True), strict=True):
        layer = layer_of(n, k, granularity, bias)
        x = torch.randn(m, k).to(dtype).requires_grad_()
        grad = torch.randn(m, n).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        y.backward(grad)
        w = layer.weight.detach()
        a, b = exact(x.detach(), E4M3, values), exact(w, E4M3, weights)
        expected = a @ b.T
        if bias:
            expected = expected + layer.bias.detach().double()
        assert_near(y, expected, a.abs() @ b.abs().T)
        # dX = G W: both scaled along N, blocks being the same either way.
        g = exact(grad, E5M2, values)
        b = exact(w.T, E4M3, "row").T if granularity == "row" else b
        assert x.grad.dtype == dtype
        assert_near(x.grad, g @ b, g.abs() @ b.abs())
        # dW = G^T X: both scaled along the rows of x.
        g, a = exact(grad.T, E5M2, values), exact(x.detach().T, E4M3, values).T
        assert layer.weight.grad.dtype == torch.float32
        assert_near(layer.weight.grad, g @ a, g.abs() @ a.abs())
        if bias:
            assert_near(layer.bias.grad, grad.double().sum(0), grad.double().abs().sum(0))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_linear_saves_fp8(granularity: str) -> None:
    """A byte for each number of x and its scales; nothing for a frozen weight."""
    layer = layer_of(48, 256, granularity)
    x = torch.randn(4, 64, 256, dtype=torch.bfloat16, requires_grad=True)
    _, saved = saved_by(lambda: layer(x), [layer.weight])
    codes = [t for t in saved if t.dtype == E4M3]
    assert [t.numel() for t in codes] == [x.numel()]
    assert sum(t.nbytes for t in saved) <= x.numel() * (1 + 1 / 32) + 4
    layer.weight.requires_grad_(False)
    _, saved = saved_by(lambda: layer(x), [layer.weight])
    assert saved == []


def test_linear_takes_only_the_gradients_that_are_needed() -> None:
    layer, x = layer_of(33, 20, "row"), torch.randn(5, 20)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    x.requires_grad_()
    frozen = copy.deepcopy(layer).requires_grad_(False)
    frozen.weight.grad = None
    frozen(x).sum().backward()
    assert frozen.weight.grad is None
    assert x.grad is not None


def test_linear_in_place_of_a_dense_one() -> None:
    """from_linear shares the parameters, state dicts have the same keys, shapes and strides may be any."""
    dense = nn.Linear(40, 24).eval()
    layer = FP8Linear.from_linear(dense, "128x128")
    assert layer.weight is dense.weight
    assert layer.bias is dense.bias
    assert not layer.training
    assert isinstance(layer, nn.Linear)
    other = FP8Linear(40, 24, granularity="row", dtype=torch.bfloat16)
    other.load_state_dict(dense.state_dict())
    assert list(other.state_dict()) == ["weight", "bias"]
    assert torch.equal(other.weight, dense.weight.bfloat16())
    x = torch.randn(3, 40, 7).transpose(1, 2)
    y = layer(x)
    assert y.shape == (3, 7, 24)
    # Two codes with 3 bits of mantissa: a product errs by 2^-3.
    assert (y - dense(x)).abs().max() < 2**-3 * F.linear(x.abs(), dense.weight.abs()).max()
    assert layer(torch.randn(40)).shape == (24,)
    assert layer(torch.randn(0, 40)).shape == (0, 24)
    assert "granularity='128x128'" in repr(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_no_rows_give_zero_gradients() -> None:
    layer = layer_of(24, 40, "tensor")
    x = torch.zeros(0, 40, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 40)
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_inference_keeps_the_weight_until_it_changes(granularity: str) -> None:
    layer, x = layer_of(48, 200, granularity).eval(), torch.randn(6, 200)
    with torch.no_grad():
        y = layer(x)
        kept = layer._kept
        assert kept is not None
        assert torch.equal(layer(x), y)
        assert layer._kept is kept
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), 2 * (y - layer.bias) + layer.bias)
        layer.weight.data.mul_(0.5)
        layer.eval()
        torch.testing.assert_close(layer(x), y)
        assert copy.deepcopy(layer)._kept is None
        layer.train()
        assert layer._kept is None
        torch.testing.assert_close(layer(x), y)
        assert layer._kept is None
    # With gradients the result is the same.
    torch.testing.assert_close(layer(x).detach(), y)


def test_a_weight_that_is_replaced_is_not_kept() -> None:
    """By one at the address of the last but one, with the version counter of a new tensor."""
    layer, x = layer_of(48, 200, "tensor").eval(), torch.randn(6, 200)
    with torch.no_grad():
        for _ in range(10):
            layer(x)
            for _ in range(2):
                layer.weight = torch.nn.Parameter(torch.randn(48, 200))
            kept = layer(x)
            assert torch.equal(layer.eval()(x), kept)


def test_training_follows_the_dense_layer() -> None:
    """A regression that a dense layer solves: the loss falls by 100 in each granularity."""
    torch.manual_seed(1)
    x = torch.randn(128, 32)
    target = x @ torch.randn(32, 8)
    for granularity in GRANULARITIES:
        layer = layer_of(8, 32, granularity)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
        losses = []
        for _ in range(150):
            optimizer.zero_grad()
            loss = F.mse_loss(layer(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 100, granularity


def test_linear_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="granularity must be one of"):
        FP8Linear(4, 4, granularity="1x16")
    with pytest.raises(TypeError, match="linear must be an nn.Linear, got Conv1d"):
        FP8Linear.from_linear(nn.Conv1d(1, 1, 1))

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(NotImplementedError, match="linear is a Doubled"):
        FP8Linear.from_linear(Doubled(4, 4))
    layer = FP8Linear(4, 4)
    with pytest.raises(ValueError, match=r"x must have shape \(..., 4\), got \(2, 5\)"):
        layer(torch.zeros(2, 5))
    with pytest.raises(
        TypeError, match="x must be float32, bfloat16 or float16, got torch.float64"
    ):
        layer(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="x must be on cpu, got meta"):
        layer(torch.zeros(2, 4, device="meta"))
    x = torch.randn(2, 4, requires_grad=True)
    (g,) = torch.autograd.grad((layer(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


# Activations

UNARY = {
    "silu": (fp8_silu, F.silu),
    "gelu": (fp8_gelu, F.gelu),
    "gelu_tanh": (
        lambda x: fp8_gelu(x, approximate="tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "rms_norm": (lambda x: fp8_rms_norm(x, x.shape[-1:]), lambda x: F.rms_norm(x, x.shape[-1:])),
    "layer_norm": (
        lambda x: fp8_layer_norm(x, x.shape[-1:], eps=1e-3),
        lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-3),
    ),
}
SHAPES = ((3, 5, 40), (2, 16), (7,), (4, 1))


def rounded(x: Tensor) -> Tensor:
    """x as it is saved."""
    scales = float8.find_granularity("1x16")
    rows = x.detach().reshape(-1, x.shape[-1])
    saved = reference.quantize(rows, E4M3, scales, torch.bfloat16)
    return reference.dequantize(*saved, x.dtype).view(x.shape)


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unary(name: str, dtype: torch.dtype) -> None:
    """Forward is the plain op, the gradient that of the plain op at the saved x, bit for bit."""
    ours, plain = UNARY[name]
    for shape in SHAPES:
        x = (3 * torch.randn(shape)).to(dtype).requires_grad_()
        grad = torch.randn(shape).to(dtype)
        y, saved = saved_by(functools.partial(ours, x))
        assert torch.equal(y, plain(x))
        at = rounded(x).requires_grad_()
        plain(at).backward(grad)
        y.backward(grad)
        assert torch.equal(x.grad, at.grad), shape
        assert {t.dtype for t in saved} == {E4M3, torch.bfloat16}
        groups = x.numel() // shape[-1] * -(-shape[-1] // 16)
        assert sum(t.nbytes for t in saved) == x.numel() + 2 * groups


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mul(dtype: torch.dtype) -> None:
    """Both factors, one of them, broadcasting, and two dtypes."""
    pairs = (((3, 5, 40), (3, 5, 40)), ((3, 5, 40), (40,)), ((3, 1, 40), (5, 1)), ((6,), ()))
    for (a, b), needs in itertools.product(pairs, ((True, True), (True, False), (False, True))):
        x, y = (
            torch.randn(a).to(dtype).requires_grad_(needs[0]),
            torch.randn(b, requires_grad=needs[1]),
        )
        z, saved = saved_by(functools.partial(fp8_mul, x, y))
        assert torch.equal(z, x * y)
        grad = torch.randn(z.shape).to(z.dtype)
        z.backward(grad)
        for t, other in ((x, y), (y, x)):
            if not t.requires_grad:
                assert t.grad is None
                continue
            at = rounded(torch.atleast_1d(other)).view(other.shape)
            expected = (grad * at).sum_to_size(t.shape).to(t.dtype)
            assert torch.equal(t.grad, expected)
        assert sum(t.numel() for t in saved if t.dtype == E4M3) == sum(
            other.numel() for t, other in ((x, y), (y, x)) if t.requires_grad
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_norms_with_parameters(dtype: torch.dtype) -> None:
    """As modules, with gradients for weight and bias, and with the copy that `fp8_add` has made."""
    for ours, plain in ((FP8RMSNorm(40), nn.RMSNorm(40)), (FP8LayerNorm(40), nn.LayerNorm(40))):
        torch.manual_seed(3)
        with torch.no_grad():
            for p in ours.parameters():
                p.copy_(torch.randn(40))
        plain.load_state_dict(ours.state_dict())
        ours, plain = ours.to(dtype), plain.to(dtype)
        x, y = (torch.randn(3, 5, 40).to(dtype).requires_grad_() for _ in range(2))
        grad = torch.randn(3, 5, 40).to(dtype)
        total, saved = fp8_add(x, y)
        assert torch.equal(total, x + y)
        out, kept = saved_by(functools.partial(ours, total, saved), list(ours.parameters()))
        assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in saved}
        assert torch.equal(out, plain(total))
        out.backward(grad)
        at = rounded(total).requires_grad_()
        plain(at).backward(grad)
        assert torch.equal(x.grad, at.grad)
        assert torch.equal(y.grad, at.grad)
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        alone = x.detach().requires_grad_()
        ours(alone).backward(grad)
        at = rounded(alone).requires_grad_()
        plain(at).backward(grad)
        assert torch.equal(alone.grad, at.grad)


def test_nothing_is_saved_without_gradients() -> None:
    x = torch.randn(4, 32)
    total, saved = fp8_add(x, x)
    assert saved is None
    for ours, plain in UNARY.values():
        y = ours(x)
        assert torch.equal(y, plain(x))
        assert not y.requires_grad
        with torch.no_grad():
            assert not ours(x.requires_grad_()).requires_grad
        x = x.detach()
    empty = torch.zeros(0, 16, requires_grad=True)
    fp8_silu(empty).sum().backward()
    assert empty.grad.shape == (0, 16)
    assert torch.equal(fp8_mul(x, total), x * total)


def test_saved_activations_carry_nonfinite_values() -> None:
    """NaN and infinity reach the gradient of their group of 16, and no other."""
    x = torch.randn(2, 32)
    x[0, 3] = float("nan")
    x.requires_grad_()
    fp8_silu(x).sum().backward()
    assert bool(x.grad[0, 3].isnan())
    assert bool(x.grad[0, 16:].isfinite().all())
    assert bool(x.grad[1].isfinite().all())
