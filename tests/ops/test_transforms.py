"""Derivatives of every order and kind: torch.func, forward-mode AD, second derivatives; against a dense layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import lowbit
from lowbit import fp8, int8, qat, reference
from lowbit.formats import parse
from lowbit.nn import fp8_activations as activations
from lowbit.ops.terms import matrix
from weights import random_weight

N, K = 24, 64
# Torch's own jvp compiles decompositions with torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
FORMATS = ("nf4", "uint4_zfloat", "q5_1", "kmeans3_pr", "int3_g64_o2", "nvfp4", "ternary_trits")
Function = Callable[..., Tensor]


def loss(f: Function) -> Function:
    return lambda *args: f(*args).square().sum()


# What is done to a function of x (M, K), and what a dense one gives.
OF_X: dict[str, Callable[[Function, Tensor], Any]] = {
    "vmap": lambda f, x: vmap(f)(x),
    "vmap of columns": lambda f, x: vmap(f, 1, 1)(x.t().contiguous()),
    "grad": lambda f, x: grad(loss(f))(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones(len(x), N, dtype=x.dtype)),
    "per-sample gradients": lambda f, x: vmap(grad(loss(f)))(x),
    "gradient of vmap": lambda f, x: grad(loss(vmap(f)))(x),
    "jvp": lambda f, x: jvp(f, (x,), (x + 1,)),
    "jvp of vmap": lambda f, x: jvp(vmap(f), (x,), (x + 1,)),
    "vmap of jvp": lambda f, x: vmap(lambda x: jvp(f, (x,), (x + 1,)))(x),
    "jacrev": lambda f, x: jacrev(f)(x[0]),
    "jacfwd": lambda f, x: jacfwd(f)(x[0]),
    "hessian": lambda f, x: hessian(loss(f))(x[0]),
    "gradient of gradient": lambda f, x: grad(loss(grad(loss(f))))(x),
    "forward over reverse": lambda f, x: jvp(grad(loss(f)), (x,), (x + 1,)),
    "dual numbers": lambda f, x: dual(f, x),
    "dual numbers without grad": lambda f, x: dual(torch.no_grad()(f), x),
    "double backward": lambda f, x: double_backward(f, x),
    "checkpoint": lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False),
}


def dual(f: Function, x: Tensor) -> Tensor:
    with fwad.dual_level():
        tangent = fwad.unpack_dual(f(fwad.make_dual(x, x + 1))).tangent
    assert tangent is not None
    return tangent


def double_backward(f: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(f)(x), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), x)[0]


def assert_all_close(made: Any, expected: Any, tolerance: float = 2e-5) -> None:
    pairs = zip(pytree.tree_leaves(made), pytree.tree_leaves(expected), strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("transform", OF_X)
@pytest.mark.parametrize("name", FORMATS)
def test_derivatives_for_x(name: str, transform: str) -> None:
    """The first use of a weight is inside of the transform, and the weight serves outside afterwards."""
    qt, bias = random_weight(parse(name), N, K), torch.randn(N)
    w, x = reference.dequantize(qt), torch.randn(5, K)
    made = OF_X[transform](lambda x: lowbit.linear(x, qt, bias), x)
    assert_all_close(made, OF_X[transform](lambda x: F.linear(x, w, bias), x))
    y = x.requires_grad_()
    (g,) = torch.autograd.grad(lowbit.linear(y, qt).sum(), y)
    assert_all_close(g, w.sum(0).expand(5, K))


@pytest.mark.parametrize("transform", OF_X)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_derivatives_in_half_precision(dtype: torch.dtype, transform: str) -> None:
    qt = lowbit.quantize(torch.randn(N, K) / 8, "nf4")
    w, x = qt.dequantize(dtype), torch.randn(5, K).to(dtype)
    made = OF_X[transform](lambda x: lowbit.linear(x, qt), x)
    assert_all_close(made, OF_X[transform](lambda x: F.linear(x, w), x), 0.02)


@pytest.mark.parametrize(
    "transform", ("grad", "jvp", "vmap", "per-sample gradients", "dual numbers")
)
@pytest.mark.parametrize("name", ("nf4", "int3_g64_o2"))
def test_what_follows_a_product(name: str, transform: str) -> None:
    qt, other = (random_weight(parse(name), N, K, seed) for seed in (0, 1))
    w, v = reference.dequantize(qt), reference.dequantize(other)
    x, r = torch.randn(5, K), torch.randn(N)
    expected = OF_X[transform](lambda x: F.silu(F.linear(x, w)) + r, x)
    made = OF_X[transform](
        lambda x: lowbit.linear(x, qt, activation="silu", residual=r.expand(*x.shape[:-1], N)), x
    )
    assert_all_close(made, expected)
    made = OF_X[transform](lambda x: torch.mul(*lowbit.linear_many(x, [qt, other])), x)
    assert_all_close(made, OF_X[transform](lambda x: F.linear(x, w) * F.linear(x, v), x))


@pytest.mark.parametrize("transform", OF_X)
def test_fused_layers(transform: str) -> None:
    """Products that wait for their siblings never come from inside of a transform, or go into one."""
    block = nn.ModuleDict({name: nn.Linear(K, N) for name in ("gate_proj", "up_proj")})
    lowbit.quantize_model(block, "nf4", progress=False)
    lowbit.nn.unfuse(block)
    assert lowbit.nn.fuse(block) == 1
    weights = {name: layer.quant_tensor().dequantize() for name, layer in block.items()}
    x = torch.randn(5, K)

    def both(x: Tensor) -> Tensor:
        return block["gate_proj"](x) * block["up_proj"](x)

    def dense(x: Tensor) -> Tensor:
        return torch.mul(*(F.linear(x, w, block[name].bias) for name, w in weights.items()))

    with torch.no_grad():
        block["gate_proj"](x)  # and the other one waits
    assert_all_close(OF_X[transform](both, x), OF_X[transform](dense, x), 1e-4)
    with torch.no_grad():
        assert_all_close(both(x), dense(x))


# The learnable tensors of a format.
LEARNABLE = {
    "nf4": ("scales", "bias"),
    "uint4_zfloat": ("scales", "zeros"),
    "q5_1": ("scales", "zeros"),
    "kmeans3_g32_fp32": ("scales", "table", "bias"),
    "kmeans3_pr": ("table",),
}
OF_PARAMETERS: dict[str, Callable[[Function, dict[str, Tensor], Tensor], Any]] = {
    "grad": lambda f, p, x: grad(loss(f))(p, x),
    "jvp": lambda f, p, x: jvp(lambda p: f(p, x), (p,), (moved(p),)),
    "jvp of both": lambda f, p, x: jvp(f, (p, x), (moved(p), x)),
    "ensemble": lambda f, p, x: vmap(f, (0, None))({k: torch.stack([v, v * 1.5]) for k, v in p.items()}, x),
    "per-sample gradients": lambda f, p, x: vmap(grad(loss(f)), (None, 0))(p, x),
    "gradient penalty": lambda f, p, x: grad(lambda p: grad(lambda x: loss(f)(p, x))(x).square().sum())(p),
    "Hessian-vector product": lambda f, p, x: jvp(lambda p: grad(loss(f))(p, x), (p,), (moved(p),)),
    "create_graph": lambda f, p, x: second_derivatives(f, p, x),
}  # fmt: skip


def moved(p: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.flip(0) for name, t in p.items()}


def second_derivatives(f: Function, p: dict[str, Tensor], x: Tensor) -> Any:
    leaves = {name: t.clone().requires_grad_() for name, t in p.items()}
    x = x.clone().requires_grad_()
    inputs = [x, *leaves.values()]
    first = torch.autograd.grad(loss(f)(leaves, x), inputs, create_graph=True)
    return torch.autograd.grad(sum(t.square().sum() for t in first), inputs)


@pytest.mark.parametrize("transform", OF_PARAMETERS)
@pytest.mark.parametrize("name", LEARNABLE)
def test_derivatives_for_what_is_learned(name: str, transform: str) -> None:
    layer = lowbit.nn.QuantLinear.from_linear(nn.Linear(K, N), name)
    layer.train_parameters(LEARNABLE[name])
    qt = layer.quant_tensor()
    codes, f = qt.unpack(), qt.format
    parameters = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}
    assert set(parameters) == set(LEARNABLE[name])

    def rounded(t: Tensor | None) -> Tensor | None:  # straight through, as the layer
        return None if t is None else t + (t.detach().to(layer._stored_dtype).float() - t.detach())

    def dense(p: dict[str, Tensor], x: Tensor) -> Tensor:
        scales = rounded(p["scales"]) if "scales" in p else reference.effective_scales(qt)
        zeros = rounded(p["zeros"]) if "zeros" in p else qt.zeros
        values = reference.code_values(codes, f, p.get("table", qt.table))
        return F.linear(
            x, reference.apply_scales(values, f, scales, zeros), p.get("bias", layer.bias)
        )

    x = torch.randn(5, K)
    made = OF_PARAMETERS[transform](lambda p, x: functional_call(layer, p, (x,)), parameters, x)
    assert_all_close(made, OF_PARAMETERS[transform](dense, parameters, x), 1e-4)


def linear() -> nn.Linear:
    return nn.Linear(K, N)


# Layers, and their dense layer if what they compute is that of one.
LAYERS: dict[str, Callable[[], Function]] = {
    "int8 activations": lambda: lowbit.nn.QuantLinear.from_linear(linear(), "int8_row_a8"),
    "LLMInt8Linear": lambda: lowbit.nn.LLMInt8Linear.from_linear(linear(), threshold=1.0),
    "LLMInt8Linear, fixed": lambda: lowbit.nn.LLMInt8Linear.from_linear(
        linear(), threshold=1.0, absmax=torch.linspace(0, 2, K)
    ),
    "FakeQuantLinear": lambda: qat.FakeQuantLinear.from_linear(linear(), qat.Spec("int4")),
    "BitLinear": lambda: qat.BitLinear(K, N),
    "DoReFaActivation": lambda: qat.DoReFaActivation(4),
    "PACT": lambda: qat.PACT(4),
    "XNORActivation": qat.XNORActivation,
    "fp8_silu": lambda: activations.fp8_silu,
    "fp8_mul": lambda: lambda x: activations.fp8_mul(x, x + 1),
    "FP8RMSNorm": lambda: lowbit.nn.FP8RMSNorm(K),
    "FP8LayerNorm": lambda: lowbit.nn.FP8LayerNorm(K),
    "QuantConv2d": lambda: convolution(),
}


def convolution() -> Function:
    layer = lowbit.nn.QuantConv2d.from_conv(nn.Conv2d(4, 3, 3, padding=1), "nf4")
    return lambda x: layer(x.unflatten(-1, (4, 4, 4))).flatten(-3)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_reverse_agree(name: str) -> None:
    """<u, J v> = <J^T u, v>: tangents and gradients are those of one linear map; and a batch is its samples."""
    layer = LAYERS[name]()
    x, v = torch.rand(3, K) * 0.9, torch.randn(3, K)
    y, tangent = jvp(layer, (x,), (v,))
    u = torch.randn_like(y)
    (g,) = vjp(layer, x)[1](u)
    torch.testing.assert_close((u * tangent).sum(), (g * v).sum(), rtol=1e-4, atol=1e-4)
    assert bool(tangent.any())
    leaf = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(layer(leaf), leaf, u)
    # The plain backward of the FP8 activations sees x in FP8.
    torch.testing.assert_close(g, plain, **({"rtol": 0.1, "atol": 0.1} if "8" in name else {}))
    torch.testing.assert_close(dual(layer, x), jvp(layer, (x,), (x + 1,))[1])
    if "LLM" not in name or "fixed" in name:  # whose outliers are those of the batch
        torch.testing.assert_close(vmap(layer)(x), layer(x), rtol=1e-4, atol=1e-4)


def static() -> nn.Module:
    layer = lowbit.nn.QuantLinear.from_linear(linear(), "int8_row_a8")
    layer.set_input_scale(0.03)
    return layer


WITHOUT: dict[str, Callable[[], Function]] = {
    "static scale": static,
    "BinaryLinear": lambda: lowbit.nn.BinaryLinear.from_linear(linear(), "binary"),
    "FP8Linear": lambda: lowbit.nn.FP8Linear.from_linear(linear()),
    "frozen FP8Linear": lambda: (
        lowbit.nn.FP8Linear.from_linear(linear()).requires_grad_(False).eval()
    ),
    "fp8 round trip": lambda: lambda x: fp8.dequantize(*fp8.quantize(x)),
    "fp8.cast": lambda: lambda x: fp8.cast(x).float(),
    "fp8.absmax": lambda: lambda x: fp8.absmax(x, "row"),
    "int8.quantize": lambda: lambda x: int8.quantize(x.reshape(-1, K))[1],
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_derivatives_says_so(name: str) -> None:
    """Never a tangent or a gradient of 0."""
    layer, x = WITHOUT[name](), torch.randn(3, K)
    frozen = lambda x: torch.no_grad()(layer)(x)  # noqa: E731
    for call in (
        lambda: jvp(layer, (x,), (x,)),
        lambda: dual(layer, x),
        lambda: dual(frozen, x),
        lambda: grad(loss(layer))(x),
        lambda: jacrev(layer)(x[0]),
        lambda: jacfwd(layer)(x[0]),
        lambda: vmap(grad(loss(layer)))(x),
    ):
        with pytest.raises(
            NotImplementedError, match="has no (gradients|derivatives)|plain autograd alone"
        ):
            call()
    if name != "FP8Linear":
        with torch.no_grad():
            assert vmap(layer)(x).shape[0] == 3


def test_raw_ops_give_no_silent_zeros() -> None:
    qt, x = lowbit.quantize(torch.randn(N, K), "nf4"), torch.randn(3, K)
    w = matrix(qt)
    op = torch.ops.lowbit.linear
    assert_all_close(jvp(lambda x: op(x, *w, None), (x,), (x,))[1], x @ qt.dequantize().t())
    with (
        fwad.dual_level(),
        pytest.raises(NotImplementedError, match="lowbit::linear has no derivatives"),
    ):
        op(fwad.make_dual(x, x), *w, None)


def test_embedding_in_a_batch() -> None:
    layer = lowbit.nn.QuantEmbedding.from_embedding(nn.Embedding(50, 32), "nf4")
    ids = torch.randint(0, 50, (3, 4))
    assert torch.equal(vmap(layer)(ids), layer(ids))
    assert torch.equal(vmap(layer, 1)(ids), layer(ids.t()))


@pytest.mark.parametrize("first", ("inference mode", "grad", "vmap", "jvp"))
@pytest.mark.parametrize("name", ("nf4", "nf4_g64_dq8", "kmeans3_pr", "int3_g64_o2", "mxfp4"))
def test_the_first_use_leaves_no_trace(name: str, first: str) -> None:
    """What a weight keeps is as if it was made outside of any mode, whatever the mode of the first call."""
    x = torch.randn(3, K)
    use: dict[str, Callable[[Function], Any]] = {
        "inference mode": torch.inference_mode()(lambda f: f(x)),
        "grad": lambda f: grad(loss(f))(x),
        "vmap": lambda f: vmap(f)(x),
        "jvp": lambda f: jvp(f, (x,), (x,)),
    }
    inside = torch.inference_mode() if first == "inference mode" else torch.enable_grad()
    with inside:
        qt = lowbit.quantize(torch.randn(N, K), name)
        layer = lowbit.nn.QuantLinear.from_linear(nn.Linear(K, N), name)
        fp8_layer = lowbit.nn.FP8Linear(K, N).eval()
    for f in (lambda x: lowbit.linear(x, qt), layer):
        use[first](f)
        leaf = x.clone().requires_grad_()
        f(leaf).sum().backward()
        assert_all_close(
            leaf.grad,
            torch.ones(3, N) @ (qt if f is not layer else layer.quant_tensor()).dequantize(),
        )
    assert not any(t.is_inference() for t in layer.quant_tensor().tensors.values())
    if first == "inference mode":
        use[first](fp8_layer.requires_grad_(False))
    assert fp8_layer._kept is None or not fp8_layer._kept[1].q.is_inference()


@pytest.mark.parametrize("transform", ("grad", "vmap", "per-sample gradients", "jvp"))
def test_transforms_are_compiled(transform: str) -> None:
    layer, x = lowbit.nn.QuantLinear.from_linear(nn.Linear(K, N), "nf4"), torch.randn(5, K)
    call = lambda x: OF_X[transform](layer, x)  # noqa: E731
    torch._dynamo.reset()
    made = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    assert_all_close(made, call(x))
