"""The canonical layout against packers that share no code with it: a loop over bits, and numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lowbit import _C, layouts, ops, packing  # noqa: F401  (ops registers torch.ops.lowbit)
from lowbit.formats import FORMATS, Format
from lowbit.layouts.operands import TENSORS
from weights import ALL_FORMATS, random_codes, random_weight

# One format of each way to pack, and a table that does not use all codes.
PACKINGS = list({(f.bits, f.packing, f.num_codes): f for f in ALL_FORMATS}.values())
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100)
each_packing = pytest.mark.parametrize(
    "format", PACKINGS, ids=lambda f: f"{f.bits}-{f.packing}-{f.num_codes}"
)


def some_codes(format: Format, n: int, k: int) -> torch.Tensor:
    return random_codes(format, n, k, torch.Generator().manual_seed(n * 1000 + k))


def pack_row_slowly(codes: list[int], format: Format) -> list[int]:
    """One row of the definition at the top of packing.py, digit by digit and bit by bit."""
    digits = {"trits": (3, 5), "base5": (5, 3), "base6": (6, 3)}
    if format.packing in digits:
        base, per_byte = digits[format.packing]
        row = [0] * -(-len(codes) // per_byte)
        for k, code in enumerate(codes):
            row[k // per_byte] += code * base ** (k % per_byte)
        return row
    row = [0] * -(-len(codes) * format.bits // 8)
    for k, code in enumerate(codes):
        for bit in range(format.bits):
            position = k * format.bits + bit
            row[position // 8] |= (code >> bit & 1) << position % 8
    return row


@pytest.mark.parametrize(("bits", "low"), [(4, 0), (6, 0), (6, -32)])
def test_scales_are_a_stream_of_bits(bits: int, low: int):
    scales = torch.arange(low, low + 2**bits, dtype=torch.int8).repeat(3).view(3, -1)
    packed = packing.pack_scales(scales, bits)
    single = np.unpackbits(
        scales.numpy().view(np.uint8)[..., None], axis=2, count=bits, bitorder="little"
    )
    wanted = np.packbits(single.reshape(3, -1), axis=1, bitorder="little")
    np.testing.assert_array_equal(packed.numpy(), wanted)
    assert torch.equal(packing.unpack_scales(packed, bits, low < 0), scales)


@each_packing
@pytest.mark.parametrize("k", WIDTHS)
def test_bytes_are_those_of_the_definition(format: Format, k: int):
    codes = some_codes(format, 3, k)
    packed = packing.pack_codes(codes, format)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [pack_row_slowly(row, format) for row in codes.tolist()]
    assert torch.equal(packing.unpack_codes(packed, format, k), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("k", WIDTHS)
def test_bytes_are_those_of_numpy_packbits(bits: int, k: int):
    format = FORMATS[f"kmeans{bits}"]
    codes = some_codes(format, 4, k)
    stream = np.unpackbits(codes.numpy()[..., None], axis=2, count=bits, bitorder="little")
    expected = np.packbits(stream.reshape(4, -1), axis=1, bitorder="little")
    np.testing.assert_array_equal(packing.pack_codes(codes, format).numpy(), expected)


@each_packing
def test_every_code_survives(format: Format):
    codes = torch.arange(format.num_codes, dtype=torch.uint8).repeat(2, 3)
    packed = packing.pack_codes(codes, format)
    assert torch.equal(packing.unpack_codes(packed, format, codes.shape[1]), codes)
    packing.check_padding_and_range(packed, format, codes.shape[1])


@each_packing
def test_the_compiled_packer_agrees(format: Format):
    for k in WIDTHS:
        codes = some_codes(format, 5, k)
        packed = packing.pack_codes(codes, format)
        compiled = torch.from_numpy(_C.pack(codes.numpy(), format.bits, format.base, 2))
        assert torch.equal(compiled, packed)
        assert torch.equal(torch.ops.lowbit.pack(codes, format.spec), packed)
        back = torch.from_numpy(_C.unpack(packed.numpy(), k, format.bits, format.base, 2))
        assert torch.equal(back, codes)


@each_packing
def test_slices_do_not_show(format: Format, monkeypatch: pytest.MonkeyPatch):
    codes = some_codes(format, 11, 37)
    whole = packing.pack_codes(codes, format)
    for size in (1, 37, 75, 100):
        monkeypatch.setattr(packing, "_SLICE_CODES", size)
        assert torch.equal(packing.pack_codes(codes, format), whole)
        assert torch.equal(packing.unpack_codes(whole, format, 37), codes)
        packing.check_padding_and_range(whole, format, 37)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(shape):
    codes = torch.zeros(shape, dtype=torch.uint8)
    packed = packing.pack_codes(codes, FORMATS["int3"])
    assert tuple(packed.shape) == (shape[0], FORMATS["int3"].row_bytes(shape[1]))
    assert torch.equal(packing.unpack_codes(packed, FORMATS["int3"], shape[1]), codes)


def test_codes_of_any_strides():
    codes = some_codes(FORMATS["int3"], 34, 21)
    strided = codes.t()[::2]
    expected = packing.pack_codes(strided.contiguous(), FORMATS["int3"])
    assert torch.equal(packing.pack_codes(strided, FORMATS["int3"]), expected)
    wide = torch.zeros(11, 20, dtype=torch.uint8)
    wide[:, : expected.shape[1]] = expected
    view = wide[:, : expected.shape[1]]
    assert torch.equal(packing.unpack_codes(view, FORMATS["int3"], 34), strided)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (
            torch.zeros(2, 2),
            r"codes must be a 2-D uint8 tensor, got torch.float32 of shape \(2, 2\)",
        ),
        (torch.zeros(4, dtype=torch.uint8), r"2-D uint8 tensor, got torch.uint8 of shape \(4,\)"),
        (torch.full((1, 3), 3, dtype=torch.uint8), "codes must be below 3 .* got 3"),
        (torch.full((1, 3), 255, dtype=torch.uint8), "codes must be below 3 .* got 255"),
    ],
)
@pytest.mark.parametrize("name", ["ternary", "ternary_trits"])
def test_pack_refuses(codes, message, name):
    with pytest.raises(ValueError, match=message):
        packing.pack_codes(codes, FORMATS[name])


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(2, 4, dtype=torch.uint8),
        torch.zeros(2, 6, dtype=torch.uint8),
        torch.zeros(2, 5, dtype=torch.int8),
    ],
)
def test_unpack_refuses(packed):
    with pytest.raises(ValueError, match=r"packed must be uint8 of shape \(2, 5\) for K = 13"):
        packing.unpack_codes(packed, FORMATS["int3"], 13)


def test_damage_is_found():
    good = packing.pack_codes(torch.full((3, 9), 2, dtype=torch.uint8), FORMATS["ternary"])
    packing.check_padding_and_range(good, FORMATS["ternary"], 9)
    bad = good.clone()
    bad[1, 1] |= 0b11
    with pytest.raises(ValueError, match="'ternary' hold a code above 2: the data is damaged"):
        packing.check_padding_and_range(bad, FORMATS["ternary"], 9)
    trits = torch.tensor([[242, 8]], dtype=torch.uint8)
    packing.check_padding_and_range(trits, FORMATS["ternary_trits"], 7)
    with pytest.raises(ValueError, match="'ternary_trits' hold a byte above 242"):
        packing.check_padding_and_range(trits + 1, FORMATS["ternary_trits"], 7)
    two = dataclasses.replace(FORMATS["ternary_trits"], name="two_of_three", table=(-1.0, 1.0))
    packing.check_padding_and_range(torch.tensor([[1 + 3]], dtype=torch.uint8), two, 5)
    with pytest.raises(ValueError, match="'two_of_three' hold a code above 1"):
        packing.check_padding_and_range(torch.tensor([[2 + 3]], dtype=torch.uint8), two, 5)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("format", ALL_FORMATS, ids=lambda f: f.name)
def test_operands_have_the_specs_that_checks_compare(format: Format, layout: str):
    """Kernels read exactly the bytes of `operand_specs`."""
    if layout not in layouts.fitting(format):
        pytest.skip("no kernel has this layout of the format")
    n, k = 70, 200
    qt = random_weight(format, n, k)
    w = layouts.to_kernel(qt, layout)
    found = dict(zip(TENSORS, w.operands.tensors, strict=True))
    specs = layouts.find(layout).specs(format, n, k)
    for name, t in found.items():
        assert (t is None) == (name not in specs), name
        if t is not None:
            assert (tuple(t.shape), t.dtype) == specs[name], name
    again = layouts.from_kernel(w)
    assert all(
        torch.equal(t.view(torch.uint8), again.tensors[name].view(torch.uint8))
        for name, t in qt.tensors.items()
        if t.dim()
    )
