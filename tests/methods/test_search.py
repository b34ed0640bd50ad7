"""Scales by search: against every integer scale by brute force, and never worse than k-means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interrupts import assert_stops
from oracle import SEARCHED_KINDS, assert_codes_are_best, assert_search_descends, error_of, normal

from lowbit import _C
from lowbit.formats import FORMATS, parse
from lowbit.methods import quantize, search
from lowbit.methods.registry import default_method

NAMES = ("km4", "km3", "km2", "km4_g16", "km3_g16", "km2_g16")
FIXED = (
    "nf4", "nf4_row_bf16", "nf4_g32_int8", "int4", "int2_g32_fp32", "int8_g32", "q4_0", "iq4_nl", "fp4", "ternary",
    "ternary_trits", "binary", "q6_k", "q3_k", "iq4_xs",
)  # fmt: skip
FP32 = (24, -149, float(np.finfo(np.float32).max))
RATIOS = np.array([s * (0.7 + 0.05 * i) for s in (1, -1) for i in range(10)], np.float32)


def brute_force(
    w: np.ndarray, importance: np.ndarray, step: float, top: int, table: np.ndarray
) -> float:
    """The least error of one group over every integer scale, each weight at its nearest entry."""
    scales = np.float32(step) * np.arange(-top, top + 1, dtype=np.float32)
    values = (scales[:, None] * table[None]).astype(np.float64)
    nearest = ((w[None, :, None] - values[:, None, :]) ** 2).min(2)
    return float((nearest * importance).sum(1).min())


def test_formats_say_their_bits():
    """Codes, a byte per group, two bytes per row and an fp32 table."""
    n, k = 64, 1024
    for name in NAMES:
        format, bits = FORMATS[name], int(name[2])
        group = 16 if name.endswith("g16") else 32
        assert (format.bits, format.group, format.fitted) == (bits, group, True)
        exact = bits + 8 / group + 16 / k + 32 * 2**bits / (n * k)
        assert quantize(normal(n, k), name).bits_per_weight == exact


def test_search_is_the_default_of_signed_integer_scales():
    wanted = dict.fromkeys((*NAMES, "kmeans4_g32_int8", "kmeans3_g16_int6s256"), "search")
    wanted |= dict.fromkeys(("kmeans4", "kmeans4_pr", "kmeans4_g32_uint6s256"), "kmeans")
    wanted |= dict.fromkeys(("nf4", "q6_k"), "rtn")
    assert {name: default_method(parse(name)) for name in wanted} == wanted


@pytest.mark.parametrize("top", [31, 127])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_scales_against_every_integer(bits: int, weighted: bool, top: int):
    """What is reported is the error of the scales that are returned; over many groups it is within 7 % of the least
    that any integer has, and a group is never below its own.
    """
    rng = np.random.default_rng(bits)
    rows, k, group = 40, 23, 9
    w = rng.standard_normal((rows, k)).astype(np.float32)
    importance = rng.random((rows, k)).astype(np.float32) if weighted else np.ones_like(w)
    table = np.sort(rng.uniform(-1, 1, 2**bits)).astype(np.float32)
    table[-1] = 1
    steps = np.repeat(np.abs(w).max(1, keepdims=True) * np.float32(1.2 / top), 3, 1)
    given = importance if weighted else None
    zero = np.zeros_like(steps)
    scales, errors, _ = _C.search_scales(w, given, group, zero, steps, top, FP32, table, RATIOS)
    assert (np.abs(np.rint(scales / steps)) <= top).all()
    np.testing.assert_array_equal(np.rint(scales / steps).astype(np.float32) * steps, scales)
    mine = least = 0.0
    for r in range(rows):
        row = 0.0
        for g, at in enumerate(slice(b, min(b + group, k)) for b in range(0, k, group)):
            values = (scales[r, g] * table).astype(np.float64)
            nearest = ((w[r, at, None] - values) ** 2).min(1)
            own = float((nearest * importance[r, at]).sum())
            best = brute_force(w[r, at], importance[r, at], steps[r, g], top, table)
            assert own >= best * (1 - 1e-9)
            row, least = row + own, least + best
        np.testing.assert_allclose(errors[r], row, rtol=1e-6)
        mine += row
    assert mine <= 1.07 * least


def test_scales_at_hand_are_kept_unless_others_are_better():
    """The best integers of all, given as a start, come back; so they do without any candidate."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((20, 8)).astype(np.float32)
    table = np.array([-0.9, -0.2, 0.3, 1.0], np.float32)
    steps = np.full((20, 1), 0.03, np.float32)
    every = steps[0] * np.arange(-127, 128, dtype=np.float32)
    values = (every[:, None] * table).astype(np.float64)
    errors = ((w[:, None, :, None] - values[None, :, None, :]) ** 2).min(3).sum(2)
    best = every[errors.argmin(1)][:, None]
    for ratios in (RATIOS, RATIOS[:0]):
        scales, found, _ = _C.search_scales(w, None, 8, best, steps, 127, FP32, table, ratios)
        np.testing.assert_array_equal(scales, best)
        np.testing.assert_allclose(found, errors.min(1), rtol=1e-6)


