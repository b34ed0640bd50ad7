"""Cases of `test_strides.py`: structured, pruned and low-rank weights, experts, siblings and convolutions."""

from __future__ import annotations

import functools
from typing import Any

import torch
from strided import Case, case
from strided_layers import module_case
from strided_products import of_operands, operands_of, weight
from test_block_codecs import made as blocks
from test_pruned_linear import pruned
from test_structured import random_structured
from torch import Tensor, nn

import lowbit
from lowbit.nn import PrunedLinear
from lowbit.ops.conv import conv
from lowbit.ops.experts import linear_experts
from lowbit.ops.lowrank import low_rank_linear
from lowbit.ops.pruned import operands_of as pruned_operands
from lowbit.ops.pruned import pruned_linear
from lowbit.ops.terms import matrix
from lowbit.ops.weights import embedding
from lowbit.reference import to_rows
from lowbit.structured import BLOCK_BYTES
from lowbit.weights.quantized import QuantTensor

N, K = 70, 96
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STRUCTURED = ("e8p", "e8p_rvq3", "trellis2", "trellis4_g24_fp32", "vq8_d4", "vq12_d8_g8")


def structured(name: str) -> QuantTensor:
    return blocks(name, N, 256)[0] if name in BLOCK_BYTES else random_structured(name, N, K)


for name in (*STRUCTURED, "vq9_d4_o2", *BLOCK_BYTES):

    @case(f"linear {name}")
    def _(m: int, name: str = name) -> Case:
        qt = structured(name)
        given = {"x": torch.randn(m, qt.shape[1]), "bias": torch.randn(N), "i": torch.arange(m)}

        def call(x: Tensor, bias: Tensor, i: Tensor) -> Any:
            return [lowbit.linear(x.to(d), qt, bias) for d in DTYPES] + [embedding(i, qt)]

        return Case(call, given, ("x", "i"))


for name in (*STRUCTURED, *BLOCK_BYTES):

    @case(f"operands {name}")
    def _(m: int, name: str = name) -> Case:
        return of_operands(m, matrix(structured(name)))


@case("pruned_linear")
def _(m: int) -> Case:
    w = pruned_operands(pruned(N, K))

    def call(x: Tensor, bf16: Tensor, bias: Tensor) -> Any:
        rows = [pruned_linear(each, w) for each in (x, bf16)]
        return [*rows, lowbit.linear(x, pruned(N, K), bias)]

    x = torch.randn(m, 2, K)
    return Case(call, {"x": x, "bf16": x.bfloat16(), "bias": torch.randn(N)}, ("x", "bf16"))


@case("pruned_linear's weight")
def _(m: int) -> Case:
    w, x = pruned_operands(pruned(N, K)), torch.randn(m, K)
    names = ("entries", "starts", "table")
    given = {name: getattr(w, name) for name in names}
    return Case(lambda **t: pruned_linear(x, w._replace(**t)), given, refused=names)


@case("pruned_linear's gradients")
def _(m: int) -> Case:
    w = pruned_operands(pruned(N, K))

    def call(x: Tensor, grad: Tensor) -> Any:
        leaves = [x.detach().requires_grad_(), w.table.clone().requires_grad_()]
        y = pruned_linear(leaves[0], w._replace(table=leaves[1]))
        return torch.autograd.grad(y, leaves, grad)

    given = {"x": torch.randn(m, K), "grad": torch.randn(m, N)}
    return Case(call, given, ("x", "grad"), exact=False)


@case("low_rank_linear")
def _(m: int) -> Case:
    given = {"x": torch.randn(m, K), "left": torch.randn(N, 5), "right": torch.randn(5, K)}
    return Case(low_rank_linear, given, ("x",))


@case("low_rank_linear of bf16")
def _(m: int) -> Case:
    given = {"x": torch.randn(m, K), "left": torch.randn(N, 5), "right": torch.randn(5, K)}
    given = {name: t.bfloat16() for name, t in given.items()}
    return Case(low_rank_linear, given, ("x",))


