"""A pair of tables: what the bytes of such a weight say, and the search of scales and tables against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import SEARCHED_KINDS, assert_search_descends, error_of, normal

import lowbit
from lowbit import _C, layouts
from lowbit.formats import FORMATS, Format, parse
from lowbit.layouts import CANONICAL, K16, M16, N16
from lowbit.methods import quantize, search
from lowbit.methods.registry import default_method
from weights import random_weight

NAMES = tuple(f"km{bits}x2{group}" for bits in (4, 3, 2) for group in ("", "_g16"))
FLOATS = (24, -149, float(np.finfo(np.float32).max))
RATIOS = np.array([s * (0.7 + 0.05 * i) for s in (1, -1) for i in range(10)], np.float32)
TOP = 63


def test_formats_say_their_bits():
    """Codes, a byte per group, two bytes per row and two fp32 tables: what "km4" takes, but for the second table."""
    n, k = 64, 1024
    for name in NAMES:
        format, bits = FORMATS[name], int(name[2])
        group = 16 if name.endswith("g16") else 32
        assert (format.bits, format.group, format.fitted) == (bits, group, True)
        assert default_method(format) == "search"
        exact = bits + 8 / group + 16 / k + 2 * 32 * 2**bits / (n * k)
        assert random_weight(format, n, k).bits_per_weight == exact


@pytest.mark.parametrize("name", ["km4x2", "km3x2_g16", "km2x2_g16_int7s48fp32"])
def test_bytes_say_scale_and_table(name: str):
    """W = (byte >> 1) * factor * table[byte & 1][code], rounded twice, in a loop that shares no code with it."""
    format, (n, k) = parse(name), (5, 120)
    qt = random_weight(format, n, k)
    codes, scales = qt.unpack().numpy(), qt.scales.numpy().astype(int)
    second, table = qt.scales2.float().numpy(), qt.table.numpy()
    assert {0, 1} == set((scales & 1).ravel())
    assert (scales < 0).any()
    expected = np.empty((n, k), np.float32)
    for row, column in np.ndindex(n, k):
        byte = scales[row, column // format.group]
        factor = second[row, column // (format.scale2_group or k)]
        scale = np.float32((byte - byte % 2) // 2) * factor
        expected[row, column] = scale * table[byte % 2, codes[row, column]]
    assert np.array_equal(qt.dequantize().numpy(), expected)
    x = torch.eye(k)
    for layout in (CANONICAL, N16):
        w = layouts.to_kernel(qt, layout)
        assert np.array_equal(lowbit.linear(x, w.operands).T.numpy(), expected)
        back = layouts.from_kernel(w)
        assert all(torch.equal(back.tensors[key], t) for key, t in qt.tensors.items())


def test_layouts_that_hold_them():
    assert set(layouts.fitting(FORMATS["km4x2"])) == {CANONICAL, N16, K16}
    with pytest.raises(ValueError, match="format 'km4x2' does not fit the layout 'm16'"):
        layouts.to_kernel(random_weight(FORMATS["km4x2"], 16, 64), M16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "int8"}, "scale must be 'int7' with table_scope 'pair', got 'int8'"),
        ({"table_scope": "tensor"}, "scale must be another one than 'int7' without"),
        ({"bits": 5}, r"bits must be one of \(2, 3, 4\) with table_scope 'pair', got 5"),
        ({"activation": "int8_table"}, "table_scope must be 'tensor' with int8 activations"),
        ({"table": (-1.0, 1.0)}, "table_scope must be 'tensor' when the format carries"),
        ({"scale2": None}, "scale2 must be one of .* with scale 'int7', got None"),
    ],
)
def test_what_a_format_must_be(change: dict[str, object], message: str):
    fields = {"name": "x", "codec": "lut", "bits": 4, "group": 32, "scale": "int7", "scale2": "bf16",
              "table_scope": "pair"}  # fmt: skip
    Format(**fields)
    with pytest.raises(ValueError, match=message):
        Format(**fields | change)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_search_against_every_integer_and_table(bits: int, weighted: bool):
    """What is reported is the error of what is returned; over many groups it is within 7 % of the least that any
    integer has with any table, and a group is never below its own.
    """
    rng = np.random.default_rng(bits)
    rows, k, group, tables = 40, 23, 9, 3
    w = rng.standard_normal((rows, k)).astype(np.float32)
    importance = rng.random((rows, k)).astype(np.float32) if weighted else np.ones_like(w)
    table = np.sort(rng.uniform(-1, 1, (tables, 2**bits)).astype(np.float32), 1)
    table[:, -1] = 1
    steps = np.repeat(np.abs(w).max(1, keepdims=True) * np.float32(1.2 / TOP), 3, 1)
    start = rng.integers(0, tables, steps.shape).astype(np.uint8)
    given = importance if weighted else None
    scales, errors, chosen = _C.search_scales(
        w, given, group, np.zeros_like(steps), steps, TOP, FLOATS, table, RATIOS, start
    )
    assert set(chosen.ravel()) == set(range(tables))
    every = np.arange(-TOP, TOP + 1, dtype=np.float32)
    mine = least = 0.0
    for r in range(rows):
        row = 0.0
        for g, at in enumerate(slice(b, min(b + group, k)) for b in range(0, k, group)):
            values = (np.float32(steps[r, g]) * every)[:, None, None] * table
            nearest = ((w[r, at, None, None, None] - values.astype(np.float64)) ** 2).min(3)
            losses = (nearest * importance[r, at, None, None]).sum(0)  # (integers, tables)
            own = losses[round(float(scales[r, g] / steps[r, g])) + TOP, chosen[r, g]]
            assert own >= losses.min() * (1 - 1e-9)
            row, least = row + own, least + losses.min()
        np.testing.assert_allclose(errors[r], row, rtol=1e-6)
        mine += row
    assert mine <= 1.07 * least


def test_the_compiled_search_refuses_what_it_cannot_choose():
    w, ones = np.ones((2, 8), np.float32), np.ones((2, 2), np.float32)
    given = (w, None, 4, ones, ones, TOP, FLOATS)
    table = np.array([[-1, 1], [0, 1]], np.float32)
    for tables, chosen, message in (
        (table[:, ::-1], None, "table must be ascending"),
        (table, np.zeros((2, 1), np.uint8), "chosen must have shape"),
        (table, np.full((2, 2), 2, np.uint8), "chosen must be below the number of tables, 2"),
        (table[None], None, "table must be 1-D"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.search_scales(*given, tables, RATIOS, chosen)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", SEARCHED_KINDS)
def test_error_never_rises_and_is_below_that_of_kmeans(weighted: bool, kind: str):
    assert_search_descends("km4x2" if weighted else "km2x2_g16", kind, weighted, (1, 3, 8))


@pytest.mark.parametrize("name", NAMES)
def test_error_is_well_below_that_of_one_table(name: str):
    weight = normal(48, 512)
    one, two = (error_of(quantize(weight, n), weight) for n in (name.replace("x2", ""), name))
    assert two < 0.95 * one


@pytest.mark.parametrize("name", ["km4x2", "km2x2_g16"])
def test_small_and_constant_weights(name: str):
    for value in (1.0, -0.01):
        deq = quantize(torch.full((3, 150), value), name).dequantize()
        # A row's factor is of 8 bits, the integer of a group is the nearest of up to 63.
        assert (deq - value).abs().max() <= abs(value) / 50
    for shape in ((1, 1), (1, 17), (3, 33)):
        qt = quantize(normal(*shape), name).validate()
        assert qt.dequantize().isfinite().all()
    assert torch.equal(quantize(torch.zeros(2, 40), name).dequantize(), torch.zeros(2, 40))


def test_a_table_that_no_group_has_is_that_of_the_others():
    """With scales of k-means alone all groups have the first."""
    table = quantize(normal(8, 64), "km3x2", "kmeans").table
    assert torch.equal(table[0], table[1])
    assert search.by_default(FORMATS["km3x2"])
