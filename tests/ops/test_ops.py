"""torch.ops.lowbit.*: opcheck, values in both layouts, batch dims, autocast, torch.compile, bad input.

What each kernel computes is tested in test_kernels.py and gradients in test_gradients.py; here the path from
Python to it counts.
"""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit
from lowbit import _C, layouts, packing, reference
from lowbit.backends import pytorch
from lowbit.formats import FORMATS, Format, parse
from lowbit.layouts import CANONICAL, N16, Operands
from lowbit.layouts.operands import TENSORS
from lowbit.ops.terms import matrix
from lowbit.ops.weights import embedding
from lowbit.weights.quantized import QuantTensor
from weights import ALL_FORMATS, random_codes, random_weight

LAYOUTS = (CANONICAL, N16)
# One format for every operand that can be present or absent, and every table scope.
MIXED = ("nf4", "uint3", "uint4_zfloat", "q5_1", "kmeans2", "kmeans3_pr", "ternary_trits", "nvfp4")
GROUP_TABLES = next(f for f in ALL_FORMATS if f.name == "group_tables_g32")
MIXED_FORMATS = (*(parse(name) for name in MIXED), GROUP_TABLES)


def name_of(value: object) -> str | None:
    return value.name if isinstance(value, Format) else None


def computes_in_bf16(x: torch.Tensor, w: Operands) -> bool:
    chosen = lowbit.explain(x, w).selected
    return any(row["name"] == chosen and row["compute"] == "bf16" for row in _C.kernels())


