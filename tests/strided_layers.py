"""Cases of `test_strides.py`: FP8, the optimizer, layers and quantizers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from strided import Case, case
from test_qat_quantizers import QUANTIZERS
from torch import Tensor, nn

import lowbit
from fp8_operands import operand
from fp8_values import E4M3, E5M2
from lowbit import fp8, qat
from lowbit.float8 import GRANULARITIES
from lowbit.nn import fp8_activations as activations
from lowbit.ops import adamw as optim
from lowbit.ptq.calibration import InputStatistics
from lowbit.ptq.smooth import smooth_scales

N, K = 70, 96


for granularity in GRANULARITIES:

    @case(f"fp8.quantize {granularity}")
    def _(m: int, g: str = granularity) -> Case:
        x = torch.randn(m, K)
        given = {"x": x, "maxima": fp8.absmax(x, g)}
        call = lambda x, maxima: [  # noqa: E731
            *fp8.quantize(x, E4M3, g, maxima=maxima), *fp8.quantize(x.bfloat16(), E5M2, g, transposed=True),
            fp8.absmax(x, g), *fp8.quantize(x, E4M3, g, rounding="stochastic", seed=3),
        ]  # fmt: skip
        return Case(call, given, ("x", "maxima")[: 1 + bool(given["maxima"].dim())])

    @case(f"fp8.dequantize {granularity}")
    def _(m: int, g: str = granularity) -> Case:
        q, scale = operand(m, K, g)
        return Case(
            fp8.dequantize, {"q": q, "scale": scale}, ("q", "scale")[: 1 + bool(scale.dim())]
        )

    @case(f"fp8.scaled_mm {granularity}")
    def _(m: int, g: str = granularity) -> Case:
        (a, scale_a), (b, scale_b) = operand(m, K, g), operand(N, K, g, E5M2)
        given = {"a": a, "b": b, "scale_a": scale_a, "scale_b": scale_b, "bias": torch.randn(N)}
        call = lambda **t: [fp8.scaled_mm(**t), *fp8.scaled_mm(**t, requantize="1x16")]  # noqa: E731
        return Case(call, given, ("a", "scale_a")[: 1 + bool(scale_a.dim())])


@case("fp8.cast")
def _(m: int) -> Case:
    return Case(fp8.cast, {"x": torch.randn(m, 3, 5, 4) * 300}, ("x",))


@case("fp8 of 4-D x")
def _(m: int) -> Case:
    call = lambda x: [*fp8.quantize(x, E4M3, "1x16"), fp8.absmax(x, "row")]  # noqa: E731
    return Case(call, {"x": torch.randn(m, 3, 5, 32)}, ("x",))


@case("FP8AdamW")
def _(m: int) -> Case:
    numbers = (0.9, 0.999, 1e-8, 0.01, False)

    def call(param: Tensor, grad: Tensor, step: Tensor, lr: Tensor) -> Any:
        param, states = param.resolve_neg(), []  # an optimizer may write to its parameter
        for _ in range(2):
            states += [torch.zeros(param.shape).to(E4M3), torch.ones(3, -(-param.numel() // 128))]
        if 0 in param.stride():  # an expanded one cannot be written to
            param = param.clone(memory_format=torch.contiguous_format)
        optim.fp8_adamw(param, grad, *states, step, lr, *numbers)
        return [param, *states]

    given = {
        "param": torch.randn(m, 65),
        "grad": torch.randn(m, 65),
        "step": torch.tensor(1.0),
        "lr": torch.tensor(0.1),
    }
    return Case(call, given, ("param", "grad"))


@case("FP8AdamW's states")
def _(m: int) -> Case:
    def call(codes: Tensor, terms: Tensor) -> Any:
        p, others = torch.ones(m, 300), [torch.zeros(m, 300).to(E4M3), torch.ones_like(terms)]
        numbers = (torch.tensor(1.0), torch.tensor(0.1), 0.9, 0.999, 1e-8, 0.01, False)
        states = [t.clone() if t.is_contiguous() else t for t in (codes, terms)]
        optim.fp8_adamw(p, p, *states, *others, *numbers)
        return p

    given = {"codes": torch.zeros(m, 300).to(E4M3), "terms": torch.ones(3, -(-m * 300 // 128))}
    return Case(call, given, refused=("codes", "terms"))


def with_gradient(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """The result, and gradients for all operands but the last, which is the gradient of the result."""

    def call(*, grad: Tensor, **tensors: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, grad)]

    return call


ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "fp8_silu": (activations.fp8_silu, 1),
    "fp8_gelu": (activations.fp8_gelu, 1),
    "fp8_mul": (activations.fp8_mul, 2),
    "fp8_add": (lambda x, y: activations.fp8_add(x, y)[0], 2),
}
for name in ACTIVATIONS:

    @case(name)
    def _(m: int, name: str = name) -> Case:
        function, count = ACTIVATIONS[name]
        given = {n: torch.randn(m, 3, K) for n in ("x", "y")[:count]}
        return Case(
            with_gradient(function),
            {**given, "grad": torch.randn(m, 3, K)},
            (*given, "grad"),
            exact=False,
        )


def module_case(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...] = (K,)) -> None:
    @case(name)
    def _(m: int) -> Case:
        layer = make()
        # The product of one and the mean of the other are torch's.
        exact = not isinstance(layer, (qat.FakeQuantLinear, qat.XNORActivation))
        return Case(lambda x: layer(x), {"x": torch.rand(m, *shape)}, ("x",), exact=exact)


dense = nn.Linear(K, N)
for name, make in {
    "LLMInt8Linear": lambda: lowbit.nn.LLMInt8Linear.from_linear(dense, threshold=0.9),
    "BinaryLinear": lambda: lowbit.nn.BinaryLinear.from_linear(dense, "binary"),
    "FP8Linear": lambda: lowbit.nn.FP8Linear.from_linear(dense),
    "FP8Linear, blocks": lambda: lowbit.nn.FP8Linear.from_linear(dense, "128x128"),
    "FakeQuantLinear": lambda: qat.FakeQuantLinear.from_linear(
        dense, qat.Spec("int4", functools.partial(qat.PACT, 4))
    ),
    "BitLinear": lambda: qat.BitLinear(K, N),
    "DoReFaActivation": lambda: qat.DoReFaActivation(4),
    "XNORActivation": qat.XNORActivation,
    "LSQActivation": lambda: qat.LSQActivation(4),
}.items():
    module_case(name, make)
for kernel in (1, 3):
    for groups in ("zeros", "circular"):
        conv = nn.Conv2d(4, 7, kernel, stride=2, padding=kernel // 2, padding_mode=groups)
        module_case(
            f"QuantConv2d {kernel}x{kernel} {groups}",
            functools.partial(lowbit.nn.QuantConv2d.from_conv, conv, "nf4"),
            (4, 9, 8),
        )

for granularity in ("tensor", "row", "128x128"):

    @case(f"FP8Linear's parameters, {granularity}")
    def _(m: int, granularity: str = granularity) -> Case:
        layer = lowbit.nn.FP8Linear(K, N, granularity=granularity)

        def call(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Any:
            leaves = [t.detach().requires_grad_() for t in (x, weight)]
            y = torch.func.functional_call(layer, {"weight": leaves[1], "bias": bias}, (leaves[0],))
            return [y, *torch.autograd.grad(y, leaves, grad)]

        given = {
            "x": torch.randn(m, K), "weight": torch.randn(N, K), "bias": torch.randn(N), "grad": torch.randn(m, N),
        }  # fmt: skip
        return Case(call, given)


for name, make_quantizer in QUANTIZERS.items():

    @case(f"quantizer {name}")
    def _(m: int, make: Callable[..., Any] = make_quantizer) -> Case:
        call = lambda w: [*make(w).quant_tensor(w).tensors.values(), make(w)(w)]  # noqa: E731
        return Case(call, {"w": torch.randn(6, 40)})


@case("statistics and smooth scales")
def _(m: int) -> Case:
    def call(x: Tensor, w: Tensor) -> Any:
        seen = InputStatistics(K)
        seen.update(x)
        return [seen.absmax, smooth_scales(seen.absmax, [w])]

    return Case(call, {"x": torch.randn(m, K), "w": torch.randn(N, K)})
