"""linear_many and the epilogues of linear: the same bits as separate calls, gradients, bad input.

The error bounds of the activations are those that csrc/cpu/weights/activation-inl.h states.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import lowbit
from lowbit import _C, layouts, reference
from lowbit.backends.cpu import requests
from lowbit.explanation import Explanation, Kernel, explain_request
from lowbit.formats import Format, parse
from lowbit.layouts import CANONICAL, N16, Operands
from lowbit.ops import checks
from lowbit.ops.many import arguments_of
from lowbit.ops.terms import matrix
from weights import ALL_FORMATS, random_weight

LAYOUTS = (CANONICAL, N16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP_TABLES = next(f for f in ALL_FORMATS if f.name == "group_tables_g32")
# Every way of preparing x: with and without sums, two group sizes, bf16 and fp32 rows of the table.
MIXED = (*map(parse, ("nf4", "uint4_zfloat", "int3_g32", "q4_1", "kmeans3_pr")), GROUP_TABLES)
ZERO_OR_ONE = Format.lut(bits=2, table=(0.0, 1.0), group=None, scale=None)
NAMES = ("relu", "silu", "gelu", "gelu_tanh")


def mixed_weights(layout: str, k: int = 96, widths: tuple[int, ...] = (70, 1, 64, 130, 33, 200)):
    pairs = enumerate(zip(MIXED, widths, strict=True))
    return [layouts.to_operands(random_weight(f, n, k, i), layout) for i, (f, n) in pairs]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", (0, 1, 3, 100))
def test_many_is_bit_for_bit_linear(rows: int, dtype: torch.dtype, layout: str) -> None:
    weights = mixed_weights(layout)
    biases = [None if i % 2 else torch.randn(w.shape[0]) for i, w in enumerate(weights)]
    x = torch.randn(rows, 96).to(dtype)
    many = lowbit.linear_many(x, weights, biases)
    for y, w, bias in zip(many, weights, biases, strict=True):
        assert y.dtype == dtype
        assert torch.equal(y, lowbit.linear(x, w, bias))


def test_many_shapes_and_counts() -> None:
    weights = mixed_weights(N16)
    for shape in ((96,), (2, 3, 96), (2, 0, 96)):
        x = torch.randn(shape)
        for y, w in zip(lowbit.linear_many(x, weights), weights, strict=True):
            assert torch.equal(y, lowbit.linear(x, w))
    strided = torch.randn(4, 192)[:, ::2]
    assert torch.equal(lowbit.linear_many(strided, weights)[3], lowbit.linear(strided, weights[3]))
    assert lowbit.linear_many(torch.randn(2, 96), []) == []
    x = torch.randn(5, 96)
    # More calls than are split over threads at a time.
    for y, w in zip(lowbit.linear_many(x, weights * 7), weights * 7, strict=True):
        assert torch.equal(y, lowbit.linear(x, w))


@pytest.mark.parametrize("rows", (1, 3, 100))
def test_many_with_int8_activations(rows: int) -> None:
    """Weights that quantize x, alike or not, beside weights that take it as it is."""
    names = ("int4_g32_a8", "nf4", "int4_g32_a8", "uint2_zfloat_a8", "nf4_a8t", "int4_g32")
    weights = [matrix(random_weight(parse(n), 70, 96, i)) for i, n in enumerate(names)]
    x = torch.randn(rows, 96)
    for y, w in zip(lowbit.linear_many(x, weights), weights, strict=True):
        assert torch.equal(y, lowbit.linear(x, w))


@pytest.mark.parametrize("threads", (1, 2, 3, 5))
def test_threads_do_not_change_the_result(threads: int) -> None:
    """Large enough that all threads get a part, and with column blocks and row blocks to split."""
    weights = mixed_weights(N16, 1024, (700, 65, 640, 1300, 33, 2000))
    x = torch.randn(100, 1024, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = [lowbit.linear(x, w) for w in weights]
        torch.set_num_threads(threads)
        for y, e in zip(lowbit.linear_many(x, weights), expected, strict=True):
            # Another row may be chosen for another number of threads; each rounds y once.
            torch.testing.assert_close(y, e, rtol=2**-7, atol=2e-3 * float(e.float().std()))
        for y, w in zip(lowbit.linear_many(x, weights), weights, strict=True):
            assert torch.equal(y, lowbit.linear(x, w))
    finally:
        torch.set_num_threads(before)


def identity_operands(n: int, layout: str) -> Operands:
    """A weight that is the identity, so that y = x exactly."""
    return layouts.to_operands(lowbit.quantize(torch.eye(n), ZERO_OR_ONE), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_activation_is_within_its_bound(name: str, layout: str) -> None:
    w = identity_operands(96, layout)
    assert torch.equal(lowbit.dequantize(w), torch.eye(96))
    y = torch.cat(
        [torch.linspace(-110, 110, 64 * 96 - 4), torch.tensor([0.0, -0.0, 1e-30, -1e-30])]
    )
    y = torch.cat([y, torch.linspace(-6, 6, 64 * 96)]).view(-1, 96)
    exact = reference.apply_epilogue(y.double(), name, None, None)
    bound = {
        "relu": torch.zeros_like(exact),
        "silu": 2**-20 * exact.abs() + 2**-125 * y.abs(),
        "gelu": 2**-21 * y.abs(),
        "gelu_tanh": 2**-21 * y.abs(),
    }[name]
    got = lowbit.linear(y, w, activation=name)
    assert bool(((got.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("name", NAMES)
def test_activation_keeps_nan_and_inf(name: str, value: float) -> None:
    w = matrix(random_weight(parse("nf4"), 3, 32))
    bias = torch.tensor([value, 1.0, -1.0])
    y = lowbit.linear(torch.zeros(1, 32), w, bias, activation=name)
    expected = reference.apply_epilogue(bias.double(), name, None, None)[None]
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2**-20, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", (1, 3, 100))
def test_gate_and_residual(rows: int, dtype: torch.dtype, layout: str) -> None:
    """On the fp32 result of the kernel everything is one multiplication and one addition, rounded once."""
    for format, n in zip(MIXED, (70, 1, 64, 130, 33, 200), strict=True):
        w = layouts.to_operands(random_weight(format, n, 96), layout)
        x, bias = torch.randn(rows, 96).to(dtype), torch.randn(n)
        gate = torch.randn(rows, 2 * n).to(dtype)[:, :n]
        residual = torch.randn(rows, n).to(dtype)
        y = lowbit.linear(x, w, bias, gate=gate, residual=residual)
        assert y.shape == (rows, n)
        assert y.dtype == dtype
        if dtype != torch.float32:
            continue
        plain = lowbit.linear(x, w, bias)
        assert torch.equal(y, gate * plain + residual)
        assert torch.equal(lowbit.linear(x, w, bias, residual=residual), plain + residual)
        relu = lowbit.linear(x, w, bias, activation="relu", residual=residual)
        assert torch.equal(relu, plain.relu() + residual)
        assert torch.equal(lowbit.linear(x, w, gate=gate, activation="relu"),
                           gate.relu() * lowbit.linear(x, w))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_epilogue_rounds_once(name: str, dtype: torch.dtype) -> None:
    """y = x exactly, so the exact result of the rounded inputs is known."""
    w = identity_operands(96, N16)
    x, gate, residual = (torch.randn(64, 96).to(dtype) for _ in range(3))
    exact = reference.apply_epilogue(x.double(), name, gate.double(), residual.double())
    y = lowbit.linear(x, w, activation=name, gate=gate, residual=residual).double()
    # The value in fp32 is off by 2^-20 of each term; rounding it once adds half a unit in the last place.
    terms = (
        (exact - residual).abs() + residual.double().abs() + x.double().abs() * gate.double().abs()
    )
    bound = terms * 2**-20 + exact.abs() * torch.finfo(dtype).eps / 2 * (1 + 2**-10) + 2**-25
    assert bool(((y - exact).abs() <= bound).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((96,), (2, 3, 96), (0, 96), (2, 0, 96)))
def test_epilogue_of_any_batch(shape: tuple[int, ...], layout: str) -> None:
    w = layouts.to_operands(random_weight(parse("nf4"), 70, 96), layout)
    x, other = torch.randn(shape), torch.randn(*shape[:-1], 70)
    y = lowbit.linear(x, w, activation="relu", gate=other, residual=other)
    assert torch.equal(y, other.relu() * lowbit.linear(x, w) + other)


def test_a_needed_gradient_takes_separate_steps() -> None:
    w = matrix(random_weight(parse("int4_g32"), 70, 96))
    leaves = [torch.randn(5, n, requires_grad=True) for n in (96, 70, 70)]
    bias = torch.randn(70, requires_grad=True)
    x, gate, residual = leaves

    def fused() -> torch.Tensor:
        return lowbit.linear(x, w, bias, activation="silu", gate=gate, residual=residual)

    def separate() -> torch.Tensor:
        return F.silu(gate) * (F.linear(x, lowbit.dequantize(w)) + bias) + residual

    for y, expected in zip(
        torch.autograd.grad(fused().sin().sum(), (*leaves, bias)),
        torch.autograd.grad(separate().sin().sum(), (*leaves, bias)),
        strict=True,
    ):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(fused(), separate(), rtol=1e-5, atol=1e-4)
    for y in lowbit.linear_many(x, [w, w], [None, bias]):
        assert y.requires_grad
    first, second = lowbit.linear_many(x, [w, w], [None, bias])
    (grad,) = torch.autograd.grad((first + second).sum(), x)
    torch.testing.assert_close(grad, 2 * lowbit.dequantize(w).sum(0).expand(5, 96))


def test_autocast_casts_what_has_the_dtype_of_x() -> None:
    w = matrix(random_weight(parse("int4_g32"), 70, 96))
    x, other = torch.randn(3, 96), torch.randn(3, 70)
    with torch.autocast("cpu", torch.bfloat16):
        y = lowbit.linear(x, w, gate=other, residual=other)
        many = lowbit.linear_many(x, [w])[0]
    low = other.bfloat16()
    assert torch.equal(y, lowbit.linear(x.bfloat16(), w, gate=low, residual=low))
    assert torch.equal(many, lowbit.linear(x.bfloat16(), w))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    weights = mixed_weights(layout)
    w = weights[1]
    x = torch.randn(2, 5, 192)[..., ::2]
    other = torch.randn(2, 5, w.shape[0])
    bias = torch.randn(w.shape[0])
    for gate, added, activation in itertools.product((None, other), (None, other), (None, "silu")):
        opcheck = (x, *w, bias, gate, other, added, activation)
        torch.library.opcheck(torch.ops.lowbit.linear_epilogue.default, opcheck)
    torch.library.opcheck(torch.ops.lowbit.linear_many.default, (x, *many_arguments(weights)))


def many_arguments(weights: list[Operands]) -> tuple:
    return arguments_of(weights, [None] * len(weights))


def test_compile_without_graph_break() -> None:
    w = matrix(random_weight(parse("nf4"), 70, 96))
    other = torch.randn(5, 70)

    def f(x: torch.Tensor) -> torch.Tensor:
        a, b = lowbit.linear_many(x, [w, w])
        return a * b + lowbit.linear(x, w, activation="silu", gate=other, residual=other)

    torch._dynamo.reset()
    x = torch.randn(5, 96)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), f(x))


class TestBadInput:
    @pytest.fixture
    def w(self) -> Operands:
        return matrix(random_weight(parse("nf4"), 70, 96))

    def test_activation(self, w: Operands) -> None:
        with pytest.raises(ValueError, match=r"activation must be one of .*, got 'tanh'"):
            lowbit.linear(torch.zeros(2, 96), w, activation="tanh")

    @pytest.mark.parametrize("name", ("gate", "residual"))
    def test_gate_and_residual(self, w: Operands, name: str) -> None:
        x = torch.zeros(2, 96)
        for shape in ((70,), (2, 69), (1, 70), (2, 1, 70)):
            with pytest.raises(ValueError, match=rf"{name} must have shape \(2, 70\) on cpu, got"):
                lowbit.linear(x, w, **{name: torch.zeros(shape)})
        with pytest.raises(TypeError, match=f"{name} must have the dtype of x, torch.float32, got"):
            lowbit.linear(x, w, **{name: torch.zeros(2, 70).bfloat16()})

    def test_many(self, w: Operands) -> None:
        x = torch.zeros(2, 96)
        with pytest.raises(ValueError, match="biases must have one entry for each of 2 weights"):
            lowbit.linear_many(x, [w, w], [None])
        with pytest.raises(ValueError, match=r"bias must have shape \(70,\)"):
            lowbit.linear_many(x, [w, w], [None, torch.zeros(69)])
        other = matrix(random_weight(parse("nf4"), 70, 64))
        with pytest.raises(ValueError, match=r"x must have shape \(..., 64\), got \(2, 96\)"):
            lowbit.linear_many(x, [w, other])
        with pytest.raises(ValueError, match=r"x must have shape \(..., 96\), got \(2, 95\)"):
            lowbit.linear_many(x[:, 1:], [w])
        with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
            lowbit.linear_many(x.double(), [w])
        with pytest.raises(
            TypeError,
            match="weight must be a QuantTensor, CompositeWeight, KernelWeight or Operands, got Tensor",
        ):
            lowbit.linear_many(x, [x])
        args = list(many_arguments([w, w]))
        with pytest.raises(ValueError, match="bias must have 2 entries"):
            torch.ops.lowbit.linear_many(x, *args[:-1], [None])
        args[1] = [None]
        with pytest.raises(ValueError, match="must be equally long"):
            torch.ops.lowbit.linear_many(x, *args)

    def test_gradients_are_refused_by_the_inference_ops(self, w: Operands) -> None:
        x = torch.zeros(2, 96, requires_grad=True)
        with pytest.raises(ValueError, match="lowbit::linear_many has no gradients"):
            torch.ops.lowbit.linear_many(x, *many_arguments([w]))
        with pytest.raises(ValueError, match="lowbit::linear_epilogue has no gradients"):
            torch.ops.lowbit.linear_epilogue(x, *w, None, None, None, None, "silu")


def test_explain_shows_threads_and_time() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        tiny = explain_request(parse("nf4"), 64, 64, 1, torch.bfloat16)
        large = explain_request(parse("nf4"), 4096, 4096, 1, torch.bfloat16)
        one_block = explain_request(parse("nf4"), 64, 1 << 20, 1, torch.bfloat16)
        torch.set_num_threads(1)
        alone = explain_request(parse("nf4"), 4096, 4096, 1, torch.bfloat16)
    finally:
        torch.set_num_threads(before)

    def runs(found: Explanation) -> Kernel:
        return next(row for row in found.kernels if row.name == found.selected)

    assert [runs(e).threads for e in (tiny, large, one_block, alone)] == [1, 2, 1, 1]
    assert runs(alone).cost > runs(large).cost > runs(alone).cost / 2
    assert "at most 2 threads" in str(large)
    assert "us on 2 threads" in str(large)


def test_few_columns_and_many_rows_are_split_by_rows() -> None:
    """One block of 64 columns is one task of a row that does not split M; a second thread needs one that does."""
    w = _C.Weight(n=64, k=1024, bits=4, group=32)
    for threads, m in itertools.product((2, 8), (256, 1024)):
        rows = {name: (ns, used) for name, ns, used, _ in w.explain("linear", "fp32", m, threads)}
        assert rows[w.select("linear", "fp32", m, threads)][1] >= 2


def test_activation_names_are_those_of_the_kernels() -> None:
    assert tuple(requests.ACTIVATIONS) == checks.ACTIVATIONS
