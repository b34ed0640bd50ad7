"""Fake quantizers: values are those of the packed weight, gradients those of the papers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import lowbit
from lowbit import qat
from lowbit.formats import parse
from lowbit.qat import WeightQuantizer

N, K = 6, 40
QUANTIZERS: dict[str, Callable[[Tensor], WeightQuantizer]] = {
    "rtn nf4": partial(qat.STE, format="nf4_g16"),
    "rtn uint3": partial(qat.STE, format="uint3_g32"),
    "kmeans": partial(qat.STE, format="kmeans2_g32"),
    "rtn dq8": partial(qat.STE, format="int4_g16_dq8"),
    "lsq": partial(qat.LSQ, format="int3_row_fp32"),
    "lsq group fp16": partial(qat.LSQ, format="nf4_g16", granularity="group"),
    "twn": qat.TWN,
    "twn row": partial(qat.TWN, granularity="group"),
    "ttq": qat.TTQ,
    "bwn": qat.BWN,
    "bwn group": partial(qat.BWN, format="binary_g32_fp32"),
    "bitnet": qat.BitNet,
    "dorefa": partial(qat.DoReFa, bits=3),
    "means": partial(qat.ClusterMeans, bits=3),
    "dkm": partial(qat.SoftKMeans, bits=2, mode="unrolled"),
    "idkm": partial(qat.SoftKMeans, bits=2),
    "idkm jfb": partial(qat.SoftKMeans, bits=2, mode="jfb"),
}
ODD_WEIGHTS = {
    "random": torch.randn(N, K, generator=torch.Generator().manual_seed(1)),
    "zero": torch.zeros(N, K),
    "constant": torch.full((N, K), -0.3),
    "two values": torch.tensor([0.5, -0.25]).repeat(N, K // 2),
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


def grads(quantizer: WeightQuantizer, w: Tensor, g: Tensor) -> Tensor:
    """dL/dw for L = sum g * w^; gradients of parameters are left in them."""
    leaf = w.clone().requires_grad_()
    (quantizer(leaf) * g).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("odd", ODD_WEIGHTS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_values_are_those_of_the_packed_weight(name: str, odd: str) -> None:
    w = ODD_WEIGHTS[odd]
    quantizer = QUANTIZERS[name](w).eval()
    qt = quantizer.quant_tensor(w).validate()
    values = quantizer(w)
    assert torch.equal(values, qt.dequantize())
    assert torch.equal(lowbit.linear(torch.eye(K), qt), values.T)
    assert torch.equal(quantizer(w.bfloat16()).detach(), quantizer(w.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_fast_kernel_runs(name: str) -> None:
    qt = QUANTIZERS[name](ODD_WEIGHTS["random"]).quant_tensor(ODD_WEIGHTS["random"])
    assert "reference" not in lowbit.explain(torch.randn(3, K), qt).selected


@pytest.mark.parametrize("name", QUANTIZERS)
def test_bad_weights_are_refused(name: str) -> None:
    w = ODD_WEIGHTS["random"].clone()
    w[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"weight\[1, 2\] = nan is not finite"):
        QUANTIZERS[name](w).quant_tensor(w)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_loss_falls(name: str) -> None:
    """Least squares onto the outputs of another layer, by SGD through the quantizer."""
    torch.manual_seed(3)
    w = torch.randn(N, K, requires_grad=True)
    x, target = torch.randn(64, K), torch.randn(64, K) @ torch.randn(K, N) / K
    quantizer = QUANTIZERS[name](w.detach())
    optimizer = torch.optim.SGD([w, *quantizer.parameters()], lr=0.05)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (x @ quantizer(w).T - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_straight_through_and_scale_gradient() -> None:
    x = torch.tensor([0.3, -2.0], requires_grad=True)
    y = qat.straight_through(3 * x, torch.tensor([1.0, -0.0]))
    assert y.tolist() == [1.0, -0.0]
    y.sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]
    x.grad = None
    y = qat.scale_gradient(x, 0.1)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 0.1))


@pytest.mark.parametrize("name", ["rtn nf4", "rtn uint3", "twn", "bitnet", "means"])
def test_weights_get_the_gradient_as_it_is(name: str) -> None:
    w, g = ODD_WEIGHTS["random"], torch.randn(N, K)
    assert torch.equal(grads(QUANTIZERS[name](w), w, g), g)


@pytest.mark.parametrize(
    ("quantizer", "format", "method", "options"),
    [
        (partial(qat.STE, format="kmeans2_pr"), "kmeans2_pr", "kmeans", {}),
        (
            partial(qat.STE, format="int3_g16", rounding="floor"),
            "int3_g16",
            "rtn",
            {"rounding": "floor"},
        ),
        (qat.TWN, "ternary_row_fp32", "twn", {"granularity": "tensor"}),
        (qat.BitNet, "ternary_row_fp32", "bitnet", {}),
        (partial(qat.BitNet, format="binary_row_fp32"), "binary_row_fp32", "bitnet", {}),
        (qat.BWN, "binary_row_fp32", "rtn", {}),
    ],
)
def test_methods_of_quantize(
    quantizer: Callable[[Tensor], WeightQuantizer],
    format: str,
    method: str,
    options: dict[str, str],
) -> None:
    w = ODD_WEIGHTS["random"]
    expected = lowbit.quantize(w, format, method, **options).dequantize()
    assert torch.equal(quantizer(w)(w), expected)


# LSQ


def test_lsq_starts_as_in_the_paper() -> None:
    w = ODD_WEIGHTS["random"]
    expected = 2 * w.abs().mean() / 7**0.5
    torch.testing.assert_close(qat.LSQ(w, "int4_row_fp32").step, expected.view(1, 1))
    rows = qat.LSQ(w, "int4_row_fp32", granularity="group").step
    torch.testing.assert_close(rows, 2 * w.abs().mean(1, keepdim=True) / 7**0.5)
    assert qat.LSQ(torch.zeros(2, 3)).step.item() == 1


def test_lsq_against_torch() -> None:
    """torch's op calls values inside by their rounded code; none lies within 1/2 beyond the ends here."""
    w, g = torch.randn(N, K) * 2, torch.randn(N, K)
    quantizer = qat.LSQ(w, "int3_row_fp32")
    with torch.no_grad():
        quantizer.step.fill_(0.5)
    v = w / 0.5
    w = torch.where(((v > 3) & (v < 3.5)) | ((v < -4) & (v > -4.5)), 0.2, w)
    assert ((w / 0.5 > 3.5).any() and (w / 0.5 < -4.5).any()).item()
    dw = grads(quantizer, w, g)
    x, step = w.clone().requires_grad_(), torch.tensor([0.5], requires_grad=True)
    factor = (3 * w.numel()) ** -0.5
    y = torch._fake_quantize_learnable_per_tensor_affine(x, step, torch.zeros(1), -4, 3, factor)
    (y * g).sum().backward()
    assert torch.equal(quantizer(w).detach(), y.detach())
    assert torch.equal(dw, x.grad)
    # Two sums of 240 products in fp32, in another order.
    torch.testing.assert_close(quantizer.step.grad.view(1), step.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["tensor", "group"])