@pytest.mark.parametrize("threads", [2, 7])
def test_threads_do_not_show(threads: int):
    w = normal(33, 70).numpy()
    steps = np.full((33, 5), 0.03, np.float32)
    table = np.array([-0.9, -0.2, 0.3, 1.0], np.float32)
    args = (w, None, 16, steps * 50, steps, 127, FP32, table, RATIOS)
    for one, other in zip(
        _C.search_scales(*args, None, 1), _C.search_scales(*args, None, threads), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("isa", [isa for isa in _C.isa_detected() if isa in ("avx2", "avx512")])
def test_instruction_sets_do_not_show(isa: str):
    """All add in one order; tables of more than 32 entries are looked up otherwise."""
    w, importance = normal(33, 70).numpy(), normal(33, 70, seed=1).abs().numpy()
    steps = np.full((33, 5), 0.03, np.float32)
    floats, integers = (None, 0, (8, -133, 3e38)), (steps, 127, FP32)
    for entries in (4, 16, 64):
        table = np.sort(normal(1, entries).numpy()[0])
        for kind in (floats, integers):
            for counted in (None, importance):
                args = (w, counted, 16, steps * 50, *kind, table, RATIOS, None, 1)
                for one, other in zip(
                    _C.search_scales(*args, "scalar"), _C.search_scales(*args, isa), strict=True
                ):
                    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", SEARCHED_KINDS)
def test_error_never_rises_and_is_below_that_of_kmeans(name: str, weighted: bool, kind: str):
    assert_search_descends(name, kind, weighted, (1, 2, 3, 8))


@pytest.mark.parametrize("name", ["km4", "km4x2", "km2_g16"])
@pytest.mark.parametrize("weighted", [False, True])
def test_tables_fitted_to_some_rows(name: str, weighted: bool, monkeypatch: pytest.MonkeyPatch):
    w = normal(64, 256)
    counts = normal(1, 256)[0].square() if weighted else torch.ones(256)
    every = quantize(w, name, "search", weights=counts)
    # A third of the rows, which have no importance by themselves where all of it lies on others.
    monkeypatch.setattr(search, "FITTED_WEIGHTS", w.numel() // 3 + 1)
    some = quantize(w, name, "search", weights=counts)
    assert not torch.equal(some.table, every.table)
    # 22 rows have no more than 176 weights for each entry of a pair: about 1 part of 20 more error.
    assert error_of(some, w, counts) < 1.08 * error_of(every, w, counts)
    kmeans = quantize(w, name, "kmeans", weights=counts)
    assert error_of(some, w, counts) <= error_of(kmeans, w, counts)
    apart = torch.zeros_like(w)
    apart[1::3] = 1
    found = quantize(w, name, "search", weights=apart)
    assert error_of(found, w, apart) <= error_of(
        quantize(w, name, "kmeans", weights=apart), w, apart
    )


@pytest.mark.parametrize(
    ("name", "most"),
    [("km4", 0.57), ("km3", 2.4), ("km2", 9.8), ("km4_g16", 0.42), ("km3_g16", 1.85), ("km2_g16", 8.2)],
)  # fmt: skip
def test_error_of_a_normal_weight(name: str, most: float):
    """In % of the squares; k-means with absmax scales leaves 0.67, 2.84, 11.3, 0.54, 2.37 and 10.3."""
    weight = normal(96, 1536)
    assert 100 * error_of(quantize(weight, name), weight) <= most * float(weight.square().sum())


@pytest.mark.parametrize("name", NAMES)
def test_the_sign_of_a_group_does_not_matter(name: str):
    """Groups that change their sign change that of their scale, and nothing else moves."""
    weight, group = normal(16, 160), FORMATS[name].group
    signs = normal(16, 160 // group, seed=1).sign().repeat_interleave(group, 1)
    expected = quantize(weight, name)
    qt = quantize(weight * signs, name)
    assert torch.equal(qt.dequantize(), expected.dequantize() * signs)
    assert torch.equal(qt.tensors["codes"], expected.tensors["codes"])


@pytest.mark.parametrize("name", ["km4", "km2_g16"])
def test_columns_of_importance_zero_have_no_part(name: str):
    """Whatever they hold; the others are as if they were 0."""
    weight, other = normal(6, 96), normal(6, 96)
    columns = [0, 5, 40, 95]
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1))
    importance[columns] = 0
    other[:, columns] = weight[:, columns] * 1000
    kept = [c for c in range(96) if c not in columns]
    other[:, kept] = weight[:, kept]
    a, b = (quantize(w, name, weights=importance) for w in (weight, other))
    for key in ("scales", "scales2", "table"):
        assert torch.equal(a.tensors[key], b.tensors[key])
    assert torch.equal(a.unpack()[:, kept], b.unpack()[:, kept])
    scaled = quantize(weight, name, weights=importance * 2.0**-40)
    assert torch.equal(scaled.dequantize(), a.dequantize())
    none = quantize(weight, name, weights=torch.zeros(96))
    assert torch.equal(none.dequantize(), quantize(weight, name).dequantize())


def test_importance_is_followed():
    weight = normal(32, 256)
    importance = torch.where(torch.arange(256) % 4 == 0, 100.0, 1.0)
    plain, followed = quantize(weight, "km3"), quantize(weight, "km3", weights=importance)
    assert error_of(followed, weight, importance) < 0.8 * error_of(plain, weight, importance)


@pytest.mark.parametrize("name", NAMES)
def test_constant_and_tiny_weights(name: str):
    for value in (1.0, -0.01):
        deq = quantize(torch.full((3, 150), value), name).dequantize()
        # A row's factor is of 8 bits, the integer of a group is the nearest of up to 127.
        assert (deq - value).abs().max() <= abs(value) / 100
    for shape in ((1, 1), (1, 17), (3, 33)):
        qt = quantize(normal(*shape), name).validate()
        assert qt.shape == shape
        assert qt.dequantize().isfinite().all()
    assert torch.equal(quantize(torch.zeros(2, 40), name).dequantize(), torch.zeros(2, 40))


@pytest.mark.parametrize(
    ("digits", "dtype"), [(24, torch.float32), (11, torch.float16), (8, torch.bfloat16)]
)
def test_scales_are_rounded_to_their_dtype(digits: int, dtype: torch.dtype):
    """As torch rounds them, subnormals included, but not to infinity; a scale of 0 stays where it is nearer."""
    info = torch.finfo(dtype)
    floats = (digits, round(float(np.log2(info.smallest_normal))) + 1 - digits, info.max)
    wanted = (normal(400, 1).double() * torch.logspace(-9, 5.5, 400).double()[:, None]).float()
    # One weight a row, of value 1: the refitted scale is the weight.
    one, zero = np.ones(1, np.float32), np.zeros((400, 1), np.float32)
    scales, *_ = _C.search_scales(wanted.numpy(), None, 1, zero, None, 0, floats, one, one)
    expected = wanted.to(dtype).float().clamp(-info.max, info.max)
    assert torch.equal(torch.from_numpy(scales), expected + 0.0)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", ["normal", "heavy", "rows"])
def test_error_is_below_that_of_rounding_to_nearest(name: str, weighted: bool, kind: str):
    weight = normal(24, 200)
    if kind == "heavy":
        weight = weight**3
    elif kind == "rows":
        weight *= torch.logspace(-2, 2, 24)[:, None]
    importance = torch.rand(200, generator=torch.Generator().manual_seed(2)) if weighted else None
    counts = 1.0 if importance is None else importance.double()
    last = error_of(quantize(weight, name), weight, counts)
    for iterations in (1, 2, 8):
        qt = quantize(weight, name, "search", weights=importance, iterations=iterations).validate()
        error = error_of(qt, weight, counts)
        assert error <= last * (1 + 1e-6)
        last = error
    assert_codes_are_best(qt, weight)


@pytest.mark.parametrize(
    ("name", "most"), [("q4_0", 0.69), ("iq4_nl", 0.56), ("nf4", 0.71), ("int4_g64", 0.85)]
)
def test_error_of_a_normal_weight_in_given_values(name: str, most: float):
    """In % of the squares; absmax leaves 0.90, 0.74, 0.85 and 1.06, llama.cpp 0.74 and 0.58 in the first two."""
    weight = normal(96, 1536)
    error = error_of(quantize(weight, name, "search"), weight)
    assert 100 * error <= most * float(weight.square().sum())


def test_importance_of_given_values_is_followed():
    weight = normal(32, 256)
    importance = torch.where(torch.arange(256) % 4 == 0, 100.0, 1.0)
    plain = quantize(weight, "nf4", "search")
    followed = quantize(weight, "nf4", "search", weights=importance)
    assert error_of(followed, weight, importance) < 0.9 * error_of(plain, weight, importance)
    importance[7] = 0
    other = weight.clone()
    other[:, 7] = 1000
    a, b = (quantize(w, "nf4", "search", weights=importance) for w in (weight, other))
    assert torch.equal(a.scales, b.scales)


def test_floats_of_scales():
    """Binary digits, the exponent of the least number and the largest number of IEEE 754 and of bf16."""
    wanted = {"fp16": (11, -24, 65504.0), "bf16": (8, -133, 3.3895313892515355e38), "fp32": FP32}
    for dtype, floats in wanted.items():
        assert search._floats(parse(f"nf4_{dtype}")) == floats


def test_scales_that_fp16_only_just_holds():
    weight = normal(4, 64).clamp(-1, 1) * 65000
    for name in ("nf4", "kmeans4"):
        deq = quantize(weight, name, "search").validate().dequantize()
        assert (deq - weight).norm() < 0.1 * weight.norm()


def test_what_search_refuses():
    for name in (
        "uint4",
        "q4_1",
        "nf4_dq8",
        "mxfp4",
        "e4m3",
        "kmeans4_pr",
        "kmeans4_g32_uint6s256",
    ):
        with pytest.raises(ValueError, match="method 'search' needs integers without a zero or"):
            quantize(normal(4, 64), name, "search")
    with pytest.raises(ValueError, match="iterations must be 1 or more, got 0"):
        quantize(normal(4, 64), "km4", iterations=0)
    weight = normal(4, 64)
    weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"weight\[2, 3\] = nan is not finite"):
        quantize(weight, "km4")
    with pytest.raises(ValueError, match="importance must be finite in fp32 and not negative"):
        quantize(normal(4, 64), "km4", weights=torch.full((64,), -1.0))