for layout in ("n16", "canonical"):

    @case(f"linear_experts {layout}")
    def _(m: int, layout: str = layout) -> Case:
        weights = [weight(name, layout).operands for name in ("nf4", "uint4_zfloat", "int4_g32")]

        def call(x: Tensor, counts: Tensor, bias: Tensor) -> Tensor:
            if int(counts.sum()) != len(x):  # the same count for each, or no row at all
                x = x[:1].expand(int(counts.sum()), K)
            return linear_experts(x, counts, weights, [bias, None, bias])

        given = {
            "x": torch.randn(m, K),
            "counts": torch.tensor([m // 2, 0, m - m // 2]),
            "bias": torch.randn(N),
        }
        return Case(call, given, exact=layout == "n16")


class Siblings(nn.Module):
    """Three layers that are called with one x and computed in one call of an op."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            lowbit.nn.QuantLinear.from_linear(nn.Linear(K, N, bias=bias), format)
            for bias, format in ((True, "nf4"), (False, "q5_1"), (True, "nf4"))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


@case("linear_siblings")
def _(m: int) -> Case:
    model = Siblings().eval()
    assert lowbit.nn.fuse(model) == 1

    def call(x: Tensor) -> Any:
        with torch.no_grad():
            return model(x)

    return Case(call, {"x": torch.randn(m, 3, K)}, ("x",))


WINDOWS: dict[str, tuple[int, dict[str, Any]]] = {
    "3x3": (1, {"kernel_size": (3, 3), "padding": 1}),
    "uneven": (1, {"kernel_size": (2, 3), "padding": (0, 1, 2, 0), "stride": (2, 1)}),
    "1x1": (1, {"kernel_size": (1, 1)}),
    "depthwise": (12, {"kernel_size": (3, 3), "padding": 1}),
    "groups": (3, {"kernel_size": (3, 1)}),
    "1-D": (1, {"kernel_size": (3,), "dilation": 2}),
    "3-D": (1, {"kernel_size": (1, 2, 3), "stride": 2}),
}
for name in WINDOWS:
    for format in ("nf4", "int4_g32_a8b32"):
        if WINDOWS[name][0] > 1 and format != "nf4":
            continue  # products of groups take no int8 activations

        @case(f"conv {name} {format}")
        def _(m: int, name: str = name, format: str = format) -> Case:
            groups, window = WINDOWS[name]
            size = {1: (19,), 2: (6, 7), 3: (3, 6, 7)}[len(window["kernel_size"])]
            filters = torch.randn(N - N % groups, 12 // groups, *window["kernel_size"])
            qt = lowbit.quantize(to_rows(filters), format)

            def call(x: Tensor, bias: Tensor) -> Any:
                given = [x.to(d) for d in DTYPES]
                ys = [conv(each, qt, bias, groups=groups, **window) for each in given]
                return ys

            given = {"x": torch.randn(m, 12, *size), "bias": torch.randn(len(filters))}
            # Products of groups are torch's.
            return Case(call, given, ("x",), exact=groups == 1)


@case("conv's weight")
def _(m: int) -> Case:
    w = matrix(lowbit.quantize(torch.randn(N, 12 * 9), "uint4_zfloat"))
    x, given = torch.randn(m, 12, 6, 7), operands_of(w)
    numbers = ((3, 3), (1, 1), (0,) * 4, (1, 1), 1)

    def call(**t: Tensor) -> Tensor:
        return torch.ops.lowbit.conv(x, None, *w._replace(**t), None, *numbers, None)

    return Case(call, given, refused=tuple(given))


for convolution, size in (
    (nn.Conv1d(4, 7, 3, padding=1), (4, 9)),
    (nn.Conv3d(4, 7, 2), (4, 3, 4, 5)),
    (nn.ConvTranspose1d(4, 7, 3, stride=2), (4, 9)),
    (nn.ConvTranspose2d(4, 7, 3, stride=2, padding=1), (4, 5, 6)),
    (nn.ConvTranspose3d(4, 7, 2), (4, 3, 4, 5)),
):
    name = f"Quant{type(convolution).__name__}"
    layer = getattr(lowbit.nn, name)
    module_case(name, functools.partial(layer.from_conv, convolution, "nf4"), size)
module_case("PrunedLinear", lambda: PrunedLinear.from_pruned(pruned(N, K), torch.randn(N)))