def test_lsq_is_the_derivative_of_its_surrogate(granularity: str) -> None:
    """Central differences, in fp64, of s * clip(w / s + r) with the rounding error r held."""
    table = torch.tensor(parse("nf4").table, dtype=torch.float64)
    w, g = torch.randn(4, 32, dtype=torch.float64), torch.randn(4, 32, dtype=torch.float64)
    quantizer = qat.LSQ(w, "nf4_g16_fp32", granularity)
    dw = grads(quantizer, w, g)
    step = quantizer.step.detach().double()

    def expand(s: Tensor) -> Tensor:
        return (s if granularity == "group" else s.expand(4, 2)).repeat_interleave(16, 1)

    v = w / expand(step)
    nearest = table[(v[..., None] - table).abs().argmin(-1)]
    inside = v.abs() < 1
    assert not bool(inside.all())

    def surrogate(w: Tensor, s: Tensor) -> Tensor:
        scaled = torch.where(inside, w / expand(s) + (nearest - v), nearest)
        return ((scaled * expand(s)) * g).sum()

    eps = 1e-6
    for at in ((0, 3), (2, 20), (3, 31)):
        move = torch.zeros_like(w)
        move[at] = eps
        slope = (surrogate(w + move, step) - surrogate(w - move, step)) / (2 * eps)
        torch.testing.assert_close(dw[at], slope, rtol=1e-6, atol=1e-7)
    sizes = 16 if granularity == "group" else w.numel()
    for at in torch.cartesian_prod(*(torch.arange(s) for s in step.shape)).tolist():
        move = torch.zeros_like(step)
        move[tuple(at)] = eps
        slope = (surrogate(w, step + move) - surrogate(w, step - move)) / (2 * eps)
        # Codes values, v and their sum are fp32: K eps around terms of size 1.
        got = quantizer.step.grad[tuple(at)].double()
        torch.testing.assert_close(got, slope / sizes**0.5, rtol=1e-4, atol=1e-5)


