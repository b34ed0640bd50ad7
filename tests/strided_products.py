"""Cases of `test_strides.py`: products with packed weights, of float, int8 and binary x, and what is near them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from strided import Case, case
from torch import Tensor

import lowbit
from lowbit import _C, int8, layouts
from lowbit.formats import parse
from lowbit.layouts import KernelWeight, Operands
from lowbit.layouts.operands import TENSORS
from lowbit.ops.hadamard import hadamard
from lowbit.ops.weights import embedding
from lowbit.weights.quantized import QuantTensor
from weights import random_weight

N, K = 70, 96


def weight(name: str, layout: str = "n16") -> KernelWeight:
    return layouts.to_kernel(random_weight(parse(name), N, K), layout)


def operands_of(w: Operands) -> dict[str, Tensor]:
    found = {name: getattr(w, name) for name in TENSORS}
    return {name: t for name, t in found.items() if t is not None}


def of_operands(m: int, w: Operands) -> Case:
    """The ops that read a weight, whose tensors are refused unless they lie in order."""
    x, given = torch.randn(m, w.k), operands_of(w)

    def call(**t: Tensor) -> Any:
        made = w._replace(**t)
        return [
            torch.ops.lowbit.linear(x, *made, None),
            torch.ops.lowbit.dequantize(*made, torch.float32),
            torch.ops.lowbit.embedding(torch.arange(m), *made, torch.float16),
        ]

    return Case(call, given, refused=tuple(given))


def cases_of(*names: str) -> Iterator[tuple[str, str]]:
    """Layouts and formats; one format for Triton's interpreter, which is slow."""
    yield from itertools.product(("n16", "canonical"), names)
    yield "k16", names[0]


for dtype in (torch.float32, torch.bfloat16):
    for layout, name in cases_of("nf4", "uint4_zfloat", "kmeans3_pr", "int8_row_a8"):

        @case(f"linear {name} {layout} {dtype}")
        def _(m: int, name: str = name, layout: str = layout, dtype: torch.dtype = dtype) -> Case:
            w = weight(name, layout)
            given = {"x": torch.randn(m, K).to(dtype), "bias": torch.randn(N)}
            return Case(
                lambda x, bias: lowbit.linear(x, w, bias), given, ("x",), exact=layout == "n16"
            )


for dtype, layout in itertools.product((torch.float32, torch.bfloat16), ("n16", "canonical")):

    @case(f"epilogue {layout} {dtype}")
    def _(m: int, layout: str = layout, dtype: torch.dtype = dtype) -> Case:
        w = weight("nf4", layout)
        given = {
            name: torch.randn(m, size).to(dtype)
            for name, size in (("x", K), ("gate", N), ("residual", N))
        }
        call = lambda x, gate, residual, bias: lowbit.linear(  # noqa: E731
            x, w, bias, activation="silu", gate=gate, residual=residual
        )
        return Case(
            call,
            {**given, "bias": torch.randn(N)},
            ("x", "gate", "residual"),
            exact=layout == "n16",
        )

    @case(f"outliers {layout} {dtype}")
    def _(m: int, layout: str = layout, dtype: torch.dtype = dtype) -> Case:
        w = weight("int3_g64_o2", layout)
        given = {name: torch.randn(m, size).to(dtype) for name, size in (("x", K), ("residual", N))}
        call = lambda x, residual, bias: lowbit.linear(x, w, bias, residual=residual)  # noqa: E731
        return Case(
            call, {**given, "bias": torch.randn(N)}, ("x", "residual"), exact=layout == "n16"
        )

    @case(f"linear_many {layout} {dtype}")
    def _(m: int, layout: str = layout, dtype: torch.dtype = dtype) -> Case:
        weights = [weight("nf4", layout), weight("q5_1", layout)]
        given = {"x": torch.randn(m, K).to(dtype), "bias": torch.randn(N)}
        call = lambda x, bias: lowbit.linear_many(x, weights, [bias, None])  # noqa: E731
        return Case(call, given, ("x",), exact=layout == "n16")


@case("linear of 3-D x")
def _(m: int) -> Case:
    w = weight("nf4")
    return Case(lambda x: lowbit.linear(x, w), {"x": torch.randn(m, 3, K)}, ("x",))


@case("gradients")
def _(m: int) -> Case:
    w = weight("kmeans3_g32_fp32").operands
    learned = [t.clone().requires_grad_() for t in (w.scales, w.table)]

    def call(x: Tensor, grad: Tensor, bias: Tensor) -> Any:
        leaves = [x.detach().requires_grad_(), bias.detach().requires_grad_()]
        given = w._replace(scales=learned[0], table=learned[1])
        y = torch.ops.lowbit.linear_trainable(leaves[0], *given, leaves[1], None)
        return torch.autograd.grad(y, [*leaves, *learned], grad)

    given = {"x": torch.randn(m, K), "grad": torch.randn(m, N), "bias": torch.randn(N)}
    return Case(call, given, ("x", "grad"), exact=False)


for layout, name in cases_of("nf4", "uint4_zfloat", "kmeans3_pr"):

    @case(f"operands {name} {layout}")
    def _(m: int, layout: str = layout, name: str = name) -> Case:
        return of_operands(m, weight(name, layout).operands)

    @case(f"embedding {name} {layout}")
    def _(m: int, layout: str = layout, name: str = name) -> Case:
        w = weight(name, layout)
        given = {"indices": torch.randint(0, N, (m, 4)), "int32": torch.randint(0, N, (m,)).int()}
        call = lambda indices, int32: [embedding(i, w) for i in (indices, int32)]  # noqa: E731
        return Case(call, given, ("indices", "int32"))

    @case(f"codebook_grad {name} {layout}")
    def _(m: int, layout: str = layout, name: str = name) -> Case:
        w = weight(name, layout).operands
        wanted = [t is not None and t.is_floating_point() for t in (w.scales, w.zeros, w.table)]
        wanted[2] = wanted[2] and w.format.codec == "lut"
        call = lambda grad: torch.ops.lowbit.codebook_grad(grad, *w, wanted)  # noqa: E731
        return Case(call, {"grad": torch.randn(N, K)})


