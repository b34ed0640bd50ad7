"""Codebooks against published tables, closed forms, and themselves on random weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import normal

import lowbit
from lowbit import codebooks
from lowbit.explanation import REFERENCE
from lowbit.formats import Format

pytest.importorskip("scipy")

# To the digits of the authors' code or of its output.
PUBLISHED = {
    "nf4": (codebooks.nf(4), (
        -1, -.6961928, -.5250731, -.3949175, -.2844414, -.1847734, -.0910500, 0,
        .0795803, .1609302, .2461123, .3379152, .4407098, .5626170, .7229568, 1), 7),
    "nf3": (codebooks.nf(3), (-1, -.5350227, -.2469314, 0, .1833375, .3819940, .6229857, 1), 7),
    "sf4_3": (codebooks.sf(4, 3), (
        -1, -.575725, -.403755, -.29162, -.204868, -.131054, -.064036, 0,
        .055934, .113835, .176078, .246078, .329642, .438727, .60598, 1), 6),
    "sf4_4": (codebooks.sf(4, 4), (
        -1, -.608729, -.435845, -.318393, -.225229, -.144689, -.070863, 0,
        .061908, .125773, .193936, .269711, .358617, .471724, .638231, 1), 6),
    "sf4_5": (codebooks.sf(4), (
        -1, -.627781, -.454736, -.334331, -.237434, -.152899, -.074982, 0,
        .065513, .132965, .204661, .283835, .375805, .491076, .656781, 1), 6),
    "sf4_6": (codebooks.sf(4, 6), (
        -1, -.640101, -.467104, -.344838, -.245517, -.15835, -.077722, 0,
        .067911, .137742, .211771, .293169, .387111, .503714, .66875, 1), 6),
    "sf4_7": (codebooks.sf(4, 7), (
        -1, -.648696, -.475805, -.352267, -.251247, -.162222, -.07967, 0,
        .069616, .141138, .216817, .299779, .395092, .512591, .677087, 1), 6),
    "sf3_5": (codebooks.sf(3), (-1, -.4108477, -.1801188, 0, .1329647, .2838347, .4910756, 1), 7),
    "af4_32": (codebooks.af(4, 32), (
        -1, -.723801, -.540687, -.396398, -.272358, -.159568, -.052588, 0,
        .045547, .137809, .233759, .336567, .450846, .584379, .752991, 1), 6),
    "af4_64": (codebooks.af(4, 64), (
        -1, -.694410, -.512437, -.373695, -.256076, -.149825, -.049348, 0,
        .042732, .129345, .219613, .316757, .425639, .554962, .724249, 1), 6),
    "af4_128": (codebooks.af(4, 128), (
        -1, -.664953, -.485896, -.352941, -.241392, -.141099, -.046455, 0,
        .040217, .121769, .206888, .298774, .402385, .526978, .694961, 1), 6),
    "af4_4096": (codebooks.af(4, 4096), (
        -1, -.5379, -.383992, -.276643, -.188509, -.109991, -.036186, 0,
        .031294, .094803, .161269, .233434, .31578, .417434, .564688, 1), 6),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables(name: str):
    ours, theirs, digits = PUBLISHED[name]
    # The last digit is rounded, and their integrals and quantiles carry an error of their own.
    np.testing.assert_allclose(ours, theirs, atol=1.5 * 10.0**-digits, rtol=0)


def test_small_floats_and_powers_of_two():
    both = lambda *m: tuple(sorted({v * s + 0.0 for v in m for s in (1.0, -1.0)}))  # noqa: E731
    assert codebooks.e2m1() == both(0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert codebooks.e2m1("super-range") == (*codebooks.e2m1(), 8)
    assert codebooks.e2m1("super-precision")[-2:] == (5, 6)
    assert codebooks.e3m0() == both(0, 0.25, 0.5, 1, 2, 4, 8, 16)
    np.testing.assert_allclose(
        codebooks.fp4_bnb()[7:], np.array([0, 0.0625, 2, 3, 4, 6, 8, 12]) / 12, rtol=2**-24
    )
    np.testing.assert_allclose(
        codebooks.apot(4)[7:], [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1], rtol=2**-24
    )
    assert codebooks.apot(3) == both(0, 0.25, 0.5, 1)
    assert len(codebooks.apot(5)) == 31
    assert codebooks.log2(3) == both(0, 0.25, 0.5, 1)
    assert codebooks.log2(2, signed=False) == (0, 0.25, 0.5, 1)
    np.testing.assert_allclose(codebooks.log_sqrt2(2), [0, 0.5, math.sqrt(0.5), 1], rtol=2**-24)
    e4m3 = {v for v in lowbit.formats()["e4m3"].values() if math.isfinite(v)}
    assert set(codebooks.minifloat(4, 3, 7)) - e4m3 == {-480, 480}  # NaN in OCP FP8


@pytest.mark.parametrize(
    ("levels", "distortion"),
    [(2, 0.36338), (3, 0.190174), (4, 0.117482), (8, 0.034548), (16, 0.009501), (32, 0.002505)],
)
def test_lloyd_max_of_the_normal_distribution(levels: int, distortion: float):
    """Max (1960), table I: the error of the best table is 1 - E[entry^2], as every entry is a mean."""
    table = np.array(codebooks.lloyd_max(levels))
    b = np.concatenate([[-np.inf], (table[1:] + table[:-1]) / 2, [np.inf]])
    error = 1 - float(np.square(table) @ np.diff(codebooks.Normal().cdf(b)))
    assert math.isclose(error, distortion, rel_tol=5e-4)  # 0.002505 has four digits


@pytest.mark.parametrize(
    "distribution",
    [codebooks.Normal(), codebooks.Laplace(), codebooks.StudentT(5), codebooks.Beta(2.5, 4)],
    ids=str,
)
@pytest.mark.parametrize("levels", [2, 5, 16, 64])
def test_lloyd_max_entries_are_the_means_of_their_cells(distribution, levels: int):
    table = np.array(codebooks.lloyd_max(levels, distribution))
    assert len(table) == levels
    b = np.concatenate([[-np.inf], (table[1:] + table[:-1]) / 2, [np.inf]])
    mass, moment = np.diff(distribution.cdf(b)), np.diff(distribution.partial_mean(b))
    # Borders are known to 2^-24 of the largest entry; so are the means, and fp64 sums to 1e-16 / mass.
    slack = 2**-22 * np.abs(table).max() + 1e-14 / mass
    assert (np.abs(moment / mass - table) <= slack).all()


@pytest.mark.parametrize(
    "distribution",
    [codebooks.Normal(), codebooks.Laplace(), codebooks.StudentT(4), codebooks.Beta(2, 5)],
    ids=str,
)
def test_distributions_agree_with_themselves(distribution):
    p = np.linspace(0.01, 0.99, 99)
    x = distribution.ppf(p)
    np.testing.assert_allclose(distribution.cdf(x), p, rtol=1e-9)
    node, weight = np.polynomial.legendre.leggauss(20)
    width = np.diff(x) / 2
    inside = x[:-1, None] + width[:, None] * (1 + node)
    density = distribution.pdf(inside) * weight * width[:, None]
    # Laplace has a kink at its median, which is one of the x.
    np.testing.assert_allclose(density.sum(1), np.diff(p), rtol=1e-7)
    moment = (inside * density).sum(1)
    np.testing.assert_allclose(moment, np.diff(distribution.partial_mean(x)), atol=1e-9)


@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("error", ["l1", "l2"])
def test_absmax_optimal_beats_the_others(block: int, error: str):
    best = codebooks.absmax_optimal(4, block, error=error)
    assert {-1.0, 0.0, 1.0} <= set(best)
    least = codebooks.absmax_error(best, block, error=error)
    for other in (codebooks.nf(4), codebooks.sf(4), codebooks.af(4, block)):
        assert least < codebooks.absmax_error(other, block, error=error)
    entries = np.array(best)
    for i in set(range(1, 15)) - {7}:
        for step in (-1e-3, 1e-3):
            moved = entries.copy()
            moved[i] += step
            assert least < codebooks.absmax_error(tuple(moved), block, error=error)


def test_errors_under_absmax_scaling():
    """Against the normalised errors that were measured on samples, of three digits, and a sample."""
    for block, known in ((64, (0.02835, 0.02929, 0.02833)), (4096, (0.02438, 0.02291, 0.02216))):
        tables = (
            codebooks.nf(4),
            codebooks.af(4, block),
            codebooks.absmax_optimal(4, block, error="l1"),
        )
        errors = [codebooks.absmax_error(t, block, error="l1") for t in tables]
        np.testing.assert_allclose(errors, known, rtol=2e-3)
    w = normal(20000, 64).double()
    x = w / w.abs().amax(1, keepdim=True)
    table = torch.tensor(codebooks.nf(4)).double()
    nearest = table[torch.bucketize(x, (table[1:] + table[:-1]) / 2)]
    sample = float((x - nearest).square().mean())
    assert math.isclose(codebooks.absmax_error(codebooks.nf(4), 64), sample, rel_tol=5e-3)


@pytest.mark.parametrize(
    ("name", "error", "share"),
    [("binary", 1 - 2 / math.pi, 0.0), ("ternary", 0.2641, 0.31)],
)
def test_binary_and_ternary_of_a_normal_weight(name: str, error: float, share: float):
    """BWN (the mean of |w|): 1 - 2 / pi. BitNet b1.58 (to -1, 0, 1 times it): 0.264, 31 % zeros."""
    weight = normal(4, 1 << 18)
    w = lowbit.quantize(weight, f"{name}_row").dequantize()
    assert math.isclose(float((w - weight).square().mean()), error, rel_tol=0.01)
    assert math.isclose(float((w == 0).float().mean()), share, abs_tol=0.005)


TABLES = {
    "sf4": codebooks.sf(4), "af4": codebooks.af(4, 64), "nf6": codebooks.nf(6),
    "apot5": codebooks.apot(5), "e3m0": codebooks.e3m0(), "log2": codebooks.log2(4),
    "t": codebooks.absmax_optimal(3, 64, codebooks.StudentT(5)),
    "laplace": codebooks.absmax_optimal(4, 64, codebooks.Laplace(), "l1"),
    "quantiles": codebooks.quantiles(codebooks.Normal(), 4),
    "beta": codebooks.quantiles(codebooks.Beta(2, 3), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_run_through_linear(name: str):
    table = TABLES[name]
    assert list(table) == sorted(set(table))
    format = Format.lut(bits=max(1, math.ceil(math.log2(len(table)))), table=table, group=64)
    weight, x = normal(48, 200), normal(3, 200, seed=1)
    qt = lowbit.quantize(weight, format).validate()
    assert lowbit.explain(x, qt).selected != REFERENCE
    y, w = lowbit.linear(x, qt), qt.dequantize().double()
    # fp32 sums of 200 products that are rounded twice.
    bound = 2 * 202 * 2**-24 * F.linear(x.double().abs(), w.abs())
    assert ((y.double() - F.linear(x.double(), w)).abs() <= bound).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: codebooks.nf(1), ValueError, "bits must be from 2 to 8, got 1"),
        (lambda: codebooks.nf(4.0), TypeError, "bits must be an integer, got 4.0"),
        (lambda: codebooks.sf(4, 0), ValueError, "nu must be finite and above 1, got 0"),
        (lambda: codebooks.apot(6), ValueError, "bits must be from 3 to 5, got 6"),
        (lambda: codebooks.e2m1("wide"), ValueError, "variant must be one of .* got 'wide'"),
        (lambda: codebooks.minifloat(0, 3, 1), ValueError, "exponent_bits must be from 1 to 7"),
        (lambda: codebooks.minifloat(2, -1, 1), ValueError, "mantissa_bits must be an integer"),
        (lambda: codebooks.lloyd_max(1), ValueError, "levels must be an integer from 2 to 256"),
        (
            lambda: codebooks.lloyd_max(4, codebooks.StudentT(2)),
            ValueError,
            "distribution must have a variance",
        ),
        (lambda: codebooks.af(4, 1), ValueError, "block must be an integer from 2"),
        (lambda: codebooks.absmax_optimal(2, 64), ValueError, "bits must be from 3 to 8, got 2"),
        (
            lambda: codebooks.absmax_optimal(4, 64, error="max"),
            ValueError,
            r"error must be one of \('l1', 'l2'\), got 'max'",
        ),
        (lambda: codebooks.absmax_error((), 64), ValueError, "table must hold finite values"),
        (lambda: codebooks.Beta(0, 1), ValueError, "a must be finite and positive, got 0"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