def test_lsq_refuses() -> None:
    w = ODD_WEIGHTS["random"]
    for format in ("uint4", "kmeans4", "nf4_g64_dq8"):
        with pytest.raises(ValueError, match="format must have a table, no zeros"):
            qat.LSQ(w, format)
    with pytest.raises(ValueError, match="granularity must be one of"):
        qat.LSQ(w, granularity="row")
    quantizer = qat.LSQ(w)
    with torch.no_grad():
        quantizer.step.fill_(-0.1)
    with pytest.raises(ValueError, match="step must be positive and finite, got -0.1"):
        quantizer(w)


def test_lsq_activation() -> None:
    x, g = torch.randn(5, 3, 4) * 3, torch.randn(5, 3, 4)
    quantizer = qat.LSQActivation(3, signed=True)
    with pytest.raises(ValueError, match="step has no value yet"):
        quantizer.eval()(x)
    quantizer.train()(x)
    torch.testing.assert_close(quantizer.step.detach(), 2 * x.abs().mean() / 3**0.5)
    with torch.no_grad():
        quantizer.step.fill_(0.5)
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf)
    assert torch.equal(y.detach(), (x / 0.5).round().clamp(-4, 3) * 0.5)
    (y * g).sum().backward()
    v = x / 0.5
    inside = (v > -4) & (v < 3)
    assert torch.equal(leaf.grad, g * inside)
    slope = torch.where(inside, v.round() - v, v.clamp(-4, 3))
    expected = (g * slope).sum() / (3 * 12) ** 0.5
    torch.testing.assert_close(quantizer.step.grad, expected)
    assert qat.LSQActivation(2)(torch.tensor([-1.0, 0.0, 9.0])).min() == 0


# Binary and ternary


def test_bwn() -> None:
    w, g = ODD_WEIGHTS["random"].clone(), torch.randn(N, K)
    w[:, :2] = torch.tensor([1.0, -1.0])  # the ends of where alpha counts
    quantizer = qat.BWN(w)
    alpha = w.double().abs().mean(1, keepdim=True).float()
    assert torch.equal(quantizer(w), alpha * torch.where(w > 0, 1.0, -1.0))
    expected = g * (1 / K + alpha * (w.abs() <= 1))
    torch.testing.assert_close(grads(quantizer, w, g), expected, rtol=1e-6, atol=0)
    assert not bool((w.abs() <= 1).all())
    torch.testing.assert_close(quantizer(w), lowbit.quantize(w, "binary_row_fp32").dequantize())


def test_ttq() -> None:
    w, g = ODD_WEIGHTS["random"].clamp(-1.2), torch.randn(N, K)
    quantizer = qat.TTQ(w, threshold=0.3)
    delta = 0.3 * w.abs().max()
    above, below = w > delta, w < -delta
    torch.testing.assert_close(quantizer.wp.detach(), w[above].mean())
    torch.testing.assert_close(quantizer.wn.detach(), -w[below].mean())
    with torch.no_grad():
        quantizer.wp.fill_(0.75), quantizer.wn.fill_(1.5)
    assert torch.equal(quantizer(w).detach(), 0.75 * above - 1.5 * below)
    dw = grads(quantizer, w, g)
    assert torch.equal(dw, torch.where(above, 0.75 * g, torch.where(below, 1.5 * g, g)))
    torch.testing.assert_close(quantizer.wp.grad, g[above].sum())
    torch.testing.assert_close(quantizer.wn.grad, -g[below].sum())


