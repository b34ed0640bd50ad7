"""FP8 quantization: every instruction set and Triton's interpreter against the reference bit for bit, granularities,
blocks of all kinds, errors, torch.compile."""

from __future__ import annotations

import functools
import logging
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import lowbit
from fp8_values import (
    DTYPES,
    E4M3,
    E5M2,
    ISAS,
    TYPES,
    codes,
    each_type,
    nan_is_no_mistake,
    same,
    special,
)
from lowbit import fp8
from lowbit.backends import available, pytorch_fp8
from lowbit.backends import fp8 as backends
from lowbit.backends.cpu import fp8 as cpu
from lowbit.backends.cuda import fp8_matmul as matmul_cuda
from lowbit.backends.triton import fp8 as triton
from lowbit.float8 import (
    E8M0,
    FLOAT8,
    GRANULARITIES,
    Granularity,
    find_granularity,
    infer_granularity,
)
from lowbit.reference import fp8 as reference

# Ragged in both directions for blocks of 16, 32 and 128, tiles of 16 and 64, vectors of 8 and 16.
SHAPES = ((1, 1), (3, 17), (130, 36), (19, 300), (129, 128), (64, 80), (2, 4100))
CASES = [
    (g, s) for g in GRANULARITIES.values() for s in g.scale_dtypes
]  # granularity, dtype of the scales
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].name}-{c[1]}")


@each_case
@each_type
def test_every_instruction_set_is_the_reference_bit_for_bit(
    case: tuple[Granularity, torch.dtype], dtype: torch.dtype
) -> None:
    g, scale_dtype = case
    for i, (rows, k) in enumerate(SHAPES):
        x = special(rows, k, DTYPES[i % 3], finite=i % 2 == 0)
        maxima = reference.absmax(x, g)
        arguments = (x, dtype, g, scale_dtype)
        for seed in (None, 12345678901234567):
            q, scale = reference.quantize(x, dtype, g, scale_dtype, seed)
            results = [cpu.quantize(*arguments, True, seed, isa=isa) for isa in ISAS]
            results += [cpu.quantize(*arguments, True, seed, maxima, isa=isa) for isa in ISAS]
            results += [cpu.quantize(*arguments, False, seed)]
            for got in results:
                assert_result(got, q, scale)
        values = DTYPES[(i + 1) % 3]
        want = reference.dequantize(q, scale, values)
        for isa in ISAS:
            assert same(cpu.dequantize(q, scale, g, values, isa), want)
            assert same(cpu.absmax(x, g, isa), maxima)


def assert_result(got: tuple[Tensor, Tensor, Tensor | None], q: Tensor, scale: Tensor) -> None:
    """Codes, scales and transposed codes, if there are any, bit for bit."""
    assert torch.equal(codes(got[0]), codes(q))
    assert same(got[1], scale)
    assert got[2] is None or torch.equal(codes(got[2]), codes(q).T)


@each_case
@nan_is_no_mistake
def test_triton_is_the_reference_bit_for_bit(case: tuple[Granularity, torch.dtype]) -> None:
    """Every case with both types; seeds, transposing and given maxima take turns."""
    g, scale_dtype = case
    for i, (rows, k) in enumerate(((3, 17), (19, 300), (129, 128), (2, 4100))):
        if k > 4096 and g.columns is not None:
            continue  # only whole rows that long are looked at twice
        for dtype in TYPES:
            x = special(rows, k, DTYPES[i % 3], finite=i != 1)
            maxima = reference.absmax(x, g)
            turn = i + TYPES.index(dtype)
            seed = 12345678901234567 if turn % 2 else None
            given = maxima if turn % 3 == 2 else None
            q, scale = reference.quantize(x, dtype, g, scale_dtype, seed)
            got = triton.quantize(x, dtype, g, scale_dtype, turn % 2 == 0 or i == 1, seed, given)
            assert_result(got, q, scale)
            values = DTYPES[(i + 1) % 3]
            want = reference.dequantize(q, scale, values)
            assert same(triton.dequantize(q, scale, g, values), want)
        assert same(triton.absmax(x, g), maxima)


@each_type
def test_the_reference_by_its_definition(dtype: torch.dtype) -> None:
    """Loops in Python floats: scales are quotients of maxima, codes the nearest values."""
    f = FLOAT8[dtype]
    x = special(5, 70)
    values = torch.arange(f.max_code + 1, dtype=torch.uint8).view(dtype).double().numpy()
    for g in GRANULARITIES.values():
        q, scale = reference.quantize(x, dtype, g)
        wide = reference.expand(scale, g, *x.shape)
        block_rows, block_k = g.block(*x.shape)
        for r in range(0, 5, block_rows):
            for c in range(0, 70, block_k):
                block = x[r : r + block_rows, c : c + block_k]
                largest = np.float32(block.abs().max())
                want = np.float32(largest / np.float32(f.max)) or 1.0
                if g.name == "mx":
                    exponent = math.frexp(largest)[1] - 1 - f.emax if largest else -127
                    want = 2.0 ** max(exponent, -127)
                assert (wide[r : r + block_rows, c : c + block_k] == want).all()
        ratio = (x / wide).numpy()
        error = np.abs(np.abs(ratio)[..., None].astype(np.float64) - values).min(-1)
        assert (np.abs(q.double().numpy() - np.clip(ratio, -f.max, f.max)) <= error).all()


