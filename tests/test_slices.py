"""Rows and columns of weights: the values of a piece are those of the whole, bit for bit, in every format."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lowbit import reference
from lowbit.formats import Format, all_formats, parse
from lowbit.nn.states import same_bits
from lowbit.weights.quantized import QuantTensor
from lowbit.weights.slices import (
    column_format,
    columns_of,
    cuts_second_level,
    is_by_column,
    is_by_row,
    rows_of,
)
from weights import ALL_FORMATS, random_weight

MORE = (
    "int4_g32_o3", "nf4_g64_o5fp32", "kmeans3_pr_o2", "int2_g64_r4", "uint4_g32_r4int8", "km4_r3fp32", "int4_g32_a8b32",
    "q4_k_o4", "e8p_g64",
)  # fmt: skip
STRUCTURED = [f for f in all_formats().values() if f.structured]
FORMATS = [*ALL_FORMATS, *STRUCTURED, *(parse(name) for name in MORE)]
pytestmark = pytest.mark.usefixtures("one_thread")
every_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
N, K = 12, 352  # 352 = 2.75 groups of 128


def values(weight: QuantTensor) -> torch.Tensor:
    return reference.dequantize(weight)


@every_format
def test_rows_are_those_of_the_whole(format: Format):
    whole = random_weight(format, N, K)
    plain, want = reference.in_one_level(whole), values(whole)
    assert same_bits(values(plain), want)
    assert plain is whole or plain.format.scale == "fp32"
    for rows in (slice(3, 9), slice(0, N), torch.tensor([7, 0, 11, 7, 1])):
        piece = rows_of(plain, rows)
        assert piece.format == plain.format
        assert same_bits(values(piece), want[rows])
    count = sum(t.numel() for name, t in plain.tensors.items() if is_by_row(format, name))
    assert count >= N
    assert all(len(t) == N for name, t in plain.tensors.items() if is_by_row(format, name))


@every_format
def test_columns_are_those_of_the_whole(format: Format):
    """Pieces of whole groups, of parts of them, and ragged ones at the end."""
    whole = reference.in_one_level(random_weight(format, N, K))
    want, cut = values(whole), 0
    for unit in (96, 140, 176, 280):
        try:
            expected = column_format(whole.format.matrix, K, unit)
        except ValueError as e:
            with pytest.raises(ValueError, match=str(e).split(",")[0][:40]):
                columns_of(whole, unit, min(K, 2 * unit), unit)
            continue
        found = set()
        for start in range(0, K, unit):
            stop = min(K, start + unit)
            piece = columns_of(whole, start, stop, unit).validate()
            assert same_bits(values(piece), want[:, start:stop])
            assert piece.format.matrix == expected
            assert parse(piece.format.spec) == piece.format
            found.add(piece.format)
        assert len(found) == 1
        cut += 1
    never = format.codec == "trellis" or format.dim > K // 2
    assert never or cut >= 1 + (format.activation is None), "nothing was cut"


def test_pieces_of_whole_groups_keep_the_format():
    """And what is stored along K, put side by side again, is that of the whole: checkpoints of pieces rely on it."""
    for name in ("nf4", "q4_k", "uint4_g32", "km3x2", "int2_g64_r4", "int4_g32_a8b32"):
        whole = random_weight(parse(name), N, 1024)
        pieces = [columns_of(whole, start, start + 512, 512) for start in (0, 512)]
        for key, t in whole.tensors.items():
            if is_by_column(whole.format, key, 1024):
                assert same_bits(torch.cat([p.tensors[key] for p in pieces], 1), t)
            else:
                assert all(same_bits(p.tensors[key], t) for p in pieces)
        assert {piece.format for piece in pieces} == {whole.format}


def test_second_level_over_all_rows():
    whole = random_weight(parse("nf4_g32_dq8"), 64, 512)  # 16 rows have 256 scales
    assert not cuts_second_level(whole.format, 512, 16)
    assert cuts_second_level(whole.format, 512, 8)
    piece = rows_of(whole, slice(16, 48))
    assert piece.format == whole.format
    assert len(piece.tensors["scales2"]) == 2
    assert same_bits(values(piece), values(whole)[16:48])
    with pytest.raises(
        ValueError, match="'nf4_g32_dq8' must begin and end at multiples of 256 scales"
    ):
        rows_of(whole, slice(8, 32))
    with pytest.raises(ValueError, match="share factors over all rows"):
        columns_of(whole, 0, 256, 256)


def test_outliers_of_pieces():
    """All outliers of a row in one piece; a piece without any; pads are zeros that even keep the sign of -0."""
    whole = random_weight(parse("int4_g32_o4"), 3, 64)
    columns = torch.tensor([[0, 1, 2, 3], [32, 33, 62, 63], [0, 31, 32, 63]], dtype=torch.int32)
    zeros = torch.full_like(whole.tensors["codes"], 0x88)  # every value is 0 * scale
    tensors = {
        **whole.tensors,
        "codes": zeros,
        "outlier_columns": columns,
        "scales": -whole.tensors["scales"],
    }
    whole = QuantTensor(whole.format, whole.shape, tensors)
    for start in (0, 32):
        piece = columns_of(whole, start, start + 32, 32).validate()
        assert piece.format == whole.format
        assert same_bits(values(piece), values(whole)[:, start : start + 32])


@pytest.mark.parametrize(
    ("name", "start", "stop", "unit", "message"),
    [
        ("int4_g32", 0, 65, None, r"columns must be a range in \[0, 64\), got 0 to 65"),
        ("int4_g32", 32, 32, None, "columns must be a range"),
        ("int4_g32", 32, 48, 20, "start must be a multiple of unit, got 32 and 20"),
        ("int4_g32", 8, 64, 8, "groups of 32 would become groups of 8, 16 are the least"),
        ("trellis2", 0, 32, None, "functions of the codes that follow"),
        ("vq8_d4", 10, 20, None, "a code stands for 4 weights, and 10 is no multiple"),
        ("int4_g32_a8", 0, 32, 32, "int8 activations have a scale for whole rows"),
        ("int4_g32_a8b32", 16, 32, 16, "int8 activations have a scale for 32 values"),
        ("int4_g32_r10", 0, 8, 32, "the rank 10 must be below 8 in a piece 16 x 8"),
    ],
)
def test_what_cannot_be_cut(name: str, start: int, stop: int, unit: int | None, message: str):
    whole = random_weight(parse(name), 16, 64)
    with pytest.raises(ValueError, match=message):
        columns_of(whole, start, stop, unit)


def test_whole_weights_are_not_copied():
    whole = random_weight(dataclasses.replace(parse("int4_g32"), name="mine"), 16, 64)
    assert columns_of(whole, 0, 64) is whole