def test_dorefa() -> None:
    w, g = torch.randn(N, K, dtype=torch.float64), torch.randn(N, K, dtype=torch.float64)
    quantizer = qat.DoReFa(w.float(), 2)

    def unit(w: Tensor) -> Tensor:
        return w.tanh() / (2 * w.tanh().abs().max()) + 0.5

    expected = 2 * (3 * unit(w)).round() / 3 - 1
    torch.testing.assert_close(quantizer(w), expected, rtol=0, atol=1e-6)
    assert torch.autograd.gradcheck(
        lambda w: quantizer.surrogate(w, None, None), w.requires_grad_()
    )
    leaf = w.detach().clone().requires_grad_()
    (2 * unit(leaf) * g).sum().backward()
    torch.testing.assert_close(grads(quantizer, w.detach(), g), leaf.grad)
    with pytest.raises(ValueError, match="bits must be 2 or more, got 1: use BWN"):
        qat.DoReFa(w, 1)


def test_what_does_not_fit() -> None:
    w = ODD_WEIGHTS["random"]
    for format in ("ternary_row_fp32", "tq2_0"):
        with pytest.raises(ValueError, match=r"format must have the table \(-1.0, 1.0\)"):
            qat.BWN(w, format)
    with pytest.raises(ValueError, match="method 'twn' needs a format with the table"):
        qat.TWN(w, "binary_row")(w)
    with pytest.raises(ValueError, match="threshold must be in"):
        qat.TTQ(w, 1.0)


# Activations


def test_pact() -> None:
    x = torch.tensor([-1.0, 0.0, 0.3, 1.4, 1.5, 2.0])
    g = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    quantizer = qat.PACT(2, clip=1.5)
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf)
    torch.testing.assert_close(y.detach(), torch.tensor([0.0, 0.0, 0.5, 1.5, 1.5, 1.5]))
    half = 0.5 * (x.abs() - (x - 1.5).abs() + 1.5)
    torch.testing.assert_close(y.detach(), (half * 3 / 1.5).round() * 1.5 / 3)
    (y * g).sum().backward()
    assert leaf.grad.tolist() == [0.0, 2.0, 4.0, 8.0, 0.0, 0.0]
    assert quantizer.clip.grad.item() == 48.0
    with torch.no_grad():
        quantizer.clip.fill_(-1)
    with pytest.raises(ValueError, match="clip must be positive, got -1"):
        quantizer(x)
    for bits in (0, 9, 2.0):
        with pytest.raises(ValueError, match="bits must be 1 to 8"):
            qat.PACT(bits)


def test_dorefa_activation() -> None:
    x = torch.tensor([-0.2, 0.1, 0.6, 1.0, 1.3])
    leaf = x.clone().requires_grad_()
    y = qat.DoReFaActivation(2)(leaf)
    torch.testing.assert_close(y.detach(), torch.tensor([0.0, 0.0, 2 / 3, 1.0, 1.0]))
    y.sum().backward()
    assert leaf.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_int8_activation() -> None:
    x = torch.randn(2, 3, 40).requires_grad_()
    y = qat.Int8Activation()(x)
    top = x.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(y, (x * 127 / top).round() * top / 127)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_xnor_activation() -> None:
    x = torch.randn(2, 3, 40) * 2
    x[..., :2] = torch.tensor([1.0, -1.0])  # the ends of where gradients pass
    x.requires_grad_()
    y = qat.XNORActivation()(x)
    scale = x.detach().abs().mean(-1, keepdim=True)
    torch.testing.assert_close(y.detach(), scale * torch.where(x >= 0, 1.0, -1.0))
    y.sum().backward()
    torch.testing.assert_close(x.grad, scale * (x.abs() <= 1))