def test_what_the_compiled_search_refuses():
    w, steps = np.ones((2, 8), np.float32), np.ones((2, 2), np.float32)
    table = np.array([-1, 1], np.float32)
    good = {"weights": w, "importance": None, "group": 4, "scales": steps, "steps": steps, "top": 127,
            "floats": FP32, "table": table, "ratios": RATIOS}  # fmt: skip
    for changes, message in (
        ({"weights": w[:0]}, "weights must be 2-D and not empty"),
        ({"importance": w[:1]}, "importance must have shape"),
        ({"group": 0}, "group must be at least 1"),
        ({"scales": steps[:, :1]}, "scales must have shape"),
        ({"steps": steps[:1]}, "steps must have shape"),
        ({"table": table[::-1]}, "table must be ascending"),
        ({"table": table[:0]}, "table must be 1-D with 1 to 256 entries"),
        ({"ratios": steps}, "ratios must be 1-D"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.search_scales(**(good | changes))


def test_an_interrupt_stops_the_search():
    setup = """
    w = np.random.default_rng(0).standard_normal((2000, 16384), np.float32)
    scales, table = np.ones((2000, 512), np.float32), np.linspace(-1, 1, 256, dtype=np.float32)
    ratios = np.linspace(0.1, 2, 64, dtype=np.float32)
    """
    assert_stops(
        "_C.search_scales(w, None, 32, scales, None, 0, (24, -149, 1e38), table, ratios, None, 2)",
        setup,
    )