def assert_linear(y: torch.Tensor, x: torch.Tensor, qt: QuantTensor, w: Operands) -> None:
    """|error| <= (2 K + 4) eps32 sum |x| |W'| + eps of the output |y|.

    Each of K products and sums is rounded to fp32, and so are scale and zero; |W'| counts |code| + |zero|, because a
    kernel may sum them apart. Then y is rounded once.
    """
    table = torch.bfloat16 if computes_in_bf16(x, w) else None
    exact = reference.linear(x.double(), qt, round_table_to=table)
    values = reference.values_of(qt).abs()
    zeros = None if qt.zeros is None else reference.effective_zeros(qt).abs()
    positive = Format(name="sum", codec="affine", bits=8, group=qt.format.group, zero="min")
    scales = reference.effective_scales(qt)
    if zeros is None or scales is None:
        magnitude = reference.apply_scales(values, qt.format, scales, None)
    else:
        shift = zeros if qt.format.zero == "min" else zeros * scales.abs()
        magnitude = reference.apply_scales(values, positive, scales.abs(), shift)
    k = x.shape[-1]
    bound = (2 * k + 4) * 2**-24 * F.linear(x.double().abs(), magnitude.double())
    bound = bound + exact.abs() * torch.finfo(y.dtype).eps
    error = (y.double() - exact).abs()
    worst = int((error - bound).argmax())
    assert bool((error <= bound).all()), (
        f"{float(y.flatten()[worst])}, expected {float(exact.flatten()[worst])}"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", ALL_FORMATS, ids=name_of)
def test_identity_returns_the_weight(format: Format, layout: str) -> None:
    """In fp32 no path rounds anything: x = I gives the reference weight bit for bit, and so does dequantize."""
    for n, k in ((70, 96), (1, 33)):
        qt = random_weight(format, n, k)
        w = layouts.to_operands(qt, layout)
        expected = reference.dequantize(qt)
        assert torch.equal(lowbit.linear(torch.eye(k), w).T, expected)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(lowbit.dequantize(w, dtype), expected.to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("format", MIXED_FORMATS, ids=name_of)
def test_random_x(format: Format, dtype: torch.dtype, layout: str) -> None:
    qt = random_weight(format, 70, 96)
    w = layouts.to_operands(qt, layout)
    for shape in ((5, 96), (96,), (2, 3, 96), (1, 1, 96), (2, 1, 2, 96)):
        x = torch.randn(shape).to(dtype)
        y = lowbit.linear(x, w)
        assert y.shape == (*shape[:-1], 70)
        assert y.dtype == dtype
        assert_linear(y, x, qt, w)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_x_do_not_change_the_result(layout: str) -> None:
    w = layouts.to_operands(random_weight(parse("int4_g32"), 70, 96), layout)
    base = torch.randn(96, 2, 6)
    strided = {
        "transposed": base[:, 0].T,
        "permuted batch": base.permute(2, 1, 0),
        "row stride": torch.randn(4, 100)[:, 2:98],
        "expanded": torch.randn(1, 96).expand(5, 96),
        "every other element": torch.randn(4, 192)[:, ::2],
    }
    for name, x in strided.items():
        assert not x.is_contiguous(), name
        assert torch.equal(lowbit.linear(x, w), lowbit.linear(x.contiguous(), w)), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((0, 96), (2, 0, 96), (0, 3, 96)))
def test_no_rows(layout: str, shape: tuple[int, ...]) -> None:
    w = layouts.to_operands(random_weight(parse("nf4"), 70, 96), layout)
    y = lowbit.linear(torch.empty(shape, dtype=torch.bfloat16), w)
    assert y.shape == (*shape[:-1], 70)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias_dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_bias_of_any_dtype(layout: str, bias_dtype: torch.dtype) -> None:
    """With x = 0 the result is the bias, rounded once to the dtype of x."""
    w = layouts.to_operands(random_weight(parse("uint3_g32"), 70, 96), layout)
    bias = torch.randn(140).to(bias_dtype)[::2]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = lowbit.linear(torch.zeros(3, 96, dtype=dtype), w, bias)
        assert torch.equal(y, bias.to(dtype).expand(3, 70))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", MIXED_FORMATS, ids=name_of)
def test_embedding(format: Format, layout: str) -> None:
    qt = random_weight(format, 70, 96)
    w = layouts.to_operands(qt, layout)
    for indices in (torch.tensor([[0, 69, 3], [3, 64, 63]]), torch.tensor(5), torch.tensor([])):
        for index_dtype in (torch.int64, torch.int32):
            for dtype in (torch.float32, torch.bfloat16):
                rows = embedding(indices.to(index_dtype), w, dtype)
                assert torch.equal(rows, reference.embedding(indices.long(), qt, dtype))


@pytest.mark.parametrize("format", FORMATS.values(), ids=name_of)
def test_pack_and_unpack(format: Format) -> None:
    for n, k in ((3, 1), (5, 31), (1, 40), (0, 8), (130, 77)):
        codes = random_codes(format, n, k, torch.Generator().manual_seed(k))
        packed = torch.ops.lowbit.pack(codes, format.spec)
        assert torch.equal(packed, packing.pack_codes(codes, format))
        assert torch.equal(torch.ops.lowbit.unpack(packed, format.spec, k), codes)
        wide = torch.stack([codes, codes], -1)[..., 0]
        assert torch.equal(torch.ops.lowbit.pack(wide, format.spec), packed)


def opcheck(op: object, *args: object) -> None:
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ("uint4_zfloat", "kmeans3_pr", "nvfp4", "q4_k"))
def test_opcheck(name: str, layout: str) -> None:
    w = layouts.to_operands(random_weight(parse(name), 70, 96), layout)
    for x in (torch.randn(3, 96), torch.randn(2, 5, 192)[..., ::2], torch.empty(0, 96)):
        opcheck(torch.ops.lowbit.linear.default, x, *w, torch.randn(70))
    opcheck(torch.ops.lowbit.dequantize.default, *w, torch.bfloat16)
    indices = torch.tensor([[0, 69], [5, 1]])
    opcheck(torch.ops.lowbit.embedding.default, indices, *w, torch.float16)
    codebook = (w.scales, w.zeros, w.table)
    wanted = [t is not None and t.is_floating_point() for t in codebook]
    wanted[2] = wanted[2] and w.format.codec == "lut"
    opcheck(torch.ops.lowbit.codebook_grad.default, torch.randn(70, 96), *w, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_the_trainable_op(layout: str) -> None:
    w = layouts.to_operands(random_weight(parse("kmeans3_g32_fp32"), 70, 96), layout)
    leaves = (t.clone().requires_grad_() for t in (w.scales, w.table, torch.randn(70)))
    scales, table, bias = leaves
    x = torch.randn(2, 3, 96, requires_grad=True)
    w, added = w._replace(scales=scales, table=table), torch.randn(2, 3, 70, requires_grad=True)
    opcheck(torch.ops.lowbit.linear_trainable.default, x, *w, bias, None)
    opcheck(torch.ops.lowbit.linear_trainable.default, x, *w, bias, added)


def test_opcheck_of_packing() -> None:
    codes = torch.randint(0, 8, (5, 31), dtype=torch.uint8)
    opcheck(torch.ops.lowbit.pack.default, codes, "int3")
    opcheck(torch.ops.lowbit.unpack.default, torch.ops.lowbit.pack(codes, "int3"), "int3", 31)


def test_quant_tensor_is_converted_once() -> None:
    qt = random_weight(parse("nf4"), 70, 96)
    first = matrix(qt)
    lowbit.linear(torch.randn(2, 96), qt)
    assert matrix(qt) is first
    assert first.layout == N16


def test_dequantize_makes_no_second_copy() -> None:
    qt = random_weight(parse("nf4"), 70, 96)
    assert torch.equal(lowbit.dequantize(qt), reference.dequantize(qt))
    assert qt._packed is None


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_casts_x_alone(dtype: torch.dtype) -> None:
    qt = random_weight(parse("int4_g32_fp32"), 70, 96)
    x, bias = torch.randn(3, 96), torch.randn(70)
    with torch.autocast("cpu", dtype):
        y = lowbit.linear(x, qt, bias)
    assert y.dtype == dtype
    assert torch.equal(y, lowbit.linear(x.to(dtype), qt, bias))
    with (
        torch.autocast("cpu", dtype),
        pytest.raises(TypeError, match=r"x must be .* got torch.float64"),
    ):
        lowbit.linear(x.double(), qt)


def test_inference_mode() -> None:
    qt = random_weight(parse("nf4"), 70, 96)
    x = torch.randn(3, 96)
    expected = lowbit.linear(x, qt)
    with torch.inference_mode():
        w = matrix(random_weight(parse("nf4"), 70, 96))
        y = lowbit.linear(x.clone(), w)
        assert y.is_inference()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile_without_graph_break(layout: str) -> None:
    w = layouts.to_operands(random_weight(parse("nf4"), 70, 96), layout)
    bias = torch.randn(70)

    def f(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        rows = embedding(indices, w, x.dtype)
        scaled = lowbit.linear(rows, w) * lowbit.dequantize(w)[:, 0]
        return lowbit.linear(torch.relu(x), w, bias) + scaled

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (5, 3, 7):
            x, indices = torch.randn(m, 96), torch.randint(0, 70, (m,))
            assert torch.equal(compiled(x, indices), f(x, indices))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own, at import of inductor
def test_compile_with_inductor() -> None:
    qt = random_weight(parse("q4_1"), 70, 96)
    matrix(qt)

    def f(x: torch.Tensor) -> torch.Tensor:
        return lowbit.linear(x * 2, qt).sin()

    x = torch.randn(2, 3, 96)
    with torch.no_grad():
        compiled = torch.compile(f, fullgraph=True)(x)
    # sin alone is recomputed by another library: one unit in the last place of values up to 1.
    torch.testing.assert_close(compiled, f(x), rtol=0, atol=2**-23)


def test_reference_path_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    pytorch._log_once.cache_clear()
    w = layouts.to_operands(random_weight(parse("nf4"), 8, 64), CANONICAL)
    with caplog.at_level(logging.WARNING, "lowbit"):
        for _ in range(2):
            lowbit.linear(torch.randn(1, 64), w)
    assert [r.getMessage() for r in caplog.records] == [
        "plain torch dequantizes the weight in every call on cpu: the weight is in canonical layout"
    ]


class TestBadInput:
    """Every refusal names the argument and the value; nothing reaches a kernel."""

    @pytest.fixture(params=LAYOUTS)
    def w(self, request: pytest.FixtureRequest) -> Operands:
        return layouts.to_operands(random_weight(parse("uint4_zfloat"), 70, 128), request.param)

    @pytest.mark.parametrize("dtype", (torch.float64, torch.int8, torch.int64, torch.bool))
    def test_dtype_of_x(self, w: Operands, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match=f"x must be float32, bfloat16 or float16, got {dtype}"):
            lowbit.linear(torch.zeros(2, 128).to(dtype), w)

    @pytest.mark.parametrize("shape", ((2, 127), (128, 2), (), (0,)))
    def test_shape_of_x(self, w: Operands, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"x must have shape \(..., 128\), got"):
            lowbit.linear(torch.zeros(shape), w)

    @pytest.mark.parametrize("shape", ((69,), (1, 70), ()))
    def test_shape_of_bias(self, w: Operands, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"bias must have shape \(70,\)"):
            lowbit.linear(torch.zeros(2, 128), w, torch.zeros(shape))

    def test_dtype_of_bias(self, w: Operands) -> None:
        with pytest.raises(TypeError, match=r"bias must be .*, got torch.int32"):
            lowbit.linear(torch.zeros(2, 128), w, torch.zeros(70, dtype=torch.int32))

    @pytest.mark.parametrize("operand", ("codes", "scales", "zeros"))
    @pytest.mark.parametrize("damage", ("short", "dtype", "strides", "absent"))
    def test_operands(self, w: Operands, operand: str, damage: str) -> None:
        """A kernel would read outside of them."""
        t = getattr(w, operand)
        if damage == "short":
            bad = t.flatten()[:-1]
        elif damage == "dtype":
            bad = t.to(torch.float64)
        elif damage == "strides":
            bad = torch.stack([t, t], -1)[..., 0]
        else:
            bad = None if operand != "codes" else t.new_empty(0)
        given, x = w._replace(**{operand: bad}), torch.zeros(2, 128)
        for call in (
            lambda: torch.ops.lowbit.linear(x, *given, None),
            lambda: torch.ops.lowbit.linear_trainable(x, *given, None, None),
            lambda: torch.ops.lowbit.dequantize(*given, torch.float32),
            lambda: torch.ops.lowbit.embedding(torch.tensor([0]), *given, torch.float32),
        ):
            with pytest.raises(ValueError, match=operand):
                call()

    def test_unexpected_operand(self) -> None:
        w = matrix(random_weight(parse("nf4"), 70, 128))
        with pytest.raises(ValueError, match=r"takes the operands .*, got .*'zeros'"):
            torch.ops.lowbit.linear(torch.zeros(2, 128), *w._replace(zeros=w.scales), None)

    @pytest.mark.parametrize(
        ("spec", "layout", "n", "k", "message"),
        (
            ("nf5", N16, 70, 128, "unknown format 'nf5'"),
            ("uint4_zfloat", "bricks", 70, 128, "layout must be"),
            ("uint4_zfloat", N16, -1, 128, "n >= 0"),
            ("uint4_zfloat", N16, 70, 2**40, "x must have shape"),
            ("uint4_zfloat", N16, 2**40, 128, "codes of a"),
            ("{", N16, 70, 128, "not JSON"),
        ),
    )
    def test_meaning(self, spec: str, layout: str, n: int, k: int, message: str) -> None:
        w = matrix(random_weight(parse("uint4_zfloat"), 70, 128))
        with pytest.raises(ValueError, match=message):
            torch.ops.lowbit.linear(torch.zeros(1, 128), *w.tensors, spec, layout, n, k, None)

    @pytest.mark.parametrize("index", (-1, 70, 2**40))
    def test_index_out_of_range(self, w: Operands, index: int) -> None:
        with pytest.raises(IndexError, match=rf"indices must be in \[0, 70\), got {index}"):
            embedding(torch.tensor([3, index]), w)

    def test_dtype_of_indices(self, w: Operands) -> None:
        with pytest.raises(TypeError, match=r"indices must be int64 or int32, got torch.float32"):
            embedding(torch.tensor([1.0]), w)

    @pytest.mark.parametrize("dtype", (torch.float64, torch.uint8))
    def test_dtype_of_the_result(self, w: Operands, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match=f"dtype must be .*, got {dtype}"):
            lowbit.dequantize(w, dtype)
        with pytest.raises(TypeError, match=f"dtype must be .*, got {dtype}"):
            embedding(torch.tensor([1]), w, dtype)

    def test_weight_of_another_type(self) -> None:
        with pytest.raises(
            TypeError,
            match=r"weight must be a QuantTensor, CompositeWeight, KernelWeight or Operands, got Tensor",
        ):
            lowbit.linear(torch.zeros(2, 4), torch.zeros(4, 4))

    @pytest.mark.parametrize(
        ("codes", "message"),
        (
            (torch.zeros(4, dtype=torch.uint8), "codes must be 2-D"),
            (torch.zeros(4, 4), "codes must be 2-D uint8, got torch.float32"),
            (torch.full((1, 4), 8, dtype=torch.uint8), "codes must be below 8 .* got 8"),
        ),
    )
    def test_pack(self, codes: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            torch.ops.lowbit.pack(codes, "int3")

    @pytest.mark.parametrize("k", (-1, 7, 12, 2**40))
    def test_unpack(self, k: int) -> None:
        with pytest.raises(ValueError, match=f"for k = {k} in format 'int4'"):
            torch.ops.lowbit.unpack(torch.zeros(2, 5, dtype=torch.uint8), "int4", k)

    def test_other_device(self, w: Operands) -> None:
        """The dispatcher sends a mix with the meta device to the fake, which checks devices too."""
        with pytest.raises(ValueError, match="codes must be on meta, got cpu"):
            lowbit.linear(torch.zeros(2, 128, device="meta"), w)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    given_format=st.sampled_from(ALL_FORMATS),
    claimed_format=st.sampled_from(ALL_FORMATS),
    given_layout=st.sampled_from(LAYOUTS),
    claimed_layout=st.sampled_from((*LAYOUTS, "n17")),
    given_shape=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    claimed_shape=st.tuples(st.integers(-1, 130), st.integers(-1, 130)),
    m=st.integers(0, 3),
)
def test_operands_of_another_weight(
    given_format: Format,
    claimed_format: Format,
    given_layout: str,
    claimed_layout: str,
    given_shape: tuple[int, int],
    claimed_shape: tuple[int, int],
    m: int,
) -> None:
    """Whatever a caller claims of its tensors: an error, or the tensors are those of such a weight."""
    w = layouts.to_operands(random_weight(given_format, *given_shape), given_layout)
    claim = (claimed_format.spec, claimed_layout, *claimed_shape)
    x = torch.randn(m, max(0, claimed_shape[1]))
    try:
        y = torch.ops.lowbit.linear(x, *w.tensors, *claim, None)
    except ValueError:
        assert claim != (given_format.spec, given_layout, *given_shape)
        return
    assert y.shape == (m, claimed_shape[0])
    wanted = layouts.find(claimed_layout).specs(claimed_format, *claimed_shape)
    found = {n: t for n, t in zip(TENSORS, w.tensors, strict=True) if t is not None}
    assert set(found) == set(wanted)
    for name, t in found.items():
        shape, dtype = wanted[name]
        assert t.shape == shape
        assert t.dtype in (dtype, torch.float32)