def test_bf16_scales_do_not_saturate() -> None:
    x = torch.rand(4096, 1) + 1
    for g in ("row", "1x128"):
        q, scale = fp8.quantize(x, granularity=g, scale_dtype=torch.bfloat16)
        exact = fp8.quantize(x, granularity=g)[1]
        assert scale.dtype == torch.bfloat16
        assert (scale.float() >= exact).all()
        assert (scale.float() <= exact * (1 + 2**-7)).all()
        assert (x / scale.float() <= 448).all()
        assert (q.float() >= 416).all()


@pytest.mark.parametrize("shape", ((300, 700), (1, 70_000), (3, 25_000), (35_000, 2)))
def test_threads_change_nothing(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    for g in GRANULARITIES.values():
        want, scale = reference.quantize(x, E4M3, g, seed=7)
        values = reference.dequantize(want, scale)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            try:
                q, s, q_t = cpu.quantize(x, E4M3, g, scale.dtype, True, 7)
                decoded, maxima = cpu.dequantize(q, s, g, torch.float32), cpu.absmax(x, g)
            finally:
                torch.set_num_threads(2)
            assert torch.equal(codes(q), codes(want))
            assert torch.equal(codes(q_t), codes(want).T)
            assert same(s, scale)
            assert torch.equal(decoded, values)
            assert torch.equal(maxima, reference.absmax(x, g))


def test_blocks_that_are_not_finite() -> None:
    x = torch.ones(4, 32)
    x[0, 3], x[1, 5], x[2, 0] = math.inf, -math.nan, -math.inf
    q, scale = fp8.quantize(x, granularity="row")
    assert scale[0] == math.inf
    assert scale[1].isnan()
    assert scale[2] == math.inf
    assert scale[3] == 1 / torch.tensor(448.0)
    assert codes(q)[0].tolist() == [0] * 3 + [0x7F] + [0] * 28
    assert (codes(q)[1] == 0x7F).all()
    assert codes(q)[2].tolist() == [0x7F] + [0] * 31
    assert (codes(q)[3] == 0x7E).all()
    q, scale = fp8.quantize(x, granularity="mx")
    assert codes(scale).flatten().tolist() == [255, 255, 255, 127 - 8]
    assert (codes(q)[:3] == 0x7F).all()
    assert (q[3].float() == 256).all()


def test_blocks_of_nothing() -> None:
    x = torch.zeros(3, 40)
    x[1] = -0.0
    x[2] = 1e-45  # below the smallest scale
    for g in GRANULARITIES:
        q, scale = fp8.quantize(x, granularity=g)
        assert (reference.scale_values(scale) == (2.0**-127 if g == "mx" else 1)).all()
        assert (q.float() == 0).all()
        assert (codes(q)[1] == 0x80).all()
    for shape in ((0, 40), (3, 0), (0, 0), (2, 0, 5), (0,)):
        x = torch.empty(shape)
        rows = math.prod(shape[:-1])
        for g in GRANULARITIES:
            q, scale = fp8.quantize(x, granularity=g)
            assert q.shape == shape
            assert scale.shape == find_granularity(g).scale_shape(rows, shape[-1])
            assert fp8.dequantize(q, scale).shape == shape
            assert (fp8.absmax(x, g) == 0).all()
        assert fp8.cast(x).shape == shape
        if len(shape) == 2:
            assert fp8.quantize(x, transposed=True)[2].shape == shape[::-1]


@pytest.mark.parametrize("seed", (0, 2**63 - 1))
def test_the_first_and_the_last_seed(seed: int) -> None:
    x = torch.randn(5, 40)
    q, scale = fp8.quantize(x, granularity="row", rounding="stochastic", seed=seed)
    want, want_scale = reference.quantize(x, E4M3, GRANULARITIES["row"], torch.float32, seed)
    assert torch.equal(codes(q), codes(want))
    assert same(scale, want_scale)


def test_strides_and_leading_dimensions() -> None:
    base = torch.randn(6, 50, 48)
    for x in (
        base,
        base[:, ::2],
        base[..., 1:40],
        base.transpose(0, 2),
        base[0, :, 3],
        base[::3, 1],
    ):
        k = x.shape[-1]
        flat = x.reshape(-1, k).contiguous()
        for g in GRANULARITIES:
            q, scale = fp8.quantize(x, granularity=g, rounding="stochastic", seed=3)
            want, want_scale = fp8.quantize(flat, granularity=g, rounding="stochastic", seed=3)
            assert q.is_contiguous()
            assert torch.equal(codes(q), codes(want).view(x.shape))
            assert same(scale, want_scale)
            values = fp8.dequantize(q, scale)
            assert torch.equal(values.view(-1, k), fp8.dequantize(want, scale))
            assert torch.equal(fp8.absmax(x, g), fp8.absmax(flat, g))
        assert torch.equal(codes(fp8.cast(x)), codes(fp8.cast(flat)).view(x.shape))
    q, scale = fp8.quantize(base[0], granularity="1x16")
    spread = torch.empty(50, 6)[:, ::2].copy_(scale)
    columns = torch.empty(48, 50, dtype=torch.uint8).copy_(codes(q).T).T.view(E4M3)
    assert not spread.is_contiguous()
    assert not columns.is_contiguous()
    assert torch.equal(fp8.dequantize(columns, spread), fp8.dequantize(q, scale))


def test_two_stage_scaling() -> None:
    """Maxima of groups serve the groups and, by their own maximum, the tensor."""
    x = torch.randn(70, 200)
    groups = fp8.absmax(x, "1x16")
    for g in ("1x16", "tensor"):
        q, scale = fp8.quantize(x, E5M2, g, maxima=groups)
        want, want_scale = fp8.quantize(x, E5M2, g)
        assert torch.equal(codes(q), codes(want))
        assert torch.equal(scale, want_scale)
    assert groups.amax() / torch.tensor(57344.0) == scale
    # What is above the maxima saturates.
    q, scale = fp8.quantize(x, maxima=torch.ones(()))
    assert scale == torch.tensor(1 / 448)
    assert torch.equal(q.float().abs() == 448, x.abs() >= 432 / 448)


# Granularities.


def test_the_shape_of_the_scales_says_the_granularity() -> None:
    assert {g.name: g.scale_shape(300, 400) for g in GRANULARITIES.values()} == {
        "tensor": (), "row": (300, 1), "1x16": (300, 25), "1x128": (300, 4), "128x128": (3, 4), "mx": (300, 13),
    }  # fmt: skip
    for rows, k in ((1, 1), (1, 300), (300, 16), (128, 128), (129, 400), (0, 20), (5, 0)):
        for g in GRANULARITIES.values():
            for dtype in g.scale_dtypes:
                shape = g.scale_shape(rows, k)
                scale = torch.rand(shape) if dtype != E8M0 else torch.randint(100, 150, shape)
                scale = scale.to(torch.uint8).view(E8M0) if dtype == E8M0 else scale.to(dtype)
                found = infer_granularity(scale, rows, k)
                expanded = (reference.expand(scale, h, rows, k) for h in (g, found))
                assert torch.equal(*expanded), (g, found)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    (
        (torch.ones(1), ValueError, r"scale of a \(4, 40\) matrix .*\(4, 3\) \(1x16\).*got \(1,\)"),
        (torch.ones(3, 4), ValueError, r"got \(3, 4\)"),
        (torch.ones(4, 2), ValueError, r"got \(4, 2\)"),
        (torch.ones(4, 1, dtype=torch.float16), TypeError, "scale must be float32.*float16"),
        (
            torch.ones(4, 3, dtype=torch.uint8).view(E8M0),
            ValueError,
            r"\(4, 2\) \(mx\), got \(4, 3\)",
        ),
        (torch.ones(4, 1, device="meta"), ValueError, "scale must be on cpu, got meta"),
    ),
)
def test_scales_that_do_not_fit(scale: Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fp8.dequantize(torch.zeros(4, 40).to(E4M3), scale)


def test_scales_may_have_any_value() -> None:
    q = torch.tensor([[1.0, -2.0]]).to(E4M3)
    for value in (0.0, -3.0, math.nan, math.inf):
        scale = torch.full((1, 1), value)
        assert same(fp8.dequantize(q, scale), q.float() * value)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    (
        ({"x": torch.ones(2, 2, dtype=torch.float64)}, TypeError, "x must be float32.*float64"),
        ({"x": torch.ones(2, 2, dtype=torch.int32)}, TypeError, "x must be float32.*int32"),
        ({"x": torch.ones(2, 2).to(E4M3)}, TypeError, "x must be float32.*float8"),
        ({"x": torch.ones(())}, ValueError, r"x must have shape \(..., K\)"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float8_e4m3fn or float8_e5m2, got torch.int8"),
        ({"dtype": torch.float8_e4m3fnuz}, TypeError, "dtype must be .*fnuz"),
        ({"granularity": "1x32"}, ValueError, "granularity must be one of .*'1x32'"),
        ({"scale_dtype": torch.float16}, TypeError, "scale_dtype must be torch.float32 or .*float16"),
        ({"scale_dtype": E8M0}, TypeError, "scale_dtype must be .* with granularity 'tensor'"),
        ({"granularity": "mx", "scale_dtype": torch.float32}, TypeError, "scale_dtype must be .*e8m0"),
        ({"rounding": "up"}, ValueError, "rounding must be 'nearest' or 'stochastic', got 'up'"),
        ({"seed": 1}, ValueError, "seed must be None unless .* got 1"),
        ({"rounding": "stochastic", "seed": -1}, ValueError, "seed must be in .* got -1"),
        ({"rounding": "stochastic", "seed": 2**63}, ValueError, "seed must be in .* got 9223372036854775808"),
        ({"x": torch.ones(2, 2, 2), "transposed": True}, ValueError, "x must be 2-D to be transposed"),
        ({"maxima": torch.ones(3, 1), "granularity": "row"}, ValueError, r"maxima must have shape \(2, 1\)"),
        ({"maxima": torch.ones(()).double()}, TypeError, "maxima must be float32, got torch.float64"),
        ({"x": torch.ones(2, 2, requires_grad=True)}, ValueError, "fp8_quantize has no gradients"),
    ),
)  # fmt: skip
def test_bad_input(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fp8.quantize(**({"x": torch.ones(2, 2)} | arguments))


def test_bad_input_of_the_others() -> None:
    q = torch.ones(2, 2).to(E4M3)
    with pytest.raises(
        TypeError, match="q must be float8_e4m3fn or float8_e5m2, got torch.float32"
    ):
        fp8.dequantize(torch.ones(2, 2), torch.ones(()))
    with pytest.raises(TypeError, match="dtype must be float32.*float64"):
        fp8.dequantize(q, torch.ones(()), torch.float64)
    with pytest.raises(ValueError, match="q must have shape"):
        fp8.dequantize(q[0, 0], torch.ones(()))
    with pytest.raises(ValueError, match="fp8_dequantize has no gradients"):
        fp8.dequantize(q, torch.ones((), requires_grad=True))
    with pytest.raises(TypeError, match="x must be float32.*float8"):
        fp8.cast(q)
    with pytest.raises(TypeError, match="dtype must be float8_e4m3fn"):
        fp8.cast(torch.ones(2), torch.float16)
    with pytest.raises(ValueError, match="granularity must be one of"):
        fp8.absmax(torch.ones(2, 2), "column")
    with pytest.raises(TypeError, match="x must be float32.*int64"):
        fp8.absmax(torch.ones(2, 2, dtype=torch.int64))


# torch.library and torch.compile.


def test_opcheck_and_compile() -> None:
    x = torch.randn(5, 40)
    ops = torch.ops.lowbit
    # The schema test multiplies results, which torch cannot do in FP8; its claim, no argument changes, is in others.
    check = functools.partial(
        torch.library.opcheck,
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    for g in map(find_granularity, ("tensor", "128x128", "mx")):
        s = g.scale_dtypes[-1]
        for transposed, seed in ((True, None), (False, 4)):
            check(ops.fp8_quantize.default, (x, None, E5M2, g.name, s, transposed, seed))
        check(ops.fp8_absmax.default, (x, g.name))
        q, scale = fp8.quantize(x, granularity=g.name)
        check(ops.fp8_dequantize.default, (q, scale, torch.bfloat16))
    check(ops.fp8_cast.default, (x, E4M3, True))

    def f(x: Tensor) -> Tensor:
        q, scale = fp8.quantize(x, E5M2, "1x16", rounding="stochastic", seed=2)
        return fp8.dequantize(q, scale)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        x = torch.randn(2, rows, 40)
        assert torch.equal(compiled(x), f(x))


def test_public_names() -> None:
    assert lowbit.fp8 is fp8
    assert all(callable(getattr(fp8, name)) for name in fp8.__all__)


def test_plain_torch_says_that_it_stands_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(available, "has_triton", lambda: False)
    monkeypatch.setattr(matmul_cuda, "obstacle", lambda *_: "it is not built")
    backends._log_plain.cache_clear()
    cuda = torch.device("cuda")
    with caplog.at_level(logging.WARNING, "lowbit"):
        assert backends.quantizer(cuda, 0) is pytorch_fp8
        assert not caplog.messages
        assert backends.quantizer(cuda, 5) is pytorch_fp8
        row = find_granularity("row")
        assert backends.choose_product(cuda, row, row, 5).backend is pytorch_fp8
    assert len(caplog.messages) == 1
    assert "on cuda: triton" in caplog.messages[0]