@case("hadamard")
def _(m: int) -> Case:
    given = {"x": torch.randn(m, 2, 48), "signs": torch.randn(48)}
    call = lambda x, signs: [hadamard(x, signs, transposed=t) for t in (False, True)]  # noqa: E731
    return Case(call, given, ("x",), exact=False)


@case("embedding with outliers")
def _(m: int) -> Case:
    w = weight("int3_g64_o2")
    return Case(lambda i: embedding(i, w), {"i": torch.randint(0, N, (m, 4))}, ("i",))


@case("outlier operands")
def _(m: int) -> Case:
    term, x = weight("int3_g64_o2").sparse, torch.randn(m, K)
    call = lambda columns, values: torch.ops.lowbit.sparse_linear(x, columns, values)  # noqa: E731
    return Case(call, term._asdict(), refused=("columns", "values"))


for name in ("nf4", "uint4_zfloat", "kmeans3_pr", "nf4_g64_dq8", "nvfp4", "mxfp4", "int3_g64_o2"):

    @case(f"QuantTensor {name}")
    def _(m: int, name: str = name) -> Case:
        qt, x = random_weight(parse(name), N, K), torch.randn(m, K)

        def call(**tensors: Tensor) -> Any:
            given = QuantTensor(qt.format, qt.shape, tensors)
            layer = lowbit.nn.QuantLinear.from_quant_tensor(given)
            stored = layer.state_dict()
            del stored["_extra_state"]
            return [lowbit.linear(x, given), lowbit.dequantize(given), layer(x), *stored.values()]

        given = dict(qt.tensors)
        columns = {"outlier_columns": given.pop("outlier_columns")} if qt.format.outliers else {}
        return Case(functools.partial(call, **columns), given)  # expanded columns are not ascending


@case("pack")
def _(m: int) -> Case:
    codes = torch.randint(0, 8, (m, K), dtype=torch.uint8)
    return Case(lambda t: torch.ops.lowbit.pack(t, "int3"), {"t": codes}, ("t",))


@case("unpack")
def _(m: int) -> Case:
    packed = torch.randint(0, 256, (m, 36), dtype=torch.uint8)
    return Case(lambda t: torch.ops.lowbit.unpack(t, "int3", K), {"t": packed}, ("t",))


@case("numpy calls")
def _(m: int) -> Case:
    codes = torch.randint(0, 8, (N, K), dtype=torch.uint8)
    packed = torch.ops.lowbit.pack(codes, "int3")

    def call(codes: Tensor, packed: Tensor, values: Tensor) -> Any:
        made = [
            _C.pack(codes.numpy(), 3, 0, 1),
            _C.unpack(packed.numpy(), K, 3, 0, 1),
            _C.prepack(packed.numpy(), N, K, 3, 0, 1),
            _C.kmeans_1d(values.resolve_neg().numpy(), None, 4),
        ]
        return [torch.from_numpy(a) for a in made]

    return Case(call, {"codes": codes, "packed": packed, "values": torch.randn(50)})


for group, layout in itertools.product((None, 32), ("n16", "canonical")):

    @case(f"int8 group {group} {layout}")
    def _(m: int, group: int | None = group, layout: str = layout) -> Case:
        w = weight("int4_g32", layout)
        shape = (m,) if group is None else (m, K // group)
        given = {
            "q": torch.randint(-127, 128, (m, K)).to(torch.int8),
            "scales": torch.rand(shape) + 0.1,
            "bias": torch.randn(N),
        }
        return Case(lambda q, scales, bias: int8.linear(q, scales, w, bias), given, ("q", "scales"))

    @case(f"int8.quantize group {group} {layout}")
    def _(m: int, group: int | None = group, layout: str = layout) -> Case:
        call = lambda x: int8.quantize(x if layout == "n16" else x.half(), group)  # noqa: E731
        return Case(call, {"x": torch.randn(m, K)}, ("x",))


@case("int8.quantize, static")
def _(m: int) -> Case:
    return Case(int8.quantize, {"x": torch.randn(m, K), "scale": torch.rand(m) + 0.1})


@case("int8.static_linear")
def _(m: int) -> Case:
    w = weight("int8_row_a8")
    given = {"x": torch.randn(m, 2, K), "scale": torch.tensor(0.03), "bias": torch.randn(N)}
    return Case(lambda x, scale, bias: int8.static_linear(x, scale, w, bias), given, ("x",))


@case("int8.requantize")
def _(m: int) -> Case:
    multiplier, shift = int8.dyadic(torch.rand(N) * 1e-3)
    given = {
        "acc": torch.randint(-(2**20), 2**20, (m, N)).int(),
        "multiplier": multiplier,
        "shift": shift,
    }
    return Case(int8.requantize, given, ("acc",))


@case("binary.quantize")
def _(m: int) -> Case:
    return Case(lowbit.binary.quantize, {"x": torch.randn(m, K)}, ("x",))


for layout in ("n16", "canonical"):

    @case(f"binary.linear {layout}")
    def _(m: int, layout: str = layout) -> Case:
        w = weight("binary", layout)
        bits, scales = lowbit.binary.quantize(torch.randn(m, K))
        given = {"bits": bits, "scales": scales, "bias": torch.randn(N)}
        return Case(
            lambda bits, scales, bias: lowbit.binary.linear(bits, scales, w, bias),
            given,
            ("bits", "scales"),
        )
